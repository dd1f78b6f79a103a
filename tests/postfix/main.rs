//! A real Postfix in front: its transport map sends example.com to smtp-dup, which passes the mail
//! to recording destinations. What they got is compared octet for octet, and counted.
//!
//! `instance` is the private Postfix, `mail` the kinds of mail, `servers` other programs as
//! destinations, `trouble` what happens when something is down, refuses, or is restarted.
//!
//! These tests need root and an installed Postfix. Without them they say so and pass, but not when
//! CI is set.

#[path = "../common/mod.rs"]
mod common;
mod instance;
mod mail;
mod servers;
mod trouble;

use std::thread;
use std::time::{Duration, Instant};

use common::{Client, Dup, Received, Signal, Sink, SinkOptions, config};
use instance::{PATIENCE, Postfix};

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
        let [primary, first, second] = self.sinks.each_ref().map(sorted);
        assert_eq!([primary.len(), first.len(), second.len()], [count; 3]);
        let mut all = Vec::new();
        for ((primary, first), second) in primary.into_iter().zip(first).zip(second) {
            assert_same(&first.data, &primary.data);
            assert_same(&second.data, &primary.data);
            all.push([primary, first, second]);
        }
        all
    }

    /// The same for a single message, which has to be `letter`.
    #[track_caller]
    fn arrived_once(&self, letter: &[u8]) -> [Received; 3] {
        let one = self.arrived(1).remove(0);
        assert_is_letter(&one[0].data, letter);
        one
    }
}

/// Gives one message to Postfix, in a connection of its own.
#[track_caller]
fn submit(postfix: &Postfix, mail: &str, rcpts: &[&str], letter: &[u8]) {
    let mut client = Client::ready(postfix.address);
    client.expect(&format!("MAIL FROM:{mail}"), 250);
    for rcpt in rcpts {
        client.expect(&format!("RCPT TO:{rcpt}"), 250);
    }
    client.expect("DATA", 354);
    let reply = client.body(letter);
    assert_eq!(reply.code, 250, "{reply:?}");
}

/// Waits until so many messages are there.
#[track_caller]
fn wait_count(sink: &Sink, count: usize) {
    let end = Instant::now() + PATIENCE;
    while sink.messages().len() < count {
        assert!(Instant::now() < end, "{} of {count} messages", sink.messages().len());
        thread::sleep(Duration::from_millis(50));
    }
}

/// The messages of a destination in the order of their Message-IDs.
fn sorted(sink: &Sink) -> Vec<Received> {
    let mut messages = sink.messages();
    messages.sort_by_key(|message| message_id(&message.data));
    messages
}

/// Ends smtp-dup: afterwards nothing can arrive, so that counts are final.
#[track_caller]
fn stop(dup: &Dup) {
    dup.signal(Signal::Term);
    // Transactions and copies have timeout_seconds each, 10; the rest is for a busy machine.
    assert!(dup.wait_exit(Duration::from_secs(60)).success());
}

/// A message in wire form with all the headers that Postfix would otherwise add.
fn letter(id: &str, body: &[u8]) -> Vec<u8> {
    let mut letter = format!(
        "From: Sender <a@sender.test>\r\n\
         To: undisclosed-recipients:;\r\n\
         Date: Mon, 23 Nov 2026 20:38:25 +0000\r\n\
         Message-ID: <{id}@sender.test>\r\n\
         Subject: {id}\r\n\
         MIME-Version: 1.0\r\n\
         Content-Type: text/plain; charset=iso-8859-1\r\n\
         Content-Transfer-Encoding: 8bit\r\n\
         \r\n"
    )
    .into_bytes();
    letter.extend_from_slice(body);
    letter
}

/// The value of the first Message-ID header.
fn message_id(data: &[u8]) -> String {
    let text = String::from_utf8_lossy(&data[..data.len().min(4096)]).into_owned();
    let line = text.lines().find_map(|line| line.strip_prefix("Message-ID: "));
    line.unwrap_or_else(|| panic!("no Message-ID: {text}")).to_owned()
}

/// What Postfix passes on is the letter below one header of its own, Received.
#[track_caller]
fn assert_is_letter(data: &[u8], letter: &[u8]) {
    let added = data.len().saturating_sub(letter.len());
    assert_same(&data[added..], letter);
    let added = String::from_utf8_lossy(&data[..added]).into_owned();
    assert!(added.starts_with("Received: "), "{added}");
    // One header: its further lines begin with a tab.
    let headers = added.lines().filter(|line| !line.starts_with('\t'));
    assert_eq!(headers.count(), 1, "{added}");
}

/// Like assert_eq, and shows only where they differ.
#[track_caller]
fn assert_same(found: &[u8], expected: &[u8]) {
    if found == expected {
        return;
    }
    let same = found.iter().zip(expected).take_while(|(a, b)| a == b);
    let at = same.count();
    let show = |octets: &[u8]| {
        let part = &octets[at.saturating_sub(80)..octets.len().min(at + 80)];
        part.escape_ascii().to_string()
    };
    panic!(
        "{} octets instead of {}, which differ at {at}:\nfound    \"{}\"\nexpected \"{}\"",
        found.len(),
        expected.len(),
        show(found),
        show(expected)
    );
}
