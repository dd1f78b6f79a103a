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

mod outcome;
mod state;
mod stored;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

pub use self::state::Job;
use self::state::State;

use super::connection::{Connection, Failure, Limits};
use super::copy::Copy;
use super::destination::Destination;
use crate::identity::Identity;
use crate::maillog;
use crate::shutdown::{Deadline, Shutdown};
use crate::smtp::reply::Reply;
use crate::spool::Spool;

/// An agent without work ends after this time, or its connection does.
const IDLE: Duration = Duration::from_secs(60);

/// The first agent without work looks again after this time before it sleeps until it is woken …
const LINGER: Duration = Duration::from_millis(2);

/// … and so many copies are left for it, or for one that is at work, to find. Waking threads is
/// what a small copy costs most: in a steady flow of mail, one agent that is always at work does
/// with less than several that are woken for each, and no client's worker has to do it.
const LEFT_TO_FIND: usize = 4;

/// How often an agent that sleeps looks by itself, in case that the one at work is stuck.
const LOOK: Duration = Duration::from_secs(1);

/// So many copies are held in memory as well as in the spool.
const MOST_HELD: usize = 1000;

/// The spool is looked at again after this time: for what others were at, have put there, or what
/// could not be read.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// How backups are served.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Who we are.
    pub us: Identity,
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
    origin_refused: AtomicBool,
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
        Backup {
            gets_copies,
            name: destination.to_string(),
            destination,
            plan,
            state: Mutex::new(State::new(pass_at, alive.clone())),
            wake: Condvar::new(),
            end: Condvar::new(),
            dsn_missed: AtomicBool::new(false),
            origin_refused: AtomicBool::new(false),
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
    /// another will do it. One that stays without work for long has no `connection` any more.
    pub fn next(&self, shutdown: &Shutdown, connection: &mut Option<Connection>) -> Option<Job> {
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
            if now >= idle_until {
                *connection = None;
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
        let Plan { us, limits, .. } = &self.plan;
        let deadline = Deadline::of_copy(limits.connect, shutdown);
        let connection = Connection::open(&self.destination, us, *limits, deadline)?;
        if !connection.features().dsn && !self.dsn_missed.swap(true, Ordering::Relaxed) {
            maillog::backup_without_dsn(&self.destination);
        }
        Ok(connection)
    }

    /// The backup refuses XFORWARD, which it offers: said once.
    pub fn refuses_origin(&self, reply: &Reply) {
        if !self.origin_refused.swap(true, Ordering::Relaxed) {
            maillog::origin_refused(&self.destination, reply);
        }
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
