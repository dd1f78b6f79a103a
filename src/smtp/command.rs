//! One command line of a client -> a [`Command`].
//!
//! Only what has to be understood is: the verb, and for MAIL and RCPT where the path ends and the
//! parameters begin. Paths are not looked into, so that quoted local parts, address literals,
//! source routes and UTF-8 are all the primary's to judge.

use super::envelope::Path;

/// A command that could be read.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// EHLO, whatever the client calls itself.
    Ehlo,
    /// HELO, the same.
    Helo,
    /// A command of the transaction, which travels to the primary.
    Relayed(Relayed),
    /// RSET, whatever its argument.
    Rset,
    /// NOOP, whatever its argument.
    Noop,
    /// QUIT, whatever its argument.
    Quit,
    /// HELP.
    Help,
    /// VRFY.
    Vrfy,
    /// STARTTLS.
    StartTls,
    /// A command of SMTP that is not offered: EXPN, AUTH, BDAT, TURN …
    NotOffered,
}

/// A command that the primary answers.
#[derive(Debug, PartialEq, Eq)]
pub enum Relayed {
    /// MAIL with its reverse-path.
    Mail(Path),
    /// RCPT with a forward-path.
    Rcpt(Path),
    /// DATA.
    Data,
    /// XFORWARD, before MAIL, with its attributes.
    Xforward(Vec<u8>),
}

/// Why a line is no command.
#[derive(Debug, PartialEq, Eq)]
pub enum Malformed {
    /// The verb is not known: 500.
    Unknown,
    /// The verb is, its argument is not right: 501 with what is wrong.
    Argument(&'static str),
}

impl Relayed {
    /// The verb, for log lines and errors.
    pub fn verb(&self) -> &'static str {
        match self {
            Relayed::Mail(_) => "MAIL",
            Relayed::Rcpt(_) => "RCPT",
            Relayed::Data => "DATA",
            Relayed::Xforward(_) => "XFORWARD",
        }
    }

    /// The first of a transaction, or said before that.
    pub fn begins(&self) -> bool {
        matches!(self, Relayed::Mail(_) | Relayed::Xforward(_))
    }

    /// Appends the command as it goes to the primary.
    pub fn write(&self, out: &mut Vec<u8>) {
        let (start, path) = match self {
            Relayed::Mail(path) => ("MAIL FROM:", path),
            Relayed::Rcpt(path) => ("RCPT TO:", path),
            Relayed::Data => return out.extend_from_slice(b"DATA\r\n"),
            Relayed::Xforward(attributes) => {
                out.extend_from_slice(b"XFORWARD ");
                out.extend_from_slice(attributes);
                return out.extend_from_slice(b"\r\n");
            }
        };
        out.extend_from_slice(start.as_bytes());
        out.extend_from_slice(&path.path);
        if !path.parameters.is_empty() {
            out.push(b' ');
            out.extend_from_slice(&path.parameters);
        }
        out.extend_from_slice(b"\r\n");
    }
}

impl Command {
    /// Reads a line without its ending. Verbs may be in any case, blanks may trail.
    ///
    /// # Errors
    /// [`Malformed`] says which reply the line deserves.
    pub fn parse(line: &[u8]) -> Result<Command, Malformed> {
        // What is passed on must be one line for every server: no bare CR, no NUL.
        if line.iter().any(|&o| o == b'\r' || o == 0) {
            return Err(Malformed::Argument("a command holds no CR and no NUL"));
        }
        let line = line.trim_ascii();
        let end = line.iter().position(|&o| o == b' ' || o == b'\t').unwrap_or(line.len());
        let (verb, argument) = (&line[..end], line[end..].trim_ascii_start());
        match verb.to_ascii_uppercase().as_slice() {
            b"EHLO" | b"HELO" if argument.is_empty() => {
                Err(Malformed::Argument("a host name is missing"))
            }
            b"EHLO" => Ok(Command::Ehlo),
            b"HELO" => Ok(Command::Helo),
            b"MAIL" => path(argument, b"FROM").map(Relayed::Mail).map(Command::Relayed),
            b"RCPT" => path(argument, b"TO").map(Relayed::Rcpt).map(Command::Relayed),
            b"DATA" if argument.is_empty() => Ok(Command::Relayed(Relayed::Data)),
            b"DATA" => Err(Malformed::Argument("DATA takes no argument")),
            b"XFORWARD" => Ok(Command::Relayed(Relayed::Xforward(argument.to_vec()))),
            b"RSET" => Ok(Command::Rset),
            b"NOOP" => Ok(Command::Noop),
            b"QUIT" => Ok(Command::Quit),
            b"HELP" => Ok(Command::Help),
            b"VRFY" => Ok(Command::Vrfy),
            b"STARTTLS" if argument.is_empty() => Ok(Command::StartTls),
            b"STARTTLS" => Err(Malformed::Argument("STARTTLS takes no argument")),
            b"EXPN" | b"AUTH" | b"BDAT" | b"TURN" | b"ETRN" | b"SEND" | b"SOML" | b"SAML"
            | b"XCLIENT" => Ok(Command::NotOffered),
            _ => Err(Malformed::Unknown),
        }
    }
}

/// `FROM:<path> parameters` or `TO:<path> parameters`, with blanks allowed around the colon.
fn path(argument: &[u8], word: &[u8]) -> Result<Path, Malformed> {
    let rest = match argument.split_at_checked(word.len()) {
        Some((head, rest)) if head.eq_ignore_ascii_case(word) => rest.trim_ascii_start(),
        _ => {
            return Err(Malformed::Argument(
                "the syntax is MAIL FROM:<address>, RCPT TO:<address>",
            ));
        }
    };
    let rest = match rest {
        [b':', rest @ ..] => rest.trim_ascii_start(),
        _ => return Err(Malformed::Argument("a colon is missing")),
    };
    let end = path_end(rest).ok_or(Malformed::Argument("a path ends with >"))?;
    let (path, parameters) = rest.split_at(end);
    if path.is_empty() {
        return Err(Malformed::Argument("an address is missing"));
    }
    if parameters.first().is_some_and(|o| !o.is_ascii_whitespace()) {
        return Err(Malformed::Argument("a blank is missing behind the path"));
    }
    Ok(Path { path: path.to_vec(), parameters: parameters.trim_ascii().to_vec() })
}

/// Where the path at the head of `text` ends: behind its closing bracket, which may also stand
/// inside a quoted local part; a path without brackets ends at a blank.
fn path_end(text: &[u8]) -> Option<usize> {
    let bracketed = text.first() == Some(&b'<');
    let (mut quoted, mut escaped) = (false, false);
    for (at, &octet) in text.iter().enumerate() {
        match octet {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'>' if bracketed && !quoted => return Some(at + 1),
            b' ' | b'\t' if !bracketed && !quoted => return Some(at),
            _ => {}
        }
    }
    if !bracketed {
        return Some(text.len());
    }
    // A quote that is never closed is for the primary to judge: the last bracket that can end a
    // path does.
    let ends =
        |at: &usize| text[*at] == b'>' && text.get(at + 1).is_none_or(u8::is_ascii_whitespace);
    (0..text.len()).rfind(ends).map(|at| at + 1)
}
