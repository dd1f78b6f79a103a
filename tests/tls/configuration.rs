//! Mistakes in the keys for TLS, each refused at the start with the key, what is wrong, and the
//! remedy.

use std::process::Output;

use crate::common::*;
use crate::config;
use crate::pki::{Authority, file};

/// Refused with exit code 2 and one line that has all of `words`.
#[track_caller]
fn assert_refused(output: &Output, words: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert_eq!(stderr.matches('\n').count(), 1, "not one line: {stderr}");
    for word in words {
        assert!(stderr.contains(word), "no {word:?} in: {stderr}");
    }
}

/// A primary with these keys.
fn with(keys: &str) -> Output {
    let primary = format!("{{address: \"127.0.0.1:1\", {keys}}}");
    run(&["check"], Some(&config(&primary, &[], "", "")), &[])
}

#[track_caller]
fn refused(keys: &str, words: &[&str]) {
    assert_refused(
        &with(keys),
        &[&["relay.destination_primary", "\"127.0.0.1:1\""], words].concat(),
    );
}

#[test]
fn words_that_are_none() {
    refused("tls: true", &["tls: true is not a text"]);
    refused("tls: \"must\"", &["tls: \"must\"", "none, opportunistic, required and implicit"]);
    refused("tls: Required", &["tls: \"Required\""]);
    let typing = with("ca_flie: \"/etc/ca.pem\"");
    assert_refused(&typing, &["ca_flie: not a known key; did you mean ca_file?"]);
}

#[test]
fn what_only_counts_where_certificates_are_verified() {
    let digits = "ab".repeat(32);
    for tls in ["", "tls: none, ", "tls: opportunistic, "] {
        for (key, value) in
            [("ca_file", "/etc/ca.pem"), ("fingerprint", &digits), ("server_name", "x.example")]
        {
            refused(
                &format!("{tls}{key}: \"{value}\""),
                &[&format!("{key}: with tls: "), "write tls: required"],
            );
        }
    }
}

#[test]
fn a_ca_file_that_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("none.pem").display().to_string();
    refused(
        &format!("tls: required, ca_file: \"{missing}\""),
        &["ca_file: ", &missing, "No such file"],
    );
    for text in ["", "no certificate\n", &Authority::new().issue("x").key] {
        let file = file(text);
        let name = file.path().display().to_string();
        refused(
            &format!("tls: required, ca_file: \"{name}\""),
            &["ca_file: ", &name, "holds no certificate", "PEM"],
        );
    }
    refused("tls: required, ca_file: ca.pem", &["ca_file: is no whole path", "begins with /"]);
    let broken = file("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
    refused(&format!("tls: implicit, ca_file: \"{}\"", broken.path().display()), &["ca_file: "]);
}

#[test]
fn a_fingerprint_that_is_none() {
    for text in ["", "abc", "xy:zz", &"a".repeat(63), &"g".repeat(64), &"a".repeat(40)] {
        refused(
            &format!("tls: required, fingerprint: \"{text}\""),
            &[&format!("fingerprint: \"{text}\""), "openssl x509 -noout -fingerprint -sha256"],
        );
    }
    let ca = file(Authority::new().pem);
    let both =
        format!("ca_file: \"{}\", fingerprint: \"{}\"", ca.path().display(), "ab".repeat(32));
    refused(&format!("tls: required, {both}"), &["ca_file, fingerprint", "one of them"]);
}

#[test]
fn a_name_that_no_certificate_can_have() {
    let ca = file(Authority::new().pem);
    let ca = format!("tls: required, ca_file: \"{}\"", ca.path().display());
    refused(&format!("{ca}, server_name: \"a b\""), &["\"a b\"", "server_name"]);
    // Where nobody verifies it, it does not matter.
    let primary = Sink::start();
    let port = primary.addr().port();
    let output = run(
        &["check"],
        Some(&config(&format!("\"127.0.0.1:{port}\""), &[format!("\"-x_:{port}\"")], "", "")),
        &[],
    );
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

#[test]
fn the_same_server_with_other_keys_is_the_same_server() {
    let twice = ["{address: \"127.0.0.1:2\", tls: none}".into(), "\"127.0.0.1:2\"".into()];
    let output = run(&["check"], Some(&config("\"127.0.0.1:1\"", &twice, "", "")), &[]);
    assert_refused(&output, &["relay.destination_backups", "stands there twice"]);
    let output = run(&["check"], Some(&config("\"127.0.0.1:2\"", &twice[..1], "", "")), &[]);
    assert_refused(&output, &["relay.destination_backups", "is the primary as well"]);
}
