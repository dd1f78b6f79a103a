//! Who the client was before it came to us: the attributes of XFORWARD.
//!
//! A proxy tells the server behind it who the real client is, in commands `XFORWARD NAME=value …`
//! before MAIL, for the transaction that follows (Postfix's XFORWARD_README). They pass through us
//! to the primary, and with each copy to the backups. What is in them the servers judge.

/// No more attributes are kept; Postfix knows seven.
const MOST: usize = 16;

/// Longest line that is made of several attributes, in octets (RFC 5321 §4.5.3.1.4).
const MAX_LINE: usize = 512;

/// The attributes of one transaction, each once.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origin(Vec<Attribute>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Attribute {
    /// In capitals.
    name: String,
    /// As it was written: xtext (RFC 3461 §4), or a word in brackets for one that is not known.
    value: Vec<u8>,
}

impl Origin {
    /// Adds what an accepted XFORWARD command has behind its verb. A new value takes the place of
    /// an old one.
    pub fn take(&mut self, argument: &[u8]) {
        for word in argument.split(u8::is_ascii_whitespace) {
            let Some(equals) = word.iter().position(|&o| o == b'=') else { continue };
            let name = String::from_utf8_lossy(&word[..equals]).to_ascii_uppercase();
            let value = word[equals + 1..].to_vec();
            match self.0.iter().position(|attribute| attribute.name == name) {
                Some(at) => self.0[at].value = value,
                None if self.0.len() < MOST => self.0.push(Attribute { name, value }),
                None => {}
            }
        }
    }

    /// Nothing is known.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Arguments of XFORWARD commands for those attributes that `is_known` by the server.
    pub fn arguments(&self, is_known: impl Fn(&str) -> bool) -> Vec<Vec<u8>> {
        let most = MAX_LINE - "XFORWARD \r\n".len();
        let mut lines: Vec<Vec<u8>> = Vec::new();
        for Attribute { name, value } in self.0.iter().filter(|one| is_known(&one.name)) {
            let word = [name.as_bytes(), b"=", value].concat();
            match lines.last_mut() {
                Some(line) if line.len() + 1 + word.len() <= most => {
                    line.push(b' ');
                    line.extend_from_slice(&word);
                }
                _ => lines.push(word),
            }
        }
        lines
    }

    /// The client as Postfix shows one, `name[address]`, if its address is known. One word, whatever
    /// the attributes hold.
    pub fn client(&self) -> Option<String> {
        let address = self.known("ADDR")?;
        let address = address.strip_prefix("IPV6:").unwrap_or(&address);
        Some(format!("{}[{address}]", self.known("NAME").as_deref().unwrap_or("unknown")))
    }

    /// The text of an attribute, if there is one: not `[UNAVAILABLE]` or `[TEMPUNAVAIL]`.
    fn known(&self, name: &str) -> Option<String> {
        let value = &self.0.iter().find(|attribute| attribute.name == name)?.value;
        if value.is_empty() || value.starts_with(b"[") {
            return None;
        }
        let text = String::from_utf8_lossy(&decoded(value)).into_owned();
        Some(text.replace(|c: char| c.is_whitespace() || c.is_control(), "?"))
    }

    /// Octets of memory that it takes, about.
    pub fn octets(&self) -> usize {
        self.0.iter().map(|one| one.name.len() + one.value.len() + size_of::<Attribute>()).sum()
    }
}

/// What xtext stands for: `+` and two hexadecimal digits are an octet.
fn decoded(xtext: &[u8]) -> Vec<u8> {
    let mut octets = Vec::with_capacity(xtext.len());
    let mut rest = xtext;
    while let [first, behind @ ..] = rest {
        let digits = behind.get(..2).filter(|_| *first == b'+');
        let digits = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        let octet = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        octets.push(octet.unwrap_or(*first));
        rest = if octet.is_some() { &behind[2..] } else { behind };
    }
    octets
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(arguments: &[&str]) -> Origin {
        let mut origin = Origin::default();
        arguments.iter().for_each(|argument| origin.take(argument.as_bytes()));
        origin
    }

    #[test]
    fn the_last_value_counts() {
        let origin = origin(&["name=a ADDR=192.0.2.1", "NAME=b  HELO=c nothing"]);
        let lines = origin.arguments(|_| true);
        assert_eq!(lines, [b"NAME=b ADDR=192.0.2.1 HELO=c"]);
        assert_eq!(origin.arguments(|name| name == "ADDR"), [b"ADDR=192.0.2.1"]);
        assert!(origin.arguments(|_| false).is_empty());
    }

    #[test]
    fn lines_are_no_longer_than_a_command_may_be() {
        let long = "x".repeat(255);
        let origin = origin(&[&format!("NAME={long}"), &format!("HELO={long} IDENT={long}")]);
        let lines = origin.arguments(|_| true);
        assert_eq!(lines.len(), 3);
        assert!(lines.iter().all(|line| line.len() + "XFORWARD \r\n".len() <= MAX_LINE));
    }

    #[test]
    fn a_client_is_one_word() {
        for (argument, client) in [
            ("NAME=mx.example ADDR=192.0.2.1", Some("mx.example[192.0.2.1]")),
            ("NAME=[UNAVAILABLE] ADDR=192.0.2.1", Some("unknown[192.0.2.1]")),
            ("ADDR=IPV6:2001:db8::1", Some("unknown[2001:db8::1]")),
            ("NAME=a+2Bb+3D+zz+ ADDR=x+20y+0Az", Some("a+b=+zz+[x?y?z]")),
            ("NAME=localhost ADDR=[UNAVAILABLE]", None),
            ("NAME=localhost ADDR=", None),
            ("", None),
        ] {
            assert_eq!(origin(&[argument]).client().as_deref(), client, "{argument}");
        }
    }

    #[test]
    fn nobody_fills_the_memory() {
        let mut origin = Origin::default();
        (0..1000).for_each(|n| origin.take(format!("A{n}=x").as_bytes()));
        assert_eq!(origin.0.len(), MOST);
    }
}
