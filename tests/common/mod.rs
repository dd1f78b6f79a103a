//! What the whole-program tests share: the real binary, a client, and a server behind it.
//!
//! `dup` runs smtp-dup and reads its log, `client` speaks to it, `peer` is the server that it
//! sends to: well-behaved unless the test's hook says otherwise, and it records everything.
//!
//! Every wait here is for an event and has a bound, [`BOUND`]; when it passes, the panic shows
//! what was heard until then. No fixed ports: smtp-dup listens on port 0 and says in its
//! `starting` line which one it got.

// Each test program uses its own part of this.
#![allow(dead_code, unused_imports)]

mod client;
mod dup;
mod forward;
mod peer;
mod socket;

use std::time::Duration;

pub use client::{Client, Reply};
pub use dup::{Dup, Signal, binary, command, config, run};
pub use forward::Detour;
pub use peer::{Action, DeadHost, Event, Hook, Received, Sink, SinkOptions};
pub use socket::bound;
use socket::connect;

/// How long any awaited event may take. Nothing that is right takes a second on an idle machine;
/// the rest is for a loaded one.
pub const BOUND: Duration = Duration::from_secs(20);

/// Waits until `what` is true.
#[track_caller]
pub fn wait_until(reason: &str, mut what: impl FnMut() -> bool) {
    let end = std::time::Instant::now() + BOUND;
    while !what() {
        assert!(std::time::Instant::now() < end, "waited in vain: {reason}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// `count` octets of ordinary mail in wire form: lines of 78 octets with their CR LF.
pub fn mail_body(count: usize) -> Vec<u8> {
    let mut body = b"Subject: test\r\nMessage-ID: <test@example.com>\r\n\r\n".to_vec();
    let mut number = 0;
    while body.len() + 78 <= count {
        body.extend_from_slice(format!("{number:076}\r\n").as_bytes());
        number += 1;
    }
    body
}
