//! A socket on either side, in clear or with TLS over it: a client's, or one to a destination.
//!
//! `smtp::client` and `relay::connection` own one each, and no other part of the program reads or
//! writes a connection. Every wait is cut into ticks: an operation that had to wait for longer
//! fails with an error that [`is_tick`] knows, so that the caller can look at the clock.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use nix::sys::sendfile::sendfile;
use nix::sys::socket::{MsgFlags, recv, send};

use crate::shutdown::{Expired, TICK};
use crate::tls::Session;

/// So much of a file is read at once to be encrypted, in octets: what a session takes at once.
const PIECE: usize = 64 * 1024;

/// A connected socket.
pub struct Stream {
    socket: TcpStream,
    tls: Option<Session>,
}

/// Why there is no TLS, and no use for the socket either.
#[derive(Debug)]
pub enum Unsecured {
    /// The handshake took too long, or the program ends.
    Expired(Expired),
    /// It failed: what a person wants to know of that.
    Failed(String),
}

impl Stream {
    /// Sets the options of every socket: no waiting for more to send, and a tick.
    ///
    /// # Errors
    /// Those of setsockopt(2).
    pub fn new(socket: TcpStream) -> io::Result<Stream> {
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(TICK))?;
        socket.set_write_timeout(Some(TICK))?;
        Ok(Stream { socket, tls: None })
    }

    /// Shakes hands for TLS, for as long as `may_go_on`. All that follows travels in `session`.
    ///
    /// # Errors
    /// [`Unsecured`]: nothing can be read or written any more.
    pub fn secure(
        &mut self,
        session: Session,
        may_go_on: impl Fn() -> Result<(), Expired>,
    ) -> Result<(), Unsecured> {
        self.tls.insert(session).handshake(&self.socket, may_go_on)
    }

    /// Version and cipher of TLS, if there is TLS.
    pub fn tls(&self) -> Option<String> {
        self.tls.as_ref().map(Session::about)
    }

    /// Octets that [`Stream::write`] has taken are not yet on their way: write on, if only nothing.
    pub fn is_behind(&self) -> bool {
        self.tls.as_ref().is_some_and(Session::is_behind)
    }

    /// Takes some of `octets` and gives how many; none is a success too, of what was behind.
    ///
    /// # Errors
    /// A tick in which nothing moved, or those of write(2).
    pub fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        if let Some(tls) = &mut self.tls {
            return tls.write(&self.socket, octets);
        }
        match uninterrupted(|| self.socket.write(octets))? {
            0 => Err(ErrorKind::WriteZero.into()),
            n => Ok(n),
        }
    }

    /// Sends some of what lies in a file from `offset` on, `most` octets or less, and gives how
    /// many, as [`Stream::write`] does.
    ///
    /// # Errors
    /// As [`Stream::write`]; `UnexpectedEof` when the file is shorter.
    pub fn send_file(&mut self, file: &File, offset: u64, most: usize) -> io::Result<usize> {
        if self.tls.is_some() {
            return self.write_file(file, offset, most);
        }
        let mut offset = offset as i64;
        let sent = uninterrupted(|| Ok(sendfile(&self.socket, file, Some(&mut offset), most)?))?;
        if sent == 0 { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(sent) }
    }

    /// As [`Stream::send_file`], where the octets have to pass through our hands.
    fn write_file(&mut self, file: &File, offset: u64, most: usize) -> io::Result<usize> {
        if self.is_behind() {
            return self.write(&[]);
        }
        let mut piece = vec![0; most.min(PIECE)];
        match file.read_at(&mut piece, offset)? {
            0 => Err(ErrorKind::UnexpectedEof.into()),
            n => self.write(&piece[..n]),
        }
    }

    /// Writes without waiting, and without a word when that is not possible: for a last word.
    pub fn write_last(&mut self, octets: &[u8]) {
        if let Some(tls) = &mut self.tls {
            return tls.write_last(&self.socket, octets);
        }
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let _ = send(self.socket.as_raw_fd(), octets, flags);
    }

    /// Waits for octets. None at all is the end of the connection.
    ///
    /// # Errors
    /// A tick, or those of read(2).
    pub fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match &mut self.tls {
            Some(tls) => tls.read(&self.socket, into),
            None => uninterrupted(|| self.socket.read(into)),
        }
    }

    /// Reads what is there already, as [`Stream::read`]. What is not there is a tick.
    ///
    /// # Errors
    /// As [`Stream::read`].
    pub fn read_now(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if let Some(tls) = &mut self.tls {
            return tls.read_now(&self.socket, into);
        }
        let socket = self.socket.as_raw_fd();
        uninterrupted(|| Ok(recv(socket, into, MsgFlags::MSG_DONTWAIT)?))
    }

    /// Says that nothing more will be written.
    ///
    /// # Errors
    /// Those of shutdown(2).
    pub fn shutdown(&mut self) -> io::Result<()> {
        if let Some(tls) = &mut self.tls {
            tls.close(&self.socket);
        }
        self.socket.shutdown(Shutdown::Write)
    }
}

/// A wait on a socket ended because its tick was over. A write that timed out says so too.
pub fn is_tick(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// Calls again after a signal.
pub fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}
