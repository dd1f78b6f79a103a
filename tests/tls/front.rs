//! A server that can do TLS: it stands before a [`Sink`], speaks with the client until there is
//! TLS or none is wanted, and passes on the rest. It records what it hears in clear.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustls::{HandshakeKind, ProtocolVersion, ServerConfig, ServerConnection};

use crate::common::{BOUND, Sink, wait_until};
use crate::pki::Pair;
use crate::pump::{Side, pump};

/// What the server does about the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handshake {
    /// Its part.
    Whole,
    /// Its part, one octet a segment.
    OctetByOctet,
    /// It closes when the client has begun.
    Close,
    /// It answers in clear, as if there had been no handshake.
    Clear,
    /// It never answers.
    Stall,
    /// It sends an octet of a record from time to time, and never enough.
    Drip,
}

#[derive(Clone)]
pub struct Options {
    pub config: Arc<ServerConfig>,
    /// TLS from the first octet on.
    pub implicit: bool,
    /// The lines of the reply to EHLO in clear behind the first.
    pub ehlo: Vec<&'static str>,
    /// What is said behind that reply, before its time.
    pub behind_ehlo: &'static [u8],
    /// What STARTTLS is answered with; the handshake follows if it begins with 220.
    pub starttls: &'static [u8],
    pub handshake: Handshake,
    /// The end of a session is said with close_notify.
    pub says_close: bool,
}

impl Options {
    pub fn new(pair: &Pair) -> Options {
        Options {
            config: pair.server(),
            implicit: false,
            ehlo: vec!["PIPELINING", "STARTTLS", "8BITMIME"],
            behind_ehlo: b"",
            starttls: b"220 2.0.0 go ahead\r\n",
            handshake: Handshake::Whole,
            says_close: true,
        }
    }
}

/// What was seen of one connection.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// All that came before the handshake, or until mail began to flow in clear.
    pub clear: Vec<u8>,
    /// The session's name for the server, if it gave one.
    pub name: Option<String>,
    pub kind: Option<HandshakeKind>,
    pub version: Option<ProtocolVersion>,
    pub suite: Option<String>,
    /// The handshake did not come to its end.
    pub failed: bool,
}

/// The server. It stays until the test ends.
pub struct Front {
    pub sink: Sink,
    addr: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    sink: Mutex<SocketAddr>,
    options: Mutex<Options>,
    seen: Mutex<Vec<Seen>>,
}

impl Front {
    pub fn start(pair: &Pair) -> Front {
        Front::with(Options::new(pair), Sink::start())
    }

    pub fn with(options: Options, sink: Sink) -> Front {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let (options, seen) = (Mutex::new(options), Mutex::default());
        let shared = Arc::new(Shared { sink: Mutex::new(sink.addr()), options, seen });
        let front = Front { sink, addr, shared: Arc::clone(&shared) };
        thread::spawn(move || {
            for socket in listener.incoming() {
                let shared = Arc::clone(&shared);
                thread::spawn(move || {
                    let number = {
                        let mut seen = shared.seen.lock().unwrap();
                        seen.push(Seen::default());
                        seen.len() - 1
                    };
                    let options = shared.options.lock().unwrap().clone();
                    let guest = Guest { options, shared: &shared, number };
                    let _ = guest.serve(socket.unwrap());
                });
            }
        });
        front
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// From now on new connections meet this.
    pub fn change(&self, change: impl FnOnce(&mut Options)) {
        change(&mut self.shared.options.lock().unwrap());
    }

    /// From now on new connections are passed on to there.
    pub fn lead_to(&self, addr: SocketAddr) {
        *self.shared.sink.lock().unwrap() = addr;
    }

    /// All connections so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().unwrap().clone()
    }

    /// Those that came to TLS, once there are `count`.
    #[track_caller]
    pub fn wait_secured(&self, count: usize) -> Vec<Seen> {
        let secured = || self.seen().into_iter().filter(|s| s.kind.is_some()).collect::<Vec<_>>();
        wait_until("handshakes", || secured().len() >= count);
        secured()
    }
}

struct Guest<'a> {
    options: Options,
    shared: &'a Shared,
    number: usize,
}

impl Guest<'_> {
    fn note(&self, note: impl FnOnce(&mut Seen)) {
        note(&mut self.shared.seen.lock().unwrap()[self.number]);
    }

    fn serve(&self, mut socket: TcpStream) -> std::io::Result<()> {
        socket.set_nodelay(true)?;
        if !self.options.implicit {
            socket.write_all(b"220 front.example ESMTP\r\n")?;
            if let Some(first) = self.in_clear(&mut socket)? {
                return self.pass_on(socket, None, &first);
            }
        }
        let tls = self.shake_hands(&mut socket).inspect_err(|_| self.note(|s| s.failed = true))?;
        self.note(|seen| {
            seen.name = tls.server_name().map(Into::into);
            seen.version = tls.protocol_version();
            seen.suite = tls.negotiated_cipher_suite().map(|s| format!("{:?}", s.suite()));
            seen.kind = tls.handshake_kind();
        });
        self.pass_on(socket, Some(tls), b"")
    }

    /// Until STARTTLS; or the first command of mail, if that comes.
    fn in_clear(&self, socket: &mut TcpStream) -> std::io::Result<Option<Vec<u8>>> {
        let mut input = Vec::new();
        loop {
            while let Some(end) = input.iter().position(|&octet| octet == b'\n') {
                let line: Vec<u8> = input.drain(..=end).collect();
                let verb = line[..4.min(line.len())].to_ascii_uppercase();
                match verb.as_slice() {
                    b"EHLO" => {
                        let mut lines = vec!["front.example"];
                        lines.extend(&self.options.ehlo);
                        let last = lines.len() - 1;
                        let mark = |n| if n == last { ' ' } else { '-' };
                        let lines = lines.iter().enumerate();
                        let reply: String =
                            lines.map(|(n, line)| format!("250{}{line}\r\n", mark(n))).collect();
                        socket.write_all(&[reply.as_bytes(), self.options.behind_ehlo].concat())?;
                    }
                    b"STAR" => {
                        socket.write_all(self.options.starttls)?;
                        if self.options.starttls.starts_with(b"220") {
                            return Ok(None);
                        }
                    }
                    _ => return Ok(Some([line, input].concat())),
                }
            }
            let mut octets = [0; 4096];
            let count = socket.read(&mut octets)?;
            if count == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            self.note(|seen| seen.clear.extend_from_slice(&octets[..count]));
            input.extend_from_slice(&octets[..count]);
        }
    }

    fn shake_hands(&self, socket: &mut TcpStream) -> std::io::Result<ServerConnection> {
        let mut tls = ServerConnection::new(Arc::clone(&self.options.config)).unwrap();
        let mut began = false;
        while tls.is_handshaking() || tls.wants_write() {
            if !tls.wants_write() {
                if tls.read_tls(socket)? == 0 {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
                if !std::mem::replace(&mut began, true) {
                    self.disturb(socket)?;
                }
                let processed = tls.process_new_packets();
                if processed.is_err() {
                    let _ = tls.write_tls(socket);
                }
                processed.map_err(std::io::Error::other)?;
                continue;
            }
            if self.options.handshake == Handshake::OctetByOctet {
                let mut flight = Vec::new();
                tls.write_tls(&mut flight)?;
                for octet in flight {
                    socket.write_all(&[octet])?;
                }
            } else {
                tls.write_tls(socket)?;
            }
        }
        Ok(tls)
    }

    /// The client has said its first word.
    fn disturb(&self, socket: &mut TcpStream) -> std::io::Result<()> {
        let over = || Err(std::io::ErrorKind::Other.into());
        match self.options.handshake {
            Handshake::Whole | Handshake::OctetByOctet => Ok(()),
            Handshake::Close => over(),
            Handshake::Clear => {
                socket.write_all(b"250-front.example\r\n250 DSN\r\n")?;
                let _ = socket.read_to_end(&mut Vec::new());
                over()
            }
            Handshake::Stall => {
                // Until the client gives up.
                let _ = socket.read_to_end(&mut Vec::new());
                over()
            }
            Handshake::Drip => {
                socket.write_all(&[22, 3, 3, 0x40, 0])?;
                loop {
                    socket.write_all(&[0])?;
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    /// The rest is between the client and the sink. `first` came in clear behind EHLO.
    fn pass_on(
        &self,
        socket: TcpStream,
        tls: Option<ServerConnection>,
        first: &[u8],
    ) -> std::io::Result<()> {
        let sink = *self.shared.sink.lock().unwrap();
        let mut sink = TcpStream::connect_timeout(&sink, BOUND)?;
        sink.set_nodelay(true)?;
        let is_clear = tls.is_none();
        if is_clear || !self.options.implicit {
            swallow_reply(&mut sink)?;
        }
        if is_clear {
            sink.write_all(b"EHLO front.example\r\n")?;
            swallow_reply(&mut sink)?;
        }
        let mut outer = Side::new(socket, tls.map(Into::into));
        outer.says_close = self.options.says_close;
        let mut inner = Side::new(sink, None);
        inner.give(first);
        pump([outer, inner]);
        Ok(())
    }
}

/// Reads a whole reply and forgets it.
pub fn swallow_reply(socket: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let mut reply = Vec::new();
    let mut octet = [0];
    let is_last = |reply: &[u8]| {
        let line = reply.rsplit(|&o| o == b'\n').nth(1).unwrap_or(b"");
        reply.ends_with(b"\n") && line.get(3) == Some(&b' ')
    };
    while !is_last(&reply) {
        socket.read_exact(&mut octet)?;
        reply.push(octet[0]);
    }
    Ok(reply)
}
