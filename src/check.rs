//! `smtp-dup check`: what a person wants to know before mail flows.

use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;

use crate::config::Config;
use crate::identity::Identity;
use crate::launch::privileges::become_owner;
use crate::relay::connection::{Connection, Failure, Protection, Step};
use crate::relay::destination::Destination;
use crate::relay::security::Security;
use crate::shutdown::{Deadline, Grace, Shutdown};
use crate::smtp::reply::{Class, Reply};
use crate::spool::{Settings, Spool};

/// A recipient that nobody has (RFC 2606 §2): who takes mail for it takes mail for anybody.
const NOBODY: &str = "postmaster@relay-test.invalid";

/// Connects to each destination, tries the spool, and prints what it found. False when the primary
/// or the spool failed.
pub fn run(config: &Config) -> bool {
    let primary = probe(config, "primary", &config.primary);
    let mut well = primary.is_some();
    if let Some(world) = config.allowed_clients.iter().find(|network| is_world(network)) {
        warn_of_strangers(world, primary);
    }
    for backup in &config.backups {
        probe(config, "backup", backup);
    }
    if let Some(settings) = &config.spool {
        match try_spool(settings) {
            Ok(()) => println!("spool {}: ok", settings.folder.display()),
            Err(what) => {
                println!("spool: FAILED: {what}");
                well = false;
            }
        }
    }
    well
}

/// Opens the spool, and sees whether it would take a message.
fn try_spool(settings: &Settings) -> Result<(), String> {
    // As the service will, whose folder it is.
    become_owner(&settings.folder).map_err(|error| settings.missing(&error))?;
    let spool = Arc::new(Spool::open(settings)?);
    spool.has_place().map_err(|error| settings.wrong(&error))
}

/// A network of strangers: more of the public space than any one owner has.
fn is_world(network: &IpNet) -> bool {
    match network {
        IpNet::V4(network) => network.prefix_len() < 8,
        IpNet::V6(network) => {
            let start = network.network();
            network.prefix_len() < 32 && !start.is_unique_local() && !start.is_unicast_link_local()
        }
    }
}

/// To the primary all mail comes from this host, which it may trust with mail to anywhere: then
/// all who may send to us have that trust.
fn warn_of_strangers(world: &IpNet, primary: Option<Connection>) {
    println!("smtp.allowed_clients: warning: {world} lets strangers send");
    match primary.map(takes_mail_for_nobody) {
        Some(Ok(reply)) if reply.class() == Class::Success => println!(
            "  warning: an OPEN RELAY: the primary takes mail for <{NOBODY}> from here ({reply}); \
             allow only clients that you know"
        ),
        Some(Ok(reply)) => println!(
            "  the primary does not take mail for <{NOBODY}> from here ({reply}); make sure that \
             it takes none from this host but for its own domains"
        ),
        Some(Err(failure)) => println!("  the primary could not be asked: {failure}"),
        None => println!("  the primary could not be asked whether it relays for this host"),
    }
}

/// Begins a transaction for a recipient that does not exist, and takes it back. Gives the reply that
/// decided.
fn takes_mail_for_nobody(mut primary: Connection) -> Result<Reply, Failure> {
    let mut ask = |verb, line: &str| {
        let (step, deadline) = (Step::Command(verb), Deadline::uncut(primary.limits().command));
        primary.send(line.as_bytes(), step, deadline)?;
        primary.reply(step, deadline)
    };
    let mut reply = ask("MAIL", "MAIL FROM:<>\r\n")?;
    if reply.class() == Class::Success {
        reply = ask("RCPT", &format!("RCPT TO:<{NOBODY}>\r\n"))?;
    }
    if ask("RSET", "RSET\r\n").is_ok() {
        primary.rest();
    }
    Ok(reply)
}

/// What there is of TLS, and why there is not more.
fn tls(connection: &Connection, destination: &Destination) -> String {
    let why = match (connection.protection(), destination.security()) {
        (Protection::Nothing, Security::Opportunistic(_)) => "; STARTTLS is not offered",
        (Protection::Nothing, _) if connection.features().starttls => "; STARTTLS is offered",
        _ => "",
    };
    format!("{}{why}", connection.protection())
}

/// Connects and prints what the server says of itself. `None` when it cannot be had.
fn probe(config: &Config, role: &str, destination: &Destination) -> Option<Connection> {
    // Nobody watches for signals here, so that one ends the program at once.
    let us = Identity::new(&config.domain);
    let grace = Grace { transactions: Duration::ZERO, copies: Duration::ZERO };
    let shutdown = Shutdown::new(grace, Arc::default());
    let deadline = Deadline::of_transaction(config.limits.connect, &shutdown);
    match Connection::open(destination, &us, config.limits, deadline) {
        Ok(connection) => {
            println!("{role} {destination}: ok");
            println!("  greeting: {}", connection.greeting());
            println!("  offers: {}", connection.features());
            println!("  TLS: {}", tls(&connection, destination));
            if let Some(login) = destination.security().login() {
                println!("  logged in as {}", login.username());
            }
            if role == "backup" && !connection.features().dsn {
                println!(
                    "  warning: no DSN: it cannot be asked to send no bounces; see smtp-dup(8)"
                );
            }
            Some(connection)
        }
        Err(failure) => {
            println!("{role} {destination}: FAILED: {failure}");
            None
        }
    }
}
