//! XFORWARD between real Postfixes: the one in front says who its client was, those behind log it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::common::{Action, Client, Dup, Event, Sink, SinkOptions, config};
use crate::instance::{Postfix, available};
use crate::letters::{letter, message_id, submit, wait_count};
use crate::{Route, stop};

/// Messages of each sender.
const EACH: usize = 40;

/// The client of a message, for a Postfix on the loopback.
fn client_of(number: usize) -> IpAddr {
    Ipv4Addr::new(127, 0, 7, 1 + number as u8).into()
}

/// Who sent each message, by its Message-ID, if the log of this Postfix says more than that it came
/// from us: `name[address]`.
fn origins(postfix: &Postfix) -> BTreeMap<String, Option<String>> {
    let received = postfix.log(&["/smtpd[", ": client="]);
    let of_id = |line: &String| {
        let id = line.split("]: ").nth(1).unwrap().split(':').next().unwrap();
        let named = postfix.log(&["/cleanup[", &format!("]: {id}: message-id=")]);
        let message_id = named[0].split("message-id=").nth(1).unwrap().to_owned();
        let origin = line.split("orig_client=").nth(1);
        (message_id, origin.map(|origin| origin.split(',').next().unwrap().to_owned()))
    };
    received.iter().map(of_id).collect()
}

#[test]
fn the_servers_behind_know_the_client() {
    if !available() {
        return;
    }
    let ends = [Sink::start(), Sink::start(), Sink::start()];
    let trusting = "smtpd_authorized_xforward_hosts = 127.0.0.0/8";
    // Postfix's own restrictions go by the connection all the same, says the manual.
    let refusing = "smtpd_client_restrictions = check_client_access \
                    inline:{ {127.0.7.1 = REJECT} {127.0.7.2 = REJECT} }";
    let primary = Postfix::start(ends[0].addr(), &format!("{trusting}\n{refusing}"));
    let mut refused = Client::connect_from(client_of(0), primary.address);
    refused.expect_reply(220);
    refused.ehlo();
    refused.expect("MAIL FROM:<a@sender.test>", 250);
    refused.expect("RCPT TO:<b@example.com>", 554);
    let backup = Postfix::start(ends[1].addr(), trusting);
    // It offers no XFORWARD, and loses nothing by it.
    let plain = Postfix::start(ends[2].addr(), "");
    let dup = Dup::start(&config(primary.address, &[backup.address, plain.address], "", ""));
    // Two in front at the same time: what the one says must not be taken for the other's.
    let telling = Postfix::start(dup.addr(), "smtp_send_xforward_command = yes");
    let silent = Postfix::start(dup.addr(), "");

    let sent = |name: &str, number: usize| letter(&format!("{name}{number:02}"), b"Hello\r\n");
    thread::scope(|scope| {
        for (name, postfix) in [("telling", &telling), ("silent", &silent)] {
            for sender in 0..4 {
                scope.spawn(move || {
                    for number in (sender..EACH).step_by(4) {
                        let from = client_of(number);
                        let mut client = Client::connect_from(from, postfix.address);
                        client.expect_reply(220);
                        client.expect(&format!("EHLO host{number}.example"), 250);
                        let to = ["b@example.com"];
                        client.message("a@sender.test", &to, &sent(name, number));
                    }
                });
            }
        }
    });
    telling.wait_removed(EACH);
    silent.wait_removed(EACH);
    ends.iter().for_each(|end| wait_count(end, 2 * EACH));
    stop(&dup);

    for postfix in [&primary, &backup] {
        let origins = origins(postfix);
        assert_eq!(origins.len(), 2 * EACH);
        for number in 0..EACH {
            let origin = &origins[&message_id(&sent("telling", number))];
            assert_eq!(*origin, Some(format!("unknown[{}]", client_of(number))), "{number}");
            assert_eq!(origins[&message_id(&sent("silent", number))], None, "{number}");
        }
    }
    assert!(origins(&plain).values().all(Option::is_none));
    // Our own log agrees.
    let logged = dup.log_lines(" orig_client=");
    assert_eq!(logged.len(), EACH);
    for number in 0..EACH {
        let origin = format!(" orig_client=unknown[{}] from=", client_of(number));
        let id = format!("message-id={}", message_id(&sent("telling", number)));
        let is_it = |line: &&String| line.contains(&origin) && line.contains(&id);
        assert_eq!(logged.iter().filter(is_it).count(), 1, "{origin} {id}");
    }
    // Nobody complained.
    for postfix in [&telling, &silent, &primary, &backup, &plain] {
        let complaints = postfix.log(&["warning: "]);
        assert!(complaints.is_empty(), "{complaints:#?}");
    }
    // Connections were used again, by both.
    assert!(!telling.log(&["conn_use="]).is_empty());
}

/// A primary that is lost where it has just been told: the mail waits, and does not go on as ours.
#[test]
fn a_primary_that_is_lost_before_mail() {
    if !available() {
        return;
    }
    let was_lost = AtomicBool::new(false);
    let mut primary = SinkOptions::replying(move |event| match event {
        Event::Xforward(_) if !was_lost.swap(true, Ordering::SeqCst) => Action::Close,
        _ => Action::Default,
    });
    primary.ehlo.push("XFORWARD NAME ADDR PORT PROTO HELO IDENT SOURCE");
    let options = [primary, Default::default(), Default::default()];
    let route = Route::with(options, "smtp_send_xforward_command = yes");
    let sent = letter("lost", b"Hello\r\n");
    submit(&route.postfix, "<a@sender.test>", &["<b@example.com>"], &sent);
    route.postfix.wait_deferred(1);
    route.postfix.flush();
    route.postfix.wait_removed(1);
    let forward = route.arrived_once(&sent)[0].forward.join(" ");
    for attribute in ["ADDR=127.0.0.1", "HELO=client.example", "PROTO=ESMTP"] {
        assert!(forward.contains(attribute), "{forward}");
    }
}

/// However a client leaves what it has begun, a real Postfix forgets it too: nobody else's mail on
/// the same connection seems to be from there.
#[test]
fn what_is_left_is_forgotten() {
    if !available() {
        return;
    }
    type Way = (&'static str, fn(&mut Client));
    let ways: [Way; 6] = [
        ("RSET", |client| drop(client.expect("RSET", 250))),
        ("EHLO", |client| drop(client.ehlo())),
        ("MAIL and RSET", |client| {
            client.expect("MAIL FROM:<a@sender.test>", 250);
            client.expect("RSET", 250);
        }),
        ("a refused MAIL", |client| {
            drop(client.expect("MAIL FROM:<a@sender.test> SIZE=999999999999", 552))
        }),
        ("a refused recipient", |client| {
            client.expect("MAIL FROM:<a@sender.test>", 250);
            client.expect("RCPT TO:<b@>", 501);
            client.expect("DATA", 503);
        }),
        ("a refused message", |client| {
            client.envelope("a@sender.test", &["b@example.com"]);
            let line = [&[b'x'; 98], b"\r\n".as_slice()].concat();
            assert!(client.body(&line.repeat(2000)).code >= 500);
        }),
    ];
    let end = Sink::start();
    let settings = "smtpd_authorized_xforward_hosts = 127.0.0.0/8\nmessage_size_limit = 100000";
    let primary = Postfix::start(end.addr(), settings);
    let dup = Dup::start(&config(primary.address, &[], "", ""));
    for (number, (way, leave)) in ways.into_iter().enumerate() {
        let mut client = Client::ready(dup.addr());
        client.expect("XFORWARD NAME=spike.example ADDR=192.0.2.1", 250);
        leave(&mut client);
        client.expect("QUIT", 221);
        client.closed();
        let mut other = Client::ready(dup.addr());
        let sent = letter(&format!("other{number}"), b"Hello\r\n");
        assert_eq!(other.message("a@sender.test", &["b@example.com"], &sent).code, 250, "{way}");
        other.expect("QUIT", 221);
        other.closed();
        let id = message_id(&sent);
        primary.wait_log(1, &["/cleanup[", &id]);
        assert_eq!(origins(&primary)[&id], None, "after {way}");
    }
}
