//! TLS as it stands in the file: how secure the way to a destination is, and what it takes.
//!
//! The files that the keys name are read here, once, as whoever started the program; so every
//! mistake in them is found before anything is served.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::unistd::Uid;

use super::destination::Words;
use crate::relay::destination::Destination;
use crate::relay::security::Security;
use crate::tls::{self, Fingerprint, Peer, Trust};

/// The values of the key `tls`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    None,
    Opportunistic,
    Required,
    Implicit,
}

impl Level {
    fn parse(text: &str) -> Result<Level, String> {
        match text {
            "none" => Ok(Level::None),
            "opportunistic" => Ok(Level::Opportunistic),
            "required" => Ok(Level::Required),
            "implicit" => Ok(Level::Implicit),
            _ => Err(format!(
                "tls: \"{text}\" is none of none, opportunistic, required and implicit"
            )),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Level::None => "none",
            Level::Opportunistic => "opportunistic",
            Level::Required => "required",
            Level::Implicit => "implicit",
        }
    }

    /// It is made sure who the server is.
    fn verifies(self) -> bool {
        matches!(self, Level::Required | Level::Implicit)
    }
}

/// The destination with all that the other keys say.
pub fn secured(to: Destination, words: &Words, _: Option<Uid>) -> Result<Destination, String> {
    let level = words.get("tls")?.map_or(Ok(Level::Opportunistic), Level::parse)?;
    for key in ["ca_file", "fingerprint", "server_name"] {
        if words.get(key)?.is_some() && !level.verifies() {
            return Err(format!(
                "{key}: with tls: {} nobody looks at it; write tls: required, or implicit",
                level.name()
            ));
        }
    }
    let trust = match (words.get("ca_file")?, words.get("fingerprint")?) {
        _ if !level.verifies() => Trust::Anybody,
        (None, None) => Trust::System,
        (Some(file), None) => {
            let remedy = "name a file of CA certificates in PEM";
            let read = path(file).and_then(|file| read(&file, remedy));
            let store = read
                .and_then(|text| tls::authorities(&text).map_err(|what| format!("{file}: {what}")));
            Trust::Authorities(store.map_err(|what| format!("ca_file: {what}"))?)
        }
        (None, Some(text)) => Trust::Pinned(Fingerprint::parse(text).ok_or_else(|| {
            format!(
                "fingerprint: \"{text}\" is no SHA-256; write the 64 hexadecimal digits of \
                 openssl x509 -noout -fingerprint -sha256 -in FILE"
            )
        })?),
        (Some(_), Some(_)) => {
            return Err("ca_file, fingerprint: both; write one of them".into());
        }
    };
    let peer = || Peer::new(words.get("server_name")?.unwrap_or(to.host()), trust).map(Arc::new);
    let security = match level {
        Level::None => Security::None,
        Level::Opportunistic => Security::Opportunistic(peer()?),
        Level::Required => Security::Required(peer()?),
        Level::Implicit => Security::Implicit(peer()?),
    };
    Ok(to.secured(security))
}

/// A file by its whole path. What was written instead is not shown: it may be a secret.
pub fn path(text: &str) -> Result<PathBuf, String> {
    match text.starts_with('/') {
        true => Ok(text.into()),
        false => Err("is no whole path; name a file by a path that begins with /".into()),
    }
}

/// The octets of a file.
pub fn read(file: &Path, remedy: &str) -> Result<Vec<u8>, String> {
    std::fs::read(file).map_err(|error| format!("{}: {error}; {remedy}", file.display()))
}
