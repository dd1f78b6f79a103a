//! The primary, live: a client's transaction on a connection of its own.
//!
//! Each `session` has one [`Primary`] and passes on what it answers. Whatever goes wrong here
//! becomes a 4xx that names the primary, so that the client keeps the mail: never a 2xx that the
//! primary did not say, and never a 5xx (design: promise 1).

use super::connection::{Connection, Failure, Step};
use super::features::Features;
use super::pool::Pool;
use crate::maillog;
use crate::shutdown::{Deadline, Shutdown};
use crate::smtp::command::Relayed;
use crate::smtp::reply::{Class, Reply};

/// Commands that may be on their way unanswered, in octets: two full pipes would wait for each
/// other.
pub const MAX_UNANSWERED: usize = 16 * 1024;

/// One client's side of the primary.
pub struct Primary<'a> {
    pool: &'a Pool,
    shutdown: &'a Shutdown,
    /// Octets, 0 for none: our part in the SIZE that is mirrored.
    max_message_size: u64,
    connection: Option<Connection>,
    /// The connection has served a transaction before, and its server may have closed it since.
    used: bool,
    /// MAIL was sent and the transaction has not ended.
    open: bool,
    /// XFORWARD was sent and no transaction has ended since: the server would take what it said for
    /// true of whoever begins the next.
    marked: bool,
    /// What the client was told in reply to EHLO.
    told: Features,
    /// The answer to all that is left of a transaction in which the primary failed.
    failed: Option<Reply>,
    /// The commands last sent, in case that they have to be sent again …
    batch: Vec<u8>,
    /// … and what a server must offer to take them: PIPELINING, SIZE.
    batch_needs: Features,
}

impl<'a> Primary<'a> {
    /// No connection yet.
    pub fn new(pool: &'a Pool, shutdown: &'a Shutdown, max_message_size: u64) -> Primary<'a> {
        Primary {
            pool,
            shutdown,
            max_message_size,
            connection: None,
            used: false,
            open: false,
            marked: false,
            told: Features::default(),
            failed: None,
            batch: Vec::new(),
            batch_needs: Features::default(),
        }
    }

    /// The client says EHLO or HELO: what it may be told that we offer.
    ///
    /// # Errors
    /// The 421 for the client when no connection can be had, or the 451 when it leads to ourselves.
    pub fn hello(&mut self, extended: bool) -> Result<Features, Reply> {
        self.told = Features::default();
        self.take()?;
        let features =
            self.connection.as_ref().map(Connection::features).cloned().unwrap_or_default();
        let offered = features.mirrored(self.max_message_size);
        if extended {
            self.told = offered.clone();
        }
        Ok(offered)
    }

    /// Several commands may be sent before the first is answered.
    pub fn takes_batches(&self) -> bool {
        self.connection.as_ref().is_some_and(|connection| connection.features().pipelining)
    }

    /// The client was told that it may say XFORWARD.
    pub fn takes_xforward(&self) -> bool {
        !self.told.xforward.is_empty()
    }

    /// The connection at hand is this client's alone.
    fn is_engaged(&self) -> bool {
        self.open || self.marked
    }

    /// The connection is nobody's again, or gone. True if it was this client's.
    fn disengage(&mut self) -> bool {
        let was_engaged = self.is_engaged();
        (self.open, self.marked) = (false, false);
        was_engaged
    }

    /// The failure that answers everything up to the end of this transaction.
    pub fn failure(&self) -> Option<&Reply> {
        self.failed.as_ref()
    }

    /// Gets a connection for the next transaction: the one at hand, an idle one, or a new one.
    fn take(&mut self) -> Result<(), Reply> {
        if let Some(mut connection) = self.connection.take()
            && connection.check_quiet(Step::Command("MAIL")).is_ok()
        {
            self.connection = Some(connection);
            return Ok(());
        }
        match self.pool.take() {
            Some(connection) => {
                self.connection = Some(connection);
                self.used = true;
                Ok(())
            }
            None => self.open_new(),
        }
    }

    /// Gets a new connection.
    fn open_new(&mut self) -> Result<(), Reply> {
        match self.pool.open(self.shutdown) {
            Ok(connection) => {
                self.connection = Some(connection);
                self.used = false;
                Ok(())
            }
            Err(failure) => {
                let primary = self.pool.destination();
                maillog::primary_unavailable(primary, &failure);
                let text = format!("primary {primary} is not available: {failure}");
                Err(match failure {
                    Failure::Stopping(_) => stopping(),
                    Failure::Ourselves => Reply::new(451, "4.4.6", &text),
                    _ => Reply::new(421, failure.status(), &text),
                })
            }
        }
    }

    /// No connection was to be had: but for a 421, which ends the session, that answers all of the
    /// transaction.
    fn take_for_failure(&mut self, reply: Reply) -> Result<(), Reply> {
        if reply.code() == 421 {
            return Err(reply);
        }
        self.failed = Some(reply);
        Ok(())
    }

    /// Sends commands, which [`Primary::answer`] must then be asked about one by one. Several at
    /// once only where [`Primary::takes_batches`].
    ///
    /// # Errors
    /// The 421 for the client when there is no connection for a new transaction, or none that
    /// offers what the client was told.
    pub fn send(&mut self, commands: &[Relayed]) -> Result<(), Reply> {
        let Some(first) = commands.first() else { return Ok(()) };
        let begins = first.begins() && !self.is_engaged();
        if begins {
            self.take().or_else(|reply| self.take_for_failure(reply))?;
        }
        if self.failed.is_some() {
            return Ok(());
        }
        self.compose(commands);
        if begins {
            self.fits()?;
        }
        self.open |= commands.iter().any(|command| matches!(command, Relayed::Mail(_)));
        self.marked |= matches!(first, Relayed::Xforward(_));
        if let Err(failure) = self.send_batch(first, begins) {
            self.recover(first, true, failure)?;
        }
        Ok(())
    }

    /// Makes the batch of some commands, for the connection at hand. SIZE is the one parameter that
    /// a client may send because we offer it, and not the primary: that one must not see it.
    fn compose(&mut self, commands: &[Relayed]) {
        let features = self.connection.as_ref().map(Connection::features);
        let takes_size = features.is_some_and(|features| features.size.is_some());
        self.batch.clear();
        self.batch_needs = Features { pipelining: commands.len() > 1, ..Features::default() };
        for command in commands {
            match command {
                Relayed::Mail(path) if !takes_size => {
                    Relayed::Mail(path.without("SIZE")).write(&mut self.batch);
                }
                Relayed::Mail(path) if path.value("SIZE").is_some() => {
                    self.batch_needs.size = Some(None);
                    command.write(&mut self.batch);
                }
                _ => command.write(&mut self.batch),
            }
        }
    }

    /// Sends the batch, on a connection that was `chosen` just now and seen to be quiet, or not.
    fn send_batch(&mut self, first: &Relayed, chosen: bool) -> Result<(), Failure> {
        let step = Step::Command(first.verb());
        let deadline = Deadline::of_transaction(self.pool.limits().command, self.shutdown);
        match &mut self.connection {
            Some(connection) => {
                if !chosen {
                    connection.check_quiet(step)?;
                }
                connection.send(&self.batch, step, deadline)
            }
            None => Err(Failure::Lost(step)),
        }
    }

    /// The connection at hand must offer all that the client was told, and take the batch.
    fn fits(&mut self) -> Result<(), Reply> {
        let fits = self.connection.as_ref().map(Connection::features).is_some_and(|now| {
            now.mirrored(self.max_message_size).cover(&self.told)
                && (now.pipelining || !self.batch_needs.pipelining)
                && (now.size.is_some() || self.batch_needs.size.is_none())
        });
        if fits {
            return Ok(());
        }
        self.connection = None;
        let primary = self.pool.destination();
        let text = format!("primary {primary} offers less than before; connect anew");
        Err(Reply::new(421, "4.3.2", &text))
    }

    /// The client is about to begin a transaction: a connection that waits for one tells whether
    /// it takes batches.
    pub fn prepare(&mut self) {
        if self.connection.is_none() {
            self.connection = self.pool.take();
            self.used = self.connection.is_some();
        }
    }

    /// A step failed. A connection that was used before and is dead at the first word of a new
    /// transaction is replaced, once, and the batch sent again; any other failure answers the
    /// rest of the transaction.
    ///
    /// # Errors
    /// The 421 for the client when the replacement cannot be had.
    fn recover(&mut self, command: &Relayed, first: bool, failure: Failure) -> Result<(), Reply> {
        let dead = match &failure {
            Failure::Lost(_) => true,
            Failure::Unwelcome(_, reply) | Failure::Untimely(_, reply) => reply.code() == 421,
            _ => false,
        };
        if !(dead && first && self.used && command.begins()) {
            return self.give_up(command, failure);
        }
        self.connection = None;
        if let Err(reply) = self.open_new() {
            return self.take_for_failure(reply);
        }
        self.fits()?;
        match self.send_batch(command, true) {
            Ok(()) => Ok(()),
            Err(failure) => self.give_up(command, failure),
        }
    }

    /// The primary has failed in a transaction. If that was not begun yet but said to be another
    /// client's, that is forgotten now: the session has to end, for the client to say it again.
    ///
    /// # Errors
    /// A 421 for that.
    fn give_up(&mut self, command: &Relayed, failure: Failure) -> Result<(), Reply> {
        let forgets = self.marked && command.begins();
        let text = format!("primary {}: {failure}", self.pool.destination());
        self.fail(failure);
        if forgets { Err(Reply::new(421, "4.4.2", &text)) } else { Ok(()) }
    }

    /// The answer to `command`, the next of those sent; `first` when it was the first of them.
    /// A 421 means that the session has to end.
    pub fn answer(&mut self, command: &Relayed, first: bool) -> Reply {
        loop {
            if let Some(reply) = &self.failed {
                return reply.clone();
            }
            let step = Step::Command(command.verb());
            let deadline = Deadline::of_transaction(self.pool.limits().command, self.shutdown);
            let reply = match &mut self.connection {
                Some(connection) => connection.reply(step, deadline),
                None => Err(Failure::Lost(step)),
            };
            let failure = match reply {
                Ok(reply) if reply.code() == 421 => Failure::Unwelcome(step, reply),
                Ok(reply) => match (command, reply.class()) {
                    (Relayed::Data, Class::Success)
                    | (
                        Relayed::Mail(_) | Relayed::Rcpt(_) | Relayed::Xforward(_),
                        Class::Intermediate,
                    ) => Failure::Nonsense(step, reply.to_string()),
                    (Relayed::Mail(_), Class::Transient | Class::Permanent) => {
                        self.open = false;
                        return reply;
                    }
                    (Relayed::Xforward(_), _) => {
                        // It lives, and what it knows now another connection would not.
                        self.used = false;
                        return reply;
                    }
                    _ => return reply,
                },
                Err(failure) => failure,
            };
            if let Err(reply) = self.recover(command, first, failure) {
                return reply;
            }
            // Replaced, or failed: either way there is an answer now.
        }
    }

    /// Gives the connection up and settles what the client hears from now on.
    fn fail(&mut self, failure: Failure) -> Reply {
        self.connection = None;
        self.disengage();
        let primary = self.pool.destination();
        maillog::primary_failed(primary, &failure);
        let reply = match &failure {
            Failure::Untimely(Step::Message, reply)
                if matches!(reply.class(), Class::Transient | Class::Permanent) =>
            {
                reply.clone()
            }
            Failure::Unwelcome(_, reply) => reply.clone(),
            Failure::Untimely(_, reply) if reply.code() == 421 => reply.clone(),
            Failure::Stopping(_) => stopping(),
            Failure::Nonsense(..) => {
                Reply::new(451, "4.5.0", &format!("primary {primary}: {failure}"))
            }
            Failure::Unfit(..) => {
                Reply::new(451, failure.status(), &format!("primary {primary}: {failure}"))
            }
            _ => Reply::new(451, "4.4.2", &format!("primary {primary}: {failure}")),
        };
        self.failed = Some(reply.clone());
        reply
    }

    /// Passes on a part of the message, without its final dot.
    ///
    /// # Errors
    /// The answer for the client at the end of its message, none of which is sent any more.
    pub fn message(&mut self, part: &[u8]) -> Result<(), Reply> {
        let deadline = Deadline::of_transaction(self.pool.limits().data, self.shutdown);
        let sent = match &mut self.connection {
            Some(connection) => connection
                .check_quiet(Step::Message)
                .and_then(|()| connection.send_message(part, deadline)),
            None => Err(Failure::Lost(Step::Message)),
        };
        sent.map_err(|failure| self.fail(failure))
    }

    /// Waits for the answer to the whole message, of which the last part was passed on.
    pub fn verdict(&mut self) -> Reply {
        let answer = match &mut self.connection {
            Some(connection) => {
                connection.reply(Step::EndOfData, Deadline::uncut(self.pool.limits().data))
            }
            None => Err(Failure::Lost(Step::EndOfData)),
        };
        match answer {
            Ok(reply) if reply.class() == Class::Intermediate => {
                self.fail(Failure::Nonsense(Step::EndOfData, reply.to_string()))
            }
            Ok(reply) => {
                self.disengage();
                self.used = true;
                match &mut self.connection {
                    Some(connection) if reply.code() != 421 => connection.rest(),
                    _ => self.connection = None,
                }
                reply
            }
            Err(failure) => self.fail(failure),
        }
    }

    /// Ends the transaction in mid-message: closes without a dot.
    pub fn abort(&mut self) {
        self.connection = None;
        self.disengage();
    }

    /// The client has left its transaction, by RSET or a new EHLO; or a failed one is over.
    pub fn reset(&mut self) {
        self.failed = None;
        if !self.disengage() {
            return;
        }
        let step = Step::Command("RSET");
        let deadline = Deadline::of_transaction(self.pool.limits().command, self.shutdown);
        if let Some(mut connection) = self.connection.take() {
            let reply = connection
                .send(b"RSET\r\n", step, deadline)
                .and_then(|()| connection.reply(step, deadline));
            if reply.is_ok_and(|reply| reply.class() == Class::Success) {
                connection.rest();
                self.used = true;
                self.connection = Some(connection);
            }
        }
    }

    /// The client is silent, or gone: others may use the connection meanwhile.
    pub fn release(&mut self) {
        if self.is_engaged() {
            return;
        }
        if let Some(mut connection) = self.connection.take() {
            connection.rest();
            if connection.is_at_rest() {
                self.pool.put(connection);
            }
        }
    }
}

/// What clients hear when the program ends.
pub fn stopping() -> Reply {
    Reply::new(421, "4.3.2", "smtp-dup is stopping; try again later")
}
