//! What holds wherever each connection has a process of its own, whoever starts it: spawn(8),
//! inetd, tcpserver, systemd. Their files bring the listener.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::common::{Action, Client, Detour, Event, SinkOptions, config, wait_until};
use crate::program::{Program, kill};
use crate::{Gate, Route, numbered, write_config};

/// A launcher that listens.
pub struct Service<'a> {
    pub address: SocketAddr,
    pub route: &'a Route,
    pub program: &'a Program,
    /// The log so far.
    pub log: &'a (dyn Fn() -> String + Sync),
}

impl Service<'_> {
    #[track_caller]
    fn wait_log(&self, needle: &str) {
        wait_until(&format!("{needle:?} in the log"), || (self.log)().contains(needle));
    }
}

/// So many sessions, all open at once; each brings a message and hears SMTP and nothing else,
/// which `Client` sees to.
#[track_caller]
pub fn many_at_once(service: &Service, count: usize) {
    // Starting hundreds of processes on a few cores takes a while.
    let patience = Duration::from_secs(100);
    let greeted = AtomicUsize::new(0);
    // Their connections to us and ours to them are more than a process may have by default.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    thread::scope(|scope| {
        for number in 0..count {
            let greeted = &greeted;
            scope.spawn(move || {
                let mut client = Client::connect(service.address);
                let greeting = client.reply_within(patience);
                assert_eq!(greeting.code, 220, "{greeting:?}");
                greeted.fetch_add(1, Ordering::SeqCst);
                let end = Instant::now() + patience;
                while greeted.load(Ordering::SeqCst) < count && Instant::now() < end {
                    thread::sleep(Duration::from_millis(10));
                }
                assert_eq!(client_says(&mut client, "EHLO client.example", patience), 250);
                assert_eq!(client_says(&mut client, "MAIL FROM:<a@sender.test>", patience), 250);
                assert_eq!(client_says(&mut client, "RCPT TO:<b@example.com>", patience), 250);
                assert_eq!(client_says(&mut client, "DATA", patience), 354);
                client.send(numbered(number));
                assert_eq!(client_says(&mut client, ".", patience), 250);
                assert_eq!(client_says(&mut client, "QUIT", patience), 221);
                client.closed_within(patience);
            });
        }
    });
    assert_eq!(greeted.into_inner(), count, "not all of them were open at once");
    service.route.wait(count);
    service.program.wait_gone(patience);
    service.route.assert_numbered(count);
}

#[track_caller]
fn client_says(client: &mut Client, line: &str, within: Duration) -> u16 {
    client.send(format!("{line}\r\n"));
    client.reply_within(within).code
}

/// Trouble of every kind, each of which is worth a line in the log, at the most talkative level:
/// the client hears replies, and the lines are where they belong.
#[track_caller]
pub fn the_log_is_not_on_the_wire(service: &Service) {
    let route = service.route;
    write_config(route.folder(), &(route.yaml("", "") + "log:\n  level: debug\n"));
    // A backup that refuses for good, and one that is down.
    route.sinks[1].set_reply(|event| match event {
        Event::Rcpt(_) => Action::reply("550 5.1.1 who?"),
        _ => Action::Default,
    });
    route.sinks[2].close();
    let mut client = Client::ready(service.address);
    client.expect("NONSENSE", 500);
    let message = client.message("a@sender.test", &["b@example.com"], &numbered(0));
    assert_eq!(message.code, 250, "{message:?}");
    client.expect("QUIT", 221);
    client.closed();
    service.wait_log("status=sent");
    service.wait_log("status=refused");
    service.wait_log("status=lost");
    // The primary is down as well.
    route.sinks[0].close();
    let mut client = Client::greeted(service.address);
    let reply = client.cmd("EHLO client.example");
    assert_eq!(reply.code, 421, "{reply:?}");
    client.closed();
    service.wait_log("is not available");
    service.program.wait_gone(Duration::from_secs(40));
}

/// A configuration that cannot be used: the client keeps its mail, and the administrator hears
/// why.
#[track_caller]
pub fn a_mistake_is_421(service: &Service) {
    write_config(service.route.folder(), "relay:\n  destination_primry: \"127.0.0.1:1\"\n");
    let mut client = Client::connect(service.address);
    let reply = client.reply();
    assert_eq!(reply.code, 421, "{reply:?}");
    assert!(reply.text().starts_with("4.3.0 "), "{reply:?}");
    client.closed();
    service.wait_log("destination_primry");
    service.program.wait_gone(Duration::from_secs(20));
    // Mended for the next.
    service.route.configure("", "");
    Client::ready(service.address).expect("QUIT", 221);
}

/// The primary is the service itself: the next process is another, and greets like this one.
#[track_caller]
pub fn a_circle_is_seen(service: &Service) {
    let detour = Detour::start();
    detour.lead_to(service.address);
    write_config(service.route.folder(), &config(detour.addr(), &[], "", ""));
    let mut client = Client::greeted(service.address);
    let reply = client.expect("EHLO client.example", 451);
    assert!(reply.text().starts_with("4.4.6 "), "{reply:?}");
    client.expect("QUIT", 221);
    service.wait_log("smtp-dup itself");
    service.program.wait_gone(Duration::from_secs(20));
}

/// The client does not wait for a backup that does not answer, and the process does not for long:
/// twice relay.timeout_seconds.
#[track_caller]
pub fn a_silent_backup_keeps_nobody(service: &Service) {
    const TIMEOUT: u64 = 3;
    service.route.configure("", &format!("timeout_seconds: {TIMEOUT}"));
    let silent = SinkOptions::replying(|event| match event {
        Event::Connect(_) => Action::Silence,
        _ => Action::Default,
    });
    service.route.sinks[2].set_reply(move |event| (silent.reply)(event));
    let mut client = Client::ready(service.address);
    let message = client.message("a@sender.test", &["b@example.com"], &numbered(0));
    assert_eq!(message.code, 250, "{message:?}");
    client.send("QUIT\r\n");
    let since = Instant::now();
    client.expect_reply(221);
    client.closed();
    assert!(since.elapsed() < Duration::from_secs(1), "EOF came after {:?}", since.elapsed());
    // The other backup has its copy at once.
    service.route.sinks[1].wait(1);
    assert!(!service.program.pids().is_empty(), "it did not even try");
    // The second more is for a busy machine.
    let bound = Duration::from_secs(2 * TIMEOUT + 1).saturating_sub(since.elapsed());
    service.program.wait_gone(bound);
    service.wait_log("status=lost");
}

/// A signal to the one process, as a service manager that stops all sends it: what the primary
/// has been given is waited for.
#[track_caller]
pub fn a_signal_does_not_cut(service: &Service, gate: &Gate) {
    service.route.configure("", "timeout_seconds: 1");
    let mut client = Client::ready(service.address);
    client.envelope("a@sender.test", &["b@example.com"]);
    client.send([numbered(0), b".\r\n".to_vec()].concat());
    gate.wait();
    assert!(kill("TERM", service.program.wait_pids(1)[0]));
    assert!(client.is_silent(Duration::from_millis(2500)));
    gate.open();
    client.expect_reply(250);
    service.program.wait_gone(Duration::from_secs(20));
    service.route.wait(1);
}

/// A client that goes away without a word leaves no process.
#[track_caller]
pub fn a_client_that_leaves(service: &Service) {
    drop(Client::connect(service.address));
    drop(Client::ready(service.address));
    let mut client = Client::ready(service.address);
    client.envelope("a@sender.test", &["b@example.com"]);
    client.send("half a line");
    drop(client);
    service.program.wait_gone(Duration::from_secs(20));
    assert_eq!(service.route.sinks.each_ref().map(|sink| sink.accepted()), [0; 3]);
}
