//! The program's life: accept, a worker thread for each connection, and the end.
//!
//! Two nested scopes hold all threads: the delivery agents in the outer, the workers in the inner.
//! When a signal comes the listeners are closed; the inner scope joins, which is every session's
//! end; then the agents drain, and the outer scope joins.

use std::collections::VecDeque;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, Builder, Scope};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use ipnet::IpNet;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::buffers::Buffers;
use crate::config::Config;
use crate::launch::descriptors;
use crate::launch::signals::Signals;
use crate::maillog;
use crate::message::Budget;
use crate::relay::agent::{Agents, STACK};
use crate::relay::backup::Backup;
use crate::relay::connection::prepare;
use crate::relay::pool::Pool;
use crate::relay::primary::stopping;
use crate::shutdown::Shutdown;
use crate::smtp::reply::Reply;
use crate::smtp::session::{Session, Shared};

/// How long a client waits for a worker before it is turned away: a 421 makes Postfix hold back
/// all mail for this destination, a moment of waiting does not.
const WORKER_WAIT: Duration = Duration::from_secs(5);

/// How long accept(2) is left alone after it failed, mostly for want of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Serves on `listeners` until a signal comes, then ends as smtp-dup(8) says under SIGNALS.
pub fn run(config: &Config, listeners: Vec<TcpListener>, signals: &Signals) {
    let shutdown = Shutdown::new(config.limits.connect);
    let primary = Pool::new(config.primary.clone(), config.domain.clone(), config.limits);
    let (alive, all_ended) = bounded(0);
    let backup = |to: &_| {
        Backup::new(
            Clone::clone(to),
            config.domain.clone(),
            config.limits,
            config.backup_connections,
            &alive,
        )
    };
    let backups: Vec<Backup> = config.backups.iter().map(backup).collect();
    drop(alive);

    let addresses: Vec<SocketAddr> =
        listeners.iter().filter_map(|listener| listener.local_addr().ok()).collect();
    maillog::starting(config, &addresses);
    let files = descriptors::for_copies(config).unwrap_or_else(|(needed, limit)| {
        maillog::few_descriptors(needed, limit);
        0
    });
    thread::scope(|outer| {
        let agents = Agents::new(outer, &backups, &shutdown);
        let shared = Shared {
            domain: &config.domain,
            max_message_size: config.max_message_size,
            max_recipients: config.max_recipients,
            timeout: config.timeout,
            primary: &primary,
            budget: &Budget::new(config.backup_memory, files),
            buffers: &Buffers::default(),
            shutdown: &shutdown,
        };
        let workers = Workers {
            shared: &shared,
            agents: &agents,
            most: config.max_connections,
            desk: Mutex::default(),
        };
        thread::scope(|inner| workers.accept(inner, listeners, &config.allowed_clients, signals));
        if !agents.drain(&all_ended) {
            // An agent hangs where no time limit reaches; its copy has been named.
            maillog::stopped();
            std::process::exit(0);
        }
    });
    maillog::stopped();
}

/// The worker threads, and the clients that wait for one.
struct Workers<'a, 'agents, 'env> {
    shared: &'a Shared<'a>,
    agents: &'a Agents<'agents, 'env>,
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

impl<'a> Workers<'a, '_, '_> {
    /// Accepts until a signal comes; the listeners are closed then.
    fn accept<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        listeners: Vec<TcpListener>,
        allowed: &[IpNet],
        signals: &Signals,
    ) {
        let mut pause = None;
        loop {
            let wake = [self.turn_away_late(), self.shared.primary.reap(), pause]
                .into_iter()
                .flatten()
                .min();
            let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
            if pause.take().is_none() {
                fds.extend(
                    listeners
                        .iter()
                        .map(|listener| PollFd::new(listener.as_fd(), PollFlags::POLLIN)),
                );
            }
            // A failing poll(2) is an interrupted one: the descriptors are ours.
            if poll(&mut fds, timeout(wake)).is_err() {
                continue;
            }
            if fds[0].any() == Some(true) {
                break;
            }
            let ready: Vec<bool> = fds[1..].iter().map(|fd| fd.any() == Some(true)).collect();
            for (listener, _) in listeners.iter().zip(ready).filter(|(_, ready)| *ready) {
                match listener.accept() {
                    Ok((stream, address)) => self.admit(scope, stream, address, allowed),
                    Err(error) if is_passing(&error) => {}
                    Err(error) => {
                        maillog::accept_failed(&error);
                        pause = Some(Instant::now() + ACCEPT_PAUSE);
                    }
                }
            }
        }
        drop(listeners);
        maillog::stopping(signals.name());
        self.shared.shutdown.begin();
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
        allowed: &[IpNet],
    ) {
        let ip = address.ip().to_canonical();
        let address = SocketAddr::new(ip, address.port());
        if !allowed.iter().any(|network| network.contains(&ip)) {
            maillog::client_denied(address);
            let text = format!("{ip} is not in smtp.allowed_clients of {}", self.shared.domain);
            return reject(&stream, &Reply::new(421, "4.7.1", &text));
        }
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
                self.serve(guest);
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

    /// Serves one client. A panic ends its session alone.
    fn serve(&self, guest: Guest) {
        if prepare(&guest.stream).is_err() {
            return;
        }
        let session = Session::new(guest.stream, guest.address, self.shared, self.agents);
        if catch_unwind(AssertUnwindSafe(|| session.serve())).is_err() {
            maillog::panicked(&format!("client={}", guest.address));
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

    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn turn_away(guest: &Guest) {
    maillog::client_turned_away(guest.address, "all workers are busy (smtp.max_connections)");
    reject(&guest.stream, &Reply::new(421, "4.3.2", "too many connections; try again later"));
}

/// Says a last word and closes, without waiting for anything.
fn reject(stream: &TcpStream, reply: &Reply) {
    let _ = stream.set_nonblocking(true);
    let _ = std::io::Write::write(&mut &*stream, reply.wire());
    let _ = stream.shutdown(std::net::Shutdown::Write);
}

/// The client has gone again, or another signal came: nothing is wrong with the listener.
fn is_passing(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock)
}

/// Until `wake`, rounded up, for poll(2).
fn timeout(wake: Option<Instant>) -> PollTimeout {
    let Some(wake) = wake else { return PollTimeout::NONE };
    let left = wake.saturating_duration_since(Instant::now()).as_millis() + 1;
    PollTimeout::try_from(left.min(60_000)).unwrap_or(PollTimeout::MAX)
}
