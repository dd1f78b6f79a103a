//! Postfix as primary: smtps, resumed sessions, and what it asks of us.

use tempfile::NamedTempFile;

use super::farm::{Farm, Service};
use crate::common::*;
use crate::instance::can_run;
use crate::pki::{Authority, file};
use crate::{config, deliver};

/// What the client hears of a primary that is not good enough.
#[track_caller]
fn refused(farm: &Farm, name: &str, keys: &str, relay: &str) -> String {
    let dup = Dup::start(&config(&farm.destination(name, keys), &[], "", relay));
    Client::greeted(dup.addr()).expect("EHLO client.example", 421).text()
}

/// A server with a certificate in order for each of these, and the key `ca_file`, whose file is to
/// stay.
fn farm_in_order(services: &[(&'static str, &str)]) -> (Farm, [NamedTempFile; 2], String) {
    let authority = Authority::new();
    let pair = authority.issue("127.0.0.1");
    let files = [file(pair.key.clone() + &pair.certificate), file(&authority.pem)];
    let chain = format!("-o smtpd_tls_chain_files={}", files[0].path().display());
    let services = services
        .iter()
        .map(|(name, options)| Service { name, options: format!("{chain} {options}") })
        .collect::<Vec<_>>();
    let farm = Farm::start(&services, "");
    let key = format!("ca_file: \"{}\"", files[1].path().display());
    (farm, files, key)
}

#[test]
fn smtps_is_implicit() {
    if !can_run(&["postfix"]) {
        return;
    }
    let wrapped = "-o smtpd_tls_wrappermode=yes";
    let (farm, _files, ca) = farm_in_order(&[("smtps", wrapped), ("smtp", "")]);
    let dup = Dup::start(&config(
        &farm.destination("smtps", &format!("tls: implicit, {ca}")),
        &[],
        "",
        "",
    ));
    let body = mail_body(4 << 20);
    let reply = Client::ready(dup.addr()).message("a@example.com", &["b@example.com"], &body);
    assert_eq!(reply.code, 250, "{reply:?}");
    let arrival = farm.wait_arrival("smtps", "b@example.com");
    assert_eq!(arrival.tls(), Some("TLSv1.3"));
    assert!(arrival.message.data.ends_with(&body));
    assert!(dup.wait_log(" TLS: TLSv1.3 ").ends_with(", verified"));

    let other = file(Authority::new().pem);
    let keys = format!("tls: implicit, ca_file: \"{}\"", other.path().display());
    let text = refused(&farm, "smtps", &keys, "");
    assert!(text.contains("issuer that is not trusted"), "{text}");

    // The one for the other.
    let text = refused(&farm, "smtp", &format!("tls: implicit, {ca}"), "");
    assert!(text.starts_with("4.7.5 ") && text.contains("tls: required begins with"), "{text}");
    let quick = "command_timeout_seconds: 1";
    let text = refused(&farm, "smtps", &format!("tls: required, {ca}"), quick);
    assert!(text.contains("greeting: timed out"), "{text}");
}

#[test]
fn sessions_are_resumed() {
    if !can_run(&["postfix"]) {
        return;
    }
    let services = [
        ("tls13", "-o smtpd_tls_loglevel=2"),
        ("tls12", "-o smtpd_tls_loglevel=2 -o smtpd_tls_protocols=TLSv1.2"),
    ];
    let (farm, _files, ca) = farm_in_order(&services);
    for (name, _) in services {
        let keys = format!("tls: required, {ca}");
        let dup = Dup::start(&config(&farm.destination(name, &keys), &[], "", ""));
        // While the first has its connection the second needs another.
        let mut first = Client::ready(dup.addr());
        first.expect("MAIL FROM:<a@example.com>", 250);
        let mut second = Client::ready(dup.addr());
        deliver(&mut second);
        drop(dup);
        farm.wait_at_rest(name, 2);
        let counts = ["TLS connection established", "Reusing old session"]
            .map(|what| farm.log(name, &[what]).len());
        assert_eq!(counts, [2, 1], "{name}: {:#?}", farm.log(name, &[]));
    }
}

#[test]
fn a_server_that_asks_who_we_are() {
    if !can_run(&["postfix"]) {
        return;
    }
    let services = [
        ("asks", "-o smtpd_tls_ask_ccert=yes"),
        ("insists", "-o smtpd_tls_req_ccert=yes -o smtpd_tls_security_level=encrypt"),
        ("encrypts", "-o smtpd_tls_security_level=encrypt"),
    ];
    let (farm, _files, ca) = farm_in_order(&services);
    for level in ["opportunistic".into(), format!("required, {ca}")] {
        for name in ["asks", "encrypts"] {
            let keys = format!("tls: {level}");
            let dup = Dup::start(&config(&farm.destination(name, &keys), &[], "", ""));
            deliver(&mut Client::ready(dup.addr()));
            dup.wait_log(" TLS: TLSv1.3 ");
        }
    }
    // The mail waits for who forgot to switch TLS on, and for who cannot have it.
    let dup = Dup::start(&config(&farm.destination("encrypts", "tls: none"), &[], "", ""));
    let reply = Client::ready(dup.addr()).expect("MAIL FROM:<a@example.com>", 451);
    assert!(reply.text().contains("530 5.7.0 Must issue a STARTTLS command first"), "{reply:?}");

    let text = refused(&farm, "insists", &format!("tls: required, {ca}"), "");
    let said = "EHLO: 421 4.7.1 insists.test Error: No client certificate presented";
    assert!(text.ends_with(said), "{text}");
}
