//! Servers that are down or refuse, and a restart: no mail is lost, and none comes twice.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{Action, Client, Detour, Dup, Event, Signal, Sink, SinkOptions, config};
use crate::instance::{PATIENCE, Postfix, available, free_address};
use crate::letters::{
    assert_is_letter, assert_same, by_id, letter, message_id, sorted, wait_count,
};
use crate::{Route, stop};

fn numbered(number: usize) -> Vec<u8> {
    letter(&format!("{number:03}"), format!("This is number {number}.\r\n").as_bytes())
}

#[test]
fn primary_down_and_up_again() {
    if !available() {
        return;
    }
    let primary = Sink::refusing(Default::default());
    let address = primary.addr();
    let route = Route::through([primary, Sink::start(), Sink::start()], "");
    let mut client = Client::ready(route.postfix.address);
    for number in 0..10 {
        client.message("a@sender.test", &["b@example.com"], &numbered(number));
    }
    route.postfix.wait_deferred(10);
    // Our words: there are none of the primary's.
    let said = ["status=deferred", " 421 4.4.1 ", &address.to_string()];
    assert!(!route.postfix.log(&said).is_empty());
    assert!(route.sinks.iter().all(|sink| sink.attempts().is_empty()));

    route.sinks[0].reopen();
    route.postfix.flush();
    route.postfix.wait_removed(10);
    for (number, message) in route.arrived(10).iter().enumerate() {
        assert_is_letter(&message[0].data, &numbered(number));
    }
    assert_eq!(route.postfix.log(&["status=bounced"]).len(), 0);
}

/// Mail in circles waits in the queue, and comes through once the circle is broken.
#[test]
fn a_circle_puts_the_mail_off() {
    if !available() {
        return;
    }
    let detour = Detour::start();
    let dup = Dup::start(&config(detour.addr(), &[], "", ""));
    detour.lead_to(dup.addr());
    let postfix = Postfix::start(dup.addr(), "");
    let mut client = Client::ready(postfix.address);
    client.message("a@sender.test", &["b@example.com"], &numbered(0));
    postfix.wait_deferred(1);
    let said = ["status=deferred", " 451 4.4.6 ", &detour.addr().to_string(), "smtp-dup itself"];
    assert_eq!(postfix.log(&said).len(), 1, "{:#?}", postfix.log(&["status="]));
    let primary = Sink::start();
    detour.lead_to(primary.addr());
    postfix.flush();
    postfix.wait_removed(1);
    assert_is_letter(&primary.wait(1)[0].data, &numbered(0));
}

#[test]
fn the_primary_s_own_refusal_is_in_the_log() {
    if !available() {
        return;
    }
    let route = Route::start();
    let mut client = Client::ready(route.postfix.address);
    let stages = ["MAIL FROM", "RCPT TO", "DATA", "end of DATA"];
    let mut number = 0;
    for stage in stages {
        for (code, status) in [(450, "deferred"), (550, "bounced")] {
            number += 1;
            let class = code / 100;
            let words = format!("{class}.7.{number} the primary's mood number {number}");
            let reply = format!("{code}-{words}\r\n{code} {class}.7.{number} is bad");
            route.sinks[0].set_reply(move |event| {
                let this = match event {
                    Event::Mail(_) => "MAIL FROM",
                    Event::Rcpt(_) => "RCPT TO",
                    Event::Data => "DATA",
                    Event::EndOfData(_) => "end of DATA",
                    _ => "",
                };
                match this == stage {
                    true => Action::reply(&reply),
                    false => Action::Default,
                }
            });
            let to = format!("user{number}@example.com");
            client.message("a@sender.test", &[&to], &numbered(number));
            let line = &route.postfix.wait_log(1, &[&format!("to=<{to}>"), "status="])[0];
            // Postfix joins the lines by a blank.
            let said = format!(
                "said: {code}-{words} {code} {class}.7.{number} is bad (in reply to {stage} command)"
            );
            assert!(line.contains(&format!("status={status}")), "{line}");
            assert!(line.contains(&said), "{said}\n{line}");
        }
    }
    route.postfix.wait_deferred(4);
    assert!(route.sinks.iter().all(|sink| sink.messages().is_empty()));
    assert!(route.sinks[1..].iter().all(|sink| sink.attempts().is_empty()));

    // What was deferred, and nothing else, arrives once the primary has changed its mind.
    route.sinks[0].set_reply(|_| Action::Default);
    route.postfix.flush();
    // Eight messages and four bounces.
    route.postfix.wait_removed(12);
    let arrived = route.arrived(4);
    let ids: Vec<_> = arrived.iter().map(|message| message_id(&message[0].data)).collect();
    assert_eq!(ids, [1, 3, 5, 7].map(|number| message_id(&numbered(number))));
}

#[test]
fn dead_backups_change_nothing_for_postfix() {
    if !available() {
        return;
    }
    let silent = SinkOptions::replying(|event| match event {
        Event::Connect(_) => Action::Silence,
        _ => Action::Default,
    });
    let sinks = [Sink::start(), Sink::refusing(Default::default()), Sink::with(silent)];
    let route = Route::through(sinks, "");
    let mut client = Client::ready(route.postfix.address);
    for number in 0..20 {
        client.message("a@sender.test", &["b@example.com"], &numbered(number));
    }
    route.postfix.wait_removed(20);
    for number in 1..=20 {
        let sent = format!("status=sent (250 2.0.0 queued as SINK{number})");
        assert_eq!(route.postfix.log(&["to=<b@example.com>", &sent]).len(), 1);
    }
    for line in route.postfix.log(&["to=<b@example.com>"]) {
        let (_, delay) = line.split_once(" delay=").unwrap();
        let delay: f64 = delay.split(',').next().unwrap().parse().unwrap();
        // Waiting for the silent one would take its command_timeout_seconds, 120.
        assert!(delay < 30.0, "{line}");
    }
    assert_eq!(route.sinks[0].messages().len(), 20);

    // And the copies were kept for the backup that comes back.
    route.sinks[1].reopen();
    wait_count(&route.sinks[1], 20);
    let [originals, copies] = [&route.sinks[0], &route.sinks[1]].map(sorted);
    assert_eq!(copies.len(), 20);
    for (copy, original) in copies.iter().zip(&originals) {
        assert_same(&copy.data, &original.data);
    }
}

/// SIGTERM while mail flows, and a successor on the same port: each message arrives, and only one
/// whose reply Postfix did not hear may arrive twice.
#[test]
fn restart_under_load() {
    if !available() {
        return;
    }
    const COUNT: usize = 300;
    // The signal comes in the middle of many transactions: each takes a while, and a third of
    // the messages is the most that arrives before it.
    let signalled = Arc::new(AtomicBool::new(false));
    let may_go_on = Arc::clone(&signalled);
    let slow = SinkOptions::replying(move |event| match event {
        Event::EndOfData(number) => {
            while *number > COUNT / 3 && !may_go_on.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(10));
            }
            Action::after(Duration::from_millis(50), Action::Default)
        }
        _ => Action::Default,
    });
    let sinks = [Sink::with(slow), Sink::start(), Sink::start()];
    let address = free_address();
    let yaml = config(
        sinks[0].addr(),
        &[sinks[1].addr(), sinks[2].addr()],
        &format!("listen: \"{address}\""),
        "",
    );
    let dup = Dup::start(&yaml);
    let postfix = Postfix::start(address, "");
    let dup = thread::scope(|scope| {
        for sender in 0..10 {
            let postfix = &postfix;
            scope.spawn(move || {
                let mut client = Client::ready(postfix.address);
                for number in (0..COUNT).filter(|number| number % 10 == sender) {
                    client.message("a@sender.test", &["b@example.com"], &numbered(number));
                }
            });
        }
        wait_count(&sinks[0], COUNT / 6);
        dup.signal(Signal::Term);
        signalled.store(true, Ordering::SeqCst);
        stop(&dup);
        // After the signal each of Postfix's 20 connections may end its transaction, or one more
        // that was on its way. A session that just goes on would bring all of them.
        let before_end = sinks[0].messages().len();
        assert!(before_end <= COUNT / 3 + 40, "{before_end} of {COUNT} came before the end");
        Dup::start(&yaml)
    });
    // Postfix holds a destination back for a while after a failure, unless told to try.
    let end = Instant::now() + PATIENCE;
    while postfix.log(&["/qmgr[", ": removed"]).len() < COUNT {
        assert!(Instant::now() < end, "the queue does not drain");
        postfix.flush();
        thread::sleep(Duration::from_secs(1));
    }
    postfix.wait_removed(COUNT);

    let primary = by_id(&sinks[0]);
    assert_eq!(primary.len(), COUNT);
    let mut doubled = 0;
    for number in 0..COUNT {
        let letter = numbered(number);
        let id = message_id(&letter);
        for data in &primary[&id] {
            assert_is_letter(data, &letter);
        }
        if primary[&id].len() > 1 {
            doubled += primary[&id].len() - 1;
            let line = &postfix.log(&["/cleanup[", &format!("message-id={id}")])[0];
            let queue_id = line.split(": ").nth(1).unwrap();
            let lost = ["lost connection", "timed out"].map(|words| {
                let log = postfix.log(&[queue_id, words, "may be sent more than once"]);
                log.len()
            });
            assert!(lost != [0, 0], "{queue_id} came twice, and Postfix heard each reply");
        }
    }
    println!("{doubled} of {COUNT} messages arrived twice at the primary");
    // Both backups are well, so that the copies of the first process were sent before its end.
    for backup in [&sinks[1], &sinks[2]] {
        wait_count(backup, sinks[0].messages().len());
    }
    stop(&dup);
    let [first, second] = [by_id(&sinks[1]), by_id(&sinks[2])];
    for (id, data) in &primary {
        assert_eq!([first.get(id), second.get(id)], [Some(data), Some(data)], "{id}");
    }
}
