//! One client: commands in, replies out.
//!
//! `server` calls [`Session::serve`] on a worker thread for each connection. Commands of the
//! transaction are relayed to the primary, as many at once as the client sent and all can be
//! expected to be in order; the others are answered here. Replies are collected and go out in one
//! write when nothing is left to answer.

mod data;
mod relaying;
mod starttls;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::client::{Client, Gone};
use super::command::{Command, Malformed};
use super::envelope::Envelope;
use super::foreign::Foreign;
use super::grammar::{Grammar, Step};
use super::origin::Origin;
use super::reply::Reply;
use super::wire::Line;
use crate::buffers::Buffers;
use crate::identity::Identity;
use crate::maillog;
use crate::message::{Budget, QueueId};
use crate::relay::agent::Agents;
use crate::relay::pool::Pool;
use crate::relay::primary::{Primary, stopping};
use crate::shutdown::{Deadline, Expired, Shutdown, TICK};
use crate::spool::Spool;
use crate::stream::Stream;
use crate::tls::Certificate;

/// Commands that are unknown, malformed or out of order, one after the other, before the client
/// is cut off. What the primary refuses does not count.
const MAX_ERRORS: u32 = 20;

/// A session in which no message comes to its end has so many times `smtp.timeout_seconds`, what the
/// primary takes aside: commands that lead to nothing cannot keep a worker, while a thousand
/// recipients at a slow primary need their time.
const WITHOUT_MAIL: u32 = 10;

/// What all sessions share.
pub struct Shared<'a> {
    /// Who we are.
    pub us: &'a Identity,
    /// Octets of a message, 0 for no limit of ours.
    pub max_message_size: u64,
    /// Recipients of a message.
    pub max_recipients: usize,
    /// Longest silence of a client, and the longest that a command line may take to come.
    pub timeout: Duration,
    /// Who we are, for clients that want TLS.
    pub tls: Option<&'a Certificate>,
    /// Connections to the primary.
    pub primary: &'a Pool,
    /// Memory for copies …
    pub budget: &'a Arc<Budget>,
    /// … their place on disk, if there is one …
    pub spool: Option<Arc<Spool>>,
    /// … and for whom they are.
    pub backups: Arc<[String]>,
    /// Big buffers, for messages.
    pub buffers: &'a Buffers,
    /// The end of the program.
    pub shutdown: &'a Shutdown,
}

/// A client's session.
pub struct Session<'a, 'scope, 'env> {
    shared: &'a Shared<'a>,
    agents: &'a Agents<'scope, 'env>,
    client: Client<'a>,
    grammar: Grammar,
    primary: Primary<'a>,
    /// EHLO or HELO was accepted.
    greeted: bool,
    transaction: Option<Transaction>,
    /// The session began, or its last message came to its end; later by what the primary took.
    without_mail_since: Instant,
    /// What the client has said of the one before it, for the next transaction.
    origin: Origin,
    /// The last that the client did was to send a message.
    behind_a_message: bool,
    /// The primary refused the last MAIL: what the client had sent behind it is no mistake.
    mail_refused: bool,
    errors: u32,
}

/// From an accepted MAIL to the end of its message.
struct Transaction {
    id: QueueId,
    envelope: Envelope,
    /// It was said that there are too many recipients. The others may be a million.
    is_full: bool,
}

/// How a session ends. Not by an error of ours: that is a reply.
#[derive(Debug)]
enum End {
    /// The client said QUIT.
    Quit,
    /// We said 421.
    Closing,
    /// The client closed, or the network did.
    Gone,
}

impl From<Gone> for End {
    fn from(_: Gone) -> End {
        End::Gone
    }
}

impl<'a, 'scope, 'env> Session<'a, 'scope, 'env> {
    /// A session with the client at the other end of `stream`.
    pub fn new(
        stream: Stream,
        address: SocketAddr,
        shared: &'a Shared<'a>,
        agents: &'a Agents<'scope, 'env>,
    ) -> Self {
        Session {
            shared,
            agents,
            client: Client::new(stream, address, shared),
            grammar: Grammar::new(),
            primary: Primary::new(shared.primary, shared.shutdown, shared.max_message_size),
            greeted: false,
            transaction: None,
            without_mail_since: Instant::now(),
            origin: Origin::default(),
            behind_a_message: false,
            mail_refused: false,
            errors: 0,
        }
    }

    /// Serves the client until either side ends it.
    pub fn serve(&mut self) {
        let address = self.client.address;
        maillog::connected(address);
        let Err(end) = self.converse();
        let how = match end {
            End::Quit => "said QUIT",
            End::Closing => "was told to go",
            End::Gone => "went away",
        };
        if let Some(transaction) = &self.transaction {
            maillog::transaction_lost(transaction.id, address, how);
        }
        maillog::disconnected(address, how);
        // First, so that a client that follows this one finds the connection in the pool.
        self.primary.release();
        self.client.flush_and_close();
    }

    /// Ends a session that a panic has left in whatever state. Its connection to the primary goes
    /// without a dot.
    pub fn apologise(&mut self) {
        self.primary.abort();
        let text = "a defect of smtp-dup has ended this session; try again later";
        self.client.say(&Reply::new(421, "4.3.0", text));
        self.client.flush_and_close();
    }

    fn converse(&mut self) -> Result<std::convert::Infallible, End> {
        self.client.say(&Reply::new(220, "", &self.shared.us.greeting()));
        loop {
            let run = self.take_run();
            if !run.is_empty() {
                self.relay(&run)?;
                continue;
            }
            self.client.flush_much()?;
            self.check_time()?;
            match self.client.input.peek_line() {
                Line::Whole(line) => {
                    let command = Command::parse(line);
                    self.client.input.consume_line();
                    self.answer(command)?;
                }
                Line::TooLong => {
                    self.client.input.consume_line();
                    self.mistake(Reply::new(500, "5.5.2", "line too long"))?;
                }
                Line::Partial => self.read_line()?,
                Line::Foreign(what) => return self.cut_off(what),
            }
        }
    }

    /// Waits for a command line, for so long until it has come whole.
    fn read_line(&mut self) -> Result<(), End> {
        self.client.flush()?;
        let begun = Instant::now();
        let deadline = Deadline::of_transaction(self.shared.timeout, self.shared.shutdown);
        while self.client.input.peek_line() == Line::Partial {
            // Before each read: a client that never falls silent must hear of it too.
            if self.transaction.is_none() && self.shared.shutdown.dismisses(self.behind_a_message) {
                return self.close(&stopping());
            }
            if let Err(expired) = deadline.left() {
                return self.close(&expiry(expired));
            }
            self.check_time()?;
            if !self.client.read()? || begun.elapsed() > TICK {
                // Others may need what this client does not use.
                self.primary.release();
                self.client.hold_little();
            }
        }
        Ok(())
    }

    /// Ends a session that has been without mail for too long.
    fn check_time(&mut self) -> Result<(), End> {
        if self.without_mail_since.elapsed() > self.shared.timeout * WITHOUT_MAIL {
            return self.close(&Reply::new(421, "4.4.2", "no message for too long a time"));
        }
        Ok(())
    }

    /// Answers a command that does not go to the primary, or not in this state.
    fn answer(&mut self, command: Result<Command, Malformed>) -> Result<(), End> {
        self.behind_a_message = false;
        let reply = match command {
            Err(Malformed::Unknown) => {
                return self.mistake(Reply::new(500, "5.5.2", "command unknown"));
            }
            Err(Malformed::Argument(what)) => return self.mistake(Reply::new(501, "5.5.4", what)),
            Ok(Command::NotOffered) => {
                return self.mistake(not_offered());
            }
            Ok(Command::Relayed(command)) => return self.refuse(&command),
            Ok(Command::Quit) => {
                self.client.say(&Reply::new(221, "2.0.0", "bye"));
                return Err(End::Quit);
            }
            Ok(Command::Ehlo) => return self.hello(true),
            Ok(Command::Helo) => return self.hello(false),
            Ok(Command::StartTls) => return self.start_tls(),
            Ok(Command::Rset) => {
                self.leave_transaction();
                Reply::new(250, "2.0.0", "ok")
            }
            Ok(Command::Noop) => Reply::new(250, "2.0.0", "ok"),
            Ok(Command::Vrfy) => Reply::new(252, "2.0.0", "not verified; send mail to find out"),
            Ok(Command::Help) => Reply::new(214, "2.0.0", "see smtp-dup(8)"),
        };
        self.errors = 0;
        self.client.say(&reply);
        Ok(())
    }

    /// EHLO or HELO: what the primary offers is what we offer.
    fn hello(&mut self, extended: bool) -> Result<(), End> {
        self.errors = 0;
        self.leave_transaction();
        let offered = match self.primary.hello(extended) {
            Ok(offered) => offered,
            Err(reply) if reply.code() == 421 => return self.close(&reply),
            Err(reply) => {
                // As good as before, and HELO will be answered like this too.
                self.greeted = false;
                self.client.say(&reply);
                return Ok(());
            }
        };
        let mut lines = vec![self.shared.us.domain.clone()];
        if extended {
            lines.extend(offered.lines());
            let offers_tls = self.shared.tls.is_some() && !self.client.has_tls();
            lines.extend(offers_tls.then(|| "STARTTLS".to_string()));
        }
        let reply = Reply::lines(250, &lines);
        self.grammar.step(Step::Hello, &reply);
        self.greeted = true;
        self.client.say(&reply);
        Ok(())
    }

    /// RSET, a new EHLO, or the end of a failed transaction: back to the state after EHLO.
    fn leave_transaction(&mut self) {
        self.transaction = None;
        self.origin = Origin::default();
        self.mail_refused = false;
        self.primary.reset();
        self.grammar.step(Step::Rset, &Reply::new(250, "", ""));
    }

    /// Answers a mistake of the client, of which it may make so many.
    fn mistake(&mut self, reply: Reply) -> Result<(), End> {
        maillog::command_refused(self.client.address, &reply);
        self.client.say(&reply);
        self.errors += 1;
        match self.errors {
            MAX_ERRORS.. => self.close(&Reply::new(421, "4.7.0", "too many errors")),
            _ => Ok(()),
        }
    }

    /// Ends the session of a client that does not speak SMTP, without a look at what follows.
    fn cut_off<T>(&mut self, what: Foreign) -> Result<T, End> {
        maillog::not_smtp(self.client.address, what, self.client.input.unread());
        self.close(&Reply::new(421, "4.7.0", &format!("this is SMTP, not {what}")))
    }

    /// A last reply, and the end.
    fn close<T>(&mut self, reply: &Reply) -> Result<T, End> {
        self.client.say(reply);
        Err(End::Closing)
    }
}

/// What a client hears when a wait for it has ended.
fn expiry(expired: Expired) -> Reply {
    match expired {
        Expired::TimedOut => Reply::new(421, "4.4.2", "timed out waiting for you"),
        Expired::Stopping => stopping(),
    }
}

fn not_offered() -> Reply {
    Reply::new(502, "5.5.1", "command not offered")
}
