//! Delivery agents: the threads that bring copies to the backups.
//!
//! `server` makes one [`Agents`] for the program's length; workers give it finished messages.
//! Agents start when there is work, up to `backup_connections` for each backup, keep their
//! connection between copies, for a minute without any, and end then if nothing is owed.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{Builder, Scope};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::backup::{Backup, Job, Leave};
use super::connection::{Connection, Failure, Step};
use super::copy::{Attempt, Copy};
use crate::maillog;
use crate::message::{Message, NoCopy, QueueId};
use crate::shutdown::Shutdown;
use crate::smtp::reply::{Class, Reply};
use crate::spool::Entry;
use crate::spool::reader::{Found, Reader};

/// Stack of a worker or an agent, in octets. The handshake of TLS, which takes most of it, took 96 KiB
/// in a debug build with the longest chain of certificates that is followed.
pub const STACK: usize = 128 * 1024;

/// All backups and the scope in which their agents live.
pub struct Agents<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    backups: &'env [Backup],
    shutdown: &'env Shutdown,
}

/// So many copies that failed before are remembered by a pass until it has tried the others.
const MOST_LATER: usize = 10_000;

/// Tries what failed before, what is due longest first, for as long as that `goes_on`: it may be
/// what the backup always fails at, and ends each pass.
fn in_order(found: &mut Vec<Found>, goes_on: impl FnMut(Entry) -> bool) -> bool {
    found.sort_unstable_by_key(|found| found.due);
    found.drain(..).map(|found| found.entry).all(goes_on)
}

impl<'scope, 'env> Agents<'scope, 'env> {
    /// No agent yet.
    pub fn new(
        scope: &'scope Scope<'scope, 'env>,
        backups: &'env [Backup],
        shutdown: &'env Shutdown,
    ) -> Self {
        Agents { scope, backups, shutdown }
    }

    /// There is anyone to copy for.
    pub fn are_wanted(&self) -> bool {
        self.with_copies().next().is_some()
    }

    /// Those that get a copy of each message. Others only get what the spool has for them.
    fn with_copies(&self) -> impl Iterator<Item = &'env Backup> {
        self.backups.iter().filter(|backup| backup.gets_copies)
    }

    /// Takes a message for all backups, at once and whatever state they are in.
    pub fn take(&self, message: Message) {
        let message = Arc::new(message);
        for backup in self.with_copies() {
            if let Some(leave) = backup.enqueue(Copy::new(&message)) {
                self.start(backup, leave);
            }
        }
    }

    /// There is a message in the spool that memory has not.
    pub fn look(&self) {
        for backup in self.with_copies() {
            if let Some(leave) = backup.look() {
                self.start(backup, leave);
            }
        }
    }

    /// Begins with what earlier processes have left in the spool.
    pub fn resume(&self) {
        for backup in self.backups {
            if let Some(leave) = backup.recruit() {
                self.start(backup, leave);
            }
        }
    }

    /// One pass over what the spool has for a backup, due or not, on this thread. Gives how many
    /// copies were tried; it ends early when the backup fails as a whole, or a signal comes.
    ///
    /// # Errors
    /// Those of reading the spool.
    pub fn flush(&self, backup: &Backup, mut reader: Reader) -> io::Result<u64> {
        let (mut connection, mut tried, mut later) = (None, 0, Vec::new());
        let mut one = |entry| {
            if let Some(copy) = backup.claim(Job::Stored(entry), true) {
                self.attempt(backup, copy, &mut connection);
                tried += 1;
            }
            !backup.is_given_up() && !self.shutdown.dismisses(true)
        };
        let mut goes_on = true;
        while goes_on && let Some(found) = reader.read(1)?.pop() {
            if found.is_new() {
                goes_on = one(found.entry);
                continue;
            }
            later.push(found);
            if later.len() == MOST_LATER {
                goes_on = in_order(&mut later, &mut one);
            }
        }
        let _ = goes_on && in_order(&mut later, &mut one);
        backup.end_pass();
        Ok(tried)
    }

    /// There will be no copies of a message.
    pub fn lose(&self, id: QueueId, why: &NoCopy) {
        for backup in self.with_copies() {
            maillog::copy_lost(id, &backup.destination, &why.to_string());
        }
    }

    /// Starts one more agent.
    fn start(&self, backup: &'env Backup, leave: Leave) {
        let agents = Agents { scope: self.scope, backups: self.backups, shutdown: self.shutdown };
        let thread = Builder::new().name(format!("to {}", backup.destination)).stack_size(STACK);
        if let Err(error) = thread.spawn_scoped(self.scope, move || agents.work(backup, leave)) {
            backup.dismiss();
            maillog::no_thread(&format!("relay={} role=backup", backup.destination), &error);
        }
    }

    /// An agent's life.
    fn work(&self, backup: &'env Backup, _leave: Leave) {
        let mut connection = None;
        while let Some(job) = backup.next(self.shutdown, &mut connection) {
            if let Some(leave) = backup.recruit() {
                self.start(backup, leave);
            }
            let Some(copy) = backup.claim(job, false) else { continue };
            let id = copy.message.id;
            let attempt = AssertUnwindSafe(|| self.attempt(backup, copy, &mut connection));
            if catch_unwind(attempt).is_err() {
                maillog::panicked(&format!("{id}: relay={} role=backup", backup.destination));
                backup.abandon(id);
                connection = None;
            }
        }
    }

    /// Tries one copy once, and settles what comes next for it.
    fn attempt(&self, backup: &Backup, mut copy: Copy, connection: &mut Option<Connection>) {
        copy.attempts += 1;
        match self.deliver(backup, &copy, connection) {
            Ok(attempt) => {
                backup.is_up();
                settle(backup, copy, attempt);
            }
            Err(failure) => {
                if let Some(copy) = backup.give_back(copy, &failure) {
                    backup.hold(copy, &failure);
                    backup.expire_with(&failure);
                }
            }
        }
    }

    /// Sends a copy on the connection at hand, or on a new one if there is none or its server has
    /// closed it meanwhile. The connection stays at hand unless it failed.
    fn deliver(
        &self,
        backup: &Backup,
        copy: &Copy,
        at_hand: &mut Option<Connection>,
    ) -> Result<Attempt, Failure> {
        if let Some(mut connection) = at_hand.take()
            && connection.check_quiet(Step::Command("MAIL")).is_ok()
        {
            match copy.send(&mut connection, self.shutdown) {
                Err(failure) if is_stale(&failure) => {}
                sent => {
                    *at_hand = Some(connection).filter(Connection::is_at_rest);
                    return sent;
                }
            }
        }
        let mut connection = backup.connect(self.shutdown)?;
        let mut sent = copy.send(&mut connection, self.shutdown);
        if let Err(Failure::Unwelcome(Step::Command("XFORWARD"), reply)) = &sent {
            // A refusal that closes is one like others: no reason to keep the copy back.
            backup.refuses_origin(reply);
            connection = backup.connect(self.shutdown)?;
            connection.withhold_xforward();
            sent = copy.send(&mut connection, self.shutdown);
        }
        *at_hand = Some(connection).filter(Connection::is_at_rest);
        sent
    }

    /// Lets the agents finish, within the time that the shutdown gives them, and names what is
    /// left. `alive` ends when the last agent has. False when an agent is stuck.
    pub fn drain(&self, alive: &Receiver<()>) -> bool {
        let end = self.shutdown.drain();
        for backup in self.backups {
            backup.close();
        }
        // A socket wakes within a tick; only a name look-up or a dying disk takes longer.
        let slack = Duration::from_secs(2);
        let all_ended = alive.recv_deadline(end + slack) == Err(RecvTimeoutError::Disconnected);
        for backup in self.backups {
            backup.name_lost();
        }
        all_ended
    }
}

/// The server had closed the connection while it was idle: nothing of the copy was taken.
fn is_stale(failure: &Failure) -> bool {
    match failure {
        Failure::Lost(step) | Failure::Unwelcome(step, _) | Failure::Untimely(step, _) => {
            matches!(step, Step::Command("MAIL" | "XFORWARD"))
        }
        _ => false,
    }
}

/// Logs what became of an attempt, and keeps what is still owed.
fn settle(backup: &Backup, mut copy: Copy, attempt: Attempt) {
    let Attempt { verdict, mut refused, deferred, without, unforwarded } = attempt;
    let (id, to) = (copy.message.id, &backup.destination);
    for what in without {
        maillog::copy_reduced(id, to, what);
    }
    if let Some(reply) = unforwarded {
        backup.refuses_origin(&reply);
    }
    for (place, reply) in &refused {
        maillog::copy_recipient_refused(id, to, copy.recipient(*place), reply);
    }
    let still_owed: Vec<usize> = deferred.iter().map(|(place, _)| *place).collect();
    let last_word = deferred.into_iter().next_back().map(|(_, reply)| reply);
    let verdict = verdict.map(|reply| (reply.class(), reply));
    // A refusal of the message is one of everybody who was not judged by name.
    if let Some((Class::Permanent, reply)) = &verdict {
        let is_judged = |place| still_owed.contains(place) || is_among(&refused, place);
        let rest = copy.owed.iter().filter(|place| !is_judged(place)).copied();
        let rest: Vec<_> = rest.map(|place| (place, reply.clone())).collect();
        refused.extend(rest);
    }
    let kept = match refused.is_empty() {
        true => Ok(false),
        false => backup.refused(&copy, &refused),
    };
    let is_kept = match kept {
        Ok(is_kept) => is_kept,
        Err(error) => {
            // They are owed as before; those who have it are not.
            if let Some((Class::Success, _)) = verdict {
                copy.owed.retain(|place| still_owed.contains(place) || is_among(&refused, place));
            }
            return backup.defer(copy, &format!("error: failed/ in the spool: {error}"));
        }
    };
    match verdict {
        Some((Class::Success, reply)) => {
            maillog::copy_sent(id, to, copy.message.accepted, &reply);
        }
        Some((Class::Permanent, reply)) if is_kept => {
            maillog::copy_failed(id, to, &reply.to_string());
        }
        Some((Class::Permanent, reply)) => maillog::copy_lost(id, to, &reply.to_string()),
        Some((_, reply)) => {
            copy.owed.retain(|place| !is_among(&refused, place));
            return backup.defer(copy, &reply.to_string());
        }
        None => {}
    }
    copy.owed = still_owed;
    match last_word {
        Some(reply) => defer_rest(backup, copy, &reply),
        None => backup.done(&copy),
    }
}

fn is_among(recipients: &[(usize, Reply)], place: &usize) -> bool {
    recipients.iter().any(|(other, _)| other == place)
}

/// Some recipients were deferred by name; the others are done.
fn defer_rest(backup: &Backup, copy: Copy, reply: &Reply) {
    let names = copy.owed.iter().map(|&place| copy.recipient(place).display()).collect::<Vec<_>>();
    let names =
        if names.len() > 5 { format!("{} recipients", names.len()) } else { names.join(" ") };
    backup.defer(copy, &format!("{names}: {reply}"));
}
