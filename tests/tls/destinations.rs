//! What `tls` at a destination promises: none, opportunistic, required, implicit.

use std::path::Path;

use rustls::{HandshakeKind, ProtocolVersion};
use tempfile::NamedTempFile;

use crate::common::*;
use crate::front::{Front, Handshake, Options};
use crate::pki::{Authority, Pair, file, self_signed};
use crate::{BODY, config, deliver, destination, dup};

/// A server for 127.0.0.1, and the file of its CA.
fn trusted() -> (Front, NamedTempFile) {
    let authority = Authority::new();
    let front = Front::start(&authority.issue("127.0.0.1"));
    (front, file(&authority.pem))
}

fn required(ca: &Path) -> String {
    format!("tls: required, ca_file: \"{}\"", ca.display())
}

/// What the client hears of a primary that is not good enough.
#[track_caller]
fn refused(front: &Front, keys: &str) -> String {
    let dup = dup(front, keys, "");
    let mut client = Client::greeted(dup.addr());
    let reply = client.expect("EHLO client.example", 421);
    client.closed();
    assert!(reply.text().contains(&format!("primary {}", front.addr())), "{reply:?}");
    assert_eq!(front.sink.connections(), 0, "{:?}", front.sink.commands());
    dup.wait_log("is not available: ");
    reply.text()
}

#[test]
fn opportunistic_is_the_default_and_verifies_nothing() {
    let front = Front::start(&self_signed("elsewhere.example"));
    let dup = Dup::start(&config(&format!("\"{}\"", front.addr()), &[], "", ""));
    deliver(&mut Client::ready(dup.addr()));
    let seen = front.wait_secured(1).remove(0);
    assert_eq!(seen.clear, b"EHLO dup.example\r\nSTARTTLS\r\n", "{seen:?}");
    assert_eq!(seen.name, None, "an address is no name to send");
    let line = dup.wait_log(&format!("relay={} TLS: ", front.addr()));
    assert!(line.ends_with("TLS: TLSv1.3 TLS13_AES_256_GCM_SHA384, not verified"), "{line}");
    let messages = front.sink.wait(1);
    assert_eq!(messages[0].data, BODY);
    assert_eq!(front.sink.count("EHLO dup.example"), 1, "EHLO anew, within TLS");
}

#[test]
fn with_none_nothing_is_tried() {
    let front = Front::start(&self_signed("127.0.0.1"));
    let dup = dup(&front, "tls: none", "");
    deliver(&mut Client::ready(dup.addr()));
    assert_eq!(front.sink.wait(1)[0].data, BODY);
    assert!(!String::from_utf8_lossy(&front.seen()[0].clear).contains("STARTTLS"));
    assert!(dup.log_lines(" TLS: ").is_empty());
}

#[test]
fn opportunistic_goes_on_where_starttls_is_refused() {
    for reply in ["454 4.7.0 TLS not available\r\n", "500 what?\r\n", "502 5.5.1 no\r\n"] {
        let mut options = Options::new(&self_signed("127.0.0.1"));
        options.starttls = reply.as_bytes();
        let front = Front::with(options, Sink::start());
        let dup = dup(&front, "tls: opportunistic", "");
        let mut client = Client::ready(dup.addr());
        deliver(&mut client);
        assert_eq!(front.seen().len(), 1, "on the same connection");
        assert_eq!(front.sink.wait(1)[0].data, BODY);
        let line = dup.wait_log("gets mail in clear: STARTTLS: ");
        assert!(line.contains(reply.trim_end()), "{line}");
    }
}

#[test]
fn opportunistic_starts_anew_in_clear_where_the_handshake_fails() {
    let old: &[u8] = b"421 4.3.0 too much for me\r\n";
    for (handshake, starttls) in [
        (Handshake::Close, None),
        (Handshake::Clear, None),
        (Handshake::Stall, None),
        (Handshake::Drip, None),
        (Handshake::Whole, Some(old)),
    ] {
        let mut options = Options::new(&self_signed("127.0.0.1"));
        options.handshake = handshake;
        options.starttls = starttls.unwrap_or(options.starttls);
        let front = Front::with(options, Sink::start());
        let dup = dup(&front, "tls: opportunistic", "command_timeout_seconds: 2");
        let mut client = Client::ready(dup.addr());
        deliver(&mut client);
        assert_eq!(front.sink.wait(1)[0].data, BODY, "{handshake:?}");
        let seen = front.seen();
        assert_eq!(seen.len(), 2, "{handshake:?}: {seen:?}");
        assert_eq!(seen[0].clear, b"EHLO dup.example\r\nSTARTTLS\r\n", "{handshake:?}");
        assert!(seen[1].clear.starts_with(b"EHLO dup.example\r\nMAIL "), "{handshake:?}");
    }
}

#[test]
fn mail_in_clear_is_said_once_until_it_is_over() {
    let pair = self_signed("127.0.0.1");
    let mut options = Options::new(&pair);
    options.handshake = Handshake::Close;
    let front = Front::with(options, Sink::start());
    let dup = dup(&front, "tls: opportunistic", "");
    let deliver_anew = || {
        // A connection of its own: the one in the pool is dead.
        front.sink.close_connections();
        wait_until("connections end", || front.sink.open_connections() == 0);
        deliver(&mut Client::ready(dup.addr()));
    };
    (0..3).for_each(|_| deliver_anew());
    assert_eq!(dup.log_lines("gets mail in clear").len(), 1, "{}", dup.log());
    front.change(|options| options.handshake = Handshake::Whole);
    deliver_anew();
    front.wait_secured(1);
    front.change(|options| options.handshake = Handshake::Close);
    deliver_anew();
    assert_eq!(dup.wait_logs("gets mail in clear", 2).len(), 2);
}

#[test]
fn required_takes_a_certificate_of_the_right_name_and_ca() {
    let (front, ca) = trusted();
    let dup = dup(&front, &required(ca.path()), "");
    deliver(&mut Client::ready(dup.addr()));
    assert_eq!(front.sink.wait(1)[0].data, BODY);
    assert_eq!(front.seen()[0].clear, b"EHLO dup.example\r\nSTARTTLS\r\n");
    dup.wait_log("TLS13_AES_256_GCM_SHA384, verified");
}

#[test]
fn a_backup_can_be_required_to_have_tls() {
    let (front, ca) = trusted();
    let primary = Sink::start();
    let backup = destination(&front, &required(ca.path()));
    let dup = Dup::start(&config(&format!("\"{}\"", primary.addr()), &[backup], "", ""));
    deliver(&mut Client::ready(dup.addr()));
    assert_eq!(front.sink.wait(1)[0].data, BODY);
    dup.wait_log("role=backup delay=");
}

#[test]
fn a_wrong_name_is_named() {
    let authority = Authority::new();
    let front = Front::start(&authority.issue("new.example.com"));
    let ca = file(&authority.pem);
    let text = refused(&front, &required(ca.path()));
    assert!(text.starts_with("4.7.5 "), "{text}");
    for word in ["TLS: ", "not valid for name 127.0.0.1", "new.example.com", "server_name"] {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
    // The key that it names is the remedy.
    let keys = format!("{}, server_name: new.example.com", required(ca.path()));
    let dup = dup(&front, &keys, "");
    deliver(&mut Client::ready(dup.addr()));
    assert_eq!(front.wait_secured(1)[0].name.as_deref(), Some("new.example.com"));
}

#[test]
fn an_expired_certificate_is_refused() {
    let authority = Authority::new();
    let front = Front::start(&authority.issue_expired("127.0.0.1"));
    let text = refused(&front, &required(file(&authority.pem).path()));
    assert!(text.contains("expired at 2021-01-01"), "{text}");
}

#[test]
fn an_unknown_ca_is_refused() {
    let front = Front::start(&Authority::new().issue("127.0.0.1"));
    let text = refused(&front, &required(file(Authority::new().pem).path()));
    for word in ["issuer that is not trusted", "ca_file", "fingerprint"] {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
    wait_until("the server has heard of it", || front.seen()[0].failed);
}

#[test]
fn a_ca_of_the_tests_is_none_of_the_systems() {
    let front = Front::start(&self_signed("127.0.0.1"));
    let refused =
        run(&["check"], Some(&config(&destination(&front, "tls: required"), &[], "", "")), &[]);
    let text = String::from_utf8_lossy(&refused.stdout) + String::from_utf8_lossy(&refused.stderr);
    // A system without CAs says so at the start.
    let is_right =
        text.contains("issuer that is not trusted") || text.contains("no CA certificates");
    assert!(is_right && !refused.status.success(), "{text}");
}

#[test]
fn a_pinned_certificate_is_good_enough_by_itself() {
    let pair = self_signed("elsewhere.example");
    let plain = pair.fingerprint().replace(':', "").to_lowercase();
    for fingerprint in [pair.fingerprint(), plain] {
        let front = Front::start(&pair);
        let dup = dup(&front, &format!("tls: required, fingerprint: \"{fingerprint}\""), "");
        deliver(&mut Client::ready(dup.addr()));
        front.wait_secured(1);
        dup.wait_log(", verified");
    }
}

#[test]
fn another_certificate_than_the_pinned_is_refused() {
    let (pinned, other) = (self_signed("127.0.0.1"), self_signed("127.0.0.1"));
    let front = Front::start(&other);
    let text =
        refused(&front, &format!("tls: required, fingerprint: \"{}\"", pinned.fingerprint()));
    assert!(text.contains(&other.fingerprint()), "{text}");
}

/// The certificate is public: who shows it must have its key.
#[test]
fn a_pinned_certificate_without_its_key_is_refused() {
    let pinned = self_signed("127.0.0.1");
    let thief = Pair { certificate: pinned.certificate.clone(), key: self_signed("x").key };
    let front = Front::with(
        Options { config: thief.server_unchecked(), ..Options::new(&pinned) },
        Sink::start(),
    );
    let text =
        refused(&front, &format!("tls: required, fingerprint: \"{}\"", pinned.fingerprint()));
    assert!(text.contains("TLS: "), "{text}");
}

#[test]
fn implicit_begins_with_the_handshake() {
    let authority = Authority::new();
    let mut options = Options::new(&authority.issue("127.0.0.1"));
    options.implicit = true;
    let front = Front::with(options, Sink::start());
    let ca = file(&authority.pem);
    let dup = dup(&front, &format!("tls: implicit, ca_file: \"{}\"", ca.path().display()), "");
    deliver(&mut Client::ready(dup.addr()));
    assert_eq!(front.sink.wait(1)[0].data, BODY);
    assert_eq!(front.sink.count("STARTTLS"), 0);
}

#[test]
fn implicit_verifies_too() {
    let mut options = Options::new(&self_signed("127.0.0.1"));
    options.implicit = true;
    let front = Front::with(options, Sink::start());
    let ca = file(Authority::new().pem);
    refused(&front, &format!("tls: implicit, ca_file: \"{}\"", ca.path().display()));
}

#[test]
fn both_versions_of_tls_do() {
    let authority = Authority::new();
    let (pair, ca) = (authority.issue("127.0.0.1"), file(&authority.pem));
    for (version, name) in
        [(&rustls::version::TLS12, "TLSv1.2 TLS_"), (&rustls::version::TLS13, "TLSv1.3 TLS13_")]
    {
        let config = pair.server_of(&[version]);
        let front = Front::with(Options { config, ..Options::new(&pair) }, Sink::start());
        let dup = dup(&front, &required(ca.path()), "");
        deliver(&mut Client::ready(dup.addr()));
        dup.wait_log(&format!(" TLS: {name}"));
        let seen = front.wait_secured(1);
        let expected =
            if name.contains("1.2") { ProtocolVersion::TLSv1_2 } else { ProtocolVersion::TLSv1_3 };
        assert_eq!(seen[0].version, Some(expected));
    }
}

#[test]
fn a_second_connection_resumes_the_session() {
    let authority = Authority::new();
    let (pair, ca) = (authority.issue("127.0.0.1"), file(&authority.pem));
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let config = pair.server_of(&[version]);
        let front = Front::with(Options { config, ..Options::new(&pair) }, Sink::start());
        let dup = dup(&front, &required(ca.path()), "");
        deliver(&mut Client::ready(dup.addr()));
        front.sink.close_connections();
        wait_until("connections end", || front.sink.open_connections() == 0);
        deliver(&mut Client::ready(dup.addr()));
        let kinds: Vec<_> = front.wait_secured(2).iter().map(|seen| seen.kind).collect();
        assert_eq!(kinds, [Some(HandshakeKind::Full), Some(HandshakeKind::Resumed)], "{version:?}");
        assert_eq!(dup.wait_logs(", verified", 2).len(), 2);
    }
}

#[test]
fn a_handshake_octet_by_octet() {
    let (front, ca) = trusted();
    front.change(|options| options.handshake = Handshake::OctetByOctet);
    let dup = dup(&front, &required(ca.path()), "");
    deliver(&mut Client::ready(dup.addr()));
    assert_eq!(front.sink.wait(1)[0].data, BODY);
}

#[test]
fn check_says_what_there_is_of_tls() {
    let authority = Authority::new();
    let ca = file(&authority.pem);
    let good = Front::start(&authority.issue("127.0.0.1"));
    let broken = Front::start(&authority.issue("127.0.0.1"));
    broken.change(|options| options.handshake = Handshake::Close);
    let plain = Sink::start();
    let backups = [
        destination(&good, "tls: opportunistic"),
        destination(&broken, "tls: opportunistic"),
        format!("\"{}\"", plain.addr()),
    ];
    let yaml = config(&destination(&good, &required(ca.path())), &[], "", "");
    let output = run(&["check"], Some(&yaml), &[]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("  TLS: TLSv1.3 TLS13_AES_256_GCM_SHA384, verified\n"), "{text}");
    assert_eq!(output.status.code(), Some(0), "{output:?}");

    let output = run(
        &["check"],
        Some(&config(&destination(&good, "tls: none"), &backups[1..], "", "")),
        &[],
    );
    let text = String::from_utf8_lossy(&output.stdout);
    let tls: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("  TLS: ")).collect();
    assert_eq!(tls[0], "none; STARTTLS is offered");
    assert!(tls[1].starts_with("none, for it failed: TLS: "), "{text}");
    assert_eq!(tls[2], "none; STARTTLS is not offered");

    let output = run(&["check"], Some(&config(&backups[2], &backups[..1], "", "")), &[]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("  TLS: TLSv1.3 TLS13_AES_256_GCM_SHA384, not verified\n"), "{text}");
}
