//! The whole program over real TCP, between a client of ours and scripted destinations.
//!
//! One file for each part of the work: what a client can do (`receiving`) and how long it may take
//! (`patience`), who is no mail client (`foreign`), what the primary can do to it (`primary`), what
//! hostile servers say (`replies`), where a message ends (`smuggling`), the copies (`backups`), who
//! the client was (`origin`), what is its own destination (`circles`), what lacks (`shortage`), too
//! much at once (`load`), the end of the process (`ending`), the configuration (`config`); and the
//! design's promises (`promises`).

#[path = "../common/mod.rs"]
mod common;

mod backups;
mod circles;
mod config;
mod ending;
mod foreign;
mod load;
mod origin;
mod patience;
mod primary;
mod promises;
mod receiving;
mod regressions;
mod replies;
mod shortage;
mod smuggling;

use common::{Client, Dup, Sink};

/// A small message in wire form.
const BODY: &[u8] = b"Subject: test\r\n\r\nHello\r\n..dot\r\n";

/// smtp-dup in front of this primary, without backups, and further configuration lines.
#[track_caller]
fn dup_with(primary: &Sink, smtp: &str, relay: &str) -> Dup {
    Dup::start(&common::config(primary.addr(), &[], smtp, relay))
}

/// A primary that behaves well, and smtp-dup in front of it.
#[track_caller]
fn relay() -> (Sink, Dup) {
    let primary = Sink::start();
    let dup = dup_with(&primary, "", "");
    (primary, dup)
}

/// A whole transaction, which has to succeed.
#[track_caller]
fn deliver(client: &mut Client) {
    let reply = client.message("a@example.com", &["b@example.com"], BODY);
    assert_eq!(reply.code, 250, "{reply:?}");
}
