//! The program's life: accept, a worker thread for each connection, and the end.
//!
//! Two nested scopes hold all threads: the delivery agents in the outer, the workers in the inner.
//! When a signal comes the listeners are closed; the inner scope joins, which is every session's
//! end; then the agents drain, and the outer scope joins. A process for one client has no workers:
//! its session is served where the inner scope would be.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Builder, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use ipnet::IpNet;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};

use crate::buffers::Buffers;
use crate::config::Config;
use crate::identity::Identity;
use crate::launch::master::Tie;
use crate::launch::signals::Signals;
use crate::launch::{Clients, descriptors, systemd};
use crate::maillog;
use crate::message::{Budget, Scratch};
use crate::relay::agent::{Agents, STACK};
use crate::relay::backup::{Backup, Plan};
use crate::relay::destination::Destination;
use crate::relay::pool::Pool;
use crate::relay::primary::stopping;
use crate::shutdown::{Grace, Shutdown, TICK};
use crate::smtp::reply::Reply;
use crate::smtp::session::{Session, Shared};
use crate::spool::{self, Spool};
use crate::stream::Stream;

/// How long a client waits for a worker before it is turned away: a 421 makes Postfix hold back
/// all mail for this destination, a moment of waiting does not.
const WORKER_WAIT: Duration = Duration::from_secs(5);

/// How often a flush looks whether its passes are over.
const FLUSH_LOOK: Duration = Duration::from_millis(20);

/// How long accept(2) is left alone after it failed, mostly for want of descriptors. Those who
/// wait for it wait in the kernel's queue.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// So often at most it is said that accept(2) fails.
const SAY_AGAIN: Duration = Duration::from_secs(60);

/// Serves `clients` and ends as smtp-dup(8) says under SIGNALS. Messages lie in `store`; `tie` is
/// there when a keeper watches over this process, see [`crate::launch::master`].
///
/// # Errors
/// Those of socketpair(2), before anything was served.
pub fn run(
    config: &Config,
    clients: Clients,
    signals: &Signals,
    tie: Option<Tie>,
    store: Store,
) -> io::Result<()> {
    let is_one = matches!(clients, Clients::One(_));
    let limit = config.limits.connect;
    // Nobody comes back to copies whose process was for one client: they get their time at once.
    let grace = Grace { transactions: limit, copies: if is_one { 2 * limit } else { limit } };
    let shutdown = Shutdown::new(grace, Arc::clone(&signals.asked));
    let us = if is_one { Identity::for_one(config) } else { Identity::new(&config.domain) };
    let primary = Pool::new(config.primary.clone(), us.clone(), config.limits);
    let (alive, all_ended) = bounded(0);
    let plan = Plan {
        us: us.clone(),
        limits: config.limits,
        most_agents: config.backup_connections,
        tries_again: !is_one,
        spool: store.spool.clone(),
    };
    // The primary too may be owed copies, of a time at which it was a backup.
    let all = config.backups.iter().map(|backup| (backup, true));
    let all = all.chain(store.spool.as_ref().map(|_| (&config.primary, false)));
    let backups: Vec<Backup> =
        all.map(|(to, gets)| Backup::new(to.clone(), gets, plan.clone(), &alive)).collect();
    drop(alive);

    let addresses = clients.addresses();
    maillog::starting(config, &addresses, is_one);
    // Not in a process for one client, which has no time for what may never be needed.
    if !is_one && !config.backups.is_empty() {
        let tried = store.scratch.try_out();
        tried.unwrap_or_else(|error| maillog::scratch_unusable(&store.scratch, &error));
    }
    let (files, most_clients) = match descriptors::for_copies(config) {
        Ok(files) => (files, config.max_connections),
        Err(shortage) => {
            maillog::few_descriptors(&shortage);
            (0, shortage.clients)
        }
    };
    thread::scope(|outer| {
        let agents = Agents::new(outer, &backups, &shutdown);
        let shared = Shared {
            us: &us,
            max_message_size: config.max_message_size,
            max_recipients: config.max_recipients,
            timeout: config.timeout,
            tls: config.tls.as_ref(),
            primary: &primary,
            budget: &Budget::new(config.backup_memory, files, store.scratch),
            spool: store.spool.clone(),
            backups: spool::names(&config.backups).into(),
            buffers: &Buffers::default(),
            shutdown: &shutdown,
        };
        let door = Door { allowed: &config.allowed_clients, shared: &shared, agents: &agents };
        match clients {
            Clients::One(stream) => {
                backups.iter().for_each(Backup::respect_hold);
                door.serve_one(stream);
            }
            Clients::Many(listeners) => {
                let workers = Workers { door, most: most_clients, desk: Mutex::default() };
                let bell = signals.bell()?;
                let wakers = Wakers { signals, bell, tie };
                if let Some(spool) = &store.spool {
                    agents.resume();
                    start_sweep(spool, config);
                }
                thread::scope(|inner| workers.accept(inner, listeners, wakers));
            }
        }
        if !agents.drain(&all_ended) {
            // An agent hangs where no time limit reaches; its copy has been named.
            maillog::stopped(is_one);
            log::logger().flush();
            std::process::exit(0);
        }
        io::Result::Ok(())
    })?;
    maillog::stopped(is_one);
    Ok(())
}

/// Tries once what the spool has for each of `backups`, all of them at the same time. Gives for
/// each how many copies were tried, or what failed.
pub fn flush(
    config: &Config,
    spool: &Arc<Spool>,
    backups: &[Destination],
    signals: &Signals,
) -> Vec<io::Result<u64>> {
    let limit = config.limits.connect;
    let grace = Grace { transactions: limit, copies: limit };
    let shutdown = Shutdown::new(grace, Arc::clone(&signals.asked));
    let (alive, _) = bounded(0);
    let plan = Plan {
        us: Identity::new(&config.domain),
        limits: config.limits,
        most_agents: 1,
        tries_again: false,
        spool: Some(Arc::clone(spool)),
    };
    let backups: Vec<Backup> =
        backups.iter().map(|to| Backup::new(to.clone(), false, plan.clone(), &alive)).collect();
    thread::scope(|scope| {
        let one_pass = |backup| {
            let agents = Agents::new(scope, &backups, &shutdown);
            let pass = move || agents.flush(backup, spool.reader(&backup.destination.to_string())?);
            Builder::new().stack_size(STACK).spawn_scoped(scope, pass)
        };
        let threads: Vec<_> = backups.iter().map(one_pass).collect();
        // A signal ends the passes, and gives what is under way its grace.
        let is_at_work = |thread: &io::Result<ScopedJoinHandle<_>>| {
            thread.as_ref().is_ok_and(|thread| !thread.is_finished())
        };
        while threads.iter().any(is_at_work) {
            if signals.came() {
                shutdown.drain();
            }
            thread::sleep(FLUSH_LOOK);
        }
        let defect = || io::Error::other("a defect of smtp-dup ended this");
        threads.into_iter().map(|thread| thread?.join().map_err(|_| defect())?).collect()
    })
}

/// Where messages lie while they are here.
pub struct Store {
    /// Big bodies, for as long as the process lives.
    pub scratch: Scratch,
    /// Copies until they are delivered.
    pub spool: Option<Arc<Spool>>,
}

/// Sweeps the spool on a thread of its own, for which nobody waits: it reads all that lies there,
/// on whatever disk, and may end anywhere.
fn start_sweep(spool: &Arc<Spool>, config: &Config) {
    let (spool, backups) = (Arc::clone(spool), spool::names(&config.backups));
    let primary = config.primary.to_string();
    let thread = Builder::new().name("sweep".into());
    if let Err(error) = thread.spawn(move || sweep(&spool, &backups, &primary)) {
        maillog::sweep_failed(&error);
    }
}

/// Clears up what a crash has left, and says what is owed since before.
fn sweep(spool: &Spool, backups: &[String], primary: &str) {
    match spool.sweep(backups) {
        Ok(census) => {
            for (backup, copies) in &census.owed {
                let is_known = backups.contains(backup) || backup == primary;
                let say = if is_known { maillog::spool_has } else { maillog::spool_orphans };
                say(backup, *copies);
            }
            maillog::spool_swept(census.owed.values().sum());
        }
        Err(error) => maillog::sweep_failed(&error),
    }
}

/// Who may come in, and what each client gets.
struct Door<'a, 'agents, 'env> {
    allowed: &'a [IpNet],
    shared: &'a Shared<'a>,
    agents: &'a Agents<'agents, 'env>,
}

impl Door<'_, '_, '_> {
    /// The address of a client that may come in; the others hear why not. IPv4 in IPv6's clothes
    /// is IPv4.
    fn admits(&self, stream: &TcpStream, address: SocketAddr) -> Option<SocketAddr> {
        let ip = address.ip().to_canonical();
        let address = SocketAddr::new(ip, address.port());
        if self.allowed.iter().any(|network| network.contains(&ip)) {
            return Some(address);
        }
        maillog::client_denied(address);
        let text = format!("{ip} is not in smtp.allowed_clients of {}", self.shared.us.domain);
        reject(stream, &Reply::new(421, "4.7.1", &text));
        None
    }

    /// Serves a client on this thread. A panic ends its session alone, with a 421.
    fn serve(&self, stream: TcpStream, address: SocketAddr) {
        // Urgent octets stay in the stream (RFC 6093 §5): the message without them is another than
        // a filter in front of us has seen.
        if setsockopt(&stream, sockopt::OobInline, &true).is_err() {
            return;
        }
        let Ok(stream) = Stream::new(stream) else { return };
        let mut session = Session::new(stream, address, self.shared, self.agents);
        if catch_unwind(AssertUnwindSafe(|| session.serve())).is_err() {
            maillog::panicked(&format!("client={address}"));
            session.apologise();
        }
    }

    /// Serves the only client there is. One that has gone again has no address.
    fn serve_one(&self, stream: TcpStream) {
        if let Ok(address) = stream.peer_addr()
            && let Some(address) = self.admits(&stream, address)
        {
            self.serve(stream, address);
        }
    }
}

/// What ends the accepting.
struct Wakers<'a> {
    signals: &'a Signals,
    bell: UnixStream,
    tie: Option<Tie>,
}

/// The worker threads, and the clients that wait for one.
struct Workers<'a, 'agents, 'env> {
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

impl Workers<'_, '_, '_> {
    /// Accepts until a signal comes or the keeper goes; the listeners are closed then.
    fn accept<'scope>(
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

/// Says a last word and closes, without waiting for anything.
fn reject(stream: &TcpStream, reply: &Reply) {
    let _ = stream.set_nonblocking(true);
    let _ = std::io::Write::write(&mut &*stream, reply.wire());
    let _ = stream.shutdown(std::net::Shutdown::Write);
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
