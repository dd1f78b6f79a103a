//! One SMTP connection to a destination: commands, replies, message. How it comes about is in
//! [`opening`].
//!
//! `primary` and `backup` drive it, `pool` keeps it between transactions. It owns the stream,
//! because what matters is in the socket calls: a batch or a message with its final dot in one
//! write, and time limits for whole steps. Everything that can go wrong is a
//! [`Failure`], after which the connection is of no more use.

mod login;
mod opening;

use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::time::{Duration, Instant};

use lettre::transport::smtp::commands::Quit;

use super::features::Features;
use crate::shutdown::{Deadline, Expired};
use crate::smtp::reply::{Nonsense, Reply};
use crate::stream::{Stream, is_tick};

/// Time limits for the steps with a destination, each for the whole step.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Looking up the name and connecting.
    pub connect: Duration,
    /// The greeting, and the whole reply to each command.
    pub command: Duration,
    /// The reply to end-of-data; and the longest that a message may make no progress.
    pub data: Duration,
}

/// A file is sent in pieces of so many octets.
const FILE_PIECE: u64 = 1 << 20;

/// No more than this is read of what a server says before its time, in octets.
const MAX_STRAY: usize = 16 * 1024;

/// What was being done when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Looking up the name and connecting.
    Connect,
    /// Waiting for the greeting.
    Greeting,
    /// EHLO and HELO.
    Hello,
    /// STARTTLS, until the server has agreed.
    StartTls,
    /// The handshake for TLS.
    Handshake,
    /// AUTH.
    Auth,
    /// MAIL, RCPT, DATA or RSET, by verb.
    Command(&'static str),
    /// Sending the message.
    Message,
    /// Waiting for the reply to the final dot.
    EndOfData,
}

impl Step {
    fn is_before_mail(self) -> bool {
        matches!(self, Step::Greeting | Step::Hello)
            || matches!(self, Step::StartTls | Step::Handshake | Step::Auth)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Connect => f.write_str("connect"),
            Step::Greeting => f.write_str("greeting"),
            Step::Hello => f.write_str("EHLO"),
            Step::StartTls => f.write_str("STARTTLS"),
            Step::Handshake => f.write_str("TLS"),
            Step::Auth => f.write_str("AUTH"),
            Step::Command(verb) => f.write_str(verb),
            Step::Message => f.write_str("message"),
            Step::EndOfData => f.write_str("end of data"),
        }
    }
}

/// Why a connection is of no more use.
#[derive(Debug)]
pub enum Failure {
    /// No connection came about.
    Connect(io::Error),
    /// The step took longer than its limit.
    TimedOut(Step),
    /// The program ends.
    Stopping(Step),
    /// The peer closed, or the network did.
    Lost(Step),
    /// The peer said what is no SMTP reply, or one that means nothing here.
    Nonsense(Step, String),
    /// The peer cannot do, or is not, what the configuration asks: what, and the remedy.
    Unfit(Step, String),
    /// The peer does not want to talk: its greeting or its answer to HELO.
    Unwelcome(Step, Reply),
    /// The peer said something before it was its turn.
    Untimely(Step, Reply),
    /// The peer greets as we do.
    Ourselves,
}

impl Failure {
    /// No transaction was begun: the server could not be reached, or did not want to talk.
    pub fn is_before_mail(&self) -> bool {
        match self {
            Failure::Connect(_) | Failure::Ourselves => true,
            Failure::TimedOut(step)
            | Failure::Stopping(step)
            | Failure::Lost(step)
            | Failure::Nonsense(step, _)
            | Failure::Unfit(step, _)
            | Failure::Unwelcome(step, _)
            | Failure::Untimely(step, _) => step.is_before_mail(),
        }
    }

    /// The enhanced status code (RFC 3463) for a client whose mail waits for that reason.
    pub fn status(&self) -> &'static str {
        match self {
            Failure::Unfit(Step::StartTls, _) => "4.7.4",
            Failure::Unfit(Step::Handshake, _) => "4.7.5",
            Failure::Unfit(Step::Auth | Step::Command(_), _) => "4.7.0",
            Failure::Unwelcome(Step::Auth, _) => "4.7.0",
            _ => "4.4.1",
        }
    }

    fn expired(expired: Expired, step: Step) -> Failure {
        match expired {
            Expired::TimedOut => Failure::TimedOut(step),
            Expired::Stopping => Failure::Stopping(step),
        }
    }
}

/// For log lines and replies: `RCPT: timed out`.
impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Connect(error) if error.kind() == ErrorKind::TimedOut => {
                f.write_str("connect: timed out")
            }
            Failure::Connect(error) => write!(f, "connect: {error}"),
            Failure::TimedOut(step) => write!(f, "{step}: timed out"),
            Failure::Stopping(step) => write!(f, "{step}: smtp-dup is stopping"),
            Failure::Lost(step) => write!(f, "{step}: lost connection"),
            Failure::Nonsense(step, what) => write!(f, "{step}: no SMTP reply: {what}"),
            Failure::Unfit(step, what) => write!(f, "{step}: {what}"),
            Failure::Unwelcome(step, reply) => write!(f, "{step}: {reply}"),
            Failure::Untimely(step, reply) => write!(f, "{step}: reply before its time: {reply}"),
            Failure::Ourselves => {
                write!(f, "{}: this is smtp-dup itself, mail would go in circles", Step::Greeting)
            }
        }
    }
}

/// What keeps others from reading a connection.
#[derive(Debug)]
pub enum Protection {
    /// Nothing: nobody asked for it, or the server does not offer it.
    Nothing,
    /// Nothing, though the server offers STARTTLS: that failed.
    Failed(Failure),
    /// TLS: its version and cipher, and whether it is known who the server is.
    Tls { cipher: String, is_verified: bool },
}

/// For log lines and people.
impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Protection::Nothing => f.write_str("none"),
            Protection::Failed(failure) => write!(f, "none, for it failed: {failure}"),
            Protection::Tls { cipher, is_verified: true } => write!(f, "{cipher}, verified"),
            Protection::Tls { cipher, is_verified: false } => write!(f, "{cipher}, not verified"),
        }
    }
}

/// A connection that has been greeted, in whatever state.
pub struct Connection {
    stream: Stream,
    /// Read, and not yet taken as a reply.
    input: Vec<u8>,
    features: Features,
    greeting: Reply,
    protection: Protection,
    /// The peer waits for a command, so that QUIT would be understood.
    at_rest: bool,
    limits: Limits,
}

impl Connection {
    /// What the server offers.
    pub fn features(&self) -> &Features {
        &self.features
    }

    /// From now on it is as if the server did not offer XFORWARD.
    pub fn withhold_xforward(&mut self) {
        self.features.xforward.clear();
    }

    /// The time limits of its steps.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// What keeps others from reading it.
    pub fn protection(&self) -> &Protection {
        &self.protection
    }

    /// The server's greeting.
    pub fn greeting(&self) -> &Reply {
        &self.greeting
    }

    /// Sends commands in one write.
    ///
    /// # Errors
    /// As [`Connection::send_message`].
    pub fn send(&mut self, commands: &[u8], step: Step, deadline: Deadline) -> Result<(), Failure> {
        self.at_rest = false;
        self.write(commands, step, deadline, self.limits.command)
    }

    /// Sends a part of a message.
    ///
    /// # Errors
    /// [`Failure::Untimely`] with what the server said instead of reading on;
    /// [`Failure::TimedOut`] when for the whole limit no octet could be written.
    pub fn send_message(&mut self, part: &[u8], deadline: Deadline) -> Result<(), Failure> {
        self.at_rest = false;
        self.write(part, Step::Message, deadline, self.limits.data)
    }

    /// Sends a whole message that lies in a file, `length` octets from `start` on.
    ///
    /// # Errors
    /// As [`Connection::send_message`]; an unreadable file is [`Failure::Lost`].
    pub fn send_file(
        &mut self,
        file: &File,
        start: u64,
        length: u64,
        deadline: Deadline,
    ) -> Result<(), Failure> {
        self.at_rest = false;
        let mut offset = start;
        let end = start + length;
        let mut until = deadline.renewed(self.limits.data);
        while offset < end {
            // In pieces, for what a server says in mid-message is not its word on the whole.
            self.check_quiet(Step::Message)?;
            let rest = (end - offset).min(FILE_PIECE) as usize;
            match self.stream.send_file(file, offset, rest) {
                Ok(n) => {
                    offset += n as u64;
                    until = deadline.renewed(self.limits.data);
                }
                Err(error) if is_tick(&error) => self.stalled(Step::Message, until)?,
                Err(_) => return Err(self.broken(Step::Message)),
            }
        }
        self.write(&[], Step::Message, deadline, self.limits.data)
    }

    /// Writes all of `octets`; `limit` is the longest without any progress.
    fn write(
        &mut self,
        octets: &[u8],
        step: Step,
        deadline: Deadline,
        limit: Duration,
    ) -> Result<(), Failure> {
        let mut rest = octets;
        let mut until = deadline.renewed(limit);
        while !rest.is_empty() || self.stream.is_behind() {
            match self.stream.write(rest) {
                Ok(n) => {
                    rest = &rest[n..];
                    if !rest.is_empty() {
                        until = deadline.renewed(limit);
                    }
                }
                Err(error) if is_tick(&error) => self.stalled(step, until)?,
                Err(_) => return Err(self.broken(step)),
            }
        }
        Ok(())
    }

    /// A write made no progress for one tick: the server may have spoken instead of reading.
    fn stalled(&mut self, step: Step, until: Deadline) -> Result<(), Failure> {
        self.check_quiet(step)?;
        until.left().map(drop).map_err(|expired| Failure::expired(expired, step))
    }

    /// A write failed: what the server said before it closed explains it, if it said anything.
    fn broken(&mut self, step: Step) -> Failure {
        match self.check_quiet(step) {
            Err(failure) => failure,
            Ok(()) => Failure::Lost(step),
        }
    }

    /// Makes sure that nothing is there to be read, without waiting. A stray reply would be taken
    /// for that to the next command, and shift all that follow.
    ///
    /// # Errors
    /// [`Failure::Untimely`] with the reply that is there, [`Failure::Nonsense`] when it is none,
    /// [`Failure::Lost`] when the server has closed.
    pub fn check_quiet(&mut self, step: Step) -> Result<(), Failure> {
        let mut octets = [0; 256];
        loop {
            match self.stream.read_now(&mut octets) {
                Ok(n @ 1..) if self.input.len() < MAX_STRAY => {
                    self.input.extend_from_slice(&octets[..n])
                }
                Err(error) if is_tick(&error) && self.input.is_empty() => return Ok(()),
                Ok(0) | Err(_) if self.input.is_empty() => return Err(Failure::Lost(step)),
                _ => break,
            }
        }
        match Reply::parse(&self.input) {
            Ok(Some((reply, _))) => Err(Failure::Untimely(step, reply)),
            Ok(None) => Err(Failure::Nonsense(step, "a part of a reply before its time".into())),
            Err(Nonsense(what)) => Err(Failure::Nonsense(step, what)),
        }
    }

    /// Waits for one whole reply.
    ///
    /// # Errors
    /// [`Failure`] but for `Connect`, `Unwelcome` and `Untimely`; `Unfit` for a server that takes no
    /// mail over a connection like this.
    pub fn reply(&mut self, step: Step, deadline: Deadline) -> Result<Reply, Failure> {
        let limit = if step == Step::EndOfData { self.limits.data } else { self.limits.command };
        let until = deadline.renewed(limit);
        loop {
            if !self.input.is_empty() {
                match Reply::parse(&self.input) {
                    Ok(Some((reply, used))) => {
                        self.input.drain(..used);
                        return fit(step, reply);
                    }
                    Ok(None) => {}
                    Err(Nonsense(what)) => return Err(Failure::Nonsense(step, what)),
                }
                // One octet a tick must not keep the wait from its end.
                until.left().map_err(|expired| Failure::expired(expired, step))?;
            }
            self.read(step, until)?;
        }
    }

    /// Waits for octets.
    fn read(&mut self, step: Step, until: Deadline) -> Result<(), Failure> {
        // Little, for it lies on the stack of every session; replies are short.
        let mut octets = [0; 512];
        loop {
            match self.stream.read(&mut octets) {
                Ok(0) => return Err(Failure::Lost(step)),
                Ok(n) => {
                    self.input.extend_from_slice(&octets[..n]);
                    return Ok(());
                }
                Err(error) if is_tick(&error) => {
                    until.left().map_err(|expired| Failure::expired(expired, step))?;
                }
                Err(_) => return Err(Failure::Lost(step)),
            }
        }
    }

    /// The transaction is over and the server waits for a command; unless it has said more than
    /// it was asked.
    pub fn rest(&mut self) {
        self.at_rest = self.input.is_empty();
    }

    /// Fit for another transaction, as far as is known.
    pub fn is_at_rest(&self) -> bool {
        self.at_rest
    }
}

/// A server that wants STARTTLS (RFC 3207 §4) or AUTH (RFC 4954 §6) first refuses us, and not the
/// mail: no client may bounce it for that.
fn fit(step: Step, reply: Reply) -> Result<Reply, Failure> {
    match (step, reply.code()) {
        (Step::Command("MAIL"), 530) => {
            Err(Failure::Unfit(step, format!("{reply}; see tls and username")))
        }
        _ => Ok(reply),
    }
}

/// Says QUIT where it would be understood, without waiting for an answer.
impl Drop for Connection {
    fn drop(&mut self) {
        if self.at_rest {
            self.stream.write_last(Quit.to_string().as_bytes());
        }
    }
}

/// Seconds since `start`, as Postfix prints delays: two significant digits are enough.
pub fn delay(start: Instant) -> String {
    let seconds = start.elapsed().as_secs_f64();
    match seconds {
        s if s < 0.095 => format!("{s:.2}"),
        s if s < 9.95 => format!("{s:.1}"),
        s => format!("{s:.0}"),
    }
}
