//! Sockets that whoever started the program left open for it.
//!
//! `launch` asks here before anything else is opened, so that every descriptor found is one that
//! was inherited. systemd and Postfix's master(8) leave theirs at fixed numbers; inetd, spawn(8)
//! and tcpserver make fd 0 the client.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockType, SockaddrLike, SockaddrStorage, getsockname, getsockopt, sockopt,
};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};
use std::os::fd::AsRawFd;

/// A TCP socket, by what can be done with it.
#[derive(Debug)]
pub enum Socket {
    /// One that listens; accept(2) does not block.
    Listener(TcpListener),
    /// A connection; reads and writes block.
    Connection(TcpStream),
}

impl Socket {
    /// What a descriptor is, if it is a TCP socket at all.
    ///
    /// # Errors
    /// The descriptor itself, which is something else.
    pub fn new(descriptor: OwnedFd) -> Result<Socket, OwnedFd> {
        match kind(descriptor.as_fd()) {
            Some(Kind::Listener) => {
                let listener = TcpListener::from(descriptor);
                // The flag belongs to the socket, not to the descriptor: set for all who share it.
                match listener.set_nonblocking(true) {
                    Ok(()) => Ok(Socket::Listener(listener)),
                    Err(_) => Err(listener.into()),
                }
            }
            Some(Kind::Connection) => {
                let stream = TcpStream::from(descriptor);
                match stream.set_nonblocking(false) {
                    Ok(()) => Ok(Socket::Connection(stream)),
                    Err(_) => Err(stream.into()),
                }
            }
            None => Err(descriptor),
        }
    }
}

enum Kind {
    Listener,
    Connection,
}

fn kind(descriptor: BorrowedFd) -> Option<Kind> {
    let address: SockaddrStorage = getsockname(descriptor.as_raw_fd()).ok()?;
    let is_tcp = matches!(address.family(), Some(AddressFamily::Inet | AddressFamily::Inet6))
        && getsockopt(&descriptor, sockopt::SockType) == Ok(SockType::Stream);
    match getsockopt(&descriptor, sockopt::AcceptConn) {
        Ok(true) if is_tcp => Some(Kind::Listener),
        Ok(false) if is_tcp => Some(Kind::Connection),
        _ => None,
    }
}

/// Takes the inherited descriptor `number` over. `None` when it is not open.
///
/// To be called for a number at most once, and before the program has opened anything itself.
pub fn adopt(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: nothing owns it yet (see above), and the kernel says that it is open. There is no
    // safe way to own a descriptor that came through exec(2).
    unsafe {
        let borrowed = BorrowedFd::borrow_raw(number);
        nix::fcntl::fcntl(borrowed, nix::fcntl::FcntlArg::F_GETFD).ok()?;
        Some(OwnedFd::from_raw_fd(number))
    }
}

/// Standard input, when that is a TCP socket.
#[derive(Debug)]
pub struct Stdin {
    /// The socket.
    pub socket: Socket,
    /// Standard error leads elsewhere, and may be written to.
    pub has_stderr: bool,
}

/// Standard error is whatever socket standard input is: who is at its other end may be a client.
pub fn stderr_is_stdin() -> bool {
    let (stdin, stderr) = (fstat(io::stdin()), fstat(io::stderr()));
    match (stdin, stderr) {
        (Ok(stdin), Ok(stderr)) => {
            let is_socket =
                SFlag::from_bits_truncate(stdin.st_mode) & SFlag::S_IFMT == SFlag::S_IFSOCK;
            is_socket && (stdin.st_dev, stdin.st_ino) == (stderr.st_dev, stderr.st_ino)
        }
        _ => false,
    }
}

/// Takes the socket out of fd 0, and out of 1 and 2 where they lead to it as well: /dev/null
/// takes its place. From then on nothing but the session can write to the client, and dropping
/// the socket closes it.
///
/// # Errors
/// Those of dup(2) and of opening /dev/null.
pub fn take_stdin() -> io::Result<Option<Stdin>> {
    let stdin = io::stdin();
    let inode = |descriptor: BorrowedFd| -> Result<_, Errno> {
        fstat(descriptor).map(|stat| (stat.st_dev, stat.st_ino))
    };
    let own = inode(stdin.as_fd())?;
    let Ok(socket) = Socket::new(stdin.as_fd().try_clone_to_owned()?) else { return Ok(None) };
    let null = std::fs::File::options().read(true).write(true).open("/dev/null")?;
    let is_shared = |descriptor: BorrowedFd| inode(descriptor) == Ok(own);
    let has_stderr = !is_shared(io::stderr().as_fd());
    dup2_stdin(&null)?;
    if is_shared(io::stdout().as_fd()) {
        dup2_stdout(&null)?;
    }
    if !has_stderr {
        dup2_stderr(&null)?;
    }
    Ok(Some(Stdin { socket, has_stderr }))
}
