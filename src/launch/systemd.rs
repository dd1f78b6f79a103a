//! systemd's socket activation and its readiness protocol (sd_listen_fds(3), sd_notify(3)).
//!
//! `launch` asks for the sockets; `main` and `server` tell the service manager, if there is one,
//! how far the program is.

use std::env;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use super::inherited::{Socket, adopt};

/// The first descriptor that is passed (SD_LISTEN_FDS_START).
const FIRST: i32 = 3;

/// The sockets that systemd left for this process; none when it was not started by a socket unit.
///
/// # Errors
/// A text about one that is no TCP socket.
pub fn sockets() -> Result<Vec<Socket>, String> {
    let number = |name| env::var(name).ok()?.parse::<u32>().ok();
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Ok(Vec::new());
    }
    let count = number("LISTEN_FDS").and_then(|count| i32::try_from(count).ok()).unwrap_or(0);
    let socket = |number| {
        adopt(number).map(Socket::new).and_then(Result::ok).ok_or_else(|| {
            format!(
                "descriptor {number}, from systemd, is no TCP socket; use ListenStream= with a port"
            )
        })
    };
    (FIRST..FIRST.saturating_add(count)).map(socket).collect()
}

/// The program serves (`Type=notify`).
pub fn ready() {
    notify("READY=1");
}

/// The program ends, which may take a while.
pub fn stopping() {
    notify("STOPPING=1");
}

fn notify(state: &str) {
    // Whoever asks to be notified and does not listen misses nothing that mail needs.
    let _ = env::var("NOTIFY_SOCKET").map(|path| send(&path, state));
}

fn send(path: &str, state: &str) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    match path.strip_prefix('@') {
        Some(name) => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
        None => socket.connect(path)?,
    }
    socket.send(state.as_bytes()).map(drop)
}
