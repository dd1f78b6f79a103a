//! Who does not speak SMTP at all is cut off at once, and nothing behind the first line is heeded.

use std::net::SocketAddr;

use crate::common::{Client, Sink};
use crate::{deliver, relay};

/// What must have no effect.
const COMMANDS: &str =
    "EHLO x\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\nx\r\n.\r\n";

/// Sends this, with commands behind it, in each state before a message and in two ways. It has to
/// be cut off as `what`; gives the clients' addresses.
#[track_caller]
fn cut_off(addr: SocketAddr, octets: &[u8], what: &str) -> Vec<SocketAddr> {
    let states = [vec![], vec!["EHLO x"], vec!["EHLO x", "MAIL FROM:<early@example.com>"]];
    let mut clients = Vec::new();
    for state in &states {
        for slowly in [false, true] {
            let mut client = Client::greeted(addr);
            for command in state {
                client.expect(command, 250);
            }
            match slowly {
                false => client.send([octets, b"\r\n\r\n", COMMANDS.as_bytes()].concat()),
                true => {
                    let all = octets.iter().chain(b"\r\n");
                    all.map(|octet| client.try_send([*octet])).take_while(|sent| *sent).count();
                }
            }
            let reply = client.expect_reply(421);
            assert_eq!(reply.text(), format!("4.7.0 this is SMTP, not {what}"));
            client.closed();
            clients.push(client.local_addr());
        }
    }
    clients
}

fn assert_untouched(primary: &Sink) {
    assert!(primary.attempts().is_empty());
    for (_, line) in primary.commands() {
        assert!(!line.contains("a@example.com"), "{line}");
    }
}

#[test]
fn http() {
    let (primary, dup) = relay();
    for first in [
        "GET / HTTP/1.1\r\nHost: localhost:2525\r\nUser-Agent: x",
        "POST /form HTTP/1.1\r\nContent-Type: text/plain",
        "CONNECT mail.example.com:25 HTTP/1.0",
        "OPTIONS * HTTP/1.1",
        "HEAD /",
        "put /x HTTP/1.1",
        "PRI * HTTP/2.0\r\n\r\nSM",
        "Host: localhost:2525",
    ] {
        let line = first.lines().next().unwrap();
        for client in cut_off(dup.addr(), first.as_bytes(), "HTTP") {
            let logged = dup.wait_log(&format!("client={client} cut off"));
            let end = format!("cut off: it sent HTTP, not SMTP: \"{}", &line[..3]);
            assert!(logged.contains("warning: ") && logged.contains(&end), "{logged}");
        }
    }
    assert!(dup.log().contains("\"GET / HTTP/1.1\""), "{}", dup.log());
    // A first line that is longer than any command.
    let long = format!("PUT /{} HTTP/1.1", "x".repeat(10_000));
    let mut client = Client::greeted(dup.addr());
    client.try_send(format!("{long}\r\n{COMMANDS}"));
    client.expect_reply(421);
    assert_untouched(&primary);
    deliver(&mut Client::ready(dup.addr()));
}

#[test]
fn tls_and_binary() {
    let (primary, dup) = relay();
    // A hello goes on, and waits for an answer, without any line end.
    let mut hello = vec![0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    hello.extend(std::iter::repeat_n(0xa5, 506));
    for slowly in [false, true] {
        let mut client = Client::greeted(dup.addr());
        match slowly {
            false => client.send(&hello),
            true => drop(hello.iter().all(|octet| client.try_send([*octet]))),
        }
        let reply = client.expect_reply(421);
        assert_eq!(reply.text(), "4.7.0 this is SMTP, not TLS");
        client.closed();
        let line = dup.wait_log(&format!("client={} cut off", client.local_addr()));
        assert!(line.contains("it sent TLS, not SMTP: \"\\x16\\x03"), "{line}");
    }
    for octets in [
        b"\0".as_slice(),
        b"\x80\x2e\x01\0\x02\0\x15\0\0\0\x10",
        b"\x03\0\0\x13\x0e\xe0\0\0",
        b"\xff\xfe\x00\x01",
        b"\0EHLO x",
        b"EHLO\0x",
    ] {
        cut_off(dup.addr(), octets, "binary data");
    }
    assert_untouched(&primary);
    deliver(&mut Client::ready(dup.addr()));
}

#[test]
fn what_is_merely_unknown_has_its_500() {
    let (_primary, dup) = relay();
    let mut client = Client::ready(dup.addr());
    for line in [
        "GET",
        "GETX / HTTP/1.1",
        "POSTMASTER x",
        "Hosts: x",
        "STAT",
        "a1 LOGIN x y",
        "\u{1b}[A",
        "EHL\u{8}O x",
        "\u{feff}EHLO x",
        "ÄHLO x",
        "Subject: x",
        "X HTTP/1.1",
    ] {
        client.expect(line, 500);
        client.expect("NOOP HTTP/1.1", 250);
    }
    client.expect("EHLO GET / HTTP/1.1", 250);
    client.expect("MAIL FROM:<a\0b@example.com>", 501);
    deliver(&mut client);
}

#[test]
fn auth_is_not_to_be_had() {
    let (primary, dup) = relay();
    primary.set_ehlo(&["PIPELINING", "AUTH PLAIN LOGIN", "AUTH=PLAIN LOGIN"]);
    let mut client = Client::greeted(dup.addr());
    client.expect("AUTH PLAIN AGEAYg==", 502);
    let offered = client.ehlo();
    assert!(!offered.text().contains("AUTH"), "{offered:?}");
    for line in ["AUTH PLAIN AGEAYg==", "AUTH LOGIN", "AUTH CRAM-MD5", "auth", "AUTH PLAIN"] {
        client.expect(line, 502);
    }
    // Nobody has waited for this.
    client.expect("AGEAYg==", 500);
    deliver(&mut client);
    assert!(primary.commands().iter().all(|(_, line)| !line.contains("AUTH")));
}
