//! When the program has to end, and how long each wait may still last.
//!
//! `server` calls [`Shutdown::begin`] when a signal came and [`Shutdown::drain`] when the last
//! session has ended; everybody who waits for a peer holds a [`Deadline`], which looks here at
//! every tick of its socket.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How often a wait on a socket of ours wakes up to look at the clock: SO_RCVTIMEO and
/// SO_SNDTIMEO of every connection.
pub const TICK: Duration = Duration::from_secs(1);

/// The two steps of ending, each with its time. Shared by all threads.
#[derive(Debug)]
pub struct Shutdown {
    grace: Duration,
    transactions_until: OnceLock<Instant>,
    copies_until: OnceLock<Instant>,
}

impl Shutdown {
    /// Not ending yet. Each of the two steps will last `grace` at most.
    pub fn new(grace: Duration) -> Shutdown {
        Shutdown { grace, transactions_until: OnceLock::new(), copies_until: OnceLock::new() }
    }

    /// From now on no session is begun, and transactions end within the grace.
    pub fn begin(&self) {
        let _ = self.transactions_until.set(Instant::now() + self.grace);
    }

    /// True once the ending has begun.
    pub fn has_begun(&self) -> bool {
        self.transactions_until.get().is_some()
    }

    /// From now on the copies drain, within the grace. Gives the end of it.
    pub fn drain(&self) -> Instant {
        *self.copies_until.get_or_init(|| Instant::now() + self.grace)
    }

    /// True once the copies drain.
    pub fn is_draining(&self) -> bool {
        self.copies_until.get().is_some()
    }
}

/// Why a wait is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expired {
    /// Its own time is up.
    TimedOut,
    /// The program ends.
    Stopping,
}

/// The end of one wait: its own time limit, or the program's end if that comes first.
#[derive(Debug, Clone, Copy)]
pub struct Deadline<'a> {
    at: Instant,
    cut: Cut<'a>,
}

/// Which part of the ending cuts a wait short.
#[derive(Debug, Clone, Copy)]
enum Cut<'a> {
    Never,
    Transactions(&'a Shutdown),
    Copies(&'a Shutdown),
}

impl<'a> Deadline<'a> {
    /// A wait of a transaction before its final dot.
    pub fn of_transaction(limit: Duration, shutdown: &'a Shutdown) -> Deadline<'a> {
        Deadline { at: Instant::now() + limit, cut: Cut::Transactions(shutdown) }
    }

    /// A wait on behalf of a copy.
    pub fn of_copy(limit: Duration, shutdown: &'a Shutdown) -> Deadline<'a> {
        Deadline { at: Instant::now() + limit, cut: Cut::Copies(shutdown) }
    }

    /// A wait that the end of the program does not cut: the answer to a final dot says whether
    /// the mail was accepted.
    pub fn uncut(limit: Duration) -> Deadline<'a> {
        Deadline { at: Instant::now() + limit, cut: Cut::Never }
    }

    /// The same kind of wait, beginning anew now.
    pub fn renewed(self, limit: Duration) -> Deadline<'a> {
        Deadline { at: Instant::now() + limit, cut: self.cut }
    }

    /// What is left.
    ///
    /// # Errors
    /// [`Expired`] when nothing is.
    pub fn left(&self) -> Result<Duration, Expired> {
        let now = Instant::now();
        let end = match self.cut {
            Cut::Never => None,
            Cut::Transactions(shutdown) => shutdown.transactions_until.get(),
            Cut::Copies(shutdown) => shutdown.copies_until.get(),
        };
        match (end, self.at.checked_duration_since(now)) {
            (Some(&end), _) if end <= now => Err(Expired::Stopping),
            (_, None | Some(Duration::ZERO)) => Err(Expired::TimedOut),
            (Some(&end), Some(left)) => Ok(left.min(end - now)),
            (None, Some(left)) => Ok(left),
        }
    }
}
