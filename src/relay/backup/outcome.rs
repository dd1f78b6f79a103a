//! What became of an attempt, and when the next one is due.
//!
//! An `agent` says here how it went. A backup that failed as a whole is held, for all its copies; a
//! copy that was deferred waits for itself.

use std::sync::PoisonError;
use std::time::{Duration, Instant};

use super::state::{Hold, Job};
use super::{Backup, LOOK_AGAIN, stored};
use crate::maillog;
use crate::message::QueueId;
use crate::relay::connection::Failure;
use crate::relay::copy::Copy;

/// One connection of several that was refused is tried again after this time.
const REFUSED: Duration = Duration::from_secs(10);

/// The first pause of all.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// The longest pause of a backup that is down.
const LONGEST_HOLD: Duration = Duration::from_secs(300);

/// The longest pause of a copy that is deferred for itself.
const LONGEST_DEFERRAL: Duration = Duration::from_secs(3600);

impl Backup {
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
            return self.give_up(copy, failure);
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
                until
            }
        };
        // One that brought the backup down waits for itself.
        let own_until = until.max(now + own_pause(&copy, LONGEST_HOLD));
        if !matches!(failure, Failure::Stopping(_)) {
            if before.is_none() {
                maillog::backup_down(&self.destination, &failure.to_string());
            }
            self.log_deferred(&copy, own_until, &format!("error: {failure}"));
        }
        drop(state);
        if before.is_none_or(|(before, _)| before != until) {
            self.hold_all(until - now, failure);
            // It may have answered another agent meanwhile.
            if self.state().hold.is_none() {
                self.release_all();
            }
        }
        self.put_off(copy, own_until, &failure.to_string(), !failure.is_before_mail());
    }

    /// The backup failed, and nothing is tried again: this copy is lost, and all that wait for it,
    /// but for what the spool has.
    fn give_up(&self, copy: Copy, failure: &Failure) {
        let mut state = self.state();
        state.landed(copy.message.id);
        let why = failure.to_string();
        let is_first = state.given_up.is_none();
        if is_first {
            maillog::backup_down(&self.destination, &why);
        }
        self.not_tried(copy.message.id, copy.is_stored(), &why);
        for job in std::mem::take(&mut state.queue) {
            self.not_tried(job.id(), job.is_stored(), &why);
        }
        state.given_up = Some(why);
        drop(state);
        if is_first {
            self.hold_all(stored::ONE_PASS, failure);
        }
        // It may be the reason: a flush tries others before it.
        if copy.is_stored() && !failure.is_before_mail() {
            let until = Instant::now() + own_pause(&copy, LONGEST_DEFERRAL);
            self.put_off(copy, until, &failure.to_string(), true);
        }
    }

    /// A copy gets no attempt any more: the spool keeps it, or it is lost.
    pub(super) fn not_tried(&self, id: QueueId, is_stored: bool, why: &str) {
        match is_stored {
            true => maillog::copy_kept(id, &self.destination, why),
            false => maillog::copy_lost(id, &self.destination, why),
        }
    }

    /// It failed as a whole, and nothing is tried again.
    pub fn is_given_up(&self) -> bool {
        self.state().given_up.is_some()
    }

    /// It failed: what is too old is given up with it. A process for one client has no time for
    /// that.
    pub fn expire_with(&self, failure: &Failure) {
        if self.plan.tries_again {
            self.expire_old(&failure.to_string());
        }
    }

    /// A pass over the spool has ended.
    pub fn end_pass(&self) {
        let given_up = self.state().given_up.clone();
        if let Some(why) = given_up {
            self.expire_old(&why);
        }
    }

    /// The backup deferred this copy, or some of its recipients: those wait for themselves.
    pub fn defer(&self, copy: Copy, why: &str) {
        if !self.plan.tries_again && !copy.is_stored() {
            self.state().landed(copy.message.id);
            return maillog::copy_lost(copy.message.id, &self.destination, why);
        }
        let until = Instant::now() + own_pause(&copy, LONGEST_DEFERRAL);
        if self.is_too_old(&copy) {
            return self.expire(copy, why);
        }
        self.log_deferred(&copy, until, why);
        self.put_off(copy, until, why, true);
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
