//! One test for each promise of the design that holds by now; the details are in the other files.

use std::time::{Duration, Instant};

use crate::common::{Action, Client, Dup, Event, Sink, SinkOptions, config, mail_body, run};
use crate::{BODY, deliver, dup_with};

#[test]
fn promise_1_nothing_is_accepted_that_the_primary_did_not_accept() {
    let primary = Sink::start();
    let backup = Sink::start();
    let dup = Dup::start(&config(primary.addr(), &[backup.addr()], "", "data_timeout_seconds: 1"));
    let mut client = Client::ready(dup.addr());
    // Whatever the primary does to the final dot: a 2xx to the client is its own 2xx.
    for (action, raw) in [
        (
            Action::reply("550-5.7.1 no\r\n550 5.7.1 spam"),
            Some("550-5.7.1 no\r\n550 5.7.1 spam\r\n"),
        ),
        (Action::reply("452 4.3.1 full"), Some("452 4.3.1 full\r\n")),
        (Action::reply("250 2.0.0 Ok: queued as 4XYZ"), Some("250 2.0.0 Ok: queued as 4XYZ\r\n")),
        (Action::Close, None),
        (Action::Silence, None),
        (Action::reply("what?"), None),
        (Action::raw("250 2.0.0 Ok").then(Action::Close), None),
    ] {
        let shown = format!("{action:?}");
        primary.set_reply(move |event| match event {
            Event::EndOfData(_) => action.clone(),
            Event::Rcpt(line) if line.contains("bad") => Action::reply("550 5.1.1 unknown"),
            _ => Action::Default,
        });
        client.expect("MAIL FROM:<a@example.com>", 250);
        client.expect("RCPT TO:<b@example.com>", 250);
        assert_eq!(client.cmd("RCPT TO:<bad@example.com>").raw, b"550 5.1.1 unknown\r\n");
        client.expect("DATA", 354);
        let reply = client.body(BODY);
        match raw {
            Some(raw) => assert_eq!(reply.raw, raw.as_bytes(), "{shown}"),
            None => assert_eq!(reply.code, 451, "{shown}: {reply:?}"),
        }
    }
    // One was accepted, and one only has a copy.
    let copy = backup.wait(1).remove(0);
    assert_eq!(copy.rcpts.len(), 1);
    assert!(copy.rcpts[0].starts_with("RCPT TO:<b@example.com>"), "{copy:?}");
}

#[test]
fn promise_2_a_copy_never_disturbs_the_mail() {
    let primary = Sink::start();
    let ill = [
        Sink::refusing(SinkOptions::default()),
        Sink::replying(|_| Action::Silence),
        Sink::replying(|_| Action::reply_then_close("421 4.3.2 no")),
        Sink::replying(|event| match event {
            Event::Body(_) | Event::EndOfData(_) => Action::Close,
            _ => Action::Default,
        }),
        Sink::replying(|_| Action::slow("250 2.0.0 one octet a minute", Duration::from_secs(60))),
    ];
    let well = Sink::start();
    let mut backups: Vec<_> = ill.iter().map(Sink::addr).collect();
    backups.push(well.addr());
    let dup = Dup::start(&config(primary.addr(), &backups, "", ""));
    let mut client = Client::ready(dup.addr());
    let body = mail_body(50_000);
    let mut slowest = Duration::ZERO;
    for _ in 0..50 {
        let since = Instant::now();
        assert_eq!(client.pipelined("a@example.com", "b@example.com", &body).code, 250);
        slowest = slowest.max(since.elapsed());
    }
    // The smallest limit that an ill backup could make anyone wait for is the 10 s of connecting.
    assert!(slowest < Duration::from_secs(5), "{slowest:?}");
    assert_eq!(primary.messages().len(), 50);
    well.wait(50);
    // Four agents for each of the six backups, and what serves clients and signals.
    assert!(dup.threads() <= 6 * 4 + 8, "{} threads", dup.threads());
}

#[test]
fn promise_4_every_byte_arrives() {
    let sinks = [Sink::start(), Sink::start(), Sink::start()];
    let dup = Dup::start(&config(sinks[0].addr(), &[sinks[1].addr(), sinks[2].addr()], "", ""));
    let mut client = Client::ready(dup.addr());
    // Past the size at which a body moves to a file, and below it.
    for (size, count) in [(1_000, 1), (3_000_000, 2)] {
        let mut body = mail_body(size);
        body.extend((0..=255).filter(|octet| !b"\r\n".contains(octet)));
        body.extend_from_slice(b"\r\n..\r\n..stuffed\r\n\r\n");
        client.expect("MAIL FROM:<\"a b\"@EXAMPLE.com> BODY=8BITMIME", 250);
        client.expect("RCPT TO:<b+c@[192.0.2.1]>", 250);
        client.expect("DATA", 354);
        assert_eq!(client.body(&body).code, 250);
        for sink in &sinks {
            let message = sink.wait(count).remove(count - 1);
            assert!(message.data == body, "{size} octets");
            assert_eq!(message.mail, "MAIL FROM:<\"a b\"@EXAMPLE.com> BODY=8BITMIME");
            assert!(message.rcpts[0].starts_with("RCPT TO:<b+c@[192.0.2.1]>"), "{message:?}");
        }
    }
}

#[test]
fn promise_5_nobody_smuggles() {
    let sinks = [(); 2].map(|()| {
        Sink::with(SinkOptions { bare_lf: true, bare_cr: true, ..SinkOptions::default() })
    });
    let dup = Dup::start(&config(sinks[0].addr(), &[sinks[1].addr()], "", ""));
    let mut client = Client::ready(dup.addr());
    let body =
        b"x\r\n.\ny\n.\r\nMAIL FROM:<ceo@example.com>\r\nRCPT TO:<v@example.com>\r\nDATA\r\nsmuggled\r\n";
    assert_eq!(client.message("a@example.com", &["b@example.com"], body).code, 250);
    for sink in &sinks {
        let expected = b"x\r\n..\r\ny\r\n..\r\nMAIL FROM:<ceo@example.com>\r\nRCPT TO:<v@example.com>\r\nDATA\r\nsmuggled\r\n";
        assert_eq!(sink.wait(1)[0].data, expected);
    }
    client.expect("VRFY x", 252);
}

#[test]
fn promise_6_no_backscatter() {
    let primary = Sink::replying(|event| match event {
        Event::EndOfData(2) => Action::reply("554 5.7.1 no"),
        _ => Action::Default,
    });
    let backup = Sink::start();
    let plain = Sink::start();
    plain.set_ehlo(&["PIPELINING"]);
    let dup = Dup::start(&config(primary.addr(), &[backup.addr(), plain.addr()], "", ""));
    let mut client = Client::ready(dup.addr());
    client.expect("MAIL FROM:<a@example.com> RET=FULL ENVID=x", 250);
    client.expect("RCPT TO:<b@example.com> NOTIFY=SUCCESS,FAILURE ORCPT=rfc822;b@example.com", 250);
    client.expect("RCPT TO:<c@example.com>", 250);
    client.expect("DATA", 354);
    assert_eq!(client.body(BODY).code, 250);
    // The primary may report, the backup may not.
    assert!(primary.wait(1)[0].rcpts[0].contains("NOTIFY=SUCCESS,FAILURE"));
    for rcpt in &backup.wait(1)[0].rcpts {
        assert!(rcpt.contains(" NOTIFY=NEVER"), "{rcpt}");
        assert_eq!(rcpt.matches("NOTIFY").count(), 1, "{rcpt}");
    }
    assert_eq!(plain.wait(1)[0].rcpts, ["RCPT TO:<b@example.com>", "RCPT TO:<c@example.com>"]);
    assert_eq!(plain.messages()[0].mail, "MAIL FROM:<a@example.com>");
    // What the primary refuses is the client's to report: nobody gets a message from us.
    assert_eq!(client.message("a@example.com", &["b@example.com"], BODY).code, 554);
    deliver(&mut client);
    backup.wait(2);
    plain.wait(2);
    let warning = dup.wait_log("warning: relay=");
    assert!(warning.contains(&plain.addr().to_string()) && warning.contains("DSN"), "{warning}");
}

#[test]
fn promise_7_not_an_open_relay() {
    let primary = Sink::start();
    let dup = dup_with(&primary, "allowed_clients: [\"127.0.0.1/32\"]", "");
    let mut stranger = Client::connect_from("127.0.0.2".parse().unwrap(), dup.addr());
    // Whatever it says, even before it is asked, nothing of it gets anywhere.
    stranger.try_send(
        "EHLO x\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\nx\r\n.\r\n",
    );
    let reply = stranger.expect_reply(421);
    assert!(
        reply.text().starts_with("4.7.1 ") && reply.text().contains("allowed_clients"),
        "{reply:?}"
    );
    stranger.closed();
    deliver(&mut Client::ready(dup.addr()));
    assert_eq!(primary.messages().len(), 1);
    assert_eq!(primary.connections(), 1);
}

#[test]
fn promise_8_it_explains_itself() {
    let primary = Sink::replying(|event| match event {
        Event::EndOfData(_) => Action::reply("250 2.0.0 Ok: queued as 4XYZ"),
        _ => Action::Default,
    });
    let backup = Sink::replying(|event| match event {
        Event::Rcpt(line) if line.contains("b@") => Action::reply("550 5.1.1 unknown user"),
        Event::EndOfData(_) => Action::reply("250 2.0.0 Ok: queued as 77AB"),
        _ => Action::Default,
    });
    let dup = Dup::start(&config(primary.addr(), &[backup.addr()], "", ""));
    let mut client = Client::ready(dup.addr());
    let body = b"Subject: x\r\nMessage-ID: <x@y>\r\n\r\nHello\r\n";
    assert_eq!(
        client.message("a@example.com", &["b@example.com", "c@example.com"], body).code,
        250
    );
    let (primary, backup) = (primary.addr(), backup.addr());
    let line = dup.wait_log("client=");
    let id = line.split_whitespace().nth(1).unwrap();
    assert!(
        id.len() == 11 && id[..10].bytes().all(|o| o.is_ascii_hexdigit()) && id.ends_with(':'),
        "{line}"
    );
    let expected = format!(
        "{id} client={} from=<a@example.com> size={} nrcpt=2 message-id=<x@y>",
        client.local_addr(),
        body.len()
    );
    assert!(line.ends_with(&expected), "{line}");
    for (start, end) in [
        (
            format!("{id} relay={primary} role=primary delay="),
            "status=sent (250 2.0.0 Ok: queued as 4XYZ)",
        ),
        (
            format!("{id} relay={backup} role=backup delay="),
            "status=sent (250 2.0.0 Ok: queued as 77AB)",
        ),
        (
            format!("error: {id} to=<b@example.com> relay={backup} role=backup status=refused"),
            "(550 5.1.1 unknown user)",
        ),
    ] {
        let line = dup.wait_log(&start);
        assert!(line.ends_with(end), "{line}");
    }
    // A mistake in the configuration is refused at once, with key, value and remedy.
    let yaml = config(primary, &[], "max_connection: 5", "");
    let output = run(&[], Some(&yaml), &[]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.contains("max_connection") && text.contains("max_connections"), "{text}");
}
