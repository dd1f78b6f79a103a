//! How many files and sockets the program may have open.
//!
//! Copies of big messages lie in files, and sockets of clients must never be lacking because of
//! them: `server` gives them only what is left.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::config::Config;

/// Open at all times, or for a moment: listeners, log, the resolver's.
const OTHERS: u64 = 32;

/// Each client, its connection to the primary, and another client that waits.
const EACH: u64 = 3;

/// Each client's message in the spool: its file, a second time while that is put in place, and the
/// folder that is synced then.
const EACH_SPOOLED: u64 = 3;

/// Each copy that is tried from the spool: its state, its message, and its state to be.
const EACH_COPY: u64 = 3;

/// The limit does not do for all connections that the configuration allows.
pub struct Shortage {
    /// What all of them may need.
    pub needed: u64,
    /// The limit.
    pub limit: u64,
    /// For so many clients at a time it does. More would not find a connection to the primary.
    pub clients: usize,
}

/// Raises the limit to what the system allows, and gives how many descriptors are left for the
/// files of copies.
///
/// # Errors
/// There are not enough for the connections alone.
pub fn for_copies(config: &Config) -> Result<u64, Shortage> {
    let limit = raised();
    let agents = (config.backup_connections * config.backups.len()) as u64;
    let (each, each_agent) = match config.spool {
        Some(_) => (EACH + EACH_SPOOLED, 1 + EACH_COPY),
        None => (EACH, 1),
    };
    let others = agents * each_agent + OTHERS;
    let needed = config.max_connections as u64 * each + others;
    limit.checked_sub(needed).ok_or_else(|| {
        let clients = (limit.saturating_sub(others) / each).max(1) as usize;
        Shortage { needed, limit, clients }
    })
}

/// The soft limit, after it was raised to the hard one.
fn raised() -> u64 {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return 1024 };
    match setrlimit(Resource::RLIMIT_NOFILE, hard, hard) {
        Ok(()) => hard,
        Err(_) => soft,
    }
}
