//! A server that does all as it should, decides by the first octets of what it gets, and looks
//! closely at every octet: the primary, and the backup, of the sessions here.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use crate::dialogue::without_blanks;
use crate::rules::has_bare;
use crate::transport::{BOUND, leave_no_trace};

/// The attributes of XFORWARD that it knows.
pub const ATTRIBUTES: &str = "NAME ADDR PORT PROTO HELO IDENT SOURCE";

/// What it offers.
#[derive(Debug, Clone, Copy, Default)]
pub struct Offers {
    pub ehlo: bool,
    pub pipelining: bool,
    pub size: bool,
    pub others: bool,
    /// It refuses some XFORWARDs.
    pub judges_forwards: bool,
}

/// A message that it saw end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Received {
    /// The arguments of XFORWARD.
    pub forwards: Vec<Vec<u8>>,
    /// The arguments of MAIL and of each accepted RCPT, blanks aside.
    pub mail: Vec<u8>,
    pub rcpts: Vec<Vec<u8>>,
    /// What followed DATA, with the final dot.
    pub wire: Vec<u8>,
    /// The text of the reply: nobody else says the same.
    pub reply: Vec<u8>,
    /// It was a 250.
    pub accepted: bool,
}

/// What it has seen.
#[derive(Debug, Default)]
struct Seen {
    offers: Offers,
    messages: Vec<Received>,
    /// What no client of a server may do.
    faults: Vec<String>,
    connections: usize,
    ended: usize,
    serial: u64,
}

/// The server, one connection after the other.
pub struct Primary {
    pub address: SocketAddr,
    seen: Arc<(Mutex<Seen>, Condvar)>,
}

impl Primary {
    pub fn start() -> Primary {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("its address");
        let seen = Arc::<(Mutex<Seen>, Condvar)>::default();
        let shared = Arc::clone(&seen);
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                shared.0.lock().expect("no panic").connections += 1;
                // However it ends, it has ended.
                let _ = Connection::new(stream, &shared.0).and_then(Connection::serve);
                shared.0.lock().expect("no panic").ended += 1;
                shared.1.notify_all();
            }
        });
        Primary { address, seen }
    }

    /// What it offers from now on.
    pub fn offer(&self, offers: Offers) {
        self.seen.0.lock().expect("no panic").offers = offers;
    }

    /// Waits for the end of all connections but `open` ones that stay. Gives the messages, in
    /// their order.
    ///
    /// # Panics
    /// When something came that must not.
    pub fn messages(&self, open: usize) -> Vec<Received> {
        let seen = self.seen.0.lock().expect("no panic");
        let is_busy = |seen: &mut Seen| seen.connections > seen.ended + open;
        let (mut seen, wait) =
            self.seen.1.wait_timeout_while(seen, BOUND, is_busy).expect("no panic");
        assert!(!wait.timed_out(), "a connection stays open");
        assert!(seen.faults.is_empty(), "the server saw {:?}", seen.faults);
        std::mem::take(&mut seen.messages)
    }
}

/// The one connection at a time.
struct Connection<'a> {
    reader: BufReader<TcpStream>,
    seen: &'a Mutex<Seen>,
    offers: Offers,
    /// Said for the next MAIL.
    forwards: Vec<Vec<u8>>,
    /// From MAIL on.
    transaction: Option<Received>,
}

/// What to do behind a command.
enum Next {
    Go,
    Close,
}

impl Connection<'_> {
    fn new(stream: TcpStream, seen: &Mutex<Seen>) -> std::io::Result<Connection<'_>> {
        leave_no_trace(&stream)?;
        let offers = seen.lock().expect("no panic").offers;
        Ok(Connection {
            reader: BufReader::new(stream),
            seen,
            offers,
            forwards: Vec::new(),
            transaction: None,
        })
    }

    fn serve(mut self) -> std::io::Result<()> {
        self.say("220 primary")?;
        loop {
            let mut line = Vec::new();
            self.reader.read_until(b'\n', &mut line)?;
            if line.is_empty() {
                return Ok(());
            }
            let Some(command) = line.strip_suffix(b"\r\n") else {
                self.fault("no CR LF", &line);
                return Ok(());
            };
            let is_odd = |&octet: &u8| matches!(octet, b'\r' | b'\n' | 0);
            if command.iter().any(is_odd) || line.len() > 2048 + 2 {
                self.fault("not one line", &line);
            }
            if let Next::Close = self.obey(command)? {
                return Ok(());
            }
        }
    }

    fn obey(&mut self, command: &[u8]) -> std::io::Result<Next> {
        let words = without_blanks(command);
        if command.starts_with(b"EHLO ") && self.offers.ehlo {
            let offers = self.offers;
            let lines = [
                (offers.pipelining, "250-PIPELINING\r\n"),
                (offers.size, "250-SIZE 100000\r\n"),
                (offers.others, "250-8BITMIME\r\n250-SMTPUTF8\r\n250-DSN\r\n"),
            ];
            let mut lines: String =
                lines.iter().filter(|(yes, _)| *yes).map(|(_, line)| *line).collect();
            if offers.others {
                lines += &format!("250-XFORWARD {ATTRIBUTES}\r\n");
            }
            self.forwards.clear();
            self.say(&format!("250-primary\r\n{lines}250 HELP"))?;
        } else if command.starts_with(b"EHLO ") {
            self.say("502 no")?;
        } else if command.starts_with(b"HELO ") {
            self.say("250 primary")?;
        } else if let Some(mail) = words.strip_prefix(b"MAILFROM:") {
            if self.transaction.is_some() {
                self.fault("a second MAIL", command);
            }
            return self.judge(mail, |connection, mail| {
                let forwards = std::mem::take(&mut connection.forwards);
                connection.transaction = Some(Received { forwards, mail, ..Received::default() });
            });
        } else if let Some(rcpt) = words.strip_prefix(b"RCPTTO:") {
            if self.transaction.is_none() {
                return self.out_of_order(command);
            }
            return self.judge(rcpt, |connection, rcpt| {
                connection.transaction.iter_mut().for_each(|t| t.rcpts.push(rcpt.clone()));
            });
        } else if command == b"DATA" {
            if self.transaction.as_ref().is_none_or(|t| t.rcpts.is_empty()) {
                return self.out_of_order(command);
            }
            return self.receive();
        } else if let Some(attributes) = command.strip_prefix(b"XFORWARD ") {
            if self.transaction.is_some() || !self.offers.others {
                self.fault("an XFORWARD", command);
            }
            let equals = attributes.iter().position(|&octet| octet == b'=');
            match equals.filter(|_| self.offers.judges_forwards).map(|at| &attributes[at..]) {
                Some([b'=', b'5', ..]) => self.say("501 5.5.4 no")?,
                Some([b'=', b'9', ..]) => return Ok(Next::Close),
                _ => {
                    self.forwards.push(attributes.to_vec());
                    self.say("250 2.0.0 ok")?;
                }
            }
        } else if command == b"RSET" {
            self.transaction = None;
            self.forwards.clear();
            self.say("250 ok")?;
        } else if command == b"QUIT" {
            return Ok(Next::Close);
        } else {
            self.fault("an unknown command", command);
        }
        Ok(Next::Go)
    }

    /// Answers MAIL or RCPT as the first octet in its brackets says.
    fn judge(&mut self, path: &[u8], accept: impl Fn(&mut Self, Vec<u8>)) -> std::io::Result<Next> {
        match path.get(1) {
            Some(b'4') => self.say("450 4.2.0 later")?,
            Some(b'5') => self.say("550-5.1.1 no\r\n550 5.1.1 never")?,
            Some(b'8') => {
                self.say("421 4.3.2 closing")?;
                return Ok(Next::Close);
            }
            Some(b'9') => return Ok(Next::Close),
            _ => {
                accept(self, path.to_vec());
                self.say("250 2.1.0 ok")?;
            }
        }
        Ok(Next::Go)
    }

    /// What comes behind a batch whose first commands were refused.
    fn out_of_order(&mut self, command: &[u8]) -> std::io::Result<Next> {
        if !self.offers.pipelining {
            self.fault("out of order", command);
        }
        self.say("503 5.5.1 order")?;
        Ok(Next::Go)
    }

    /// Takes a message; the first octet of it decides.
    fn receive(&mut self) -> std::io::Result<Next> {
        self.say("354 go on")?;
        let mut wire = Vec::new();
        while !wire.ends_with(b"\r\n.\r\n") && wire != b".\r\n" {
            let before = wire.len();
            self.reader.read_until(b'\n', &mut wire)?;
            if wire.len() == before {
                if has_bare(wire.strip_suffix(b"\r").unwrap_or(&wire)) {
                    self.fault("a bare CR or LF", &wire);
                }
                return Ok(Next::Close);
            }
            if before == 0 && wire[0] == b'6' {
                self.say("552 5.3.4 enough")?;
                return Ok(Next::Close);
            }
        }
        if has_bare(&wire) {
            self.fault("a bare CR or LF", &wire);
        }
        let mut message = self.transaction.take().unwrap_or_default();
        let mut seen = self.seen.lock().expect("no panic");
        seen.serial += 1;
        let (code, next) = match wire[0] {
            b'4' => ("451 4.2.0", Next::Go),
            b'5' => ("554 5.7.1", Next::Go),
            b'8' => ("421 4.3.2", Next::Close),
            b'9' => ("", Next::Close),
            _ => ("250 2.0.0", Next::Go),
        };
        message.accepted = code.starts_with('2');
        let reply = format!("{code} message {}", seen.serial);
        message.reply = format!("{reply}\r\n").into_bytes();
        message.wire = wire;
        seen.messages.push(message);
        drop(seen);
        if !code.is_empty() {
            self.say(&reply)?;
        }
        Ok(next)
    }

    fn say(&mut self, reply: &str) -> std::io::Result<()> {
        self.reader.get_mut().write_all(format!("{reply}\r\n").as_bytes())
    }

    fn fault(&self, what: &str, octets: &[u8]) {
        let fault = format!("{what}: {}", octets.escape_ascii());
        self.seen.lock().expect("no panic").faults.push(fault);
    }
}
