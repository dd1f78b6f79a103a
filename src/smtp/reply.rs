//! One SMTP reply, kept in the wire form in which it has to be passed on.
//!
//! `relay::connection` parses replies of servers, `session` writes replies to clients, and both
//! make up replies of their own. What a server sends is hostile input: [`Reply::parse`] bounds it
//! and says what is wrong with it.

use std::fmt;

use memchr::memchr;

/// Longest line of a reply that is read, in octets (RFC 5321 §4.5.3.1.5 allows 512).
const MAX_LINE: usize = 4096;

/// Longest text of a reply of our own, in octets: what others say may be part of it, and a line
/// has 512 (RFC 5321 §4.5.3.1.5).
const MAX_OWN_TEXT: usize = 480;

/// Longest reply that is read, in octets over all its lines.
const MAX_REPLY: usize = 16 * 1024;

/// A reply: one code, one or more lines (RFC 5321 §4.2).
#[derive(Clone, PartialEq, Eq)]
pub struct Reply {
    code: u16,
    /// All lines, each ended by CR LF, all with the same code.
    wire: Vec<u8>,
}

/// Octets that are no SMTP reply. The text says what is wrong, for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nonsense(pub String);

impl Reply {
    /// A reply of our own: `code`, an enhanced status code (RFC 3463, "" for none) and a text.
    pub fn new(code: u16, status: &str, text: &str) -> Reply {
        let gap = if status.is_empty() { "" } else { " " };
        let mut wire = format!("{code} {status}{gap}").into_bytes();
        wire.extend(text.bytes().take(MAX_OWN_TEXT).map(printable));
        wire.extend_from_slice(b"\r\n");
        Reply { code, wire }
    }

    /// A reply of several lines, such as the one to EHLO.
    pub fn lines(code: u16, lines: &[String]) -> Reply {
        let mut wire = Vec::new();
        for (n, line) in lines.iter().enumerate() {
            let mark = if n + 1 == lines.len() { ' ' } else { '-' };
            wire.extend_from_slice(format!("{code}{mark}{line}\r\n").as_bytes());
        }
        Reply { code, wire }
    }

    /// Finds one whole reply at the head of `input`: the reply and its length there, or `None`
    /// when more has to be read.
    ///
    /// Lines may end in LF alone. NULs and other control octets in the text become "?", so that
    /// nobody behind us sees another line in them; 8-bit text is passed as it is.
    ///
    /// # Errors
    /// [`Nonsense`] when the octets cannot become a reply whatever follows them.
    pub fn parse(input: &[u8]) -> Result<Option<(Reply, usize)>, Nonsense> {
        let mut reply = Reply { code: 0, wire: Vec::new() };
        let mut at = 0;
        loop {
            let rest = &input[at..];
            let Some(length) = memchr(b'\n', rest) else {
                return match rest.len() > MAX_LINE {
                    true => Err(Nonsense(format!("a line over {MAX_LINE} octets"))),
                    false => Ok(None),
                };
            };
            let line = &rest[..length];
            at += length + 1;
            if line.len() > MAX_LINE || at > MAX_REPLY {
                return Err(Nonsense(format!("a reply over {MAX_REPLY} octets")));
            }
            if reply.add_line(line.strip_suffix(b"\r").unwrap_or(line))? {
                return Ok(Some((reply, at)));
            }
        }
    }

    /// Adds a line; true when it is the last.
    fn add_line(&mut self, line: &[u8]) -> Result<bool, Nonsense> {
        let nonsense = || Nonsense(format!("\"{}\"", excerpt(line)));
        let (code, rest) = line.split_at_checked(3).ok_or_else(nonsense)?;
        let code = match code {
            [a @ b'2'..=b'5', b @ b'0'..=b'9', c @ b'0'..=b'9'] => {
                u16::from(a - b'0') * 100 + u16::from(b - b'0') * 10 + u16::from(c - b'0')
            }
            _ => return Err(nonsense()),
        };
        if self.code != 0 && self.code != code {
            return Err(nonsense());
        }
        self.code = code;
        let (last, text) = match rest {
            [] => (true, rest),
            [b' ', text @ ..] => (true, text),
            [b'-', text @ ..] => (false, text),
            _ => return Err(nonsense()),
        };
        self.wire.extend_from_slice(&line[..3]);
        self.wire.push(if last { b' ' } else { b'-' });
        self.wire.extend(text.iter().copied().map(printable));
        self.wire.extend_from_slice(b"\r\n");
        Ok(last)
    }

    /// The three-digit code, 200 to 599.
    pub fn code(&self) -> u16 {
        self.code
    }

    /// The first digit of the code.
    pub fn class(&self) -> Class {
        match self.code / 100 {
            2 => Class::Success,
            3 => Class::Intermediate,
            4 => Class::Transient,
            _ => Class::Permanent,
        }
    }

    /// All lines as they go over the wire.
    pub fn wire(&self) -> &[u8] {
        &self.wire
    }

    /// The text of each line, without code.
    pub fn texts(&self) -> impl Iterator<Item = &[u8]> {
        self.wire
            .split(|&o| o == b'\n')
            .filter_map(|line| line.get(4..))
            .map(|t| t.strip_suffix(b"\r").unwrap_or(t))
    }
}

/// What the first digit of a reply code means (RFC 5321 §4.2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// 2xx.
    Success,
    /// 3xx: go on.
    Intermediate,
    /// 4xx: try again later.
    Transient,
    /// 5xx: do not try again.
    Permanent,
}

/// The reply on one line, as Postfix logs it: `250-first 250 last`.
impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = String::from_utf8_lossy(&self.wire);
        for (n, line) in text.trim_end().lines().enumerate() {
            let gap = if n == 0 { "" } else { " " };
            write!(f, "{gap}{line}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reply({self})")
    }
}

/// Control octets as "?"; everything else as it is.
fn printable(octet: u8) -> u8 {
    match octet {
        b'\t' => octet,
        0..=31 | 127 => b'?',
        _ => octet,
    }
}

/// The head of some octets, for a log line.
fn excerpt(octets: &[u8]) -> String {
    octets[..octets.len().min(60)].escape_ascii().to_string()
}
