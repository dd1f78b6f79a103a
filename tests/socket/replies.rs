//! The reverse direction: what hostile destinations say must reach neither the client nor the log
//! as anything but a reply and a line, and costs little.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{Action, Client, Dup, Event, Sink, config};
use crate::{BODY, deliver, dup_with};

/// Replies that are valid, and want to be more than one, or another.
const SPLITTING: [&[u8]; 7] = [
    b"CODE 4.7.1 no\r250 2.0.0 ok\r\n",
    b"CODE 4.7.1 no\r\r\n",
    b"CODE-4.7.1 no\r\nCODE 4.7.1 a\0b\x0b\x0c\x1b[2J\x07\x08\x7f\r\n",
    b"CODE 4.7.1 \xff\xfe\xc3\xa4 \xc2\x85 \xe2\x80\xa8 \x9b2J\r\n",
    b"CODE-4.7.1 lines\nCODE 4.7.1 end in LF\n",
    b"CODE\n",
    b"CODE 4.7.1 no\0\r\n",
];

fn with_code(reply: &[u8], code: &str) -> Vec<u8> {
    let parts: Vec<&[u8]> = reply.split(|&o| o == b'C').collect();
    let parts: Vec<&[u8]> =
        parts.iter().map(|part| part.strip_prefix(b"ODE").unwrap_or(part)).collect();
    parts.join(code.as_bytes())
}

fn is_at(event: &Event, step: &str) -> bool {
    match event {
        Event::Connect(_) => step == "greeting",
        Event::Ehlo(_) => step == "EHLO",
        Event::Mail(_) => step == "MAIL",
        Event::Rcpt(_) => step == "RCPT",
        Event::Data => step == "DATA",
        Event::EndOfData(_) => step == "end",
        _ => false,
    }
}

/// A log of whole lines, each of which we began, without control characters.
#[track_caller]
fn assert_log(dup: &Dup) {
    for line in dup.log().lines() {
        let begins = line.get(..11).is_some_and(|time| {
            time.ends_with('T') && time[..4].bytes().all(|o| o.is_ascii_digit())
        });
        assert!(begins, "somebody else's line: {line:?}");
        assert!(!line.contains(char::is_control), "{line:?}");
        assert!(line.len() < 20_000, "a line of {} octets", line.len());
    }
}

#[test]
fn the_primarys_reply_is_one_reply_whatever_is_in_it() {
    let primary = Sink::start();
    let dup = dup_with(&primary, "", "");
    for reply in SPLITTING {
        for step in ["MAIL", "RCPT", "DATA", "end"] {
            let said = with_code(reply, "451");
            let (lines, context) = (said.split(|&o| o == b'\n').count() - 1, said.escape_ascii());
            let context = format!("\"{context}\" at {step}");
            let answer = said.clone();
            primary.set_reply(move |event| match is_at(event, step) {
                true => Action::raw(&answer),
                false => Action::Default,
            });
            let mut client = Client::ready(dup.addr());
            let commands =
                ["MAIL FROM:<a@example.com>", "RCPT TO:<b@example.com>", "DATA", "BODY\r\n."];
            let mut heard = None;
            for (command, at) in commands.iter().zip(["MAIL", "RCPT", "DATA", "end"]) {
                let reply = client.cmd(command);
                if at == step {
                    heard = Some(reply);
                    break;
                }
            }
            let heard = heard.unwrap();
            assert_eq!((heard.code, heard.lines.len()), (451, lines), "{context}: {heard:?}");
            let text = heard.raw.strip_suffix(b"\r\n").unwrap();
            let inner = text.split(|&o| o == b'\n').map(|l| l.strip_suffix(b"\r").unwrap_or(l));
            for line in inner {
                assert!(line.iter().all(|&o| o >= 32 && o != 127), "{context}: {heard:?}");
            }
            // Nothing has shifted: the next reply is that to the next command.
            client.expect("VRFY x", 252);
            client.expect("RSET", 250);
            primary.set_reply(|_| Action::Default);
            deliver(&mut client);
        }
    }
    assert_log(&dup);
}

#[test]
fn the_greeting_and_the_offer_reach_the_client_as_one_line() {
    for step in ["greeting", "EHLO"] {
        for reply in SPLITTING {
            let said = with_code(reply, "451");
            let primary = Sink::replying(move |event| match is_at(event, step) {
                true => Action::raw(&said),
                false => Action::Default,
            });
            let dup = dup_with(&primary, "", "");
            let mut client = Client::greeted(dup.addr());
            let heard = client.expect("EHLO x", 421);
            assert_eq!(heard.lines.len(), 1, "{heard:?}");
            assert!(!heard.text().contains(|c: char| c.is_ascii_control()), "{heard:?}");
            client.closed();
            assert_log(&dup);
        }
    }
    // An offer is rebuilt of what is understood.
    let primary = Sink::replying(|event| match event {
        Event::Ehlo(_) => Action::raw(
            b"250-x\r\n250-SIZE 10\r250 AUTH PLAIN\r\n250-SIZE 99999999999999999999999\r\n\
              250-DSN\0\r\n250-\r\n250- 8BITMIME\r\n250 PIPELINING\rAUTH\r\n",
        ),
        _ => Action::Default,
    });
    let dup = dup_with(&primary, "", "");
    let mut client = Client::greeted(dup.addr());
    let heard = client.ehlo();
    for line in &heard.lines[1..] {
        let known = ["PIPELINING", "8BITMIME", "SIZE"];
        assert!(known.contains(&line.as_str()), "{heard:?}");
    }
    deliver(&mut client);
}

#[test]
fn a_hostile_backup_costs_neither_mail_nor_the_copy() {
    let mut faults: Vec<Vec<u8>> = SPLITTING.iter().map(|reply| with_code(reply, "451")).collect();
    faults.push(b"250-x\r\n".repeat(20_000));
    faults.push([b"250 ".as_slice(), &[b'x'; 100_000], b"\r\n"].concat());
    faults.push(vec![b'x'; 100_000]);
    faults.push(vec![0; 100_000]);
    faults.push(b"250-4.7.1 no end\r\n".to_vec());
    faults.push(b"250 2.0.0 one\r\n250 2.0.0 before its time\r\n".to_vec());
    faults.push(b"999 x\r\n".to_vec());
    faults.push(b"150 wait\r\n".to_vec());
    faults.push(b"354 go on\r\n".to_vec());
    faults.push(b"250-x\r\n251 y\r\n".to_vec());
    let steps = ["greeting", "EHLO", "MAIL", "RCPT", "DATA", "end"];
    for fault in &faults {
        thread::scope(|scope| {
            for step in steps {
                scope.spawn(move || hostile_backup(fault, step));
            }
        });
    }
}

/// A backup that says this once, at `step`, and behaves from then on.
#[track_caller]
fn hostile_backup(fault: &[u8], step: &'static str) {
    let context = format!("\"{}\" at {step}", fault[..fault.len().min(60)].escape_ascii());
    let (primary, backup) = (Sink::start(), Sink::start());
    let limits = "command_timeout_seconds: 1\ndata_timeout_seconds: 1";
    let dup = Dup::start(&config(primary.addr(), &[backup.addr()], "", limits));
    let (done, said) = (AtomicBool::new(false), fault.to_vec());
    backup.set_reply(move |event| match is_at(event, step) && !done.swap(true, Ordering::SeqCst) {
        true => Action::raw(&said),
        false => Action::Default,
    });
    let mut client = Client::ready(dup.addr());
    let since = Instant::now();
    assert_eq!(client.pipelined("a@example.com", "b@example.com", BODY).code, 250, "{context}");
    assert!(since.elapsed() < Duration::from_secs(10), "{context}");
    backup.wait_for(&format!("the copy after {context}"), |sink| {
        sink.messages().iter().any(|message| message.data == BODY && message.rcpts.len() == 1)
    });
    assert_log(&dup);
}

#[test]
fn a_reply_octet_by_octet_is_bounded_in_work() {
    // The longest that is read, each line as short as can be.
    let primary = Sink::replying(|event| match event {
        Event::Rcpt(line) if line.contains("slow@") => {
            Action::slow(b"250-\n".repeat(3000), Duration::ZERO).then(Action::reply("250 ok"))
        }
        _ => Action::Default,
    });
    let dup = dup_with(&primary, "", "");
    let mut client = Client::ready(dup.addr());
    client.expect("MAIL FROM:<a@example.com>", 250);
    assert_eq!(client.expect("RCPT TO:<slow@example.com>", 250).lines.len(), 3001);
    client.expect("DATA", 354);
    assert_eq!(client.body(BODY).code, 250);
}
