//! Who the client was: XFORWARD to the primary, to the backups, in the spool and in the log.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::{
    Action, BOUND, Client, Dup, Event, Received, Signal, Sink, SinkOptions, config,
};
use crate::{BODY, deliver, dup_with};

const OFFER: &str = "XFORWARD NAME ADDR PORT PROTO HELO IDENT SOURCE";
const FIRST: &str = "XFORWARD NAME=spike.example ADDR=192.0.2.1 PORT=4711";
const SECOND: &str = "XFORWARD PROTO=ESMTP HELO=spike+2Bx.example IDENT=ABC SOURCE=REMOTE";

/// A server that offers XFORWARD.
fn offering(pipelining: bool) -> Sink {
    let sink = Sink::start();
    sink.set_ehlo(if pipelining { &["PIPELINING", "DSN", OFFER] } else { &["DSN", OFFER] });
    sink
}

fn relay(pipelining: bool) -> (Sink, Dup) {
    let primary = offering(pipelining);
    let dup = dup_with(&primary, "", "");
    (primary, dup)
}

/// A message of this client, which has said before who it is.
#[track_caller]
fn forward(client: &mut Client) {
    client.expect(FIRST, 250);
    client.expect(SECOND, 250);
    deliver(client);
}

/// Another client's message. When this returns, the connection that it took is in the pool.
#[track_caller]
fn another_delivers(dup: &Dup) {
    let mut client = Client::ready(dup.addr());
    deliver(&mut client);
    client.expect("QUIT", 221);
    client.closed();
}

#[track_caller]
fn assert_forwarded(message: &Received) {
    assert_eq!(message.forward, [FIRST, SECOND], "{message:?}");
}

#[test]
fn what_the_primary_offers_is_offered() {
    for offer in [OFFER, "XFORWARD ADDR", "xforward name helo"] {
        let primary = Sink::start();
        primary.set_ehlo(Vec::leak(vec![offer]));
        let dup = dup_with(&primary, "", "");
        let reply = Client::greeted(dup.addr()).ehlo();
        assert!(reply.lines.contains(&offer.to_uppercase()), "{reply:?}");
    }
    // No attributes, no use.
    let primary = Sink::start();
    primary.set_ehlo(&["XFORWARD"]);
    let dup = dup_with(&primary, "", "");
    let mut client = Client::greeted(dup.addr());
    assert!(!client.ehlo().offers("XFORWARD"));
    client.expect(FIRST, 502);
    // HELO promises nothing.
    let (_primary, dup) = relay(true);
    let mut client = Client::greeted(dup.addr());
    client.expect("HELO client.example", 250);
    client.expect(FIRST, 502);
}

#[test]
fn it_reaches_the_primary_before_mail_on_the_same_connection() {
    for pipelining in [true, false] {
        let (primary, dup) = relay(pipelining);
        let mut client = Client::ready(dup.addr());
        // In between the connections are everybody's.
        for _ in 0..2 {
            let reply = client.expect(FIRST, 250);
            assert_eq!(reply.text(), "2.0.0 so be it");
            client.expect(SECOND, 250);
            deliver(&mut client);
            another_delivers(&dup);
        }
        let messages = primary.wait(4);
        assert_forwarded(&messages[0]);
        assert_forwarded(&messages[2]);
        assert!(messages[1].forward.is_empty() && messages[3].forward.is_empty());
    }
}

#[test]
fn a_batch_that_begins_with_it_travels_as_a_batch() {
    let (primary, dup) = relay(true);
    let mut client = Client::ready(dup.addr());
    let batch = format!(
        "{FIRST}\r\n{SECOND}\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n"
    );
    client.send(&batch);
    for code in [250, 250, 250, 250, 354] {
        client.expect_reply(code);
    }
    assert_eq!(client.body(BODY).code, 250);
    assert!(primary.reads().contains(&batch.as_bytes().to_vec()), "{:?}", primary.commands());
    assert_forwarded(&primary.wait(1)[0]);
    // One by one where the primary takes no batches.
    let (primary, dup) = relay(false);
    let mut client = Client::ready(dup.addr());
    client.send(&batch);
    for code in [250, 250, 250, 250, 354] {
        client.expect_reply(code);
    }
    assert_eq!(client.body(BODY).code, 250);
    assert_forwarded(&primary.wait(1)[0]);
}

#[test]
fn the_primary_judges() {
    let (primary, dup) = relay(true);
    primary.set_reply(|event| match event {
        Event::Xforward(line) if line.contains("PORT=x") => Action::reply("501 5.5.4 bad port"),
        Event::Xforward(line) if line.contains("NAME=later") => Action::reply("451 4.3.0 later"),
        _ => Action::Default,
    });
    let mut client = Client::ready(dup.addr());
    assert_eq!(client.expect("XFORWARD PORT=x", 501).text(), "5.5.4 bad port");
    assert_eq!(client.expect("xforward NAME=later", 451).text(), "4.3.0 later");
    client.expect("XFORWARD ADDR=192.0.2.9 HELO=[UNAVAILABLE]", 250);
    deliver(&mut client);
    assert_eq!(primary.wait(1)[0].forward, ["XFORWARD ADDR=192.0.2.9 HELO=[UNAVAILABLE]"]);
}

#[test]
fn out_of_order() {
    let (primary, dup) = relay(true);
    let mut client = Client::greeted(dup.addr());
    client.expect(FIRST, 502);
    client.ehlo();
    client.expect("MAIL FROM:<a@example.com>", 250);
    client.expect(FIRST, 503);
    client.expect("RCPT TO:<b@example.com>", 250);
    client.expect(FIRST, 503);
    assert_eq!(primary.count("XFORWARD"), 0);
    client.expect("RSET", 250);
    forward(&mut client);
    assert_forwarded(&primary.wait(1)[0]);
}

/// What a client does, in words and in deeds.
type Way = (&'static str, fn(&mut Client));

/// Whatever a client does after XFORWARD, nobody else's mail seems to be from there. The sink keeps
/// what it was told until a transaction ends, as Postfix does.
#[test]
fn nothing_of_it_reaches_anothers_transaction() {
    let ways: &[Way] = &[
        ("RSET", |client| drop(client.expect("RSET", 250))),
        ("EHLO", |client| drop(client.ehlo())),
        ("QUIT", |client| drop(client.expect("QUIT", 221))),
        ("nothing", |_| {}),
        ("silence", |client| assert!(client.is_silent(Duration::from_millis(2500)))),
        ("a refused MAIL", |client| drop(client.expect("MAIL FROM:<no@example.com>", 550))),
        ("a refused RCPT", |client| {
            client.expect("MAIL FROM:<a@example.com>", 250);
            client.expect("RCPT TO:<no@example.com>", 550);
            client.expect("DATA", 503);
        }),
        ("a refused DATA", |client| {
            client.expect("MAIL FROM:<a@example.com>", 250);
            client.expect("RCPT TO:<later@example.com>", 250);
            client.expect("DATA", 451);
        }),
    ];
    for pipelining in [true, false] {
        for (way, act) in ways {
            let (primary, dup) = relay(pipelining);
            primary.set_reply({
                let refused = AtomicBool::new(false);
                move |event| match event {
                    Event::Mail(line) | Event::Rcpt(line) if line.contains("<no@") => {
                        Action::reply("550 5.1.1 no")
                    }
                    Event::Rcpt(line) if line.contains("<later@") => {
                        refused.store(true, Ordering::SeqCst);
                        Action::Default
                    }
                    Event::Data if refused.swap(false, Ordering::SeqCst) => {
                        Action::reply("451 4.3.0 later")
                    }
                    _ => Action::Default,
                }
            });
            // One connection at least is in the pool.
            another_delivers(&dup);
            let mut client = Client::ready(dup.addr());
            client.expect(FIRST, 250);
            act(&mut client);
            // While it is still there, and when it has gone.
            another_delivers(&dup);
            drop(client);
            another_delivers(&dup);
            for message in primary.wait(3) {
                assert!(message.forward.is_empty(), "after {way}: {message:?}");
            }
        }
    }
}

/// In a transaction it is out of order, also when the primary has failed in that; the session goes
/// on.
#[test]
fn in_a_failed_transaction_it_is_out_of_order() {
    let (primary, dup) = relay(true);
    primary.set_reply(|event| match event {
        Event::Rcpt(line) if line.contains("<gone@") => Action::Close,
        _ => Action::Default,
    });
    let mut client = Client::ready(dup.addr());
    client.expect("MAIL FROM:<a@example.com>", 250);
    client.expect("RCPT TO:<gone@example.com>", 451);
    client.expect(FIRST, 503);
    client.expect("RCPT TO:<b@example.com>", 451);
    client.expect("RSET", 250);
    forward(&mut client);
    assert_forwarded(&primary.wait(1)[0]);
}

/// What a client has said is forgotten with its transaction, and by RSET.
#[test]
fn it_is_for_one_transaction() {
    let (primary, dup) = relay(true);
    let mut client = Client::ready(dup.addr());
    forward(&mut client);
    deliver(&mut client);
    client.expect(FIRST, 250);
    client.expect("RSET", 250);
    deliver(&mut client);
    let messages = primary.wait(3);
    assert_forwarded(&messages[0]);
    assert!(messages[1].forward.is_empty() && messages[2].forward.is_empty());
    // The copies and the log go by the same.
    dup.wait_logs(" from=<a@example.com>", 3);
    assert_eq!(dup.log_lines("orig_client=").len(), 1);
}

/// A connection of the pool that turns out dead is replaced unseen, and the new one is told.
#[test]
fn a_stale_connection_is_replaced_unseen() {
    for pipelined in [false, true] {
        for farewell in [Action::Close, Action::reply_then_close("421 4.4.2 idle too long")] {
            let (primary, dup) = relay(true);
            another_delivers(&dup);
            let first = AtomicBool::new(true);
            primary.set_reply(move |event| match event {
                Event::Xforward(_) if first.swap(false, Ordering::SeqCst) => farewell.clone(),
                _ => Action::Default,
            });
            let mut client = Client::ready(dup.addr());
            if pipelined {
                client.send(format!("{FIRST}\r\n{SECOND}\r\nMAIL FROM:<a@example.com>\r\n"));
                (0..3).for_each(|_| drop(client.expect_reply(250)));
                client.expect("RCPT TO:<b@example.com>", 250);
                client.expect("DATA", 354);
                assert_eq!(client.body(BODY).code, 250);
            } else {
                forward(&mut client);
            }
            let messages = primary.wait(2);
            assert_forwarded(&messages[1]);
            assert_eq!(messages[1].connection, 2);
        }
    }
}

/// A primary that is lost before MAIL has lost what it knew of the client. Mail that came then would
/// seem to be from somebody else, so the session ends, on used connections as on new ones.
#[test]
fn a_primary_that_is_lost_before_mail() {
    for used in [false, true] {
        for step in ["XFORWARD PROTO", "MAIL"] {
            for farewell in [Action::Close, Action::reply_then_close("421 4.3.2 bye")] {
                let (primary, dup) = relay(true);
                if used {
                    another_delivers(&dup);
                }
                // Another connection would be good, and know nothing.
                let is_good = AtomicBool::new(false);
                primary.set_reply(move |event| match event {
                    Event::Xforward(line) | Event::Mail(line)
                        if line.starts_with(step) && !is_good.swap(true, Ordering::SeqCst) =>
                    {
                        farewell.clone()
                    }
                    _ => Action::Default,
                });
                let mut client = Client::ready(dup.addr());
                client.expect(FIRST, 250);
                client
                    .expect(if step == "MAIL" { "MAIL FROM:<a@example.com>" } else { SECOND }, 421);
                client.closed();
                assert_eq!(primary.accepted(), usize::from(used));
            }
        }
    }
    // Between the commands.
    let (primary, dup) = relay(true);
    let mut client = Client::ready(dup.addr());
    client.expect(FIRST, 250);
    primary.close_connections();
    client.expect("MAIL FROM:<a@example.com>", 421);
    client.closed();
}

#[test]
fn a_later_connection_that_knows_fewer_attributes() {
    let (primary, dup) = relay(true);
    let mut client = Client::ready(dup.addr());
    primary.set_ehlo(&["PIPELINING", "DSN", "XFORWARD ADDR"]);
    primary.close_connections();
    let reply = client.expect(FIRST, 421);
    assert!(reply.text().starts_with("4.3.2 "), "{reply:?}");
    client.closed();
}

#[test]
fn the_log_names_the_original_client() {
    let (_primary, dup) = relay(true);
    let mut client = Client::ready(dup.addr());
    forward(&mut client);
    let own = client.local_addr();
    dup.wait_log(&format!(
        ": client={own} orig_client=spike.example[192.0.2.1] from=<a@example.com> size="
    ));
    client.expect("XFORWARD NAME=[UNAVAILABLE] ADDR=IPV6:2001:db8::1", 250);
    deliver(&mut client);
    dup.wait_log(" orig_client=unknown[2001:db8::1] from=");
    // Nobody writes lines of his own.
    client.expect("XFORWARD NAME=a+0A+20status+3Dsent ADDR=x+5D+1b", 250);
    deliver(&mut client);
    dup.wait_log(" orig_client=a??status=sent[x]?] from=");
}

/// Each backup hears what it knows, in the batch of its copy.
#[test]
fn copies_carry_what_the_backup_knows() {
    let primary = offering(true);
    let (all, some, none, slow) = (offering(true), Sink::start(), Sink::start(), offering(false));
    some.set_ehlo(&["PIPELINING", "DSN", "XFORWARD ADDR HELO"]);
    let backups = [all.addr(), some.addr(), none.addr(), slow.addr()];
    let dup = Dup::start(&config(primary.addr(), &backups, "", ""));
    let mut client = Client::ready(dup.addr());
    forward(&mut client);
    deliver(&mut client);
    let whole = format!("{FIRST} {}", SECOND.strip_prefix("XFORWARD ").unwrap());
    for (backup, expected) in [
        (&all, vec![whole.clone()]),
        (&some, vec!["XFORWARD ADDR=192.0.2.1 HELO=spike+2Bx.example".into()]),
        (&none, vec![]),
        (&slow, vec![whole.clone()]),
    ] {
        let messages = backup.wait(2);
        let forwarded = messages.iter().filter(|message| !message.forward.is_empty());
        let forwarded: Vec<_> = forwarded.map(|message| message.forward.clone()).collect();
        let expected: Vec<_> =
            Some(expected).into_iter().filter(|lines| !lines.is_empty()).collect();
        assert_eq!(forwarded, expected);
    }
    // It costs no round trip.
    let batch = format!("{whole}\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:");
    assert!(all.reads().iter().any(|read| read.starts_with(batch.as_bytes())));
}

/// No reason to lose a copy, or to hold one.
#[test]
fn a_backup_that_refuses_it_gets_its_copies() {
    for pipelining in [true, false] {
        for refusal in
            ["550 5.7.0 insufficient authorization", "451 4.3.0 not now", "421 4.3.2 never"]
        {
            let (primary, backup) = (offering(true), offering(pipelining));
            backup.set_reply(move |event| match event {
                Event::Xforward(_) if refusal.starts_with("421") => {
                    Action::reply_then_close(refusal)
                }
                Event::Xforward(_) => Action::reply(refusal),
                _ => Action::Default,
            });
            let dup = Dup::start(&config(primary.addr(), &[backup.addr()], "", ""));
            for _ in 0..3 {
                forward(&mut Client::ready(dup.addr()));
            }
            backup.wait(3);
            let sent = dup.wait_logs("role=backup delay=", 3);
            assert!(sent.iter().all(|line| line.contains("status=sent")), "{sent:?}");
            let said = dup.log_lines("XFORWARD");
            assert_eq!(said.len(), 1, "{said:?}");
            assert!(said[0].contains(" warning: ") && said[0].contains(refusal), "{said:?}");
            assert!(dup.log_lines("is down").is_empty());
        }
    }
}

/// The backup closes its idle connections just then: the copy goes out on the next one at once.
#[test]
fn a_copy_on_a_stale_connection() {
    let (primary, backup) = (offering(true), offering(true));
    let dup = Dup::start(&config(primary.addr(), &[backup.addr()], "", "backup_connections: 1"));
    another_delivers(&dup);
    backup.wait(1);
    let first = AtomicBool::new(true);
    backup.set_reply(move |event| match event {
        Event::Xforward(_) if first.swap(false, Ordering::SeqCst) => {
            Action::reply_then_close("421 4.4.2 idle too long")
        }
        _ => Action::Default,
    });
    forward(&mut Client::ready(dup.addr()));
    let messages = backup.wait(2);
    assert_eq!((messages[1].connection, messages[1].forward.len()), (2, 1));
    assert!(dup.log_lines("is down").is_empty());
}

/// What lies in the spool has it too, for another process than the one that heard it.
#[test]
fn the_spool_keeps_it() {
    let primary = offering(true);
    let backup = Sink::refusing(SinkOptions::default());
    backup.set_ehlo(&["PIPELINING", "XFORWARD ADDR HELO"]);
    let folder = tempfile::tempdir().unwrap();
    let spool = folder.path().join("spool");
    let yaml =
        config(primary.addr(), &[backup.addr()], "", &format!("spool: \"{}\"", spool.display()));
    let dup = Dup::start(&yaml);
    forward(&mut Client::ready(dup.addr()));
    dup.signal(Signal::Kill);
    dup.wait_exit(BOUND);
    let mails = std::fs::read_dir(spool.join("queue")).unwrap().flat_map(|hour| {
        std::fs::read_dir(hour.unwrap().path()).unwrap().map(|file| file.unwrap().path())
    });
    let mail = mails.into_iter().find(|path| path.extension().is_some_and(|end| end == "mail"));
    let text = std::fs::read_to_string(mail.unwrap()).unwrap();
    let whole = format!("{FIRST} {}", SECOND.strip_prefix("XFORWARD ").unwrap());
    assert!(text.contains(&format!("\r\n{whole}\r\nMAIL FROM:<a@example.com>\r\n")), "{text}");
    backup.reopen();
    let _dup = Dup::start(&yaml);
    let expected = ["XFORWARD ADDR=192.0.2.1 HELO=spike+2Bx.example"];
    assert_eq!(backup.wait(1)[0].forward, expected);
}
