//! TLS as it stands in the file: how secure the way to a destination is, and what it takes.
//!
//! The files that the keys name are read here, once, as whoever started the program; so every
//! mistake in them is found before anything is served.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::unistd::Uid;

use super::destination::Words;
use super::files::is_secret;
use crate::relay::destination::Destination;
use crate::relay::security::{Login, Security};
use crate::tls::{self, Certificate, Fingerprint, Peer, Trust};

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
pub fn secured(
    to: Destination,
    words: &Words,
    service: Option<Uid>,
) -> Result<Destination, String> {
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
        (None, None) => Trust::Authorities(tls::system_authorities()?),
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
    let login = login(words, level, service)?;
    let peer = || Peer::new(words.get("server_name")?.unwrap_or(to.host()), trust).map(Arc::new);
    let security = match level {
        Level::None => Security::None(login),
        Level::Opportunistic => Security::Opportunistic(peer()?),
        Level::Required => Security::Required(peer()?, login),
        Level::Implicit => Security::Implicit(peer()?, login),
    };
    Ok(to.secured(security))
}

/// Who we are to a destination. Its password goes to nobody who is not verified, nor in clear
/// unless that is said twice.
fn login(words: &Words, level: Level, service: Option<Uid>) -> Result<Option<Login>, String> {
    let (name, file) = (words.get("username")?, words.secret_path("password_file")?);
    let in_clear = words.flag("allow_plaintext_auth")?;
    if in_clear && (name.is_none() || level != Level::None) {
        return Err("allow_plaintext_auth: has a meaning only with username and tls: none".into());
    }
    let (name, file) = match (name, file) {
        (Some(name), Some(file)) => (name, file),
        (None, None) => return Ok(None),
        (Some(_), None) => {
            return Err("username: without password_file; name a file with the password".into());
        }
        (None, Some(_)) => {
            return Err("password_file: without username; write whose password it is".into());
        }
    };
    if level == Level::Opportunistic {
        return Err(
            "username: with tls: opportunistic whoever passes for the server would get the \
                    password; write tls: required, or implicit"
                .into(),
        );
    }
    if level == Level::None && !in_clear {
        return Err("username: with tls: none everybody on the way can read the password; write \
                    tls: required, or implicit; or allow_plaintext_auth: true if that does not matter"
            .into());
    }
    if name.is_empty() || name.contains(char::is_control) {
        return Err(
            "username: is empty, or holds control characters; write the name to log in with".into(),
        );
    }
    let password = password(&file, service).map_err(|what| format!("password_file: {what}"))?;
    Ok(Some(Login::new(name.into(), password)))
}

/// The password in a file: its first line.
fn password(file: &Path, service: Option<Uid>) -> Result<String, String> {
    let wrong = |what: &str| format!("{}: {what}", file.display());
    let octets = read_secret(file, service, "name a file with the password in its first line")?;
    let line = octets.split(|&octet| octet == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    match std::str::from_utf8(line) {
        Ok("") => Err(wrong("its first line is empty; write the password there")),
        Ok(text) if !text.contains('\0') => Ok(text.into()),
        _ => Err(wrong("its first line is no text in UTF-8; write the password there")),
    }
}

/// Who we are to clients, if that is configured.
pub fn certificate(
    certificate: Option<&Path>,
    key: Option<&Path>,
    service: Option<Uid>,
) -> Result<Option<Certificate>, String> {
    let (certificate, key) = match (certificate, key) {
        (Some(certificate), Some(key)) => (certificate, key),
        (None, None) => return Ok(None),
        (Some(_), None) => {
            return Err(
                "smtp.tls_certificate: without smtp.tls_key; name the file with its key".into()
            );
        }
        (None, Some(_)) => {
            return Err("smtp.tls_key: without smtp.tls_certificate; name the file with the \
                        certificate"
                .into());
        }
    };
    let wrong = |what| format!("smtp.tls_certificate: {what}");
    let text = read(certificate, "name a file with our certificate in PEM").map_err(wrong)?;
    let wrong = |what| format!("smtp.tls_certificate: {}: {what}", certificate.display());
    let chain = tls::certificates(&text).map_err(wrong)?;
    let wrong = |what| format!("smtp.tls_key: {what}");
    let remedy = "name a file with the certificate's key in PEM";
    let text = read_secret(key, service, remedy).map_err(wrong)?;
    let wrong = |what| format!("smtp.tls_key: {}: {what}", key.display());
    let key = tls::private_key(&text).map_err(wrong)?;
    Certificate::new(chain, key).map(Some).map_err(wrong)
}

/// A file by its whole path.
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

/// The octets of a file with a secret in it, which must be one.
fn read_secret(file: &Path, service: Option<Uid>, remedy: &str) -> Result<Vec<u8>, String> {
    let wrong = |what: String| format!("{}: {what}", file.display());
    let unreadable = |error: std::io::Error| match error.kind() {
        ErrorKind::PermissionDenied => wrong(format!(
            "{error}; user {} runs this: chgrp it to a group of that user, with chmod 0640",
            Uid::effective()
        )),
        _ => wrong(format!("{error}; {remedy}")),
    };
    let mut open = File::open(file).map_err(unreadable)?;
    is_secret(&open.metadata().map_err(unreadable)?, service).map_err(wrong)?;
    let mut octets = Vec::new();
    open.read_to_end(&mut octets).map_err(unreadable)?;
    Ok(octets)
}
