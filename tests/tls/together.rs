//! TLS where it meets other promises: who the client was, circles, patience, strangers, what is no
//! SMTP. Each holds in clear; here it has to hold behind a handshake.

use std::io::Write;
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use crate::clients::{Server, server, server_before, shake_hands, starting, through};
use crate::common::*;
use crate::front::{Front, Options, swallow_reply};
use crate::pki::{Authority, file};
use crate::{config, deliver, destination};

const OFFER: &str = "XFORWARD NAME ADDR";
const ORIGIN: &str = "XFORWARD NAME=spike.example ADDR=192.0.2.1";

/// What a client says in clear, anybody on the way may have said: it is forgotten behind STARTTLS,
/// here and at the primary.
#[test]
fn who_the_client_was_is_said_anew() {
    let primary = Sink::start();
    primary.set_ehlo(&["PIPELINING", OFFER]);
    let server = server_before(primary, "", "");
    let mut socket = TcpStream::connect(server.dup.addr()).unwrap();
    swallow_reply(&mut socket).unwrap();
    for (line, code) in [("EHLO x", "250"), (ORIGIN, "250"), ("STARTTLS", "220")] {
        socket.write_all(format!("{line}\r\n").as_bytes()).unwrap();
        let reply = swallow_reply(&mut socket).unwrap();
        assert!(reply.starts_with(code.as_bytes()), "{line}: {}", reply.escape_ascii());
    }
    let tls = shake_hands(&mut socket, &server.client, usize::MAX);
    let mut client = through(socket, tls);
    client.expect(ORIGIN, 503);
    client.ehlo();
    deliver(&mut client);
    assert!(server.primary.wait(1)[0].forward.is_empty());
    client.expect(ORIGIN, 250);
    deliver(&mut client);
    assert_eq!(server.primary.wait(2)[1].forward, [ORIGIN]);
    assert_eq!(server.dup.log_lines("orig_client=").len(), 1);
}

/// The copy tells the backup who the client was, behind the handshake alone; also when it has waited
/// in the spool, and goes to another backup than it was for.
#[test]
fn who_the_client_was_goes_through_tls_by_the_spool() {
    let primary = Sink::start();
    primary.set_ehlo(&["PIPELINING", OFFER]);
    let authority = Authority::new();
    let fronts = ["127.0.0.1", "elsewhere.example"].map(|name| {
        let sink = Sink::start();
        sink.set_ehlo(&["PIPELINING", "DSN", OFFER]);
        Front::with(Options::new(&authority.issue(name)), sink)
    });
    let [good, bad] = &fronts;
    let ca = file(&authority.pem);
    let keys = format!("tls: required, ca_file: \"{}\"", ca.path().display());
    let folder = tempfile::tempdir().unwrap();
    let relay = format!("spool: \"{}\"", folder.path().join("spool").display());
    let yaml = |front: &Front| {
        let primary = format!("\"{}\"", primary.addr());
        config(&primary, &[destination(front, &keys)], "", &relay)
    };
    let dup = Dup::start(&yaml(bad));
    let mut client = Client::ready(dup.addr());
    client.expect(ORIGIN, 250);
    deliver(&mut client);
    dup.wait_log("role=backup is down: TLS: ");
    dup.signal(Signal::Term);
    dup.wait_exit(BOUND);
    let said = |words: &[&str]| {
        let output = run(words, Some(&yaml(good)), &[]);
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert!(said(&["queue"]).contains("orphaned"));
    let to = good.addr().to_string();
    assert!(said(&["retry", "--all", "--to", &to]).contains("is due now"));
    assert!(said(&["flush"]).contains("1 copy tried, 0 left, 0 given up"));
    assert_eq!(good.sink.wait(1)[0].forward, [ORIGIN]);
    for front in &fronts {
        for seen in front.seen() {
            assert!(!seen.clear.windows(8).any(|part| part == b"XFORWARD"), "{seen:?}");
        }
    }
    assert!(bad.sink.commands().is_empty());
}

/// A primary behind something that ends TLS for it, and that is smtp-dup itself.
#[test]
fn ourselves_behind_tls() {
    let authority = Authority::new();
    let ca = file(&authority.pem);
    let mut options = Options::new(&authority.issue("127.0.0.1"));
    options.implicit = true;
    let front = Front::with(options, Sink::start());
    let keys = format!("tls: implicit, ca_file: \"{}\"", ca.path().display());
    let dup = Dup::start(&config(&destination(&front, &keys), &[], "", ""));
    front.lead_to(dup.addr());
    let reply = Client::greeted(dup.addr()).expect("EHLO client.example", 451);
    assert!(reply.text().starts_with("4.4.6 "), "{reply:?}");
    assert!(dup.wait_log(" error: ").contains("mail would go in circles"));
}

/// A client that has shaken hands and is in the middle of a message.
fn in_message(server: &Server) -> Client {
    let mut client = server.secured();
    client.ehlo();
    client.envelope("a@example.com", &["b@example.com"]);
    client
}

/// What counts is what comes through TLS, and neither records nor their parts.
#[test]
fn a_trickle_within_tls_ends_in_time() {
    let server = server("timeout_seconds: 2");
    let until_over = |mut client: Client, octets: &'static [u8]| {
        let end = Instant::now() + BOUND;
        while client.try_send(octets) {
            assert!(Instant::now() < end, "a trickle has no end");
            thread::sleep(Duration::from_millis(100));
        }
    };
    thread::scope(|scope| {
        // A command line of a few octets, and a message of 250 octets a second; each of them is a
        // record of more than that.
        scope.spawn(|| until_over(server.secured(), b"N"));
        scope.spawn(|| until_over(in_message(&server), &[b'x'; 25]));
    });
    server.dup.wait_log("nothing was delivered");
    // A record that never comes whole.
    let mut socket = starting(server.dup.addr());
    let mut tls = shake_hands(&mut socket, &server.client, usize::MAX);
    tls.writer().write_all(b"EHLO x\r\n").unwrap();
    tls.write_tls(&mut socket).unwrap();
    socket.write_all(&[23, 3, 3, 0x3f, 0]).unwrap();
    let end = Instant::now() + BOUND;
    while socket.write_all(&[0]).is_ok() {
        assert!(Instant::now() < end, "a trickle has no end");
        thread::sleep(Duration::from_millis(100));
    }
    assert!(server.primary.attempts().is_empty());
    let mut client = server.secured();
    client.ehlo();
    deliver(&mut client);
}

/// A browser speaks TLS as well.
#[test]
fn what_is_no_smtp_within_tls() {
    let server = server("");
    let smuggled = "EHLO x\r\nMAIL FROM:<evil@example.com>\r\n";
    for head in ["POST / HTTP/1.1\r\n", "\x16\x03\x01\x02", "\0\r\n"] {
        let mut client = server.secured();
        client.try_send(format!("{head}{smuggled}"));
        let reply = client.expect_reply(421);
        assert!(reply.text().starts_with("4.7.0 this is SMTP, not "), "{reply:?}");
        client.closed();
    }
    assert_eq!(server.primary.count("MAIL"), 0);
    server.dup.wait_logs("cut off: it sent ", 3);
}

#[test]
fn check_asks_a_primary_with_tls_whether_it_relays() {
    let authority = Authority::new();
    let ca = file(&authority.pem);
    for implicit in [true, false] {
        let mut options = Options::new(&authority.issue("127.0.0.1"));
        options.implicit = implicit;
        let front = Front::with(options, Sink::start());
        let tls = if implicit { "implicit" } else { "required" };
        let keys = format!("tls: {tls}, ca_file: \"{}\"", ca.path().display());
        let yaml = config(&destination(&front, &keys), &[], "allowed_clients: [\"0.0.0.0/0\"]", "");
        let output = run(&["check"], Some(&yaml), &[]);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.contains(", verified\n") && said.contains("OPEN RELAY"), "{said}");
        let commands: Vec<_> = front.sink.commands().into_iter().map(|(_, line)| line).collect();
        let end = ["MAIL FROM:<>", "RCPT TO:<postmaster@relay-test.invalid>", "RSET", "QUIT"];
        assert_eq!(commands[commands.len().saturating_sub(4)..], end, "{commands:?}");
        assert!(front.sink.attempts().is_empty());
    }
}
