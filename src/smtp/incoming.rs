//! A message while it comes in: made canonical, counted, and collected for the backups.
//!
//! `session` feeds it what it reads and passes on to the primary what it gives. It holds little:
//! what is not yet passed on, and for the backups up to [`MEMORY_THRESHOLD`], past which the spool
//! or a temporary file has the rest.

use std::io;

use super::envelope::Envelope;
use super::session::Shared;
use super::wire::{BodyDecoder, Decoded, Input};
use crate::buffers::Buffers;
use crate::maillog;
use crate::message::{Collected, Collector, MEMORY_THRESHOLD, QueueId};

/// No more of a Message-ID is logged, in octets.
const MAX_MESSAGE_ID: usize = 250;

/// Octets of `.` CR LF.
const FINAL_DOT: u64 = 3;

/// A message while it comes in: canonical, and collected for the backups if there are any.
pub struct Incoming<'a> {
    decoder: BodyDecoder,
    buffers: &'a Buffers,
    /// The canonical form: of all, while that is little; else of what is not yet passed on.
    octets: Vec<u8>,
    /// How many of `octets` were passed on …
    passed: usize,
    /// … and how many are in the spool, if there is one.
    stored: usize,
    collector: Option<Collector>,
    /// Octets of the wire form so far.
    octets_in: u64,
    /// What its Message-ID field says.
    pub message_id: Option<Vec<u8>>,
}

impl<'a> Incoming<'a> {
    /// Nothing has come yet. `copies` collects for the backups, if there are any.
    pub fn new(shared: &Shared<'a>, copies: Option<Collector>) -> Incoming<'a> {
        Incoming {
            decoder: BodyDecoder::new(),
            buffers: shared.buffers,
            octets: shared.buffers.take_out(),
            passed: 0,
            stored: 0,
            collector: copies,
            octets_in: 0,
            message_id: None,
        }
    }

    /// Makes what was read canonical. True at the end of the message.
    pub fn decode(&mut self, input: &mut Input) -> bool {
        let before = self.octets.len();
        let decoded = self.decoder.decode(input.unread(), &mut self.octets);
        let grown = self.octets.len() - before;
        if self.octets_in == 0 {
            self.message_id = message_id(&self.octets);
        }
        self.octets_in += grown as u64;
        if self.collector.as_mut().is_some_and(|collector| !collector.count(grown)) {
            // Nothing has to be kept any more but what is not yet passed on; that is stored then.
            self.octets.drain(..self.passed);
            self.passed = 0;
            self.stored = 0;
        }
        match decoded {
            Decoded::More => {
                input.consume(input.unread().len());
                false
            }
            Decoded::End { consumed } => {
                input.consume(consumed);
                self.octets_in -= FINAL_DOT;
                true
            }
        }
    }

    /// Octets of the message so far, without dot-stuffing and the final dot: what SIZE counts
    /// (RFC 1870 §5).
    pub fn size(&self) -> u64 {
        self.octets_in - self.decoder.stuffing()
    }

    /// What is not yet passed on.
    pub fn unsent(&self) -> &[u8] {
        &self.octets[self.passed..]
    }

    /// All that has come was passed on.
    ///
    /// # Errors
    /// Those of the spool, which then has none of the message.
    pub fn sent(&mut self) -> io::Result<()> {
        let stored = self.store();
        self.passed = self.octets.len();
        if let Some(collector) = &mut self.collector {
            if self.octets.len() < MEMORY_THRESHOLD {
                return stored;
            }
            collector.spill(&self.octets);
        }
        self.forget();
        stored
    }

    /// The message is no longer wanted at all.
    pub fn unwanted(&mut self) {
        self.collector = None;
        self.forget();
    }

    fn forget(&mut self) {
        self.octets.clear();
        self.passed = 0;
        self.stored = 0;
    }

    /// Writes what has come to the spool.
    fn store(&mut self) -> io::Result<()> {
        let new = &self.octets[self.stored..];
        self.stored = self.octets.len();
        match &mut self.collector {
            Some(collector) if !new.is_empty() => collector.store(new),
            _ => Ok(()),
        }
    }

    /// All has come: makes it durable in the spool, if there is one.
    ///
    /// # Errors
    /// Those of the spool, which then has none of the message.
    pub fn secure(&mut self) -> io::Result<()> {
        self.store()?;
        self.collector.as_mut().map_or(Ok(()), Collector::secure)
    }

    /// The whole message, if there are backups to copy it to. From here on it is owed.
    pub fn finish(mut self, id: QueueId, envelope: Envelope) -> Option<Collected> {
        let collector = self.collector.take()?;
        let complain = |error: &io::Error| maillog::spool_failed(id, error);
        Some(collector.finish(id, envelope, &self.octets, complain))
    }
}

impl Drop for Incoming<'_> {
    fn drop(&mut self) {
        self.buffers.put_out(std::mem::take(&mut self.octets));
    }
}

/// The value of the Message-ID header field, if it lies in `head`, the beginning of a message.
fn message_id(head: &[u8]) -> Option<Vec<u8>> {
    const NAME: &[u8] = b"message-id:";
    for line in head.split(|&octet| octet == b'\n') {
        if line.is_empty() || line == b"\r" {
            return None;
        }
        if let Some((name, value)) = line.split_at_checked(NAME.len())
            && name.eq_ignore_ascii_case(NAME)
        {
            let value = value.trim_ascii();
            return Some(value[..value.len().min(MAX_MESSAGE_ID)].to_vec());
        }
    }
    None
}
