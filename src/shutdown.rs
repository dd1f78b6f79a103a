//! When the program has to end, and how long each wait may still last.
//!
//! A signal sets the flag that [`Shutdown::new`] is given, wherever the program is just then, and
//! `server` calls [`Shutdown::drain`] when the last session has ended; everybody who waits for a
//! peer holds a [`Deadline`], which looks here at every tick of its socket.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// How often a wait on a socket of ours wakes up to look at the clock: SO_RCVTIMEO and
/// SO_SNDTIMEO of every connection.
pub const TICK: Duration = Duration::from_secs(1);

/// The steps of ending, each with its time. Shared by all threads.
#[derive(Debug)]
pub struct Shutdown {
    /// A signal has asked for the end.
    asked: Arc<AtomicBool>,
    /// Nobody new comes here any more, for a successor serves; those who are here may finish.
    relieved: AtomicBool,
    grace: Grace,
    transactions_until: OnceLock<Instant>,
    copies_until: OnceLock<Instant>,
}

/// How long the steps of ending last at most.
#[derive(Debug, Clone, Copy)]
pub struct Grace {
    /// A transaction before its final dot.
    pub transactions: Duration,
    /// The copies that are left when the last session has ended.
    pub copies: Duration,
}

impl Shutdown {
    /// Not ending yet; `asked` becomes true when a signal comes.
    pub fn new(grace: Grace, asked: Arc<AtomicBool>) -> Shutdown {
        Shutdown {
            asked,
            relieved: AtomicBool::new(false),
            grace,
            transactions_until: OnceLock::new(),
            copies_until: OnceLock::new(),
        }
    }

    /// The end of all transactions, if the program was asked to end: from the moment on at which
    /// anybody sees it first.
    fn transactions_until(&self) -> Option<Instant> {
        let asked = self.asked.load(Ordering::Relaxed);
        asked.then(|| {
            *self.transactions_until.get_or_init(|| Instant::now() + self.grace.transactions)
        })
    }

    /// A successor serves from now on: sessions may finish their mail, without haste.
    pub fn relieve(&self) {
        self.relieved.store(true, Ordering::Relaxed);
    }

    /// A client without a transaction has to go: no transaction is begun any more. One that is
    /// relieved lets a client go only right `behind_a_message`, where Postfix looks whether the
    /// connection is still good before it sends the next; elsewhere a 421 would defer its mail.
    pub fn dismisses(&self, behind_a_message: bool) -> bool {
        self.asked.load(Ordering::Relaxed)
            || behind_a_message && self.relieved.load(Ordering::Relaxed)
    }

    /// From now on the copies drain, within the grace. Gives the end of it.
    pub fn drain(&self) -> Instant {
        *self.copies_until.get_or_init(|| Instant::now() + self.grace.copies)
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
            Cut::Transactions(shutdown) => shutdown.transactions_until(),
            Cut::Copies(shutdown) => shutdown.copies_until.get().copied(),
        };
        match (end, self.at.checked_duration_since(now)) {
            (Some(end), _) if end <= now => Err(Expired::Stopping),
            (_, None | Some(Duration::ZERO)) => Err(Expired::TimedOut),
            (Some(end), Some(left)) => Ok(left.min(end - now)),
            (None, Some(left)) => Ok(left),
        }
    }
}
