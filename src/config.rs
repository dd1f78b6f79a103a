//! YAML file and `SMTP_DUP_*` variables -> a checked [`Config`].
//!
//! `main` calls [`Config::load`] once, before anything else is done. Every mistake is found here
//! and is one [`Mistake`] that names the key, the value and what to write instead. The keys stand
//! in one table, [`KEYS`], so that file, environment and manual cannot disagree.

mod circles;
pub mod destination;
mod files;
#[cfg_attr(not(feature = "tls"), path = "config/no_security.rs")]
mod security;
mod setting;

use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ipnet::IpNet;
use log::LevelFilter;
use nix::unistd::Uid;
use serde::Deserialize;

use self::files::is_trusted;
use self::security::certificate;
use self::setting::{Setting, addresses, domain, level, nearest, network, target, unknown};
use crate::logger::Target;
use crate::maillog::one_line;
use crate::relay::connection::Limits;
use crate::relay::destination::Destination;
use crate::spool;
use crate::tls::Certificate;

/// Where the file is sought when `--config` does not say.
pub const SEARCH: [&str; 2] = ["config.yaml", "/etc/smtp-dup/config.yaml"];

/// The configuration, complete and checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where to listen.
    pub listen: Vec<SocketAddr>,
    /// Our name in the greeting and in EHLO.
    pub domain: String,
    /// Who may send.
    pub allowed_clients: Vec<IpNet>,
    /// Sessions at once.
    pub max_connections: usize,
    /// Octets of a message; 0 leaves it to the primary.
    pub max_message_size: u64,
    /// Recipients of a message.
    pub max_recipients: usize,
    /// Longest silence of a client.
    pub timeout: Duration,
    /// Who we are to clients that want TLS.
    pub tls: Option<Certificate>,
    /// The server whose word counts.
    pub primary: Destination,
    /// The servers that get copies.
    pub backups: Vec<Destination>,
    /// Time limits towards all of them.
    pub limits: Limits,
    /// Connections to each backup at once.
    pub backup_connections: usize,
    /// Octets of copies held.
    pub backup_memory: u64,
    /// Where copies are kept until they are delivered.
    pub spool: Option<spool::Settings>,
    /// Where is logged.
    pub log_target: Target,
    /// What is logged.
    pub log_level: LevelFilter,
}

/// A mistake in the configuration: one line for a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake(String);

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // One line, whatever a file name or a value holds.
        let line =
            self.0.split('\n').map(str::trim).filter(|part| !part.is_empty()).collect::<Vec<_>>();
        f.write_str(&one_line(&line.join(": ")))
    }
}

/// A key of the configuration.
pub struct Key {
    /// Its path in the file: `smtp.listen`.
    pub name: &'static str,
    set: Set,
}

impl Key {
    /// The environment variable that overrides it: `SMTP_DUP_SMTP_LISTEN`.
    pub fn env(&self) -> String {
        format!("SMTP_DUP_{}", self.name.to_uppercase().replace('.', "_"))
    }
}

/// All keys.
pub const KEYS: &[Key] = &[
    key("smtp.listen", |d, s| put(&mut d.listen, s.each(addresses).map(|all| all.concat()))),
    key("smtp.domain", |d, s| put(&mut d.domain, s.text().and_then(domain).map(Some))),
    key("smtp.allowed_clients", |d, s| put(&mut d.allowed_clients, s.each(network))),
    key("smtp.max_connections", |d, s| put(&mut d.max_connections, s.count(100_000))),
    key("smtp.max_message_size", |d, s| put(&mut d.max_message_size, s.octets())),
    key("smtp.max_recipients", |d, s| put(&mut d.max_recipients, s.count(1_000_000))),
    key("smtp.timeout_seconds", |d, s| put(&mut d.timeout, s.seconds())),
    key("smtp.tls_certificate", |d, s| put(&mut d.tls_certificate, s.optional_path())),
    key("smtp.tls_key", |d, s| put(&mut d.tls_key, s.secret_path())),
    key("relay.destination_primary", |d, s| {
        put(&mut d.primary, destination::optional(s, d.service))
    }),
    key("relay.destination_backups", |d, s| put(&mut d.backups, destination::list(s, d.service))),
    key("relay.timeout_seconds", |d, s| put(&mut d.limits.connect, s.seconds())),
    key("relay.command_timeout_seconds", |d, s| put(&mut d.limits.command, s.seconds())),
    key("relay.data_timeout_seconds", |d, s| put(&mut d.limits.data, s.seconds())),
    key("relay.backup_connections", |d, s| put(&mut d.backup_connections, s.count(1000))),
    key("relay.backup_memory", |d, s| put(&mut d.backup_memory, s.octets())),
    key("relay.spool", |d, s| put(&mut d.spool, s.optional_path())),
    key("relay.spool_required", |d, s| put(&mut d.spool_required, s.flag())),
    key("relay.spool_max_bytes", |d, s| put(&mut d.spool_max_bytes, s.octets())),
    key("relay.retry_for_seconds", |d, s| put(&mut d.retry_for, s.long_seconds())),
    key("log.target", |d, s| put(&mut d.log_target, s.text().and_then(target))),
    key("log.level", |d, s| put(&mut d.log_level, s.text().and_then(level))),
];

/// Takes a setting into its place.
type Set = fn(&mut Draft, &Setting) -> Result<(), String>;

const fn key(name: &'static str, set: Set) -> Key {
    Key { name, set }
}

fn put<T>(place: &mut T, value: Result<T, String>) -> Result<(), String> {
    *place = value?;
    Ok(())
}

/// The configuration while it is put together: defaults, then the file, then the environment.
struct Draft {
    /// Whose files may be read, besides root's and our own.
    service: Option<Uid>,
    listen: Vec<SocketAddr>,
    domain: Option<String>,
    allowed_clients: Vec<IpNet>,
    max_connections: usize,
    max_message_size: u64,
    max_recipients: usize,
    timeout: Duration,
    tls_certificate: Option<PathBuf>,
    tls_key: Option<PathBuf>,
    primary: Option<Destination>,
    backups: Vec<Destination>,
    limits: Limits,
    backup_connections: usize,
    backup_memory: u64,
    spool: Option<PathBuf>,
    spool_required: bool,
    spool_max_bytes: u64,
    retry_for: Duration,
    log_target: Target,
    log_level: LevelFilter,
}

impl Default for Draft {
    fn default() -> Draft {
        Draft {
            service: None,
            listen: vec![SocketAddr::from(([127, 0, 0, 1], 2525))],
            domain: None,
            allowed_clients: vec![
                IpNet::new_assert([127, 0, 0, 0].into(), 8),
                IpNet::new_assert(std::net::Ipv6Addr::LOCALHOST.into(), 128),
            ],
            max_connections: 100,
            max_message_size: 0,
            max_recipients: 1000,
            timeout: Duration::from_secs(300),
            tls_certificate: None,
            tls_key: None,
            primary: None,
            backups: Vec::new(),
            limits: Limits {
                connect: Duration::from_secs(10),
                command: Duration::from_secs(120),
                data: Duration::from_secs(540),
            },
            backup_connections: 4,
            backup_memory: 64 * 1024 * 1024,
            spool: None,
            spool_required: false,
            spool_max_bytes: 0,
            retry_for: Duration::from_secs(5 * 24 * 3600),
            log_target: Target::Auto,
            log_level: LevelFilter::Info,
        }
    }
}

impl Config {
    /// Reads `file`, or the first of [`SEARCH`] that exists, and `environment` over it. Gives the
    /// configuration and warnings for the log. The file may belong to root, to whoever runs the
    /// program, or to `service`, whom it will become.
    ///
    /// # Errors
    /// The first [`Mistake`].
    pub fn load(
        file: Option<&Path>,
        environment: impl Iterator<Item = (String, String)>,
        service: Option<Uid>,
    ) -> Result<(Config, Vec<String>), Mistake> {
        let mut draft = Draft { service, ..Draft::default() };
        if let Some(file) = file.or_else(found) {
            draft.read(file)?;
        }
        let warnings = draft.read_environment(environment)?;
        Ok((draft.check()?, warnings))
    }
}

impl Draft {
    /// Takes the settings of a file.
    fn read(&mut self, file: &Path) -> Result<(), Mistake> {
        // Whoever reads this in a log does not know in which folder it was found.
        let whole = std::path::absolute(file).unwrap_or_else(|_| file.into());
        let name = whole.display();
        let unreadable = |error: std::io::Error| {
            let remedy = match error.kind() {
                ErrorKind::PermissionDenied => "let the user that smtp-dup runs as read it",
                _ => "give a file that can be read with --config FILE",
            };
            Mistake(format!("{name}: {error}; {remedy}"))
        };
        let mut open = File::open(file).map_err(unreadable)?;
        is_trusted(&open.metadata().map_err(unreadable)?, self.service)
            .map_err(|what| Mistake(format!("{name}: {what}")))?;
        let mut text = String::new();
        open.read_to_string(&mut text).map_err(unreadable)?;
        let text = text.trim_start_matches('\u{feff}');
        if text.lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#')) {
            return Ok(());
        }
        let wrong = |what: String| Mistake(format!("{name}: {what}"));
        // By way of a Value, which refuses a key that stands there twice.
        let document = serde_yaml::from_str::<serde_yaml::Value>(text)
            .and_then(Setting::deserialize)
            .map_err(|error| wrong(format!("not valid YAML: {error}; see smtp-dup.yaml(5)")))?;
        for (section, settings) in document.entries().map_err(wrong)? {
            if !sections().any(|known| known == section) {
                let below = KEYS
                    .iter()
                    .map(|key| key.name)
                    .filter(|name| name.ends_with(&format!(".{section}")));
                return Err(wrong(format!(
                    "{section}: {}",
                    unknown(section, sections().chain(below))
                )));
            }
            for (word, setting) in
                settings.entries().map_err(|what| wrong(format!("{section}: {what}")))?
            {
                let path = format!("{section}.{word}");
                let wrong = |what: String| wrong(format!("{path}: {what}"));
                match KEYS.iter().find(|key| key.name == path) {
                    Some(_) if setting.is_nothing() => {}
                    Some(key) => (key.set)(self, setting).map_err(wrong)?,
                    None => return Err(wrong(unknown(&path, KEYS.iter().map(|key| key.name)))),
                }
            }
        }
        Ok(())
    }

    /// Takes the settings of the environment. Gives a warning for each variable that is none.
    fn read_environment(
        &mut self,
        environment: impl Iterator<Item = (String, String)>,
    ) -> Result<Vec<String>, Mistake> {
        let mut warnings = Vec::new();
        for (variable, value) in
            environment.filter(|(variable, _)| variable.starts_with("SMTP_DUP_"))
        {
            match KEYS.iter().find(|key| key.env() == variable) {
                Some(key) => (key.set)(self, &Setting::from_text(value))
                    .map_err(|what| Mistake(format!("{variable}: {what}")))?,
                None => warnings.push(format!(
                    "{variable} in the environment is not a setting of smtp-dup, ignored{}",
                    nearest(&variable, KEYS.iter().map(Key::env))
                        .map_or(String::new(), |near| format!("; did you mean {near}?")),
                )),
            }
        }
        Ok(warnings)
    }

    /// What can only be seen when all is there.
    fn check(self) -> Result<Config, Mistake> {
        let Some(primary) = self.primary else {
            return Err(Mistake(
                "relay.destination_primary: not set; write the server whose replies count, as mail.example.com:25, \
                 or set SMTP_DUP_RELAY_DESTINATION_PRIMARY"
                    .into(),
            ));
        };
        if self.backups.contains(&primary) {
            return Err(Mistake(format!(
                "relay.destination_backups: \"{primary}\" is the primary as well: it would get \
                 every message twice; take it out of one of the two"
            )));
        }
        if self.listen.is_empty() {
            return Err(Mistake(
                "smtp.listen: an empty list; write at least one address, as 127.0.0.1:2525".into(),
            ));
        }
        if self.spool_required && self.spool.is_none() {
            return Err(Mistake(
                "relay.spool_required: true, but there is no spool; set relay.spool to a folder, \
                 as /var/spool/smtp-dup"
                    .into(),
            ));
        }
        if self.spool.is_some() {
            let all = self.backups.iter().chain([&primary]);
            if let Some(long) = all.map(Destination::to_string).find(|name| !spool::is_fit(name)) {
                return Err(Mistake(format!(
                    "relay.spool: no file can have the name of \"{long}\"; give that destination \
                     a shorter name, in DNS or /etc/hosts"
                )));
            }
        }
        let tls =
            certificate(self.tls_certificate.as_deref(), self.tls_key.as_deref(), self.service)
                .map_err(Mistake)?;
        let spool = self.spool.map(|folder| spool::Settings {
            folder,
            required: self.spool_required,
            retry_for: self.retry_for,
            max_bytes: self.spool_max_bytes,
        });
        Ok(Config {
            listen: self.listen,
            domain: self.domain.unwrap_or_else(host_name),
            allowed_clients: self.allowed_clients,
            max_connections: self.max_connections,
            max_message_size: self.max_message_size,
            max_recipients: self.max_recipients,
            timeout: self.timeout,
            tls,
            primary,
            backups: self.backups,
            limits: self.limits,
            backup_connections: self.backup_connections,
            backup_memory: self.backup_memory,
            spool,
            log_target: self.log_target,
            log_level: self.log_level,
        })
    }
}

/// The file when nobody names one.
pub fn found<'a>() -> Option<&'a Path> {
    SEARCH.iter().map(Path::new).find(|file| file.exists())
}

/// The host name, for the greeting.
fn host_name() -> String {
    let name = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok());
    name.filter(|name| domain(name).is_ok()).unwrap_or_else(|| "localhost".into())
}

/// The sections of the file.
fn sections() -> impl Iterator<Item = &'static str> {
    let all = KEYS.iter().filter_map(|key| key.name.split('.').next());
    let mut last = "";
    all.filter(move |section| std::mem::replace(&mut last, section) != *section)
}
