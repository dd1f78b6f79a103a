//! The client's socket: what was read and not yet used, and what is still to be said.
//!
//! `session` owns one. Every wait is cut into ticks, so that the caller can look at the clock and
//! at the end of the program.

use std::net::SocketAddr;

use super::reply::Reply;
use super::session::Shared;
use super::wire::{Input, MAX_COMMAND_LINE};
use crate::shutdown::{Deadline, Expired};
use crate::stream::{Stream, Unsecured, is_tick};
use crate::tls::Session;

/// What one read takes while a client sends commands, in octets: one of the longest lines. Idle
/// clients are many; one that sends more at once gets a bigger buffer.
const COMMAND_BUFFER: usize = MAX_COMMAND_LINE + 256;

/// Replies are collected up to about so many octets before they are written.
const MAX_UNSAID: usize = 16 * 1024;

/// The client closed, or the network did.
#[derive(Debug)]
pub struct Gone;

/// The client's socket, with what was read and what is to be written.
pub struct Client<'a> {
    stream: Stream,
    /// Its address.
    pub address: SocketAddr,
    /// What was read and not yet used.
    pub input: Input,
    output: Vec<u8>,
    shared: &'a Shared<'a>,
}

impl<'a> Client<'a> {
    /// A client at the other end of `stream`.
    pub fn new(stream: Stream, address: SocketAddr, shared: &'a Shared<'a>) -> Client<'a> {
        Client {
            stream,
            address,
            input: Input::new(vec![0; COMMAND_BUFFER]),
            output: Vec::new(),
            shared,
        }
    }

    /// Adds a reply to those that go out with the next flush.
    pub fn say(&mut self, reply: &Reply) {
        self.output.extend_from_slice(reply.wire());
    }

    /// Writes the replies if they are many: a client must not make us hold more and more of them.
    pub fn flush_much(&mut self) -> Result<(), Gone> {
        if self.output.len() < MAX_UNSAID { Ok(()) } else { self.flush() }
    }

    /// Writes all replies at once; all together must be taken within `smtp.timeout_seconds`. After
    /// a failure none of them is left, for nothing must be said twice.
    pub fn flush(&mut self) -> Result<(), Gone> {
        let deadline = Deadline::of_transaction(self.shared.timeout, self.shared.shutdown);
        let output = std::mem::take(&mut self.output);
        let mut rest = output.as_slice();
        while !rest.is_empty() || self.stream.is_behind() {
            match self.stream.write(rest) {
                Ok(n) => rest = &rest[n..],
                Err(error) if is_tick(&error) => {}
                Err(_) => return Err(Gone),
            }
            let is_left = !rest.is_empty() || self.stream.is_behind();
            if is_left && deadline.left().is_err() {
                return Err(Gone);
            }
        }
        Ok(())
    }

    /// Shakes hands for TLS. Gives version and cipher.
    ///
    /// # Errors
    /// Why that failed: nothing can be said to the client any more, not even in clear.
    pub fn secure(&mut self, session: Session) -> Result<String, String> {
        let shutdown = self.shared.shutdown;
        let deadline = Deadline::of_transaction(self.shared.timeout, shutdown);
        let may_go_on = || match shutdown.dismisses(false) {
            true => Err(Expired::Stopping),
            false => deadline.left().map(drop),
        };
        self.stream.secure(session, may_go_on).map_err(|error| match error {
            Unsecured::Expired(Expired::TimedOut) => "timed out".into(),
            Unsecured::Expired(Expired::Stopping) => "smtp-dup is stopping".into(),
            Unsecured::Failed(what) => what,
        })?;
        Ok(self.stream.tls().unwrap_or_default())
    }

    /// What it says and hears goes through TLS.
    pub fn has_tls(&self) -> bool {
        self.stream.tls().is_some()
    }

    /// Writes what is left to say. Closing a socket with unread input would make the peer lose
    /// it, so that is read away, for a moment.
    pub fn flush_and_close(&mut self) {
        if self.flush().is_err() || self.stream.shutdown().is_err() {
            return;
        }
        for _ in 0..64 {
            self.input.consume(usize::MAX);
            if !matches!(self.stream.read_now(self.input.room()), Ok(1..)) {
                break;
            }
        }
    }

    /// Waits for octets. False when a tick has passed without any.
    pub fn read(&mut self) -> Result<bool, Gone> {
        let room = self.input.room();
        match self.stream.read(room) {
            Ok(0) => Err(Gone),
            Ok(n) => {
                let is_full = n == room.len();
                self.input.filled(n);
                if is_full {
                    self.hold_much();
                }
                Ok(true)
            }
            Err(error) if is_tick(&error) => Ok(false),
            Err(_) => Err(Gone),
        }
    }

    /// Reads what is there already. False when nothing is.
    pub fn read_now(&mut self) -> Result<bool, Gone> {
        match self.stream.read_now(self.input.room()) {
            Ok(0) => Err(Gone),
            Ok(n) => {
                self.input.filled(n);
                Ok(true)
            }
            Err(error) if is_tick(&error) => Ok(false),
            Err(_) => Err(Gone),
        }
    }

    /// Makes the reads big.
    pub fn hold_much(&mut self) {
        if self.input.capacity() == COMMAND_BUFFER {
            self.input.swap(self.shared.buffers.take_in());
        }
    }

    /// Makes the reads small, when what was read and not used is little.
    pub fn hold_little(&mut self) {
        if self.input.capacity() != COMMAND_BUFFER && self.input.unread().len() <= COMMAND_BUFFER {
            let big = self.input.swap(vec![0; COMMAND_BUFFER]);
            self.shared.buffers.put_in(big);
        }
    }
}

impl Drop for Client<'_> {
    fn drop(&mut self) {
        self.input.consume(usize::MAX);
        self.hold_little();
    }
}
