//! Many hostile clients at once: those who are not are served, and memory stays within bounds.
//!
//! The numbers are small here. `make load` sets LOAD=full and runs the release build with those
//! that matter; both print what they saw.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::common::{BOUND, Client, Dup, Sink, config, mail_body};
use crate::{deliver, dup_with};

/// How much of everything.
pub struct Size {
    /// Connections that are slow or silent.
    slow: usize,
    /// Clients that behave well at the same time, and how many messages each sends.
    good: usize,
    messages: usize,
    /// `smtp.timeout_seconds`, in which all of this happens.
    seconds: u64,
    bad_commands: usize,
    /// At a limit of 64 descriptors: silent clients, and good ones.
    pub few: (usize, usize),
}

pub fn size() -> Size {
    match std::env::var("LOAD").as_deref() {
        Ok("full") => Size {
            slow: 4900,
            good: 100,
            messages: 50,
            seconds: 60,
            bad_commands: 1_000_000,
            few: (2000, 500),
        },
        _ => Size {
            slow: 280,
            good: 20,
            messages: 5,
            seconds: 10,
            bad_commands: 20_000,
            few: (100, 50),
        },
    }
}

/// Ways to need a worker for long. Each may send an octet now and then.
const WAYS: [&str; 6] = [
    "",
    "EHL",
    "EHLO x\r\n",
    "EHLO x\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b",
    "EHLO x\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\nSubject: x",
    "EHLO x\r\nNOOP xxxx",
];

/// This many of the slow send commands as fast as can be, and read no reply.
const DEAF: usize = 20;

/// A client that is slow in one of the ways.
fn slow(dup: &Dup, number: usize) -> Client {
    let mut client = Client::greeted(dup.addr());
    match number {
        ..DEAF => {
            client.hold(4096);
            client.send(b"VRFY x\r\n".repeat(10_000));
        }
        // A line that is too long, and does not end.
        _ if number % (WAYS.len() + 1) == WAYS.len() => client.send([b'x'; 3000]),
        _ => client.send(WAYS[number % (WAYS.len() + 1)]),
    }
    client
}

#[test]
fn slow_clients_keep_nobody_out() {
    let size = size();
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let (primary, backup) = (Sink::start(), Sink::start());
    let all = size.slow + size.good;
    let smtp = format!("max_connections: {all}\ntimeout_seconds: {}", size.seconds);
    let dup = Dup::start(&config(primary.addr(), &[backup.addr()], &smtp, ""));
    deliver(&mut Client::ready(dup.addr()));
    let before = dup.resident();
    let since = Instant::now();
    let crowd: Vec<Client> = (0..size.slow).map(|number| slow(&dup, number)).collect();
    let (opened, crowd) = (since.elapsed(), Mutex::new(crowd));
    let (is_over, most, slowest) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    // All copies together fit into `relay.backup_memory`, however far the backup is behind.
    let body = mail_body(10_000);
    let threads = dup.threads();
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::SeqCst) {
                let mut crowd = crowd.lock().unwrap();
                // Every third is silent.
                let (_, talkers) = crowd.split_at_mut(DEAF);
                for client in talkers.iter_mut().enumerate().filter(|(n, _)| n % 3 > 0) {
                    client.1.try_send("x");
                }
                most.fetch_max(dup.resident(), Ordering::SeqCst);
                drop(crowd);
                thread::sleep(Duration::from_millis(500));
            }
        });
        let good: Vec<_> = (0..size.good)
            .map(|_| {
                scope.spawn(|| {
                    let mut client = Client::ready(dup.addr());
                    for _ in 0..size.messages {
                        let since = Instant::now();
                        let reply = client.pipelined("a@example.com", "b@example.com", &body);
                        assert_eq!(reply.code, 250, "{reply:?}");
                        slowest.fetch_max(since.elapsed().as_millis() as u64, Ordering::SeqCst);
                    }
                    client.expect("QUIT", 221);
                })
            })
            .collect();
        let ended: Vec<_> = good.into_iter().map(|client| client.join()).collect();
        is_over.store(true, Ordering::SeqCst);
        assert!(ended.iter().all(Result::is_ok), "a good client was not served");
    });
    let count = size.good * size.messages + 1;
    assert_eq!(primary.accepted(), count);
    backup.wait_for("the copies", |sink| sink.accepted() == count);
    let each = (most.into_inner().saturating_sub(before)) / 1024 / all as u64;
    println!(
        "load: {} slow or silent in {opened:?}, {threads} threads; {count} messages of {} good \
         clients, the slowest took {} ms; resident {} KiB before, {each} KiB more each",
        size.slow,
        size.good,
        slowest.into_inner(),
        before / 1024,
    );
    // 12 KiB of stack that is touched, 2 of input; 20 have filled buffers of 128 KiB and more.
    assert!(each < 64, "{each} KiB for each client");
    // All of them are sent away when their time is up. Four agents may be left.
    let end = Instant::now() + Duration::from_secs(size.seconds) + BOUND;
    while dup.threads() > 5 && Instant::now() < end {
        thread::sleep(Duration::from_millis(100));
    }
    assert!(dup.threads() <= 5, "{} threads are left", dup.threads());
    deliver(&mut Client::ready(dup.addr()));
    let left = dup.descriptors();
    println!("load: {left} descriptors and {} KiB are left", dup.resident() / 1024);
    assert!(left < 50, "{left} descriptors are left");
}

#[test]
fn a_flood_of_bad_commands() {
    const EACH: usize = 20;
    let bad: [&[u8]; 7] = [
        b"WHAT\r\n",
        b"RCPT TO:<b@example.com>\r\n",
        b"\xff\xfe\r\n",
        b"MAIL FROM\r\n",
        b"AUTH PLAIN AGEAYg==\r\n",
        b"\r\n",
        &[&[b'x'; 3000], b"\r\n".as_slice()].concat(),
    ];
    let primary = Sink::start();
    let dup = dup_with(&primary, "", "");
    deliver(&mut Client::ready(dup.addr()));
    let (before, since) = (dup.resident(), Instant::now());
    let connections = size().bad_commands / EACH;
    let (next, most) = (AtomicUsize::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        for thread in 0..8 {
            let (next, most, dup) = (&next, &most, &dup);
            let source = IpAddr::V4(Ipv4Addr::new(127, 0, 1, thread));
            scope.spawn(move || {
                loop {
                    let number = next.fetch_add(1, Ordering::SeqCst);
                    if number >= connections {
                        break;
                    }
                    let mut client = Client::connect_from(source, dup.addr());
                    let lines = bad.iter().cycle().skip(number).take(EACH);
                    client.try_send(lines.copied().collect::<Vec<_>>().concat());
                    client.expect_reply(220);
                    for _ in 0..EACH {
                        let reply = client.reply();
                        assert!((500..=503).contains(&reply.code), "{reply:?}");
                    }
                    client.expect_reply(421);
                    if number % 1000 == 0 {
                        most.fetch_max(dup.resident(), Ordering::SeqCst);
                    }
                }
            });
        }
    });
    let grown = most.into_inner().max(dup.resident()).saturating_sub(before) / 1024;
    println!(
        "load: {} bad commands over {connections} connections in {:?}; resident {} KiB before, \
         at most {grown} KiB more",
        connections * EACH,
        since.elapsed(),
        before / 1024,
    );
    assert!(grown < 16 * 1024, "{grown} KiB more");
    assert!(primary.commands().len() < 10, "{:?}", primary.commands());
    deliver(&mut Client::ready(dup.addr()));
}
