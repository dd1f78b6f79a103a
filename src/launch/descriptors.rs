//! How many files and sockets the program may have open.
//!
//! Copies of big messages lie in files, and sockets of clients must never be lacking because of
//! them: `server` gives them only what is left.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::Config;

/// Open at all times, or for a moment: listeners, log, the resolver's.
const OTHERS: u64 = 32;

/// Raises the limit to what the system allows, and gives how many descriptors are left for the
/// files of copies, or how many are lacking for the connections alone.
///
/// # Errors
/// The number of descriptors that all connections may need, and the limit.
pub fn for_copies(config: &Config) -> Result<u64, (u64, u64)> {
    let limit = raised();
    // Each client and its connection to the primary, and as many clients that wait.
    let clients = config.max_connections as u64 * 3;
    let agents = (config.backup_connections * config.backups.len()) as u64;
    let connections = clients + agents + OTHERS;
    limit.checked_sub(connections).ok_or((connections, limit))
}

/// The soft limit, after it was raised to the hard one.
fn raised() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    }
}
