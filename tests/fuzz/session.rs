//! A client's octets, cut into pieces, into a whole session: a well-behaved primary behind it, and
//! a backup that gets the copies.
//!
//! The first octet says what the primary offers and which limits there are, see [`Terms`]; the
//! rest is what the client says, with a [`PAUSE`](crate::transport::PAUSE) between pieces.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;

use crossbeam_channel::bounded;
use smtp_dup::buffers::Buffers;
use smtp_dup::identity::Identity;
use smtp_dup::message::{Budget, Scratch};
use smtp_dup::relay::agent::Agents;
use smtp_dup::relay::backup::{Backup, Plan};
use smtp_dup::relay::connection::{Connection, Limits};
use smtp_dup::relay::destination::Destination;
use smtp_dup::relay::pool::Pool;
use smtp_dup::shutdown::{Grace, Shutdown};
use smtp_dup::smtp::session::{Session, Shared};

use crate::dialogue::{self, Sent};
use crate::primary::{ATTRIBUTES, Offers, Primary, Received};
use crate::transport::{BOUND, PAUSE, client};

/// No wait here comes to its end: what is awaited comes, or its connection ends.
pub const LIMITS: Limits = Limits { connect: BOUND, command: BOUND, data: BOUND };

/// The bits of the first octet. An ordinary session is 'G', one without any extension '@'.
struct Terms {
    offers: Offers,
    max_message_size: u64,
    max_recipients: usize,
    has_backup: bool,
    /// Octets that may be held for it.
    memory: u64,
}

impl Terms {
    fn read(octet: u8) -> Terms {
        let has = |bit: u8| octet & 1 << bit != 0;
        let ehlo = !has(5);
        Terms {
            offers: Offers {
                ehlo,
                pipelining: ehlo && has(0),
                size: ehlo && has(1),
                others: ehlo && has(2),
                judges_forwards: true,
            },
            max_message_size: if has(3) { 60 } else { 0 },
            max_recipients: if has(4) { 2 } else { 1000 },
            has_backup: has(6),
            memory: if has(7) { 40 } else { 1 << 30 },
        }
    }
}

/// What stays from one input to the next.
struct World {
    primary: Primary,
    backup: Primary,
    buffers: Buffers,
    /// To the backup.
    connection: Option<Connection>,
}

/// Runs a session with a client that says these octets.
///
/// # Panics
/// When a promise is broken.
pub fn run(octets: &[u8]) {
    static WORLD: OnceLock<Mutex<World>> = OnceLock::new();
    let Some((&first, script)) = octets.split_first() else { return };
    let world = WORLD.get_or_init(|| {
        let (primary, backup) = (Primary::start(), Primary::start());
        let all = Offers {
            ehlo: true,
            pipelining: true,
            size: true,
            others: true,
            judges_forwards: false,
        };
        // What the primary took in pieces comes to the backup in one, which it must not judge anew.
        backup.offer(all);
        Mutex::new(World { primary, backup, buffers: Buffers::default(), connection: None })
    });
    let mut world = world.lock().expect("no panic before");
    let terms = Terms::read(first);
    let (heard, copies) = world.serve(&terms, script);
    let received = world.primary.messages(0);

    let said: Vec<u8> = script.iter().copied().filter(|&octet| octet != PAUSE).collect();
    let sent = dialogue::read(&said, &heard);
    compare(&sent, &received, terms.offers.size);
    let accepted: Vec<&Sent> = sent.iter().filter(|message| message.code < 400).collect();
    let count = received.iter().filter(|message| message.accepted).count();
    assert_eq!(accepted.len(), count, "accepted on one side alone: {sent:?} {received:?}");
    // What is counted for a message of any size is more than the little memory.
    let is_copied = terms.has_backup && terms.memory > 512;
    assert_eq!(copies.len(), if is_copied { count } else { 0 }, "copies");
    for (copy, message) in copies.iter().zip(accepted) {
        is_copy(copy, message);
    }
}

/// What the primary saw end is what the client ended, in that order and octet for octet; and what
/// it answered is what the client heard.
fn compare(sent: &[Sent], received: &[Received], takes_size: bool) {
    let mut sent = sent.iter();
    for message in received {
        // One that it did not answer was closed in that place.
        let is_it = |sent: &&Sent| {
            sent.wire == message.wire && (sent.reply == message.reply || message.reply[0] == b' ')
        };
        let Some(same) = sent.find(is_it) else { panic!("no client sent {message:?}") };
        assert_eq!(same.rcpts, message.rcpts);
        assert_eq!(same.forwards, message.forwards, "{same:?} {message:?}");
        // Where the primary does not offer SIZE, a client's SIZE stays here.
        let mail = same.mail.to_ascii_uppercase();
        let is_less = !takes_size && mail.windows(4).any(|word| word == b"SIZE");
        assert!(is_less || same.mail == message.mail, "{same:?} {message:?}");
    }
}

/// A copy is for the same, whatever became of parameters, and the same octet for octet.
fn is_copy(copy: &Received, message: &Sent) {
    assert_eq!(copy.wire.escape_ascii().to_string(), message.wire.escape_ascii().to_string());
    let mut octets = message.mail.iter();
    assert!(copy.mail.iter().all(|octet| octets.any(|other| other == octet)), "{copy:?}");
    assert_eq!(copy.rcpts.len(), message.rcpts.len());
    assert_eq!(attributes(&copy.forwards), attributes(&message.forwards));
    for (copy, original) in copy.rcpts.iter().zip(&message.rcpts) {
        // The path, NOTIFY=NEVER, and of the client's parameters ORCPT alone; a path may look odd.
        let is_it = |at: usize| {
            let (path, more) = (&copy[..at], copy[at + 12..].to_ascii_uppercase());
            let given = original.strip_prefix(path).map(<[u8]>::to_ascii_uppercase);
            copy[at..].starts_with(b"NOTIFY=NEVER")
                && given.is_some_and(|given| {
                    more.is_empty() || given.windows(more.len()).any(|word| word == more)
                })
        };
        assert!((0..copy.len() - 11).any(is_it), "{copy:?} {original:?}");
    }
}

/// What several XFORWARD say together: the last word on each attribute that a server knows.
fn attributes(forwards: &[Vec<u8>]) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let words = forwards.iter().flat_map(|line| line.split(u8::is_ascii_whitespace));
    let pairs = words.filter_map(|word| {
        let equals = word.iter().position(|&octet| octet == b'=')?;
        Some((word[..equals].to_ascii_uppercase(), word[equals + 1..].to_vec()))
    });
    pairs
        .filter(|(name, _)| ATTRIBUTES.as_bytes().split(|&o| o == b' ').any(|one| one == name))
        .collect()
}

impl World {
    /// Serves one client. Gives what it heard, and what the backup got.
    fn serve(&mut self, terms: &Terms, script: &[u8]) -> (Vec<u8>, Vec<Received>) {
        self.primary.offer(terms.offers);
        let shutdown = Shutdown::new(Grace { transactions: BOUND, copies: BOUND }, Arc::default());
        let us = Identity::new("dup.example.com");
        let pool = Pool::new(destination(self.primary.address), us.clone(), LIMITS);
        let plan =
            Plan { us: us.clone(), limits: LIMITS, most_agents: 1, tries_again: true, spool: None };
        let to = destination(self.backup.address);
        let (alive, _) = bounded(0);
        let backups = [Backup::new(to, terms.has_backup, plan, &alive)];
        // This thread is the one agent, when the session is over.
        let _leave = backups[0].recruit();
        backups[0].close();
        let heard = thread::scope(|scope| {
            let shared = Shared {
                us: &us,
                max_message_size: terms.max_message_size,
                max_recipients: terms.max_recipients,
                timeout: BOUND,
                tls: None,
                primary: &pool,
                budget: &Budget::new(terms.memory, 10, Scratch::Memory),
                spool: None,
                backups: Arc::new([]),
                buffers: &self.buffers,
                shutdown: &shutdown,
            };
            let agents = Agents::new(scope, &backups, &shutdown);
            let (stream, feed) = client(script);
            let address = SocketAddr::from(([127, 0, 0, 1], 1));
            Session::new(stream, address, &shared, &agents).serve();
            feed.heard()
        });
        (heard, self.copy(&backups[0], &shutdown))
    }

    /// Brings the backup all that it is owed.
    fn copy(&mut self, backup: &Backup, shutdown: &Shutdown) -> Vec<Received> {
        while let Some(copy) =
            backup.next(shutdown, &mut None).and_then(|job| backup.claim(job, true))
        {
            let connection = match &mut self.connection {
                Some(connection) => connection,
                none => none.insert(backup.connect(shutdown).expect("a backup that is up")),
            };
            let attempt = copy.send(connection, shutdown).expect("a backup that does well");
            assert!(attempt.refused.is_empty() && attempt.deferred.is_empty(), "{attempt:?}");
            assert!(connection.is_at_rest(), "{attempt:?}");
            backup.done(&copy);
        }
        self.backup.messages(usize::from(self.connection.is_some()))
    }
}

/// A server on the loopback.
pub fn destination(address: SocketAddr) -> Destination {
    Destination::parse(&address.to_string()).expect("an address and a port")
}
