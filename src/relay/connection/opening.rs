//! How a connection comes about: connect, greeting, EHLO, TLS, AUTH.
//!
//! The order is that of the server's [`Security`]. With `tls: required` nothing but EHLO and
//! STARTTLS is said in clear, and what the server has said in clear is forgotten.

use std::io::ErrorKind;

use lettre::transport::smtp::commands::{Ehlo, Starttls};
use lettre::transport::smtp::extension::ClientId;

use super::{Connection, Failure, Limits, Protection, Step};
use crate::identity::Identity;
use crate::maillog;
use crate::relay::destination::Destination;
use crate::relay::features::Features;
use crate::relay::security::Security;
use crate::shutdown::Deadline;
use crate::smtp::reply::{Class, Reply};
use crate::stream::{Stream, Unsecured};
use crate::tls::Peer;

impl Connection {
    /// Connects, waits for the greeting, says EHLO (HELO where that is not understood), makes it
    /// as secure as the configuration asks, and logs in.
    ///
    /// # Errors
    /// Any [`Failure`]; a server that answers with 4xx or 5xx is [`Failure::Unwelcome`].
    pub fn open(
        to: &Destination,
        us: &Identity,
        limits: Limits,
        deadline: Deadline,
    ) -> Result<Connection, Failure> {
        let opening = Opening { to, us, limits, deadline };
        let mut connection = match to.security() {
            Security::None(_) => opening.in_clear(),
            Security::Opportunistic(peer) => opening.opportunistic(peer),
            Security::Required(peer, _) => opening.required(peer),
            Security::Implicit(peer, _) => opening.implicit(peer),
        }?;
        if let Some(login) = to.security().login() {
            connection.log_in(login, deadline)?;
        }
        Ok(*connection)
    }
}

/// What all steps need to know. They hand the connection on in a box, for what lies on the stack
/// meanwhile is memory of an idle client for as long as that stays.
struct Opening<'a> {
    to: &'a Destination,
    us: &'a Identity,
    limits: Limits,
    deadline: Deadline<'a>,
}

impl Opening<'_> {
    fn in_clear(&self) -> Result<Box<Connection>, Failure> {
        let mut connection = self.connect()?;
        self.greeting(&mut connection)?;
        self.hello(&mut connection)?;
        Ok(connection)
    }

    /// TLS where it is offered and works.
    fn opportunistic(&self, peer: &Peer) -> Result<Box<Connection>, Failure> {
        let connection = self.in_clear()?;
        match connection.features.starttls {
            true => self.with_tls(connection, peer),
            false => Ok(connection),
        }
    }

    /// TLS where it is offered, unless that fails: then a new connection in clear.
    fn with_tls(
        &self,
        mut connection: Box<Connection>,
        peer: &Peer,
    ) -> Result<Box<Connection>, Failure> {
        let failure = match self.start_tls(&mut connection, peer) {
            Ok(()) => {
                peer.goes_in_clear(false);
                return Ok(connection);
            }
            Err(failure @ Failure::Stopping(_)) => return Err(failure),
            Err(failure) => failure,
        };
        match &failure {
            // A refusal leaves everything as it was.
            Failure::Unwelcome(Step::StartTls, reply) if reply.code() != 421 => connection.rest(),
            _ => connection = self.in_clear()?,
        }
        if peer.goes_in_clear(true) {
            maillog::goes_in_clear(self.to, &failure);
        }
        connection.protection = Protection::Failed(failure);
        Ok(connection)
    }

    /// TLS by STARTTLS, or no connection.
    fn required(&self, peer: &Peer) -> Result<Box<Connection>, Failure> {
        let mut connection = self.connect()?;
        let hello = self.greeting(&mut connection).and_then(|()| self.ehlo(&mut connection));
        // Whatever comes of it: not even QUIT in clear.
        connection.at_rest = false;
        hello?;
        if !connection.features.starttls {
            let what = "not offered, and tls: required";
            return Err(Failure::Unfit(Step::StartTls, what.into()));
        }
        self.start_tls(&mut connection, peer)?;
        Ok(connection)
    }

    /// TLS from the first octet on, or no connection.
    fn implicit(&self, peer: &Peer) -> Result<Box<Connection>, Failure> {
        let mut connection = self.connect()?;
        self.handshake(&mut connection, peer)?;
        self.greeting(&mut connection)?;
        self.hello(&mut connection)?;
        Ok(connection)
    }

    fn connect(&self) -> Result<Box<Connection>, Failure> {
        let limits = self.limits;
        let socket = self.to.connect(self.deadline.renewed(limits.connect));
        let stream = socket.and_then(Stream::new).map_err(|error| match error.kind() {
            ErrorKind::Interrupted => Failure::Stopping(Step::Connect),
            _ => Failure::Connect(error),
        })?;
        Ok(Box::new(Connection {
            stream,
            input: Vec::new(),
            features: Features::default(),
            greeting: Reply::new(220, "", ""),
            protection: Protection::Nothing,
            at_rest: false,
            limits,
        }))
    }

    /// The greeting, which must not be our own.
    fn greeting(&self, connection: &mut Connection) -> Result<(), Failure> {
        connection.greeting = self.welcome(connection, Step::Greeting)?;
        match self.us.greets(&connection.greeting) {
            true => Err(Failure::Ourselves),
            false => Ok(()),
        }
    }

    /// EHLO, or HELO where EHLO is refused for good.
    fn hello(&self, connection: &mut Connection) -> Result<(), Failure> {
        match self.ehlo(connection) {
            Err(Failure::Unwelcome(_, reply)) if reply.class() == Class::Permanent => {
                let helo = format!("HELO {}\r\n", self.us.domain);
                connection.send(helo.as_bytes(), Step::Hello, self.deadline)?;
                self.welcome(connection, Step::Hello).map(drop)
            }
            done => done,
        }
    }

    fn ehlo(&self, connection: &mut Connection) -> Result<(), Failure> {
        let ehlo = Ehlo::new(ClientId::Domain(self.us.domain.clone())).to_string();
        connection.send(ehlo.as_bytes(), Step::Hello, self.deadline)?;
        connection.features = Features::from_ehlo(&self.welcome(connection, Step::Hello)?);
        Ok(())
    }

    /// STARTTLS, the handshake, and EHLO anew.
    fn start_tls(&self, connection: &mut Connection, peer: &Peer) -> Result<(), Failure> {
        connection.send(Starttls.to_string().as_bytes(), Step::StartTls, self.deadline)?;
        let reply = connection.reply(Step::StartTls, self.deadline)?;
        match reply.class() {
            Class::Success => {}
            Class::Intermediate => {
                return Err(Failure::Nonsense(Step::StartTls, reply.to_string()));
            }
            _ => return Err(Failure::Unwelcome(Step::StartTls, reply)),
        }
        // What stands behind the 220 was said in clear, by whomever, and must not pass for a reply
        // to what is said later (the other side of CVE-2011-0411).
        connection.check_quiet(Step::StartTls)?;
        self.handshake(connection, peer)?;
        connection.features = Features::default();
        self.hello(connection)
    }

    fn handshake(&self, connection: &mut Connection, peer: &Peer) -> Result<(), Failure> {
        let until = self.deadline.renewed(self.limits.command);
        let unfit = |what| Failure::Unfit(Step::Handshake, what);
        let session = peer.session().map_err(unfit)?;
        let secured = connection.stream.secure(session, || until.left().map(drop));
        secured.map_err(|error| match error {
            Unsecured::Expired(expired) => Failure::expired(expired, Step::Handshake),
            Unsecured::Failed(what) => unfit(what),
        })?;
        let cipher = connection.stream.tls().unwrap_or_default();
        connection.protection = Protection::Tls { cipher, is_verified: peer.is_verified() };
        maillog::relay_has_tls(self.to, &connection.protection);
        Ok(())
    }

    /// A reply that has to be a 2xx.
    fn welcome(&self, connection: &mut Connection, step: Step) -> Result<Reply, Failure> {
        let reply = connection.reply(step, self.deadline)?;
        connection.rest();
        match reply.class() {
            Class::Success => Ok(reply),
            Class::Intermediate => Err(Failure::Nonsense(step, reply.to_string())),
            Class::Transient | Class::Permanent => Err(Failure::Unwelcome(step, reply)),
        }
    }
}
