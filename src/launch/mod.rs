//! How the program was started, and where its clients come from.
//!
//! Nothing has to be said for it: [`Master::found`](master::Master::found) and [`Launch::find`]
//! look at the descriptors and the environment that the program woke up with. `main` does the
//! rest, in the order that privileges ask for.

pub mod descriptors;
pub mod inherited;
pub mod listener;
pub mod master;
pub mod privileges;
pub mod signals;
pub mod systemd;

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};

use inherited::{Socket, Stdin};

use crate::logger::{self, Place};
use crate::maillog;
use crate::smtp::reply::Reply;

/// Where clients come from.
#[derive(Debug)]
pub enum Clients {
    /// From listening sockets, until the program is told to end.
    Many(Vec<TcpListener>),
    /// There is one, and the program ends with its session.
    One(TcpStream),
}

impl Clients {
    /// The addresses that they reach us at.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        match self {
            Clients::Many(listeners) => addresses(listeners),
            Clients::One(stream) => stream.local_addr().into_iter().collect(),
        }
    }
}

/// Where they listen.
pub fn addresses(listeners: &[TcpListener]) -> Vec<SocketAddr> {
    listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect()
}

/// A start by anyone but master(8).
#[derive(Debug)]
pub struct Launch {
    /// The clients that came with it; `None` when the program has to listen by itself.
    pub clients: Option<Clients>,
    /// Where it logs unless the configuration says otherwise.
    pub log: Place,
}

impl Launch {
    /// By a person or a supervisor, without any sockets.
    pub const ALONE: Launch = Launch { clients: None, log: Place::Stderr };

    /// Looks for sockets of systemd, then at standard input. Afterwards fds 0, 1 and 2 do not
    /// lead to a client.
    ///
    /// # Errors
    /// A text about sockets that cannot be served.
    pub fn find() -> Result<Launch, String> {
        let sockets = systemd::sockets()?;
        if !sockets.is_empty() {
            return Ok(Launch { clients: Some(clients(sockets)?), log: Place::Stderr });
        }
        match inherited::take_stdin().map_err(|error| format!("standard input: {error}"))? {
            Some(Stdin { socket, has_stderr }) => {
                let log = if has_stderr { Place::Stderr } else { Place::syslog() };
                Ok(Launch { clients: Some(clients(vec![socket])?), log })
            }
            None => Ok(Launch::ALONE),
        }
    }

    /// The start is in vain, before the log was opened: says why in the log, and to the client if
    /// there is one that it may try again.
    pub fn refuse(self, why: &str) {
        match self.log {
            Place::Stderr if !logger::is_journal() => eprintln!("smtp-dup: {why}"),
            place => {
                logger::start([place], log::LevelFilter::Info);
                maillog::fatal(why);
            }
        }
        if let Some(clients) = self.clients {
            clients.turn_away();
        }
    }
}

impl Clients {
    /// Tells a client that is there already that nothing can be done for it now.
    pub fn turn_away(self) {
        if let Clients::One(mut stream) = self {
            let reply = Reply::new(421, "4.3.0", "smtp-dup cannot start here; try again later");
            let _ = stream.write_all(reply.wire());
        }
    }
}

/// One connection, or any number of sockets that listen.
fn clients(sockets: Vec<Socket>) -> Result<Clients, String> {
    let mut listeners = Vec::new();
    let alone = sockets.len() == 1;
    for socket in sockets {
        match socket {
            Socket::Listener(listener) => listeners.push(listener),
            Socket::Connection(stream) if alone => return Ok(Clients::One(stream)),
            Socket::Connection(_) => {
                return Err("connections among the sockets of systemd; use Accept=yes for one \
                            connection a process, Accept=no for sockets that listen"
                    .into());
            }
        }
    }
    Ok(Clients::Many(listeners))
}
