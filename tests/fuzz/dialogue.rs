//! What a client said and what it heard, put side by side by a second, simple reading of SMTP:
//! which of its octets were commands, which were messages, and which reply each of them got.

use crate::rules::{by_lines, replies};

/// A message that the client sent whole.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sent {
    /// The arguments of the XFORWARDs that were accepted for it.
    pub forwards: Vec<Vec<u8>>,
    /// The argument of the MAIL that was accepted, blanks aside.
    pub mail: Vec<u8>,
    /// The arguments of the RCPTs that were accepted, blanks aside.
    pub rcpts: Vec<Vec<u8>>,
    /// What it has to be on the wire, with the final dot.
    pub wire: Vec<u8>,
    /// The code that it got …
    pub code: u16,
    /// … with the whole reply.
    pub reply: Vec<u8>,
}

/// Reads the octets of a client and all that it heard until its session ended. Each line gets one
/// reply, and each message, until there are no more: then the client had said all, or said QUIT,
/// or the last reply was a 421. Gives the messages.
///
/// # Panics
/// When it is not so.
pub fn read(said: &[u8], heard: &[u8]) -> Vec<Sent> {
    let mut replies = replies(heard).into_iter();
    let mut last = replies.next().map(|(code, _)| code);
    assert!(matches!(last, Some(220)), "greeting: {}", heard.escape_ascii());
    let (mut messages, mut current, mut rest) = (Vec::new(), Sent::default(), said);
    let mut forwards = Vec::new();
    while let Some(length) = rest.iter().position(|&octet| octet == b'\n') {
        let Some((code, _)) = replies.next() else { break };
        last = Some(code);
        let words = rest[..length].trim_ascii();
        let line = without_blanks(words);
        rest = &rest[length + 1..];
        if let Some(mail) = argument(&line, b"MAILFROM:").filter(|_| code == 250) {
            current = Sent { forwards: std::mem::take(&mut forwards), mail, ..Sent::default() };
        } else if let Some(rcpt) = argument(&line, b"RCPTTO:").filter(|_| code == 250) {
            current.rcpts.push(rcpt);
        } else if let Some(forward) = argument(words, b"XFORWARD").filter(|_| code == 250) {
            forwards.push(forward.trim_ascii().to_vec());
        } else if code == 250
            && [b"RSET", b"EHLO", b"HELO"].iter().any(|verb| argument(words, *verb).is_some())
        {
            forwards.clear();
        }
        if code / 100 != 3 {
            continue;
        }
        assert!(line.eq_ignore_ascii_case(b"DATA"), "{code} to {}", line.escape_ascii());
        let (wire, Some(taken)) = by_lines(rest) else {
            // The client went away in the middle of it.
            rest = &[];
            break;
        };
        rest = &rest[taken..];
        let Some((code, reply)) = replies.next() else {
            panic!("a whole message got no reply: {}", wire.escape_ascii());
        };
        assert!(code / 100 != 3, "{code} to a whole message");
        last = Some(code);
        messages.push(Sent { wire, code, reply: reply.to_vec(), ..std::mem::take(&mut current) });
    }
    let mut more: Vec<u16> = replies.map(|(code, _)| code).collect();
    // The mistake that was one too many gets its own reply before the last.
    if let Some(421) = more.first() {
        last = Some(more.remove(0));
    }
    assert!(more.is_empty(), "more replies than lines: {}", heard.escape_ascii());
    let is_all_said = matches!(last, Some(221 | 421)) || !rest.contains(&b'\n');
    assert!(is_all_said, "unanswered: {}\nheard: {}", rest.escape_ascii(), heard.escape_ascii());
    messages
}

/// The argument of a command, in a line without blanks.
pub fn argument(line: &[u8], command: &[u8]) -> Option<Vec<u8>> {
    let (head, rest) = line.split_at_checked(command.len())?;
    head.eq_ignore_ascii_case(command).then(|| rest.to_vec())
}

/// Blanks may stand around the colon and behind everything; where exactly is nobody's business.
pub fn without_blanks(line: &[u8]) -> Vec<u8> {
    line.iter().copied().filter(|octet| !octet.is_ascii_whitespace()).collect()
}
