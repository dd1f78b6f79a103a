//! The envelope of one message: reverse-path, forward-paths, and the ESMTP parameters of each; and
//! who sent it, where that is known.
//!
//! Made by `session` from what the client said, used by `relay` for every destination. Paths and
//! parameters are kept as the client wrote them, octet for octet: the primary decides about them,
//! and a copy must say the same.

use super::origin::Origin;

/// A path with its parameters: the argument of a MAIL or RCPT command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path {
    /// As written, with its angle brackets if it had any: `<a@example.com>`, `<>`.
    pub path: Vec<u8>,
    /// What followed, without the blanks around it: `SIZE=1024 BODY=8BITMIME`.
    pub parameters: Vec<u8>,
}

impl Path {
    /// The parameters one by one.
    pub fn parameters(&self) -> impl Iterator<Item = &[u8]> {
        self.parameters.split(|o| o.is_ascii_whitespace()).filter(|p| !p.is_empty())
    }

    /// The value of the parameter `keyword=`, in any case.
    pub fn value(&self, keyword: &str) -> Option<&[u8]> {
        self.parameters().find_map(|parameter| {
            let (name, value) = split_parameter(parameter);
            name.eq_ignore_ascii_case(keyword.as_bytes()).then_some(value)
        })
    }

    /// The same path without the parameter `keyword=`.
    pub fn without(&self, keyword: &str) -> Path {
        let others = self.parameters().filter(|parameter| {
            !split_parameter(parameter).0.eq_ignore_ascii_case(keyword.as_bytes())
        });
        Path { parameters: others.collect::<Vec<_>>().join(&b' '), path: self.path.clone() }
    }

    /// Needs SMTPUTF8 (RFC 6531 §3.2): not all of it is ASCII.
    pub fn is_utf8(&self) -> bool {
        !self.path.is_ascii()
    }

    /// For the log, on one line whatever it holds.
    pub fn display(&self) -> String {
        String::from_utf8_lossy(&self.path)
            .chars()
            .flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] })
            .collect()
    }
}

/// Keyword and value of one parameter; the value is empty where there is none.
pub fn split_parameter(parameter: &[u8]) -> (&[u8], &[u8]) {
    match parameter.iter().position(|&o| o == b'=') {
        Some(at) => (&parameter[..at], &parameter[at + 1..]),
        None => (parameter, b""),
    }
}

/// A reverse-path and the forward-paths that the primary accepted for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope {
    /// The client of whoever passed it to us.
    pub origin: Origin,
    /// The argument of MAIL.
    pub reverse_path: Path,
    /// The arguments of the RCPTs, in their order.
    pub forward_paths: Vec<Path>,
}

impl Envelope {
    /// Octets of memory that it takes, about.
    pub fn octets(&self) -> u64 {
        let paths = self.forward_paths.iter().chain([&self.reverse_path]);
        let octets: usize =
            paths.map(|p| p.path.len() + p.parameters.len() + size_of::<Path>()).sum();
        (octets + self.origin.octets()) as u64
    }
}
