//! What a server offers in its reply to EHLO, as far as it concerns us.

use std::fmt;

use crate::smtp::reply::Reply;

/// The extensions that can be mirrored to a client, or used towards a backup.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Features {
    /// PIPELINING (RFC 2920).
    pub pipelining: bool,
    /// SIZE (RFC 1870): offered, with its limit in octets where it has one.
    pub size: Option<Option<u64>>,
    /// 8BITMIME (RFC 6152).
    pub eight_bit: bool,
    /// SMTPUTF8 (RFC 6531).
    pub utf8: bool,
    /// DSN (RFC 3461).
    pub dsn: bool,
    /// ENHANCEDSTATUSCODES (RFC 2034).
    pub status_codes: bool,
    /// XFORWARD (Postfix's XFORWARD_README): the attributes that it knows; none if not offered.
    pub xforward: Vec<String>,
    /// STARTTLS (RFC 3207), which is not mirrored: it is of one connection alone.
    pub starttls: bool,
    /// AUTH PLAIN (RFC 4954, RFC 4616), not mirrored either.
    pub auth_plain: bool,
    /// AUTH LOGIN, the same.
    pub auth_login: bool,
}

impl Features {
    /// Reads the reply to EHLO. What cannot be understood is not offered.
    pub fn from_ehlo(reply: &Reply) -> Features {
        let mut features = Features::default();
        // The first line is the server's name.
        for text in reply.texts().skip(1) {
            let text = String::from_utf8_lossy(text).to_ascii_uppercase();
            // Old servers write AUTH=LOGIN.
            let mut words = text.split([' ', '\t', '=']).filter(|word| !word.is_empty());
            match words.next() {
                Some("PIPELINING") => features.pipelining = true,
                Some("8BITMIME") => features.eight_bit = true,
                Some("SMTPUTF8") => features.utf8 = true,
                Some("DSN") => features.dsn = true,
                Some("ENHANCEDSTATUSCODES") => features.status_codes = true,
                Some("XFORWARD") => features.xforward = words.map(str::to_string).collect(),
                Some("STARTTLS") => features.starttls = true,
                Some("AUTH") => {
                    features.auth_plain |= words.clone().any(|word| word == "PLAIN");
                    features.auth_login |= words.any(|word| word == "LOGIN");
                }
                Some("SIZE") => {
                    let limit = words.next().and_then(|word| word.parse().ok());
                    features.size = Some(limit.filter(|&limit| limit > 0));
                }
                _ => {}
            }
        }
        features
    }

    /// What a client is offered: a mirror of what the primary offers, within our own size limit
    /// (octets, 0 for none). PIPELINING is ours to give always.
    pub fn mirrored(&self, max_message_size: u64) -> Features {
        let own = (max_message_size > 0).then_some(max_message_size);
        let size = match (self.size, own) {
            (Some(Some(theirs)), Some(own)) => Some(Some(theirs.min(own))),
            (_, Some(own)) => Some(Some(own)),
            (theirs, None) => theirs,
        };
        Features { pipelining: true, size, ..self.clone() }
    }

    /// True when a client that was told `told` finds all of it here, PIPELINING aside.
    pub fn cover(&self, told: &Features) -> bool {
        let size = match (told.size, self.size) {
            (None, _) | (Some(_), Some(None)) => true,
            (Some(Some(told)), Some(Some(ours))) => ours >= told,
            (Some(None), Some(Some(_))) | (Some(_), None) => false,
        };
        size && (self.eight_bit || !told.eight_bit)
            && (self.utf8 || !told.utf8)
            && (self.dsn || !told.dsn)
            && (self.status_codes || !told.status_codes)
            && told.xforward.iter().all(|name| self.xforward.contains(name))
    }

    /// One EHLO line for each.
    pub fn lines(&self) -> Vec<String> {
        let size = match self.size {
            Some(Some(limit)) => Some(format!("SIZE {limit}")),
            Some(None) => Some("SIZE".into()),
            None => None,
        };
        let flags = [
            (self.pipelining, "PIPELINING"),
            (self.eight_bit, "8BITMIME"),
            (self.utf8, "SMTPUTF8"),
            (self.dsn, "DSN"),
            (self.status_codes, "ENHANCEDSTATUSCODES"),
        ];
        let flags =
            flags.into_iter().filter(|(offered, _)| *offered).map(|(_, name)| name.to_string());
        let names = self.xforward.join(" ");
        let xforward = (!names.is_empty()).then(|| format!("XFORWARD {names}"));
        flags.chain(size).chain(xforward).collect()
    }
}

/// For people: the EHLO keywords.
impl fmt::Display for Features {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines = self.lines();
        f.write_str(if lines.is_empty() { "no extensions" } else { "" })?;
        f.write_str(&lines.join(", "))
    }
}
