//! Connections to the primary, kept between transactions for whichever client comes next.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::connection::{Connection, Failure, Limits, Step};
use super::destination::Destination;
use crate::identity::Identity;
use crate::shutdown::{Deadline, Shutdown};

/// At most this many idle connections are kept …
const MAX_IDLE: usize = 10;

/// … and none for longer: servers close idle connections, and count them.
const MAX_IDLE_TIME: Duration = Duration::from_secs(30);

/// The primary and the idle connections to it. Shared by all workers.
pub struct Pool {
    destination: Destination,
    us: Identity,
    limits: Limits,
    /// Oldest first.
    idle: Mutex<Vec<(Instant, Connection)>>,
}

impl Pool {
    /// A pool without connections.
    pub fn new(destination: Destination, us: Identity, limits: Limits) -> Pool {
        Pool { destination, us, limits, idle: Mutex::new(Vec::new()) }
    }

    /// The server that all its connections lead to.
    pub fn destination(&self) -> &Destination {
        &self.destination
    }

    /// Longest time for a command's reply.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// An idle connection that is still quiet and open, as far as can be seen.
    pub fn take(&self) -> Option<Connection> {
        self.reap();
        loop {
            let (_, mut connection) = self.idle().pop()?;
            if connection.check_quiet(Step::Command("MAIL")).is_ok() {
                return Some(connection);
            }
        }
    }

    /// A new connection.
    ///
    /// # Errors
    /// As [`Connection::open`].
    pub fn open(&self, shutdown: &Shutdown) -> Result<Connection, Failure> {
        let deadline = Deadline::of_transaction(self.limits.connect, shutdown);
        Connection::open(&self.destination, &self.us, self.limits, deadline)
    }

    /// Keeps a connection whose server waits for a command.
    pub fn put(&self, connection: Connection) {
        let mut idle = self.idle();
        if idle.len() < MAX_IDLE {
            idle.push((Instant::now(), connection));
        }
    }

    /// Closes the connections that have been idle for too long. Gives the time at which the next
    /// will have been.
    pub fn reap(&self) -> Option<Instant> {
        let mut idle = self.idle();
        let now = Instant::now();
        let stale = idle
            .iter()
            .take_while(|(since, _)| now.duration_since(*since) >= MAX_IDLE_TIME)
            .count();
        idle.drain(..stale);
        idle.first().map(|(since, _)| *since + MAX_IDLE_TIME)
    }

    fn idle(&self) -> MutexGuard<'_, Vec<(Instant, Connection)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
