//! systemd's socket activation and its readiness protocol (sd_listen_fds(3), sd_notify(3)).
//!
//! `main` asks for the sockets; `main` and `server` tell the service manager, if there is one, how
//! far the program is.

use sd_notify::NotifyState;

use super::inherited::{Socket, adopt};

/// The sockets that systemd left for this process; none when it was not started by a socket unit.
///
/// # Errors
/// A text about one that is no TCP socket.
pub fn sockets() -> Result<Vec<Socket>, String> {
    // An error is a LISTEN_PID of another process, or none at all: the sockets are not for us.
    let Ok(numbers) = sd_notify::listen_fds() else { return Ok(Vec::new()) };
    let socket = |number| {
        adopt(number).map(Socket::new).and_then(Result::ok).ok_or_else(|| {
            format!(
                "descriptor {number}, from systemd, is no TCP socket; use ListenStream= with a port"
            )
        })
    };
    numbers.map(socket).collect()
}

/// The program serves (`Type=notify`).
pub fn ready() {
    notify(NotifyState::Ready);
}

/// The program ends, which may take a while.
pub fn stopping() {
    notify(NotifyState::Stopping);
}

fn notify(state: NotifyState) {
    // Whoever asks to be notified and does not listen misses nothing that mail needs.
    let _ = sd_notify::notify(&[state]);
}
