//! Tests for defects that an attack on the program found, each named after what must hold.

use std::os::unix::process::CommandExt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use nix::libc;

use crate::common::*;
use crate::{BODY, deliver, dup_with, relay};

const FROM: &str = "a@example.com";
const TO: &str = "b@example.com";

/// A destination without PIPELINING that otherwise offers what a [`Sink`] does.
const WITHOUT_PIPELINING: [&str; 5] =
    ["8BITMIME", "SMTPUTF8", "DSN", "ENHANCEDSTATUSCODES", "SIZE"];

/// A primary that behaves well, and smtp-dup between it and this backup.
#[track_caller]
fn dup_beside(backup: &Sink, relay: &str) -> (Sink, Dup) {
    let primary = Sink::start();
    let dup = Dup::start(&config(primary.addr(), &[backup.addr()], "", relay));
    (primary, dup)
}

/// A small body that no other message has.
fn numbered(number: usize) -> Vec<u8> {
    format!("Subject: {number}\r\n\r\nThis is number {number}.\r\n").into_bytes()
}

/// How often the server has written exactly this.
fn times_said(sink: &Sink, octets: &[u8]) -> usize {
    sink.said().iter().filter(|(_, said)| said == octets).count()
}

/// Waits until the server has written this so often; over loopback it then has arrived.
#[track_caller]
fn wait_said(sink: &Sink, octets: &[u8], count: usize) {
    let what = format!("{count} times \"{}\"", octets.escape_ascii());
    sink.wait_for(&what, |sink| times_said(sink, octets) >= count);
}

#[test]
fn a_backup_with_one_silent_connection_and_one_421_gets_the_other_messages() {
    let mails = AtomicUsize::new(0);
    let backup = Sink::replying(move |event| match event {
        Event::EndOfData(1) => Action::Silence,
        Event::Mail(_) if mails.fetch_add(1, Ordering::SeqCst) == 1 => {
            Action::reply_then_close("421 4.3.2 not this connection")
        }
        _ => Action::Default,
    });
    let (_primary, dup) = dup_beside(&backup, "backup_connections: 4");
    let mut client = Client::ready(dup.addr());
    assert_eq!(client.message(FROM, &[TO], &numbered(1)).code, 250);
    backup.wait_for("the dot that is not answered", |backup| backup.attempts().len() == 1);
    assert_eq!(client.message(FROM, &[TO], &numbered(2)).code, 250);
    // Only now: the others must not find an agent that had started before.
    dup.wait_log("role=backup is down");
    for number in 3..=5 {
        assert_eq!(client.message(FROM, &[TO], &numbered(number)).code, 250);
    }
    // The pause after the 421 is a second; the silent connection would be given up after 540.
    let mut bodies: Vec<_> = backup.wait(4).into_iter().map(|message| message.data).collect();
    bodies.sort();
    assert_eq!(bodies, (2..=5).map(numbered).collect::<Vec<_>>());
    assert_eq!(dup.log_lines("421 4.3.2 not this connection").len(), 2, "down, and deferred");
}

#[test]
fn copies_of_big_messages_leave_descriptors_for_clients() {
    const LIMIT: usize = 300;
    const MESSAGES: usize = 300;
    let primary = Sink::start();
    let dead = Sink::refusing(SinkOptions::default());
    let config =
        config(primary.addr(), &[dead.addr()], "max_connections: 50", "backup_memory: 1000000000");
    let limited = |command: &mut std::process::Command| {
        let limit = || {
            let most = libc::rlimit { rlim_cur: LIMIT as u64, rlim_max: LIMIT as u64 };
            match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &most) } {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        };
        // Between fork and exec: only this one system call.
        unsafe { command.pre_exec(limit) };
    };
    let dup = Dup::start_with(limited, &config);
    let body = mail_body(300_000);
    let mut client = Client::ready(dup.addr());
    for number in 1..=MESSAGES {
        let reply = client.message(FROM, &[TO], &body);
        assert_eq!(reply.code, 250, "message {number}: {reply:?}");
    }
    // As many as the configuration promises, each with its connection to the primary.
    let mut clients: Vec<_> = (1..50).map(|_| Client::ready(dup.addr())).collect();
    clients.iter_mut().for_each(deliver);
    deliver(&mut client);
    assert!(dup.descriptors() < LIMIT, "{}", dup.descriptors());
    let lost = dup.log_lines("status=lost");
    assert!(!lost.is_empty(), "all copies were kept:\n{}", dup.log());
    // 186 descriptors are spoken for by connections and what else is open.
    assert!(lost.len() <= MESSAGES - 100, "only {} were kept", MESSAGES - lost.len());
    for line in lost {
        assert!(line.contains(" files "), "{line}");
        assert!(line.contains(&format!("relay={} role=backup", dead.addr())), "{line}");
    }
}

#[test]
fn replies_to_a_batch_do_not_wait_for_the_last() {
    let (heard, hears) = mpsc::channel();
    let hears = std::sync::Mutex::new(hears);
    let primary = Sink::replying(move |event| match event {
        Event::Rcpt(line) => {
            if line.contains("<last@") {
                // Longer than the client waits for a reply.
                let _ = hears.lock().unwrap().recv_timeout(BOUND * 2);
            }
            // Longer than the second for which replies may be gathered.
            Action::after(Duration::from_millis(1300), Action::Default)
        }
        _ => Action::Default,
    });
    let dup = dup_with(&primary, "", "");
    let mut client = Client::ready(dup.addr());
    client.send(
        "MAIL FROM:<a@example.com>\r\nRCPT TO:<one@example.com>\r\nRCPT TO:<two@example.com>\r\n\
         RCPT TO:<three@example.com>\r\nRCPT TO:<last@example.com>\r\nDATA\r\n",
    );
    client.expect_reply(250);
    client.expect_reply(250);
    heard.send(()).unwrap();
    for code in [250, 250, 250, 354] {
        client.expect_reply(code);
    }
    assert_eq!(client.body(BODY).code, 250);
    assert_eq!(primary.messages()[0].rcpts.len(), 4);
}

#[test]
fn a_primary_without_size_is_not_shown_the_size_that_we_offer() {
    let old = |event: &Event| match event {
        Event::Ehlo(line) if line.starts_with("EHLO") => Action::reply("502 5.5.1 what?"),
        _ => Action::Default,
    };
    let (extended, helo) = (Sink::start(), Sink::replying(old));
    extended.set_ehlo(&["PIPELINING", "8BITMIME", "DSN"]);
    for primary in [extended, helo] {
        let dup = dup_with(&primary, "max_message_size: 5000", "");
        let mut client = Client::greeted(dup.addr());
        let reply = client.ehlo();
        assert!(reply.lines.contains(&"SIZE 5000".to_string()), "{reply:?}");
        for (parameters, expected) in [
            (" SIZE=1000", ""),
            (" SIZE=1000 BODY=8BITMIME", " BODY=8BITMIME"),
            (" BODY=8BITMIME size=1000 RET=HDRS", " BODY=8BITMIME RET=HDRS"),
            (" ENVID=SIZE=7 SIZE=1000", " ENVID=SIZE=7"),
        ] {
            client.expect(&format!("MAIL FROM:<a@example.com>{parameters}"), 250);
            let seen = primary.commands().pop().unwrap().1;
            assert_eq!(seen, format!("MAIL FROM:<a@example.com>{expected}"), "{parameters}");
            client.expect("RSET", 250);
        }
        // Our own check of it is not lost.
        client.expect("MAIL FROM:<a@example.com> SIZE=6000", 552);
        let batch = "MAIL FROM:<a@example.com> SIZE=1000\r\nRCPT TO:<b@example.com>\r\nDATA\r\n";
        client.send(batch);
        for code in [250, 250, 354] {
            client.expect_reply(code);
        }
        assert_eq!(client.body(BODY).code, 250);
        assert_eq!(primary.messages()[0].mail, "MAIL FROM:<a@example.com>");
    }
}

#[test]
fn a_stray_reply_between_two_copies_costs_no_copy() {
    const STRAY: &[u8] = b"552 5.3.4 late\r\n";
    let backup = Sink::replying(|event| match event {
        Event::EndOfData(1) => {
            // Time for the agent to have done with the first copy.
            Action::Default.then(Action::after(Duration::from_millis(300), Action::raw(STRAY)))
        }
        _ => Action::Default,
    });
    backup.set_ehlo(&WITHOUT_PIPELINING);
    let (_primary, dup) = dup_beside(&backup, "");
    let mut client = Client::ready(dup.addr());
    assert_eq!(client.message(FROM, &[TO], &numbered(1)).code, 250);
    wait_said(&backup, STRAY, 1);
    assert_eq!(client.message(FROM, &[TO], &numbered(2)).code, 250);
    dup.wait_logs("role=backup delay=", 2);
    let bodies: Vec<_> = backup.wait(2).into_iter().map(|message| message.data).collect();
    assert_eq!(bodies, [numbered(1), numbered(2)]);
    assert_eq!(dup.log_lines("status=lost"), [""; 0]);
    assert_eq!(dup.log_lines("role=backup is down"), [""; 0]);
}

#[test]
fn a_stray_reply_of_the_primary_never_answers_a_recipient() {
    const STRAY: &[u8] = b"550 5.1.1 late\r\n";
    let primary = Sink::replying(|event| match event {
        Event::Mail(line) if line.contains("<stray@") => {
            // Time for the reply to MAIL to be read alone.
            Action::Default.then(Action::after(Duration::from_millis(300), Action::raw(STRAY)))
        }
        _ => Action::Default,
    });
    let dup = dup_with(&primary, "", "");
    let mut client = Client::ready(dup.addr());
    client.expect("MAIL FROM:<stray@example.com>", 250);
    wait_said(&primary, STRAY, 1);
    client.expect("RCPT TO:<b@example.com>", 451);
    client.expect("RCPT TO:<c@example.com>", 451);
    client.expect("RSET", 250);
    deliver(&mut client);
    assert_eq!(primary.wait(1)[0].connection, 2, "{:?}", primary.commands());
}

#[test]
fn a_stray_octet_on_an_idle_connection_delays_no_transaction() {
    let primary = Sink::replying(|event| match event {
        Event::EndOfData(1..=3) => {
            Action::Default.then(Action::after(Duration::from_millis(300), Action::raw("2")))
        }
        _ => Action::Default,
    });
    // Above the bound of the client's wait for a reply.
    let dup = dup_with(&primary, "", "command_timeout_seconds: 30");
    let mut clients = [Client::ready(dup.addr()), Client::ready(dup.addr())];
    clients.iter_mut().for_each(deliver);
    for mut client in clients {
        client.expect("QUIT", 221);
        client.closed();
    }
    wait_said(&primary, b"2", 2);
    // Both connections are in the pool, or were given up already.
    let mut client = Client::ready(dup.addr());
    deliver(&mut client);
    wait_said(&primary, b"2", 3);
    // And this one is still the client's own.
    deliver(&mut client);
    primary.wait(4);
}

#[test]
fn recipients_behind_a_refused_mail_are_no_errors() {
    const RCPTS: usize = 24;
    let primary = Sink::replying(|event| match event {
        Event::Mail(_) => Action::reply("450 4.7.1 not now"),
        _ => Action::Default,
    });
    primary.set_ehlo(&WITHOUT_PIPELINING);
    let dup = dup_with(&primary, "", "");
    let mut client = Client::ready(dup.addr());
    let mut batch = String::from("MAIL FROM:<a@example.com>\r\n");
    for number in 0..RCPTS {
        batch.push_str(&format!("RCPT TO:<b{number}@example.com>\r\n"));
    }
    batch.push_str("DATA\r\n");
    client.send(batch);
    client.expect_reply(450);
    for _ in 0..=RCPTS {
        client.expect_reply(503);
    }
    client.expect("RSET", 250);
    primary.set_reply(|_| Action::Default);
    deliver(&mut client);
    assert_eq!(primary.connections(), 1);
}

#[test]
fn a_batch_is_not_sent_again_to_a_server_that_takes_none() {
    let primary = Sink::start();
    let dup = dup_with(&primary, "", "");
    let mut first = Client::ready(dup.addr());
    deliver(&mut first);
    first.expect("QUIT", 221);
    first.closed();
    let mut client = Client::ready(dup.addr());
    assert_eq!(primary.connections(), 1, "the connection is not taken from the pool");
    primary.set_ehlo(&WITHOUT_PIPELINING);
    let mails = AtomicUsize::new(0);
    primary.set_reply(move |event| match event {
        Event::Mail(_) if mails.fetch_add(1, Ordering::SeqCst) == 0 => Action::Close,
        _ => Action::Default,
    });
    let batch = "MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n";
    client.send(batch);
    let reply = client.reply();
    if reply.code == 421 {
        assert!(reply.text().starts_with("4.3.2 "), "{reply:?}");
        client.closed();
    } else {
        assert_eq!(reply.code, 250, "{reply:?}");
        client.expect_reply(250);
        client.expect_reply(354);
        assert_eq!(client.body(BODY).code, 250);
    }
    // The client goes on, with what is now there.
    deliver(&mut Client::ready(dup.addr()));
    let together = |read: &&Vec<u8>| {
        let lines = read.split_inclusive(|&octet| octet == b'\n');
        let verbs: [&[u8]; 3] = [b"MAIL", b"RCPT", b"DATA"];
        lines.filter(|line| verbs.iter().any(|verb| line.starts_with(verb))).count() > 1
    };
    let batches: Vec<_> = primary.reads().into_iter().filter(|read| together(&read)).collect();
    assert_eq!(batches, [batch.as_bytes()], "only to the connection that offered it");
}

#[test]
fn a_refusal_in_the_middle_of_a_copy_is_the_backups_answer() {
    let backup = Sink::replying(|event| match event {
        Event::Body(100_000..) => Action::reply_then_close("552 5.3.4 too big for me"),
        _ => Action::Default,
    });
    let (primary, dup) = dup_beside(&backup, "");
    let mut client = Client::ready(dup.addr());
    // More than the buffers of both sockets take, so that the refusal comes while it is sent.
    assert_eq!(client.message(FROM, &[TO], &mail_body(16_000_000)).code, 250);
    dup.wait_log("552 5.3.4 too big for me");
    assert_eq!(client.message(FROM, &[TO], &numbered(2)).code, 250);
    assert_eq!(backup.wait(1)[0].data, numbered(2));
    drop(client);
    dup.signal(Signal::Term);
    assert!(dup.wait_exit(BOUND).success(), "{}", dup.log());
    let lost = dup.log_lines("status=lost");
    assert_eq!(lost.len(), 1, "{lost:#?}");
    assert!(lost[0].ends_with("(552 5.3.4 too big for me)"), "{lost:?}");
    assert_eq!(dup.log_lines("is down"), [""; 0]);
    assert_eq!(dup.log_lines("status=deferred"), [""; 0]);
    assert_eq!(backup.count("MAIL"), 2, "one for each message: {:?}", backup.commands());
    assert_eq!(primary.messages().len(), 2);
}

#[test]
fn a_refusal_before_the_message_stands_though_the_backup_closes_behind_it() {
    let backup = Sink::replying(|event| match event {
        Event::Mail(line) if line.contains("<a@") => Action::reply_then_close("554 5.7.1 not you"),
        _ => Action::Default,
    });
    let (_primary, dup) = dup_beside(&backup, "");
    let mut client = Client::ready(dup.addr());
    assert_eq!(client.message("a@example.com", &[TO], &numbered(1)).code, 250);
    assert!(dup.wait_log("554 5.7.1 not you").contains("status=lost"), "{}", dup.log());
    assert_eq!(client.message("other@example.com", &[TO], &numbered(2)).code, 250);
    assert_eq!(backup.wait(1)[0].data, numbered(2));
    assert_eq!(dup.log_lines("is down"), [""; 0]);
    assert_eq!(backup.count("MAIL"), 2, "one for each message: {:?}", backup.commands());
}

#[test]
fn a_quote_that_is_never_closed_is_the_primarys_to_judge() {
    let (primary, dup) = relay();
    let mut client = Client::ready(dup.addr());
    for line in [r#"MAIL FROM:<o"brien@x.example>"#, r#"MAIL FROM:<a\"b@x.example>"#] {
        client.expect(line, 250);
        assert_eq!(primary.commands().pop().unwrap().1, line);
        client.expect("RSET", 250);
    }
    primary.set_reply(|event| match event {
        Event::Mail(_) => Action::reply("553 5.1.7 no such quote"),
        _ => Action::Default,
    });
    let reply = client.expect(r#"MAIL FROM:<o"brien@x.example>"#, 553);
    assert_eq!(reply.text(), "5.1.7 no such quote");
}

#[test]
fn after_a_354_for_nobody_a_new_transaction_needs_no_rset() {
    let primary = Sink::replying(|event| match event {
        Event::Rcpt(line) if line.contains("<no@") => Action::reply("550 5.1.1 unknown user"),
        // The sink's own answer would be 503.
        Event::Data => Action::reply("354 go on"),
        _ => Action::Default,
    });
    let dup = dup_with(&primary, "", "");
    let mut client = Client::ready(dup.addr());
    client.send("MAIL FROM:<a@example.com>\r\nRCPT TO:<no@example.com>\r\nDATA\r\n");
    client.expect_reply(250);
    client.expect_reply(550);
    client.expect_reply(503);
    // MAIL, and the rest of it: nobody has said RSET.
    deliver(&mut client);
    let message = primary.wait(1).remove(0);
    assert_eq!((message.data, message.connection), (BODY.to_vec(), 2));
    assert_eq!(primary.attempts().len(), 1, "nothing was sent for nobody");
}

#[test]
fn a_monstrous_message_id_makes_no_monstrous_log_line() {
    let (primary, dup) = relay();
    let mut client = Client::ready(dup.addr());
    let body = [&b"Message-ID: <"[..], &[1; 90_000], b">\r\n\r\nHello\r\n"].concat();
    assert_eq!(client.message(FROM, &[TO], &body).code, 250);
    let line = dup.wait_log(" from=<");
    assert!(line.contains(" message-id="), "{}", &line[..line.len().min(2000)]);
    dup.wait_log("status=sent");
    for line in dup.log().lines() {
        assert!(line.len() < 2000, "{} octets: {}", line.len(), &line[..2000]);
    }
    assert_eq!(primary.messages()[0].data, body, "it goes on as it is");
}
