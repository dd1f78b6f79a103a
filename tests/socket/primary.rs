//! The primary, live: its replies are the client's, and nothing that it does wrong becomes a
//! reply that loses mail.

use std::net::{SocketAddr, TcpListener};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{
    Action, BOUND, Client, DeadHost, Dup, Event, Reply, Sink, SinkOptions, bound, config, mail_body,
};
use crate::{BODY, deliver, dup_with, relay};

/// A reply that Postfix would put back into its queue for, and an administrator understand.
#[track_caller]
fn assert_deferred(reply: &Reply, primary: SocketAddr, context: &str) {
    assert_eq!(reply.code / 100, 4, "{context}: {reply:?}");
    assert!(reply.has_enhanced_code(), "{context}: no enhanced code: {reply:?}");
    assert!(reply.text().contains(&primary.to_string()), "{context}: does not name it: {reply:?}");
}

/// The keywords of a reply to EHLO, sorted.
fn keywords(reply: &Reply) -> Vec<String> {
    let mut lines = reply.lines[1..].to_vec();
    lines.sort();
    lines
}

#[test]
fn ehlo_is_a_mirror() {
    for (offered, own_limit, expected) in [
        (vec![], 0, vec!["PIPELINING"]),
        (vec!["8BITMIME"], 0, vec!["8BITMIME", "PIPELINING"]),
        (vec!["SMTPUTF8", "DSN"], 0, vec!["DSN", "PIPELINING", "SMTPUTF8"]),
        (
            vec!["enhancedstatuscodes", "8bitmime"],
            0,
            vec!["8BITMIME", "ENHANCEDSTATUSCODES", "PIPELINING"],
        ),
        (vec!["SIZE 5000"], 0, vec!["PIPELINING", "SIZE 5000"]),
        (vec!["SIZE 5000"], 3000, vec!["PIPELINING", "SIZE 3000"]),
        (vec!["SIZE 5000"], 9000, vec!["PIPELINING", "SIZE 5000"]),
        (vec!["SIZE"], 9000, vec!["PIPELINING", "SIZE 9000"]),
        (vec!["SIZE 0"], 9000, vec!["PIPELINING", "SIZE 9000"]),
        (vec![], 9000, vec!["PIPELINING", "SIZE 9000"]),
        (
            vec![
                "CHUNKING",
                "AUTH PLAIN LOGIN",
                "AUTH=PLAIN",
                "STARTTLS",
                "XFORWARD NAME ADDR",
                "BINARYMIME",
                "VRFY",
                "ETRN",
                "DSN",
                "REQUIRETLS",
                "X-OWN",
            ],
            0,
            vec!["DSN", "PIPELINING", "XFORWARD NAME ADDR"],
        ),
    ] {
        let primary = Sink::start();
        primary.set_ehlo(&offered);
        let dup = dup_with(&primary, &format!("max_message_size: {own_limit}"), "");
        let mut client = Client::greeted(dup.addr());
        let reply = client.ehlo();
        assert_eq!(keywords(&reply), expected, "the primary offers {offered:?}");
        assert!(reply.lines[0].starts_with("dup.example"), "{reply:?}");
        deliver(&mut client);
        assert_eq!(primary.messages().len(), 1);
    }
}

#[test]
fn the_mirror_shows_the_primary_of_now() {
    let (primary, dup) = relay();
    primary.set_ehlo(&["DSN"]);
    assert!(Client::greeted(dup.addr()).ehlo().offers("DSN"));
    primary.close_connections();
    primary.set_ehlo(&["8BITMIME"]);
    let reply = Client::greeted(dup.addr()).ehlo();
    assert_eq!(keywords(&reply), ["8BITMIME", "PIPELINING"]);
}

#[test]
fn a_primary_that_knows_only_helo() {
    let primary = Sink::replying(|event| match event {
        Event::Ehlo(line) if line.starts_with("EHLO") => Action::reply("502 what?"),
        _ => Action::Default,
    });
    let dup = dup_with(&primary, "", "");
    let mut client = Client::greeted(dup.addr());
    assert_eq!(keywords(&client.ehlo()), ["PIPELINING"]);
    deliver(&mut client);
    assert_eq!(primary.messages().len(), 1);
}

#[test]
fn every_line_of_its_replies_is_passed_on() {
    const MAIL: &[u8] = b"250-2.1.0 first\r\n250-2.1.0  second  \r\n250 2.1.0 last\r\n";
    const GOOD: &[u8] = b"251-2.1.5 forwards to\r\n251 2.1.5 <else@example.com>\r\n";
    const BAD: &[u8] = b"550-5.1.1 <bad@example.com>\r\n550-\r\n550 5.1.1 \"no\" such user; see https://example.com/?a=b\r\n";
    const LATER: &[u8] = b"451-4.7.1 greylisted\r\n451 4.7.1 back in 300 seconds\r\n";
    const LATIN: &[u8] = b"450 4.2.0 bo\xeete pleine, \xc3\xa9\r\n";
    const DATA: &[u8] = b"354-go\r\n354 on\r\n";
    const END: &[u8] = b"250-2.6.0 <id@example.com>\r\n250 2.0.0 Ok: queued as 4XYZ\r\n";
    let primary = Sink::replying(|event| match event {
        Event::Mail(_) => Action::raw(MAIL),
        Event::Rcpt(line) if line.contains("bad") => Action::raw(BAD),
        Event::Rcpt(line) if line.contains("later") => Action::raw(LATER),
        Event::Rcpt(line) if line.contains("latin") => Action::raw(LATIN),
        Event::Rcpt(_) => Action::raw(GOOD),
        Event::Data => Action::raw(DATA),
        Event::EndOfData(_) => Action::raw(END),
        _ => Action::Default,
    });
    let dup = dup_with(&primary, "", "");
    let commands = [
        ("MAIL FROM:<a@example.com>", MAIL),
        ("RCPT TO:<bad@example.com>", BAD),
        ("RCPT TO:<good@example.com>", GOOD),
        ("RCPT TO:<later@example.com>", LATER),
        ("RCPT TO:<latin@example.com>", LATIN),
        ("DATA", DATA),
    ];
    let mut client = Client::ready(dup.addr());
    for (command, reply) in commands {
        assert_eq!(client.cmd(command).raw, reply, "{command}");
    }
    assert_eq!(client.body(BODY).raw, END);
    client.send(commands.map(|(command, _)| format!("{command}\r\n")).concat());
    for (command, reply) in commands {
        assert_eq!(client.reply().raw, reply, "{command}, pipelined");
    }
    assert_eq!(client.body(BODY).raw, END);
    for message in primary.wait(2) {
        assert_eq!(message.rcpts, ["RCPT TO:<good@example.com>"]);
    }
}

#[test]
fn its_refusals_are_passed_on_and_the_session_goes_on() {
    const NO: &[u8] = b"554-5.7.1 rejected\r\n554 5.7.1 for good\r\n";
    const LATER: &[u8] = b"451-4.3.0 not\r\n451 4.3.0 now\r\n";
    for refusal in [NO, LATER] {
        for step in ["MAIL", "DATA", "end"] {
            let primary = Sink::start();
            primary.set_reply(move |event| match (event, step) {
                (Event::Mail(_), "MAIL") | (Event::Data, "DATA") | (Event::EndOfData(_), "end") => {
                    Action::raw(refusal)
                }
                _ => Action::Default,
            });
            let dup = dup_with(&primary, "", "");
            let mut client = Client::ready(dup.addr());
            let heard = match step {
                "MAIL" => client.cmd("MAIL FROM:<a@example.com>"),
                "DATA" => {
                    client.expect("MAIL FROM:<a@example.com>", 250);
                    client.expect("RCPT TO:<b@example.com>", 250);
                    client.cmd("DATA")
                }
                _ => client.message("a@example.com", &["b@example.com"], BODY),
            };
            assert_eq!(heard.raw, refusal, "{step}");
            primary.set_reply(|_| Action::Default);
            client.expect("RSET", 250);
            deliver(&mut client);
            assert_eq!(primary.messages().len(), 1);
            assert_eq!(primary.connections(), 1, "{step}: a refusal is no reason to leave");
        }
    }
}

const BATCH: &str = "MAIL FROM:<a@example.com> SIZE=100\r\nRCPT TO:<b@example.com>\r\n\
                     RCPT TO:<c@example.com> NOTIFY=NEVER\r\nDATA\r\n";

#[test]
fn a_batch_travels_as_a_batch() {
    let (primary, dup) = relay();
    let mut client = Client::ready(dup.addr());
    for count in 1..=3 {
        client.send(BATCH);
        for code in [250, 250, 250, 354] {
            client.expect_reply(code);
        }
        assert_eq!(client.body(BODY).code, 250);
        let whole = primary.reads().iter().filter(|read| read == &BATCH.as_bytes()).count();
        assert_eq!(whole, count, "{:?}", primary.commands());
    }
}

#[test]
fn one_line_at_a_time_to_a_primary_without_pipelining() {
    let primary = Sink::start();
    primary.set_ehlo(&["8BITMIME"]);
    let dup = dup_with(&primary, "", "");
    let mut client = Client::ready(dup.addr());
    client.send(BATCH);
    for code in [250, 250, 250, 354] {
        client.expect_reply(code);
    }
    assert_eq!(client.body(BODY).code, 250);
    // All but what belongs to the body: there each read is one line.
    let lines: Vec<_> =
        primary.reads().into_iter().filter(|read| !read.starts_with(b"Subject")).collect();
    for read in &lines {
        assert_eq!(read.iter().filter(|&&o| o == b'\n').count(), 1, "{}", read.escape_ascii());
    }
    assert_eq!(lines.len(), 1 + 4, "{lines:?}");
}

#[test]
fn a_big_batch() {
    // More than two pipes hold, would nobody read the replies meanwhile.
    let text = "x".repeat(400);
    let refusal = format!("550 5.1.1 {text}");
    let primary = Sink::replying(move |event| match event {
        Event::Rcpt(line) if line.contains("bad") => Action::reply(&refusal),
        _ => Action::Default,
    });
    let dup = dup_with(&primary, "max_recipients: 20000", "");
    let mut client = Client::ready(dup.addr());
    let mut batch = "MAIL FROM:<a@example.com>\r\n".to_string();
    for number in 0..10_000 {
        let kind = if number % 2 == 0 { "good" } else { "bad" };
        batch.push_str(&format!("RCPT TO:<{kind}{number}@example.com>\r\n"));
    }
    batch.push_str("DATA\r\n");
    let sent = client.send_in_background(batch);
    client.expect_reply(250);
    for number in 0..10_000 {
        client.expect_reply(if number % 2 == 0 { 250 } else { 550 });
    }
    client.expect_reply(354);
    sent.join().unwrap();
    assert_eq!(client.body(BODY).code, 250);
    assert_eq!(primary.wait(1)[0].rcpts.len(), 5_000);
}

#[test]
fn a_client_that_waits_within_a_batch_gets_its_replies() {
    // Half a batch and half a line: what is whole is answered without the rest.
    let (_primary, dup) = relay();
    let mut client = Client::ready(dup.addr());
    client.send("MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nRCPT TO:<c@ex");
    client.expect_reply(250);
    client.expect_reply(250);
    client.send("ample.com>\r\nDATA\r\n");
    client.expect_reply(250);
    client.expect_reply(354);
    assert_eq!(client.body(BODY).code, 250);
}

#[test]
fn go_ahead_only_when_the_primary_said_so() {
    let (go, gate) = mpsc::channel();
    let gate = std::sync::Mutex::new(gate);
    let primary = Sink::replying(move |event| {
        if *event == Event::Data {
            let _ = gate.lock().unwrap().recv_timeout(crate::common::BOUND);
        }
        Action::Default
    });
    let dup = dup_with(&primary, "", "");
    let mut client = Client::ready(dup.addr());
    client.expect("MAIL FROM:<a@example.com>", 250);
    client.expect("RCPT TO:<b@example.com>", 250);
    client.send("DATA\r\n");
    primary.wait_for("DATA", |sink| sink.count("DATA") == 1);
    assert!(client.is_silent(Duration::from_millis(300)), "354 before the primary's");
    go.send(()).unwrap();
    client.expect_reply(354);
    assert_eq!(client.body(BODY).code, 250);
}

#[test]
fn the_body_streams() {
    let seen = Arc::new(AtomicUsize::new(0));
    let progress = Arc::clone(&seen);
    let primary = Sink::replying(move |event| {
        if let Event::Body(count) = event {
            progress.store(*count, Ordering::SeqCst);
        }
        Action::Default
    });
    let dup = dup_with(&primary, "", "");
    let mut client = Client::ready(dup.addr());
    client.envelope("a@example.com", &["b@example.com"]);
    let mut body = mail_body(1_000_000);
    client.send(&body);
    // All but the last octet or two, which might belong to the end, are there before more comes.
    let length = body.len();
    primary.wait_for("the body", |_| seen.load(Ordering::SeqCst) + 5 >= length);
    // A pause longer than a socket's tick of a second changes nothing.
    thread::sleep(Duration::from_millis(2100));
    client.send("and more\r\n");
    body.extend_from_slice(b"and more\r\n");
    client.send(".\r\n");
    client.expect_reply(250);
    assert!(primary.wait(1)[0].data == body);
}

#[test]
fn one_refused_recipient_refuses_that_one_only() {
    let primary = Sink::replying(|event| match event {
        Event::Rcpt(line) if line.contains("bad") => Action::reply("550 5.1.1 unknown"),
        Event::Rcpt(line) if line.contains("later") => Action::reply("450 4.2.1 not now"),
        _ => Action::Default,
    });
    let dup = dup_with(&primary, "", "");
    let mut client = Client::ready(dup.addr());
    client.expect("MAIL FROM:<a@example.com>", 250);
    client.expect("RCPT TO:<bad@example.com>", 550);
    client.expect("RCPT TO:<b@example.com>", 250);
    client.expect("RCPT TO:<later@example.com>", 450);
    client.expect("RCPT TO:<c@example.com>", 250);
    client.expect("DATA", 354);
    assert_eq!(client.body(BODY).code, 250);
    assert_eq!(primary.wait(1)[0].rcpts, ["RCPT TO:<b@example.com>", "RCPT TO:<c@example.com>"]);
}

#[test]
fn when_all_are_refused_nothing_is_sent() {
    let (primary, dup) = relay();
    let refuse = |event: &Event| match event {
        Event::Rcpt(line) if line.contains("bad") => Action::reply("550 5.1.1 unknown"),
        _ => Action::Default,
    };
    primary.set_reply(refuse);
    let mut client = Client::ready(dup.addr());
    client.expect("MAIL FROM:<a@example.com>", 250);
    client.expect("RCPT TO:<bad@example.com>", 550);
    client.expect("RCPT TO:<bad2@example.com>", 550);
    let reply = client.cmd("DATA");
    assert!([503, 554].contains(&reply.code), "{reply:?}");
    // As Postfix does it: DATA is on its way before the first refusal is back.
    client.expect("RSET", 250);
    client.send("MAIL FROM:<a@example.com>\r\nRCPT TO:<bad@example.com>\r\nDATA\r\n");
    client.expect_reply(250);
    client.expect_reply(550);
    let reply = client.reply();
    assert!([503, 554].contains(&reply.code), "{reply:?}");
    client.expect("RSET", 250);
    deliver(&mut client);
    assert_eq!(primary.wait(1)[0].data, BODY);
    assert!(primary.broken().is_empty() && primary.attempts().len() == 1);
}

#[test]
fn a_primary_that_wants_data_for_nobody() {
    let primary = Sink::replying(|event| match event {
        Event::Rcpt(line) if line.contains("bad") => Action::reply("550 5.1.1 unknown"),
        Event::Data => Action::reply("354 go on"),
        _ => Action::Default,
    });
    let dup = dup_with(&primary, "", "");
    let mut client = Client::ready(dup.addr());
    client.send("MAIL FROM:<a@example.com>\r\nRCPT TO:<bad@example.com>\r\nDATA\r\n");
    client.expect_reply(250);
    client.expect_reply(550);
    client.expect_reply(503);
    // That connection is closed, and no dot has gone over it.
    primary.wait_for("the connection's end", |sink| !sink.broken().is_empty());
    assert_eq!(primary.broken()[0].data, b"");
    client.expect("RSET", 250);
    deliver(&mut client);
    assert_eq!(primary.attempts().len(), 1);
}

#[test]
fn a_primary_that_cannot_be_reached() {
    let primary = Sink::refusing(SinkOptions::default());
    let dup = dup_with(&primary, "", "");
    for hello in ["EHLO client.example", "HELO client.example"] {
        let mut client = Client::greeted(dup.addr());
        let reply = client.expect(hello, 421);
        assert!(reply.text().starts_with("4.4.1 "), "{reply:?}");
        assert_deferred(&reply, primary.addr(), hello);
        client.closed();
    }
    primary.reopen();
    deliver(&mut Client::ready(dup.addr()));
}

#[test]
fn a_primary_that_is_gone_at_mail() {
    let (primary, dup) = relay();
    let mut client = Client::ready(dup.addr());
    primary.close();
    let reply = client.expect("MAIL FROM:<a@example.com>", 421);
    assert!(reply.text().starts_with("4.4.1 "), "{reply:?}");
    assert_deferred(&reply, primary.addr(), "MAIL");
    client.closed();
}

#[test]
fn a_primary_that_does_not_answer_the_connection() {
    let dead = DeadHost::start();
    let dup = Dup::start(&config(dead.addr(), &[], "", "timeout_seconds: 1"));
    let since = Instant::now();
    let mut client = Client::greeted(dup.addr());
    let reply = client.expect("EHLO client.example", 421);
    assert_deferred(&reply, dead.addr(), "EHLO");
    client.closed();
    // One second, and not the ten of the default.
    assert!(since.elapsed() < Duration::from_secs(7), "after {:?}", since.elapsed());
}

#[test]
fn an_unwelcoming_primary() {
    for (step, answer) in [
        ("greeting", "554 5.7.1 no service for you"),
        ("greeting", "421 4.3.2 too busy"),
        ("greeting", "hello there"),
        ("greeting", "354 go on"),
        ("ehlo", "421 4.3.2 too busy"),
        ("ehlo", "550 5.7.1 not you"),
        ("ehlo", "451 4.3.0 later"),
        ("ehlo", "nonsense"),
    ] {
        let primary = Sink::replying(move |event| match (event, step) {
            (Event::Connect(_), "greeting") | (Event::Ehlo(_), "ehlo") => Action::reply(answer),
            _ => Action::Default,
        });
        let dup = dup_with(&primary, "", "");
        let mut client = Client::greeted(dup.addr());
        let reply = client.expect("EHLO client.example", 421);
        assert_deferred(&reply, primary.addr(), answer);
        assert!(reply.text().starts_with("4.4.1 "), "{reply:?}");
        client.closed();
        primary.set_reply(|_| Action::Default);
        deliver(&mut Client::ready(dup.addr()));
    }
}

/// The points at which a primary can fail.
const STEPS: [&str; 7] = ["greeting", "EHLO", "MAIL", "RCPT", "DATA", "body", "end"];

fn is_step(event: &Event, step: &str) -> bool {
    match event {
        Event::Connect(_) => step == "greeting",
        Event::Ehlo(_) => step == "EHLO",
        Event::Mail(_) => step == "MAIL",
        Event::Rcpt(_) => step == "RCPT",
        Event::Data => step == "DATA",
        Event::Body(_) => step == "body",
        Event::EndOfData(_) => step == "end",
        _ => false,
    }
}

/// Lets the primary fail at `step`, and looks at what the client hears: a 4xx that explains
/// itself, once; and afterwards a session in which a good transaction succeeds.
#[track_caller]
fn fails_at(step: &'static str, fault: Action, context: &str, limits: &str) {
    let context = format!("{context} at {step}");
    let primary = Sink::start();
    let dup = dup_with(&primary, "", limits);
    let wanted = fault.clone();
    primary.set_reply(
        move |event| if is_step(event, step) { wanted.clone() } else { Action::Default },
    );
    let mut client = Client::greeted(dup.addr());
    // Far below what the fault would last, had nothing a limit.
    let within = Duration::from_secs(8);
    let mut heard = Vec::new();
    for command in
        ["EHLO client.example", "MAIL FROM:<a@example.com>", "RCPT TO:<b@example.com>", "DATA"]
    {
        client.send(format!("{command}\r\n"));
        let reply = client.reply_within(within);
        let failed = reply.code >= 400;
        heard.push(reply);
        if failed {
            break;
        }
    }
    if heard.last().unwrap().code == 354 {
        // Enough that it comes in several reads, and the primary's failure is in mid-body.
        client.send(mail_body(300_000));
        primary.wait_for("a part of the body", |sink| {
            sink.open_connections() == 0
                || sink.reads().iter().any(|read| read.starts_with(b"Subject"))
        });
        client.send(mail_body(300_000));
        client.send(".\r\n");
        heard.push(client.reply_within(within));
    }
    let last = heard.last().unwrap();
    assert_deferred(last, primary.addr(), &context);
    assert!(primary.messages().len() <= usize::from(step == "end"), "{context}");
    if step == "body" {
        primary.wait_for("the body's end", |sink| !sink.broken().is_empty());
        assert!(primary.attempts().is_empty(), "{context}: a dot was sent");
    }
    primary.set_reply(|_| Action::Default);
    let before = primary.messages().len();
    if last.code == 421 {
        assert!(["greeting", "EHLO"].contains(&step), "{context}: {last:?}");
        client.closed();
        client = Client::ready(dup.addr());
    } else {
        assert_eq!(last.code, 451, "{context}: {last:?}");
        // The rest of that transaction has failed too.
        let further = match step {
            "MAIL" => vec!["RCPT TO:<b@example.com>", "DATA"],
            "RCPT" => vec!["MAIL FROM:<a@example.com>", "RCPT TO:<c@example.com>", "DATA"],
            _ => vec![],
        };
        for command in further {
            assert_eq!(client.cmd(command).raw, last.raw, "{context}: then {command}");
        }
        client.expect("RSET", 250);
    }
    deliver(&mut client);
    assert_eq!(primary.messages().len(), before + 1, "{context}");
    assert_eq!(primary.messages().pop().unwrap().data, BODY, "{context}");
}

/// All steps side by side: most of the time is waiting for time limits.
fn fails_at_each(steps: &[&'static str], fault: impl Fn() -> Action, context: &str, limits: &str) {
    thread::scope(|scope| {
        for step in steps {
            let fault = fault();
            scope.spawn(move || fails_at(step, fault, context, limits));
        }
    });
}

const SHORT: &str = "command_timeout_seconds: 1\ndata_timeout_seconds: 1";

#[test]
fn a_primary_that_is_silent() {
    let steps = ["greeting", "EHLO", "MAIL", "RCPT", "DATA", "end"];
    fails_at_each(&steps, || Action::Silence, "silent", SHORT);
}

#[test]
fn a_primary_that_dribbles_its_reply() {
    // Each octet comes in time for a limit on each read; the whole would take 15 s.
    let steps = ["greeting", "EHLO", "MAIL", "RCPT", "DATA", "end"];
    let fault =
        || Action::slow("250 2.0.0 this is a very long reply, long", Duration::from_millis(300));
    fails_at_each(&steps, fault, "dribbling", SHORT);
}

#[test]
fn a_primary_that_dribbles_lines() {
    // Each line is whole, and the reply never ends.
    let steps = ["greeting", "EHLO", "MAIL", "RCPT", "DATA", "end"];
    let fault = || {
        let line = || Action::after(Duration::from_millis(300), Action::reply("250-2.0.0 and"));
        (0..40).fold(line(), |all, _| all.then(line()))
    };
    fails_at_each(&steps, fault, "dribbling lines", SHORT);
}

#[test]
fn a_primary_that_closes() {
    fails_at_each(&STEPS, || Action::Close, "closing", "");
}

#[test]
fn a_primary_that_closes_within_a_reply() {
    let steps = ["greeting", "EHLO", "MAIL", "RCPT", "DATA", "end"];
    fails_at_each(
        &steps,
        || Action::raw("250-2.0.0 so\r\n250").then(Action::Close),
        "closing in a reply",
        "",
    );
    fails_at_each(
        &steps,
        || Action::raw("250 2.0.0 no line end").then(Action::Close),
        "closing in a line",
        "",
    );
}

#[test]
fn a_primary_that_talks_nonsense() {
    let mut cases: Vec<Vec<u8>> = [
        "hello\r\n",
        "999 x\r\n",
        "25\r\n",
        "\r\n",
        "250-x\r\n251 y\r\n",
        "250_x\r\n",
        "2500 x\r\n",
        " 250 x\r\n",
        "150 wait\r\n",
        "000 x\r\n",
        "650 x\r\n",
        "HTTP/1.1 400 Bad Request\r\n\r\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .to_vec();
    cases.push(b"\xff\xfe\xfd 8-bit\r\n".to_vec());
    cases.push(b"\x15\x03\x01\x00\x02\x02\x50".to_vec());
    cases.push(b"\0\0\0\0\r\n".to_vec());
    cases.push(b"250-x\r\n".repeat(20_000));
    cases.push([b"250 ".to_vec(), vec![b'x'; 100_000], b"\r\n".to_vec()].concat());
    cases.push(vec![b'x'; 100_000]);
    for case in &cases {
        let context = format!("\"{}\"", case[..case.len().min(40)].escape_ascii());
        // Some of it is no nonsense yet but the beginning of a reply: so the limits are short.
        fails_at_each(&STEPS, || Action::raw(case), &context, SHORT);
    }
}

#[test]
fn replies_that_mean_nothing_here() {
    fails_at("MAIL", Action::reply("354 go on"), "354", "");
    fails_at("RCPT", Action::reply("354 go on"), "354", "");
    fails_at("DATA", Action::reply("250 2.0.0 ok"), "250", "");
    fails_at("end", Action::reply("354 go on"), "354", "");
}

#[test]
fn a_failure_within_a_batch() {
    for step in ["MAIL", "RCPT", "DATA"] {
        let primary = Sink::start();
        let dup = dup_with(&primary, "", "");
        primary.set_reply(
            move |event| if is_step(event, step) { Action::Close } else { Action::Default },
        );
        let mut client = Client::ready(dup.addr());
        client.send(BATCH);
        let replies: Vec<_> = (0..4).map(|_| client.reply()).collect();
        let good = ["MAIL", "RCPT", "", "DATA"].iter().position(|s| *s == step).unwrap();
        for (n, reply) in replies.iter().enumerate() {
            if n < good {
                assert_eq!(reply.code, 250, "{step} {n}: {reply:?}");
            } else {
                assert_deferred(reply, primary.addr(), step);
                assert_eq!(reply.code, 451, "{step} {n}: {reply:?}");
            }
        }
        primary.set_reply(|_| Action::Default);
        client.expect("RSET", 250);
        deliver(&mut client);
    }
}

#[test]
fn the_limit_for_commands_is_not_that_for_end_of_data() {
    let primary = Sink::replying(|event| match event {
        Event::EndOfData(_) => Action::after(Duration::from_millis(2500), Action::Default),
        _ => Action::Default,
    });
    let dup = dup_with(&primary, "", "command_timeout_seconds: 1");
    deliver(&mut Client::ready(dup.addr()));
}

/// Sends 20 MB; the primary does `answer` after the first 100 KB. What the client hears at the
/// end, and that no dot was sent.
#[track_caller]
fn early(answer: Action, limits: &str) -> (Reply, Sink, Dup) {
    let primary = Sink::start();
    let dup = dup_with(&primary, "", limits);
    let done = AtomicUsize::new(0);
    primary.set_reply(move |event| match event {
        Event::Body(count) if *count > 100_000 && done.fetch_add(1, Ordering::SeqCst) == 0 => {
            answer.clone()
        }
        _ => Action::Default,
    });
    let mut client = Client::ready(dup.addr());
    client.envelope("a@example.com", &["b@example.com"]);
    let line = [[b'x'; 76].as_slice(), b"\r\n"].concat();
    let chunk = line.repeat(1000);
    for _ in 0..256 {
        client.send(&chunk);
    }
    client.send(".\r\n");
    let reply = client.reply();
    client.expect("NOOP", 250);
    primary.set_reply(|_| Action::Default);
    if reply.code != 421 {
        client.expect("RSET", 250);
        deliver(&mut client);
        assert_eq!(primary.messages().len(), 1);
    }
    assert!(primary.attempts().len() <= 1, "a dot was sent");
    (reply, primary, dup)
}

#[test]
fn an_early_refusal_reaches_the_client_after_its_body() {
    const NO: &[u8] = b"552-5.3.4 too big\r\n552 5.3.4 for this server\r\n";
    assert_eq!(early(Action::raw(NO).then(Action::Close), "").0.raw, NO);
    assert_eq!(early(Action::raw(NO), "").0.raw, NO);
    const LATER: &[u8] = b"452 4.3.1 disk full\r\n";
    assert_eq!(early(Action::raw(LATER).then(Action::Stall), "").0.raw, LATER);
    assert_eq!(early(Action::raw(LATER).then(Action::Silence), "").0.raw, LATER);
}

#[test]
fn an_early_acceptance_is_none() {
    for (answer, status) in [
        ("250 2.0.0 queued", "4.4.2 "),
        ("354 more", "4."),
        ("nonsense", "4."),
        ("250-unfinished", "4."),
    ] {
        let (reply, primary, _dup) = early(Action::reply(answer), "command_timeout_seconds: 1");
        assert_deferred(&reply, primary.addr(), answer);
        assert_eq!(reply.code, 451, "{reply:?}");
        assert!(reply.text().starts_with(status), "{reply:?}");
    }
}

#[test]
fn a_primary_that_stops_reading() {
    let (reply, primary, _dup) = early(Action::Stall, "data_timeout_seconds: 1");
    assert_deferred(&reply, primary.addr(), "no progress");
    assert_eq!(reply.code, 451, "{reply:?}");
}

#[test]
fn an_answer_just_before_the_dot() {
    for (answer, code) in
        [("250 2.0.0 queued", 451), ("451 4.3.0 stray", 451), ("554 5.7.1 spam", 554)]
    {
        let primary = Sink::start();
        let dup = dup_with(&primary, "", "");
        primary.set_reply(move |event| match event {
            Event::Body(_) => Action::reply(answer),
            _ => Action::Default,
        });
        let mut client = Client::ready(dup.addr());
        client.envelope("a@example.com", &["b@example.com"]);
        client.send("Subject: x\r\n\r\nx\r\n");
        primary.wait_for("the answer", |sink| {
            sink.said().iter().any(|(_, said)| said.starts_with(answer.as_bytes()))
        });
        client.send(".\r\n");
        client.expect_reply(code);
        primary.set_reply(|_| Action::Default);
        client.expect("RSET", 250);
        deliver(&mut client);
        assert_eq!(primary.attempts().len(), 1, "{answer}: a dot was sent");
    }
}

#[test]
fn a_stray_reply_after_a_transaction_shifts_nothing() {
    let primary = Sink::replying(|event| match event {
        Event::EndOfData(1) => Action::raw("250 2.0.0 queued\r\n550 5.0.0 stray\r\n"),
        _ => Action::Default,
    });
    let dup = dup_with(&primary, "", "");
    let mut client = Client::ready(dup.addr());
    deliver(&mut client);
    for reply in [client.cmd("MAIL FROM:<a@example.com>"), client.cmd("RCPT TO:<b@example.com>")] {
        assert_eq!(reply.code, 250, "{reply:?}");
    }
    client.expect("DATA", 354);
    assert_eq!(client.body(BODY).code, 250);
    assert_eq!(primary.wait(2)[1].connection, 2);
}

#[test]
fn a_421_of_the_primary_is_passed_on_and_closes() {
    const GOING: &[u8] = b"421-4.3.2 primary\r\n421 4.3.2 going down\r\n";
    for step in ["MAIL", "RCPT", "DATA", "end"] {
        let primary = Sink::replying(move |event| match is_step(event, step) {
            true => Action::raw(GOING).then(Action::Close),
            false => Action::Default,
        });
        let dup = dup_with(&primary, "", "");
        let mut client = Client::ready(dup.addr());
        let mut reply = client.cmd("MAIL FROM:<a@example.com>");
        for command in ["RCPT TO:<b@example.com>", "DATA"] {
            if reply.code != 421 {
                reply = client.cmd(command);
            }
        }
        if reply.code == 354 {
            reply = client.body(BODY);
        }
        assert_eq!(reply.raw, GOING, "{step}");
        client.closed();
    }
}

#[test]
fn connections_are_reused_across_transactions_and_clients() {
    let (primary, dup) = relay();
    for _ in 0..10 {
        let mut client = Client::ready(dup.addr());
        for _ in 0..3 {
            deliver(&mut client);
        }
        client.expect("QUIT", 221);
        client.closed();
    }
    assert_eq!(primary.messages().len(), 30);
    assert_eq!(primary.connections(), 1);
}

#[test]
fn idle_clients_hold_no_connection_to_the_primary() {
    let (primary, dup) = relay();
    let mut clients: Vec<_> = (0..30).map(|_| Client::ready(dup.addr())).collect();
    // A worker may keep it for a moment, in case that MAIL comes next. Not for longer.
    primary.wait_for("the pool to shrink", |sink| sink.open_connections() <= 10);
    // All at once, and idle again: at most 10 are kept.
    for client in &mut clients {
        client.envelope("a@example.com", &["b@example.com"]);
    }
    assert_eq!(primary.open_connections(), 30);
    for client in &mut clients {
        assert_eq!(client.body(BODY).code, 250);
    }
    primary.wait_for("the pool to shrink", |sink| sink.open_connections() <= 10);
}

#[test]
fn abandoned_transactions_leave_nothing_on_a_reused_connection() {
    let (primary, dup) = relay();
    for _ in 0..5 {
        let mut client = Client::ready(dup.addr());
        client.expect("MAIL FROM:<gone@example.com>", 250);
        client.expect("RCPT TO:<gone@example.com>", 250);
        drop(client);
        let mut client = Client::ready(dup.addr());
        deliver(&mut client);
        client.expect("MAIL FROM:<gone@example.com>", 250);
        client.expect("RCPT TO:<gone@example.com>", 250);
        client.expect("QUIT", 221);
    }
    for message in primary.wait(5) {
        assert_eq!(message.rcpts, ["RCPT TO:<b@example.com>"]);
        assert_eq!(message.mail, "MAIL FROM:<a@example.com>");
    }
}

#[test]
fn a_stale_connection_is_replaced_unseen() {
    // Closed after each message.
    let primary = Sink::replying(|event| match event {
        Event::EndOfData(_) => Action::reply_then_close("250 2.0.0 queued, and bye"),
        _ => Action::Default,
    });
    let dup = dup_with(&primary, "", "");
    let mut client = Client::ready(dup.addr());
    for _ in 0..5 {
        deliver(&mut client);
    }
    assert_eq!(primary.wait(5).last().unwrap().connection, 5);

    // Closed with a word of farewell while idle.
    let primary = Sink::replying(|event| match event {
        Event::EndOfData(_) => Action::reply("250 2.0.0 queued").then(Action::after(
            Duration::from_millis(50),
            Action::reply_then_close("421 4.4.2 idle too long"),
        )),
        _ => Action::Default,
    });
    let dup = dup_with(&primary, "", "");
    let mut client = Client::ready(dup.addr());
    for _ in 0..3 {
        deliver(&mut client);
        primary.wait_for("the farewell", |sink| sink.open_connections() == 0);
    }
}

#[test]
fn a_connection_that_ends_as_mail_comes_is_replaced_unseen() {
    for pipelined in [false, true] {
        for farewell in [Action::Close, Action::reply_then_close("421 4.4.2 idle too long")] {
            let mails = AtomicUsize::new(0);
            let primary = Sink::replying(move |event| match event {
                Event::Mail(_) if mails.fetch_add(1, Ordering::SeqCst) == 1 => farewell.clone(),
                _ => Action::Default,
            });
            let dup = dup_with(&primary, "", "");
            let mut client = Client::ready(dup.addr());
            deliver(&mut client);
            let reply = match pipelined {
                true => client.pipelined("a@example.com", "b@example.com", BODY),
                false => client.message("a@example.com", &["b@example.com"], BODY),
            };
            assert_eq!(reply.code, 250);
            let messages = primary.wait(2);
            assert_eq!(messages[1].connection, 2);
            assert_eq!(messages[1].rcpts.len(), 1);
        }
    }
}

#[test]
fn a_later_connection_that_offers_less() {
    let (primary, dup) = relay();
    let mut client = Client::greeted(dup.addr());
    assert!(client.ehlo().offers("SMTPUTF8"));
    primary.set_ehlo(&["PIPELINING", "8BITMIME"]);
    primary.close_connections();
    let reply = client.expect("MAIL FROM:<a@example.com> SMTPUTF8", 421);
    assert!(reply.text().starts_with("4.3.2 "), "{reply:?}");
    client.closed();
    let mut client = Client::greeted(dup.addr());
    assert!(!client.ehlo().offers("SMTPUTF8"));
    // More, or the same without PIPELINING, which is ours to give, is fine.
    primary.set_ehlo(&["8BITMIME", "DSN"]);
    primary.close_connections();
    deliver(&mut client);
}

#[test]
fn a_client_that_vanishes_in_mid_body() {
    for part in
        ["Subject: half", "Subject: x\r\n\r\nwhole line\r\n", "x\r\n.", "x\r\n.\r", "x\r\n.\n", ""]
    {
        let (primary, dup) = relay();
        let mut client = Client::ready(dup.addr());
        client.envelope("a@example.com", &["b@example.com"]);
        client.send(part);
        drop(client);
        primary.wait_for("the connection's end", |sink| sink.broken().len() == 1);
        assert!(primary.attempts().is_empty(), "{part:?}: a dot was sent");
        deliver(&mut Client::ready(dup.addr()));
        assert_eq!(primary.attempts().len(), 1);
    }
}

#[test]
fn a_client_that_vanishes_after_the_dot_has_sent_its_mail() {
    // At-least-once: it will send it again. But what it hears in between is nobody's business.
    let primary = Sink::replying(|event| match event {
        Event::EndOfData(_) => Action::after(Duration::from_millis(300), Action::Default),
        _ => Action::Default,
    });
    let dup = dup_with(&primary, "", "");
    let mut client = Client::ready(dup.addr());
    client.envelope("a@example.com", &["b@example.com"]);
    client.send("x\r\n.\r\n");
    drop(client);
    assert_eq!(primary.wait(1)[0].data, b"x\r\n");
    deliver(&mut Client::ready(dup.addr()));
}

/// Runs smtp-dup so that `two.example` has the addresses 127.0.0.1 and ::1, in a private mount
/// namespace with a hosts file of its own. `None` where the machine does not allow that.
fn dup_with_two_addresses(primary: SocketAddr) -> Option<Dup> {
    let may = Command::new("unshare")
        .args(["-rm", "mount", "--bind", "/etc/hosts", "/etc/hosts"])
        .output();
    if !may.is_ok_and(|output| output.status.success()) {
        return None;
    }
    let hosts = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(hosts.path(), "127.0.0.1 two.example\n::1 two.example\n").unwrap();
    let yaml = config(primary, &[], "", "")
        .replace(&primary.to_string(), &format!("two.example:{}", primary.port()));
    let dup = Dup::start_with(
        |command| {
            let mut inner = Command::new("unshare");
            let line = "mount --bind \"$0\" /etc/hosts && exec \"$@\"";
            inner.args(["-rm", "sh", "-c", line]).arg(hosts.path()).arg(command.get_program());
            inner.args(command.get_args()).stderr(std::process::Stdio::piped());
            *command = inner;
        },
        &yaml,
    );
    Some(dup)
}

#[test]
fn all_addresses_of_the_name_are_tried() {
    for (ip, other) in [("127.0.0.1", "::1"), ("::1", "127.0.0.1")] {
        let listens = || Sink::with(SinkOptions { ip: ip.parse().unwrap(), ..Default::default() });
        // Nobody else may be at the other address with the same port.
        let (primary, _refuses) = std::iter::repeat_with(listens)
            .find_map(|primary| {
                let other = SocketAddr::new(other.parse().unwrap(), primary.addr().port());
                let is_free = TcpListener::bind(other).is_ok();
                is_free.then(|| (primary, bound(other)))
            })
            .unwrap();
        let Some(dup) = dup_with_two_addresses(primary.addr()) else {
            return eprintln!("skipped: no private mount namespace on this machine");
        };
        deliver(&mut Client::ready(dup.addr()));
        assert_eq!(primary.messages().len(), 1, "only {ip} listens");
        primary.close();
        let mut client = Client::greeted(dup.addr());
        let reply = client.expect("EHLO client.example", 421);
        assert!(reply.text().contains("two.example:"), "{reply:?}");
    }
}

#[test]
fn big_messages_arrive_whole() {
    let (primary, dup) = relay();
    let mut client = Client::ready(dup.addr());
    for size in [100, 65_536, 262_144, 1_000_000, 20_000_000] {
        let body = mail_body(size);
        assert_eq!(client.pipelined("a@example.com", "b@example.com", &body).code, 250);
        assert!(primary.messages().pop().unwrap().data == body, "{size} octets");
    }
}

/// A connection that nobody has used for half a minute is closed, whether or not anybody comes.
#[test]
fn idle_connections_are_closed() {
    let (primary, dup) = relay();
    let mut client = Client::ready(dup.addr());
    deliver(&mut client);
    client.expect("QUIT", 221);
    client.closed();
    let end = Instant::now() + Duration::from_secs(30) + BOUND;
    while primary.open_connections() > 0 {
        assert!(Instant::now() < end, "it is still open");
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(primary.count("QUIT"), 1);
}
