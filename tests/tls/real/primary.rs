//! Postfix as primary: each kind of server, and each `tls`.

use std::process::Stdio;

use super::cases::{Case, Cases, Verdict};
use super::farm::Farm;
use crate::common::*;
use crate::instance::{can_run, command};
use crate::{BODY, config};

/// smtp-dup before a primary of this kind.
#[track_caller]
fn before(farm: &Farm, case: &Case, keys: &str) -> Dup {
    Dup::start(&config(&farm.destination(case.name, keys), &[], "", ""))
}

/// Sends a message to the primary, by way of which it has to arrive; with this version of TLS.
#[track_caller]
fn delivers(farm: &Farm, case: &Case, keys: &str, version: Option<&str>) -> Dup {
    let dup = before(farm, case, keys);
    let tls = keys.split([' ', ',']).nth(1).unwrap();
    let to = format!("{}-{tls}@example.com", case.name);
    let reply = Client::ready(dup.addr()).message("a@example.com", &[&to], BODY);
    assert_eq!(reply.code, 250, "{}, {keys}: {reply:?}", case.name);
    let arrival = farm.wait_arrival(case.name, &to);
    assert_eq!(arrival.tls(), version, "{}, {keys}", case.name);
    assert!(arrival.message.data.ends_with(b"Hello\r\n..dot\r\n"), "{arrival:?}");
    dup
}

/// The version that a server agrees on with a client which knows this one alone.
fn agreed_with_openssl(farm: &Farm, name: &str, option: &str) -> String {
    let address = farm.address(name).to_string();
    let output = command("openssl")
        .args(["s_client", "-starttls", "smtp", "-cipher", "ALL:@SECLEVEL=0", option])
        .args(["-connect", &address])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().find_map(|line| line.trim().strip_prefix("Protocol  : "));
    assert!(output.status.success() && line.is_some(), "{output:?}");
    line.unwrap().into()
}

#[test]
fn every_kind_of_server_by_every_kind_of_tls() {
    if !can_run(&["postfix", "openssl"]) {
        return;
    }
    let cases = Cases::new();
    let farm = cases.farm();
    for (name, option, version) in [("tls10", "-tls1", "TLSv1"), ("tls11", "-tls1_1", "TLSv1.1")] {
        assert_eq!(agreed_with_openssl(&farm, name, option), version);
    }
    for case in &cases.all {
        let name = case.name;
        let dup = delivers(&farm, case, "tls: none", None);
        assert!(dup.log_lines(" TLS: ").is_empty(), "{name}: {}", dup.log());
        drop(dup);
        farm.wait_at_rest(name, 1);

        let dup = delivers(&farm, case, "tls: opportunistic", case.version);
        match case.version {
            Some(version) => {
                let line = dup.wait_log(&format!(" TLS: {version} "));
                assert!(line.ends_with(", not verified"), "{line}");
            }
            None if name == "notls" => {}
            None => _ = dup.wait_log("gets mail in clear: "),
        }
        drop(dup);
        farm.wait_at_rest(name, 2);

        let keys = format!("tls: required, {}", case.keys);
        match case.required {
            Verdict::Good => {
                let dup = delivers(&farm, case, &keys, case.version);
                let line = dup.wait_log(" TLS: TLSv1.");
                assert!(line.ends_with(", verified"), "{line}");
            }
            Verdict::Bad(words) => {
                let dup = before(&farm, case, &keys);
                let reply = Client::greeted(dup.addr()).expect("EHLO client.example", 421);
                let line = dup.wait_log("is not available: ");
                for word in words {
                    assert!(reply.text().contains(word), "{name}: no {word:?} in {reply:?}");
                    // The log has no code for the client.
                    let is_code = word.starts_with("4.");
                    assert!(is_code || line.contains(word), "{name}: no {word:?} in {line}");
                }
                // Whatever came to the server, it was no mail.
                farm.wait_at_rest(name, 3);
                let sessions = farm.log(name, &[" disconnect from "]);
                let with_mail = sessions.iter().filter(|line| line.contains(" mail="));
                assert_eq!(with_mail.count(), 2, "{name}: {sessions:#?}");
            }
        }
    }
}
