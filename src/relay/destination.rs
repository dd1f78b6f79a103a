//! A destination: the primary or one backup, as configured.
//!
//! `config` makes it, `connection` connects to it, log lines and replies name it.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs};
use std::thread;

use crossbeam_channel::{RecvTimeoutError, bounded};

use super::security::Security;
use crate::shutdown::{Deadline, Expired};

/// Host and port of a server, and how secure the way to it has to be.
#[derive(Debug, Clone)]
pub struct Destination {
    host: String,
    port: u16,
    /// As configured, for people: `new.example.com:25`, `[::1]:25`.
    name: String,
    security: Security,
}

/// The same server, whatever is asked of it.
impl PartialEq for Destination {
    fn eq(&self, other: &Destination) -> bool {
        (&self.host, self.port) == (&other.host, other.port)
    }
}

impl Destination {
    /// Reads `host:port`; an IPv6 address stands in brackets. Nothing secures it yet.
    ///
    /// # Errors
    /// A text that says what is wrong and what to write instead.
    pub fn parse(text: &str) -> Result<Destination, String> {
        if text.is_empty() {
            return Err("is empty; write host:port, as mail.example.com:25".into());
        }
        let no_port = || format!("has no port; write {text}:25");
        let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((host, rest)) => {
                host.parse::<std::net::Ipv6Addr>().map_err(
                    |_| "has no IPv6 address in its brackets; write a host name without them",
                )?;
                (host, rest.strip_prefix(':').ok_or_else(no_port)?)
            }
            None if text.matches(':').count() > 1 => {
                return Err(
                    "has several colons; write an IPv6 address in brackets, as [2001:db8::1]:25"
                        .into(),
                );
            }
            None => text.split_once(':').ok_or_else(no_port)?,
        };
        if host.is_empty()
            || host.contains(|c: char| c.is_whitespace() || c.is_control() || c == '/' || c == ',')
        {
            return Err("has no host name; write host:port, as mail.example.com:25".into());
        }
        let number = port_number(port).filter(|&number| number > 0);
        let port = number.ok_or_else(|| {
            format!("has the port \"{port}\"; a port is a number from 1 to 65535")
        })?;
        let (host, name) = (host.to_string(), text.to_string());
        Ok(Destination { host, port, name, security: Security::None(None) })
    }

    /// The same server, but as secure as this.
    pub fn secured(self, security: Security) -> Destination {
        Destination { security, ..self }
    }

    /// How secure its connections have to be.
    pub fn security(&self) -> &Security {
        &self.security
    }

    /// Its name or address, without the port.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Its address when it was given as one, not as a name.
    pub fn literal(&self) -> Option<SocketAddr> {
        self.host.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, self.port))
    }

    /// It was given as an address.
    pub fn is_literal(&self) -> bool {
        self.literal().is_some()
    }

    /// Its address when it is `localhost`, which needs no look-up (RFC 6761 §6.3).
    pub fn local_name(&self) -> Option<SocketAddr> {
        let is_local = self.host.eq_ignore_ascii_case("localhost");
        is_local.then(|| SocketAddr::from(([127, 0, 0, 1], self.port)))
    }

    /// All addresses of the host name, looked up now.
    ///
    /// # Errors
    /// What the resolver says, or `TimedOut`.
    pub fn addresses(&self, deadline: Deadline) -> io::Result<Vec<SocketAddr>> {
        if let Some(address) = self.literal() {
            return Ok(vec![address]);
        }
        // The resolver has no time limit of its own that could be set: a thread waits for it, and
        // is left behind when it takes too long.
        let (sender, receiver) = bounded(1);
        let (host, port) = (self.host.clone(), self.port);
        thread::Builder::new().name("resolver".into()).stack_size(256 * 1024).spawn(move || {
            let _ = sender.send((host.as_str(), port).to_socket_addrs().map(Vec::from_iter));
        })?;
        loop {
            let left = deadline.left().map_err(expired)?;
            match receiver.recv_timeout(left.min(crate::shutdown::TICK)) {
                Ok(addresses) => return addresses,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(io::Error::other("the resolver died"));
                }
            }
        }
    }

    /// Connects to the first of its addresses that answers. Each of several gets its share of the
    /// time, so that one which swallows packets leaves some for the next.
    ///
    /// # Errors
    /// That of the last address tried.
    pub fn connect(&self, deadline: Deadline) -> io::Result<TcpStream> {
        let addresses = self.addresses(deadline)?;
        let mut failure = io::Error::new(io::ErrorKind::NotFound, "the host name has no address");
        for (tried, address) in addresses.iter().enumerate() {
            let share = deadline.left().map_err(expired)? / (addresses.len() - tried) as u32;
            match TcpStream::connect_timeout(address, share) {
                Ok(stream) => return Ok(stream),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }
}

/// A port: digits alone.
pub fn port_number(text: &str) -> Option<u16> {
    if text.bytes().all(|octet| octet.is_ascii_digit()) { text.parse().ok() } else { None }
}

/// The end of a deadline as an I/O error.
fn expired(expired: Expired) -> io::Error {
    match expired {
        Expired::TimedOut => io::Error::new(io::ErrorKind::TimedOut, "timed out"),
        Expired::Stopping => io::Error::new(io::ErrorKind::Interrupted, "smtp-dup is stopping"),
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}
