//! The message itself: what a session does between a 354 and the reply to end-of-data.
//!
//! `session` enters here when the primary has said 354 and leaves with one reply, the primary's,
//! or the failure that kept the message from it.

use std::time::Instant;

use super::{End, Session, Transaction, expiry};
use crate::maillog;
use crate::shutdown::Deadline;
use crate::smtp::grammar::Step;
use crate::smtp::incoming::Incoming;
use crate::smtp::reply::{Class, Reply};

/// This much of a message is passed on at once, if the client sends it without a pause.
const PASS_ON: usize = 64 * 1024;

impl Session<'_, '_, '_> {
    /// Receives the message behind a 354 and passes it on while it comes.
    pub(super) fn receive(&mut self) -> Result<(), End> {
        let Some(Transaction { id, envelope }) = self.transaction.take() else { return Ok(()) };
        let begun = Instant::now();
        self.client.flush()?;
        let mut message = Incoming::new(self.shared, self.agents.are_wanted());
        let reply = match self.pass_on(&mut message) {
            Ok(reply) => reply,
            Err(end) => {
                self.primary.abort();
                self.transaction = Some(Transaction { id, envelope });
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
                Some(Ok(message)) => self.agents.take(message),
                Some(Err(why)) => self.agents.lose(id, &why),
                None => {}
            }
        }
        self.grammar.step(Step::EndOfData, &reply);
        self.primary.reset();
        if reply.code() == 421 {
            return self.close(&reply);
        }
        self.client.say(&reply);
        self.behind_a_message = true;
        Ok(())
    }

    /// Reads the message to its end. Gives the reply to it: the primary's, or the failure that
    /// kept it from the primary.
    fn pass_on(&mut self, message: &mut Incoming) -> Result<Reply, End> {
        let mut outcome = Ok(());
        self.client.hold_much();
        if self.client.input.unread().is_empty() {
            self.read_message()?;
        }
        loop {
            let ended = message.decode(&mut self.client.input);
            if outcome.is_ok() && self.is_too_big(message.size()) {
                self.primary.abort();
                maillog::over_limit(self.client.address, &self.too_big(), "smtp.max_message_size");
                outcome = Err(self.too_big());
            }
            if ended {
                return Ok(match outcome {
                    Ok(()) => self.primary.end(message.unsent()),
                    Err(reply) => reply,
                });
            }
            let read = message.unsent().len() < PASS_ON && self.client.read_now()?;
            if read {
                continue;
            }
            if outcome.is_ok() && !message.unsent().is_empty() {
                outcome = self.primary.message(message.unsent());
            }
            message.sent(outcome.is_ok());
            self.read_message()?;
        }
    }

    /// Waits for more of the message.
    fn read_message(&mut self) -> Result<(), End> {
        let deadline = Deadline::of_transaction(self.shared.timeout, self.shared.shutdown);
        loop {
            if let Err(expired) = deadline.left() {
                self.primary.abort();
                return self.close(&expiry(expired));
            }
            if self.client.read()? {
                return Ok(());
            }
        }
    }
}
