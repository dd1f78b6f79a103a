//! TLS, on both sides of smtp-dup: scripted servers that can do it, and clients that do.
//!
//! `destinations` is what a destination's `tls` promises, `attacks` who stands in the middle,
//! `credentials` how it logs in, `mandatory` who insists on either, `messages` that mail is the same
//! with it, `clients` and `hostile_clients` STARTTLS for clients, `configuration` what is refused
//! at the start, `reasons` what is said of a bad certificate, `together` where TLS meets
//! the other promises. `real` is all of it with other
//! people's servers and clients.

#[path = "../common/mod.rs"]
mod common;

mod attacks;
mod clients;
mod configuration;
mod credentials;
mod destinations;
mod front;
mod hostile_clients;
#[path = "../postfix/instance.rs"]
mod instance;
mod mandatory;
mod messages;
mod pki;
mod pump;
mod real;
mod reasons;
mod together;

use common::{Client, Dup};
use front::Front;

/// A small message in wire form.
const BODY: &[u8] = b"Subject: test\r\n\r\nHello\r\n..dot\r\n";

/// A configuration with these destinations, as YAML writes them in one line.
fn config(primary: &str, backups: &[String], smtp: &str, relay: &str) -> String {
    let section = |lines: &str| lines.lines().map(|line| format!("  {line}\n")).collect::<String>();
    let backups: String = backups.iter().map(|backup| format!("    - {backup}\n")).collect();
    let backups = if backups.is_empty() {
        String::new()
    } else {
        format!("  destination_backups:\n{backups}")
    };
    format!(
        "smtp:\n  listen: \"127.0.0.1:0\"\n  domain: \"dup.example\"\n{}\
         relay:\n  destination_primary: {primary}\n{backups}{}",
        section(smtp),
        section(relay)
    )
}

/// A destination: `front` with these keys more.
fn destination(front: &Front, keys: &str) -> String {
    format!("{{address: \"{}\", {keys}}}", front.addr())
}

/// smtp-dup before a primary with these keys.
#[track_caller]
fn dup(primary: &Front, keys: &str, relay: &str) -> Dup {
    Dup::start(&config(&destination(primary, keys), &[], "", relay))
}

/// A whole transaction, which has to succeed.
#[track_caller]
fn deliver(client: &mut Client) {
    let reply = client.message("a@example.com", &["b@example.com"], BODY);
    assert_eq!(reply.code, 250, "{reply:?}");
}
