//! Each kind of mail that Postfix sends, from its smtpd to the three destinations.

use std::collections::BTreeSet;
use std::thread;

use crate::Route;
use crate::common::{Action, Client, Event, SinkOptions};
use crate::instance::available;
use crate::letters::{assert_is_letter, letter, message_id, submit};

#[test]
fn plain_mail() {
    if !available() {
        return;
    }
    let route = Route::start();
    // In wire form: each dot at the beginning of a line is doubled.
    let letter =
        letter("plain", b"..\r\n...\r\n..dot\r\n\r\n trailing blanks \t \r\nFrom here\r\n\r\n\r\n");
    submit(&route.postfix, "<a@sender.test>", &["<b@example.com>"], &letter);
    route.postfix.wait_removed(1);
    for received in route.arrived_once(&letter) {
        let mail = &received.mail;
        assert!(mail.starts_with("MAIL FROM:<a@sender.test>"), "{mail}");
        assert!(received.rcpts[0].starts_with("RCPT TO:<b@example.com>"));
        assert_eq!(received.rcpts.len(), 1);
    }
    // Postfix heard the primary's own reply.
    let sent = ["to=<b@example.com>", "status=sent (250 2.0.0 queued as SINK1)"];
    assert_eq!(route.postfix.log(&sent).len(), 1);
}

#[test]
fn null_sender() {
    if !available() {
        return;
    }
    let route = Route::start();
    let letter = letter("null", b"This is a delivery report.\r\n");
    submit(&route.postfix, "<>", &["<b@example.com>"], &letter);
    route.postfix.wait_removed(1);
    for received in route.arrived_once(&letter) {
        let mail = &received.mail;
        assert!(mail == "MAIL FROM:<>" || mail.starts_with("MAIL FROM:<> "), "{mail}");
    }
}

/// A number of recipients that Postfix still sends in one transaction.
#[test]
fn fifty_recipients_some_refused() {
    if !available() {
        return;
    }
    let user = |number: usize| format!("user{number}@example.com");
    let is_refused = |number: usize| number % 7 == 3;
    let reply = move |event: &Event| {
        if let Event::Rcpt(line) = event {
            for number in (0..50).filter(|number| is_refused(*number)) {
                if line.contains(&format!("<{}>", user(number))) {
                    return Action::reply(format!("550 5.1.1 <{}>: gone since May", user(number)));
                }
            }
        }
        Action::Default
    };
    let primary = SinkOptions::replying(reply);
    let route = Route::with([primary, Default::default(), Default::default()], "");

    let letter = letter("fifty", b"To all of you.\r\n");
    let rcpts: Vec<_> = (0..50).map(|number| format!("<{}>", user(number))).collect();
    let rcpts: Vec<_> = rcpts.iter().map(String::as_str).collect();
    submit(&route.postfix, "<a@sender.test>", &rcpts, &letter);
    // The message, and the bounce to its sender.
    route.postfix.wait_removed(2);

    let names = |numbers: &dyn Fn(usize) -> bool| -> BTreeSet<String> {
        (0..50).filter(|n| numbers(*n)).map(user).collect()
    };
    let accepted = names(&|number| !is_refused(number));
    for received in route.arrived_once(&letter) {
        let found: BTreeSet<_> = received.rcpts.iter().map(|line| address(line)).collect();
        assert_eq!(found, accepted);
        assert_eq!(received.rcpts.len(), accepted.len());
    }
    let [primary, ..] = &route.sinks;
    assert_eq!((primary.count("MAIL"), primary.count("RCPT")), (1, 50));
    for backup in &route.sinks[1..] {
        assert_eq!((backup.count("MAIL"), backup.count("RCPT")), (1, accepted.len()));
    }
    let logged = |status: &str| -> BTreeSet<String> {
        let lines = route.postfix.log(&["@example.com>", status]);
        lines.iter().map(|line| address(line)).collect()
    };
    assert_eq!(logged("status=sent (250 2.0.0 queued as SINK1)"), accepted);
    assert_eq!(logged("status=bounced"), names(&is_refused));
    // Each with what the primary said about it.
    for user in names(&is_refused) {
        let said =
            format!("said: 550 5.1.1 <{user}>: gone since May (in reply to RCPT TO command)");
        assert_eq!(route.postfix.log(&[&format!("to=<{user}>"), &said]).len(), 1);
    }
}

/// The first address in angle brackets.
fn address(line: &str) -> String {
    let (_, rest) = line.split_once('<').unwrap();
    rest.split_once('>').unwrap().0.to_owned()
}

#[test]
fn eight_bit_mail_stays_eight_bit() {
    if !available() {
        return;
    }
    // A backup without the extension gets the same octets, only not the parameter.
    let mut plain = SinkOptions::default();
    plain.ehlo.retain(|keyword| *keyword != "8BITMIME");
    let route = Route::with([Default::default(), Default::default(), plain], "");
    let letter = letter("eight", &every_octet());
    let mail = "<a@sender.test> BODY=8BITMIME";
    submit(&route.postfix, mail, &["<b@example.com>"], &letter);
    route.postfix.wait_removed(1);
    let [primary, first, second] = route.arrived_once(&letter);
    for received in [primary, first] {
        assert!(received.mail.contains(" BODY=8BITMIME"), "{}", received.mail);
    }
    assert!(!second.mail.contains("BODY="), "{}", second.mail);
}

/// A primary without the extension: Postfix is not told otherwise, and sends quoted-printable.
#[test]
fn eight_bit_mail_to_a_primary_without_it() {
    if !available() {
        return;
    }
    let mut plain = SinkOptions::default();
    // Without this but with SMTPUTF8 it would send 8 bits all the same.
    plain.ehlo.retain(|keyword| !["8BITMIME", "SMTPUTF8"].contains(keyword));
    let route = Route::with([plain, Default::default(), Default::default()], "");
    let letter = letter("seven", "Gr\u{fc}\u{df}e\r\n".as_bytes());
    submit(&route.postfix, "<a@sender.test>", &["<b@example.com>"], &letter);
    route.postfix.wait_removed(1);
    for received in route.arrived(1).remove(0) {
        let text = String::from_utf8(received.data).unwrap();
        assert!(text.ends_with("\r\n\r\nGr=C3=BC=C3=9Fe\r\n"), "{text}");
    }
}

/// Each octet but CR, LF and NUL (Postfix takes no NUL out of mail, but RFC 5321 knows none),
/// short enough that Postfix folds no line.
fn every_octet() -> Vec<u8> {
    let mut body = Vec::new();
    for octet in (1..=255).filter(|octet| !b"\r\n".contains(octet)) {
        body.extend_from_slice(&[b'x', octet, octet, b'\r', b'\n']);
    }
    body
}

#[test]
fn smtputf8_mail() {
    if !available() {
        return;
    }
    let route = Route::start();
    let letter = letter("utf8", "Subject: no header, \u{3b1}\u{3b2}\u{3b3}\r\n".as_bytes());
    let mail = "<j\u{fc}rgen@sender.test> BODY=8BITMIME SMTPUTF8";
    let greek = "\u{3b4}\u{3bf}\u{3ba}\u{3b9}\u{3bc}\u{3ae}@example.com";
    let rcpts = [&format!("<{greek}>"), "<ascii@example.com>"];
    submit(&route.postfix, mail, &rcpts, &letter);
    route.postfix.wait_removed(1);
    for received in route.arrived_once(&letter) {
        let mail = &received.mail;
        assert!(mail.starts_with("MAIL FROM:<j\u{fc}rgen@sender.test> "), "{mail}");
        assert!(mail.contains(" SMTPUTF8"), "{mail}");
        let rcpts: BTreeSet<_> = received.rcpts.iter().map(|line| address(line)).collect();
        let expected = [greek, "ascii@example.com"];
        assert_eq!(rcpts, BTreeSet::from(expected.map(str::to_owned)));
    }
}

#[test]
fn dsn_parameters() {
    if !available() {
        return;
    }
    let mut plain = SinkOptions::default();
    plain.ehlo.retain(|keyword| *keyword != "DSN");
    let route = Route::with([Default::default(), Default::default(), plain], "");
    let letter = letter("dsn", b"Tell me when it is there.\r\n");
    let mail = "<a@sender.test> RET=HDRS ENVID=QQ314159";
    let rcpts = [
        "<b@example.com> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;Bob+2Bx@old.example",
        "<c@example.com> NOTIFY=DELAY ORCPT=rfc822;c@example.com",
    ];
    submit(&route.postfix, mail, &rcpts, &letter);
    // One message only: as the primary offers DSN, the reports are its task and not Postfix's.
    route.postfix.wait_removed(1);
    let [primary, first, second] = route.arrived_once(&letter);

    let mail = &primary.mail;
    assert!(mail.contains(" RET=HDRS") && mail.contains(" ENVID=QQ314159"), "{mail}");
    let mut rcpts = primary.rcpts.clone();
    rcpts.sort();
    // In the order in which Postfix writes them.
    let expected = [
        "RCPT TO:<b@example.com> ORCPT=rfc822;Bob+2Bx@old.example NOTIFY=SUCCESS,FAILURE",
        "RCPT TO:<c@example.com> ORCPT=rfc822;c@example.com NOTIFY=DELAY",
    ];
    assert_eq!(rcpts, expected);

    // Who offers DSN is asked for no report at all.
    assert_eq!(first.rcpts.len(), 2);
    for rcpt in &first.rcpts {
        assert!(rcpt.contains(" NOTIFY=NEVER"), "{rcpt}");
        assert_eq!(rcpt.matches("NOTIFY=").count(), 1, "{rcpt}");
    }
    // Who does not would not understand a word of it.
    assert_eq!(second.rcpts.len(), 2);
    for line in second.rcpts.iter().chain([&second.mail]) {
        for parameter in ["NOTIFY=", "ORCPT=", "RET=", "ENVID="] {
            assert!(!line.contains(parameter), "{line}");
        }
    }
}

#[test]
fn twenty_megabytes() {
    if !available() {
        return;
    }
    // The limit is Postfix's own, 10 MB unless said otherwise.
    let route = Route::with(Default::default(), "message_size_limit = 50000000");
    let mut body = Vec::new();
    for number in 0.. {
        if body.len() >= 20_000_000 {
            break;
        }
        body.extend_from_slice(format!("{number:076}\r\n").as_bytes());
    }
    let letter = letter("big", &body);
    submit(&route.postfix, "<a@sender.test>", &["<b@example.com>"], &letter);
    route.postfix.wait_removed(1);
    route.arrived_once(&letter);
}

#[test]
fn a_thousand_messages_at_twenty_in_parallel() {
    if !available() {
        return;
    }
    let route = Route::start();
    // Some fit into one packet, some are larger than any buffer on the way.
    let unique = |number: usize| {
        let lines = (0..1 + number * 37 % 400).map(|line| format!("{number} {line:060}\r\n"));
        letter(&format!("{number:04}"), lines.collect::<String>().as_bytes())
    };
    thread::scope(|scope| {
        for sender in 0..20 {
            let route = &route;
            scope.spawn(move || {
                let mut client = Client::ready(route.postfix.address);
                for number in (0..1000).filter(|number| number % 20 == sender) {
                    let to = format!("user{number}@example.com");
                    client.message("a@sender.test", &[&to], &unique(number));
                }
            });
        }
    });
    route.postfix.wait_removed(1000);
    for (number, message) in route.arrived(1000).iter().enumerate() {
        let letter = unique(number);
        assert_eq!(message_id(&message[0].data), message_id(&letter));
        assert_is_letter(&message[0].data, &letter);
        for received in message {
            assert_eq!(received.rcpts.len(), 1);
            assert_eq!(address(&received.rcpts[0]), format!("user{number}@example.com"));
        }
    }
    assert_eq!(route.postfix.log(&["status=sent", "@example.com>"]).len(), 1000);
    // Postfix used its connections again, and so did we.
    assert!(route.postfix.log(&["conn_use="]).len() >= 500);
    let connections = route.sinks.each_ref().map(|sink| sink.connections());
    assert!(connections[0] <= 100, "{connections:?}");
    // Four delivery agents each, unless said otherwise.
    assert!(connections[1] <= 4 && connections[2] <= 4, "{connections:?}");
}
