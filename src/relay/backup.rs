//! A backup: the copies that it is owed, and when to try next.
//!
//! Workers hand finished messages over through a channel; `agent` threads take copies out here
//! and report what became of them. A backup that fails as a whole is held, with growing pauses,
//! and one agent alone tries it; a single copy that was deferred waits for itself. Nothing here
//! waits for a backup on behalf of a client.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};

use super::connection::{Connection, Failure, Limits};
use super::copy::Copy;
use super::destination::Destination;
use crate::maillog;
use crate::message::QueueId;
use crate::shutdown::{Deadline, Shutdown};

/// An agent without work ends after this time.
const IDLE: Duration = Duration::from_secs(60);

/// So many copies may wait for each agent before there is one more agent …
const BACKLOG: usize = 4;

/// … or none has been taken for this time.
const SLOW: Duration = Duration::from_millis(20);

/// The first pause of all.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// The longest pause of a backup that is down.
const LONGEST_HOLD: Duration = Duration::from_secs(300);

/// The longest pause of a copy that is deferred for itself.
const LONGEST_DEFERRAL: Duration = Duration::from_secs(3600);

/// One backup. Shared by workers and agents.
pub struct Backup {
    /// The server.
    pub destination: Destination,
    domain: String,
    limits: Limits,
    most_agents: usize,
    /// Copies, each for whichever agent is first, and `None` behind them when the drain begins.
    copies: (Sender<Option<Copy>>, Receiver<Option<Copy>>),
    closing: Receiver<()>,
    state: Mutex<State>,
    dsn_missed: AtomicBool,
}

struct State {
    /// Until the drain.
    open: Option<Open>,
    agents: usize,
    /// Agents that wait for work.
    idle: usize,
    hold: Option<Hold>,
    /// By the time of their next attempt.
    deferred: BTreeMap<(Instant, u64), Copy>,
    /// Names the entries of `deferred` apart.
    serial: u64,
    /// Being sent at this moment.
    in_flight: Vec<QueueId>,
    /// When an agent last took a copy.
    taken: Instant,
}

/// Dropped as one when the drain begins: the channels' other sides notice.
struct Open {
    _closing: Sender<()>,
    /// Every agent holds a clone: the last that goes is noticed.
    alive: Sender<()>,
}

/// The backup as a whole is not tried before `until`.
struct Hold {
    until: Instant,
    pause: Duration,
}

/// An agent's leave to exist; the drain waits for the last.
pub struct Leave(#[allow(dead_code, reason = "held for its drop")] Sender<()>);

impl Backup {
    /// A backup that gets copies from now on. `alive` is cloned for each agent.
    pub fn new(
        destination: Destination,
        domain: String,
        limits: Limits,
        most_agents: usize,
        alive: &Sender<()>,
    ) -> Backup {
        let (closing_sender, closing) = bounded(0);
        let open = Open { _closing: closing_sender, alive: alive.clone() };
        let state = State {
            open: Some(open),
            agents: 0,
            idle: 0,
            hold: None,
            deferred: BTreeMap::new(),
            serial: 0,
            in_flight: Vec::new(),
            taken: Instant::now(),
        };
        Backup {
            destination,
            domain,
            limits,
            most_agents,
            copies: unbounded(),
            closing,
            state: Mutex::new(state),
            dsn_missed: AtomicBool::new(false),
        }
    }

    /// Takes a copy into the queue.
    pub fn enqueue(&self, copy: Copy) {
        // Without the lock, for it wakes an agent that will want it. The receiver lives as long.
        let _ = self.copies.0.send(Some(copy));
    }

    /// Leave to start one more agent, when those at work do not keep up. One that is always at
    /// work is cheaper than several that are woken for every copy.
    pub fn recruit(&self) -> Option<Leave> {
        let backlog = self.copies.1.len();
        let mut state = self.state();
        let wanted = match state.agents {
            0 => true,
            agents if state.hold.is_some() || state.idle > 0 || agents >= self.most_agents => false,
            agents => backlog > BACKLOG * agents || backlog > 0 && state.taken.elapsed() > SLOW,
        };
        let leave = state.open.as_ref().filter(|_| wanted).map(|open| Leave(open.alive.clone()))?;
        state.agents += 1;
        Some(leave)
    }

    /// An agent for whom there was leave could not be started.
    pub fn dismiss(&self) {
        self.state().agents -= 1;
    }

    /// The next copy for an agent to try. `None` ends the agent: there is nothing to do, or
    /// another will do it.
    pub fn next(&self, shutdown: &Shutdown) -> Option<Copy> {
        loop {
            let now = Instant::now();
            let mut state = self.state();
            if state.hold.is_some() && state.agents > 1 {
                state.agents -= 1;
                return None;
            }
            let held_until =
                state.hold.as_ref().map(|hold| hold.until).filter(|&until| until > now);
            let due = state.deferred.first_key_value().map(|(&(due, _), _)| due);
            if held_until.is_none() {
                let copy = match due {
                    Some(due) if due <= now => state.deferred.pop_first().map(|(_, copy)| copy),
                    _ => self.copies.1.try_recv().ok().and_then(|sent| self.copy_or_end(sent)),
                };
                if let Some(copy) = copy {
                    return Some(state.taken(copy));
                }
            }
            let wake = held_until.or(due);
            if shutdown.is_draining() {
                let end = shutdown.drain();
                if now >= end || wake.is_none_or(|wake| wake >= end) {
                    state.agents -= 1;
                    return None;
                }
            }
            state.idle += usize::from(held_until.is_none());
            drop(state);
            let copy = match (held_until, wake) {
                (Some(until), _) => self.wait_held(until),
                (None, wake) => self.wait_for_work(wake.unwrap_or(now + IDLE)),
            };
            let mut state = self.state();
            state.idle -= usize::from(held_until.is_none());
            if let Some(copy) = copy {
                return Some(state.taken(copy));
            }
            let over = now.elapsed() >= IDLE;
            if over && state.deferred.is_empty() && self.copies.1.is_empty() {
                state.agents -= 1;
                return None;
            }
        }
    }

    /// Waits until the hold is over or the drain begins.
    fn wait_held(&self, until: Instant) -> Option<Copy> {
        if let Err(RecvTimeoutError::Disconnected) = self.closing.recv_deadline(until) {
            self.wait_draining(until);
        }
        None
    }

    /// Waits for a copy, until the next deferred one is due or the drain begins.
    fn wait_for_work(&self, until: Instant) -> Option<Copy> {
        match self.copies.1.recv_deadline(until) {
            Ok(Some(copy)) => return Some(copy),
            Ok(None) => {
                self.copy_or_end(None);
                self.wait_draining(until);
            }
            Err(_) => {}
        }
        None
    }

    /// The mark of the drain is behind all copies and is for every agent: it goes back.
    fn copy_or_end(&self, sent: Option<Copy>) -> Option<Copy> {
        if sent.is_none() {
            let _ = self.copies.0.send(None);
        }
        sent
    }

    /// The drain has begun, or is about to: nothing can come in that a wait would miss. Not
    /// longer than a moment, so that the end of the drain is seen.
    fn wait_draining(&self, until: Instant) {
        let moment = Duration::from_millis(50);
        std::thread::sleep(until.saturating_duration_since(Instant::now()).min(moment));
    }

    /// A new connection.
    ///
    /// # Errors
    /// As [`Connection::open`].
    pub fn connect(&self, shutdown: &Shutdown) -> Result<Connection, Failure> {
        let deadline = Deadline::of_copy(self.limits.connect, shutdown);
        let connection = Connection::open(&self.destination, &self.domain, self.limits, deadline)?;
        if !connection.features().dsn && !self.dsn_missed.swap(true, Ordering::Relaxed) {
            maillog::backup_without_dsn(&self.destination);
        }
        Ok(connection)
    }

    /// The backup has answered: it is not down, or not any more.
    pub fn is_up(&self) {
        if self.state().hold.take().is_some() {
            maillog::backup_back(&self.destination);
        }
    }

    /// An attempt has ended, and nothing is owed of this copy any more.
    pub fn done(&self, copy: &Copy) {
        self.state().landed(copy);
    }

    /// The backup failed: all its copies wait, this one with them.
    pub fn hold(&self, copy: Copy, failure: &Failure) {
        let mut state = self.state();
        let pause =
            state.hold.as_ref().map_or(FIRST_PAUSE, |hold| (hold.pause * 2).min(LONGEST_HOLD));
        let first = state.hold.is_none();
        let until = Instant::now() + jittered(pause);
        // Agents that were at work when it went down report the same outage: one pause for all.
        if state.hold.as_ref().is_none_or(|hold| hold.until <= Instant::now()) {
            state.hold = Some(Hold { until, pause });
        }
        let until = state.hold.as_ref().map_or(until, |hold| hold.until);
        if !matches!(failure, Failure::Stopping(_)) {
            if first {
                maillog::backup_down(&self.destination, &failure.to_string());
            }
            self.log_deferred(&copy, until, &format!("error: {failure}"));
        }
        state.defer(copy, until);
    }

    /// The backup deferred this copy, or some of its recipients: those wait for themselves.
    pub fn defer(&self, copy: Copy, why: &str) {
        let doublings = copy.attempts.saturating_sub(1).min(12);
        let pause = (FIRST_PAUSE * (1 << doublings)).min(LONGEST_DEFERRAL);
        let until = Instant::now() + jittered(pause);
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
        self.state().open = None;
        let _ = self.copies.0.send(None);
    }

    /// Names every copy that is left.
    pub fn name_lost(&self) {
        let mut state = self.state();
        let waiting = std::mem::take(&mut state.deferred)
            .into_values()
            .chain(self.copies.1.try_iter().flatten());
        let waiting = waiting.map(|copy| copy.message.id);
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

    fn taken(&mut self, copy: Copy) -> Copy {
        self.taken = Instant::now();
        self.in_flight.push(copy.message.id);
        copy
    }

    fn landed(&mut self, copy: &Copy) {
        if let Some(at) = self.in_flight.iter().position(|&id| id == copy.message.id) {
            self.in_flight.swap_remove(at);
        }
    }
}

/// Up to a fifth more or less, so that many who fail together do not come back together.
fn jittered(pause: Duration) -> Duration {
    let noise = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0u8);
    pause.mul_f64(0.8 + 0.4 * (noise as f64 / u64::MAX as f64))
}
