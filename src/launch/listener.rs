//! Listening sockets of our own.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsRawFd;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, SockaddrIn6, bind as bind_socket,
    listen, setsockopt, socket, sockopt,
};

/// Connections that may wait to be accepted; the system cuts it to net.core.somaxconn, and the C
/// library says what may be asked for (musl: 128).
const BACKLOG: i32 = if nix::libc::SOMAXCONN < 1024 { nix::libc::SOMAXCONN } else { 1024 };

/// Listens on all `addresses`, without blocking in accept.
///
/// # Errors
/// A text that names the address, what failed and what to do.
pub fn bind(addresses: &[SocketAddr]) -> Result<Vec<TcpListener>, String> {
    let bind = |address: &SocketAddr| {
        // All of IPv6 takes IPv4 too, unless IPv4 is asked for on its own.
        let has_own_ipv4 =
            addresses.iter().any(|other| other.is_ipv4() && other.port() == address.port());
        let listener = match open(*address, has_own_ipv4) {
            Err(error)
                if address.is_ipv6()
                    && address.ip().is_unspecified()
                    && is_without_ipv6(&error) =>
            {
                open(SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port()), false)
            }
            other => other,
        };
        listener.map_err(|error| format!("smtp.listen: {address}: {error}; {}", remedy(&error)))
    };
    addresses.iter().map(bind).collect()
}

fn open(address: SocketAddr, only_ipv6: bool) -> io::Result<TcpListener> {
    let family = if address.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Stream, flags, None)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    if address.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6V6Only, &only_ipv6)?;
    }
    match address {
        SocketAddr::V4(address) => bind_socket(socket.as_raw_fd(), &SockaddrIn::from(address))?,
        SocketAddr::V6(address) => bind_socket(socket.as_raw_fd(), &SockaddrIn6::from(address))?,
    }
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(TcpListener::from(socket))
}

fn is_without_ipv6(error: &io::Error) -> bool {
    use nix::errno::Errno;
    matches!(
        error.raw_os_error().map(Errno::from_raw),
        Some(Errno::EAFNOSUPPORT | Errno::EADDRNOTAVAIL)
    )
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "stop what listens there, or choose another port",
        io::ErrorKind::PermissionDenied => "ports below 1024 are for root; choose a port above",
        _ => "write an address of this machine",
    }
}
