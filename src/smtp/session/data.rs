//! The message itself: what a session does between a 354 and the reply to end-of-data.
//!
//! `session` enters here when the primary has said 354 and leaves with one reply, the primary's,
//! or the failure that kept the message from it.

use std::io;
use std::time::{Duration, Instant};

use super::{End, Session, Transaction, expiry};
use crate::maillog;
use crate::message::{Collected, Collector, QueueId};
use crate::shutdown::Deadline;
use crate::smtp::envelope::Envelope;
use crate::smtp::grammar::Step;
use crate::smtp::incoming::Incoming;
use crate::smtp::reply::{Class, Reply};
use crate::spool::draft::Draft;

/// This much of a message is passed on at once, if the client sends it without a pause.
const PASS_ON: usize = 64 * 1024;

/// A client that sends a message slower than this, in octets a second, uses up its time. Postfix has
/// the same rate (`smtpd_min_data_rate`): half of what a modem of 9600 bit/s brings.
const MIN_RATE: u64 = 500;

/// The time that a client has for its message. Waiting uses it up, what comes fills it again, at
/// [`MIN_RATE`] and never over what it was at first. So no silence is longer than that, and a
/// trickle ends when that is used up.
struct Patience {
    most: Duration,
    left: Duration,
}

impl Patience {
    fn new(most: Duration) -> Patience {
        Patience { most, left: most }
    }

    fn waited(&mut self, time: Duration) {
        self.left = self.left.saturating_sub(time);
    }

    fn received(&mut self, octets: usize) {
        let earned = Duration::from_micros(octets as u64 * 1_000_000 / MIN_RATE);
        self.left = self.most.min(self.left + earned);
    }
}

impl<'a> Session<'a, '_, '_> {
    /// Receives the message behind a 354 and passes it on while it comes.
    pub(super) fn receive(&mut self) -> Result<(), End> {
        let Some(Transaction { mut id, envelope, .. }) = self.transaction.take() else {
            return Ok(());
        };
        let begun = Instant::now();
        self.client.flush()?;
        let (mut message, opened) = self.open(&mut id, &envelope);
        let reply = match self.pass_on(&mut message, id, opened) {
            Ok(reply) => reply,
            Err(end) => {
                self.primary.abort();
                self.transaction = Some(Transaction { id, envelope, is_full: true });
                return Err(end);
            }
        };
        let seen = maillog::Seen {
            id,
            client: self.client.address,
            envelope: &envelope,
            size: message.size(),
            message_id: message.message_id.as_deref(),
        };
        let relay = Some(self.shared.primary.destination()).filter(|_| !self.is_too_big(seen.size));
        maillog::message(&seen, relay, begun, &reply);
        if reply.class() == Class::Success {
            match message.finish(id, envelope) {
                Some(Collected::Held(message)) => self.agents.take(message),
                Some(Collected::Stored) => self.agents.look(),
                Some(Collected::Lost(why)) => self.agents.lose(id, &why),
                None => {}
            }
        }
        self.without_mail_since = Instant::now();
        self.grammar.step(Step::EndOfData, &reply);
        self.primary.reset();
        if reply.code() == 421 {
            return self.close(&reply);
        }
        self.client.say(&reply);
        self.behind_a_message = true;
        Ok(())
    }

    /// Begins to collect a message for the backups, if there are any, in the spool if there is one,
    /// which may have to give it another name. Gives also whether it may be passed on at all.
    fn open(&self, id: &mut QueueId, envelope: &Envelope) -> (Incoming<'a>, Result<(), Reply>) {
        let shared = self.shared;
        if !self.agents.are_wanted() {
            return (Incoming::new(shared, None), Ok(()));
        }
        let mut opened = Ok(());
        let draft = shared.spool.as_ref().and_then(|spool| {
            let draft = Draft::begin(spool, *id, envelope, &shared.backups);
            draft.map_err(|error| opened = self.kept(Err(error), *id)).ok()
        });
        if let Some(draft) = &draft {
            *id = draft.id();
        }
        (Incoming::new(shared, Some(Collector::new(shared.budget, draft))), opened)
    }

    /// Reads the message to its end. Gives the reply to it: the primary's, or the failure that
    /// kept it from the primary; from the beginning if it was not `opened`.
    fn pass_on(
        &mut self,
        message: &mut Incoming,
        id: QueueId,
        opened: Result<(), Reply>,
    ) -> Result<Reply, End> {
        let mut outcome = opened;
        self.client.hold_much();
        let mut patience = Patience::new(self.shared.timeout);
        if self.client.input.unread().is_empty() {
            self.read_message(&mut patience)?;
        }
        loop {
            patience.received(self.client.input.unread().len());
            let ended = message.decode(&mut self.client.input);
            if outcome.is_ok() && self.is_too_big(message.size()) {
                maillog::over_limit(self.client.address, &self.too_big(), "smtp.max_message_size");
                outcome = Err(self.too_big());
            }
            if outcome.is_ok() {
                if ended {
                    return Ok(self.pass_on_end(message, id));
                }
                if message.unsent().len() < PASS_ON && self.client.read_now()? {
                    continue;
                }
                if !message.unsent().is_empty() {
                    outcome = self.primary.message(message.unsent());
                }
                if outcome.is_ok() {
                    outcome = self.kept(message.sent(), id);
                }
            }
            if let Err(reply) = &outcome {
                // The rest is read for the sake of the client, who hears the reply at its end.
                self.primary.abort();
                message.unwanted();
                if ended {
                    return Ok(reply.clone());
                }
            }
            self.read_message(&mut patience)?;
        }
    }

    /// Passes on the last part, with the final dot, and waits for the primary's word. Meanwhile
    /// the spool makes the message durable; before that if it has to.
    fn pass_on_end(&mut self, message: &mut Incoming, id: QueueId) -> Reply {
        if self.is_spool_required()
            && let Err(reply) = self.kept(message.secure(), id)
        {
            self.primary.abort();
            return reply;
        }
        if let Err(reply) = self.primary.message(message.unsent()) {
            return reply;
        }
        if !self.is_spool_required() {
            // A failure was logged, and memory has to do.
            let _ = self.kept(message.secure(), id);
        }
        self.primary.verdict()
    }

    fn is_spool_required(&self) -> bool {
        self.shared.spool.as_ref().is_some_and(|spool| spool.settings().required)
    }

    /// Logs a failure of the spool, which costs the mail its way only if the spool is required.
    fn kept(&self, stored: io::Result<()>, id: QueueId) -> Result<(), Reply> {
        let Err(error) = stored else { return Ok(()) };
        maillog::spool_failed(id, &error);
        match self.is_spool_required() {
            true => Err(Reply::new(452, "4.3.1", "no place for copies (relay.spool_required)")),
            false => Ok(()),
        }
    }

    /// Waits for more of the message.
    fn read_message(&mut self, patience: &mut Patience) -> Result<(), End> {
        let begun = Instant::now();
        let deadline = Deadline::of_transaction(patience.left, self.shared.shutdown);
        loop {
            let has_come = self.client.read()?;
            if let Err(expired) = deadline.left() {
                self.primary.abort();
                return self.close(&expiry(expired));
            }
            if has_come {
                patience.waited(begun.elapsed());
                return Ok(());
            }
        }
    }
}
