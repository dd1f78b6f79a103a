//! One value of the configuration, read as what its key needs.
//!
//! The table of keys in `config` names a reader for each. A reader's error text says what was
//! written and what to write instead; the caller puts the key before it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use log::LevelFilter;
use serde::Deserialize;

use crate::logger::Target;
use crate::relay::destination::port_number;

/// A value as it stands in the file, or in a variable.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub enum Setting {
    Number(i64),
    Float(f64),
    Flag(bool),
    Text(String),
    List(Vec<Setting>),
    Map(BTreeMap<String, Setting>),
    Nothing(()),
}

impl Setting {
    /// As it was written, for error texts.
    pub fn shown(&self) -> String {
        match self {
            Setting::Number(number) => number.to_string(),
            Setting::Float(number) => number.to_string(),
            Setting::Flag(flag) => flag.to_string(),
            Setting::Text(text) => format!("\"{text}\""),
            Setting::List(_) => "a list".into(),
            Setting::Map(_) => "a mapping".into(),
            Setting::Nothing(()) => "nothing".into(),
        }
    }

    /// The keys below it.
    pub fn entries(&self) -> Result<&BTreeMap<String, Setting>, String> {
        static NONE: BTreeMap<String, Setting> = BTreeMap::new();
        match self {
            Setting::Map(entries) => Ok(entries),
            Setting::Nothing(()) => Ok(&NONE),
            other => Err(format!(
                "{} stands where keys are expected; see smtp-dup.yaml(5)",
                other.shown()
            )),
        }
    }

    /// No value was written.
    pub fn is_nothing(&self) -> bool {
        matches!(self, Setting::Nothing(()))
    }

    /// A variable's value.
    pub fn from_text(text: String) -> Setting {
        Setting::Text(text)
    }

    /// A text.
    pub fn text(&self) -> Result<&str, String> {
        match self {
            Setting::Text(text) => Ok(text.trim()),
            other => Err(format!("{} is not a text; put it in quotes", other.shown())),
        }
    }

    /// The items of a list, or of one text with commas.
    fn items(&self) -> Vec<String> {
        match self {
            Setting::List(items) => items.iter().map(Setting::plain).collect(),
            other => {
                let text = other.plain();
                text.split(',')
                    .map(str::trim)
                    .filter(|item| !item.is_empty())
                    .map(Into::into)
                    .collect()
            }
        }
    }

    /// A text as it is; anything else as it is shown.
    fn plain(&self) -> String {
        match self {
            Setting::Text(text) => text.trim().to_string(),
            other => other.shown(),
        }
    }

    /// A list, or one text with commas, each item read by `read`.
    pub fn each<T>(&self, read: impl Fn(&str) -> Result<T, String>) -> Result<Vec<T>, String> {
        self.items().iter().map(|item| read(item)).collect()
    }

    /// A whole number from 1 to `most`.
    pub fn count(&self, most: u64) -> Result<usize, String> {
        self.number(1, most).map(|number| number as usize)
    }

    /// A number of octets, 0 included.
    pub fn octets(&self) -> Result<u64, String> {
        self.number(0, i64::MAX as u64)
    }

    /// A whole number within bounds; digits in quotes or in a variable are one too.
    fn number(&self, least: u64, most: u64) -> Result<u64, String> {
        let number = match self {
            Setting::Number(number) => u64::try_from(*number).ok(),
            Setting::Text(text) => text.trim().parse().ok(),
            _ => None,
        };
        match number {
            Some(number) if (least..=most).contains(&number) => Ok(number),
            _ => Err(format!("{} is not a whole number from {least} to {most}", self.shown())),
        }
    }

    /// Seconds, up to a day.
    pub fn seconds(&self) -> Result<Duration, String> {
        self.number(1, 86_400).map(Duration::from_secs).map_err(|what| format!("{what} (seconds)"))
    }

    /// Seconds, up to ten years.
    pub fn long_seconds(&self) -> Result<Duration, String> {
        self.number(1, 315_360_000)
            .map(Duration::from_secs)
            .map_err(|what| format!("{what} (seconds)"))
    }

    /// true or false.
    pub fn flag(&self) -> Result<bool, String> {
        match self {
            Setting::Flag(flag) => Ok(*flag),
            Setting::Text(text) if text.trim() == "true" => Ok(true),
            Setting::Text(text) if text.trim() == "false" => Ok(false),
            other => Err(format!("{} is neither true nor false", other.shown())),
        }
    }

    /// A file or folder, by its whole path; an empty variable unsets the key.
    pub fn optional_path(&self) -> Result<Option<PathBuf>, String> {
        match self.text()? {
            "" => Ok(None),
            text if text.starts_with('/') => Ok(Some(text.into())),
            text => Err(format!("\"{text}\" is no whole path; write one that begins with /")),
        }
    }

    /// The same for a file with a secret in it. What was written instead is not shown: it may be
    /// that secret.
    pub fn secret_path(&self) -> Result<Option<PathBuf>, String> {
        let hidden = "is no whole path; name a file by a path that begins with /";
        self.optional_path().map_err(|_| hidden.into())
    }
}

/// An address to listen on; `:2525` and `*:2525` are all addresses, a name is all of its own.
pub fn addresses(text: &str) -> Result<Vec<SocketAddr>, String> {
    let port = |port: &str| {
        port_number(port).ok_or_else(|| {
            format!("\"{text}\" has the port \"{port}\"; a port is a number up to 65535")
        })
    };
    if let Ok(address) = text.parse() {
        return Ok(vec![address]);
    }
    match text.rsplit_once(':') {
        Some(("" | "*", number)) => {
            Ok(vec![SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port(number)?)])
        }
        Some((host, number)) if !host.contains(':') => {
            let addresses = (host, port(number)?).to_socket_addrs().map_err(|error| {
                format!("\"{text}\": {error}; write an address and a port, as 127.0.0.1:2525")
            })?;
            Ok(addresses.collect())
        }
        _ => Err(format!(
            "\"{text}\" has no port; write an address and a port, as 127.0.0.1:2525 or [::1]:2525"
        )),
    }
}

pub fn domain(text: &str) -> Result<String, String> {
    match text {
        "" => {
            Err("an empty name; write the host name for the greeting, as mail.example.com".into())
        }
        _ if text.chars().any(|c| c.is_whitespace() || c.is_control()) => Err(format!(
            "\"{}\" has blanks in it; write one host name, as mail.example.com",
            text.escape_debug()
        )),
        _ => Ok(text.to_string()),
    }
}

/// A network, or one address.
pub fn network(text: &str) -> Result<IpNet, String> {
    let address = text.parse::<IpAddr>().map(IpNet::from);
    text.parse().or(address).map(canonical).map_err(|_| format!("\"{text}\" is not a network; write an address or a CIDR block, as 192.0.2.0/24 or 2001:db8::/32"))
}

/// IPv4 in IPv6's clothes is IPv4 (RFC 4291 §2.5.5.2), as the clients are that it is for.
fn canonical(network: IpNet) -> IpNet {
    let mapped = network.addr().to_canonical();
    match network.prefix_len().checked_sub(96) {
        Some(length) if mapped != network.addr() => IpNet::new(mapped, length).unwrap_or(network),
        _ => network,
    }
}

pub fn level(text: &str) -> Result<LevelFilter, String> {
    let word = if text.eq_ignore_ascii_case("warning") { "warn" } else { text };
    word.parse()
        .map_err(|_| format!("\"{text}\" is not a level; write error, warn, info, debug or trace"))
}

pub fn target(text: &str) -> Result<Target, String> {
    match text.to_ascii_lowercase().as_str() {
        "auto" => Ok(Target::Auto),
        "stderr" => Ok(Target::Stderr),
        "syslog" => Ok(Target::Syslog),
        _ => Err(format!("\"{text}\" is no place to log to; write auto, stderr or syslog")),
    }
}

/// What to say of a key that is not known.
pub fn unknown(word: &str, known: impl Iterator<Item = &'static str>) -> String {
    match nearest(word, known) {
        Some(near) => format!("not a known key; did you mean {near}?"),
        None => "not a known key; remove it, or see smtp-dup.yaml(5)".into(),
    }
}

/// The known word that is most like `word`, if any is like it at all.
pub fn nearest<T: AsRef<str>>(word: &str, known: impl Iterator<Item = T>) -> Option<T> {
    // A key that was written at the wrong level is itself but for what stands before it.
    let far = |known: &str| match known.strip_suffix(word) {
        Some(rest) if rest.ends_with('.') => 0,
        _ => distance(word, known),
    };
    let measured = known.map(|candidate| (far(candidate.as_ref()), candidate));
    let (distance, candidate) = measured.min_by_key(|(distance, _)| *distance)?;
    (distance <= (word.len() / 3).max(1)).then_some(candidate)
}

/// How many letters have to be changed, put in or left out (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut before = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.chars().enumerate() {
            let change = before + usize::from(x != y);
            before = row[j + 1];
            row[j + 1] = change.min(before + 1).min(row[j] + 1);
        }
    }
    row.last().copied().unwrap_or(0)
}
