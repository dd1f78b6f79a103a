//! The program under test as an installed file, the processes that run it, and those that launch
//! it.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::common::{BOUND, wait_until};
use crate::instance::{command, free_address};
use crate::open_folder;

/// The binary that cargo has built.
pub fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_smtp-dup"))
}

/// An installed copy of the program. No other test runs it, so that all its processes are ours;
/// what is left of them is killed when this goes.
pub struct Program {
    path: PathBuf,
    _folder: Option<TempDir>,
}

impl Program {
    /// A copy in a folder of its own, made by another process: see [`Postfix::install`].
    ///
    /// [`Postfix::install`]: crate::instance::Postfix
    #[track_caller]
    pub fn copy() -> Program {
        let folder = open_folder();
        let path = folder.path().join("smtp-dup");
        let mut install = command("install");
        assert!(install.args(["-m", "755"]).args([binary(), &path]).status().unwrap().success());
        Program { path, _folder: Some(folder) }
    }

    /// The copy that lies there.
    pub fn at(path: PathBuf) -> Program {
        Program { path, _folder: None }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The processes that run it, in the order of their numbers.
    pub fn pids(&self) -> Vec<u32> {
        // The kernel marks a file that was removed meanwhile.
        let removed = format!("{} (deleted)", self.path.display());
        let is_ours = |pid: &u32| {
            let exe = fs::read_link(format!("/proc/{pid}/exe"));
            exe.is_ok_and(|exe| exe == self.path || exe == Path::new(&removed))
        };
        let mut pids = pids();
        pids.retain(is_ours);
        pids.sort_unstable();
        pids
    }

    /// Waits until so many processes run.
    #[track_caller]
    pub fn wait_pids(&self, count: usize) -> Vec<u32> {
        wait_until(&format!("{count} processes"), || self.pids().len() == count);
        self.pids()
    }

    /// The process that `launcher` has started, and the one which that has, once both are there.
    #[track_caller]
    pub fn parent_and_child(&self, launcher: u32) -> (u32, u32) {
        let mut found = None;
        wait_until("a parent and a child", || {
            found = self.pair(launcher);
            found.is_some()
        });
        found.unwrap()
    }

    /// The same, if they are there.
    pub fn pair(&self, launcher: u32) -> Option<(u32, u32)> {
        let pids = self.pids();
        let parents = pids.iter().filter(|pid| parent_of(**pid) == Some(launcher));
        let pairs = parents.flat_map(|parent| {
            let children = pids.iter().filter(|pid| parent_of(**pid) == Some(*parent));
            children.map(|child| (*parent, *child))
        });
        pairs.last()
    }

    /// Waits until none runs any more.
    #[track_caller]
    pub fn wait_gone(&self, within: Duration) {
        let end = Instant::now() + within;
        while !self.pids().is_empty() {
            assert!(Instant::now() < end, "still running after {within:?}: {:?}", self.pids());
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        for pid in self.pids() {
            kill("KILL", pid);
        }
    }
}

/// All processes.
pub fn pids() -> Vec<u32> {
    let entries = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// Sends a signal; whether there was somebody to get it.
pub fn kill(signal: &str, pid: u32) -> bool {
    // The shell's own kill is there on every machine.
    let kill = format!("kill -{signal} {pid}");
    Command::new("sh").args(["-c", &kill]).stderr(Stdio::null()).status().unwrap().success()
}

/// The words of a line of /proc/PID/status; None when there is no such process any more.
fn status(pid: u32, field: &str) -> Option<Vec<u32>> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    line.split_whitespace().map(|word| word.parse().ok()).collect()
}

pub fn parent_of(pid: u32) -> Option<u32> {
    status(pid, "PPid")?.first().copied()
}

/// The process is this user and group in every respect, in none of root's groups, and
/// without any of root's capabilities.
#[track_caller]
pub fn assert_runs_as(pid: u32, user: &str, group: &str) {
    let (uid, gid) = (id("/etc/passwd", user), id("/etc/group", group));
    assert_eq!(status(pid, "Uid").unwrap(), [uid; 4], "user of {pid}");
    assert_eq!(status(pid, "Gid").unwrap(), [gid; 4], "group of {pid}");
    let mut allowed = groups(user);
    allowed.push(gid);
    let others = status(pid, "Groups").unwrap();
    assert!(others.iter().all(|gid| allowed.contains(gid)), "{pid} is in {others:?}");
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        let line = status.lines().find(|line| line.starts_with(set)).unwrap();
        assert!(line.ends_with("\t0000000000000000"), "{pid} has {line}");
    }
}

/// The numbers of a user and of its group.
#[track_caller]
pub fn user_and_group(user: &str) -> (u32, u32) {
    (id("/etc/passwd", user), groups(user)[0])
}

/// The number that belongs to a name in /etc/passwd or /etc/group.
#[track_caller]
fn id(file: &str, name: &str) -> u32 {
    let text = fs::read_to_string(file).unwrap();
    let entry = text.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let entry = entry.into_iter().find(|entry| entry[0] == name);
    entry.unwrap_or_else(|| panic!("no {name} in {file}"))[2].parse().unwrap()
}

/// The groups that a user is put in; its own is the first.
fn groups(user: &str) -> Vec<u32> {
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let entries = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let own = entries.filter(|entry| entry[0] == user).map(|entry| entry[3].parse().unwrap());
    let group = fs::read_to_string("/etc/group").unwrap();
    let entries = group.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let member = entries.filter(|entry| entry[3].split(',').any(|name| name == user));
    own.chain(member.map(|entry| entry[2].parse().unwrap())).collect()
}

/// A process that launches others, or is launched by hand; what it and they say on stderr goes to
/// a file. It is killed when this goes.
pub struct Launcher {
    child: Child,
    stderr: PathBuf,
    _folder: TempDir,
}

impl Launcher {
    pub fn start(command: &mut Command) -> Launcher {
        let folder = open_folder();
        let stderr = folder.path().join("stderr");
        let file = fs::File::create(&stderr).unwrap();
        let command = command.current_dir(folder.path()).stdin(Stdio::null());
        let child = command.stdout(Stdio::null()).stderr(file).spawn().unwrap();
        Launcher { child, stderr, _folder: folder }
    }

    /// Starts what is to listen on a free address, and waits until it does. Without connecting,
    /// for that would launch something.
    #[track_caller]
    pub fn listening(prepare: impl Fn(SocketAddr) -> Command) -> (Launcher, SocketAddr) {
        for _ in 0..5 {
            let address = free_address();
            let mut launcher = Launcher::start(&mut prepare(address));
            let end = Instant::now() + BOUND;
            while Instant::now() < end && launcher.child.try_wait().unwrap().is_none() {
                if holds_listener(launcher.pid(), address.port()) {
                    return (launcher, address);
                }
                thread::sleep(Duration::from_millis(5));
            }
            eprintln!("not listening on {address}: {}", launcher.log());
        }
        panic!("nothing listens");
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What was said on stderr.
    pub fn log(&self) -> String {
        // Also asked while a test fails, when a second panic would end all tests.
        String::from_utf8_lossy(&fs::read(&self.stderr).unwrap_or_default()).into_owned()
    }

    /// Waits for a line with `needle` in it; the first one.
    #[track_caller]
    pub fn wait_log(&self, needle: &str) -> String {
        let end = Instant::now() + BOUND;
        loop {
            let log = self.log();
            // A line without its end may still be written.
            let whole = log.rsplit_once('\n').map_or("", |(whole, _)| whole);
            if let Some(line) = whole.lines().find(|line| line.contains(needle)) {
                return line.to_owned();
            }
            assert!(Instant::now() < end, "no line with {needle:?}:\n{log}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[track_caller]
    pub fn wait_exit(&mut self, within: Duration) -> ExitStatus {
        let end = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "still running after {within:?}:\n{}", self.log());
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Launcher {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("--- said on stderr:\n{}\n---", self.log());
        }
    }
}

/// True when this process has a TCP socket that listens on this port, of whatever address.
fn holds_listener(pid: u32, port: u16) -> bool {
    let port = format!(":{port:04X}");
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(fs::read_to_string);
    let rows = tables.iter().flatten().flat_map(|table| table.lines());
    let rows = rows.map(|line| line.split_whitespace().collect::<Vec<_>>());
    // State 0A is LISTEN; the tenth column is the number of the socket.
    let listeners = rows.filter(|row| row[1].ends_with(&port) && row[3] == "0A");
    let sockets: Vec<_> = listeners.map(|row| format!("socket:[{}]", row[9])).collect();
    let Ok(fds) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    let mut links = fds.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    links.any(|link| sockets.iter().any(|socket| link == Path::new(socket)))
}
