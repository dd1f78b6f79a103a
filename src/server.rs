//! The program's life: accept, a worker thread for each connection, and the end.
//!
//! Two nested scopes hold the threads: the delivery agents in the outer, the workers in the inner.
//! Nobody waits for those that only look through the spool: they may end anywhere.
//! When a signal comes the listeners are closed; the inner scope joins, which is every session's
//! end; then the agents drain, and the outer scope joins. A process for one client has no workers:
//! its session is served where the inner scope would be.

mod workers;

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, Builder, ScopedJoinHandle};
use std::time::Duration;

use crossbeam_channel::bounded;
use ipnet::IpNet;
use nix::sys::socket::{setsockopt, sockopt};

use self::workers::{Wakers, Workers};
use crate::buffers::Buffers;
use crate::config::Config;
use crate::identity::Identity;
use crate::launch::master::Tie;
use crate::launch::signals::Signals;
use crate::launch::{Clients, descriptors};
use crate::maillog;
use crate::message::{Budget, Scratch};
use crate::relay::agent::{Agents, STACK};
use crate::relay::backup::{Backup, Plan};
use crate::relay::destination::Destination;
use crate::relay::pool::Pool;
use crate::shutdown::{Grace, Shutdown};
use crate::smtp::reply::Reply;
use crate::smtp::session::{Session, Shared};
use crate::spool::{self, Spool};
use crate::stream::Stream;

/// How often a flush looks whether its passes are over.
const FLUSH_LOOK: Duration = Duration::from_millis(20);

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
                let workers = Workers::new(door, most_clients);
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

/// Says a last word and closes, without waiting for anything.
fn reject(stream: &TcpStream, reply: &Reply) {
    let _ = stream.set_nonblocking(true);
    let _ = std::io::Write::write(&mut &*stream, reply.wire());
    let _ = stream.shutdown(std::net::Shutdown::Write);
}
