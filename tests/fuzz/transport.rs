//! The client's end of a session: a thread that feeds it.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc::linger;
use nix::sys::socket::{MsgFlags, recv, setsockopt, sockopt};
use smtp_dup::stream::Stream;

/// How long anything awaited may take. Nothing that is right takes a second on an idle machine.
pub const BOUND: Duration = Duration::from_secs(60);

/// In a script, between two pieces: the second is sent when the first has been read, or answered.
pub const PAUSE: u8 = 0xFE;

/// A client at work.
pub struct Feed(Receiver<Vec<u8>>);

impl Feed {
    /// All that the session said. It must have ended.
    pub fn heard(self) -> Vec<u8> {
        self.0.recv_timeout(BOUND).expect("the session's socket is closed")
    }
}

struct Order {
    client: TcpStream,
    /// The session's end, to see whether something is unread there.
    session: TcpStream,
    script: Vec<u8>,
    heard: Sender<Vec<u8>>,
}

/// Makes a client that says `script`, in pieces that are cut at each [`PAUSE`], and closes its
/// side. Gives the session's end of its connection.
pub fn client(script: &[u8]) -> (Stream, Feed) {
    static FEEDER: OnceLock<Mutex<(TcpListener, Sender<Order>)>> = OnceLock::new();
    let feeder = FEEDER.get_or_init(|| {
        let (sender, orders) = channel::<Order>();
        thread::spawn(move || orders.into_iter().for_each(Order::carry_out));
        Mutex::new((TcpListener::bind("127.0.0.1:0").expect("a port"), sender))
    });
    // One at a time, or tests that run at once would get each other's.
    let (listener, feeder) = &*feeder.lock().expect("no panic");
    let client = listener.local_addr().and_then(TcpStream::connect).expect("a connection");
    let (session, _) = listener.accept().expect("the other end of it");
    leave_no_trace(&client).expect("an option");
    let (sender, heard) = channel();
    let order = Order {
        client,
        session: session.try_clone().expect("a descriptor"),
        script: script.to_vec(),
        heard: sender,
    };
    feeder.send(order).expect("the feeder lives");
    (Stream::new(session).expect("options"), Feed(heard))
}

/// The last to close resets the connection, so that no port is left behind that waits.
pub fn leave_no_trace(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    Ok(setsockopt(stream, sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 })?)
}

impl Order {
    fn carry_out(mut self) {
        let mut heard = Vec::new();
        self.client.set_nonblocking(true).expect("an option");
        let pieces = self.script.split(|&octet| octet == PAUSE);
        for piece in pieces {
            if !say(&mut self.client, piece, &mut heard) {
                break;
            }
            while is_unread(&self.session) && !hear(&mut self.client, &mut heard) {
                thread::yield_now();
            }
        }
        let _ = self.client.shutdown(Shutdown::Write);
        let Order { mut client, session, heard: sender, .. } = self;
        drop(session);
        client.set_nonblocking(false).expect("an option");
        // A session that ended early may have reset what it did not read; all it said came before.
        let _ = client.read_to_end(&mut heard);
        let _ = sender.send(heard);
    }
}

/// Writes all of `piece`. False when the session has ended before that.
fn say(client: &mut TcpStream, piece: &[u8], heard: &mut Vec<u8>) -> bool {
    let mut rest = piece;
    while !rest.is_empty() {
        match client.write(rest) {
            Ok(n) => rest = &rest[n..],
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return false,
        }
        if hear(client, heard) {
            return false;
        }
    }
    true
}

/// Reads what there is. True when there will be no more.
fn hear(client: &mut TcpStream, heard: &mut Vec<u8>) -> bool {
    let mut octets = [0; 4096];
    match client.read(&mut octets) {
        Ok(n) => {
            heard.extend_from_slice(&octets[..n]);
            n == 0
        }
        Err(error) => error.kind() != ErrorKind::WouldBlock,
    }
}

/// Something lies there that the session has not read yet.
fn is_unread(session: &TcpStream) -> bool {
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    !matches!(recv(session.as_raw_fd(), &mut [0], flags), Err(Errno::EAGAIN) | Ok(0))
}
