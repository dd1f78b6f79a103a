//! What is said of a destination whose certificate is not in order: what is wrong with it, and the
//! key that would cure it.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;

use crate::common::*;
use crate::front::Front;
use crate::pki::{Authority, Pair, file, self_signed};
use crate::{config, deliver, destination, dup};

/// What `check` says of a server that shows this certificate, where `authority` is the CA.
#[track_caller]
fn said_of(pair: &Pair, authority: &Authority) -> String {
    let front = Front::start(pair);
    let ca = file(&authority.pem);
    let keys = format!("tls: required, ca_file: \"{}\"", ca.path().display());
    let output = run(&["check"], Some(&config(&destination(&front, &keys), &[], "", "")), &[]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().find_map(|line| line.split_once(" FAILED: TLS: ")).unwrap().1.into()
}

/// The fingerprint that was recommended does it.
#[track_caller]
fn pinned(pair: &Pair) {
    let front = Front::start(pair);
    let keys = format!("tls: required, fingerprint: \"{}\"", pair.fingerprint());
    deliver(&mut Client::ready(dup(&front, &keys, "").addr()));
}

#[test]
fn names() {
    let authority = Authority::new();
    for name in ["new.example.com", "192.0.2.1"] {
        assert_eq!(
            said_of(&authority.issue(name), &authority),
            format!(
                "the certificate is not valid for name 127.0.0.1, but for {name}; set server_name"
            )
        );
    }
}

/// As openssl makes them unless it is told otherwise.
#[test]
fn a_name_in_cn_alone() {
    let authority = Authority::new();
    let pair = authority.issue_nameless("127.0.0.1");
    let said = said_of(&pair, &authority);
    assert_eq!(
        said,
        "the certificate is for no name (the one in CN does not count); set fingerprint"
    );
    pinned(&pair);
}

/// A machine without a battery for its clock wakes up in 1970.
#[test]
fn a_clock_that_is_wrong() {
    let authority = Authority::new();
    let pair = authority.issue_early("127.0.0.1");
    let said = said_of(&pair, &authority);
    let expected =
        "the certificate is not valid before 2090-01-01T00:00:00Z, and the clock here says 20";
    assert!(said.starts_with(expected), "{said}");
    assert!(said.ends_with("Z; set the clock, or fingerprint"), "{said}");
    pinned(&pair);
}

/// So are those that sign themselves, and are CAs at the same time.
#[test]
fn the_certificate_of_a_ca() {
    let authority = Authority::new();
    let pair = authority.pair();
    let said = said_of(&pair, &authority);
    assert!(said.ends_with("CaUsedAsEndEntity; set fingerprint, or renew it"), "{said}");
    pinned(&pair);
}

/// A server in clear where TLS is to begin: the wrong port for `tls: implicit`.
#[test]
fn what_is_no_tls() {
    let plain = Sink::start();
    let keys = format!("tls: implicit, fingerprint: \"{}\"", self_signed("x").fingerprint());
    let primary = format!("{{address: \"{}\", {keys}}}", plain.addr());
    let output = run(&["check"], Some(&config(&primary, &[], "", "")), &[]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("TLS: what the server says is no TLS "), "{text}");
    assert!(text.contains("tls: required begins with STARTTLS"), "{text}");
}

/// A server from before TLS 1.3 sends no alert, but answers with what it has.
#[test]
fn a_server_of_old() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        let mut hello = [0; 4096];
        assert_ne!(socket.read(&mut hello).unwrap(), 0);
        // A record of TLS 1.0 with its ServerHello: version, random, no session, cipher 0x002f.
        let mut answer = vec![22, 3, 1, 0, 42, 2, 0, 0, 38, 3, 1];
        answer.extend([7; 32]);
        answer.extend([0, 0, 0x2f, 0]);
        socket.write_all(&answer).unwrap();
        let _ = socket.read(&mut hello);
    });
    let keys = format!("tls: implicit, fingerprint: \"{}\"", self_signed("x").fingerprint());
    let primary = format!("{{address: \"{addr}\", {keys}}}");
    let output = run(&["check"], Some(&config(&primary, &[], "", "")), &[]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("TLS: the server takes neither TLS 1.2 nor TLS 1.3: "), "{text}");
}
