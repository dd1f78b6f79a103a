//! A client that says exactly what the test wants, and reads replies within a bound.

use std::fmt;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, setsockopt, sockopt};

use super::{BOUND, bound, connect};

/// A connection to smtp-dup.
pub struct Client {
    stream: TcpStream,
    /// Read, and not yet taken as a reply.
    input: Vec<u8>,
    /// Everything that was ever read, for the panics.
    heard: Vec<u8>,
}

/// A whole reply, of however many lines.
#[derive(Clone, PartialEq, Eq)]
pub struct Reply {
    pub code: u16,
    /// The text of each line, without code and line end.
    pub lines: Vec<String>,
    /// As it came, with the line ends.
    pub raw: Vec<u8>,
}

impl Reply {
    /// Its lines, joined by LF.
    pub fn text(&self) -> String {
        self.lines.join("\n")
    }

    /// True when one of its lines begins with this word, in any case: an EHLO keyword.
    pub fn offers(&self, keyword: &str) -> bool {
        self.lines.iter().skip(1).any(|line| {
            line.split_whitespace().next().is_some_and(|word| word.eq_ignore_ascii_case(keyword))
        })
    }

    /// True when its text begins with an enhanced status code (RFC 3463) of its own class.
    pub fn has_enhanced_code(&self) -> bool {
        let first = self.lines[0].split(' ').next().unwrap_or("");
        let parts: Vec<_> = first.split('.').collect();
        parts.len() == 3
            && parts[0] == (self.code / 100).to_string()
            && parts.iter().all(|part| !part.is_empty() && part.bytes().all(|o| o.is_ascii_digit()))
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.raw.escape_ascii())
    }
}

impl Client {
    /// Connects; the greeting is still to be read.
    #[track_caller]
    pub fn connect(addr: SocketAddr) -> Client {
        Client::over(TcpStream::connect_timeout(&addr, BOUND).unwrap())
    }

    /// Connects from this address of ours: on Linux all of 127.0.0.0/8 is.
    #[track_caller]
    pub fn connect_from(source: IpAddr, addr: SocketAddr) -> Client {
        let socket = bound(SocketAddr::new(source, 0));
        connect(&socket, addr);
        Client::over(TcpStream::from(socket))
    }

    /// Connects and reads the 220.
    #[track_caller]
    pub fn greeted(addr: SocketAddr) -> Client {
        let mut client = Client::connect(addr);
        let greeting = client.reply();
        assert_eq!(greeting.code, 220, "{greeting:?}");
        client
    }

    /// Connects, reads the 220 and says EHLO.
    #[track_caller]
    pub fn ready(addr: SocketAddr) -> Client {
        let mut client = Client::greeted(addr);
        client.ehlo();
        client
    }

    fn over(stream: TcpStream) -> Client {
        stream.set_nodelay(true).unwrap();
        stream.set_write_timeout(Some(BOUND)).unwrap();
        Client { stream, input: Vec::new(), heard: Vec::new() }
    }

    /// Our address of the connection, as smtp-dup's log names it.
    pub fn local_addr(&self) -> SocketAddr {
        self.stream.local_addr().unwrap()
    }

    /// Sends these octets in one write.
    #[track_caller]
    pub fn send(&mut self, octets: impl AsRef<[u8]>) {
        let octets = octets.as_ref();
        if let Err(error) = self.stream.write_all(octets) {
            panic!("cannot send {} octets: {error}; {}", octets.len(), self.so_far());
        }
    }

    /// Sends an octet with TCP's urgent pointer behind it.
    pub fn send_urgent(&self, octet: u8) {
        nix::sys::socket::send(self.stream.as_raw_fd(), &[octet], MsgFlags::MSG_OOB).unwrap();
    }

    /// Sends and does not care whether the other side still listens.
    pub fn try_send(&mut self, octets: impl AsRef<[u8]>) -> bool {
        self.stream.write_all(octets.as_ref()).is_ok()
    }

    /// Sends while the caller reads: a client that only sends would block itself one day.
    pub fn send_in_background(&self, octets: impl Into<Vec<u8>>) -> JoinHandle<()> {
        let (mut stream, octets) = (self.stream.try_clone().unwrap(), octets.into());
        thread::spawn(move || stream.write_all(&octets).unwrap())
    }

    /// One octet a segment: Nagle's algorithm is off.
    #[track_caller]
    pub fn send_slowly(&mut self, octets: impl AsRef<[u8]>) {
        for octet in octets.as_ref() {
            self.send([*octet]);
        }
    }

    /// Says that nothing more will come, and still listens.
    pub fn half_close(&mut self) {
        self.stream.shutdown(Shutdown::Write).unwrap();
    }

    /// One read; an error is how it ended.
    fn read(&mut self, until: Instant) -> Result<usize, ErrorKind> {
        let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.stream.set_read_timeout(Some(left)).unwrap();
        let mut octets = vec![0; 65536];
        let count = loop {
            match self.stream.read(&mut octets) {
                Ok(count) => break count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error.kind()),
            }
        };
        self.input.extend_from_slice(&octets[..count]);
        self.heard.extend_from_slice(&octets[..count]);
        Ok(count)
    }

    /// Reads once, and takes whatever that gave: to see what came in one segment.
    #[track_caller]
    pub fn read_once(&mut self) -> Vec<u8> {
        if self.input.is_empty() {
            match self.read(Instant::now() + BOUND) {
                Ok(count) if count > 0 => {}
                other => panic!("nothing to read ({other:?}); {}", self.so_far()),
            }
        }
        std::mem::take(&mut self.input)
    }

    /// From now on about so many octets that were not read find room on our side.
    pub fn hold(&self, octets: usize) {
        setsockopt(&self.stream, sockopt::RcvBuf, &octets).unwrap();
    }

    /// Reads once, and takes whatever that gave; nothing at the end, however that came.
    pub fn read_if_any(&mut self) -> Option<Vec<u8>> {
        if self.input.is_empty() && !matches!(self.read(Instant::now() + BOUND), Ok(1..)) {
            return None;
        }
        Some(std::mem::take(&mut self.input))
    }

    /// Waits for a whole reply.
    #[track_caller]
    pub fn reply(&mut self) -> Reply {
        self.reply_within(BOUND)
    }

    /// The same, with a bound of its own.
    #[track_caller]
    pub fn reply_within(&mut self, within: Duration) -> Reply {
        let until = Instant::now() + within;
        loop {
            if let Some(reply) = self.take_reply() {
                return reply;
            }
            match self.read(until) {
                Ok(0) => panic!("closed instead of a reply; {}", self.so_far()),
                Ok(_) => {}
                Err(error) => panic!("no reply within {within:?} ({error}); {}", self.so_far()),
            }
        }
    }

    /// A reply out of what was read, if it is whole.
    #[track_caller]
    fn take_reply(&mut self) -> Option<Reply> {
        let mut lines = Vec::new();
        let mut codes = Vec::new();
        let mut at = 0;
        loop {
            let length = self.input[at..].iter().position(|&o| o == b'\n')? + 1;
            let line = self.input[at..at + length].to_vec();
            at += length;
            let shown = line.escape_ascii().to_string();
            let line =
                line.strip_suffix(b"\r\n").unwrap_or_else(|| panic!("bare LF in a reply: {shown}"));
            let code =
                std::str::from_utf8(line.get(..3).unwrap_or_else(|| panic!("no reply: {shown}")));
            let code = code.ok().and_then(|code| code.parse::<u16>().ok());
            codes.push(code.unwrap_or_else(|| panic!("no reply: {shown}; {}", self.so_far())));
            lines.push(String::from_utf8_lossy(line.get(4..).unwrap_or(b"")).into_owned());
            match line.get(3) {
                Some(b'-') => continue,
                Some(b' ') | None => break,
                Some(_) => panic!("no reply: {shown}; {}", self.so_far()),
            }
        }
        assert!(codes.iter().all(|code| *code == codes[0]), "codes differ; {}", self.so_far());
        Some(Reply { code: codes[0], lines, raw: self.input.drain(..at).collect() })
    }

    /// Sends a command line and waits for its reply. CR LF is added.
    #[track_caller]
    pub fn cmd(&mut self, line: &str) -> Reply {
        self.send(format!("{line}\r\n"));
        self.reply()
    }

    /// The same, and the reply has to have this code.
    #[track_caller]
    pub fn expect(&mut self, line: &str, code: u16) -> Reply {
        let reply = self.cmd(line);
        assert_eq!(reply.code, code, "{line}: {reply:?}");
        reply
    }

    /// Waits for a reply that has to have this code.
    #[track_caller]
    pub fn expect_reply(&mut self, code: u16) -> Reply {
        let reply = self.reply();
        assert_eq!(reply.code, code, "{reply:?}; {}", self.so_far());
        reply
    }

    /// EHLO, which has to be answered with 250.
    #[track_caller]
    pub fn ehlo(&mut self) -> Reply {
        self.expect("EHLO client.example", 250)
    }

    /// A whole transaction, command by command; each has to be accepted. The body comes in wire
    /// form, dot-stuffed and ended by CR LF, without the line with the final dot.
    #[track_caller]
    pub fn message(&mut self, from: &str, to: &[&str], body_wire: &[u8]) -> Reply {
        self.envelope(from, to);
        self.body(body_wire)
    }

    /// MAIL, RCPT and DATA up to the 354.
    #[track_caller]
    pub fn envelope(&mut self, from: &str, to: &[&str]) {
        self.expect(&format!("MAIL FROM:<{from}>"), 250);
        for to in to {
            self.expect(&format!("RCPT TO:<{to}>"), 250);
        }
        self.expect("DATA", 354);
    }

    /// A body in wire form and the final dot.
    #[track_caller]
    pub fn body(&mut self, body_wire: &[u8]) -> Reply {
        let mut octets = body_wire.to_vec();
        octets.extend_from_slice(b".\r\n");
        self.send(octets);
        self.reply()
    }

    /// A whole transaction in two writes, as Postfix does it, for one recipient.
    #[track_caller]
    pub fn pipelined(&mut self, from: &str, to: &str, body_wire: &[u8]) -> Reply {
        self.send(format!("MAIL FROM:<{from}>\r\nRCPT TO:<{to}>\r\nDATA\r\n"));
        self.expect_reply(250);
        self.expect_reply(250);
        self.expect_reply(354);
        self.body(body_wire)
    }

    /// The other side has to close without another word.
    #[track_caller]
    pub fn closed(&mut self) {
        self.closed_within(BOUND);
    }

    #[track_caller]
    pub fn closed_within(&mut self, within: Duration) {
        if self.input.is_empty() {
            match self.read(Instant::now() + within) {
                Ok(0) | Err(ErrorKind::ConnectionReset | ErrorKind::BrokenPipe) => return,
                Ok(_) => {}
                Err(error) => panic!("not closed within {within:?} ({error}); {}", self.so_far()),
            }
        }
        panic!("not closed, but said \"{}\"; {}", self.input.escape_ascii(), self.so_far());
    }

    /// True when nothing comes for so long, the connection's end neither.
    #[must_use]
    pub fn is_silent(&mut self, duration: Duration) -> bool {
        self.input.is_empty()
            && matches!(
                self.read(Instant::now() + duration),
                Err(ErrorKind::WouldBlock | ErrorKind::TimedOut)
            )
    }

    fn so_far(&self) -> String {
        let tail = self.heard.len().saturating_sub(4000);
        format!("heard so far: \"{}\"", self.heard[tail..].escape_ascii())
    }
}
