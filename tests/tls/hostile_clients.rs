//! Clients, or those between us and them, that mean no good with STARTTLS, and those that go.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use rustls::ClientConnection;

use crate::clients::{server, server_before, shake_hands, starting, through, trusting};
use crate::common::*;
use crate::front::swallow_reply;
use crate::pki::Authority;
use crate::{BODY, deliver};

/// CVE-2011-0411: what was said in clear is never taken for what came through TLS.
#[test]
fn what_stands_behind_starttls_is_refused() {
    for behind in ["EHLO x\r\nMAIL FROM:<evil@example.com>\r\n", "NOOP\r\n", "N", "\r\n", "\0"] {
        let server = server("");
        let mut client = Client::ready(server.dup.addr());
        client.send(format!("STARTTLS\r\n{behind}"));
        client.expect_reply(554);
        client.closed();
        let mut client = Client::greeted(server.dup.addr());
        client.send(format!("EHLO x\r\nSTARTTLS\r\n{behind}"));
        client.expect_reply(250);
        client.expect_reply(554);
        client.closed();
        assert_eq!(server.primary.count("MAIL"), 0);
        server.dup.wait_log("TLS failed: octets behind STARTTLS");
    }
}

/// Nor when they come a little later, where no one could know them from the handshake.
#[test]
fn what_comes_in_clear_behind_the_220_is_no_command() {
    let server = server("");
    let mut socket = starting(server.dup.addr());
    socket
        .write_all(b"EHLO x\r\nMAIL FROM:<evil@example.com>\r\nRCPT TO:<b@example.com>\r\n")
        .unwrap();
    let mut heard = Vec::new();
    let _ = socket.read_to_end(&mut heard);
    assert!(!heard.starts_with(b"2") && !heard.starts_with(b"5"), "{}", heard.escape_ascii());
    server.dup.wait_log("TLS failed: ");
    assert_eq!(server.primary.count("MAIL"), 0);
    // The server is well.
    let mut client = server.secured();
    client.ehlo();
    deliver(&mut client);
}

#[test]
fn a_handshake_octet_by_octet() {
    let server = server("");
    let mut socket = starting(server.dup.addr());
    let tls = shake_hands(&mut socket, &server.client, 1);
    let mut client = through(socket, tls);
    client.ehlo();
    deliver(&mut client);
}

/// Neither a client that says nothing, nor one that says an octet from time to time, keeps its
/// worker for longer than the silence that a client may keep.
#[test]
fn a_handshake_that_does_not_end_is_ended() {
    let server = server("timeout_seconds: 2\nmax_connections: 1");
    for drips in [false, true] {
        let mut socket = starting(server.dup.addr());
        let mut dripping = socket.try_clone().unwrap();
        if drips {
            thread::spawn(move || {
                // The head of a record that never comes.
                let _ = dripping.write_all(&[22, 3, 1, 0x3f, 0]);
                while dripping.write_all(&[0]).is_ok() {
                    thread::sleep(Duration::from_millis(100));
                }
            });
        }
        let _ = socket.read_to_end(&mut Vec::new());
        server.dup.wait_logs("TLS failed: timed out", 1 + usize::from(drips));
        deliver(&mut Client::ready(server.dup.addr()));
    }
}

#[test]
fn a_client_that_goes_in_the_handshake() {
    let server = server("");
    drop(starting(server.dup.addr()));
    server.dup.wait_log("TLS failed: closed in the handshake");
    let mut socket = starting(server.dup.addr());
    // A client that trusts another CA.
    let other = trusting(&Authority::new(), rustls::ALL_VERSIONS);
    let mut tls = ClientConnection::new(other, "dup.example".try_into().unwrap()).unwrap();
    assert!(tls.complete_io(&mut socket).is_err());
    server.dup.wait_logs("TLS failed: ", 2);
    deliver(&mut Client::ready(server.dup.addr()));
}

#[test]
fn stopping_ends_handshakes_and_idle_sessions_at_once() {
    // What would be the time of transactions, which neither of them has.
    let server = server_before(Sink::start(), "", "timeout_seconds: 300");
    let mut stuck = starting(server.dup.addr());
    let mut idle = server.secured();
    idle.ehlo();
    server.dup.signal(Signal::Term);
    idle.expect_reply(421);
    idle.closed();
    let _ = stuck.read_to_end(&mut Vec::new());
    assert!(server.dup.wait_exit(BOUND).success());
}

#[test]
fn a_client_that_goes_within_a_message() {
    let server = server("");
    let mut client = server.secured();
    client.ehlo();
    client.envelope("a@example.com", &["b@example.com"]);
    client.send(BODY);
    client.half_close();
    server.dup.wait_log("nothing was delivered");
    assert!(server.primary.attempts().is_empty());
}

/// Nor is a failure of the primary remembered, that belonged to what was said in clear.
#[test]
fn a_failed_transaction_is_forgotten() {
    let primary = Sink::replying(|event| match event {
        Event::Mail(line) if line.contains("bad") => Action::Close,
        _ => Action::Default,
    });
    let server = server_before(primary, "", "");
    let mut socket = TcpStream::connect(server.dup.addr()).unwrap();
    swallow_reply(&mut socket).unwrap();
    for (line, code) in
        [("EHLO x", "250"), ("MAIL FROM:<bad@example.com>", "451"), ("STARTTLS", "220")]
    {
        socket.write_all(format!("{line}\r\n").as_bytes()).unwrap();
        let reply = swallow_reply(&mut socket).unwrap();
        assert!(reply.starts_with(code.as_bytes()), "{line}: {}", reply.escape_ascii());
    }
    let tls = shake_hands(&mut socket, &server.client, usize::MAX);
    let mut client = through(socket, tls);
    client.ehlo();
    deliver(&mut client);
}
