//! A real Postfix in front: its transport map sends example.com to smtp-dup, which passes the mail
//! to recording destinations. What they got is compared octet for octet, and counted.
//!
//! `instance` is the private Postfix, `letters` what is sent, `mail` the kinds of mail, `origin` who sent it, `servers`
//! other programs as destinations, `trouble` what happens when something is down, refuses, or is
//! restarted.
//!
//! These tests need root and an installed Postfix. Without them they say so and pass, but not when
//! CI is set.

#[path = "../common/mod.rs"]
mod common;
mod instance;
mod letters;
mod mail;
mod origin;
mod servers;
mod trouble;

use std::time::Duration;

use common::{Dup, Received, Signal, Sink, SinkOptions, config};
use instance::Postfix;
use letters::{assert_is_letter, compared, wait_count};

/// The way of the mail: Postfix, smtp-dup, one primary and two backups.
struct Route {
    postfix: Postfix,
    dup: Dup,
    /// The primary first.
    sinks: [Sink; 3],
}

impl Route {
    fn start() -> Route {
        Route::with(Default::default(), "")
    }

    /// With these destinations, and further settings in Postfix's main.cf.
    fn with(options: [SinkOptions; 3], settings: &str) -> Route {
        Route::through(options.map(Sink::with), settings)
    }

    fn through(sinks: [Sink; 3], settings: &str) -> Route {
        let dup = Dup::start(&config(sinks[0].addr(), &[sinks[1].addr(), sinks[2].addr()], "", ""));
        Route { postfix: Postfix::start(dup.addr(), settings), dup, sinks }
    }

    /// What arrived, once Postfix is done with it: `count` messages at each destination and no
    /// more, each the same at all three. In the order of their Message-IDs.
    #[track_caller]
    fn arrived(&self, count: usize) -> Vec<[Received; 3]> {
        self.sinks.iter().for_each(|sink| wait_count(sink, count));
        stop(&self.dup);
        compared(&self.sinks, count)
    }

    /// The same for a single message, which has to be `letter`.
    #[track_caller]
    fn arrived_once(&self, letter: &[u8]) -> [Received; 3] {
        let one = self.arrived(1).remove(0);
        assert_is_letter(&one[0].data, letter);
        one
    }
}

/// Ends smtp-dup: afterwards nothing can arrive, so that counts are final.
#[track_caller]
fn stop(dup: &Dup) {
    dup.signal(Signal::Term);
    // Transactions and copies have timeout_seconds each, 10; the rest is for a busy machine.
    assert!(dup.wait_exit(Duration::from_secs(60)).success());
}
