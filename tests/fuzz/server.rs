//! A server's octets into the sending side: a client's session whose primary says them, or a copy
//! for a backup that does.
//!
//! The first octet says who hears them, see [`run`]; the rest is what the server says, with a
//! [`PAUSE`] where it waits for the other side, and a [`HANGUP`] where it closes, and goes on with
//! the next connection. When it has said all it closes, and so it does with all that come then.

use std::collections::{HashSet, VecDeque};
use std::io::{self, Read, Write};
use std::net::{Shutdown as Half, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, OnceLock};
use std::thread;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use smtp_dup::buffers::Buffers;
use smtp_dup::identity::Identity;
use smtp_dup::message::{Body, Budget, Collected, Collector, Message, QueueId, Scratch};
use smtp_dup::relay::agent::Agents;
use smtp_dup::relay::connection::Connection;
use smtp_dup::relay::copy::Copy;
use smtp_dup::relay::pool::Pool;
use smtp_dup::shutdown::{Deadline, Grace, Shutdown};
use smtp_dup::smtp::envelope::{Envelope, Path};
use smtp_dup::smtp::origin::Origin;
use smtp_dup::smtp::reply::Reply;
use smtp_dup::smtp::session::{Session, Shared};

use crate::dialogue;
use crate::rules::replies;
use crate::session::{LIMITS, destination};
use crate::transport::{BOUND, PAUSE, client, leave_no_trace};

/// In a script, where the server closes the connection.
const HANGUP: u8 = 0xFD;

/// How long the server waits at a [`PAUSE`], in milliseconds: nearly always the answer is there
/// before, unless there will be none.
const PATIENCE: u8 = 1;

/// After so many pauses in which nothing came, the rest of a script is said without.
const MOST_VAIN: usize = 3;

/// Lets a server say these octets. The lowest two bits of the first say to whom: 0 to 2 to one of
/// [`CLIENTS`] by way of a session, 3 to a delivery agent, whose message is in a file with 4.
///
/// # Panics
/// When a promise is broken.
pub fn run(octets: &[u8]) {
    static SERVER: OnceLock<Mutex<Server>> = OnceLock::new();
    let Some((&first, script)) = octets.split_first() else { return };
    let server = SERVER.get_or_init(|| Mutex::new(Server::start())).lock().expect("no panic");
    server.begin(script);
    match CLIENTS.get(usize::from(first & 3)) {
        Some(said) => to_client(server.address, said, script),
        None => to_agent(server.address, first & 4 != 0),
    }
}

/// What clients say, with their pauses.
const CLIENTS: [&[u8]; 3] = [
    b"EHLO c\r\n\xFEMAIL FROM:<a@example.com> SIZE=20\r\n\xFERCPT TO:<b@example.com>\r\n\xFE\
      RCPT TO:<c@example.com>\r\n\xFEDATA\r\n\xFESubject: x\r\n\r\ntext\r\n.\r\n\xFE\
      MAIL FROM:<>\r\n\xFERCPT TO:<d@example.com>\r\n\xFEDATA\r\n\xFE.\r\n\xFEQUIT\r\n",
    b"EHLO c\r\n\xFEMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\n\
      RCPT TO:<c@example.com>\r\nDATA\r\n\xFEone\r\n\xFEtwo\r\n.\r\nRSET\r\nNOOP\r\n\
      MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n\xFEx\r\n.\r\nQUIT\r\n",
    b"HELO c\r\n\xFEMAIL FROM:<a@example.com>\r\nRSET\r\nMAIL FROM:<b@example.com>\r\n\xFE\
      EHLO c\r\nMAIL FROM:<c@example.com> BODY=8BITMIME\r\nRCPT TO:<d@example.com>\r\n\xFE\
      DATA\r\nthis is more than the limit allows: this is more than the limit allows\r\n.\r\n\
      MAIL FROM:<e@example.com>\r\nRCPT TO:<f@example.com>\r\n\xFEDATA\r\n\xFE.\r\nRSET\r\n",
];

/// The client hears well-formed replies, one for each thing that it said, and no 2xx for a message
/// but in the server's own words.
fn to_client(server: SocketAddr, said: &[u8], script: &[u8]) {
    let us = Identity::new("dup");
    let (pool, shutdown) = (Pool::new(destination(server), us.clone(), LIMITS), shutdown());
    let heard = thread::scope(|scope| {
        let shared = Shared {
            us: &us,
            max_message_size: 60,
            max_recipients: 10,
            timeout: BOUND,
            tls: None,
            primary: &pool,
            budget: &Budget::new(0, 0, Scratch::Memory),
            spool: None,
            backups: Arc::new([]),
            buffers: &Buffers::default(),
            shutdown: &shutdown,
        };
        let (stream, feed) = client(said);
        let address = SocketAddr::from(([127, 0, 0, 1], 1));
        Session::new(stream, address, &shared, &Agents::new(scope, &[], &shutdown)).serve();
        feed.heard()
    });
    let said: Vec<u8> = said.iter().copied().filter(|&octet| octet != PAUSE).collect();
    let words = words(script);
    for message in dialogue::read(&said, &heard).iter().filter(|message| message.code < 400) {
        for line in message.reply.split_inclusive(|&octet| octet == b'\n') {
            assert!(words.contains(line), "no server said {}", line.escape_ascii());
        }
    }
}

/// The lines that the server says, as they may be passed on.
fn words(script: &[u8]) -> HashSet<Vec<u8>> {
    let mut words = HashSet::new();
    for connection in script.split(|&octet| octet == HANGUP) {
        let said: Vec<u8> = connection.iter().copied().filter(|&octet| octet != PAUSE).collect();
        for line in said.split(|&octet| octet == b'\n') {
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            let printable = |&octet: &u8| match octet {
                b'\t' => octet,
                _ if octet.is_ascii_control() => b'?',
                _ => octet,
            };
            let mut line: Vec<u8> = line.iter().map(printable).collect();
            if line.len() == 3 {
                line.push(b' ');
            }
            line.extend_from_slice(b"\r\n");
            words.insert(line);
        }
    }
    words
}

/// An agent brings two copies, on one connection if it can. What it makes of the answers is about
/// recipients that there are, each once.
fn to_agent(server: SocketAddr, has_file: bool) {
    let (message, shutdown) = (Arc::new(message(has_file)), shutdown());
    let deadline = Deadline::of_copy(BOUND, &shutdown);
    let opened = Connection::open(&destination(server), &Identity::new("dup"), LIMITS, deadline);
    let Ok(mut connection) = opened.inspect_err(|failure| is_one_line(&failure.to_string())) else {
        return;
    };
    is_one_line(&connection.features().to_string());
    is_reply(connection.greeting());
    while connection.is_at_rest() {
        let copy = Copy::new(&message);
        let attempt = match copy.send(&mut connection, &shutdown) {
            Ok(attempt) => attempt,
            Err(failure) => return is_one_line(&failure.to_string()),
        };
        let judged = attempt.refused.iter().chain(&attempt.deferred);
        let places: Vec<usize> = judged.clone().map(|(place, _)| *place).collect();
        let each: HashSet<usize> = places.iter().copied().collect();
        assert_eq!(each.len(), places.len(), "{attempt:?}");
        assert!(each.iter().all(|place| copy.owed.contains(place)), "{attempt:?}");
        let replies = judged.map(|(_, reply)| reply).chain(&attempt.verdict);
        replies.chain(&attempt.unforwarded).for_each(is_reply);
    }
}

/// A message with recipients of all kinds.
fn message(has_file: bool) -> Message {
    let path =
        |path: &str, parameters: &str| Path { path: path.into(), parameters: parameters.into() };
    let mut origin = Origin::default();
    origin.take(b"NAME=client.example.com ADDR=192.0.2.1 PROTO=ESMTP");
    let envelope = Envelope {
        origin,
        reverse_path: path("<a@example.com>", "SIZE=9 BODY=8BITMIME RET=HDRS"),
        forward_paths: vec![
            path("<b@example.com>", "ORCPT=rfc822;b@example.com"),
            path("<\u{fc}@example.com>", ""),
            path("<c@example.com>", "NOTIFY=SUCCESS"),
        ],
    };
    let collector = Collector::new(&Budget::new(1 << 20, 1, Scratch::Memory), None);
    let body = b"Subject: x\r\n\r\ntext\r\n.\r\n";
    let Collected::Held(mut message) = collector.finish(QueueId::next(), envelope, body, |_| ())
    else {
        panic!("no place for a small message");
    };
    if has_file {
        let mut file = tempfile::tempfile().expect("a temporary file");
        file.write_all(body).expect("room in it");
        message.body = Body::File { file, start: 0, length: body.len() as u64 };
    }
    message
}

fn shutdown() -> Shutdown {
    Shutdown::new(Grace { transactions: BOUND, copies: BOUND }, Arc::default())
}

fn is_reply(reply: &Reply) {
    assert_eq!(replies(reply.wire()), [(reply.code(), reply.wire())]);
    assert!(reply.wire().len() < 32 * 1024, "{} octets", reply.wire().len());
    is_one_line(&reply.to_string());
}

/// It goes to the log, and into replies.
fn is_one_line(text: &str) {
    let is_control = |c: char| c != '\t' && c.is_ascii_control();
    assert!(!text.contains(is_control), "{text:?}");
}

/// The server, one connection after the other.
struct Server {
    address: SocketAddr,
    /// What it says on the connections to come.
    scripts: Arc<Mutex<VecDeque<Vec<u8>>>>,
}

impl Server {
    fn start() -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address");
        let scripts = Arc::<Mutex<VecDeque<Vec<u8>>>>::default();
        let queue = Arc::clone(&scripts);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let script = queue.lock().expect("no panic").pop_front();
                // The other side may end it at any time.
                let _ = serve(stream, &script.unwrap_or_default());
            }
        });
        Server { address, scripts }
    }

    /// All connections that come from now on are for this script: those before have been opened,
    /// and each was waited for until it had been accepted.
    fn begin(&self, script: &[u8]) {
        let parts = script.split(|&octet| octet == HANGUP).map(<[u8]>::to_vec);
        *self.scripts.lock().expect("no panic") = parts.collect();
    }
}

fn serve(mut stream: TcpStream, script: &[u8]) -> io::Result<()> {
    leave_no_trace(&stream)?;
    let (mut heard, mut vain) = (vec![0; 64 * 1024], 0);
    for (n, piece) in script.split(|&octet| octet == PAUSE).enumerate() {
        if n > 0 && vain < MOST_VAIN {
            let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::from(PATIENCE))? {
                0 => vain += 1,
                _ if stream.read(&mut heard)? == 0 => return Ok(()),
                _ => {}
            }
        }
        stream.write_all(piece)?;
    }
    stream.shutdown(Half::Write)?;
    while stream.read(&mut heard)? > 0 {}
    Ok(())
}
