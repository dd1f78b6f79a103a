//! Mail is the same with TLS: every octet, batches, early replies, limits.

use crate::common::*;
use crate::front::{Front, Options};
use crate::pki::self_signed;
use crate::{BODY, config, deliver, destination};

/// A server with this behaviour, and the keys that secure the way to it.
fn front(reply: impl Fn(&Event) -> Action + Send + Sync + 'static) -> (Front, String) {
    let pair = self_signed("127.0.0.1");
    let front = Front::with(Options::new(&pair), Sink::replying(reply));
    let keys = format!("tls: required, fingerprint: \"{}\"", pair.fingerprint());
    let destination = destination(&front, &keys);
    (front, destination)
}

fn well() -> (Front, String) {
    front(|_| Action::Default)
}

/// Octets that no line repeats, some with dots at the start.
fn big(octets: usize) -> Vec<u8> {
    let mut body = b"Subject: big\r\n\r\n".to_vec();
    let mut number: u64 = 1;
    while body.len() < octets {
        number = number.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        body.extend_from_slice(format!("..{number:020} {:016x}\r\n", number ^ 0xABCDEF).as_bytes());
    }
    body
}

#[track_caller]
fn big_message_arrives(relay: &str) {
    let (primary, one, two) = (well(), well(), well());
    let relay = format!("backup_connections: 1\n{relay}");
    let dup = Dup::start(&config(&primary.1, &[one.1.clone(), two.1.clone()], "", &relay));
    let body = big(20 << 20);
    let mut client = Client::ready(dup.addr());
    client.envelope("a@example.com", &["b@example.com"]);
    let sending = client.send_in_background([body.as_slice(), b".\r\n"].concat());
    let reply = client.reply_within(3 * BOUND);
    assert_eq!(reply.code, 250, "{reply:?}");
    sending.join().unwrap();
    for front in [&primary.0, &one.0, &two.0] {
        let messages = front.sink.wait(1);
        assert!(messages[0].data == body, "{} octets of {}", messages[0].data.len(), body.len());
    }
    // And a small one on the same connections.
    deliver(&mut client);
    for front in [&primary.0, &one.0, &two.0] {
        assert_eq!(front.sink.wait(2)[1].data, BODY);
        assert_eq!(front.seen().len(), 1, "one connection each");
    }
}

#[test]
fn a_big_message_arrives_everywhere() {
    big_message_arrives("");
}

#[test]
fn a_big_message_arrives_everywhere_by_the_spool() {
    let folder = tempfile::tempdir().unwrap();
    let spool = folder.path().join("spool");
    big_message_arrives(&format!("spool: \"{}\"", spool.display()));
}

#[test]
fn a_batch_travels_as_a_batch() {
    let (primary, destination) = well();
    let dup = Dup::start(&config(&destination, &[], "", ""));
    let mut client = Client::ready(dup.addr());
    let mut batch = String::from("MAIL FROM:<a@example.com>\r\n");
    for n in 0..40 {
        batch.push_str(&format!("RCPT TO:<recipient-{n}@example.com>\r\n"));
    }
    batch.push_str("DATA\r\n");
    client.send(&batch);
    (0..41).for_each(|_| drop(client.expect_reply(250)));
    client.expect_reply(354);
    assert_eq!(client.body(BODY).code, 250);
    let reads = primary.sink.reads();
    let is_whole = |read: &Vec<u8>| read.starts_with(b"MAIL") && read.ends_with(b"DATA\r\n");
    assert!(reads.iter().any(is_whole), "not in one piece");
    assert_eq!(primary.sink.wait(1)[0].rcpts.len(), 40);
}

#[test]
fn an_early_reply_of_the_primary_ends_the_message() {
    for then in [Action::Close, Action::Silence, Action::Stall] {
        let after = then.clone();
        let (_primary, destination) = front(move |event| match event {
            Event::Body(_) => Action::reply("552 5.3.4 too big for me").then(after.clone()),
            _ => Action::Default,
        });
        let (backup, copies) = well();
        let dup = Dup::start(&config(&destination, &[copies], "", "data_timeout_seconds: 5"));
        let mut client = Client::ready(dup.addr());
        client.envelope("a@example.com", &["b@example.com"]);
        let sending = client.send_in_background([big(8 << 20).as_slice(), b".\r\n"].concat());
        let reply = client.reply_within(2 * BOUND);
        assert_eq!(reply.raw, b"552 5.3.4 too big for me\r\n", "{then:?}: {reply:?}");
        sending.join().unwrap();
        client.expect("NOOP", 250);
        assert_eq!(backup.sink.connections(), 0);
    }
}

#[test]
fn a_primary_that_takes_in_nothing_is_given_up() {
    let (_primary, destination) = front(|event| match event {
        Event::Body(_) => Action::Stall,
        _ => Action::Default,
    });
    let dup = Dup::start(&config(&destination, &[], "", "data_timeout_seconds: 2"));
    let mut client = Client::ready(dup.addr());
    client.envelope("a@example.com", &["b@example.com"]);
    let sending = client.send_in_background([big(16 << 20).as_slice(), b".\r\n"].concat());
    let reply = client.reply_within(3 * BOUND);
    assert_eq!(reply.code, 451, "{reply:?}");
    assert!(reply.text().contains("timed out"), "{reply:?}");
    sending.join().unwrap();
}

#[test]
fn a_stray_reply_is_seen_before_the_dot_and_before_reuse() {
    let (primary, destination) = front(|event| match event {
        Event::EndOfData(1) => Action::raw("250 2.0.0 ok\r\n250 stray\r\n"),
        _ => Action::Default,
    });
    let dup = Dup::start(&config(&destination, &[], "", ""));
    let mut client = Client::ready(dup.addr());
    deliver(&mut client);
    deliver(&mut client);
    let messages = primary.sink.wait(2);
    assert_ne!(messages[0].connection, messages[1].connection, "a connection with a stray reply");
}

#[test]
fn a_primary_that_speaks_before_the_dot_gets_no_dot() {
    let (primary, destination) = front(|event| match event {
        Event::Data => Action::raw("354 go on\r\n250 ok already\r\n"),
        _ => Action::Default,
    });
    let dup = Dup::start(&config(&destination, &[], "", ""));
    let mut client = Client::ready(dup.addr());
    client.envelope("a@example.com", &["b@example.com"]);
    assert_eq!(client.body(BODY).code, 451);
    assert!(primary.sink.attempts().is_empty());
}

#[test]
fn connections_with_tls_are_used_again() {
    let (primary, destination) = well();
    let (backup, copies) = well();
    let dup = Dup::start(&config(&destination, &[copies], "", "backup_connections: 1"));
    for n in 1..=20 {
        let mut client = Client::ready(dup.addr());
        deliver(&mut client);
        // Behind the end of a session, its connection to the primary is in the pool.
        client.expect("QUIT", 221);
        client.closed();
        backup.sink.wait(n);
    }
    assert_eq!(primary.seen().len(), 1);
    assert_eq!(backup.seen().len(), 1);
    assert_eq!(dup.log_lines(" TLS: ").len(), 2, "one line a connection");
}

/// QUIT and close_notify, not just an end.
#[test]
fn a_connection_ends_with_quit() {
    let (primary, destination) = well();
    let dup = Dup::start(&config(&destination, &[], "", ""));
    deliver(&mut Client::ready(dup.addr()));
    dup.signal(Signal::Term);
    assert!(dup.wait_exit(BOUND).success());
    primary.sink.wait_for("QUIT", |sink| sink.count("QUIT") == 1);
}
