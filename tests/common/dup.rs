//! The program under test: start it, read its log, signal it, see it end.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tempfile::TempDir;

use super::BOUND;

/// A running smtp-dup. It is killed and reaped when this goes.
pub struct Dup {
    child: Mutex<Child>,
    log: Arc<Log>,
    addrs: Vec<SocketAddr>,
    // Its working directory, so that no config.yaml of ours is found by chance.
    _folder: TempDir,
}

/// What it has said on stderr, and whether that has ended.
struct Log {
    stderr: ChildStderr,
    lines: Mutex<(Vec<String>, bool)>,
    grown: Condvar,
}

/// The signals that the tests send.
#[derive(Debug, Clone, Copy)]
pub enum Signal {
    Term,
    Int,
    Kill,
    Hup,
    Stop,
    Cont,
    Pipe,
}

impl Dup {
    /// Runs it with this configuration and waits until it listens.
    #[track_caller]
    pub fn start(yaml: &str) -> Dup {
        Dup::start_with(|_| {}, yaml)
    }

    /// The same, with a say in how the process is started.
    #[track_caller]
    pub fn start_with(prepare: impl FnOnce(&mut Command), yaml: &str) -> Dup {
        let folder = tempfile::tempdir().unwrap();
        let mut command = command(&folder, Some(yaml));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        prepare(&mut command);
        let mut child = command.spawn().unwrap();
        let (stderr, lines, grown) =
            (child.stderr.take().unwrap(), Mutex::default(), Condvar::new());
        let log = Arc::new(Log { stderr, lines, grown });
        let collected = Arc::clone(&log);
        thread::spawn(move || collected.collect());
        let mut dup = Dup { child: Mutex::new(child), log, addrs: Vec::new(), _folder: folder };
        let line = dup.wait_log(" starting smtp-dup ");
        let listen = line.split_whitespace().find_map(|word| word.strip_prefix("listen="));
        let listen = listen.unwrap_or_else(|| panic!("no listen= in {line}"));
        dup.addrs = listen
            .split(',')
            .map(|a| a.parse().unwrap_or_else(|_| panic!("no address: {a}")))
            .collect();
        dup
    }

    /// The address where it listens; the first of them.
    pub fn addr(&self) -> SocketAddr {
        self.addrs[0]
    }

    /// All addresses where it listens, in the order of its `starting` line.
    pub fn addrs(&self) -> &[SocketAddr] {
        &self.addrs
    }

    pub fn pid(&self) -> u32 {
        self.child.lock().unwrap().id()
    }

    /// The log so far: all that it has said by now.
    pub fn log(&self) -> String {
        self.log.so_far().0.join("\n")
    }

    /// The log lines so far that have `needle`.
    pub fn log_lines(&self, needle: &str) -> Vec<String> {
        let lines = self.log.so_far();
        lines.0.iter().filter(|line| line.contains(needle)).cloned().collect()
    }

    /// Waits for a log line with `needle` in it; the first one.
    #[track_caller]
    pub fn wait_log(&self, needle: &str) -> String {
        self.wait_logs(needle, 1).remove(0)
    }

    /// Waits until `count` log lines have `needle` in them.
    #[track_caller]
    pub fn wait_logs(&self, needle: &str, count: usize) -> Vec<String> {
        let end = Instant::now() + BOUND;
        let mut lines = self.log.lines.lock().unwrap();
        loop {
            let found: Vec<_> =
                lines.0.iter().filter(|line| line.contains(needle)).cloned().collect();
            if found.len() >= count {
                return found;
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || lines.1 {
                let log = lines.0.join("\n");
                drop(lines);
                panic!("{} of {count} log lines with {needle:?}:\n{log}", found.len());
            }
            lines = self.log.grown.wait_timeout(lines, left).unwrap().0;
        }
    }

    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        let name = format!("{signal:?}").to_uppercase();
        // The shell's own kill is there on every machine.
        let kill = format!("kill -{name} {}", self.pid());
        assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success(), "{kill}");
    }

    /// Waits for its end; panics when it still runs after `within`.
    #[track_caller]
    pub fn wait_exit(&self, within: Duration) -> ExitStatus {
        let end = Instant::now() + within;
        loop {
            let status = self.child.lock().unwrap().try_wait().unwrap();
            if let Some(status) = status {
                self.log.wait_end();
                return status;
            }
            assert!(Instant::now() < end, "still running after {within:?}:\n{}", self.log());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// True while the process has not ended.
    pub fn is_running(&self) -> bool {
        self.child.lock().unwrap().try_wait().unwrap().is_none()
    }

    /// The number of its threads.
    pub fn threads(&self) -> usize {
        self.entries("task")
    }

    /// The number of its open descriptors.
    pub fn descriptors(&self) -> usize {
        self.entries("fd")
    }

    fn entries(&self, folder: &str) -> usize {
        std::fs::read_dir(format!("/proc/{}/{folder}", self.pid())).unwrap().count()
    }

    /// Its resident memory, in octets.
    pub fn resident(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Dup {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        let _ = child.kill();
        let _ = child.wait();
        if thread::panicking() {
            self.log.wait_end();
            eprintln!("--- the log of smtp-dup:\n{}\n---", self.log());
        }
    }
}

impl Log {
    /// Reads under the lock, so that with the lock one sees what is still to be read.
    fn collect(&self) {
        let (mut part, mut octets) = (Vec::new(), [0; 4096]);
        loop {
            self.has_more(PollTimeout::NONE);
            let mut lines = self.lines.lock().unwrap();
            let read = nix::unistd::read(&self.stderr, &mut octets).unwrap_or(0);
            part.extend_from_slice(&octets[..read]);
            lines.1 = read == 0;
            while let Some(end) = part.iter().position(|&o| o == b'\n') {
                let line: Vec<u8> = part.drain(..=end).collect();
                lines.0.push(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            self.grown.notify_all();
            if lines.1 {
                return;
            }
        }
    }

    fn has_more(&self, timeout: PollTimeout) -> bool {
        let mut fds = [PollFd::new(self.stderr.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, timeout).is_ok_and(|ready| ready > 0)
    }

    /// All that the process has said by now.
    fn so_far(&self) -> MutexGuard<'_, (Vec<String>, bool)> {
        let mut lines = self.lines.lock().unwrap();
        while !lines.1 && self.has_more(PollTimeout::ZERO) {
            lines = self.grown.wait_timeout(lines, Duration::from_millis(5)).unwrap().0;
        }
        lines
    }

    /// Waits until everything that the process had said is there.
    fn wait_end(&self) {
        let lines = self.lines.lock().unwrap();
        drop(self.grown.wait_timeout_while(lines, BOUND, |lines| !lines.1).unwrap());
    }
}

/// Runs it with `args` to its end: for `--version`, `check`, and configurations that it refuses.
/// With a `yaml`, `--config` and a file with that are put before `args`.
#[track_caller]
pub fn run(args: &[&str], yaml: Option<&str>, environment: &[(&str, &str)]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let mut command = command(&folder, yaml);
    command.args(args).envs(environment.iter().copied());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let stdout = thread::spawn(move || read_all(stdout));
    let stderr = thread::spawn(move || read_all(stderr));
    let end = Instant::now() + BOUND;
    let (status, ended) = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break (status, true);
        }
        if Instant::now() > end {
            child.kill().unwrap();
            break (child.wait().unwrap(), false);
        }
        thread::sleep(Duration::from_millis(5));
    };
    let output = Output { status, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() };
    assert!(ended, "{args:?} did not end by itself: {output:?}");
    output
}

fn read_all(mut pipe: impl Read) -> Vec<u8> {
    let mut octets = Vec::new();
    pipe.read_to_end(&mut octets).unwrap();
    octets
}

/// The program under test: what cargo built, or the one that DUP_BINARY names, such as the small
/// one of `make test-small`.
pub fn binary() -> PathBuf {
    match std::env::var_os("DUP_BINARY") {
        Some(binary) => PathBuf::from(binary),
        None => PathBuf::from(env!("CARGO_BIN_EXE_smtp-dup")),
    }
}

/// The program in a folder of its own, free of what the environment says.
pub fn command(folder: &TempDir, yaml: Option<&str>) -> Command {
    let mut command = Command::new(binary());
    command.current_dir(folder.path());
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("SMTP_DUP_") || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    if let Some(yaml) = yaml {
        // Not config.yaml: that one would be found without being named.
        let path = folder.path().join("test.yaml");
        std::fs::File::create(&path).unwrap().write_all(yaml.as_bytes()).unwrap();
        command.arg("--config").arg(path);
    }
    command
}

/// A configuration that listens on a free port. `extra_smtp` and `extra_relay` are further lines
/// for these two sections; `listen:` and `domain:` in the first take the place of ours.
pub fn config(
    primary: SocketAddr,
    backups: &[SocketAddr],
    extra_smtp: &str,
    extra_relay: &str,
) -> String {
    let mut yaml = String::from("smtp:\n");
    for (key, value) in [("listen", "127.0.0.1:0"), ("domain", "dup.example")] {
        if !extra_smtp.lines().any(|line| line.trim_start().starts_with(&format!("{key}:"))) {
            yaml.push_str(&format!("  {key}: \"{value}\"\n"));
        }
    }
    let section = |yaml: &mut String, lines: &str| {
        for line in lines.lines() {
            yaml.push_str(&format!("  {line}\n"));
        }
    };
    section(&mut yaml, extra_smtp);
    yaml.push_str(&format!("relay:\n  destination_primary: \"{primary}\"\n"));
    if !backups.is_empty() {
        yaml.push_str("  destination_backups:\n");
        backups.iter().for_each(|backup| yaml.push_str(&format!("    - \"{backup}\"\n")));
    }
    section(&mut yaml, extra_relay);
    yaml
}
