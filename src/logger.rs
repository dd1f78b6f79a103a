//! Where log lines go: stderr, the journal, syslog, or the postlogd(8) of a Postfix, and syslog
//! when that is gone.
//!
//! `main` calls [`start`] once, as soon as it knows the place; `maillog` writes the lines through
//! the `log` crate. Datagrams never hold up mail: what is not taken at once waits in memory, what
//! finds no room there is lost, and the next line says how many were. Standard error is another's:
//! it is written to as it is, and a pipe that nobody reads holds up whoever logs.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, ErrorKind, IsTerminal};
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::panic::{self, PanicHookInfo};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, SystemTime};

use log::{Level, LevelFilter, Log, Metadata, Record, error};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::stat::fstat;

/// The socket of the system's log.
const SYSLOG: &str = "/dev/log";

/// Facility `mail` of syslog(3), in its place.
const MAIL: u8 = 2 << 3;

/// A datagram is cut to so many octets, which every receiver takes.
const MAX_DATAGRAM: usize = 8000;

/// As much may wait for a receiver that is full, in octets.
const MAX_WAITING: usize = 1 << 20;

/// How long the end of the program waits for lines that wait.
const LAST_WAIT: Duration = Duration::from_secs(1);

/// `log.target`: what the configuration says about the place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The place that goes with how the program was started.
    Auto,
    /// `stderr`.
    Stderr,
    /// `syslog`.
    Syslog,
}

impl Target {
    /// The place to log to; `auto` is the one that goes with the start.
    pub fn place(self, auto: Place) -> Place {
        match self {
            Target::Auto => auto,
            Target::Stderr => Place::Stderr,
            Target::Syslog => match auto {
                Place::Syslog { tag } | Place::Postlog { tag, .. } => Place::Syslog { tag },
                Place::Stderr => Place::syslog(),
            },
        }
    }
}

/// Where log lines go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// File descriptor 2.
    Stderr,
    /// syslog, facility mail, under this name.
    Syslog { tag: String },
    /// Postfix's own log (`maillog_file`): the socket of its postlogd(8), as named outside and
    /// inside of a chroot, and the host name and the program's name that its lines begin with.
    Postlog { sockets: Vec<PathBuf>, host: String, tag: String },
}

impl Place {
    /// syslog under our own name.
    pub fn syslog() -> Place {
        Place::Syslog { tag: "smtp-dup".into() }
    }
}

thread_local! {
    /// Where the last panic of this thread happened.
    static LAST_PANIC: RefCell<String> = RefCell::default();
}

/// Logs from now on to each of `places`, what is at `level` or above unless RUST_LOG says otherwise.
/// Panics are logged as well, with where they happened.
pub fn start(places: impl IntoIterator<Item = Place>, level: LevelFilter) {
    let environment = env_logger::Env::default().default_filter_or(level.as_str());
    let filter = env_logger::Builder::from_env(environment).build();
    log::set_max_level(filter.filter());
    let sinks = places.into_iter().map(Sink::open).collect();
    // Fails only if there is a logger already, which then is as good.
    let _ = log::set_boxed_logger(Box::new(Logger { filter, sinks }));
    panic::set_hook(Box::new(log_panic));
}

fn log_panic(panic: &PanicHookInfo) {
    let place = panic.location().map_or("an unknown place".into(), ToString::to_string);
    let payload = panic.payload();
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    LAST_PANIC.set(place.clone());
    error!("panic at {place}: {}", text.unwrap_or("no message"));
}

/// Where the last panic of this thread happened, for who has caught it: `src/file.rs:12:34`.
pub fn last_panic() -> String {
    LAST_PANIC.take()
}

struct Logger {
    filter: env_logger::Logger,
    sinks: Vec<Sink>,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata) -> bool {
        self.filter.enabled(metadata)
    }

    fn log(&self, record: &Record) {
        if self.filter.matches(record) {
            let text = record.args().to_string();
            self.sinks.iter().for_each(|sink| sink.write(record.level(), &text));
        }
    }

    fn flush(&self) {
        for sink in &self.sinks {
            if let Sink::Datagrams(datagrams) = sink {
                datagrams.flush();
            }
        }
    }
}

/// An open [`Place`].
enum Sink {
    /// Lines with the time, each in one write(2), or several that belong together. Without a lock
    /// around it: many threads log at once, and a short write to a file or pipe is not torn.
    Stderr,
    /// The same for systemd's journal, which knows the time and wants the priority (sd-daemon(3)).
    Journal,
    /// A datagram a line.
    Datagrams(Arc<Datagrams>),
}

impl Sink {
    fn open(place: Place) -> Sink {
        match place {
            Place::Stderr if is_journal() => Sink::Journal,
            Place::Stderr => Sink::Stderr,
            Place::Syslog { tag } => Sink::Datagrams(Datagrams::syslog(tag)),
            Place::Postlog { sockets, host, tag } => {
                let instead = Some(Datagrams::syslog(tag.clone()));
                let zone = jiff::tz::TimeZone::system();
                let header = Header::Postlog { host, tag, zone };
                Sink::Datagrams(Datagrams::open(sockets, header, instead))
            }
        }
    }

    /// Writes `text`, of one line or several.
    fn write(&self, level: Level, text: &str) {
        let mark = match level {
            Level::Error => "error: ",
            Level::Warn => "warning: ",
            Level::Info => "",
            Level::Debug => "debug: ",
            Level::Trace => "trace: ",
        };
        let mut lines = String::new();
        match self {
            Sink::Stderr => {
                let time = humantime::format_rfc3339_millis(SystemTime::now());
                text.split('\n').for_each(|line| lines += &format!("{time} {mark}{line}\n"));
            }
            Sink::Journal => {
                let priority = priority(level);
                text.split('\n').for_each(|line| lines += &format!("<{priority}>{mark}{line}\n"));
            }
            Sink::Datagrams(datagrams) => {
                let time = SystemTime::now();
                return text.split('\n').for_each(|line| {
                    datagrams.write(Line { level, time, text: format!("{mark}{line}") })
                });
            }
        }
        let _ = nix::unistd::write(io::stderr(), lines.as_bytes());
    }
}

/// stderr leads to the journal (systemd.exec(5), JOURNAL_STREAM).
pub fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else { return false };
    let is_same = |stat: nix::sys::stat::FileStat| {
        stream.split_once(':')
            == Some((&stat.st_dev.to_string() as &str, &stat.st_ino.to_string() as &str))
    };
    !io::stderr().is_terminal() && fstat(io::stderr()).is_ok_and(is_same)
}

/// The priority of syslog(3).
fn priority(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// A line before it has its header.
struct Line {
    level: Level,
    time: SystemTime,
    text: String,
}

/// What stands before the text of a datagram.
enum Header {
    /// No time: every syslogd puts its own.
    Syslog { tag: String },
    /// postlogd(8) writes what it gets, so the time has to be there as syslog would have it.
    Postlog { host: String, tag: String, zone: jiff::tz::TimeZone },
}

impl Header {
    fn datagram(&self, Line { level, time, text }: &Line) -> String {
        let pid = std::process::id();
        match self {
            Header::Syslog { tag } => format!("<{}>{tag}[{pid}]: {text}", MAIL | priority(*level)),
            Header::Postlog { host, tag, zone } => {
                // Fails for times that no calendar has.
                let time = jiff::Timestamp::try_from(*time).unwrap_or_default();
                let time = time.to_zoned_datetime(zone.clone());
                format!("{} {host} {tag}[{pid}]: {text}", time.strftime("%b %e %H:%M:%S"))
            }
        }
    }
}

/// A datagram socket that is connected again when its peer was started anew. It was opened before
/// any chroot, behind which the peer has another path, if any.
///
/// Receivers hold few datagrams (net.unix.max_dgram_qlen is 10 on some systems), so that a burst
/// of mail fills them. What does not go out at once waits in memory, and while anything does, a
/// thread sees to it; in quiet times there is none.
struct Datagrams {
    paths: Vec<PathBuf>,
    header: Header,
    /// For what has no receiver here.
    instead: Option<Arc<Datagrams>>,
    queue: Mutex<Queue>,
    /// The queue has become empty.
    emptied: Condvar,
}

#[derive(Default)]
struct Queue {
    socket: Option<UnixDatagram>,
    /// Oldest first.
    waiting: VecDeque<Line>,
    octets: usize,
    /// A thread sends what waits.
    has_thread: bool,
    /// Lines that are lost, and have not been spoken of.
    lost: u64,
}

impl Datagrams {
    fn open(
        paths: Vec<PathBuf>,
        header: Header,
        instead: Option<Arc<Datagrams>>,
    ) -> Arc<Datagrams> {
        let queue = Queue { socket: connect(&paths).ok(), ..Queue::default() };
        let (queue, emptied) = (Mutex::new(queue), Condvar::new());
        Arc::new(Datagrams { paths, header, instead, queue, emptied })
    }

    fn syslog(tag: String) -> Arc<Datagrams> {
        Datagrams::open(vec![SYSLOG.into()], Header::Syslog { tag }, None)
    }

    /// Sends a line, or lets it wait.
    fn write(self: &Arc<Self>, line: Line) {
        let mut queue = self.queue();
        let line = match queue.waiting.is_empty() {
            true => match self.send(&mut queue, line) {
                Some(line) => line,
                None => return,
            },
            false => line,
        };
        if queue.octets + line.text.len() > MAX_WAITING {
            queue.lost += 1;
            return;
        }
        queue.octets += line.text.len();
        queue.waiting.push_back(line);
        if !queue.has_thread {
            let this = Arc::clone(self);
            let thread = Builder::new().name("log".into()).stack_size(64 * 1024);
            queue.has_thread = thread.spawn(move || this.work_off()).is_ok();
        }
    }

    /// The thread: sends what waits, until nothing does.
    fn work_off(&self) {
        let mut queue = self.queue();
        while let Some(line) = queue.waiting.pop_front() {
            let octets = line.text.len();
            match self.send(&mut queue, line) {
                Some(line) => {
                    queue.waiting.push_front(line);
                    let socket = queue.socket.as_ref().and_then(|socket| socket.try_clone().ok());
                    drop(queue);
                    wait_for_room(socket);
                    queue = self.queue();
                }
                None => queue.octets -= octets,
            }
        }
        queue.has_thread = false;
        drop(queue);
        self.emptied.notify_all();
    }

    /// Sends a line, and before it how many were lost. Gives the line back if it has to wait.
    fn send(&self, queue: &mut Queue, line: Line) -> Option<Line> {
        if queue.lost > 0 {
            let text = format!("warning: {} log lines before this one were lost", queue.lost);
            let notice = Line { level: Level::Warn, time: line.time, text };
            match self.send_one(queue, &self.header.datagram(&notice)) {
                Sent::Yes => queue.lost = 0,
                Sent::Later => return Some(line),
                Sent::Never => {}
            }
        }
        match (self.send_one(queue, &self.header.datagram(&line)), &self.instead) {
            (Sent::Later, _) => return Some(line),
            (Sent::Yes, _) => {}
            (Sent::Never, Some(instead)) => instead.write(line),
            (Sent::Never, None) => queue.lost += 1,
        }
        None
    }

    fn send_one(&self, queue: &mut Queue, datagram: &str) -> Sent {
        let line = &datagram.as_bytes()[..datagram.len().min(MAX_DATAGRAM)];
        if let Some(open) = &queue.socket {
            match open.send(line) {
                Ok(_) => return Sent::Yes,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Sent::Later,
                // The receiver has gone; there may be another.
                Err(_) => queue.socket = None,
            }
        }
        match connect(&self.paths).and_then(|new| queue.socket.insert(new).send(line)) {
            Ok(_) => Sent::Yes,
            Err(error) if error.kind() == ErrorKind::WouldBlock => Sent::Later,
            Err(_) => Sent::Never,
        }
    }

    /// Waits for what waits, for a moment.
    fn flush(&self) {
        let queue = self.queue();
        drop(self.emptied.wait_timeout_while(queue, LAST_WAIT, |queue| queue.has_thread));
        if let Some(instead) = &self.instead {
            instead.flush();
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What became of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sent {
    Yes,
    /// The receiver is there and full.
    Later,
    /// There is no receiver.
    Never,
}

/// To the first of these paths where somebody listens.
fn connect(paths: &[PathBuf]) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    let mut connected = Err(io::ErrorKind::NotFound.into());
    for path in paths {
        connected = socket.connect(path);
        if connected.is_ok() {
            break;
        }
    }
    connected.map(|()| socket)
}

/// Waits until the receiver takes more, or has gone; never for long.
fn wait_for_room(socket: Option<UnixDatagram>) {
    match socket {
        Some(socket) => {
            let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
            let _ = poll(&mut fds, 1000u16);
        }
        None => std::thread::sleep(Duration::from_millis(100)),
    }
}
