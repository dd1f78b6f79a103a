//! A destination that turns out to be smtp-dup itself, at run time: it greets as we do.

use std::net::SocketAddr;

use crate::common::{Action, Client, Detour, Dup, Event, Sink, config};
use crate::{BODY, deliver, relay};

/// What smtp-dup greets with.
#[track_caller]
fn greeting(addr: SocketAddr) -> String {
    let greeting = Client::connect(addr).expect_reply(220);
    assert!(greeting.text().starts_with("dup.example ESMTP smtp-dup "), "{greeting:?}");
    greeting.text()
}

/// From now on the sink greets with this.
fn greet_with(sink: &Sink, greeting: String) {
    sink.set_reply(move |event| match event {
        Event::Connect(_) => Action::reply(format!("220 {greeting}")),
        _ => Action::Default,
    });
}

#[test]
fn each_process_is_an_instance_of_its_own() {
    let (_primary, dup) = relay();
    let (_primary, other) = relay();
    assert_eq!(greeting(dup.addr()), greeting(dup.addr()));
    assert_ne!(greeting(dup.addr()), greeting(other.addr()));
    // And one smtp-dup may be another's destination.
    let front = Dup::start(&config(dup.addr(), &[other.addr()], "", ""));
    deliver(&mut Client::ready(front.addr()));
    front.wait_log("role=backup delay=");
}

/// The real circle. The client hears that its mail has to wait, also from HELO.
#[test]
fn a_primary_that_is_ourselves() {
    let detour = Detour::start();
    let dup = Dup::start(&config(detour.addr(), &[], "", ""));
    detour.lead_to(dup.addr());
    let mut client = Client::greeted(dup.addr());
    for hello in ["EHLO client.example", "HELO client.example"] {
        let reply = client.expect(hello, 451);
        assert!(reply.text().starts_with("4.4.6 "), "{reply:?}");
        assert!(reply.text().contains(&detour.addr().to_string()), "{reply:?}");
    }
    client.expect("QUIT", 221);
    client.closed();
    let line = dup.wait_log("role=primary is not available");
    assert!(line.contains(" error: ") && line.contains("smtp-dup itself"), "{line}");
}

#[test]
fn a_primary_that_becomes_ourselves() {
    let (primary, dup) = relay();
    let mut client = Client::ready(dup.addr());
    greet_with(&primary, greeting(dup.addr()));
    primary.close_connections();
    client.send("MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n");
    for _ in 0..3 {
        let reply = client.expect_reply(451);
        assert!(reply.text().starts_with("4.4.6 "), "{reply:?}");
    }
    // No word was said to it but good-bye.
    primary.wait_for("QUIT", |primary| primary.count("QUIT") == 1);
    assert_eq!((primary.count("EHLO"), primary.count("MAIL")), (1, 0));
    // It is another server again.
    greet_with(&primary, "sink.example ESMTP".into());
    deliver(&mut client);
}

/// Copies wait for better times, and the mail does not.
#[test]
fn a_backup_that_is_ourselves() {
    let (primary, backup) = (Sink::start(), Sink::start());
    let dup = Dup::start(&config(primary.addr(), &[backup.addr()], "", ""));
    greet_with(&backup, greeting(dup.addr()));
    let mut client = Client::ready(dup.addr());
    deliver(&mut client);
    let line = dup.wait_log("role=backup is down");
    assert!(line.contains(" error: ") && line.contains("smtp-dup itself"), "{line}");
    assert_eq!(backup.count("EHLO"), 0);
    greet_with(&backup, "sink.example ESMTP".into());
    assert_eq!(backup.wait(1)[0].data, BODY);
    assert_eq!(primary.accepted(), 1);
}
