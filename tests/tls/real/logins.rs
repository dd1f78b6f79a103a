//! Logging in at Dovecot's submission server, and at a Postfix that asks Dovecot.

use tempfile::NamedTempFile;

use super::dovecot::{Dovecot, Setup};
use super::farm::{Farm, Service};
use crate::common::*;
use crate::instance::can_run;
use crate::pki::{Pair, file, self_signed};
use crate::{config, deliver};

/// With what is special in YAML, shells and SASL.
const PASSWORD: &str = "Rumpel \"#$%&'{}\\ stilzchen öß";

/// What has to be nowhere, and the beginnings of its forms in base64.
const SECRETS: [&str; 4] = ["Rumpel", "stilzchen", "AHJlbGF5AFJ1bX", "UnVtcGVs"];

#[track_caller]
fn assert_no_secret(text: &str) {
    for secret in SECRETS {
        assert!(!text.contains(secret), "{secret} in: {text}");
    }
}

/// The keys for a server with this certificate, and the file with the password.
fn keys(pair: &Pair, password: &str) -> (String, NamedTempFile) {
    let password = file(password);
    let keys = format!(
        "tls: required, fingerprint: \"{}\", username: relay, password_file: \"{}\"",
        pair.fingerprint(),
        password.path().display()
    );
    (keys, password)
}

/// A configuration with this primary, and a log that says all there is to say.
fn loud(primary: &str) -> String {
    config(primary, &[], "", "") + "log:\n  level: trace\n"
}

/// Logs in, delivers, and has the password nowhere.
#[track_caller]
fn welcomes(primary: &str) {
    let check = run(&["check"], Some(&loud(primary)), &[]);
    assert_eq!(check.status.code(), Some(0), "{check:?}");
    let text = String::from_utf8_lossy(&check.stdout);
    assert!(text.contains(", verified\n") && text.contains("logged in as relay\n"), "{text}");
    assert_no_secret(&format!("{check:?}"));

    let dup = Dup::start(&loud(primary));
    let mut client = Client::ready(dup.addr());
    deliver(&mut client);
    deliver(&mut client);
    assert_no_secret(&dup.log());
}

/// Does not, and says why without the password.
#[track_caller]
fn turns_away(primary: &str) {
    let check = run(&["check"], Some(&loud(primary)), &[]);
    assert_eq!(check.status.code(), Some(1), "{check:?}");
    let text = String::from_utf8_lossy(&check.stdout);
    assert!(text.contains("FAILED: AUTH: 535 5.7.8 "), "{text}");
    assert_no_secret(&format!("{check:?}"));

    let dup = Dup::start(&loud(primary));
    let heard = Client::greeted(dup.addr()).expect("EHLO client.example", 421);
    assert!(heard.text().starts_with("4.7.0 "), "{heard:?}");
    assert!(heard.text().contains("AUTH: 535 5.7.8 "), "{heard:?}");
    assert_no_secret(&(heard.text() + &dup.log()));
}

#[test]
fn dovecot_submission() {
    // It is a package of its own.
    if !can_run(&["dovecot", "../lib/dovecot/submission-login"]) {
        return;
    }
    for mechanisms in ["plain", "login", "plain login"] {
        let pair = self_signed("127.0.0.1");
        let sink = Sink::start();
        let dovecot = Dovecot::start(Setup {
            pair: &pair,
            login: ("relay", PASSWORD),
            mechanisms,
            relay: sink.addr(),
        });
        let (right, _file) = keys(&pair, PASSWORD);
        let destination = |keys: &str| format!("{{address: \"{}\", {keys}}}", dovecot.address);
        welcomes(&destination(&right));
        let messages = sink.wait(2);
        for message in &messages {
            assert!(message.data.ends_with(b"Hello\r\n..dot\r\n"), "{message:?}");
        }
        let by = format!("method={}", mechanisms.split(' ').next().unwrap().to_uppercase());
        assert!(dovecot.log().contains(&by), "{}", dovecot.log());

        let (wrong, _file) = keys(&pair, "Rumpelstilzchen");
        turns_away(&destination(&wrong));
        assert_eq!(sink.accepted(), 2);
    }
}

/// Postfix takes mail from those alone who have logged in.
#[test]
fn postfix_asks_dovecot() {
    if !can_run(&["postfix", "dovecot"]) {
        return;
    }
    let pair = self_signed("127.0.0.1");
    let nowhere = Sink::start();
    let dovecot = Dovecot::start(Setup {
        pair: &pair,
        login: ("relay", PASSWORD),
        mechanisms: "plain login",
        relay: nowhere.addr(),
    });
    let chain = file(pair.key.clone() + &pair.certificate);
    let settings = format!(
        "smtpd_tls_chain_files = {}
smtpd_tls_auth_only = yes
smtpd_sasl_auth_enable = yes
smtpd_sasl_type = dovecot
smtpd_sasl_path = unix:{}
smtpd_sasl_authenticated_header = yes
smtpd_relay_restrictions = permit_sasl_authenticated, reject",
        chain.path().display(),
        dovecot.auth_socket().display(),
    );
    let options = ["plain", "login", "plain,login"]
        .map(|mechanisms| format!("-o smtpd_sasl_mechanism_filter={mechanisms}"));
    let names = ["plain", "login", "both"];
    let services: Vec<_> = names
        .into_iter()
        .zip(&options)
        .map(|(name, options)| Service { name, options: options.clone() })
        .collect();
    let farm = Farm::start(&services, &settings);
    let (right, _file) = keys(&pair, PASSWORD);
    let (wrong, _other_file) = keys(&pair, "Rumpelstilzchen");
    for (name, mechanism) in names.into_iter().zip(["PLAIN", "LOGIN", "PLAIN"]) {
        turns_away(&farm.destination(name, &wrong));
        welcomes(&farm.destination(name, &right));
        farm.wait_at_rest(name, 4);
        let client = format!("sasl_method={mechanism}, sasl_username=relay");
        assert_eq!(farm.log(name, &[": client=", &client]).len(), 2);
    }
    farm.sink.wait(6);
    for arrival in names.iter().flat_map(|name| farm.arrivals(name)) {
        assert!(arrival.is_logged_in() && arrival.tls() == Some("TLSv1.3"), "{arrival:?}");
        assert!(arrival.message.data.ends_with(b"Hello\r\n..dot\r\n"), "{arrival:?}");
    }

    // Without TLS it is not offered, and who has not logged in is refused by Postfix itself.
    let dup = Dup::start(&config(&farm.destination("both", "tls: opportunistic"), &[], "", ""));
    let mut client = Client::ready(dup.addr());
    client.expect("MAIL FROM:<a@example.com>", 250);
    client.expect("RCPT TO:<b@example.com>", 554);
    let in_clear = right.replacen("required", "none", 1);
    let in_clear = in_clear.split(", ").filter(|key| !key.starts_with("fingerprint"));
    let in_clear = in_clear.collect::<Vec<_>>().join(", ") + ", allow_plaintext_auth: true";
    let check = run(&["check"], Some(&loud(&farm.destination("both", &in_clear))), &[]);
    let text = String::from_utf8_lossy(&check.stdout);
    assert!(text.contains("AUTH: neither PLAIN nor LOGIN is offered"), "{text}");
}
