//! The commands of the transaction: what of them goes to the primary, and what its replies do.
//!
//! `session` asks here for a run of commands before it looks at a command itself, and comes back
//! with what no run takes. Replies are the primary's, or the failure that answers for it.

use std::time::Instant;

use super::{End, Session, Transaction, not_offered};
use crate::maillog;
use crate::message::QueueId;
use crate::relay::primary::MAX_UNANSWERED;
use crate::shutdown::TICK;
use crate::smtp::command::{Command, Relayed};
use crate::smtp::envelope::{Envelope, Path};
use crate::smtp::grammar::Step;
use crate::smtp::reply::{Class, Reply};
use crate::smtp::wire::Line;

impl Session<'_, '_, '_> {
    /// Takes from the input the commands that can go to the primary together, `XFORWARD* [MAIL]
    /// RCPT* [DATA]`: all that will be in order if the primary accepts them, and that no check of ours
    /// refuses. Where it stops, [`Session::answer`] finds out why.
    pub(super) fn take_run(&mut self) -> Vec<Relayed> {
        let mut run = Vec::new();
        if !self.greeted || self.primary.failure().is_some() {
            return run;
        }
        let mut open = self.transaction.is_some();
        let mut recipients =
            self.transaction.as_ref().map_or(0, |t| t.envelope.forward_paths.len());
        let mut octets = 0;
        while octets < MAX_UNANSWERED && (run.is_empty() || self.primary.takes_batches()) {
            let Line::Whole(line) = self.client.input.peek_line() else { break };
            octets += line.len() + 2;
            let Ok(Command::Relayed(command)) = Command::parse(line) else { break };
            if run.is_empty() && !open {
                self.primary.prepare();
            }
            let in_order = match &command {
                Relayed::Mail(_) | Relayed::Xforward(_) => !open && self.may_begin(&command),
                Relayed::Rcpt(_) => open && recipients < self.shared.max_recipients,
                Relayed::Data => open && recipients > 0,
            };
            if !in_order {
                break;
            }
            open |= matches!(command, Relayed::Mail(_));
            recipients += usize::from(matches!(command, Relayed::Rcpt(_)));
            let is_last = command == Relayed::Data;
            run.push(command);
            self.client.input.consume_line();
            if is_last {
                break;
            }
        }
        run
    }

    /// Sends a run of commands to the primary and passes its replies on.
    pub(super) fn relay(&mut self, run: &[Relayed]) -> Result<(), End> {
        self.errors = 0;
        self.behind_a_message = false;
        if let Err(reply) = self.primary.send(run) {
            return self.close(&reply);
        }
        let mut flushed = Instant::now();
        for (n, command) in run.iter().enumerate() {
            // A slow primary answers one by one, and the client's patience is for each reply.
            if flushed.elapsed() > TICK {
                self.client.flush().inspect_err(|_| self.primary.abort())?;
                flushed = Instant::now();
            }
            self.client.flush_much().inspect_err(|_| self.primary.abort())?;
            let asked = Instant::now();
            let reply = self.primary.answer(command, n == 0);
            self.without_mail_since += asked.elapsed();
            self.relayed(command, reply)?;
        }
        Ok(())
    }

    /// The primary, or its failure, has answered a command.
    fn relayed(&mut self, command: &Relayed, reply: Reply) -> Result<(), End> {
        let step = match command {
            Relayed::Xforward(attributes) => return self.forwarded(attributes, &reply),
            Relayed::Mail(_) => Step::Mail,
            Relayed::Rcpt(_) => Step::Rcpt,
            Relayed::Data => Step::Data,
        };
        let success = matches!(reply.class(), Class::Success | Class::Intermediate);
        if !self.grammar.step(step, &reply) && success {
            // The primary went on where it had refused what comes before: 354 though it accepted
            // no recipient, or 250 to RCPT after a refused MAIL. Only closing gets out of that.
            self.primary.abort();
            self.leave_transaction();
            self.client.say(&out_of_order(command));
            return Ok(());
        }
        if reply.code() == 421 {
            return self.close(&reply);
        }
        if matches!(command, Relayed::Mail(_)) {
            self.mail_refused = !success;
        }
        match command {
            Relayed::Mail(path) if success => {
                let origin = std::mem::take(&mut self.origin);
                let (reverse_path, forward_paths) = (path.clone(), Vec::new());
                let envelope = Envelope { origin, reverse_path, forward_paths };
                self.transaction =
                    Some(Transaction { id: QueueId::next(), envelope, is_full: false });
            }
            Relayed::Rcpt(path) if success => {
                if let Some(transaction) = &mut self.transaction {
                    transaction.envelope.forward_paths.push(path.clone());
                }
            }
            Relayed::Mail(path) | Relayed::Rcpt(path) => {
                let id = self.transaction.as_ref().map_or_else(QueueId::next, |t| t.id);
                maillog::primary_refused(
                    id,
                    self.shared.primary.destination(),
                    command.verb(),
                    path,
                    &reply,
                );
            }
            Relayed::Data | Relayed::Xforward(_) => {}
        }
        self.client.say(&reply);
        if *command == Relayed::Data {
            if success {
                return self.receive();
            }
            if self.primary.failure().is_some() {
                self.leave_transaction();
            }
        }
        Ok(())
    }

    /// The primary has answered an XFORWARD.
    fn forwarded(&mut self, attributes: &[u8], reply: &Reply) -> Result<(), End> {
        match reply.class() {
            _ if reply.code() == 421 => return self.close(reply),
            // Mail that comes now would seem to be from somebody else.
            _ if self.primary.failure().is_some() => {
                let primary = self.shared.primary.destination();
                let text = format!("primary {primary} has failed; connect anew");
                return self.close(&Reply::new(421, "4.4.2", &text));
            }
            Class::Success => self.origin.take(attributes),
            _ => maillog::command_refused(self.client.address, reply),
        }
        self.client.say(reply);
        Ok(())
    }

    /// Answers a command of the transaction that [`Session::take_run`] left.
    pub(super) fn refuse(&mut self, command: &Relayed) -> Result<(), End> {
        if let Some(failure) = self.primary.failure().cloned() {
            let fresh = self.transaction.is_none() && command.begins();
            if !fresh {
                return match command {
                    Relayed::Xforward(_) => self.mistake(out_of_order(command)),
                    _ => self.relayed(command, failure),
                };
            }
            // The failed transaction never began for the client: this is another.
            self.leave_transaction();
            if self.may_begin(command) {
                return self.relay(std::slice::from_ref(command));
            }
        }
        match command {
            Relayed::Xforward(_) if !self.primary.takes_xforward() => self.mistake(not_offered()),
            Relayed::Mail(path) if self.greeted && self.transaction.is_none() => {
                if let Err(reply) = self.check_size(path) {
                    maillog::over_limit(self.client.address, &reply, "smtp.max_message_size");
                    self.client.say(&reply);
                }
                Ok(())
            }
            Relayed::Rcpt(_) if self.transaction.is_some() => {
                let reply = Reply::new(452, "4.5.3", "too many recipients");
                if let Some(transaction) = &mut self.transaction
                    && !std::mem::replace(&mut transaction.is_full, true)
                {
                    maillog::over_limit(self.client.address, &reply, "smtp.max_recipients");
                }
                self.client.say(&reply);
                Ok(())
            }
            Relayed::Rcpt(_) | Relayed::Data if self.mail_refused => {
                self.client.say(&out_of_order(command));
                Ok(())
            }
            _ => self.mistake(out_of_order(command)),
        }
    }

    /// A command that is no mistake of the client's where no transaction is open.
    fn may_begin(&self, command: &Relayed) -> bool {
        match command {
            Relayed::Mail(path) => self.check_size(path).is_ok(),
            Relayed::Xforward(_) => self.primary.takes_xforward(),
            Relayed::Rcpt(_) | Relayed::Data => false,
        }
    }

    /// The size that MAIL declares must be within our limit.
    fn check_size(&self, path: &Path) -> Result<(), Reply> {
        // RFC 1870 allows twenty digits, which may be more than there are octets in the world.
        let digits = path.value("SIZE").filter(|value| value.iter().all(u8::is_ascii_digit));
        let declared = digits
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .filter(|digits| !digits.is_empty())
            .map(|digits| digits.parse().unwrap_or(u64::MAX));
        match declared {
            Some(size) if self.is_too_big(size) => Err(self.too_big()),
            _ => Ok(()),
        }
    }

    pub(super) fn is_too_big(&self, octets: u64) -> bool {
        let limit = self.shared.max_message_size;
        limit > 0 && octets > limit
    }

    pub(super) fn too_big(&self) -> Reply {
        Reply::new(
            552,
            "5.3.4",
            &format!("message is over the limit of {} octets", self.shared.max_message_size),
        )
    }
}

fn out_of_order(command: &Relayed) -> Reply {
    match command {
        Relayed::Data => Reply::new(503, "5.5.1", "no valid recipients"),
        command => Reply::new(503, "5.5.1", &format!("{} out of order", command.verb())),
    }
}
