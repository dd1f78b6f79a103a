//! Where a message ends: everybody has to agree, or one message hides in another.
//!
//! Three destinations look at the same octets: the primary takes bare LFs for line ends, one
//! backup is strict, the other takes everything for a line end and drops NULs. Each records what
//! follows the end as commands, so that a smuggled message would be a message.

use std::thread;
use std::time::Duration;

use crate::common::{Client, Dup, Sink, SinkOptions, config};

/// What has been used, somewhere, to end a message early.
const SEQUENCES: [&[u8]; 12] = [
    b"\n.\n",
    b"\n.\r\n",
    b"\r\n.\n",
    b"\r.\r",
    b"\r.\r\n",
    b"\r.\n",
    b"\r\n.\r",
    b"\r\n.\r\r\n",
    b"\r\r\n.\r\r\n",
    b"\r\n\0.\r\n",
    b"\r\n.\0\r\n",
    b"\r\0\n.\r\n",
];

/// The message that wants to get in.
const SMUGGLED: &[u8] = b"MAIL FROM:<ceo@example.com>\r\nRCPT TO:<victim@example.com>\r\nDATA\r\n\
                          Subject: urgent\r\n\r\nPay them.\r\n";

/// What has to leave for a body, by the rules of the fifth promise, line by line. The body comes
/// without its final dot, and ends in CR LF.
fn canonical(body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut line = Vec::new();
    // The line before this one ended in CR LF.
    let mut regular = true;
    let mut at = 0;
    while at < body.len() {
        let crs = body[at..].iter().take_while(|&&o| o == b'\r').count();
        let (length, exact, follows) = match (crs, body.get(at + crs)) {
            (0, Some(b'\n')) => (1, false, false),
            (0, Some(&octet)) => {
                line.push(octet);
                at += 1;
                continue;
            }
            // CRs before a CR LF are dropped: the line end is regular, but not exactly CR LF.
            (_, Some(b'\n')) => (crs + 1, crs == 1, true),
            // A bare CR. Any that follow end an empty line each.
            _ => (1, false, false),
        };
        let text: Vec<u8> = line.iter().copied().filter(|&o| o != 0).collect();
        let lone_dot = text == b"." && !(exact && regular && line == b".");
        assert!(text != b"." || lone_dot, "the body has its end inside");
        match line.iter().position(|&o| o == b'.') {
            Some(dot) if lone_dot || !regular && dot == 0 => line.insert(dot, b'.'),
            _ => {}
        }
        out.append(&mut line);
        out.extend_from_slice(b"\r\n");
        regular = follows;
        at += length;
    }
    assert!(line.is_empty(), "the last line has an end");
    out
}

#[test]
fn the_model_knows_the_rules() {
    for (body, expected) in [
        (b"a\r\nb\r\n".as_slice(), b"a\r\nb\r\n".as_slice()),
        (b"a\nb\r\n", b"a\r\nb\r\n"),
        (b"a\rb\r\n", b"a\r\nb\r\n"),
        (b"a\r\r\r\nb\r\n", b"a\r\nb\r\n"),
        (b"a\r\rb\r\n", b"a\r\n\r\nb\r\n"),
        (b"a\n.b\r\n", b"a\r\n..b\r\n"),
        (b"a\n..b\r\n", b"a\r\n...b\r\n"),
        (b"a\r\n.b\r\n", b"a\r\n.b\r\n"),
        (b"a\r\n..\r\n", b"a\r\n..\r\n"),
        (b"a\r\n.\n", b"a\r\n..\r\n"),
        (b"a\r\n.\r\r\n", b"a\r\n..\r\n"),
        (b"a\r\n\0.\r\n", b"a\r\n\0..\r\n"),
        (b"a\r\n.\0\r\n", b"a\r\n..\0\r\n"),
        (b"a\r\0\n.\r\n", b"a\r\n\0\r\n..\r\n"),
        (b"a\r\n\0.b\r\n", b"a\r\n\0.b\r\n"),
    ] {
        assert_eq!(canonical(body), expected, "{}", body.escape_ascii());
    }
}

struct Relay {
    sinks: [Sink; 3],
    _dup: Dup,
    client: Client,
    count: usize,
}

impl Relay {
    fn start() -> Relay {
        let sinks = [(true, false), (false, false), (true, true)].map(|(bare_lf, all)| {
            Sink::with(SinkOptions {
                bare_lf,
                bare_cr: all,
                drop_nul: all,
                ..SinkOptions::default()
            })
        });
        let dup = Dup::start(&config(sinks[0].addr(), &[sinks[1].addr(), sinks[2].addr()], "", ""));
        let client = Client::ready(dup.addr());
        Relay { sinks, _dup: dup, client, count: 0 }
    }

    /// Sends a body in the way of `send`: it has to be one message, for us and at all three.
    #[track_caller]
    fn check(&mut self, body: &[u8], expected: &[u8], send: impl FnOnce(&mut Client, &[u8])) {
        self.client.send("MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n");
        for code in [250, 250, 354] {
            self.client.expect_reply(code);
        }
        send(&mut self.client, &[body, b".\r\n"].concat());
        self.client.expect_reply(250);
        // Had something been left over as commands, its replies would come before this one.
        self.client.send("VRFY x\r\n");
        self.client.expect_reply(252);
        self.count += 1;
        for sink in &self.sinks {
            let messages = sink.wait(self.count);
            let message = &messages[self.count - 1];
            let context = body.escape_ascii();
            assert_eq!(
                message.data.escape_ascii().to_string(),
                expected.escape_ascii().to_string(),
                "{context}"
            );
            assert_eq!(message.mail.split(' ').nth(1), Some("FROM:<a@example.com>"), "{context}");
            assert_eq!(message.rcpts.len(), 1, "{context}");
        }
    }

    /// No sink has seen a command but ours, nor a second end of a message.
    #[track_caller]
    fn finish(self) {
        for sink in &self.sinks {
            assert_eq!(sink.attempts().len(), self.count);
            assert_eq!(sink.count("MAIL"), self.count, "{:?}", sink.commands());
            for (_, line) in sink.commands() {
                assert!(!line.contains("victim") && !line.contains("ceo"), "{line}");
            }
        }
    }
}

/// What no server at all can see another end in.
fn assert_safe(data: &[u8]) {
    for (at, octet) in data.iter().enumerate() {
        match octet {
            b'\r' => assert_eq!(data.get(at + 1), Some(&b'\n'), "bare CR: {}", data.escape_ascii()),
            b'\n' => assert!(at > 0 && data[at - 1] == b'\r', "bare LF: {}", data.escape_ascii()),
            _ => {}
        }
    }
    for line in data.split(|&o| o == b'\n') {
        let text: Vec<u8> = line.iter().copied().filter(|&o| o != 0 && o != b'\r').collect();
        assert_ne!(text, b".", "a lone dot: {}", data.escape_ascii());
    }
}

/// A body with the sequence in its midst, and what has to arrive.
fn attack(sequence: &[u8]) -> (Vec<u8>, Vec<u8>) {
    let body = [b"Subject: x\r\n\r\nhello", sequence, SMUGGLED].concat();
    let expected = canonical(&body);
    assert_safe(&expected);
    (body, expected)
}

#[test]
fn no_sequence_ends_a_message_in_one_segment() {
    let mut relay = Relay::start();
    for sequence in SEQUENCES {
        let (body, expected) = attack(sequence);
        relay.check(&body, &expected, |client, octets| client.send(octets));
    }
    relay.finish();
}

#[test]
fn no_sequence_ends_a_message_one_octet_a_segment() {
    let mut relay = Relay::start();
    for sequence in SEQUENCES {
        let (body, expected) = attack(sequence);
        relay.check(&body, &expected, |client, octets| client.send_slowly(octets));
    }
    relay.finish();
}

#[test]
fn no_sequence_ends_a_message_wherever_it_is_cut() {
    let mut relay = Relay::start();
    for sequence in SEQUENCES {
        let (body, expected) = attack(sequence);
        let start = "Subject: x\r\n\r\nhello".len();
        for cut in start - 2..=start + sequence.len() + 2 {
            relay.check(&body, &expected, |client, octets| {
                client.send(&octets[..cut]);
                // There is no event for "it was read". A cut that is lost by chance is made
                // again by the property tests of the framing.
                thread::sleep(Duration::from_millis(3));
                client.send(&octets[cut..]);
            });
        }
    }
    relay.finish();
}

#[test]
fn no_sequence_ends_a_message_at_its_start_or_end() {
    let mut relay = Relay::start();
    for sequence in SEQUENCES {
        // At the start the first line end of some sequences is itself the start.
        let body = [sequence, SMUGGLED].concat();
        relay.check(&body, &canonical(&body), |client, octets| client.send(octets));
        let body = [b"x", sequence, b"\r\n"].concat();
        relay.check(&body, &canonical(&body), |client, octets| client.send(octets));
        let body = [b"x", sequence, sequence, SMUGGLED, b"x", sequence, SMUGGLED].concat();
        relay.check(&body, &canonical(&body), |client, octets| client.send(octets));
    }
    // The message's start is the start of a line.
    for start in [b".\n".as_slice(), b".\r", b".\r\r\n", b"\0.\r\n", b".\0\r\n", b".\0\n"] {
        let body = [start, SMUGGLED].concat();
        relay.check(&body, &canonical(&body), |client, octets| client.send(octets));
    }
    relay.finish();
}

#[test]
fn the_line_behind_a_cure_is_no_end_either() {
    // Where a line end is mended, what follows must not become a lone dot by it.
    let mut relay = Relay::start();
    for body in [
        b"x\n.\n.\n.\r\n..\r\n".as_slice(),
        b"x\r.\r.\r.\r\n..\r\n",
        b"x\r\r.\r\r.\r\r\n",
        b"x\n\0.\0\n\0\0..\r\n",
        b"x\r\r\r\n.\r\r\r\n.\n.\r\r\n",
        b"x\n.\r.\n\r.\r\n",
        b"\n\n.\n\n",
        b"x\r\n.\r.\r\n",
        b"x\r\n.\rMAIL FROM:<ceo@example.com>\r\n",
    ] {
        let body = [body, SMUGGLED].concat();
        let expected = canonical(&body);
        assert_safe(&expected);
        relay.check(&body, &expected, |client, octets| client.send(octets));
        relay.check(&body, &expected, |client, octets| client.send_slowly(octets));
    }
    relay.finish();
}

#[test]
fn very_many_crs() {
    let mut relay = Relay::start();
    for count in [2, 100, 1000] {
        let body = [b"x".as_slice(), &b"\r".repeat(count), b"\n.\r\r\ny\r\n"].concat();
        relay.check(&body, &canonical(&body), |client, octets| client.send(octets));
        let body = [b"x".as_slice(), &b"\r".repeat(count), b"y\r\n"].concat();
        relay.check(&body, &canonical(&body), |client, octets| client.send(octets));
    }
    // Whatever their number, what leaves is safe and still one message.
    for count in [5_000, 1_000_000] {
        let primary = Sink::start();
        let dup = Dup::start(&config(primary.addr(), &[], "", ""));
        let body =
            [b"x".as_slice(), &b"\r".repeat(count), b"\n.", &b"\r".repeat(count), b"\ny\r\n"]
                .concat();
        let mut client = Client::ready(dup.addr());
        assert_eq!(client.message("a@example.com", &["b@example.com"], &body).code, 250);
        assert_safe(&primary.wait(1)[0].data);
    }
    relay.finish();
}

#[test]
fn what_is_in_order_passes_octet_for_octet() {
    let mut relay = Relay::start();
    let mut all = Vec::new();
    for octet in (0..=255).filter(|octet| !b"\r\n".contains(octet)) {
        // At a line's start (a dot is stuffed there), in a line, at its end, alone.
        let stuffing: &[u8] = if octet == b'.' { b"." } else { b"" };
        all.extend_from_slice(stuffing);
        all.extend_from_slice(&[octet, b'x', octet, b'x', octet, b'\r', b'\n']);
        all.extend_from_slice(stuffing);
        all.extend_from_slice(&[octet, b'\r', b'\n']);
    }
    for body in [
        all.as_slice(),
        b"",
        b"\r\n",
        b"\r\n\r\n\r\n",
        b"..\r\n",
        b"..\r\n...\r\n....x\r\n..x\r\n",
        b"x.\r\n",
        b"x\r\n..\r\n",
        b". not stuffed, but not alone either\r\n",
        b"\0\r\n\0\0\r\nx\0y\r\n\0..\r\n",
        b"no colon, no header\r\n",
        b"tab\there \r\n \r\n\x1a\x7f\x80\xff\r\n",
    ] {
        relay.check(body, body, |client, octets| client.send(octets));
        relay.check(body, body, |client, octets| client.send_slowly(octets));
    }
    relay.finish();
}

#[test]
fn nuls_around_a_dot_that_is_not_alone_change_nothing() {
    let mut relay = Relay::start();
    for body in [
        b"\0.\0x\r\n".as_slice(),
        b"..\0x\r\n",
        b"\0.x\r\n",
        b"\0x.\r\n",
        b"\0..\r\n",
        b"\0.\0.\r\n",
    ] {
        relay.check(body, body, |client, octets| client.send(octets));
        relay.check(body, body, |client, octets| client.send_slowly(octets));
    }
    relay.finish();
}

#[test]
fn a_line_of_ten_million_octets() {
    let sinks = [Sink::start(), Sink::start()];
    let dup = Dup::start(&config(sinks[0].addr(), &[sinks[1].addr()], "", ""));
    let mut body = vec![b'x'; 10_000_000];
    body[5_000_000] = b'.';
    body.extend_from_slice(b"\r\n");
    let mut client = Client::ready(dup.addr());
    assert_eq!(client.message("a@example.com", &["b@example.com"], &body).code, 250);
    for sink in sinks {
        assert!(sink.wait(1)[0].data == body);
    }
}

#[test]
fn commands_behind_the_dot_in_one_segment() {
    // Right at the end, and not earlier, the commands begin again.
    let sinks = [Sink::start(), Sink::start()];
    let dup = Dup::start(&config(sinks[0].addr(), &[sinks[1].addr()], "", ""));
    let mut client = Client::ready(dup.addr());
    let transaction = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n";
    client.send(
        [
            transaction.as_slice(),
            b"one\r\n.\r\n",
            transaction,
            b".\r\n",
            transaction,
            b"three\r\n.\r\nQUIT\r\n",
        ]
        .concat(),
    );
    for code in [250, 250, 354, 250, 250, 250, 354, 250, 250, 250, 354, 250, 221] {
        client.expect_reply(code);
    }
    let bodies: Vec<_> = sinks[0].wait(3).into_iter().map(|message| message.data).collect();
    assert_eq!(bodies, [b"one\r\n".as_slice(), b"", b"three\r\n"]);
    sinks[1].wait(3);
}

/// More of the same with NULs, in each place of each of the usual sequences.
fn with_nuls() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for sequence in SEQUENCES.iter().filter(|sequence| !sequence.contains(&0)) {
        for at in 0..=sequence.len() {
            for nuls in [b"\0".as_slice(), b"\0\0"] {
                all.push([&sequence[..at], nuls, &sequence[at..]].concat());
            }
        }
    }
    // The true end, made untrue.
    for at in 1..5 {
        all.push([&b"\r\n.\r\n"[..at], b"\0", &b"\r\n.\r\n"[at..]].concat());
    }
    all.sort();
    all.dedup();
    all
}

#[test]
fn no_nul_anywhere_makes_an_end() {
    let mut relay = Relay::start();
    for sequence in with_nuls() {
        let (body, expected) = attack(&sequence);
        relay.check(&body, &expected, |client, octets| client.send(octets));
        // And where the message begins.
        let body = [&sequence, SMUGGLED].concat();
        relay.check(&body, &canonical(&body), |client, octets| client.send(octets));
        relay.check(&body, &canonical(&body), |client, octets| client.send_slowly(octets));
    }
    relay.finish();
}

#[test]
fn a_dot_right_behind_the_354_is_an_empty_message() {
    let mut relay = Relay::start();
    relay.check(b"", b"", |client, octets| {
        assert_eq!(octets, b".\r\n");
        client.send_slowly(octets);
    });
    // With the end in one segment with the DATA before it, and a transaction behind it.
    relay
        .client
        .send("MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n.\r\nVRFY x\r\n");
    for code in [250, 250, 354, 250, 252] {
        relay.client.expect_reply(code);
    }
    relay.count += 1;
    assert!(relay.sinks[0].wait(2)[1].data.is_empty());
    for sink in &relay.sinks {
        sink.wait(2);
    }
    relay.finish();
}

#[test]
fn no_sequence_ends_a_message_at_the_edge_of_a_buffer() {
    // What is read at once, while commands come and within a message; what is passed on at once;
    // what memory holds of a copy.
    const EDGES: [usize; 4] = [2304, 64 * 1024, 128 * 1024, 256 * 1024];
    const TRANSACTION: &[u8] = b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n";
    let line = [[b'x'; 62].as_slice(), b"\r\n"].concat();
    thread::scope(|scope| {
        for edge in EDGES {
            let line = &line;
            scope.spawn(move || {
                // One that is strict: no other can see more in what has to arrive.
                let primary = Sink::start();
                let dup = Dup::start(&config(primary.addr(), &[], "", ""));
                let mut client = Client::ready(dup.addr());
                for (number, sequence) in SEQUENCES.iter().enumerate() {
                    let (tail, expected) = attack(sequence);
                    // The edge lies in each place of the sequence, whether the envelope counts
                    // (it is in the same segment then) or not.
                    for back in 17..=19 + sequence.len() {
                        for before in [0, TRANSACTION.len()] {
                            let length = edge - back - before;
                            let mut body = b"x".repeat(length % line.len());
                            body.extend_from_slice(b"\r\n");
                            body.extend(line.repeat(length / line.len()));
                            body.truncate(length.max(2) - 2);
                            body.extend_from_slice(b"\r\n");
                            let sent = [&body, tail.as_slice(), b".\r\n"].concat();
                            match before {
                                0 => {
                                    client.send(TRANSACTION);
                                    for code in [250, 250, 354] {
                                        client.expect_reply(code);
                                    }
                                    client.send(sent);
                                }
                                _ => {
                                    client.send([TRANSACTION, &sent].concat());
                                    for code in [250, 250, 354] {
                                        client.expect_reply(code);
                                    }
                                }
                            }
                            client.expect_reply(250);
                            let context = || format!("{number} {edge} {back} {before}");
                            let last = primary.last().unwrap_or_else(|| panic!("{}", context()));
                            body.extend_from_slice(&expected);
                            assert!(last.data == body, "{}", context());
                        }
                    }
                }
                client.expect("VRFY x", 252);
                assert!(primary.commands().iter().all(|(_, line)| !line.contains("victim")));
                assert_eq!(primary.accepted(), primary.count("MAIL"));
            });
        }
    });
}

#[test]
fn no_sequence_ends_a_message_that_was_refused_for_its_size() {
    let primary = Sink::start();
    let dup = Dup::start(&config(primary.addr(), &[], "max_message_size: 1000", ""));
    let mut client = Client::ready(dup.addr());
    for sequence in SEQUENCES.map(<[u8]>::to_vec).into_iter().chain(with_nuls()) {
        client.envelope("a@example.com", &["b@example.com"]);
        let body = [&[b'x'; 2000], b"\r\n".as_slice(), &sequence, SMUGGLED].concat();
        // In one segment, and with the limit known before the rest comes.
        client.send(&body[..1500]);
        client.send([&body[1500..], b".\r\nVRFY x\r\n"].concat());
        client.expect_reply(552);
        client.expect_reply(252);
    }
    assert!(primary.attempts().is_empty());
    assert!(primary.commands().iter().all(|(_, line)| !line.contains("victim")));
}

#[test]
fn no_sequence_ends_a_message_within_its_header() {
    let mut relay = Relay::start();
    for sequence in SEQUENCES.map(<[u8]>::to_vec).into_iter().chain(with_nuls()) {
        // In a field, between fields, in one that is folded, and in the Message-ID that is logged.
        for (before, behind) in [
            ("Subject: a", "b\r\n\r\nx\r\n"),
            ("Subject: a\r\n", "To: x\r\n\r\nx\r\n"),
            ("Subject: a\r\n b", "\r\n c\r\n\r\nx\r\n"),
            ("Message-ID: <a", "b@example.com>\r\n\r\nx\r\n"),
        ] {
            let body = [before.as_bytes(), &sequence, SMUGGLED, behind.as_bytes()].concat();
            relay.check(&body, &canonical(&body), |client, octets| client.send(octets));
        }
    }
    assert!(!relay._dup.log().contains("\u{0}"), "{}", relay._dup.log());
    relay.finish();
}

#[test]
fn urgent_octets_are_octets() {
    // Whoever filters in front of us sees them; a message without them would be another.
    let primary = Sink::start();
    let dup = Dup::start(&config(primary.addr(), &[], "", ""));
    let mut client = Client::greeted(dup.addr());
    client.send("EHL");
    client.send_urgent(b'O');
    client.send(" x\r\n");
    client.expect_reply(250);
    client.envelope("a@example.com", &["b@example.com"]);
    client.send("x\r\n.");
    client.send_urgent(b'.');
    client.send("\r\ny\r\n.\r\n");
    client.expect_reply(250);
    assert_eq!(primary.wait(1)[0].data, b"x\r\n..\r\ny\r\n");
}
