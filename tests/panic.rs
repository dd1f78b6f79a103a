//! A defect of ours, in the middle of a session: its client hears 421, the log says where, and
//! everybody else is served as before.
//!
//! The defect is a logger of this test, that panics at a certain recipient: the program itself has
//! no place where that could be asked for. There is one logger in a process, so this has one.

#[path = "common/mod.rs"]
mod common;
#[cfg(feature = "tls")]
#[path = "tls/pki.rs"]
#[allow(dead_code)]
mod pki;

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
    logger::start([Place::Stderr], LevelFilter::Debug);

    let primary = Sink::replying(|event| match event {
        Event::Rcpt(line) if line.contains("defect@") => Action::reply("550 5.1.1 unknown"),
        _ => Action::Default,
    });
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("test.yaml");
    let smtp = format!("max_connections: 2\n{}", identity(folder.path()));
    std::fs::write(&file, config(primary.addr(), &[], &smtp, "")).unwrap();
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
        #[cfg(feature = "tls")]
        through_tls(addr);
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

/// What it takes to offer STARTTLS, in files of this folder, as lines of the section.
#[cfg(feature = "tls")]
fn identity(folder: &std::path::Path) -> String {
    use std::os::unix::fs::PermissionsExt;
    let pair = pki::self_signed("dup.example");
    let (certificate, key) = (folder.join("cert.pem"), folder.join("key.pem"));
    std::fs::write(&certificate, &pair.certificate).unwrap();
    std::fs::write(&key, &pair.key).unwrap();
    std::fs::set_permissions(&key, PermissionsExt::from_mode(0o600)).unwrap();
    let (certificate, key) = (certificate.display(), key.display());
    format!("tls_certificate: \"{certificate}\"\ntls_key: \"{key}\"")
}

#[cfg(not(feature = "tls"))]
fn identity(_: &std::path::Path) -> String {
    String::new()
}

/// The 421 comes through TLS like every reply, and then its end.
#[cfg(feature = "tls")]
fn through_tls(addr: std::net::SocketAddr) {
    use std::process::{Command, Stdio};
    if Command::new("openssl").arg("version").output().is_err() {
        assert!(std::env::var_os("CI").is_none(), "there is no openssl");
        return eprintln!("skipped: there is no openssl");
    }
    let bound = common::BOUND.as_secs().to_string();
    let mut openssl = Command::new("timeout")
        .args([&bound, "openssl", "s_client", "-starttls", "smtp", "-quiet", "-ign_eof"])
        .args(["-connect", &addr.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let commands =
        b"EHLO x\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<defect@example.com>\r\nDATA\r\n";
    std::io::Write::write_all(openssl.stdin.as_mut().unwrap(), commands).unwrap();
    let output = openssl.wait_with_output().unwrap();
    let heard = String::from_utf8_lossy(&output.stdout);
    assert!(heard.lines().last().is_some_and(|line| line.starts_with("421 4.3.0 ")), "{heard}");
}
