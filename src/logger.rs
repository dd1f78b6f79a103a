//! Where log lines go: stderr, the journal, syslog, or the postlogd(8) of a Postfix.
//!
//! `main` calls [`start`] once, as soon as it knows the place; `maillog` writes the lines through
//! the `log` crate. Logging never holds up mail: a datagram that nobody takes is dropped, and the
//! next line that goes out says how many were.

use std::io::{self, ErrorKind, IsTerminal};
use std::os::unix::net::UnixDatagram;
use std::panic::{self, PanicHookInfo};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use log::{Level, LevelFilter, Log, Metadata, Record, error};
use nix::sys::stat::fstat;

/// The socket of the system's log.
const SYSLOG: &str = "/dev/log";

/// Facility `mail` of syslog(3), in its place.
const MAIL: u8 = 2 << 3;

/// A datagram is cut to so many octets, which every receiver takes.
const MAX_DATAGRAM: usize = 8000;

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
    /// Postfix's own log (`maillog_file`): the socket of its postlogd(8), and the host name and
    /// the program's name that its lines begin with.
    Postlog { socket: PathBuf, host: String, tag: String },
}

impl Place {
    /// syslog under our own name.
    pub fn syslog() -> Place {
        Place::Syslog { tag: "smtp-dup".into() }
    }
}

/// Logs from now on to `place`, what is at `level` or above unless RUST_LOG says otherwise. Panics
/// are logged as well, with where they happened.
pub fn start(place: Place, level: LevelFilter) {
    let environment = env_logger::Env::default().default_filter_or(level.as_str());
    let filter = env_logger::Builder::from_env(environment).build();
    log::set_max_level(filter.filter());
    // Fails only if there is a logger already, which then is as good.
    let _ = log::set_boxed_logger(Box::new(Logger { filter, sink: Sink::open(place) }));
    panic::set_hook(Box::new(log_panic));
}

fn log_panic(panic: &PanicHookInfo) {
    let place = panic.location().map_or("an unknown place".into(), ToString::to_string);
    let payload = panic.payload();
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    error!("panic at {place}: {}", text.unwrap_or("no message"));
}

struct Logger {
    filter: env_logger::Logger,
    sink: Sink,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata) -> bool {
        self.filter.enabled(metadata)
    }

    fn log(&self, record: &Record) {
        if self.filter.matches(record) {
            self.sink.write(record.level(), &record.args().to_string());
        }
    }

    fn flush(&self) {}
}

/// An open [`Place`].
enum Sink {
    /// Lines with the time, each in one write(2), or several that belong together. Without a lock
    /// around it: many threads log at once, and a short write to a file or pipe is not torn.
    Stderr,
    /// The same for systemd's journal, which knows the time and wants the priority (sd-daemon(3)).
    Journal,
    /// A datagram a line.
    Datagrams(Datagrams),
}

impl Sink {
    fn open(place: Place) -> Sink {
        match place {
            Place::Stderr if is_journal() => Sink::Journal,
            Place::Stderr => Sink::Stderr,
            Place::Syslog { tag } => {
                Sink::Datagrams(Datagrams::open(SYSLOG.into(), Header::Syslog { tag }))
            }
            Place::Postlog { socket, host, tag } => {
                let zone = jiff::tz::TimeZone::system();
                Sink::Datagrams(Datagrams::open(socket, Header::Postlog { host, tag, zone }))
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
                return text
                    .split('\n')
                    .for_each(|line| datagrams.write(level, &format!("{mark}{line}")));
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

/// What stands before the text of a datagram.
enum Header {
    /// No time: every syslogd puts its own.
    Syslog { tag: String },
    /// postlogd(8) writes what it gets, so the time has to be there as syslog would have it.
    Postlog { host: String, tag: String, zone: jiff::tz::TimeZone },
}

impl Header {
    fn line(&self, level: Level, text: &str) -> String {
        let pid = std::process::id();
        match self {
            Header::Syslog { tag } => format!("<{}>{tag}[{pid}]: {text}", MAIL | priority(level)),
            Header::Postlog { host, tag, zone } => {
                let time = jiff::Timestamp::now().to_zoned_datetime(zone.clone());
                format!("{} {host} {tag}[{pid}]: {text}", time.strftime("%b %e %H:%M:%S"))
            }
        }
    }
}

/// A datagram socket that is connected again when its peer was started anew. It was opened before
/// any chroot, behind which the path may lead nowhere.
struct Datagrams {
    path: PathBuf,
    header: Header,
    socket: Mutex<Option<UnixDatagram>>,
    /// Lines that nobody took.
    dropped: AtomicU64,
}

impl Datagrams {
    fn open(path: PathBuf, header: Header) -> Datagrams {
        let socket = Mutex::new(connect(&path).ok());
        Datagrams { path, header, socket, dropped: AtomicU64::new(0) }
    }

    fn write(&self, level: Level, text: &str) {
        match self.send(&self.header.line(level, text)) {
            Ok(()) => self.confess(),
            Err(_) => drop(self.dropped.fetch_add(1, Ordering::Relaxed)),
        }
    }

    /// Says how many lines were dropped before this one.
    fn confess(&self) {
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        if dropped == 0 {
            return;
        }
        let text = format!("warning: {dropped} log lines before this one were lost");
        if self.send(&self.header.line(Level::Warn, &text)).is_err() {
            self.dropped.fetch_add(dropped, Ordering::Relaxed);
        }
    }

    fn send(&self, line: &str) -> io::Result<()> {
        let line = &line.as_bytes()[..line.len().min(MAX_DATAGRAM)];
        let mut socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = socket.as_ref() {
            match open.send(line) {
                Ok(_) => return Ok(()),
                // It is there and full: waiting for it would hold up mail.
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Err(error),
                Err(_) => {}
            }
        }
        socket.insert(connect(&self.path)?).send(line).map(drop)
    }
}

fn connect(path: &Path) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.connect(path)?;
    Ok(socket)
}
