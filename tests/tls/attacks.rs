//! Somebody stands between smtp-dup and a destination, or a destination is no good: with
//! `tls: required` nothing is sent in clear, and nobody is held up.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::common::*;
use crate::front::{Front, Handshake, Options};
use crate::pki::{Authority, file, self_signed};
use crate::{BODY, config, deliver, destination, dup};

/// All that may be heard of smtp-dup in clear under `tls: required`.
const IN_CLEAR: [&[u8]; 2] = [b"EHLO dup.example\r\n", b"EHLO dup.example\r\nSTARTTLS\r\n"];

fn pinned(front: &Options, pair: &crate::pki::Pair) -> (Front, String) {
    let front = Front::with(front.clone(), Sink::start());
    let keys = format!("tls: required, fingerprint: \"{}\"", pair.fingerprint());
    (front, keys)
}

/// The primary is not good enough, and has heard nothing that it should not. What the client heard.
#[track_caller]
fn nothing_in_clear(front: &Front, keys: &str) -> String {
    let dup = dup(front, keys, "command_timeout_seconds: 2");
    let mut client = Client::greeted(dup.addr());
    let reply = client.expect("EHLO client.example", 421);
    client.closed();
    drop(dup);
    for seen in front.seen() {
        // A record of the handshake is none.
        let tls = memchr::memmem::find(&seen.clear, b"\r\n\x16\x03").map(|at| at + 2);
        let clear = &seen.clear[..tls.unwrap_or(seen.clear.len())];
        assert!(IN_CLEAR.contains(&clear), "heard \"{}\"", clear.escape_ascii());
    }
    assert_eq!(front.sink.connections(), 0, "{:?}", front.sink.commands());
    reply.text()
}

#[test]
fn a_stripped_starttls_is_no_way_to_clear_text() {
    let pair = self_signed("127.0.0.1");
    let mut options = Options::new(&pair);
    options.ehlo = vec!["PIPELINING", "XXXXXXXX"];
    let (front, keys) = pinned(&options, &pair);
    let text = nothing_in_clear(&front, &keys);
    assert!(text.starts_with("4.7.4 "), "{text}");
    assert!(text.contains("STARTTLS: not offered, and tls: required"), "{text}");
}

/// Whoever does not want us at all hears no word.
#[test]
fn a_greeting_that_refuses_is_left_without_a_word() {
    let pair = self_signed("127.0.0.1");
    let keys = format!("tls: required, fingerprint: \"{}\"", pair.fingerprint());
    for greeting in ["554 5.7.1 go away", "421 4.3.2 later"] {
        let sink = Sink::replying(move |event| match event {
            Event::Connect(_) => Action::reply(greeting),
            _ => Action::Default,
        });
        let primary = format!("{{address: \"{}\", {keys}}}", sink.addr());
        let dup = Dup::start(&config(&primary, &[], "", ""));
        let heard = Client::greeted(dup.addr()).expect("EHLO client.example", 421);
        assert!(heard.text().contains(greeting), "{heard:?}");
        sink.wait_for("the end", |sink| sink.connections() == 1 && sink.open_connections() == 0);
        assert!(sink.commands().is_empty(), "{:?}", sink.commands());
    }
}

#[test]
fn a_refused_starttls_is_no_way_to_clear_text() {
    for reply in ["454 4.7.0 later\r\n", "502 5.5.1 what?\r\n", "354 go on\r\n", "xyz\r\n"] {
        let pair = self_signed("127.0.0.1");
        let mut options = Options::new(&pair);
        options.starttls = reply.as_bytes();
        let (front, keys) = pinned(&options, &pair);
        let text = nothing_in_clear(&front, &keys);
        assert!(text.contains("STARTTLS: "), "{text}");
        assert!(text.contains(reply.trim_end()), "{text}");
    }
}

/// CVE-2011-0411, from the server's side: what was said in clear must not count afterwards.
#[test]
fn what_is_injected_behind_the_220_is_an_error() {
    for injected in [
        "220 go ahead\r\n250-front.example\r\n250 AUTH PLAIN\r\n",
        "220 go ahead\r\n2",
        "220 go ahead\r\n220 go ahead\r\n",
    ] {
        let pair = self_signed("127.0.0.1");
        let mut options = Options::new(&pair);
        options.starttls = injected.as_bytes();
        let (front, keys) = pinned(&options, &pair);
        let text = nothing_in_clear(&front, &keys);
        assert!(text.contains("STARTTLS: ") && text.contains("before its time"), "{text}");
    }
}

/// Said before STARTTLS, it would shift all replies by one, those within TLS included.
#[test]
fn what_is_injected_behind_ehlo_is_an_error() {
    for injected in ["220 go ahead\r\n", "220 go ahead\r\n250 front.example\r\n", "2"] {
        let pair = self_signed("127.0.0.1");
        let mut options = Options::new(&pair);
        options.behind_ehlo = injected.as_bytes();
        let (front, keys) = pinned(&options, &pair);
        nothing_in_clear(&front, &keys);
    }
}

#[test]
fn a_broken_handshake_is_no_way_to_clear_text() {
    for handshake in [Handshake::Close, Handshake::Clear, Handshake::Stall, Handshake::Drip] {
        let pair = self_signed("127.0.0.1");
        let mut options = Options::new(&pair);
        options.handshake = handshake;
        let (front, keys) = pinned(&options, &pair);
        let text = nothing_in_clear(&front, &keys);
        assert!(text.contains("TLS: "), "{handshake:?}: {text}");
        let is_slow = matches!(handshake, Handshake::Stall | Handshake::Drip);
        assert_eq!(text.contains("TLS: timed out"), is_slow, "{handshake:?}: {text}");
    }
}

#[test]
fn what_was_offered_in_clear_is_forgotten() {
    let pair = self_signed("127.0.0.1");
    let mut options = Options::new(&pair);
    options.ehlo = vec!["PIPELINING", "STARTTLS", "DSN", "SMTPUTF8", "SIZE 5"];
    let (front, keys) = pinned(&options, &pair);
    front.sink.set_ehlo(&["8BITMIME"]);
    let dup = dup(&front, &keys, "");
    let mut client = Client::greeted(dup.addr());
    let reply = client.ehlo();
    assert!(reply.offers("8BITMIME"), "{reply:?}");
    for keyword in ["DSN", "SMTPUTF8", "SIZE", "STARTTLS"] {
        assert!(!reply.offers(keyword), "{reply:?}");
    }
    deliver(&mut client);
}

/// One that does not get on with the handshake must not keep the program from its end.
#[test]
fn stopping_ends_a_handshake() {
    for handshake in [Handshake::Stall, Handshake::Drip] {
        let pair = self_signed("127.0.0.1");
        let mut options = Options::new(&pair);
        options.handshake = handshake;
        let (front, keys) = pinned(&options, &pair);
        let dup = dup(&front, &keys, "timeout_seconds: 1");
        let mut client = Client::greeted(dup.addr());
        client.send("EHLO client.example\r\n");
        wait_until("the handshake", || {
            front.seen().first().is_some_and(|s| s.clear.ends_with(b"STARTTLS\r\n"))
        });
        dup.signal(Signal::Term);
        client.expect_reply(421);
        assert!(dup.wait_exit(BOUND).success());
    }
}

#[test]
fn a_backup_without_tls_is_held_and_loses_nothing() {
    let pair = self_signed("127.0.0.1");
    let mut options = Options::new(&pair);
    options.ehlo = vec!["PIPELINING"];
    let (front, keys) = pinned(&options, &pair);
    let primary = Sink::start();
    let yaml = config(&format!("\"{}\"", primary.addr()), &[destination(&front, &keys)], "", "");
    let dup = Dup::start(&yaml);
    deliver(&mut Client::ready(dup.addr()));
    let line = dup.wait_log("role=backup is down: ");
    assert!(line.contains("STARTTLS: not offered, and tls: required"), "{line}");
    assert_eq!(front.sink.connections(), 0);
    front.change(|options| options.ehlo = vec!["STARTTLS"]);
    assert_eq!(front.sink.wait(1)[0].data, BODY);
    dup.wait_log("is back");
}

/// A session that is cut says nothing of itself: it ends as a connection in clear does.
#[test]
fn an_end_without_close_notify_is_an_end() {
    for says_close in [true, false] {
        let pair = self_signed("127.0.0.1");
        let options = Options { says_close, ..Options::new(&pair) };
        let front = Front::with(
            options,
            Sink::replying(|event| match event {
                Event::Rcpt(line) if line.contains("lost") => Action::Close,
                _ => Action::Default,
            }),
        );
        let keys = format!("tls: required, fingerprint: \"{}\"", pair.fingerprint());
        let dup = dup(&front, &keys, "");
        let mut client = Client::ready(dup.addr());
        client.expect("MAIL FROM:<a@example.com>", 250);
        let reply = client.expect("RCPT TO:<lost@example.com>", 451);
        assert!(reply.text().contains("RCPT: lost connection"), "{reply:?}");
        client.expect("RSET", 250);
        // One in the pool that ends is replaced, unseen.
        deliver(&mut client);
        front.sink.close_connections();
        wait_until("connections end", || front.sink.open_connections() == 0);
        deliver(&mut client);
    }
}

/// Passes octets on and keeps those that came from smtp-dup, to look for text in them.
struct Wiretap {
    addr: SocketAddr,
    heard: Arc<Mutex<Vec<u8>>>,
}

impl Wiretap {
    fn before(server: SocketAddr) -> Wiretap {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&heard);
        thread::spawn(move || {
            for inner in listener.incoming() {
                let (mut inner, mut outer) = (inner.unwrap(), TcpStream::connect(server).unwrap());
                let (mut back, mut forth) =
                    (outer.try_clone().unwrap(), inner.try_clone().unwrap());
                thread::spawn(move || std::io::copy(&mut back, &mut forth));
                let kept = Arc::clone(&kept);
                thread::spawn(move || {
                    let mut octets = [0; 4096];
                    while let Ok(count @ 1..) = inner.read(&mut octets) {
                        kept.lock().unwrap().extend_from_slice(&octets[..count]);
                        if outer.write_all(&octets[..count]).is_err() {
                            break;
                        }
                    }
                    let _ = outer.shutdown(std::net::Shutdown::Write);
                });
            }
        });
        Wiretap { addr, heard }
    }
}

#[test]
fn who_listens_hears_no_mail() {
    let pair = self_signed("127.0.0.1");
    let (front, keys) = pinned(&Options::new(&pair), &pair);
    let tap = Wiretap::before(front.addr());
    let primary = format!("{{address: \"{}\", {keys}}}", tap.addr);
    let dup = Dup::start(&config(&primary, &[], "", ""));
    let mut client = Client::ready(dup.addr());
    deliver(&mut client);
    client.expect("QUIT", 221);
    dup.signal(Signal::Term);
    assert!(dup.wait_exit(BOUND).success());
    front.sink.wait(1);
    let heard = tap.heard.lock().unwrap().clone();
    assert!(
        heard.starts_with(b"EHLO dup.example\r\nSTARTTLS\r\n\x16\x03"),
        "{}",
        heard.escape_ascii()
    );
    for text in ["MAIL", "RCPT", "DATA", "example.com", "Hello", "QUIT"] {
        let is_there = memchr::memmem::find(&heard, text.as_bytes()).is_some();
        assert!(!is_there, "{text} in {}", heard.escape_ascii());
    }
}

/// The thread of a client is held for as long as the step may take, and no longer.
#[test]
fn a_dripping_handshake_ends_in_time() {
    let pair = self_signed("127.0.0.1");
    let authority = Authority::new();
    let ca = file(&authority.pem);
    let mut options = Options::new(&pair);
    options.handshake = Handshake::Drip;
    options.implicit = true;
    let front = Front::with(options, Sink::start());
    let keys = format!("tls: implicit, ca_file: \"{}\"", ca.path().display());
    let dup = dup(&front, &keys, "command_timeout_seconds: 1");
    let mut client = Client::greeted(dup.addr());
    let reply = client.expect("EHLO client.example", 421);
    assert!(reply.text().contains("TLS: timed out"), "{reply:?}");
}
