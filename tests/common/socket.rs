//! What the standard library's sockets cannot do: to be bound without listening, and to choose
//! one's own address before connecting.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, setsockopt, socket, sockopt,
};

/// A socket that holds an address, and does nothing with it yet.
#[track_caller]
pub fn bound(addr: SocketAddr) -> OwnedFd {
    let family = if addr.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    setsockopt(&fd, sockopt::ReuseAddr, &true).unwrap();
    nix::sys::socket::bind(fd.as_raw_fd(), &SockaddrStorage::from(addr)).unwrap();
    fd
}

/// Connects a socket.
#[track_caller]
pub fn connect(fd: &OwnedFd, addr: SocketAddr) {
    nix::sys::socket::connect(fd.as_raw_fd(), &SockaddrStorage::from(addr)).unwrap();
}
