//! A backup: the copies that it is owed, and when to try next.
//!
//! Workers put finished messages in here; `agent` threads take copies out and report what became
//! of them. A backup that fails as a whole is held, with growing pauses, and one agent alone tries
//! it; a single copy that was deferred waits for itself. Nothing here waits for a backup on behalf
//! of a client.
//!
//! The queue is a mutex and a condition variable, and not a channel: an agent waits for a copy,
//! the end of a pause or the drain, whichever comes first, and a channel's receiver tries again
//! several times before it sleeps, which cost more than the rest of a small copy.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use super::connection::{Connection, Failure, Limits};
use super::copy::Copy;
use super::destination::Destination;
use crate::maillog;
use crate::message::QueueId;
use crate::shutdown::{Deadline, Shutdown};

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
    /// failed as a whole: the process is not there for longer than its client.
    pub tries_again: bool,
}

/// One backup. Shared by workers and agents.
pub struct Backup {
    /// The server.
    pub destination: Destination,
    plan: Plan,
    state: Mutex<State>,
    /// For agents that wait: there is a copy, or the drain begins.
    wake: Condvar,
    /// For agents that were refused a connection: the drain begins.
    end: Condvar,
    dsn_missed: AtomicBool,
}

struct State {
    /// Not tried yet, oldest first.
    queue: VecDeque<Copy>,
    /// By the time of their next attempt.
    deferred: BTreeMap<(Instant, u64), Copy>,
    /// Names the entries of `deferred` apart.
    serial: u64,
    /// Being sent at this moment.
    in_flight: Vec<QueueId>,
    hold: Option<Hold>,
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
    pub fn new(destination: Destination, plan: Plan, alive: &Sender<()>) -> Backup {
        let state = State {
            queue: VecDeque::new(),
            deferred: BTreeMap::new(),
            serial: 0,
            in_flight: Vec::new(),
            hold: None,
            given_up: None,
            agents: 0,
            idle: 0,
            lingers: false,
            prober: false,
            refused: 0,
            full: false,
            alive: Some(alive.clone()),
        };
        Backup {
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
            maillog::copy_lost(copy.message.id, &self.destination, why);
            return None;
        }
        state.queue.push_back(copy);
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
    pub fn next(&self, shutdown: &Shutdown) -> Option<Copy> {
        let mut state = self.state();
        let idle_until = Instant::now() + IDLE;
        let mut linger = true;
        loop {
            let now = Instant::now();
            let held_until =
                state.hold.as_ref().map(|hold| hold.until).filter(|&until| until > now);
            if held_until.is_none()
                && let Some(copy) = state.pick(now)
            {
                return Some(copy);
            }
            let due = state.deferred.first_key_value().map(|(&(due, _), _)| due);
            let wake = held_until.or(due);
            // The drain lasts for what comes within it; while the backup is held, one agent that
            // waits to try it is enough. Others that are at work do not count: they may be stuck.
            let end = if state.alive.is_none() { Some(shutdown.drain()) } else { None };
            let nothing_comes = match end {
                Some(end) => now >= end || wake.is_none_or(|wake| wake >= end),
                None => wake.is_none() && now >= idle_until,
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
        if state.hold.take().is_some() {
            maillog::backup_back(&self.destination);
        }
    }

    /// An attempt has ended, and nothing is owed of this copy any more.
    pub fn done(&self, copy: &Copy) {
        self.state().landed(copy);
    }

    /// A connection was refused while others work: the backup is not down, it may take no more at
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
        state.landed(&copy);
        state.queue.push_front(copy);
        if !std::mem::replace(&mut state.full, true) {
            maillog::backup_full(&self.destination, &failure.to_string());
        }
        self.wake.notify_one();
        let until = Instant::now() + REFUSED;
        state.refused += 1;
        while state.alive.is_some()
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
        state.defer(copy, until);
    }

    /// The backup failed, and nothing is tried again: this copy is lost, and all that wait for it.
    fn give_up(&self, copy: &Copy, failure: &Failure) {
        let mut state = self.state();
        state.landed(copy);
        let why = failure.to_string();
        if state.given_up.is_none() {
            maillog::backup_down(&self.destination, &why);
        }
        let queue = std::mem::take(&mut state.queue);
        for id in queue.iter().map(|copy| copy.message.id).chain([copy.message.id]) {
            maillog::copy_lost(id, &self.destination, &why);
        }
        state.given_up = Some(why);
    }

    /// The backup deferred this copy, or some of its recipients: those wait for themselves.
    pub fn defer(&self, copy: Copy, why: &str) {
        if !self.plan.tries_again {
            self.state().landed(&copy);
            return maillog::copy_lost(copy.message.id, &self.destination, why);
        }
        let until = Instant::now() + own_pause(&copy, LONGEST_DEFERRAL);
        self.log_deferred(&copy, until, why);
        self.state().defer(copy, until);
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
        let deferred = std::mem::take(&mut state.deferred).into_values();
        let waiting = deferred.chain(std::mem::take(&mut state.queue)).map(|copy| copy.message.id);
        for id in waiting.chain(state.in_flight.drain(..)) {
            maillog::copy_lost(id, &self.destination, "smtp-dup is stopping");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn defer(&mut self, copy: Copy, until: Instant) {
        self.landed(&copy);
        self.serial += 1;
        self.deferred.insert((until, self.serial), copy);
    }

    /// Takes the copy that is to be tried now.
    fn pick(&mut self, now: Instant) -> Option<Copy> {
        // A backup that is down is tried with a copy that has not failed, if there is one: what
        // brings it down may be the copy that has.
        let copy = match self.hold {
            Some(_) => self.queue.pop_front().or_else(|| self.pick_deferred(now)),
            None => self.pick_deferred(now).or_else(|| self.queue.pop_front()),
        }?;
        self.in_flight.push(copy.message.id);
        Some(copy)
    }

    fn pick_deferred(&mut self, now: Instant) -> Option<Copy> {
        let due = self.deferred.first_entry().filter(|first| first.key().0 <= now)?;
        Some(due.remove())
    }

    fn landed(&mut self, copy: &Copy) {
        if let Some(at) = self.in_flight.iter().position(|&id| id == copy.message.id) {
            self.in_flight.swap_remove(at);
        }
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
