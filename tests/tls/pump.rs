//! Carries octets between two sockets, of which either may have TLS over it.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustls::Connection;

/// No more than this waits for the other side, in octets.
const MOST: usize = 256 * 1024;

/// One of the two.
pub struct Side {
    socket: TcpStream,
    tls: Option<Connection>,
    /// To be written; with TLS the session holds it.
    out: Vec<u8>,
    /// Its peer has closed.
    ended: bool,
    /// Its peer reads no more; what it has said can still be read.
    deaf: bool,
    /// The other's peer has: close when all is written.
    ending: bool,
    /// Say close_notify then.
    pub says_close: bool,
}

impl Side {
    /// The session, if there is one, has shaken hands.
    pub fn new(socket: TcpStream, mut tls: Option<Connection>) -> Side {
        if let Some(tls) = &mut tls {
            tls.set_buffer_limit(None);
        }
        socket.set_nonblocking(true).unwrap();
        Side {
            socket,
            tls,
            out: Vec::new(),
            ended: false,
            deaf: false,
            ending: false,
            says_close: true,
        }
    }

    /// Takes octets that are to go out here.
    pub fn give(&mut self, octets: &[u8]) {
        match &mut self.tls {
            Some(tls) => tls.writer().write_all(octets).unwrap(),
            None => self.out.extend_from_slice(octets),
        }
    }

    fn is_full(&self) -> bool {
        !self.deaf && self.out.len() > MOST
    }

    fn wants_write(&self) -> bool {
        !self.deaf && self.tls.as_ref().map_or(!self.out.is_empty(), |tls| tls.wants_write())
    }

    /// What has come and can be read now.
    fn take(&mut self) -> io::Result<Vec<u8>> {
        let mut octets = vec![0; 64 * 1024];
        let count = match &mut self.tls {
            None => self.socket.read(&mut octets),
            Some(tls) => read_tls(tls, &mut self.socket, &mut octets),
        };
        match count {
            Ok(0) => self.ended = true,
            Ok(count) => {
                octets.truncate(count);
                return Ok(octets);
            }
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => self.ended = true,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => self.ended = true,
        }
        Ok(Vec::new())
    }

    /// Writes what can be written now.
    fn put(&mut self) {
        let wrote = match &mut self.tls {
            Some(tls) if tls.wants_write() => tls.write_tls(&mut self.socket),
            None if !self.out.is_empty() => {
                self.socket.write(&self.out).inspect(|&count| drop(self.out.drain(..count)))
            }
            _ => return,
        };
        if wrote.is_err_and(|error| error.kind() != ErrorKind::WouldBlock) {
            self.deaf = true;
        }
    }

    fn close(&mut self) {
        if let Some(tls) = &mut self.tls
            && self.says_close
        {
            tls.send_close_notify();
            let _ = tls.write_tls(&mut self.socket);
        }
        let _ = self.socket.shutdown(Shutdown::Write);
    }
}

fn read_tls(tls: &mut Connection, socket: &mut TcpStream, octets: &mut [u8]) -> io::Result<usize> {
    loop {
        match tls.reader().read(octets) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            read => return read,
        }
        tls.read_tls(socket)?;
        tls.process_new_packets().map_err(io::Error::other)?;
    }
}

/// Carries until both have ended, or either breaks.
pub fn pump(mut sides: [Side; 2]) {
    let _ = carry(&mut sides);
    for side in &mut sides {
        let _ = side.socket.shutdown(Shutdown::Both);
    }
}

fn carry(sides: &mut [Side; 2]) -> io::Result<()> {
    loop {
        for (n, other) in [(0, 1), (1, 0)] {
            // What a session holds shows in no poll.
            loop {
                if sides[n].ended || sides[other].is_full() {
                    break;
                }
                let octets = sides[n].take()?;
                if octets.is_empty() {
                    break;
                }
                sides[other].give(&octets);
                sides[other].put();
            }
            sides[other].ending |= sides[n].ended;
        }
        for side in sides.iter_mut() {
            side.put();
            if side.ending && !side.wants_write() {
                side.close();
                return Ok(());
            }
        }
        let mut fds: Vec<_> = [(0, 1), (1, 0)]
            .iter()
            .map(|&(n, other)| {
                let mut flags = PollFlags::empty();
                flags.set(PollFlags::POLLIN, !sides[n].ended && !sides[other].is_full());
                flags.set(PollFlags::POLLOUT, sides[n].wants_write());
                PollFd::new(sides[n].socket.as_fd(), flags)
            })
            .collect();
        poll(&mut fds, PollTimeout::NONE)?;
    }
}
