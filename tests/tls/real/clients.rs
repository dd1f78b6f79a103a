//! Postfix, openssl and swaks as clients that begin TLS with us.

use std::process::{Output, Stdio};

use crate::clients::{Server, server};
use crate::common::*;
use crate::instance::{Postfix, Setup, can_run, command};
use crate::pki::{Authority, file};

/// A Postfix whose mail for example.com goes to `server`, with these lines in main.cf.
fn postfix_before(server: &Server, settings: &str) -> Postfix {
    let addr = server.dup.addr();
    let settings = format!(
        "transport_maps = inline:{{ {{ example.com = smtp:[{}]:{} }}, {{ sender.test = discard: }} }}
smtp_tls_loglevel = 2
smtp_tls_session_cache_database = btree:$data_directory/smtp
smtp_tls_secure_cert_match = dup.example
{settings}",
        addr.ip(),
        addr.port(),
    );
    let services = |_| "tlsmgr unix - - n 1000? 1 tlsmgr".into();
    let setup = Setup { settings: &settings, services: Some(&services), ..Setup::default() };
    Postfix::hosting(setup)
}

/// Gives Postfix `count` messages at once.
fn submit(postfix: &Postfix, body: &[u8], count: usize) {
    let mut client = Client::ready(postfix.address);
    for number in 0..count {
        let to = format!("user{number}@example.com");
        assert_eq!(client.message("a@sender.test", &[&to], body).code, 250);
    }
}

#[test]
fn postfix_verifies_us() {
    if !can_run(&["postfix"]) {
        return;
    }
    for (protocols, version) in [(">=TLSv1.2", "TLSv1.3"), ("TLSv1.2", "TLSv1.2")] {
        let server = server("");
        let settings = format!(
            "smtp_tls_security_level = secure\nsmtp_tls_mandatory_protocols = {protocols}\n\
             smtp_tls_CAfile = {}",
            server.ca.path().display()
        );
        let postfix = postfix_before(&server, &settings);
        let body = mail_body(300 * 1024);
        submit(&postfix, &body, 20);
        postfix.wait_removed(20);
        let messages = server.primary.wait(20);
        assert_eq!(messages.len(), 20);
        assert!(messages.iter().all(|message| message.data.ends_with(&body)));

        let sessions = postfix.log(&["/smtp[", "connection established to 127.0.0.1"]);
        let verified = |line: &String| line.contains("Verified TLS ") && line.contains(version);
        assert!(!sessions.is_empty() && sessions.iter().all(verified), "{sessions:#?}");
        let ours = server.dup.wait_logs(&format!(" TLS: {version} "), sessions.len());
        assert_eq!(ours.len(), sessions.len());

        // A later connection takes up the session of one before.
        let count = |what| postfix.log(&["/smtp[", what]).len();
        let before = count("Reusing old session");
        submit(&postfix, &body, 1);
        postfix.wait_removed(21);
        assert_eq!(count("Reusing old session"), before + 1);
    }
}

#[test]
fn postfix_that_does_not_trust_us_keeps_the_mail() {
    if !can_run(&["postfix"]) {
        return;
    }
    let server = server("");
    let other = file(Authority::new().pem);
    let ca = format!("smtp_tls_CAfile = {}", other.path().display());
    let postfix = postfix_before(&server, &format!("smtp_tls_security_level = secure\n{ca}"));
    submit(&postfix, b"Subject: x\r\n\r\nx\r\n", 1);
    let line = postfix.wait_log(1, &["status=deferred"]).remove(0);
    assert!(line.contains("Server certificate not "), "{line}");
    assert_eq!(server.primary.count("MAIL"), 0);
    drop(postfix);

    // This asks for TLS, and not who we are.
    let postfix = postfix_before(&server, &format!("smtp_tls_security_level = encrypt\n{ca}"));
    submit(&postfix, b"Subject: x\r\n\r\nx\r\n", 1);
    postfix.wait_removed(1);
    assert_eq!(postfix.log(&["Untrusted TLS connection established to "]).len(), 1);
    server.primary.wait(1);
}

#[test]
fn postfix_that_is_too_old_gets_no_tls() {
    if !can_run(&["postfix"]) {
        return;
    }
    let server = server("");
    let old = "tls_medium_cipherlist = ALL:@SECLEVEL=0\nsmtp_tls_protocols = TLSv1.1\n\
               smtp_tls_mandatory_protocols = TLSv1.1\nsmtp_tls_mandatory_ciphers = medium";
    let postfix = postfix_before(&server, &format!("smtp_tls_security_level = encrypt\n{old}"));
    submit(&postfix, b"Subject: x\r\n\r\nx\r\n", 1);
    let line = postfix.wait_log(1, &["status=deferred"]).remove(0);
    assert!(line.contains("Cannot start TLS: handshake failure"), "{line}");
    assert_eq!(server.primary.count("MAIL"), 0);
    server.dup.wait_log(" TLS failed: ");
    drop(postfix);

    // Postfix goes on in clear with mail that is older than this.
    let may = "smtp_tls_security_level = may\nminimal_backoff_time = 1s";
    let postfix = postfix_before(&server, &format!("{may}\n{old}"));
    submit(&postfix, b"Subject: x\r\n\r\nx\r\n", 1);
    postfix.drain();
    server.primary.wait(1);
    assert!(server.dup.log_lines(" TLS: ").is_empty(), "{}", server.dup.log());
}

/// What a shell line does with `$HOST`, `$PORT`, `$CA` and a file of its own, `$FILE`.
#[track_caller]
fn shell(server: &Server, line: &str) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let addr = server.dup.addr();
    command("timeout")
        .args(["60", "sh", "-c", line])
        .env("HOST", addr.ip().to_string())
        .env("PORT", addr.port().to_string())
        .env("CA", server.ca.path())
        .env("FILE", folder.path().join("file"))
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

const OPENSSL: &str = "s() { printf 'EHLO x\\r\\nNOOP\\r\\nQUIT\\r\\n' | openssl s_client -ign_eof \
                       -starttls smtp -CAfile $CA -verify_hostname dup.example \
                       -verify_return_error -connect $HOST:$PORT \"$@\"; };";

#[test]
fn openssl_of_every_version() {
    if !can_run(&["openssl"]) {
        return;
    }
    let server = server("");
    for (option, version) in [("-tls1_2", "TLSv1.2"), ("-tls1_3", "TLSv1.3")] {
        let output = shell(&server, &format!("{OPENSSL} s {option}"));
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{output:?}");
        assert!(text.contains("Verify return code: 0 (ok)"), "{text}");
        assert!(text.contains(&format!("New, {version}, Cipher is ")), "{text}");
        assert!(text.contains("\n221 2.0.0 "), "{text}");
        server.dup.wait_log(&format!(" TLS: {version} "));
    }
    for option in ["-tls1", "-tls1_1"] {
        let line = format!("{OPENSSL} s {option} -cipher ALL:@SECLEVEL=0");
        let output = shell(&server, &line);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("SSL alert number "), "{output:?}");
    }
    assert_eq!(server.dup.wait_logs(" TLS failed: ", 2).len(), 2);
}

#[test]
fn openssl_resumes_a_session() {
    if !can_run(&["openssl"]) {
        return;
    }
    for version in ["-tls1_2", "-tls1_3"] {
        let server = server("");
        let line = format!("{OPENSSL} s {version} -sess_out $FILE; s {version} -sess_in $FILE");
        let output = shell(&server, &line);
        let text = String::from_utf8_lossy(&output.stdout);
        let kinds: Vec<_> = text.lines().filter(|line| line.contains(", Cipher is ")).collect();
        assert_eq!(kinds.len(), 2, "{output:?}");
        assert!(kinds[0].starts_with("New, ") && kinds[1].starts_with("Reused, "), "{output:?}");
    }
}

/// It may be that port 465 is meant: there is none here.
#[test]
fn tls_from_the_first_octet_is_not_understood() {
    if !can_run(&["openssl", "swaks"]) {
        return;
    }
    let server = server("");
    for line in [
        "openssl s_client -connect $HOST:$PORT",
        "swaks -tlsc --server $HOST:$PORT --from a@example.com --to b@example.com",
    ] {
        let output = shell(&server, line);
        // 124 would be that of timeout(1).
        assert!(!matches!(output.status.code(), Some(0 | 124)), "{output:?}");
    }
    assert_eq!(server.primary.connections(), 0);
}

#[test]
fn swaks_in_every_way() {
    if !can_run(&["swaks"]) {
        return;
    }
    let server = server("");
    let swaks = "swaks --server $HOST:$PORT --from a@example.com --to b@example.com";
    for (count, options) in [
        "-tls --tls-protocol tlsv1_2",
        "-tls --tls-protocol tlsv1_3",
        "-tls --pipeline --ehlo x",
        "--tls-optional",
        "--tls-optional-strict",
    ]
    .into_iter()
    .enumerate()
    {
        let output = shell(&server, &format!("{swaks} {options}"));
        assert!(output.status.success(), "{options}: {output:?}");
        server.primary.wait(count + 1);
        assert_eq!(server.dup.log_lines(" TLS: ").len(), count + 1, "{options}: {output:?}");
    }
}
