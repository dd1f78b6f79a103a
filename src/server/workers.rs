//! Accepting: a worker thread for each connection, and who waits for one.
//!
//! `server` makes one [`Workers`] and has it accept until a signal comes or the keeper goes. What a
//! client gets is the [`Door`]'s. Nothing here fails: what accept(2) or a thread is in want of is
//! said, and tried again.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, Builder, Scope};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Door, reject};
use crate::launch::master::Tie;
use crate::launch::signals::Signals;
use crate::launch::systemd;
use crate::maillog;
use crate::relay::agent::STACK;
use crate::relay::primary::stopping;
use crate::shutdown::TICK;
use crate::smtp::reply::Reply;

/// How long a client waits for a worker before it is turned away: a 421 makes Postfix hold back
/// all mail for this destination, a moment of waiting does not.
const WORKER_WAIT: Duration = Duration::from_secs(5);

/// How long accept(2) is left alone after it failed, mostly for want of descriptors. Those who
/// wait for it wait in the kernel's queue.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// So often at most it is said that accept(2) fails.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// What ends the accepting.
pub struct Wakers<'a> {
    /// Whether one came.
    pub signals: &'a Signals,
    /// Readable when one comes.
    pub bell: UnixStream,
    /// Readable when the keeper goes.
    pub tie: Option<Tie>,
}

/// The worker threads, and the clients that wait for one.
pub struct Workers<'a, 'agents, 'env> {
    door: Door<'a, 'agents, 'env>,
    most: usize,
    desk: Mutex<Desk>,
}

/// Who is served and who waits.
#[derive(Default)]
struct Desk {
    busy: usize,
    waiting: VecDeque<Guest>,
}

/// A client that was accepted.
struct Guest {
    stream: TcpStream,
    address: SocketAddr,
    /// Turned away when no worker is free by then.
    until: Instant,
}

impl<'a, 'agents, 'env> Workers<'a, 'agents, 'env> {
    /// At most so many workers.
    pub fn new(door: Door<'a, 'agents, 'env>, most: usize) -> Self {
        Workers { door, most, desk: Mutex::default() }
    }

    /// Accepts until a signal comes or the keeper goes; the listeners are closed then.
    pub fn accept<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        listeners: Vec<TcpListener>,
        wakers: Wakers,
    ) {
        let Wakers { signals, bell, tie } = wakers;
        let shared = self.door.shared;
        let (mut pause, mut said) = (None, None::<Instant>);
        let is_relieved = loop {
            let wake = [self.turn_away_late(), self.reap(), pause].into_iter().flatten().min();
            let watch = |fd| PollFd::new(fd, PollFlags::POLLIN);
            let mut fds = vec![watch(bell.as_fd())];
            fds.extend(tie.iter().map(|tie| watch(tie.as_fd())));
            let before = fds.len();
            if pause.take().is_none() {
                fds.extend(listeners.iter().map(|listener| watch(listener.as_fd())));
            }
            // A signal that came before there was a bell rings none.
            if signals.came() {
                break false;
            }
            if let Err(errno) = poll(&mut fds, timeout(wake)) {
                // The descriptors are ours: it was interrupted, or memory lacks.
                if errno != Errno::EINTR {
                    thread::sleep(ACCEPT_PAUSE);
                }
                continue;
            }
            let ready: Vec<bool> = fds.iter().map(|fd| fd.any() == Some(true)).collect();
            if ready[..before].contains(&true) {
                break !signals.came();
            }
            for (listener, _) in listeners.iter().zip(&ready[before..]).filter(|(_, ready)| **ready)
            {
                match listener.accept() {
                    Ok((stream, address)) => self.admit(scope, stream, address),
                    Err(error) if is_passing(&error) => {}
                    Err(error) => {
                        if said.is_none_or(|said| said.elapsed() > SAY_AGAIN) {
                            maillog::accept_failed(&error);
                            said = Some(Instant::now());
                        }
                        pause = Some(Instant::now() + ACCEPT_PAUSE);
                    }
                }
            }
        };
        drop(listeners);
        if is_relieved {
            maillog::relieved();
            return shared.shutdown.relieve();
        }
        maillog::stopping(signals.name());
        systemd::stopping();
        if let Some(tie) = tie {
            tie.let_go();
        }
        for guest in self.desk().waiting.drain(..) {
            reject(&guest.stream, &stopping());
        }
    }

    /// Gives a client to a worker, lets it wait for one, or turns it away.
    fn admit<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        stream: TcpStream,
        address: SocketAddr,
    ) {
        let Some(address) = self.door.admits(&stream, address) else { return };
        let guest = Guest { stream, address, until: Instant::now() + WORKER_WAIT };
        let mut desk = self.desk();
        if desk.waiting.len() >= self.most {
            drop(desk);
            return turn_away(&guest);
        }
        desk.waiting.push_back(guest);
        if desk.busy < self.most {
            desk.busy += 1;
            drop(desk);
            self.start(scope);
        }
    }

    /// Starts a worker, for whoever waits.
    fn start<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) {
        let work = move || {
            while let Some(guest) = self.next_guest() {
                self.door.serve(guest.stream, guest.address);
            }
        };
        if let Err(error) =
            Builder::new().name("worker".into()).stack_size(STACK).spawn_scoped(scope, work)
        {
            maillog::no_thread("a client", &error);
            let mut desk = self.desk();
            desk.busy -= 1;
            if let Some(guest) = desk.waiting.pop_back() {
                reject(&guest.stream, &Reply::new(421, "4.3.2", "out of threads; try again later"));
            }
        }
    }

    /// The next client that waits, for a worker that is free; without one it ends.
    fn next_guest(&self) -> Option<Guest> {
        let mut desk = self.desk();
        let next = desk.waiting.pop_front();
        desk.busy -= usize::from(next.is_none());
        next
    }

    /// Turns away those who have waited for too long. Gives the time at which the next will have.
    fn turn_away_late(&self) -> Option<Instant> {
        let mut desk = self.desk();
        while desk.waiting.front().is_some_and(|guest| guest.until <= Instant::now()) {
            if let Some(guest) = desk.waiting.pop_front() {
                turn_away(&guest);
            }
        }
        desk.waiting.front().map(|guest| guest.until)
    }

    /// Closes idle connections to the primary. Gives the time at which to look again.
    fn reap(&self) -> Option<Instant> {
        // In this order: a worker has put its last connection back before it ends.
        let more_may_come = self.desk().busy > 0;
        let next = self.door.shared.primary.reap();
        let soon = more_may_come.then(|| Instant::now() + TICK);
        soon.into_iter().chain(next).min()
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn turn_away(guest: &Guest) {
    maillog::client_turned_away(guest.address, "all workers are busy (smtp.max_connections)");
    reject(&guest.stream, &Reply::new(421, "4.3.2", "too many connections; try again later"));
}

/// The client has gone again, or a signal came: nothing is wrong, and the next may be accepted at
/// once. All else is: accept(2) would fail again for as long as somebody waits, without a pause.
fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock)
}

/// Until `wake`, rounded up, for poll(2).
fn timeout(wake: Option<Instant>) -> PollTimeout {
    let Some(wake) = wake else { return PollTimeout::NONE };
    let left = wake.saturating_duration_since(Instant::now()).as_millis() + 1;
    PollTimeout::try_from(left.min(60_000)).unwrap_or(PollTimeout::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_accept_says() {
        for (errno, passes) in [
            (Errno::ECONNABORTED, true),
            (Errno::EINTR, true),
            (Errno::EAGAIN, true),
            (Errno::EMFILE, false),
            (Errno::ENFILE, false),
            (Errno::ENOMEM, false),
            (Errno::ENOBUFS, false),
            (Errno::EPERM, false),
            (Errno::ENETDOWN, false),
        ] {
            assert_eq!(is_passing(&errno.into()), passes, "{errno}");
        }
    }
}
