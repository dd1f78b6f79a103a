//! `smtp-dup check`: what a person wants to know before mail flows.

use std::sync::Arc;
use std::time::Duration;

use crate::config::Config;
use crate::launch::privileges::become_owner;
use crate::relay::connection::Connection;
use crate::relay::destination::Destination;
use crate::shutdown::{Deadline, Grace, Shutdown};
use crate::spool::Spool;

/// Connects to each destination, opens the spool, and prints what it found. False when the primary
/// or the spool failed.
pub fn run(config: &Config) -> bool {
    let mut well = probe(config, "primary", &config.primary);
    for backup in &config.backups {
        probe(config, "backup", backup);
    }
    if let Some(settings) = &config.spool {
        // As the service will, whose folder it is.
        let owned = become_owner(&settings.folder).map_err(|error| settings.wrong(&error));
        match owned.and_then(|()| Spool::open(settings)) {
            Ok(_) => println!("spool {}: ok", settings.folder.display()),
            Err(what) => {
                println!("spool: FAILED: {what}");
                well = false;
            }
        }
    }
    well
}

fn probe(config: &Config, role: &str, destination: &Destination) -> bool {
    // Nobody watches for signals here, so that one ends the program at once.
    let grace = Grace { transactions: Duration::ZERO, copies: Duration::ZERO };
    let shutdown = Shutdown::new(grace, Arc::default());
    let deadline = Deadline::of_transaction(config.limits.connect, &shutdown);
    match Connection::open(destination, &config.domain, config.limits, deadline) {
        Ok(connection) => {
            println!("{role} {destination}: ok");
            println!("  greeting: {}", connection.greeting());
            println!("  offers: {}", connection.features());
            if role == "backup" && !connection.features().dsn {
                println!(
                    "  warning: no DSN: it cannot be asked to send no bounces; see smtp-dup(8)"
                );
            }
            true
        }
        Err(failure) => {
            println!("{role} {destination}: FAILED: {failure}");
            false
        }
    }
}
