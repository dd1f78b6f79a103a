//! How secure a destination's connections have to be.
//!
//! `config` says it for each destination, and `connection::opening` brings it about.

use std::sync::Arc;

use crate::tls::Peer;

/// What keeps others from reading and changing what is sent: the key `tls`.
#[derive(Debug, Clone)]
pub enum Security {
    /// Nothing.
    None,
    /// TLS with whomever, by STARTTLS, where that is offered and works.
    Opportunistic(Arc<Peer>),
    /// TLS by STARTTLS with a server that proves who it is, or no mail.
    Required(Arc<Peer>),
    /// The same, with TLS from the first octet on (RFC 8314 §3.3).
    Implicit(Arc<Peer>),
}
