//! A socket on either side: a client's, or one to a destination.
//!
//! `smtp::client` and `relay::connection` own one each, and no other part of the program reads or
//! writes a connection. Every wait is cut into ticks: an operation that had to wait for longer
//! fails with an error that [`is_tick`] knows, so that the caller can look at the clock.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsRawFd;

use nix::sys::sendfile::sendfile;
use nix::sys::socket::{MsgFlags, recv, send};

use crate::shutdown::TICK;

/// A connected socket.
pub struct Stream {
    socket: TcpStream,
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
        Ok(Stream { socket })
    }

    /// Writes some of `octets`, at least one, and gives how many.
    ///
    /// # Errors
    /// A tick, or those of write(2).
    pub fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        match uninterrupted(|| self.socket.write(octets))? {
            0 => Err(ErrorKind::WriteZero.into()),
            n => Ok(n),
        }
    }

    /// Sends some of what lies in a file from `offset` on, `most` octets or less, and gives how
    /// many.
    ///
    /// # Errors
    /// As [`Stream::write`]; `UnexpectedEof` when the file is shorter.
    pub fn send_file(&mut self, file: &File, offset: u64, most: usize) -> io::Result<usize> {
        let mut offset = offset as i64;
        let sent = uninterrupted(|| Ok(sendfile(&self.socket, file, Some(&mut offset), most)?))?;
        if sent == 0 { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(sent) }
    }

    /// Writes without waiting, and without a word when that is not possible: for a last word.
    pub fn write_now(&mut self, octets: &[u8]) {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let _ = send(self.socket.as_raw_fd(), octets, flags);
    }

    /// Waits for octets. None at all is the end of the connection.
    ///
    /// # Errors
    /// A tick, or those of read(2).
    pub fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        uninterrupted(|| self.socket.read(into))
    }

    /// Reads what is there already, as [`Stream::read`]. What is not there is a tick.
    ///
    /// # Errors
    /// As [`Stream::read`].
    pub fn read_now(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let socket = self.socket.as_raw_fd();
        uninterrupted(|| Ok(recv(socket, into, MsgFlags::MSG_DONTWAIT)?))
    }

    /// Says that nothing more will be written.
    ///
    /// # Errors
    /// Those of shutdown(2).
    pub fn shutdown(&mut self) -> io::Result<()> {
        self.socket.shutdown(Shutdown::Write)
    }
}

/// A wait on a socket ended because its tick was over. A write that timed out says so too.
pub fn is_tick(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// Calls again after a signal.
fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}
