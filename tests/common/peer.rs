//! A destination: an SMTP server that behaves well unless told otherwise, and records everything.
//!
//! Each connection has a thread. Before each reply the test's hook is asked; `Action::Default`
//! is what a server that accepts all mail would say. Whatever follows the final dot is taken for
//! commands, so that a smuggled message would show up as a message.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use memchr::memmem;
use nix::sys::socket::{Backlog, listen};

use super::{BOUND, bound};

/// What has just come, and now has to be answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A connection, the how-manieth from 1; the answer is the greeting.
    Connect(usize),
    /// EHLO or HELO, the whole line; as with all lines here, without its end.
    Ehlo(String),
    /// XFORWARD, the whole line.
    Xforward(String),
    Mail(String),
    Rcpt(String),
    Data,
    /// A part of a body, and how many octets of it have come so far. Nobody waits for an answer.
    Body(usize),
    /// The final dot, the how-manieth at this server from 1.
    EndOfData(usize),
    Rset,
    Quit,
    Other(String),
}

/// What to do about it.
#[derive(Debug, Clone)]
pub enum Action {
    /// As a server does that accepts all mail.
    Default,
    /// These octets, which may be several lines. CR LF is added unless they end in LF.
    Reply(Vec<u8>),
    /// Exactly these octets, whole or not.
    Raw(Vec<u8>),
    /// Close the connection.
    Close,
    /// Say nothing more ever; what comes is still read.
    Silence,
    /// The same, and do not even read.
    Stall,
    /// A reply, one octet in each such time.
    SlowReply(Vec<u8>, Duration),
    /// This, but so much later.
    Delay(Duration, Box<Action>),
    /// The one, then the other.
    Then(Box<Action>, Box<Action>),
}

impl Action {
    pub fn reply(text: impl AsRef<[u8]>) -> Action {
        Action::Reply(text.as_ref().to_vec())
    }

    pub fn raw(octets: impl AsRef<[u8]>) -> Action {
        Action::Raw(octets.as_ref().to_vec())
    }

    pub fn reply_then_close(text: impl AsRef<[u8]>) -> Action {
        Action::reply(text).then(Action::Close)
    }

    pub fn slow(text: impl AsRef<[u8]>, per_octet: Duration) -> Action {
        Action::SlowReply(text.as_ref().to_vec(), per_octet)
    }

    pub fn after(delay: Duration, action: Action) -> Action {
        Action::Delay(delay, Box::new(action))
    }

    pub fn then(self, next: Action) -> Action {
        Action::Then(Box::new(self), Box::new(next))
    }

    /// The reply code that the other side will see; 0 for none.
    fn code(&self, default: u16) -> u16 {
        match self {
            Action::Default => default,
            Action::Reply(text) | Action::Raw(text) | Action::SlowReply(text, _) => text
                .get(..3)
                .and_then(|code| std::str::from_utf8(code).ok())
                .and_then(|code| code.parse().ok())
                .unwrap_or(0),
            Action::Close | Action::Silence | Action::Stall => 0,
            Action::Delay(_, action) | Action::Then(action, _) => action.code(default),
        }
    }
}

/// Decides about each event.
pub type Hook = Arc<dyn Fn(&Event) -> Action + Send + Sync>;

/// What kind of server it is.
#[derive(Clone)]
pub struct SinkOptions {
    pub greeting: String,
    /// The lines of the reply to EHLO behind the first.
    pub ehlo: Vec<&'static str>,
    pub reply: Hook,
    /// Takes a bare LF for a line end in a body, CRs before it dropped. No server should.
    pub bare_lf: bool,
    /// Takes a bare CR for a line end in a body.
    pub bare_cr: bool,
    /// Drops NULs in a body before it looks for the final dot.
    pub drop_nul: bool,
    /// Where to listen.
    pub ip: IpAddr,
}

impl Default for SinkOptions {
    fn default() -> SinkOptions {
        SinkOptions {
            greeting: "220 sink.example ESMTP".into(),
            ehlo: vec!["PIPELINING", "8BITMIME", "SMTPUTF8", "DSN", "ENHANCEDSTATUSCODES", "SIZE"],
            reply: Arc::new(|_| Action::Default),
            bare_lf: false,
            bare_cr: false,
            drop_nul: false,
            ip: IpAddr::V4(Ipv4Addr::LOCALHOST),
        }
    }
}

impl SinkOptions {
    pub fn replying(reply: impl Fn(&Event) -> Action + Send + Sync + 'static) -> SinkOptions {
        SinkOptions { reply: Arc::new(reply), ..SinkOptions::default() }
    }
}

/// A message as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// The XFORWARD lines that were in force.
    pub forward: Vec<String>,
    /// The whole line.
    pub mail: String,
    /// The whole line of each recipient that was accepted.
    pub rcpts: Vec<String>,
    /// What came between the 354 and the final dot, dot-stuffing and last line end included.
    pub data: Vec<u8>,
    /// The number of the connection, from 1.
    pub connection: usize,
    /// The final dot was answered with 2xx.
    pub accepted: bool,
}

/// The server. It ends, and all its connections, when this goes.
pub struct Sink {
    addr: SocketAddr,
    shared: Arc<Shared>,
    /// The listener while open, and a second socket that keeps the port for us while not: a
    /// connection to a socket that is bound and does not listen is refused.
    sockets: Mutex<(Option<TcpListener>, OwnedFd)>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    options: SinkOptions,
    connections: usize,
    open: Vec<(usize, TcpStream)>,
    /// How often it was closed: a thread of an earlier time has to end.
    closings: usize,
    messages: Vec<Received>,
    broken: Vec<Received>,
    commands: Vec<(usize, String)>,
    reads: Vec<Vec<u8>>,
    said: Vec<(usize, Vec<u8>)>,
}

impl Sink {
    pub fn start() -> Sink {
        Sink::with(SinkOptions::default())
    }

    pub fn replying(reply: impl Fn(&Event) -> Action + Send + Sync + 'static) -> Sink {
        Sink::with(SinkOptions::replying(reply))
    }

    pub fn with(options: SinkOptions) -> Sink {
        let sink = Sink::refusing(options);
        sink.reopen();
        sink
    }

    /// A server that is down: connections to its port are refused until [`Sink::reopen`].
    pub fn refusing(options: SinkOptions) -> Sink {
        let spare = bound(SocketAddr::new(options.ip, 0));
        let addr = TcpListener::from(spare.try_clone().unwrap()).local_addr().unwrap();
        let state = State { options, ..State::default() };
        let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new() });
        Sink { addr, shared, sockets: Mutex::new((None, spare)) }
    }

    /// Listens (again).
    pub fn reopen(&self) {
        let mut sockets = self.sockets.lock().unwrap();
        assert!(sockets.0.is_none(), "it listens already");
        // Binding is only possible while none of the port's sockets listens.
        let spare = bound(self.addr);
        let listener = std::mem::replace(&mut sockets.1, spare);
        listen(&listener, Backlog::new(1024).unwrap()).unwrap();
        let listener = TcpListener::from(listener);
        sockets.0 = Some(listener.try_clone().unwrap());
        let shared = Arc::clone(&self.shared);
        thread::spawn(move || accept(&listener, &shared));
    }

    /// Goes down: closes the listener and every connection. New ones are refused.
    pub fn close(&self) {
        if let Some(listener) = self.sockets.lock().unwrap().0.take() {
            // This wakes the accept; closing the descriptor would not.
            let _ =
                nix::sys::socket::shutdown(listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        }
        self.close_connections();
    }

    /// Closes every connection; new ones are welcome.
    pub fn close_connections(&self) {
        let mut state = self.shared.lock();
        state.closings += 1;
        for (_, stream) in &state.open {
            let _ = stream.shutdown(Shutdown::Both);
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// From now on this decides.
    pub fn set_reply(&self, reply: impl Fn(&Event) -> Action + Send + Sync + 'static) {
        self.shared.lock().options.reply = Arc::new(reply);
    }

    /// From now on EHLO has these lines.
    pub fn set_ehlo(&self, ehlo: &[&'static str]) {
        self.shared.lock().options.ehlo = ehlo.to_vec();
    }

    /// The messages so far that were accepted, in the order of their final dots.
    pub fn messages(&self) -> Vec<Received> {
        self.shared.lock().messages.iter().filter(|message| message.accepted).cloned().collect()
    }

    /// The last of all messages so far.
    pub fn last(&self) -> Option<Received> {
        self.shared.lock().messages.last().cloned()
    }

    /// How many were accepted.
    pub fn accepted(&self) -> usize {
        self.shared.lock().messages.iter().filter(|message| message.accepted).count()
    }

    /// The messages so far, accepted or not.
    pub fn attempts(&self) -> Vec<Received> {
        self.shared.lock().messages.clone()
    }

    /// The bodies that broke off: the connection ended before the final dot.
    pub fn broken(&self) -> Vec<Received> {
        self.shared.lock().broken.clone()
    }

    /// Waits for `count` accepted messages; there must not be more.
    #[track_caller]
    pub fn wait(&self, count: usize) -> Vec<Received> {
        self.wait_for(&format!("{count} messages"), |sink| sink.messages().len() >= count);
        let messages = self.messages();
        assert_eq!(messages.len(), count, "{messages:#?}");
        messages
    }

    /// Waits until `what` is true of the server.
    #[track_caller]
    pub fn wait_for(&self, reason: &str, what: impl Fn(&Sink) -> bool) {
        let end = Instant::now() + BOUND;
        while !what(self) {
            let left = end.saturating_duration_since(Instant::now());
            assert!(
                !left.is_zero(),
                "waited in vain for {reason}; commands: {:#?}",
                self.commands()
            );
            // A change between the question and this wait would be missed: so not for long.
            let state = self.shared.lock();
            drop(
                self.shared
                    .changed
                    .wait_timeout(state, left.min(Duration::from_millis(20)))
                    .unwrap(),
            );
        }
    }

    /// How many connections were ever accepted.
    pub fn connections(&self) -> usize {
        self.shared.lock().connections
    }

    /// How many are open.
    pub fn open_connections(&self) -> usize {
        self.shared.lock().open.len()
    }

    /// Every command line so far, with the number of its connection.
    pub fn commands(&self) -> Vec<(usize, String)> {
        self.shared.lock().commands.clone()
    }

    /// How many command lines began with `verb`.
    pub fn count(&self, verb: &str) -> usize {
        self.shared.lock().commands.iter().filter(|(_, line)| line.starts_with(verb)).count()
    }

    /// What the server has said so far, write by write, with the number of the connection.
    pub fn said(&self) -> Vec<(usize, Vec<u8>)> {
        self.shared.lock().said.clone()
    }

    /// What each read brought, all connections mixed: to see what travelled together.
    pub fn reads(&self) -> Vec<Vec<u8>> {
        self.shared.lock().reads.clone()
    }
}

/// A host that does not answer at all: connecting to it hangs.
pub struct DeadHost {
    addr: SocketAddr,
    _listener: OwnedFd,
    _queue: Vec<TcpStream>,
}

impl DeadHost {
    /// A listener that nobody serves and whose queue is full: the kernel drops what comes.
    pub fn start() -> DeadHost {
        let listener = bound(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0));
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        let addr = TcpListener::from(listener.try_clone().unwrap()).local_addr().unwrap();
        let mut queue = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&addr, Duration::from_millis(200)) {
            queue.push(stream);
            assert!(queue.len() < 100, "the queue of {addr} does not fill up");
        }
        DeadHost { addr, _listener: listener, _queue: queue }
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.close();
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    while let Ok((stream, _)) = listener.accept() {
        stream.set_nodelay(true).unwrap();
        let mut state = shared.lock();
        state.connections += 1;
        let (number, closings) = (state.connections, state.closings);
        state.open.push((number, stream.try_clone().unwrap()));
        drop(state);
        shared.changed.notify_all();
        let shared = Arc::clone(shared);
        thread::spawn(move || {
            let mut peer = Peer {
                stream,
                number,
                closings,
                shared: &shared,
                input: Vec::new(),
                greeted: false,
                forward: Vec::new(),
                mail: None,
                rcpts: Vec::new(),
                body: None,
            };
            let _ = peer.talk();
            peer.gone();
        });
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }
}

/// The connection is over, by whoever's wish.
struct Over;

impl From<std::io::Error> for Over {
    fn from(_: std::io::Error) -> Over {
        Over
    }
}

/// One connection.
struct Peer<'a> {
    stream: TcpStream,
    number: usize,
    closings: usize,
    shared: &'a Shared,
    input: Vec<u8>,
    greeted: bool,
    forward: Vec<String>,
    mail: Option<String>,
    rcpts: Vec<String>,
    /// Within a body: how much of `input` was searched for its end.
    body: Option<usize>,
}

impl Peer<'_> {
    fn talk(&mut self) -> Result<(), Over> {
        let greeting = self.shared.lock().options.greeting.clone();
        self.answer(&Event::Connect(self.number), &greeting)?;
        loop {
            if self.body.is_some() {
                self.end_of_data()?;
            } else if let Some(length) = memchr::memchr(b'\n', &self.input) {
                let line: Vec<u8> = self.input.drain(..=length).collect();
                let line = line.strip_suffix(b"\r\n").unwrap_or(&line[..length]);
                self.command(String::from_utf8_lossy(line).into_owned())?;
                continue;
            }
            if self.body.is_none() && memchr::memchr(b'\n', &self.input).is_some() {
                continue;
            }
            self.read()?;
            if let Some(searched) = self.body {
                let count = self.input.len();
                if count > searched && self.end(searched).is_none() {
                    self.answer(&Event::Body(count), "")?;
                }
            }
        }
    }

    fn read(&mut self) -> Result<(), Over> {
        let mut octets = vec![0; 65536];
        loop {
            match self.stream.read(&mut octets) {
                Ok(0) => return Err(Over),
                Ok(count) => {
                    octets.truncate(count);
                    self.input.extend_from_slice(&octets);
                    self.shared.change(|state| state.reads.push(octets));
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return Err(Over),
            }
        }
    }

    fn command(&mut self, line: String) -> Result<(), Over> {
        self.shared.change(|state| state.commands.push((self.number, line.clone())));
        let verb = line.split([' ', ':']).next().unwrap_or("").to_ascii_uppercase();
        match verb.as_str() {
            "EHLO" => {
                let ehlo = self.shared.lock().options.ehlo.clone();
                let mut reply = String::new();
                let mut lines = vec!["sink.example"];
                lines.extend(ehlo);
                for (n, text) in lines.iter().enumerate() {
                    let mark = if n + 1 == lines.len() { ' ' } else { '-' };
                    reply.push_str(&format!("250{mark}{text}\r\n"));
                }
                self.greeted = self.answer(&Event::Ehlo(line), &reply)? / 100 == 2;
                self.reset();
            }
            "HELO" => {
                self.greeted = self.answer(&Event::Ehlo(line), "250 sink.example")? / 100 == 2;
                self.reset();
            }
            "XFORWARD" => {
                let default = match (&self.mail, offers_xforward(&self.shared.lock().options)) {
                    (_, false) => "500 5.5.2 what?",
                    (Some(_), _) => "503 5.5.1 too late",
                    _ => "250 2.0.0 so be it",
                };
                if self.answer(&Event::Xforward(line.clone()), default)? / 100 == 2 {
                    self.forward.push(line);
                }
            }
            "MAIL" => {
                let default = match (self.greeted, &self.mail) {
                    (false, _) => "503 5.5.1 EHLO first",
                    (_, Some(_)) => "503 5.5.1 nested MAIL",
                    _ => "250 2.1.0 sender ok",
                };
                if self.answer(&Event::Mail(line.clone()), default)? / 100 == 2 {
                    self.forget();
                    self.mail = Some(line);
                }
            }
            "RCPT" => {
                let default = match &self.mail {
                    None => "503 5.5.1 MAIL first",
                    _ => "250 2.1.5 recipient ok",
                };
                if self.answer(&Event::Rcpt(line.clone()), default)? / 100 == 2 {
                    self.rcpts.push(line);
                }
            }
            "DATA" => {
                let default = match self.rcpts.is_empty() {
                    true => "503 5.5.1 RCPT first",
                    false => "354 go on",
                };
                if self.answer(&Event::Data, default)? == 354 {
                    self.body = Some(0);
                }
            }
            "RSET" => {
                self.answer(&Event::Rset, "250 2.0.0 reset")?;
                self.reset();
            }
            "QUIT" => {
                self.answer(&Event::Quit, "221 2.0.0 bye")?;
                return Err(Over);
            }
            "NOOP" => drop(self.answer(&Event::Other(line), "250 2.0.0 ok")?),
            _ => drop(self.answer(&Event::Other(line), "500 5.5.2 what?")?),
        }
        Ok(())
    }

    /// A transaction has ended, and with it what was said before.
    fn reset(&mut self) {
        self.forward.clear();
        self.forget();
    }

    fn forget(&mut self) {
        self.mail = None;
        self.rcpts.clear();
    }

    /// Takes the message if its end is there.
    fn end_of_data(&mut self) -> Result<(), Over> {
        let Some((length, dot)) = self.end(self.body.unwrap_or(0)) else {
            self.body = Some(self.input.len());
            return Ok(());
        };
        self.body = None;
        let mut message = self.message(length);
        self.input.drain(..dot);
        let number = self.shared.lock().messages.len() + 1;
        let event = Event::EndOfData(number);
        let action = self.decide(&event);
        message.accepted = action.code(250) / 100 == 2;
        // Before the reply: who has heard it finds the message here.
        self.shared.change(|state| state.messages.push(message));
        self.reset();
        self.perform(action, &format!("250 2.0.0 queued as SINK{number}")).map(drop)
    }

    fn message(&mut self, length: usize) -> Received {
        Received {
            forward: self.forward.clone(),
            mail: self.mail.clone().unwrap_or_default(),
            rcpts: self.rcpts.clone(),
            data: self.input[..length].to_vec(),
            connection: self.number,
            accepted: false,
        }
    }

    /// The end of the body in `input`: the length of the body, and that with its final dot. The
    /// first `searched` octets were looked at before.
    fn end(&self, searched: usize) -> Option<(usize, usize)> {
        let state = self.shared.lock();
        let options = &state.options;
        if options.bare_lf || options.bare_cr || options.drop_nul {
            return lax_end(&self.input, options.bare_lf, options.bare_cr, options.drop_nul);
        }
        drop(state);
        if self.input.starts_with(b".\r\n") {
            return Some((0, 3));
        }
        let from = searched.saturating_sub(4);
        memmem::find(&self.input[from..], b"\r\n.\r\n").map(|at| (from + at + 2, from + at + 5))
    }

    /// Asks the hook and does what it says; the code of the reply.
    fn answer(&mut self, event: &Event, default: &str) -> Result<u16, Over> {
        let action = self.decide(event);
        self.perform(action, default)
    }

    fn decide(&self, event: &Event) -> Action {
        // Not while locked: a hook may ask the sink something.
        let hook = Arc::clone(&self.shared.lock().options.reply);
        hook(event)
    }

    fn perform(&mut self, action: Action, default: &str) -> Result<u16, Over> {
        let code = action.code(default.get(..3).and_then(|code| code.parse().ok()).unwrap_or(0));
        match action {
            Action::Default if default.is_empty() => {}
            Action::Default => self.say(line(default.as_bytes()))?,
            Action::Reply(text) => self.say(line(&text))?,
            Action::Raw(octets) => self.say(octets)?,
            Action::Close => return Err(Over),
            Action::Silence => loop {
                self.read()?;
            },
            Action::Stall => {
                self.pause(Duration::from_secs(3600))?;
                return Err(Over);
            }
            Action::SlowReply(text, each) => {
                for octet in line(&text) {
                    self.pause(each)?;
                    self.say(vec![octet])?;
                }
            }
            Action::Delay(delay, action) => {
                self.pause(delay)?;
                return self.perform(*action, default);
            }
            Action::Then(first, next) => {
                self.perform(*first, default)?;
                self.perform(*next, "")?;
            }
        }
        Ok(code)
    }

    fn say(&mut self, octets: Vec<u8>) -> Result<(), Over> {
        self.stream.write_all(&octets)?;
        self.shared.change(|state| state.said.push((self.number, octets)));
        Ok(())
    }

    /// Waits so long, or until the server closes.
    fn pause(&self, duration: Duration) -> Result<(), Over> {
        let end = Instant::now() + duration;
        let mut state = self.shared.lock();
        while state.closings == self.closings {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap().0;
        }
        Err(Over)
    }

    /// The connection has ended.
    fn gone(&mut self) {
        let broken = self.body.map(|_| self.message(self.input.len()));
        // The clone in `open` goes here too, so that the socket is really closed: after the
        // record is complete, for who sees the end may look at it.
        self.shared.change(|state| {
            state.broken.extend(broken);
            state.open.retain(|(number, _)| *number != self.number);
        });
    }
}

fn offers_xforward(options: &SinkOptions) -> bool {
    options.ehlo.iter().any(|line| line.starts_with("XFORWARD"))
}

/// With a line end.
fn line(text: &[u8]) -> Vec<u8> {
    let mut line = text.to_vec();
    if !line.ends_with(b"\n") {
        line.extend_from_slice(b"\r\n");
    }
    line
}

/// The end of a body as careless servers see it: where the lone dot stands, and where its line
/// ends.
fn lax_end(input: &[u8], bare_lf: bool, bare_cr: bool, drop_nul: bool) -> Option<(usize, usize)> {
    let mut start = 0;
    let mut at = 0;
    while at < input.len() {
        let ends = match input[at] {
            b'\n' if bare_lf => true,
            b'\n' => at > 0 && input[at - 1] == b'\r',
            b'\r' => bare_cr && input.get(at + 1).is_some_and(|&next| next != b'\n'),
            _ => false,
        };
        at += 1;
        if ends {
            let line = input[start..at]
                .iter()
                .filter(|&&o| !(o == b'\r' || o == b'\n' || drop_nul && o == 0));
            if line.copied().eq(*b".") {
                return Some((start, at));
            }
            start = at;
        }
    }
    None
}
