//! Big buffers for messages, used again by the next.
//!
//! A session borrows two at DATA: one to read into, one for the canonical form. Growing fresh ones
//! for every message costs more than all else that is done with it, in page faults.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::message::MEMORY_THRESHOLD;

/// Length of a buffer to read into, in octets.
const IN: usize = 128 * 1024;

/// Capacity of a buffer for the canonical form: what is held in memory, and one read more.
const OUT: usize = MEMORY_THRESHOLD + IN;

/// As many of each kind are kept; more than this are in use only under load.
const KEPT: usize = 4;

/// The buffers that nobody uses at the moment. Shared by all sessions.
#[derive(Default)]
pub struct Buffers {
    ins: Mutex<Vec<Vec<u8>>>,
    outs: Mutex<Vec<Vec<u8>>>,
}

impl Buffers {
    /// A buffer to read into, of its full length.
    pub fn take_in(&self) -> Vec<u8> {
        lock(&self.ins).pop().unwrap_or_else(|| vec![0; IN])
    }

    /// Gives one back.
    pub fn put_in(&self, buffer: Vec<u8>) {
        let mut ins = lock(&self.ins);
        if buffer.len() == IN && ins.len() < KEPT {
            ins.push(buffer);
        }
    }

    /// An empty buffer to append to.
    pub fn take_out(&self) -> Vec<u8> {
        lock(&self.outs).pop().unwrap_or_else(|| Vec::with_capacity(OUT))
    }

    /// Gives one back. One that has grown by hostile input is let go.
    pub fn put_out(&self, mut buffer: Vec<u8>) {
        buffer.clear();
        let mut outs = lock(&self.outs);
        if buffer.capacity() <= 2 * OUT && outs.len() < KEPT {
            outs.push(buffer);
        }
    }
}

fn lock(buffers: &Mutex<Vec<Vec<u8>>>) -> MutexGuard<'_, Vec<Vec<u8>>> {
    buffers.lock().unwrap_or_else(PoisonError::into_inner)
}
