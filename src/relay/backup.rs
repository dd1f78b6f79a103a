//! A backup: the copies that it is owed, and when to try next.
//!
//! Workers put finished messages in here; `agent` threads take copies out and report what became
//! of them. A backup that fails as a whole is held, with growing pauses, and one agent alone tries
//! it; a single copy that was deferred waits for itself. Nothing here waits for a backup on behalf
//! of a client.
//!
//! With a spool the folders are the queue, and what is held here is a part of it: see [`stored`].
//!
//! The queue is a mutex and a condition variable, and not a channel: an agent waits for a copy,
//! the end of a pause or the drain, whichever comes first, and a channel's receiver tries again
//! several times before it sleeps, which cost more than the rest of a small copy.

mod stored;

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use super::connection::{Connection, Failure, Limits};
use super::copy::Copy;
use super::destination::Destination;
use crate::maillog;
use crate::message::QueueId;
use crate::shutdown::{Deadline, Shutdown};
use crate::spool::reader::Reader;
use crate::spool::{Entry, Spool};

/// An agent without work ends after this time.
const IDLE: Duration = Duration::from_secs(60);

/// The first agent without work looks again after this time before it sleeps until it is woken …
const LINGER: Duration = Duration::from_millis(2);

/// … and so many copies are left for it, or for one that is at work, to find. Waking threads is
/// what a small copy costs most: in a steady flow of mail, one agent that is always at work does
/// with less than several that are woken for each, and no client's worker has to do it.
const LEFT_TO_FIND: usize = 4;

/// How often an agent that sleeps looks by itself, in case that the one at work is stuck.
const LOOK: Duration = Duration::from_secs(1);

/// One connection of several that was refused is tried again after this time.
const REFUSED: Duration = Duration::from_secs(10);

/// The first pause of all.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// The longest pause of a backup that is down.
const LONGEST_HOLD: Duration = Duration::from_secs(300);

/// So many copies are held in memory as well as in the spool.
const MOST_HELD: usize = 1000;

/// The spool is looked at again after this time: for what others were at, have put there, or what
/// could not be read.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// The longest pause of a copy that is deferred for itself.
const LONGEST_DEFERRAL: Duration = Duration::from_secs(3600);

/// How backups are served.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Our name in EHLO.
    pub domain: String,
    /// Time limits of each step.
    pub limits: Limits,
    /// Connections to one backup at once.
    pub most_agents: usize,
    /// What failed is tried again. Else each copy gets one attempt, and none after the backup has
    /// failed as a whole: the process is not there for longer than its client, or its one pass.
    pub tries_again: bool,
    /// Where copies lie that are owed.
    pub spool: Option<Arc<Spool>>,
}

/// A copy to be tried.
pub enum Job {
    /// One that is held in memory, and perhaps in the spool as well.
    Held(Copy),
    /// One of the spool.
    Stored(Entry),
}

impl Job {
    fn id(&self) -> QueueId {
        match self {
            Job::Held(copy) => copy.message.id,
            Job::Stored(entry) => entry.id,
        }
    }

    /// Nothing is lost when this goes.
    fn is_stored(&self) -> bool {
        match self {
            Job::Held(copy) => copy.is_stored(),
            Job::Stored(_) => true,
        }
    }
}

/// One backup. Shared by workers and agents.
pub struct Backup {
    /// The server.
    pub destination: Destination,
    /// It gets a copy of each message, and not only what the spool has for it.
    pub gets_copies: bool,
    /// Its name, also in the spool.
    name: String,
    plan: Plan,
    state: Mutex<State>,
    /// For agents that wait: there is a copy, or the drain begins.
    wake: Condvar,
    /// For agents that were refused a connection: the backup is down, or the drain begins.
    end: Condvar,
    dsn_missed: AtomicBool,
}

struct State {
    /// Not tried yet, oldest first.
    queue: VecDeque<Job>,
    /// The spool has copies that are not in `queue` and may be tried from this time on.
    pass_at: Option<Instant>,
    /// A pass over the spool that is going on; gone while an agent reads.
    reader: Option<Reader>,
    is_reading: bool,
    /// By the time of their next attempt.
    deferred: BTreeMap<(Instant, u64), Copy>,
    /// Names the entries of `deferred` apart.
    serial: u64,
    /// Delivered, though the spool could not be told.
    delivered: HashSet<QueueId>,
    /// Being sent at this moment; true for those of the spool.
    in_flight: Vec<(QueueId, bool)>,
    hold: Option<Hold>,
    /// It has taken or refused a copy before.
    has_answered: bool,
    /// It failed as a whole, and nothing is tried again: why.
    given_up: Option<String>,
    agents: usize,
    /// Agents that wait for a copy.
    idle: usize,
    /// One of them looks for itself in a moment.
    lingers: bool,
    /// An agent waits for the end of the hold.
    prober: bool,
    /// Agents that were refused a connection and wait to try again.
    refused: usize,
    /// It has refused one connection more, which is said once.
    full: bool,
    /// What it said then, until it is known whether the others are served.
    refusal: Option<String>,
    /// Cloned for each agent, until the drain begins.
    alive: Option<Sender<()>>,
}

/// The backup as a whole is not tried before `until`.
struct Hold {
    until: Instant,
    pause: Duration,
}

/// An agent's leave to exist. The drain knows by its drop that the last has ended.
pub struct Leave {
    _alive: Sender<()>,
}

impl Backup {
    /// A backup that gets copies from now on. `alive` is cloned for each agent.
    pub fn new(
        destination: Destination,
        gets_copies: bool,
        plan: Plan,
        alive: &Sender<()>,
    ) -> Backup {
        let pass_at = plan.spool.as_ref().filter(|_| plan.tries_again).map(|_| Instant::now());
        let state = State {
            queue: VecDeque::new(),
            pass_at,
            reader: None,
            is_reading: false,
            deferred: BTreeMap::new(),
            serial: 0,
            delivered: HashSet::new(),
            in_flight: Vec::new(),
            hold: None,
            has_answered: false,
            given_up: None,
            agents: 0,
            idle: 0,
            lingers: false,
            prober: false,
            refused: 0,
            full: false,
            refusal: None,
            alive: Some(alive.clone()),
        };
        Backup {
            gets_copies,
            name: destination.to_string(),
            destination,
            plan,
            state: Mutex::new(state),
            wake: Condvar::new(),
            end: Condvar::new(),
            dsn_missed: AtomicBool::new(false),
        }
    }

    /// Takes a copy into the queue. As [`Backup::recruit`].
    pub fn enqueue(&self, copy: Copy) -> Option<Leave> {
        let mut state = self.state();
        if let Some(why) = &state.given_up {
            self.not_tried(copy.message.id, copy.is_stored(), why);
            return None;
        }
        if copy.is_stored() && (state.hold.is_some() || state.queue.len() >= MOST_HELD) {
            state.wants_pass(Instant::now());
            return self.recruit_in(&mut state);
        }
        state.queue.push_back(Job::Held(copy));
        let backlog = state.queue.len();
        if state.idle == 0 {
            return self.recruit_in(&mut state);
        }
        let someone_comes = state.lingers || state.agents > state.idle;
        drop(state);
        if !someone_comes || backlog > LEFT_TO_FIND {
            self.wake.notify_one();
        }
        None
    }

    /// There is a copy in the spool for which there was no room in memory. As [`Backup::recruit`].
    pub fn look(&self) -> Option<Leave> {
        let mut state = self.state();
        state.wants_pass(Instant::now());
        self.wake.notify_one();
        self.recruit_in(&mut state)
    }

    /// Leave to start one more agent, when there is a copy and nobody free for it.
    pub fn recruit(&self) -> Option<Leave> {
        self.recruit_in(&mut self.state())
    }

    fn recruit_in(&self, state: &mut State) -> Option<Leave> {
        let wanted = match state.agents {
            0 => true,
            _ if state.hold.is_some() || state.queue.is_empty() => false,
            agents => state.idle == 0 && agents < self.plan.most_agents,
        };
        let alive = state.alive.clone().filter(|_| wanted)?;
        state.agents += 1;
        Some(Leave { _alive: alive })
    }

    /// An agent for whom there was leave could not be started.
    pub fn dismiss(&self) {
        self.state().agents -= 1;
    }

    /// The next copy for an agent to try. `None` ends the agent: there is nothing to do, or
    /// another will do it.
    pub fn next(&self, shutdown: &Shutdown) -> Option<Job> {
        let mut state = self.state();
        let idle_until = Instant::now() + IDLE;
        let mut linger = true;
        loop {
            let now = Instant::now();
            let held_until =
                state.hold.as_ref().map(|hold| hold.until).filter(|&until| until > now);
            if held_until.is_none()
                && let Some(job) = state.pick(now)
            {
                return Some(job);
            }
            if held_until.is_none() && state.is_pass_due(now) {
                state = self.read_on(state);
                continue;
            }
            let deferred = state.deferred.first_key_value().map(|(&(due, _), _)| due);
            // The spool stays when the program ends; nobody hurries to empty it then.
            let pass_at = state.pass_at.filter(|_| state.alive.is_some());
            let due = [deferred, pass_at].into_iter().flatten().min();
            let wake = held_until.or(due);
            // The drain lasts for what comes within it; while the backup is held, one agent that
            // waits to try it is enough. Others that are at work do not count: they may be stuck.
            let end = if state.alive.is_none() { Some(shutdown.drain()) } else { None };
            let nothing_comes = match end {
                Some(end) => now >= end || wake.is_none_or(|wake| wake >= end),
                // One stays for what is going to be due.
                None => (wake.is_none() || state.agents > 1) && now >= idle_until,
            };
            if nothing_comes || held_until.is_some() && state.prober {
                state.agents -= 1;
                return None;
            }
            let idle = usize::from(held_until.is_none());
            let mut left = wake.unwrap_or(idle_until).saturating_duration_since(now);
            let lingers = std::mem::take(&mut linger) && held_until.is_none() && !state.lingers;
            left = left.min(if lingers { LINGER } else { LOOK });
            state.idle += idle;
            state.lingers |= lingers;
            state.prober |= held_until.is_some();
            state = self.wake.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            state.idle -= idle;
            state.lingers &= !lingers;
            state.prober &= held_until.is_none();
        }
    }

    /// A new connection.
    ///
    /// # Errors
    /// As [`Connection::open`].
    pub fn connect(&self, shutdown: &Shutdown) -> Result<Connection, Failure> {
        let Plan { domain, limits, .. } = &self.plan;
        let deadline = Deadline::of_copy(limits.connect, shutdown);
        let connection = Connection::open(&self.destination, domain, *limits, deadline)?;
        if !connection.features().dsn && !self.dsn_missed.swap(true, Ordering::Relaxed) {
            maillog::backup_without_dsn(&self.destination);
        }
        Ok(connection)
    }

    /// The backup has answered: it is not down, or not any more.
    pub fn is_up(&self) {
        let mut state = self.state();
        if let Some(why) = state.refusal.take()
            && !std::mem::replace(&mut state.full, true)
        {
            maillog::backup_full(&self.destination, &why);
        }
        let was_held = state.hold.take().is_some();
        if was_held {
            maillog::backup_back(&self.destination);
        }
        // The first time also what another process may have left.
        let is_first = !std::mem::replace(&mut state.has_answered, true);
        if is_first || was_held {
            self.release_all();
        }
    }

    /// An attempt has ended, and nothing is owed of this copy any more.
    pub fn done(&self, copy: &Copy) {
        self.remove_stored(copy);
        self.state().landed(copy.message.id);
    }

    /// An attempt ended in nothing, by a defect of ours.
    pub fn abandon(&self, id: QueueId) {
        let mut state = self.state();
        // One that is in memory alone stays in flight, to be named at the end.
        if state.in_flight.contains(&(id, true)) {
            state.landed(id);
            state.wants_pass(Instant::now() + LOOK_AGAIN);
        }
    }

    /// A connection was refused while others work: the backup may not be down, but take no more at
    /// once. The copy goes back for an agent that has its connection; this one waits, to try
    /// again in case that the others are stuck. Gives the copy when it is not so.
    pub fn give_back(&self, mut copy: Copy, failure: &Failure) -> Option<Copy> {
        let mut state = self.state();
        // The last of all that are refused finds nobody at work, and holds the backup.
        let others_work = state.agents - state.refused > 1;
        let is_draining = state.alive.is_none();
        if !failure.is_before_mail() || !others_work || state.hold.is_some() || is_draining {
            return Some(copy);
        }
        copy.attempts -= 1;
        copy.claim = None;
        state.landed(copy.message.id);
        state.queue.push_front(Job::Held(copy));
        state.refusal = Some(failure.to_string());
        self.wake.notify_one();
        let until = Instant::now() + REFUSED;
        state.refused += 1;
        while state.alive.is_some()
            && state.hold.is_none()
            && let Some(left) = until.checked_duration_since(Instant::now())
        {
            state = self.end.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.refused -= 1;
        None
    }

    /// The backup failed: all its copies wait. This one may be the reason, and waits for itself as
    /// well.
    pub fn hold(&self, copy: Copy, failure: &Failure) {
        if matches!(failure, Failure::Stopping(_)) && copy.is_stored() {
            return self.state().landed(copy.message.id);
        }
        if !self.plan.tries_again {
            return self.give_up(&copy, failure);
        }
        let now = Instant::now();
        let mut state = self.state();
        let before = state.hold.as_ref().map(|hold| (hold.until, hold.pause));
        let until = match before {
            // Agents that were at work when it went down report the same outage.
            Some((until, _)) if until > now => until,
            _ => {
                let pause = before.map_or(FIRST_PAUSE, |(_, pause)| (pause * 2).min(LONGEST_HOLD));
                let until = now + jittered(pause);
                state.hold = Some(Hold { until, pause });
                // The others are not served either: who waits for them need not.
                state.refusal = None;
                self.end.notify_all();
                self.hold_all(until - now, failure);
                until
            }
        };
        let until = until.max(now + own_pause(&copy, LONGEST_HOLD));
        if !matches!(failure, Failure::Stopping(_)) {
            if before.is_none() {
                maillog::backup_down(&self.destination, &failure.to_string());
            }
            self.log_deferred(&copy, until, &format!("error: {failure}"));
        }
        // One that brought the backup down waits for itself.
        self.put_off(&mut state, copy, until, &failure.to_string(), !failure.is_before_mail());
    }

    /// The backup failed, and nothing is tried again: this copy is lost, and all that wait for it.
    fn give_up(&self, copy: &Copy, failure: &Failure) {
        let mut state = self.state();
        state.landed(copy.message.id);
        let why = failure.to_string();
        if state.given_up.is_none() {
            maillog::backup_down(&self.destination, &why);
            self.hold_all(stored::ONE_PASS, failure);
        }
        self.not_tried(copy.message.id, copy.is_stored(), &why);
        for job in std::mem::take(&mut state.queue) {
            self.not_tried(job.id(), job.is_stored(), &why);
        }
        state.given_up = Some(why);
    }

    /// A copy gets no attempt any more: the spool keeps it, or it is lost.
    fn not_tried(&self, id: QueueId, is_stored: bool, why: &str) {
        match is_stored {
            true => maillog::copy_kept(id, &self.destination, why),
            false => maillog::copy_lost(id, &self.destination, why),
        }
    }

    /// It failed as a whole, and nothing is tried again.
    pub fn is_given_up(&self) -> bool {
        self.state().given_up.is_some()
    }

    /// The backup deferred this copy, or some of its recipients: those wait for themselves.
    pub fn defer(&self, copy: Copy, why: &str) {
        if !self.plan.tries_again && !copy.is_stored() {
            self.state().landed(copy.message.id);
            return maillog::copy_lost(copy.message.id, &self.destination, why);
        }
        let until = Instant::now() + own_pause(&copy, LONGEST_DEFERRAL);
        if self.is_too_old(&copy) {
            return self.expire(&copy, why);
        }
        self.log_deferred(&copy, until, why);
        self.put_off(&mut self.state(), copy, until, why, true);
    }

    fn log_deferred(&self, copy: &Copy, until: Instant, why: &str) {
        let next = until.saturating_duration_since(Instant::now()).as_secs_f64().round() as u64;
        let message = &copy.message;
        maillog::copy_deferred(
            message.id,
            &self.destination,
            message.accepted,
            copy.attempts,
            next,
            why,
        );
    }

    /// No copy comes any more: the agents finish what can be finished and end.
    pub fn close(&self) {
        let mut state = self.state();
        state.alive = None;
        // The spool keeps them for others; one who comes for one client alone tries its own.
        state.queue.retain(|job| !job.is_stored() || !self.plan.tries_again);
        // What waits for better times is tried once more, for there may be none.
        let now = Instant::now();
        if let Some(hold) = &mut state.hold {
            hold.until = now;
        }
        for copy in std::mem::take(&mut state.deferred).into_values() {
            state.defer(copy, now);
        }
        drop(state);
        self.wake.notify_all();
        self.end.notify_all();
    }

    /// Names every copy that is left.
    pub fn name_lost(&self) {
        let mut state = self.state();
        let deferred =
            std::mem::take(&mut state.deferred).into_values().map(|copy| copy.message.id);
        let queue = std::mem::take(&mut state.queue);
        let queue = queue.iter().filter(|job| !job.is_stored()).map(Job::id);
        let in_flight = std::mem::take(&mut state.in_flight).into_iter();
        let in_flight = in_flight.filter(|(_, is_stored)| !is_stored).map(|(id, _)| id);
        for id in deferred.chain(queue).chain(in_flight) {
            maillog::copy_lost(id, &self.destination, "smtp-dup is stopping");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn defer(&mut self, copy: Copy, until: Instant) {
        self.landed(copy.message.id);
        self.serial += 1;
        self.deferred.insert((until, self.serial), copy);
    }

    /// Takes the copy that is to be tried now.
    fn pick(&mut self, now: Instant) -> Option<Job> {
        // A backup that is down is tried with a copy that has not failed, if there is one: what
        // brings it down may be the copy that has.
        let job = match self.hold {
            Some(_) => self.queue.pop_front().or_else(|| self.pick_deferred(now)),
            None => self.pick_deferred(now).or_else(|| self.queue.pop_front()),
        }?;
        self.in_flight.push((job.id(), job.is_stored()));
        Some(job)
    }

    fn pick_deferred(&mut self, now: Instant) -> Option<Job> {
        let due = self.deferred.first_entry().filter(|first| first.key().0 <= now)?;
        Some(Job::Held(due.remove()))
    }

    fn landed(&mut self, id: QueueId) {
        if let Some(at) = self.in_flight.iter().position(|(other, _)| *other == id) {
            self.in_flight.swap_remove(at);
        }
    }

    /// The spool is to be read again, from this time on.
    fn wants_pass(&mut self, at: Instant) {
        self.pass_at = Some(self.pass_at.map_or(at, |other| other.min(at)));
    }

    /// It is time to read the spool, or to read on.
    fn is_pass_due(&self, now: Instant) -> bool {
        let is_due = self.reader.is_some() || self.pass_at.is_some_and(|at| at <= now);
        is_due && self.alive.is_some() && !self.is_reading
    }
}

/// How long a copy waits after its last attempt, for itself alone.
fn own_pause(copy: &Copy, longest: Duration) -> Duration {
    let doublings = copy.attempts.saturating_sub(1).min(12);
    jittered((FIRST_PAUSE * (1 << doublings)).min(longest))
}

/// Up to a fifth more or less, so that many who fail together do not come back together.
fn jittered(pause: Duration) -> Duration {
    let noise = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0u8);
    pause.mul_f64(0.8 + 0.4 * (noise as f64 / u64::MAX as f64))
}
