//! Killed before every system call that changes the spool, one after the other, and started anew.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::common::*;
use crate::tracer::Traced;
use crate::*;

/// One transaction with a server that may die at any time: the code of the reply to its final
/// dot, if that was heard.
pub fn try_message(addr: SocketAddr, to: &[&str], body: &[u8]) -> Option<u16> {
    let stream = TcpStream::connect_timeout(&addr, BOUND).ok()?;
    stream.set_nodelay(true).ok()?;
    stream.set_read_timeout(Some(BOUND)).ok()?;
    let mut input = BufReader::new(&stream);
    let mut reply = || loop {
        let mut line = String::new();
        input.read_line(&mut line).ok().filter(|count| *count > 4)?;
        if line.as_bytes()[3] == b' ' {
            return line[..3].parse::<u16>().ok();
        }
    };
    reply()?;
    let mut lines = vec!["EHLO client.example".to_string(), format!("MAIL FROM:<{FROM}>")];
    lines.extend(to.iter().map(|to| format!("RCPT TO:<{to}>")));
    lines.push("DATA".into());
    for line in lines {
        (&stream).write_all(format!("{line}\r\n").as_bytes()).ok()?;
        reply().filter(|code| *code < 400)?;
    }
    (&stream).write_all(&[body, b".\r\n"].concat()).ok()?;
    reply()
}

/// What kind of life ends.
struct Life {
    to: &'static [&'static str],
    body: Vec<u8>,
    /// What the second backup says, asked for each event. The first takes all.
    reply: fn(&Event, &AtomicBool) -> Action,
    /// The recipients that the second backup takes in the end.
    second: &'static [&'static str],
    /// … and those that it never takes, with the words that have to be in `failed/`.
    failed: Option<&'static str>,
}

/// Calls one life after the other until one is not killed any more: every `step`th from `first`.
#[track_caller]
fn lives(life: &Life, first: usize, step: usize) {
    let mut at = first;
    while one_life(life, at) {
        at += step;
    }
    // Fewer calls there cannot be for one message, two backups and the start.
    assert!(at > 30, "the calls are not seen: only {at}");
}

/// True when it was killed.
#[track_caller]
fn one_life(life: &Life, kill_at: usize) -> bool {
    let folder = Folder::new();
    let primary = Sink::start();
    let (reply, has_deferred) = (life.reply, AtomicBool::new(false));
    let backups = [Sink::start(), Sink::replying(move |event| reply(event, &has_deferred))];
    let yaml = folder.config(&primary, &backups.each_ref(), "");

    let traced = Traced::start(&yaml, &folder.path(), Some(kill_at));
    let heard = traced.addr.and_then(|addr| try_message(addr, life.to, &life.body));
    assert!(heard.is_none_or(|code| code == 250), "{kill_at}: {heard:?}");
    let is_done = || folder.files("queue").is_empty() && heard.is_some();
    let end = Instant::now() + BOUND;
    while !traced.has_ended() && !is_done() {
        assert!(Instant::now() < end, "{kill_at}: {:?}\n{}", folder.files(""), traced.log());
        std::thread::sleep(Duration::from_millis(2));
    }
    traced.terminate();
    let trace = traced.trace();
    let left = folder.files("");
    let last = trace.calls.iter().rfind(|call| !call.what.starts_with("socket "));
    let shown = format!("killed before the {kill_at}th, {last:?}, heard {heard:?}, left {left:#?}");

    let dup = Dup::start(&yaml);
    wait_until(&shown, || !folder.files("queue").iter().any(|file| file.contains(".to.")));
    if heard.is_some() {
        for backup in &backups[..if life.second.is_empty() { 1 } else { 2 }] {
            backup.wait_for(&shown, |backup| !backup.messages().is_empty());
        }
    }
    end_of(&dup, &shown);

    let was_accepted = primary.messages().len() == 1;
    assert!(was_accepted || heard.is_none(), "{shown}");
    let mut counts = Vec::new();
    for (backup, to) in backups.iter().zip([life.to, life.second]) {
        let messages = backup.messages();
        for message in &messages {
            assert!(message.data == life.body, "{shown}: {} octets", message.data.len());
            assert!(recipients(message).iter().all(|rcpt| to.contains(rcpt)), "{shown}");
        }
        for to in to {
            let count = messages.iter().filter(|got| recipients(got).contains(to)).count();
            // Once more for the delivery that was open when it died.
            assert!(count <= 2, "{shown}: {to} got it {count} times");
            counts.push(count);
        }
    }
    let got = counts.iter().filter(|count| **count > 0).count();
    // Not accepted, none; heard, all; in between, committed or not.
    assert!(got == 0 || was_accepted && got == counts.len(), "{shown}: {counts:?}");
    assert!(heard.is_none() || got == counts.len(), "{shown}: {counts:?}");

    let failed = folder.files("failed");
    if got > 0
        && let Some(words) = life.failed
    {
        let id = &ids(&failed)[0];
        assert_eq!(failed, [format!("{id}.mail"), format!("{id}.to.{}", backups[1].addr())]);
        let note = folder.text(&format!("failed/{}", failed[1]));
        assert!(note.contains(words), "{shown}: {note}");
    } else {
        assert_eq!(failed, [""; 0], "{shown}");
    }
    assert_eq!(folder.files("hold"), [""; 0], "{shown}");
    // Two blemishes that lose nothing, each with a test of its own in `garbage`: the sweep leaves
    // a message in the queue that is in `failed/` too, and an agent may find copies that were
    // never committed before the sweep does.
    assert!(ids(&folder.files("queue")).iter().all(|id| ids(&failed).contains(id)), "{shown}");
    assert!(got == 0 && heard.is_none() || folder.files("damaged").is_empty(), "{shown}");
    // A state that was about to be put in place may lie there: its writer could be alive, and only
    // a start a minute later removes it.
    let drafts: Vec<_> =
        folder.files("tmp").into_iter().filter(|file| !file.contains(['.', '-'])).collect();
    assert_eq!(drafts, [""; 0], "{shown}");
    trace.killed
}

#[track_caller]
fn end_of(dup: &Dup, shown: &str) {
    dup.wait_log("looked through");
    dup.signal(Signal::Term);
    assert!(dup.wait_exit(BOUND).success(), "{shown}\n{}", dup.log());
    assert_eq!(dup.log_lines("status=lost"), [""; 0], "{shown}");
}

fn plain(body: Vec<u8>) -> Life {
    Life {
        to: &["b@example.com", "c@example.com"],
        body,
        reply: |_, _| Action::Default,
        second: &["b@example.com", "c@example.com"],
        failed: None,
    }
}

/// A backup that defers one recipient once, and refuses another for good.
fn choosy() -> Life {
    Life {
        to: &["one@example.com", "later@example.com", "no@example.com"],
        body: numbered(1),
        reply: |event, has_deferred| match event {
            Event::Rcpt(line) if line.contains("<no@") => Action::reply("550 5.1.1 unknown user"),
            Event::Rcpt(line)
                if line.contains("<later@") && !has_deferred.swap(true, Ordering::SeqCst) =>
            {
                Action::reply("450 4.2.0 greylisted")
            }
            _ => Action::Default,
        },
        second: &["one@example.com", "later@example.com"],
        failed: Some("550 5.1.1 unknown user"),
    }
}

/// A backup that refuses the whole message.
fn refusing() -> Life {
    Life {
        to: &["b@example.com"],
        body: numbered(1),
        reply: |event, _| match event {
            Event::EndOfData(_) => Action::reply("554 5.7.1 spam"),
            _ => Action::Default,
        },
        second: &[],
        failed: Some("554 5.7.1 spam"),
    }
}

// Each split among several tests, because each life waits more than it works.

#[test]
fn killed_at_every_call_of_a_small_message_1() {
    lives(&plain(numbered(1)), 1, 2);
}

#[test]
fn killed_at_every_call_of_a_small_message_2() {
    lives(&plain(numbered(1)), 2, 2);
}

#[test]
fn killed_at_every_call_of_a_big_message_1() {
    lives(&plain(mail_body(400_000)), 1, 2);
}

#[test]
fn killed_at_every_call_of_a_big_message_2() {
    lives(&plain(mail_body(400_000)), 2, 2);
}

#[test]
fn killed_at_every_call_with_recipients_refused_and_deferred_1() {
    lives(&choosy(), 1, 3);
}

#[test]
fn killed_at_every_call_with_recipients_refused_and_deferred_2() {
    lives(&choosy(), 2, 3);
}

#[test]
fn killed_at_every_call_with_recipients_refused_and_deferred_3() {
    lives(&choosy(), 3, 3);
}

#[test]
fn killed_at_every_call_of_a_refused_message_1() {
    lives(&refusing(), 1, 2);
}

#[test]
fn killed_at_every_call_of_a_refused_message_2() {
    lives(&refusing(), 2, 2);
}
