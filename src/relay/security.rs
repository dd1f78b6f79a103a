//! How secure a destination's connections have to be, and who we are to it.
//!
//! `config` says it for each destination, and `connection::opening` brings it about.

use std::fmt;
use std::sync::Arc;

use lettre::transport::smtp::authentication::Credentials;

use crate::tls::Peer;

/// What keeps others from reading and changing what is sent: the key `tls`.
#[derive(Debug, Clone)]
pub enum Security {
    /// Nothing. Whoever logs in says the password in clear.
    None(Option<Login>),
    /// TLS with whomever, by STARTTLS, where that is offered and works.
    Opportunistic(Arc<Peer>),
    /// TLS by STARTTLS with a server that proves who it is, or no mail.
    Required(Arc<Peer>, Option<Login>),
    /// The same, with TLS from the first octet on (RFC 8314 §3.3).
    Implicit(Arc<Peer>, Option<Login>),
}

impl Security {
    /// Who we are to the server, if it wants to know. One that anybody can pass for is not told.
    pub fn login(&self) -> Option<&Login> {
        match self {
            Security::Opportunistic(_) => None,
            Security::None(login) | Security::Required(_, login) | Security::Implicit(_, login) => {
                login.as_ref()
            }
        }
    }
}

/// A name and a password. Nothing that can be printed has the password.
#[derive(Clone)]
pub struct Login {
    username: String,
    password: String,
}

/// What others can see of a secret is one if it has so many octets, or is whole.
const TELLING: usize = 6;

impl Login {
    /// A name and a password, neither of them empty.
    pub fn new(username: String, password: String) -> Login {
        Login { username, password }
    }

    /// The name.
    pub fn username(&self) -> &str {
        &self.username
    }

    /// Both, for the mechanisms of SASL.
    pub fn credentials(&self) -> Credentials {
        Credentials::new(self.username.clone(), self.password.clone())
    }

    /// `text` has a part of the password in it, or of what was `sent` in the course of logging in.
    pub fn is_told_by(&self, text: &[u8], sent: &[Vec<u8>]) -> bool {
        let mut secrets = sent.iter().map(Vec::as_slice).chain([self.password.as_bytes()]);
        secrets.any(|secret| {
            let mut parts = secret.windows(secret.len().clamp(1, TELLING));
            parts.any(|part| memchr::memmem::find(text, part).is_some())
        })
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Login({:?})", self.username)
    }
}
