//! Mistakes in the keys for TLS, each refused at the start with the key, what is wrong, and the
//! remedy.

use std::os::unix::fs::PermissionsExt;
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

/// A file with a password, and the keys that name it.
fn password(text: &str) -> (tempfile::NamedTempFile, String) {
    let file = file(text);
    let keys = format!("username: relay, password_file: \"{}\"", file.path().display());
    (file, keys)
}

/// TLS that would be good enough, if there were a server.
fn pinned() -> String {
    format!("tls: required, fingerprint: \"{}\"", "ab".repeat(32))
}

#[test]
fn a_password_has_no_place_in_the_file() {
    let words = ["password: does not belong into this file", "password_file"];
    refused_silently("tls: required, username: relay, password: HushHush1", &words);
    refused_silently(
        &format!("{}, username: relay, password_file: HushHush1", pinned()),
        &["password_file: is no whole path"],
    );
}

/// As `refused`, and the secret is not shown. The name of the destination need not be.
#[track_caller]
fn refused_silently(keys: &str, words: &[&str]) {
    let output = with(keys);
    assert_refused(&output, words);
    assert!(!String::from_utf8_lossy(&output.stderr).contains("HushHush1"), "{output:?}");
}

#[test]
fn one_half_of_a_login() {
    let (_file, keys) = password("HushHush1\n");
    let (name, file) = keys.split_once(", ").unwrap();
    refused(&format!("{}, {name}", pinned()), &["username: without password_file"]);
    refused(&format!("{}, {file}", pinned()), &["password_file: without username"]);
    for name in ["\"\"", "\"a\\0b\"", "\"a\\nb\""] {
        refused(&format!("{}, username: {name}, {file}", pinned()), &["username: "]);
    }
}

#[test]
fn a_password_is_not_given_to_anybody() {
    let (_file, keys) = password("HushHush1\n");
    for tls in ["", "tls: opportunistic, "] {
        refused(&format!("{tls}{keys}"), &["username: with tls: opportunistic", "tls: required"]);
    }
    for allow in ["", ", allow_plaintext_auth: false"] {
        refused(
            &format!("tls: none, {keys}{allow}"),
            &["username: with tls: none", "allow_plaintext_auth: true"],
        );
    }
    for elsewhere in [
        format!("{}, {keys}", pinned()),
        keys.clone(),
        format!("tls: opportunistic, {keys}"),
        "tls: none".into(),
        pinned(),
    ] {
        refused(&format!("{elsewhere}, allow_plaintext_auth: true"), &["allow_plaintext_auth: "]);
    }
    refused("allow_plaintext_auth: maybe", &["allow_plaintext_auth: ", "true nor false"]);
}

#[test]
fn a_password_file_that_holds_none() {
    for text in ["", "\n", "\r\nHushHush1\n", "a\0b\n"] {
        let (file, keys) = password(text);
        let name = file.path().display().to_string();
        refused(&format!("{}, {keys}", pinned()), &["password_file: ", &name, "its first line"]);
    }
    let file = file(b"\xff\xfe\n");
    let keys = format!("username: relay, password_file: \"{}\"", file.path().display());
    refused(&format!("{}, {keys}", pinned()), &["password_file: ", "UTF-8"]);
    refused(
        &format!("{}, username: relay, password_file: /none/there", pinned()),
        &["password_file: /none/there: No such file", "first line"],
    );
}

#[test]
fn a_password_file_that_others_may_read() {
    let (file, keys) = password("HushHush1\n");
    let keys = format!("{}, {keys}", pinned());
    let mode = |mode| {
        std::fs::set_permissions(file.path(), PermissionsExt::from_mode(mode)).unwrap();
    };
    for bad in [0o644, 0o604, 0o602, 0o620, 0o660, 0o666, 0o641] {
        mode(bad);
        refused(&keys, &["password_file: ", &format!("mode {bad:04o}"), "chmod g-w,o-rwx"]);
    }
    // The primary is not there, which is another matter.
    for good in [0o600, 0o400, 0o640, 0o440] {
        mode(good);
        let output = with(&keys);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
    }
    if nix::unistd::Uid::effective().is_root() {
        mode(0o600);
        std::os::unix::fs::chown(file.path(), Some(65534), None).unwrap();
        let primary = format!("{{address: \"127.0.0.1:1\", {keys}}}");
        let yaml = config(&primary, &[], "", "");
        let output = run(&["--user", "daemon", "check"], Some(&yaml), &[]);
        let words = ["password_file: ", "belongs to user 65534", "chown root"];
        assert_refused(&output, &words);
    }
}

/// The two files that clients' TLS needs, as lines of the section.
fn identity(certificate: &str, key: &str) -> Output {
    let lines = [("tls_certificate", certificate), ("tls_key", key)];
    let lines = lines.iter().filter(|(_, file)| !file.is_empty());
    let lines: String = lines.map(|(key, file)| format!("{key}: \"{file}\"\n")).collect();
    run(&["check"], Some(&config("\"127.0.0.1:1\"", &[], &lines, "")), &[])
}

#[test]
fn a_certificate_and_a_key_that_do_not_do() {
    let authority = Authority::new();
    let (one, other) = (authority.issue("a.example"), authority.issue("b.example"));
    let (certificate, key) = (file(&one.certificate), file(&one.key));
    let name = |file: &tempfile::NamedTempFile| file.path().display().to_string();
    let (certificate_name, key_name) = (name(&certificate), name(&key));
    // The primary is not there, which is another matter.
    assert_eq!(identity(&certificate_name, &key_name).status.code(), Some(1));

    assert_refused(
        &identity(&certificate_name, ""),
        &["smtp.tls_certificate: ", "without smtp.tls_key"],
    );
    assert_refused(&identity("", &key_name), &["smtp.tls_key: ", "without smtp.tls_certificate"]);
    assert_refused(&identity("cert.pem", &key_name), &["smtp.tls_certificate: ", "begins with /"]);
    assert_refused(
        &identity("/none/cert.pem", &key_name),
        &["smtp.tls_certificate: /none/cert.pem: No such file", "PEM"],
    );
    assert_refused(
        &identity(&certificate_name, "/none/key.pem"),
        &["smtp.tls_key: /none/key.pem: No such file", "PEM"],
    );
    assert_refused(
        &identity(&key_name, &key_name),
        &["smtp.tls_certificate: ", &key_name, "holds no certificate"],
    );
    let no_key = file("HushHush1");
    let output = identity(&certificate_name, &name(&no_key));
    assert_refused(&output, &["smtp.tls_key: ", &name(&no_key), "holds no private key"]);
    assert!(!String::from_utf8_lossy(&output.stderr).contains("HushHush1"), "{output:?}");
    let wrong = file(&other.key);
    assert_refused(
        &identity(&certificate_name, &name(&wrong)),
        &["smtp.tls_key: ", &name(&wrong), "is not the key of the certificate"],
    );
    std::fs::set_permissions(key.path(), PermissionsExt::from_mode(0o644)).unwrap();
    assert_refused(
        &identity(&certificate_name, &key_name),
        &["smtp.tls_key: ", &key_name, "others may read the secret", "0644", "chmod"],
    );
    // A certificate is no secret.
    std::fs::set_permissions(key.path(), PermissionsExt::from_mode(0o600)).unwrap();
    std::fs::set_permissions(certificate.path(), PermissionsExt::from_mode(0o644)).unwrap();
    assert_eq!(identity(&certificate_name, &key_name).status.code(), Some(1));
}

/// Whoever writes a secret where its file belongs is not shown it again, in whatever log.
#[test]
fn a_secret_in_the_place_of_its_file() {
    for secret in ["12345678", "\"12345678\"", "[12345678]", "1234567.8"] {
        let output = with(&format!("{}, username: relay, password_file: {secret}", pinned()));
        assert_refused(&output, &["password_file: ", "begins with /"]);
        assert!(!String::from_utf8_lossy(&output.stderr).contains("1234567"), "{output:?}");
    }
    let pair = Authority::new().issue("dup.example");
    let certificate = file(&pair.certificate);
    let lines = pair.key.lines().map(|line| format!("\n  {line}")).collect::<String>();
    let keys = format!("tls_certificate: \"{}\"\ntls_key: |{lines}", certificate.path().display());
    let yaml = config("\"127.0.0.1:1\"", &[], &keys, "");
    let in_the_file = run(&["check"], Some(&yaml), &[]);
    let yaml = config("\"127.0.0.1:1\"", &[], "", "");
    let in_a_variable = run(&["check"], Some(&yaml), &[("SMTP_DUP_SMTP_TLS_KEY", &pair.key)]);
    for (output, key) in
        [(in_the_file, "smtp.tls_key: "), (in_a_variable, "SMTP_DUP_SMTP_TLS_KEY: ")]
    {
        assert_refused(&output, &[key, "begins with /"]);
        let part = &pair.key.lines().nth(1).unwrap()[..10];
        assert!(!String::from_utf8_lossy(&output.stderr).contains(part), "{output:?}");
    }
}
