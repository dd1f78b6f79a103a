//! The end of the process: what SIGTERM, SIGINT and SIGHUP do to sessions, transactions and copies.
//!
//! Upper bounds here are far above what is needed and far below the time limit that would be
//! waited for by mistake; each test sets its limits so that there is such a place between.

use std::net::TcpStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use nix::libc;

use crate::common::*;

const FROM: &str = "a@example.com";
const TO: &str = "b@example.com";
const BODY: &[u8] = b"Subject: test\r\n\r\nHello\r\n";

/// With `timeout_seconds`, which is also the time that an ending transaction has, and the drain.
fn dup(primary: &Sink, backups: &[&Sink], timeout_seconds: u64) -> Dup {
    let backups: Vec<_> = backups.iter().map(|backup| backup.addr()).collect();
    let timeout = format!("timeout_seconds: {timeout_seconds}");
    let heeds = |command: &mut Command| on_hang_up(command, libc::SIG_DFL);
    Dup::start_with(heeds, &config(primary.addr(), &backups, "", &timeout))
}

/// Signals the end, and waits until it has begun.
#[track_caller]
fn stop(dup: &Dup, signal: Signal) {
    dup.signal(signal);
    dup.wait_log(" stopping ");
}

/// What the program finds set for SIGHUP; these tests themselves may run under nohup(1).
fn on_hang_up(command: &mut Command, action: libc::sighandler_t) {
    // SAFETY: signal(2) may be called between fork and exec.
    unsafe {
        command.pre_exec(move || {
            libc::signal(libc::SIGHUP, action);
            Ok(())
        });
    }
}

#[track_caller]
fn ends_well(dup: &Dup, within: Duration) {
    let status = dup.wait_exit(within);
    assert_eq!(status.code(), Some(0), "{}", dup.log());
}

#[test]
fn nothing_to_do_is_an_end_at_once() {
    for signal in [Signal::Term, Signal::Int, Signal::Hup] {
        let (primary, backup) = (Sink::start(), Sink::start());
        let dup = dup(&primary, &[&backup], 60);
        let mut client = Client::ready(dup.addr());
        assert_eq!(client.message(FROM, &[TO], BODY).code, 250);
        client.expect("QUIT", 221);
        backup.wait(1);
        dup.signal(signal);
        ends_well(&dup, Duration::from_secs(10));
        assert_eq!(dup.log_lines("status=lost").len(), 0);
        // Kept connections are not just dropped.
        primary.wait_for("QUIT", |primary| primary.count("QUIT") == 1);
        backup.wait_for("QUIT", |backup| backup.count("QUIT") == 1);
    }
}

#[test]
fn listeners_close_at_once() {
    for signal in [Signal::Term, Signal::Int] {
        let primary = Sink::start();
        let listen = "listen: [\"127.0.0.1:0\", \"127.0.0.2:0\"]";
        let yaml = config(primary.addr(), &[], listen, "timeout_seconds: 60");
        let dup = Dup::start(&yaml);
        let mut client = Client::ready(dup.addr());
        client.envelope(FROM, &[TO]);
        dup.signal(signal);
        for &addr in dup.addrs() {
            wait_until("refused connections", || TcpStream::connect(addr).is_err());
        }
        // It was not the end of the process that closed them.
        assert_eq!(client.body(BODY).code, 250);
        ends_well(&dup, Duration::from_secs(10));
    }
}

/// A terminal that closes costs no copy without a word.
#[test]
fn a_hang_up_names_what_is_lost() {
    let (primary, backup) = (Sink::start(), Sink::refusing(SinkOptions::default()));
    let dup = dup(&primary, &[&backup], 1);
    let mut client = Client::ready(dup.addr());
    assert_eq!(client.message(FROM, &[TO], BODY).code, 250);
    dup.wait_log("is down");
    dup.signal(Signal::Hup);
    ends_well(&dup, Duration::from_secs(20));
    assert_eq!(dup.log_lines("status=lost").len(), 1, "{}", dup.log());
    assert_eq!(dup.log_lines("stopping on SIGHUP").len(), 1, "{}", dup.log());
}

/// nohup(1) is for programs that are to stay.
#[test]
fn a_hang_up_that_is_ignored_ends_nothing() {
    let primary = Sink::start();
    let ignore = |command: &mut Command| on_hang_up(command, libc::SIG_IGN);
    let dup = Dup::start_with(ignore, &config(primary.addr(), &[], "", ""));
    dup.signal(Signal::Hup);
    let mut client = Client::ready(dup.addr());
    assert_eq!(client.message(FROM, &[TO], BODY).code, 250);
    assert!(dup.log_lines("stopping").is_empty(), "{}", dup.log());
}

#[test]
fn idle_sessions_hear_421() {
    let primary = Sink::start();
    let dup = dup(&primary, &[], 60);
    let greeted = Client::greeted(dup.addr());
    let ready = Client::ready(dup.addr());
    let mut done = Client::ready(dup.addr());
    assert_eq!(done.message(FROM, &[TO], BODY).code, 250);
    let mut reset = Client::ready(dup.addr());
    reset.expect("MAIL FROM:<a@example.com>", 250);
    reset.expect("RSET", 250);
    let mut half_a_line = Client::ready(dup.addr());
    half_a_line.send("MAIL FR");
    dup.signal(Signal::Term);
    for mut client in [greeted, ready, done, reset, half_a_line] {
        let reply = client.expect_reply(421);
        assert!(reply.has_enhanced_code(), "{reply:?}");
        client.closed();
    }
    ends_well(&dup, Duration::from_secs(10));
    assert!(primary.broken().is_empty());
}

#[test]
fn two_hundred_idle_sessions_are_no_delay() {
    let primary = Sink::start();
    let yaml = config(primary.addr(), &[], "max_connections: 250", "timeout_seconds: 60");
    let dup = Dup::start(&yaml);
    let clients: Vec<_> = (0..200).map(|_| Client::ready(dup.addr())).collect();
    dup.signal(Signal::Term);
    for mut client in clients {
        client.expect_reply(421);
        client.closed();
    }
    ends_well(&dup, Duration::from_secs(10));
}

#[test]
fn a_client_that_waits_for_a_worker_is_no_delay() {
    let primary = Sink::start();
    let yaml = config(primary.addr(), &[], "max_connections: 1", "timeout_seconds: 60");
    let dup = Dup::start(&yaml);
    let mut served = Client::ready(dup.addr());
    let mut waiting = Client::connect(dup.addr());
    assert!(waiting.is_silent(Duration::from_millis(200)));
    dup.signal(Signal::Term);
    served.expect_reply(421);
    waiting.expect_reply(421);
    waiting.closed();
    ends_well(&dup, Duration::from_secs(10));
}

#[test]
fn a_transaction_can_be_completed() {
    let (primary, backup) = (Sink::start(), Sink::start());
    let dup = dup(&primary, &[&backup], 60);
    let mut in_envelope = Client::ready(dup.addr());
    in_envelope.expect("MAIL FROM:<a@example.com>", 250);
    in_envelope.expect("RCPT TO:<b@example.com>", 250);
    let mut in_body = Client::ready(dup.addr());
    in_body.envelope(FROM, &[TO]);
    in_body.send(&BODY[..10]);
    stop(&dup, Signal::Term);
    in_envelope.expect("RCPT TO:<c@example.com>", 250);
    in_envelope.expect("DATA", 354);
    for (client, rest) in [(&mut in_envelope, BODY), (&mut in_body, &BODY[10..])] {
        assert_eq!(client.body(rest).code, 250);
        // After that it is an idle session.
        client.expect_reply(421);
        client.closed();
    }
    ends_well(&dup, Duration::from_secs(10));
    for sink in [&primary, &backup] {
        let messages = sink.messages();
        assert_eq!(messages.len(), 2);
        assert!(messages.iter().all(|message| message.data == BODY));
    }
}

#[test]
fn a_transaction_that_does_not_end_hears_421_and_the_primary_no_dot() {
    let (primary, backup) = (Sink::start(), Sink::start());
    let dup = dup(&primary, &[&backup], 2);
    let mut in_envelope = Client::ready(dup.addr());
    in_envelope.expect("MAIL FROM:<a@example.com>", 250);
    let mut in_body = Client::ready(dup.addr());
    in_body.envelope(FROM, &[TO]);
    // As if ended, but for the dot: a connection that just ends must not complete it.
    in_body.send(BODY);
    let began = Instant::now();
    dup.signal(Signal::Term);
    assert!(in_body.is_silent(Duration::from_millis(1000)), "it has two seconds");
    for mut client in [in_envelope, in_body] {
        client.expect_reply(421);
        client.closed();
    }
    let took = began.elapsed();
    assert!(took > Duration::from_millis(1500), "{took:?}");
    ends_well(&dup, Duration::from_secs(10));
    primary.wait_for("the end of it", |primary| primary.broken().len() == 1);
    assert!(primary.attempts().is_empty());
    let broken = primary.broken();
    assert!(BODY.starts_with(&broken[0].data), "{broken:?}");
    assert!(backup.attempts().is_empty() && backup.count("MAIL") == 0);
}

#[test]
fn a_client_that_never_stops_sending_does_not_keep_the_process() {
    // In a body, in a command line, and between commands.
    for (begin, on_it_goes) in [
        (&["MAIL FROM:<a@b.example>", "RCPT TO:<c@b.example>", "DATA"][..], "and so on\r\n"),
        (&["MAIL FROM:<a@b.example>"], "x"),
        (&["MAIL FROM:<a@b.example>"], "NOOP\r\n"),
        (&[], "NOOP\r\n"),
    ] {
        let primary = Sink::start();
        let dup = dup(&primary, &[], 1);
        let mut client = Client::ready(dup.addr());
        for line in begin {
            assert!(client.cmd(line).code < 400);
        }
        dup.signal(Signal::Term);
        // It notices that the other side has gone, and ends with that.
        thread::spawn(move || {
            while client.try_send(on_it_goes) {
                thread::sleep(Duration::from_millis(20));
            }
        });
        ends_well(&dup, Duration::from_secs(10));
        assert!(primary.attempts().is_empty());
    }
}

#[test]
fn after_the_dot_the_answer_of_the_primary_is_waited_for() {
    let hears = |answer: &'static str, code: u16| {
        // Longer than transactions and copies have together.
        let primary = Sink::replying(move |event| match event {
            Event::EndOfData(_) => Action::after(Duration::from_secs(3), Action::reply(answer)),
            _ => Action::Default,
        });
        let backup = Sink::start();
        let dup = dup(&primary, &[&backup], 1);
        let mut client = Client::ready(dup.addr());
        client.envelope(FROM, &[TO]);
        client.send([BODY, b".\r\n"].concat());
        primary.wait_for("the dot", |primary| primary.attempts().len() == 1);
        dup.signal(Signal::Term);
        let reply = client.reply();
        assert_eq!(reply.raw, format!("{answer}\r\n").as_bytes());
        assert_eq!(reply.code, code);
        client.expect_reply(421);
        ends_well(&dup, Duration::from_secs(10));
        assert_eq!(backup.messages().len(), usize::from(code == 250));
    };
    thread::scope(|scope| {
        scope.spawn(|| hears("250 2.0.0 taken at last", 250));
        scope.spawn(|| hears("451 4.3.0 no after all", 451));
    });
}

#[test]
fn a_primary_that_says_nothing_before_the_dot_is_not_waited_for() {
    let silent_at = |point: fn(&Event) -> bool| {
        Sink::replying(move |event| match point(event) {
            true => Action::Silence,
            false => Action::Default,
        })
    };
    let begin = |dup: &Dup, lines: &[&str]| {
        let mut client = Client::greeted(dup.addr());
        for line in &lines[1..] {
            client.expect(line, 250);
        }
        client.send(format!("{}\r\n", lines[0]));
        client
    };
    for (primary, lines) in [
        (silent_at(|event| matches!(event, Event::Connect(_))), &["EHLO x"][..]),
        (
            silent_at(|event| matches!(event, Event::Mail(_))),
            &["MAIL FROM:<a@example.com>", "EHLO x"],
        ),
    ] {
        let dup = dup(&primary, &[], 1);
        let mut client = begin(&dup, lines);
        primary.wait_for("the wait", |primary| {
            primary.connections() == 1 && primary.commands().len() == 2 * (lines.len() - 1)
        });
        dup.signal(Signal::Term);
        // The primary itself would have two minutes.
        client.expect_reply(421);
        ends_well(&dup, Duration::from_secs(10));
    }
}

#[test]
fn copies_that_wait_are_delivered_before_the_end() {
    let primary = Sink::start();
    let slow = Sink::replying(|event| match event {
        Event::EndOfData(_) => Action::after(Duration::from_millis(100), Action::Default),
        _ => Action::Default,
    });
    let timeout = "timeout_seconds: 20\nbackup_connections: 1";
    let dup = Dup::start(&config(primary.addr(), &[slow.addr()], "", timeout));
    let mut client = Client::ready(dup.addr());
    for _ in 0..10 {
        assert_eq!(client.message(FROM, &[TO], BODY).code, 250);
    }
    assert!(slow.messages().len() < 10, "it is not slow");
    dup.signal(Signal::Term);
    ends_well(&dup, BOUND);
    assert_eq!(slow.messages().len(), 10);
    assert_eq!(dup.log_lines("status=lost").len(), 0);
}

#[test]
fn a_backup_that_is_back_in_time_gets_its_copies_in_the_drain() {
    let primary = Sink::start();
    let backup = Sink::refusing(SinkOptions::default());
    let dup = dup(&primary, &[&backup], 15);
    let mut client = Client::ready(dup.addr());
    for _ in 0..5 {
        assert_eq!(client.message(FROM, &[TO], BODY).code, 250);
    }
    dup.wait_log("status=deferred");
    stop(&dup, Signal::Term);
    backup.reopen();
    ends_well(&dup, BOUND);
    assert_eq!(backup.messages().len(), 5, "{}", dup.log());
    assert_eq!(dup.log_lines("status=lost").len(), 0);
}

/// What is left when the drain is over, one line each.
#[track_caller]
fn assert_all_named(dup: &Dup, backup: &str, count: usize) {
    let lost: Vec<_> = dup.log_lines("status=lost");
    assert_eq!(lost.len(), count, "{}", dup.log());
    for line in &lost {
        assert!(line.contains(" error: "), "{line}");
        assert!(line.contains(&format!(": relay={backup} role=backup ")), "{line}");
    }
    for message in dup.log_lines(" from=<") {
        let id = message.split(' ').nth(1).unwrap();
        let named = lost.iter().filter(|line| line.contains(id)).count();
        assert_eq!(named, 1, "{id} in {lost:#?}");
    }
}

#[test]
fn a_backup_that_says_nothing_after_the_dot_has_the_time_of_the_drain() {
    let primary = Sink::start();
    let backup = Sink::replying(|event| match event {
        Event::EndOfData(_) => Action::Silence,
        _ => Action::Default,
    });
    let dup = dup(&primary, &[&backup], 2);
    let mut client = Client::ready(dup.addr());
    assert_eq!(client.message(FROM, &[TO], BODY).code, 250);
    backup.wait_for("the dot", |backup| backup.attempts().len() == 1);
    let began = Instant::now();
    dup.signal(Signal::Term);
    ends_well(&dup, Duration::from_secs(10));
    let took = began.elapsed();
    assert!(took > Duration::from_millis(1500), "it has two seconds: {took:?}");
    assert_all_named(&dup, &backup.addr().to_string(), 1);
}

#[test]
fn a_backup_that_cannot_be_reached_is_no_delay() {
    // Refused, swallowed by the network, never greeting, and without an address.
    let refusing = Sink::refusing(SinkOptions::default());
    let dead = DeadHost::start();
    let silent = Sink::replying(|_| Action::Silence);
    let backups = [
        refusing.addr().to_string(),
        dead.addr().to_string(),
        silent.addr().to_string(),
        "no-such-host.invalid:25".to_string(),
    ];
    let ends = |backup: String| {
        let primary = Sink::start();
        let yaml = config(primary.addr(), &[], "", "timeout_seconds: 2");
        let dup = Dup::start(&format!("{yaml}  destination_backups: [\"{backup}\"]\n"));
        let mut client = Client::ready(dup.addr());
        for _ in 0..5 {
            assert_eq!(client.message(FROM, &[TO], BODY).code, 250);
        }
        dup.signal(Signal::Term);
        ends_well(&dup, Duration::from_secs(10));
        assert_all_named(&dup, &backup, 5);
    };
    thread::scope(|scope| {
        for backup in backups {
            scope.spawn(|| ends(backup));
        }
    });
}

#[test]
fn more_sigterms_change_nothing() {
    let (primary, backup) = (Sink::start(), Sink::start());
    let dup = dup(&primary, &[&backup], 60);
    let mut client = Client::ready(dup.addr());
    client.envelope(FROM, &[TO]);
    stop(&dup, Signal::Term);
    for _ in 0..3 {
        dup.signal(Signal::Term);
    }
    // Time for a signal to do what it should not.
    assert!(client.is_silent(Duration::from_millis(300)));
    assert_eq!(client.body(BODY).code, 250);
    ends_well(&dup, Duration::from_secs(10));
    assert_eq!(backup.messages().len(), 1);
}

#[test]
fn sigterms_during_the_drain_change_nothing() {
    let primary = Sink::start();
    let backup = Sink::replying(|event| match event {
        Event::EndOfData(_) => Action::after(Duration::from_secs(1), Action::Default),
        _ => Action::Default,
    });
    let dup = dup(&primary, &[&backup], 20);
    let mut client = Client::ready(dup.addr());
    assert_eq!(client.message(FROM, &[TO], BODY).code, 250);
    stop(&dup, Signal::Int);
    dup.signal(Signal::Term);
    dup.signal(Signal::Term);
    ends_well(&dup, BOUND);
    assert_eq!(backup.messages().len(), 1);
    assert_eq!(dup.log_lines("status=lost").len(), 0);
}

#[test]
fn a_second_sigint_ends_it_now() {
    let silent = || {
        Sink::replying(|event| match event {
            Event::EndOfData(_) => Action::Silence,
            _ => Action::Default,
        })
    };
    let ends_now = |dup: &Dup| {
        stop(dup, Signal::Int);
        assert!(dup.is_running());
        dup.signal(Signal::Int);
        let status = dup.wait_exit(Duration::from_secs(10));
        assert!(!status.success(), "{status:?}");
    };
    // Each of these has a minute or more to wait for: a body, the primary, a backup.
    let primary = Sink::start();
    let in_body = dup(&primary, &[], 60);
    let mut client = Client::ready(in_body.addr());
    client.envelope(FROM, &[TO]);
    ends_now(&in_body);
    primary.wait_for("the end", |primary| primary.open_connections() == 0);
    assert!(primary.attempts().is_empty());

    let primary = silent();
    let after_the_dot = dup(&primary, &[], 60);
    let mut client = Client::ready(after_the_dot.addr());
    client.envelope(FROM, &[TO]);
    client.send([BODY, b".\r\n"].concat());
    primary.wait_for("the dot", |primary| primary.attempts().len() == 1);
    ends_now(&after_the_dot);

    let (primary, backup) = (Sink::start(), silent());
    let draining = dup(&primary, &[&backup], 60);
    let mut client = Client::ready(draining.addr());
    assert_eq!(client.message(FROM, &[TO], BODY).code, 250);
    backup.wait_for("the dot", |backup| backup.attempts().len() == 1);
    ends_now(&draining);
}
