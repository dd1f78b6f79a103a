//! A message while it comes in: made canonical, counted, and collected for the backups.
//!
//! `session` feeds it what it reads and passes on to the primary what it gives. It holds little:
//! what is not yet passed on, and for the backups up to [`MEMORY_THRESHOLD`], past which a
//! temporary file takes the rest.

use super::envelope::Envelope;
use super::session::Shared;
use super::wire::{BodyDecoder, Decoded, Input};
use crate::buffers::Buffers;
use crate::message::{Collector, MEMORY_THRESHOLD, Message, NoCopy, QueueId};

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
    /// How many of `octets` were passed on.
    passed: usize,
    collector: Option<Collector>,
    /// Octets of the wire form so far.
    octets_in: u64,
    /// What its Message-ID field says.
    pub message_id: Option<Vec<u8>>,
}

impl<'a> Incoming<'a> {
    pub fn new(shared: &Shared<'a>, copies: bool) -> Incoming<'a> {
        Incoming {
            decoder: BodyDecoder::new(),
            buffers: shared.buffers,
            octets: shared.buffers.take_out(),
            passed: 0,
            collector: copies.then(|| Collector::new(shared.budget)),
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
            // Nothing has to be kept any more but what is not yet passed on.
            self.octets.drain(..self.passed);
            self.passed = 0;
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

    /// All was passed on, or (`wanted` is false) the message is no longer wanted at all.
    pub fn sent(&mut self, wanted: bool) {
        if !wanted {
            self.collector = None;
        }
        self.passed = self.octets.len();
        if let Some(collector) = &mut self.collector {
            if self.octets.len() < MEMORY_THRESHOLD {
                return;
            }
            collector.spill(&self.octets);
        }
        self.octets.clear();
        self.passed = 0;
    }

    /// The whole message, if there are backups to copy it to.
    pub fn finish(mut self, id: QueueId, envelope: Envelope) -> Option<Result<Message, NoCopy>> {
        let collector = self.collector.take()?;
        Some(collector.finish(id, envelope, &self.octets))
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
