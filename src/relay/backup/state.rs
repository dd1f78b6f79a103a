//! What a backup is owed, and what its agents are about: all that its mutex guards.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::Sender;

use crate::message::QueueId;
use crate::relay::copy::Copy;
use crate::spool::Entry;
use crate::spool::claim::Owed;
use crate::spool::reader::Reader;

/// A copy to be tried.
pub enum Job {
    /// One that is held in memory, and perhaps in the spool as well.
    Held(Copy),
    /// One of the spool.
    Stored(Entry),
}

impl Job {
    pub(super) fn id(&self) -> QueueId {
        match self {
            Job::Held(copy) => copy.message.id,
            Job::Stored(entry) => entry.id,
        }
    }

    /// Nothing is lost when this goes.
    pub(super) fn is_stored(&self) -> bool {
        match self {
            Job::Held(copy) => copy.is_stored(),
            Job::Stored(_) => true,
        }
    }
}

/// The part of a backup that changes.
pub(super) struct State {
    /// Not tried yet, oldest first.
    pub(super) queue: VecDeque<Job>,
    /// The spool has copies that are not in `queue` and may be tried from this time on.
    pub(super) pass_at: Option<Instant>,
    /// A pass over the spool that is going on; gone while an agent reads.
    pub(super) reader: Option<Reader>,
    pub(super) is_reading: bool,
    /// By the time of their next attempt.
    pub(super) deferred: BTreeMap<(Instant, u64), Copy>,
    /// Names the entries of `deferred` apart.
    pub(super) serial: u64,
    /// What has become of copies, where the spool could not be told.
    pub(super) untold: HashMap<QueueId, Untold>,
    /// Being sent at this moment; true for those of the spool.
    pub(super) in_flight: Vec<(QueueId, bool)>,
    pub(super) hold: Option<Hold>,
    /// It has taken or refused a copy before.
    pub(super) has_answered: bool,
    /// It failed as a whole, and nothing is tried again: why.
    pub(super) given_up: Option<String>,
    pub(super) agents: usize,
    /// Agents that wait for a copy.
    pub(super) idle: usize,
    /// One of them looks for itself in a moment.
    pub(super) lingers: bool,
    /// An agent waits for the end of the hold.
    pub(super) prober: bool,
    /// Agents that were refused a connection and wait to try again.
    pub(super) refused: usize,
    /// It has refused one connection more, which is said once.
    pub(super) full: bool,
    /// What it said then, until it is known whether the others are served.
    pub(super) refusal: Option<String>,
    /// Cloned for each agent, until the drain begins.
    pub(super) alive: Option<Sender<()>>,
}

/// What is owed of a copy, where its file could not be brought to say so.
pub(super) struct Untold {
    /// What the file says instead. Once it says something else, somebody has been there since, and
    /// that counts.
    pub(super) attempts: u32,
    pub(super) since: Option<SystemTime>,
    /// No places when nothing is.
    pub(super) owed: Owed,
}

/// The backup as a whole is not tried before `until`.
pub(super) struct Hold {
    pub(super) until: Instant,
    pub(super) pause: Duration,
}

impl State {
    /// Nothing is owed yet but by the spool, which is read from `pass_at` on.
    pub(super) fn new(pass_at: Option<Instant>, alive: Sender<()>) -> State {
        State {
            queue: VecDeque::new(),
            pass_at,
            reader: None,
            is_reading: false,
            deferred: BTreeMap::new(),
            serial: 0,
            untold: HashMap::new(),
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
            alive: Some(alive),
        }
    }

    pub(super) fn defer(&mut self, copy: Copy, until: Instant) {
        self.landed(copy.message.id);
        self.serial += 1;
        self.deferred.insert((until, self.serial), copy);
    }

    /// Takes the copy that is to be tried now.
    pub(super) fn pick(&mut self, now: Instant) -> Option<Job> {
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

    pub(super) fn landed(&mut self, id: QueueId) {
        if let Some(at) = self.in_flight.iter().position(|(other, _)| *other == id) {
            self.in_flight.swap_remove(at);
        }
    }

    /// The spool is to be read again, from this time on.
    pub(super) fn wants_pass(&mut self, at: Instant) {
        self.pass_at = Some(self.pass_at.map_or(at, |other| other.min(at)));
    }

    /// It is time to read the spool, or to read on.
    pub(super) fn is_pass_due(&self, now: Instant) -> bool {
        let is_due = self.reader.is_some() || self.pass_at.is_some_and(|at| at <= now);
        is_due && self.alive.is_some() && !self.is_reading
    }
}
