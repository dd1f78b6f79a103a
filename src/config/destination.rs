//! A destination as it stands in the file: `host:port`, or a mapping that says more.
//!
//! As in `setting`, an error's text says what is wrong and what to write instead. What the keys
//! of a mapping mean is in `security`.

use std::collections::BTreeMap;
#[cfg(feature = "tls")]
use std::path::PathBuf;

use nix::unistd::Uid;

use super::security::secured;
use super::setting::{Setting, unknown};
use crate::relay::destination::Destination;

/// The keys of the mapping.
pub const KEYS: [&str; 8] = [
    "address",
    "tls",
    "ca_file",
    "fingerprint",
    "server_name",
    "username",
    "password_file",
    "allow_plaintext_auth",
];

/// One destination, or an empty text for none.
pub fn optional(setting: &Setting, service: Option<Uid>) -> Result<Option<Destination>, String> {
    match setting {
        Setting::Text(text) if text.trim().is_empty() => Ok(None),
        setting => one(setting, service).map(Some),
    }
}

/// A list of destinations, one of them, or a text with commas.
pub fn list(setting: &Setting, service: Option<Uid>) -> Result<Vec<Destination>, String> {
    let one = |setting: &Setting| one(setting, service);
    let all = match setting {
        Setting::List(items) => items.iter().map(one).collect::<Result<Vec<_>, _>>()?,
        Setting::Map(_) => vec![one(setting)?],
        other => other.each(|item| one(&Setting::Text(item.into())))?,
    };
    for (n, one) in all.iter().enumerate() {
        if all[..n].contains(one) {
            return Err(format!(
                "\"{one}\" stands there twice; each backup gets one copy, write it once"
            ));
        }
    }
    Ok(all)
}

fn one(setting: &Setting, service: Option<Uid>) -> Result<Destination, String> {
    match setting {
        Setting::Text(_) => secured(address(setting)?, &Words(&BTreeMap::new()), service),
        Setting::Map(entries) => mapping(entries, service),
        other => Err(format!("{} is not a destination; write host:port in quotes", other.shown())),
    }
}

fn address(setting: &Setting) -> Result<Destination, String> {
    let text = setting.text()?;
    Destination::parse(text).map_err(|what| format!("\"{text}\" {what}"))
}

fn mapping(
    entries: &BTreeMap<String, Setting>,
    service: Option<Uid>,
) -> Result<Destination, String> {
    if entries.contains_key("password") {
        return Err("password: does not belong into this file, which more people read than may \
                    know it; write it into a file of its own and name that with password_file"
            .into());
    }
    if let Some(word) = entries.keys().find(|word| !KEYS.contains(&word.as_str())) {
        return Err(format!("{word}: {}", unknown(word, KEYS.into_iter())));
    }
    let written =
        entries.get("address").ok_or("a mapping without address; write address: host:port")?;
    let destination = address(written).map_err(|what| format!("address: {what}"))?;
    let name = destination.to_string();
    secured(destination, &Words(entries), service).map_err(|what| format!("\"{name}\": {what}"))
}

/// The entries of a mapping, as texts.
pub struct Words<'a>(pub &'a BTreeMap<String, Setting>);

impl Words<'_> {
    /// The text of a key, if there is one.
    pub fn get(&self, key: &str) -> Result<Option<&str>, String> {
        let setting = self.0.get(key).filter(|setting| !setting.is_nothing());
        setting.map(Setting::text).transpose().map_err(|what| format!("{key}: {what}"))
    }

    /// The file with a secret in it that a key names, if it does.
    #[cfg(feature = "tls")]
    pub fn secret_path(&self, key: &str) -> Result<Option<PathBuf>, String> {
        let setting = self.0.get(key).filter(|setting| !setting.is_nothing());
        setting.map_or(Ok(None), Setting::secret_path).map_err(|what| format!("{key}: {what}"))
    }

    /// The key is there and true.
    #[cfg(feature = "tls")]
    pub fn flag(&self, key: &str) -> Result<bool, String> {
        let setting = self.0.get(key).filter(|setting| !setting.is_nothing());
        setting.map_or(Ok(false), Setting::flag).map_err(|what| format!("{key}: {what}"))
    }
}
