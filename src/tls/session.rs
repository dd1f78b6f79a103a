//! One TLS session over a socket.
//!
//! A [`Stream`](crate::stream::Stream) owns it beside its socket and lends that for each call. What
//! it says of ticks holds here as well: a call makes at most one wait. An end with close_notify and
//! one without are both the end of the connection: SMTP says itself what is whole (RFC 3207 §4).

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;

use nix::sys::socket::{MsgFlags, recv, send};
use rustls::{
    AlertDescription, CertificateError, Connection, Error, InvalidMessage, PeerIncompatible,
};

use crate::shutdown::Expired;
use crate::stream::{Unsecured, is_tick, uninterrupted};

/// More reads than this are not made in search of plaintext that is there already.
const MOST_READS: usize = 64;

/// A session, on either side.
pub struct Session {
    connection: Box<Connection>,
}

impl Session {
    /// A session that has not begun.
    pub(super) fn new(connection: Connection) -> Session {
        Session { connection: Box::new(connection) }
    }

    /// Shakes hands, for as long as `may_go_on`, which is asked before each read and write.
    ///
    /// # Errors
    /// [`Unsecured`], after which the socket is of no use, not even in clear.
    pub fn handshake(
        &mut self,
        socket: &TcpStream,
        may_go_on: impl Fn() -> Result<(), Expired>,
    ) -> Result<(), Unsecured> {
        while self.connection.is_handshaking() || self.is_behind() {
            may_go_on().map_err(Unsecured::Expired)?;
            let moved =
                if self.is_behind() { self.send(socket) } else { self.receive(&mut &*socket) };
            match moved {
                Ok(0) => return Err(Unsecured::Failed("closed in the handshake".into())),
                Ok(_) => {}
                Err(error) if is_tick(&error) => {}
                Err(error) => {
                    self.send_now(socket);
                    return Err(Unsecured::Failed(explain(&error)));
                }
            }
        }
        Ok(())
    }

    /// Version and cipher: `TLSv1.3 TLS13_AES_256_GCM_SHA384`.
    pub fn about(&self) -> String {
        let version = self.connection.protocol_version().map(|version| format!("{version:?}"));
        let suite = self.connection.negotiated_cipher_suite().map(|suite| suite.suite());
        let suite = suite.map(|suite| format!("{suite:?}")).unwrap_or_default();
        format!("{} {suite}", version.unwrap_or_default().replace('_', "."))
    }

    /// Octets that were taken are still to be written.
    pub fn is_behind(&self) -> bool {
        self.connection.wants_write()
    }

    /// Takes some of `octets` and gives how many; none while earlier ones are going out.
    ///
    /// # Errors
    /// A tick in which nothing moved, or those of write(2).
    pub fn write(&mut self, socket: &TcpStream, octets: &[u8]) -> io::Result<usize> {
        if self.is_behind() {
            return self.send(socket).map(|_| 0);
        }
        let taken = self.connection.writer().write(octets)?;
        match self.send(socket) {
            Err(error) if !is_tick(&error) => Err(error),
            // It would be asked again for ever.
            _ if taken == 0 => Err(ErrorKind::WriteZero.into()),
            _ => Ok(taken),
        }
    }

    /// Writes without waiting, and ends the session.
    pub fn write_last(&mut self, socket: &TcpStream, octets: &[u8]) {
        if self.connection.writer().write_all(octets).is_ok() {
            self.close(socket);
        }
    }

    /// Waits for octets; none is the end of the connection.
    ///
    /// # Errors
    /// A tick, which is also that octets came and no plaintext yet; or those of read(2), or a
    /// peer that breaks the protocol.
    pub fn read(&mut self, socket: &TcpStream, into: &mut [u8]) -> io::Result<usize> {
        match self.plaintext(into) {
            Err(error) if is_tick(&error) => {}
            found => return found,
        }
        self.receive(&mut &*socket)?;
        self.plaintext(into)
    }

    /// Reads what is there already, as [`Session::read`].
    ///
    /// # Errors
    /// As [`Session::read`].
    pub fn read_now(&mut self, socket: &TcpStream, into: &mut [u8]) -> io::Result<usize> {
        for _ in 0..MOST_READS {
            match self.plaintext(into) {
                Err(error) if is_tick(&error) => {}
                found => return found,
            }
            self.receive(&mut NoWait(socket))?;
        }
        // Much has come and no plaintext: an octet at a time, or records with nothing in them.
        Err(ErrorKind::WouldBlock.into())
    }

    /// Says that nothing more will be written, without waiting.
    pub fn close(&mut self, socket: &TcpStream) {
        self.connection.send_close_notify();
        self.send_now(socket);
    }

    /// What was received and not yet read. None there yet is a tick.
    fn plaintext(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self.connection.reader().read(into) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(0),
            read => read,
        }
    }

    /// Reads once from the socket. Gives how many octets came.
    fn receive(&mut self, from: &mut dyn Read) -> io::Result<usize> {
        let octets = uninterrupted(|| self.connection.read_tls(from))?;
        self.connection
            .process_new_packets()
            .map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
        Ok(octets)
    }

    /// Writes once to the socket. Gives how many octets went.
    fn send(&mut self, socket: &TcpStream) -> io::Result<usize> {
        match uninterrupted(|| self.connection.write_tls(&mut &*socket))? {
            0 => Err(ErrorKind::WriteZero.into()),
            octets => Ok(octets),
        }
    }

    /// Writes what can be written without waiting.
    fn send_now(&mut self, socket: &TcpStream) {
        while self.is_behind() && matches!(self.connection.write_tls(&mut NoWait(socket)), Ok(1..))
        {
        }
    }
}

/// A socket that is not waited for.
struct NoWait<'a>(&'a TcpStream);

impl Read for NoWait<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        Ok(recv(self.0.as_raw_fd(), into, MsgFlags::MSG_DONTWAIT)?)
    }
}

impl Write for NoWait<'_> {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        Ok(send(self.0.as_raw_fd(), octets, flags)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Why a handshake failed, for a person, with what can be done about it.
fn explain(error: &io::Error) -> String {
    let of_tls = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    match of_tls {
        Some(Error::InvalidCertificate(why)) => judgement(why),
        Some(
            Error::AlertReceived(AlertDescription::ProtocolVersion)
            | Error::PeerIncompatible(PeerIncompatible::ServerDoesNotSupportTls12Or13),
        ) => {
            format!("the server takes neither TLS 1.2 nor TLS 1.3: {error}")
        }
        Some(Error::InvalidMessage(InvalidMessage::InvalidContentType)) => format!(
            "what the server says is no TLS ({error}); tls: required begins with STARTTLS, \
             tls: implicit with TLS"
        ),
        _ => error.to_string(),
    }
}

/// What is wrong with a certificate.
fn judgement(why: &CertificateError) -> String {
    match why {
        CertificateError::NotValidForNameContext { presented, .. } if presented.is_empty() => {
            "the certificate is for no name (the one in CN does not count); set fingerprint".into()
        }
        CertificateError::NotValidForNameContext { expected, presented } => format!(
            "the certificate is not valid for name {}, but for {}; set server_name",
            expected.to_str(),
            presented.iter().map(|name| bare(name)).collect::<Vec<_>>().join(", "),
        ),
        CertificateError::ExpiredContext { not_after, .. } => format!(
            "the certificate expired at {}; renew it, or set fingerprint",
            date(not_after.as_secs())
        ),
        CertificateError::NotValidYetContext { time, not_before } => format!(
            "the certificate is not valid before {}, and the clock here says {}; set the clock, or \
             fingerprint",
            date(not_before.as_secs()),
            date(time.as_secs())
        ),
        CertificateError::UnknownIssuer => {
            "the certificate is from an issuer that is not trusted; set ca_file or fingerprint"
                .into()
        }
        CertificateError::BadSignature => {
            "the server's signature is bad, or its key too weak (RSA has to have 2048 bits)".into()
        }
        // One of a CA, one of version 1, one that is not pinned.
        CertificateError::Other(why) => {
            format!("the certificate is not valid: {why}; set fingerprint, or renew it")
        }
        why => format!("the certificate is not valid: {why}"),
    }
}

/// The name in `DnsName("mail.example.com")`, or the address in `IpAddress(192.0.2.1)`.
fn bare(name: &str) -> &str {
    let inner = name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')'));
    inner.map_or(name, |inner| inner.trim_matches('"'))
}

/// A time in seconds since 1970, for a person.
fn date(seconds: u64) -> String {
    match i64::try_from(seconds).map(jiff::Timestamp::from_second) {
        Ok(Ok(time)) => time.to_string(),
        _ => format!("{seconds} s since 1970"),
    }
}
