//! The part of a backup's queue that lies in the spool.
//!
//! New copies are held in memory as well, so that they need not be read again. What finds no place
//! there, or has to wait, is found on disk when its time has come: agents read the folders in
//! passes, while they have nothing else to do. A copy is claimed before it is tried, wherever it
//! came from, for other processes work on the same folders.

use std::io::{self, ErrorKind};
use std::sync::{Arc, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use super::state::{State, Untold};
use super::{Backup, Job, LOOK_AGAIN};
use crate::maillog;
use crate::message::{Message, QueueId};
use crate::relay::connection::Failure;
use crate::relay::copy::Copy;
use crate::smtp::reply::Reply;
use crate::spool::claim::{Claim, Claimed, Owed, wait_for};
use crate::spool::reader::Found;

/// So many copies are read from the spool at once.
const SLICE: usize = 100;

/// Of so many copies it is remembered what the spool could not be told.
const MOST_UNTOLD: usize = 100_000;

/// How long a process that does not stay holds a backup for the others: until somebody comes by,
/// from cron or by a timer.
pub(super) const ONE_PASS: Duration = Duration::from_secs(30);

impl Backup {
    /// Reads some more of what the spool has for this backup.
    pub(super) fn read_on<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let Some(spool) = &self.plan.spool else { return state };
        let reader = state.reader.take();
        if reader.is_none() {
            // What comes from now on may be missed by this pass, and asks for another.
            state.pass_at = None;
        }
        state.is_reading = true;
        drop(state);
        let read = reader.map_or_else(|| spool.reader(&self.name), Ok).and_then(|mut reader| {
            let found = reader.read(SLICE)?;
            Ok((reader, found))
        });
        let now = Instant::now();
        let mut state = self.state();
        state.is_reading = false;
        match read {
            Ok((reader, found)) => {
                state.reader = Some(reader).filter(|_| found.len() == SLICE);
                if state.reader.is_none() {
                    // Other processes put copies there too.
                    state.wants_pass(now + LOOK_AGAIN);
                }
                for Found { entry, due } in found {
                    match wait_for(due) {
                        pause if !pause.is_zero() => state.wants_pass(now + pause),
                        _ if state.in_flight.iter().any(|(id, _)| *id == entry.id) => {}
                        _ => state.queue.push_back(Job::Stored(entry)),
                    }
                }
            }
            Err(error) => {
                maillog::spool_unreadable(&self.destination, &error);
                state.wants_pass(now + LOOK_AGAIN);
            }
        }
        if state.queue.len() > 1 {
            self.wake.notify_one();
        }
        state
    }

    /// Takes a copy for an attempt: `None` when it is not to be had, or not due. One that is held
    /// in memory alone is anybody's who has the job.
    pub fn claim(&self, job: Job, due_or_not: bool) -> Option<Copy> {
        let id = job.id();
        let claimed = self.try_claim(job, due_or_not);
        let mut state = self.state();
        match claimed {
            Ok(Some(copy)) => return Some(copy),
            Ok(None) => {}
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                maillog::spool_damaged(id, &self.destination, &error);
            }
            Err(error) => {
                maillog::spool_unreadable(&self.destination, &error);
                state.wants_pass(Instant::now() + LOOK_AGAIN);
            }
        }
        state.landed(id);
        None
    }

    fn try_claim(&self, job: Job, due_or_not: bool) -> io::Result<Option<Copy>> {
        let entry = match &job {
            Job::Held(Copy { message, .. }) => message.place.as_ref().map(|place| place.entry),
            Job::Stored(entry) => Some(*entry),
        };
        let (Some(spool), Some(entry)) = (&self.plan.spool, entry) else {
            return Ok(if let Job::Held(copy) = job { Some(copy) } else { None });
        };
        let mut claim = match spool.claim(entry, &self.name)? {
            Claimed::Yes(claim) => claim,
            Claimed::Gone => return Ok(None),
            Claimed::Busy => {
                self.state().wants_pass(Instant::now() + LOOK_AGAIN);
                return Ok(None);
            }
        };
        if let Some(owed) = self.untold(entry.id, &claim.owed) {
            if owed.places.as_ref().is_some_and(Vec::is_empty) {
                let backups = spool.load(entry)?.backups;
                claim.delivered(&backups)?;
                self.state().untold.remove(&entry.id);
                return Ok(None);
            }
            claim.owed = owed;
        }
        let pause = claim.owed.next.filter(|_| !due_or_not).map(wait_for).unwrap_or_default();
        if !pause.is_zero() {
            self.state().wants_pass(Instant::now() + pause);
            return Ok(None);
        }
        let copy = match job {
            Job::Held(copy) => copy,
            Job::Stored(_) => {
                let mail = spool.load(entry).map_err(|error| claim.without_mail(error))?;
                Copy::new(&Arc::new(Message::from_spool(entry, mail)))
            }
        };
        Ok(Some(copy.claimed(claim)))
    }

    /// The spool failed at something that is done all the same.
    pub(super) fn complain(&self, result: io::Result<()>) {
        if let Err(error) = result {
            maillog::spool_unreadable(&self.destination, &error);
        }
    }

    /// Some recipients of a copy are refused for good. True when the spool keeps them, false when
    /// there is none.
    ///
    /// # Errors
    /// Those of the spool: they are owed as before.
    pub fn refused(&self, copy: &Copy, refused: &[(usize, Reply)]) -> io::Result<bool> {
        let Some(claim) = &copy.claim else { return Ok(false) };
        let refused: Vec<_> =
            refused.iter().map(|(place, reply)| (*place, reply.to_string())).collect();
        claim.refused(&copy.message.envelope, &refused, copy.attempts).map(|()| true)
    }

    /// Other processes on the spool are not to try it either. Not to be called while the state is
    /// locked, for new mail would wait for the disk.
    pub(super) fn hold_all(&self, pause: Duration, failure: &Failure) {
        if let Some(spool) = &self.plan.spool {
            let until = SystemTime::now() + pause;
            self.complain(spool.hold(&self.name, until, &failure.to_string()));
        }
    }

    /// Other processes may try it again.
    pub(super) fn release_all(&self) {
        if let Some(spool) = &self.plan.spool {
            self.complain(spool.release(&self.name));
        }
    }

    /// A copy waits until `until`, where it is: in the spool, with a state of its own if that is
    /// `noted`, or in memory.
    pub(super) fn put_off(&self, copy: Copy, until: Instant, why: &str, noted: bool) {
        let Some(claim) = &copy.claim else { return self.state().defer(copy, until) };
        if noted {
            let owed = Owed {
                attempts: copy.attempts,
                next: Some(SystemTime::now() + until.saturating_duration_since(Instant::now())),
                reply: why.into(),
                places: Some(copy.owed.clone()),
                ..Owed::default()
            };
            // Not while the state is locked, for new mail would wait for the disk.
            let told = claim.put_off(&owed);
            // A reply may be long.
            self.remember(&copy, claim, told, Owed { reply: String::new(), ..owed });
        }
        let mut state = self.state();
        state.landed(copy.message.id);
        state.wants_pass(until);
    }

    /// Tries nothing while another process holds the backup.
    pub fn respect_hold(&self) {
        if let Some(spool) = &self.plan.spool {
            self.state().given_up = spool.held(&self.name).map(|(_, why)| why);
        }
    }

    /// It was tried for long enough.
    pub(super) fn is_too_old(&self, copy: &Copy) -> bool {
        let (Some(spool), Some(claim)) = (&self.plan.spool, &copy.claim) else { return false };
        let age = match claim.owed.since {
            Some(since) => SystemTime::now().duration_since(since).unwrap_or_default(),
            None => copy.message.accepted.elapsed(),
        };
        age > spool.settings().retry_for
    }

    /// A copy was tried for long enough.
    pub(super) fn expire(&self, copy: Copy, why: &str) {
        let why = format!("tried for longer than relay.retry_for_seconds: {why}");
        let reply = Reply::new(450, "4.4.7", &why);
        let all: Vec<_> = copy.owed.iter().map(|&place| (place, reply.clone())).collect();
        match self.refused(&copy, &all) {
            Ok(_) => {
                maillog::copy_failed(copy.message.id, &self.destination, &why);
                self.done(&copy);
            }
            Err(error) => {
                maillog::spool_unreadable(&self.destination, &error);
                self.put_off(copy, Instant::now() + LOOK_AGAIN, &why, true);
            }
        }
    }

    /// Nothing is owed of a copy any more.
    pub(super) fn remove_stored(&self, copy: &Copy) {
        if let (Some(claim), Some(place)) = (&copy.claim, &copy.message.place) {
            let told = claim.delivered(&place.backups);
            let fails = told.is_err();
            self.remember(copy, claim, told, Owed { places: Some(Vec::new()), ..Owed::default() });
            if fails {
                self.state().wants_pass(Instant::now() + LOOK_AGAIN);
            }
        }
    }

    /// What is `owed` of a copy from now on, if the spool could not be told: who has it must not get
    /// it again and again.
    fn remember(&self, copy: &Copy, claim: &Claim, told: io::Result<()>, owed: Owed) {
        let is_told = told.is_ok();
        self.complain(told);
        let mut state = self.state();
        let before = state.untold.remove(&copy.message.id);
        if !is_told && state.untold.len() < MOST_UNTOLD {
            // What the claim was given then is not what the file says.
            let attempts = before.map_or(claim.owed.attempts, |before| before.attempts);
            let untold = Untold { attempts, since: claim.owed.since, owed };
            state.untold.insert(copy.message.id, untold);
        }
    }

    /// What is owed of a copy instead of what its file says.
    fn untold(&self, id: QueueId, file: &Owed) -> Option<Owed> {
        let mut state = self.state();
        let untold = state.untold.get(&id)?;
        if (untold.attempts, untold.since) != (file.attempts, file.since) {
            state.untold.remove(&id);
            return None;
        }
        Some(Owed { since: file.since, ..untold.owed.clone() })
    }

    /// Gives up what has waited for too long while the backup is down, for nobody tries it then.
    pub(super) fn expire_old(&self, why: &str) {
        let Some(spool) = &self.plan.spool else { return };
        let found = spool.old(&self.name).and_then(|mut reader| {
            loop {
                let found = reader.read(SLICE)?;
                for Found { entry, .. } in &found {
                    let Some(copy) = self.claim(Job::Stored(*entry), true) else { continue };
                    match self.is_too_old(&copy) {
                        true => self.expire(copy, why),
                        false => self.state().landed(entry.id),
                    }
                }
                if found.len() < SLICE {
                    return Ok(());
                }
            }
        });
        self.complain(found);
    }
}
