//! A defect of ours, in the middle of a session: its client hears 421, the log says where, and
//! everybody else is served as before.
//!
//! The defect is a logger of this test, that panics at a certain recipient: the program itself has
//! no place where that could be asked for. There is one logger in a process, so this has one.

#[path = "common/mod.rs"]
mod common;

use std::net::TcpListener;
use std::sync::Mutex;
use std::thread;

use common::{Action, Client, Event, Sink, config, wait_until};
use log::{LevelFilter, Log, Metadata, Record};
use signal_hook::consts::SIGTERM;
use signal_hook::low_level::raise;
use smtp_dup::config::Config;
use smtp_dup::launch::Clients;
use smtp_dup::launch::signals::Signals;
use smtp_dup::logger::{self, Place};
use smtp_dup::message::Scratch;
use smtp_dup::server::{self, Store};

/// Keeps all lines, and has the defect.
#[derive(Default)]
struct Defective {
    lines: Mutex<Vec<String>>,
}

impl Log for Defective {
    fn enabled(&self, _: &Metadata) -> bool {
        true
    }

    fn log(&self, record: &Record) {
        let line = format!("{}: {}", record.level(), record.args());
        assert!(!line.contains("to=<defect@"), "the defect of the test");
        self.lines.lock().unwrap().push(line);
    }

    fn flush(&self) {}
}

impl Defective {
    fn lines(&self, needle: &str) -> Vec<String> {
        let lines = self.lines.lock().unwrap();
        lines.iter().filter(|line| line.contains(needle)).cloned().collect()
    }
}

/// Ends the program when the test ends, however it does.
struct End;

impl Drop for End {
    fn drop(&mut self) {
        raise(SIGTERM).unwrap();
    }
}

#[test]
fn a_panic_is_a_421_and_a_line_with_its_place() {
    let log: &'static Defective = Box::leak(Box::default());
    log::set_logger(log).unwrap();
    // There is a logger already, so this brings the hook for panics alone.
    logger::start(Place::Stderr, LevelFilter::Debug);

    let primary = Sink::replying(|event| match event {
        Event::Rcpt(line) if line.contains("defect@") => Action::reply("550 5.1.1 unknown"),
        _ => Action::Default,
    });
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("test.yaml");
    std::fs::write(&file, config(primary.addr(), &[], "max_connections: 2", "")).unwrap();
    let (config, _) = Config::load(Some(&file), [].into_iter(), None).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    listener.set_nonblocking(true).unwrap();
    let signals = Signals::watch().unwrap();
    thread::scope(|scope| {
        let served = scope.spawn(|| {
            let store = Store { scratch: Scratch::Folder(folder.path().into()), spool: None };
            server::run(&config, Clients::Many(vec![listener]), &signals, None, store)
        });
        let end = End;
        let mut bystander = Client::ready(addr);
        bystander.envelope("a@example.com", &["b@example.com"]);
        // More than there are workers: none of them is lost.
        for number in 1..=5 {
            let mut client = Client::ready(addr);
            client.send("MAIL FROM:<a@example.com>\r\nRCPT TO:<defect@example.com>\r\nDATA\r\n");
            // What the primary had said before stands.
            client.expect_reply(250);
            let reply = client.expect_reply(421);
            assert!(reply.text().starts_with("4.3.0 "), "{reply:?}");
            client.closed();
            let whose = format!("ERROR: client={}: a defect", client.local_addr());
            wait_until("its line in the log", || !log.lines(&whose).is_empty());
            let line = log.lines(&whose).remove(0);
            assert!(line.contains("at tests/panic.rs:"), "{line}");
            assert_eq!(log.lines("ERROR: panic at tests/panic.rs:").len(), number);
        }
        assert_eq!(bystander.body(b"x\r\n").code, 250);
        let mut next = Client::ready(addr);
        assert_eq!(next.message("a@example.com", &["b@example.com"], b"x\r\n").code, 250);
        assert_eq!(primary.wait(2).len(), 2);
        drop(end);
        bystander.expect_reply(421);
        next.expect_reply(421);
        served.join().unwrap().unwrap();
    });
    assert_eq!(primary.attempts().len(), 2);
}
