//! What is no SMTP at all: a browser, a TLS client at a port without TLS, binary rubbish.
//!
//! `wire` asks here about the head of each command line. A browser can be made to send whatever a
//! page wants behind its first line, so that is where it has to end: had `GET / HTTP/1.1` been an
//! unknown command, what follows might be known ones.

use std::fmt;

/// Something other than SMTP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Foreign {
    /// HTTP (RFC 9110 §9.3).
    Http,
    /// TLS (RFC 8446 §5.1).
    Tls,
    /// No text.
    Binary,
}

/// None of these is a command of SMTP, nor of any extension.
const METHODS: [&str; 10] =
    ["GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH", "PRI"];

impl Foreign {
    /// Looks at the head of a command line, whole or not. A verb that is merely unknown is none of
    /// our business, and neither is a slip of somebody who types.
    pub fn find(head: &[u8]) -> Option<Foreign> {
        // A record with a handshake in it, of version 3.
        if head.starts_with(&[0x16, 0x03]) {
            return Some(Foreign::Tls);
        }
        let end = head.iter().position(|o| b" \t\r\n".contains(o));
        let verb = &head[..end.unwrap_or(head.len())];
        if verb.iter().any(is_binary) && verb != [0x16] {
            return Some(Foreign::Binary);
        }
        let is_method = || METHODS.iter().any(|name| verb.eq_ignore_ascii_case(name.as_bytes()));
        let is_http = match end.map(|end| head[end]) {
            Some(b' ') => is_method() || verb.eq_ignore_ascii_case(b"Host:"),
            _ => false,
        };
        is_http.then_some(Foreign::Http)
    }
}

/// Control octets, but for those that keys of a keyboard send: BS, the white space, ESC.
fn is_binary(octet: &u8) -> bool {
    matches!(octet, 0..=7 | 14..=26 | 28..=31)
}

/// For log lines and replies: `HTTP`.
impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Foreign::Http => "HTTP",
            Foreign::Tls => "TLS",
            Foreign::Binary => "binary data",
        })
    }
}
