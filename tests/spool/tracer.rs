//! Runs the program under ptrace(2) and sees each of its system calls that changes the spool, in
//! the order over all threads; and ends it before the one that the test chooses.
//!
//! Not strace: that counts each thread by itself, so that "the 17th call" could not be asked for.

use std::ffi::c_void;
use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::ptr;
use std::sync::mpsc::{Receiver, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::libc::{self, c_long, pid_t};
use tempfile::TempDir;

use crate::common::{BOUND, command};

/// A traced program.
pub struct Traced {
    /// Where it listens; `None` when it was killed before it did.
    pub addr: Option<SocketAddr>,
    pid: pid_t,
    thread: JoinHandle<Trace>,
    log: PathBuf,
    _folder: TempDir,
}

/// What it did to its end.
pub struct Trace {
    /// Its calls that change the spool or speak to a socket, in the order in which they began.
    pub calls: Vec<Call>,
    /// The call was reached before which it was to be killed.
    pub killed: bool,
}

/// A system call.
#[derive(Debug, Clone)]
pub struct Call {
    pub thread: pid_t,
    /// `openat` for `open` too, and likewise for the others that differ between machines.
    pub name: &'static str,
    /// The path in the spool, or the first octets for a socket.
    pub what: String,
    /// The second path of a rename or link.
    pub to: String,
    /// openat with `O_CREAT`.
    pub creates: bool,
    /// When it began and ended, counted over all entries and exits.
    pub entered: usize,
    pub left: Option<usize>,
    pub result: i64,
}

impl Call {
    /// It had ended, well, before the other began.
    pub fn is_before(&self, other: &Call) -> bool {
        self.result >= 0 && self.left.is_some_and(|left| left < other.entered)
    }
}

/// Where the arguments are that tell whether a call matters.
#[derive(Clone, Copy)]
enum Kind {
    /// A path, and `O_CREAT` in the argument behind it matters.
    Open(usize),
    Path(usize),
    Paths(usize, usize),
    Descriptor,
    /// As `Descriptor`, and the octets matter when that is a socket.
    Write,
}

const CALLS: &[(c_long, &str, Kind)] = &[
    (libc::SYS_openat, "openat", Kind::Open(1)),
    (libc::SYS_mkdirat, "mkdir", Kind::Path(1)),
    (libc::SYS_renameat, "rename", Kind::Paths(1, 3)),
    (libc::SYS_renameat2, "rename", Kind::Paths(1, 3)),
    (libc::SYS_linkat, "link", Kind::Paths(1, 3)),
    (libc::SYS_unlinkat, "unlink", Kind::Path(1)),
    (libc::SYS_utimensat, "utimens", Kind::Descriptor),
    (libc::SYS_flock, "flock", Kind::Descriptor),
    (libc::SYS_ftruncate, "ftruncate", Kind::Descriptor),
    (libc::SYS_fallocate, "fallocate", Kind::Descriptor),
    (libc::SYS_fsync, "fsync", Kind::Descriptor),
    (libc::SYS_fdatasync, "fdatasync", Kind::Descriptor),
    (libc::SYS_write, "write", Kind::Write),
    (libc::SYS_pwrite64, "write", Kind::Write),
    (libc::SYS_writev, "writev", Kind::Descriptor),
    (libc::SYS_sendto, "write", Kind::Write),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_open, "openat", Kind::Open(0)),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_mkdir, "mkdir", Kind::Path(0)),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_rename, "rename", Kind::Paths(0, 1)),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_link, "link", Kind::Paths(0, 1)),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_unlink, "unlink", Kind::Path(0)),
    #[cfg(target_arch = "x86_64")]
    (libc::SYS_rmdir, "unlink", Kind::Path(0)),
];

impl Traced {
    /// Starts it with this configuration and waits until it listens. With a `kill_at` it dies
    /// before the call of that number that changes the spool, from 1.
    #[track_caller]
    pub fn start(yaml: &str, spool: &Path, kill_at: Option<usize>) -> Traced {
        let folder = tempfile::tempdir().unwrap();
        let mut command = command(&folder, Some(yaml));
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let mut traced = Traced::run(command, folder, spool, kill_at);
        let end = Instant::now() + BOUND;
        while !traced.has_ended() {
            let log = traced.log();
            let listen = log.split_whitespace().find_map(|word| word.strip_prefix("listen="));
            if let Some(listen) = listen.filter(|_| log.contains(" starting smtp-dup ")) {
                traced.addr = Some(listen.parse().unwrap());
                break;
            }
            assert!(Instant::now() < end, "does not start:\n{log}");
            thread::sleep(Duration::from_millis(2));
        }
        traced
    }

    /// Starts this, whose folder is `folder`, in the same way, and does not wait for anything.
    #[track_caller]
    pub fn run(
        mut command: Command,
        folder: TempDir,
        spool: &Path,
        kill_at: Option<usize>,
    ) -> Traced {
        let log = folder.path().join("log");
        command.stderr(File::create(&log).unwrap());
        // SAFETY: one system call between fork and exec.
        unsafe {
            command.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            });
        }
        let (sender, pid) = channel();
        let spool = spool.to_path_buf();
        // Whoever starts it is its tracer, and has to stay the same thread.
        let thread = thread::spawn(move || {
            // The tracer reaps it, with all its threads.
            #[allow(clippy::zombie_processes)]
            let child = command.spawn().unwrap();
            let pid = child.id() as pid_t;
            // With the descriptors that are the child's: a client is to see its end.
            drop(command);
            sender.send(pid).unwrap();
            Tracer { pid, spool, kill_at, clock: 0, changes: 0, calls: Vec::new(), killed: false }
                .run()
        });
        Traced { addr: None, pid: first(&pid), thread, log, _folder: folder }
    }

    /// The process is no more.
    pub fn has_ended(&self) -> bool {
        self.thread.is_finished()
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Asks it to end.
    pub fn terminate(&self) {
        // SAFETY: the process is not reaped before its tracer ends; a signal to one that is gone
        // would go nowhere.
        if !self.has_ended() {
            unsafe { libc::kill(self.pid, libc::SIGTERM) };
        }
    }

    /// Waits for its end.
    #[track_caller]
    pub fn trace(self) -> Trace {
        let end = Instant::now() + BOUND;
        while !self.has_ended() {
            assert!(Instant::now() < end, "does not end:\n{}", self.log());
            thread::sleep(Duration::from_millis(2));
        }
        self.thread.join().unwrap()
    }
}

#[track_caller]
fn first(pid: &Receiver<pid_t>) -> pid_t {
    pid.recv_timeout(BOUND).expect("the program cannot be traced")
}

struct Tracer {
    pid: pid_t,
    spool: PathBuf,
    kill_at: Option<usize>,
    /// Counts entries and exits of calls.
    clock: usize,
    /// Counts calls that change the spool.
    changes: usize,
    calls: Vec<Call>,
    killed: bool,
}

impl Tracer {
    fn run(mut self) -> Trace {
        let options = libc::PTRACE_O_TRACESYSGOOD
            | libc::PTRACE_O_TRACECLONE
            | libc::PTRACE_O_TRACEEXEC
            | libc::PTRACE_O_EXITKILL;
        let mut is_set_up = false;
        loop {
            let mut status = 0;
            // Only what this thread traces: the other tests have children too.
            // SAFETY: `status` is ours.
            let tid = unsafe { libc::waitpid(-1, &mut status, libc::__WALL | libc::__WNOTHREAD) };
            if tid < 0 {
                return Trace { calls: self.calls, killed: self.killed };
            }
            if !libc::WIFSTOPPED(status) {
                continue;
            }
            if !is_set_up {
                // SAFETY: it is stopped, and ours.
                unsafe { libc::ptrace(libc::PTRACE_SETOPTIONS, tid, 0, options) };
                is_set_up = true;
            }
            let signal = match libc::WSTOPSIG(status) {
                stop if stop == libc::SIGTRAP | 0x80 => {
                    self.call(tid);
                    0
                }
                // The start of a thread, and ptrace's own events.
                libc::SIGSTOP | libc::SIGTRAP => 0,
                signal => signal,
            };
            // SAFETY: it is stopped, or has been killed, which is an error that changes nothing.
            unsafe { libc::ptrace(libc::PTRACE_SYSCALL, tid, 0, signal) };
        }
    }

    /// A thread enters or leaves a call.
    fn call(&mut self, tid: pid_t) {
        let Some(info) = Info::of(tid) else { return };
        self.clock += 1;
        if let Info::Exit(result) = info {
            let open = self.calls.iter_mut().rev().find(|call| call.thread == tid);
            if let Some(call) = open.filter(|call| call.left.is_none()) {
                (call.left, call.result) = (Some(self.clock), result);
            }
            return;
        }
        let Info::Entry(number, arguments) = info else { return };
        let Some(&(_, name, kind)) = CALLS.iter().find(|(known, ..)| *known as u64 == number)
        else {
            return;
        };
        let Some((what, to)) = self.object(kind, &arguments) else { return };
        let creates =
            matches!(kind, Kind::Open(at) if arguments[at + 1] & libc::O_CREAT as u64 != 0);
        let is_change = !what.starts_with("socket ") && (name != "openat" || creates);
        self.calls.push(Call {
            thread: tid,
            name,
            what,
            to,
            creates,
            entered: self.clock,
            left: None,
            result: -1,
        });
        self.changes += usize::from(is_change);
        if is_change && self.kill_at == Some(self.changes) {
            self.killed = true;
            // SAFETY: it is ours, and not reaped. A call that was entered and not begun never is.
            unsafe { libc::kill(self.pid, libc::SIGKILL) };
        }
    }

    /// What a call is about, when that is the spool or a socket.
    fn object(&self, kind: Kind, arguments: &[u64; 6]) -> Option<(String, String)> {
        match kind {
            Kind::Open(at) | Kind::Path(at) => Some((self.path(arguments[at])?, String::new())),
            Kind::Paths(from, to) => Some((self.path(arguments[from])?, self.path(arguments[to])?)),
            Kind::Descriptor | Kind::Write => {
                let link = format!("/proc/{}/fd/{}", self.pid, arguments[0] as i32);
                let path = fs::read_link(link).ok()?;
                if let Kind::Write = kind
                    && path.as_os_str().as_encoded_bytes().starts_with(b"socket:")
                {
                    let count = arguments[2].min(64) as usize;
                    let octets = self.memory(arguments[1], count);
                    return Some((format!("socket {}", octets.escape_ascii()), String::new()));
                }
                Some((self.inside(&path)?, String::new()))
            }
        }
    }

    fn path(&self, address: u64) -> Option<String> {
        let octets = self.memory(address, 4096);
        let end = octets.iter().position(|&octet| octet == 0)?;
        self.inside(Path::new(std::str::from_utf8(&octets[..end]).ok()?))
    }

    fn inside(&self, path: &Path) -> Option<String> {
        let inside = path.strip_prefix(&self.spool).ok()?;
        Some(inside.display().to_string().trim_end_matches(" (deleted)").to_string())
    }

    fn memory(&self, address: u64, count: usize) -> Vec<u8> {
        let mut octets = vec![0; count];
        let file = File::open(format!("/proc/{}/mem", self.pid));
        let count = file.and_then(|file| file.read_at(&mut octets, address)).unwrap_or(0);
        octets.truncate(count);
        octets
    }
}

/// `struct ptrace_syscall_info`, as far as it is needed.
enum Info {
    Entry(u64, [u64; 6]),
    Exit(i64),
}

impl Info {
    fn of(tid: pid_t) -> Option<Info> {
        const GET_SYSCALL_INFO: libc::c_uint = 0x420e;
        let mut info = [0u64; 11];
        let size = size_of_val(&info) as *mut c_void;
        // SAFETY: the kernel writes at most `size` octets.
        let got = unsafe { libc::ptrace(GET_SYSCALL_INFO, tid, size, ptr::from_mut(&mut info)) };
        match (got, info[0] as u8) {
            (1.., 1) => Some(Info::Entry(info[3], info[4..10].try_into().ok()?)),
            (1.., 2) => Some(Info::Exit(info[3] as i64)),
            _ => None,
        }
    }
}
