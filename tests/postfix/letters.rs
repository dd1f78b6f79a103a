//! The letters that tests send through Postfix, and what has to arrive of them.

// Each test program uses its own part of this.
#![allow(dead_code)]

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{Client, Received, Sink};
use crate::instance::{PATIENCE, Postfix};

/// Gives one message to Postfix, in a connection of its own.
#[track_caller]
pub fn submit(postfix: &Postfix, mail: &str, rcpts: &[&str], letter: &[u8]) {
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
pub fn wait_count(sink: &Sink, count: usize) {
    let end = Instant::now() + PATIENCE;
    while sink.accepted() < count {
        assert!(Instant::now() < end, "{} of {count} messages", sink.accepted());
        thread::sleep(Duration::from_millis(50));
    }
}

/// The messages of a destination in the order of their Message-IDs.
pub fn sorted(sink: &Sink) -> Vec<Received> {
    let mut messages = sink.messages();
    messages.sort_by_key(|message| message_id(&message.data));
    messages
}

/// A message in wire form with all the headers that Postfix would otherwise add.
pub fn letter(id: &str, body: &[u8]) -> Vec<u8> {
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
pub fn message_id(data: &[u8]) -> String {
    let text = String::from_utf8_lossy(&data[..data.len().min(4096)]).into_owned();
    let line = text.lines().find_map(|line| line.strip_prefix("Message-ID: "));
    line.unwrap_or_else(|| panic!("no Message-ID: {text}")).to_owned()
}

/// What Postfix passes on is the letter below one header of its own, Received.
#[track_caller]
pub fn assert_is_letter(data: &[u8], letter: &[u8]) {
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
pub fn assert_same(found: &[u8], expected: &[u8]) {
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

/// What arrived at a primary and its two backups: `count` messages at each, the same at all
/// three. In the order of their Message-IDs.
#[track_caller]
pub fn compared(sinks: &[Sink; 3], count: usize) -> Vec<[Received; 3]> {
    let [primary, first, second] = sinks.each_ref().map(sorted);
    assert_eq!([primary.len(), first.len(), second.len()], [count; 3]);
    let mut all = Vec::new();
    for ((primary, first), second) in primary.into_iter().zip(first).zip(second) {
        assert_same(&first.data, &primary.data);
        assert_same(&second.data, &primary.data);
        all.push([primary, first, second]);
    }
    all
}

/// What came of each message, as often as it came.
pub fn by_id(sink: &Sink) -> BTreeMap<String, Vec<Vec<u8>>> {
    let mut map = BTreeMap::<_, Vec<_>>::new();
    for message in sink.messages() {
        map.entry(message_id(&message.data)).or_default().push(message.data);
    }
    map
}
