//! A private Postfix for one test: its own configuration, queue and log below a temporary folder,
//! on the loopback only, stopped when dropped. The machine's own Postfix is not touched.

// Each test program uses its own part of this.
#![allow(dead_code)]

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs, io, thread};

use tempfile::TempDir;

/// How long a test waits for Postfix to log something. Deliveries here take seconds at most; a
/// delivery that was put off by mistake is next tried after Postfix's minimal_backoff_time, 300 s.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The folders where programs are sought: those of root, whatever the PATH of this process.
pub const FOLDERS: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Whether these tests can run here. Under CI they have to.
pub fn available() -> bool {
    can_run(&["postfix"])
}

/// Whether tests that need root and these programs can run here. Under CI they have to.
pub fn can_run(programs: &[&str]) -> bool {
    let is_there = |name: &str| FOLDERS.split(':').any(|dir| Path::new(dir).join(name).exists());
    let lacking = if let Some(name) = programs.iter().find(|name| !is_there(name)) {
        format!("{name} is not installed")
    } else if programs.contains(&"unshare") && !has_namespaces() {
        "this may make no namespaces".into()
    } else if !fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0) {
        "this needs root".into()
    } else {
        return true;
    };
    assert!(env::var_os("CI").is_none(), "{lacking}, and CI is set");
    // Not eprintln: the test harness would keep the text of a test that passes.
    let test = thread::current().name().unwrap_or_default().to_owned();
    let notice = format!("{test} SKIPPED, NOT TESTED: {lacking}\n");
    io::stderr().write_all(notice.as_bytes()).unwrap();
    false
}

/// Containers often may not, even as root.
fn has_namespaces() -> bool {
    command("unshare")
        .args(["--mount", "--net", "true"])
        .output()
        .is_ok_and(|output| output.status.success())
}

/// A loopback address that nobody listens on, for programs that cannot be told to pick one. Below
/// the range that the kernel hands out, so that no outgoing connection takes it meanwhile.
///
/// The port's number is this process's until it ends, by a socket of UDP: that the TCP port is free
/// now says little, for Postfix shares ports, so that another test process could be on it later.
pub fn free_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    static OURS: Mutex<Vec<UdpSocket>> = Mutex::new(Vec::new());
    loop {
        let step = NEXT.fetch_add(1, Ordering::Relaxed) + (std::process::id() % 9000) as u16;
        let address = SocketAddr::from(([127, 0, 0, 1], 12000 + step % 20000));
        if let Ok(number) = UdpSocket::bind(address)
            && TcpListener::bind(address).is_ok()
        {
            OURS.lock().unwrap().push(number);
            return address;
        }
    }
}

/// A command of Postfix or of its test tools, which may be outside the PATH of this process.
pub fn command(name: &str) -> Command {
    let mut command = Command::new(name);
    command.env("PATH", FOLDERS);
    command
}

pub struct Postfix {
    dir: TempDir,
    /// Where it takes mail.
    pub address: SocketAddr,
    /// Where example.com's mail goes.
    pub next_hop: SocketAddr,
    /// Words before each of its commands: what they are to run in.
    prefix: Vec<String>,
}

/// What an instance is to have.
#[derive(Default)]
pub struct Setup<'a> {
    /// Lines for main.cf.
    pub settings: &'a str,
    /// Lines for master.cf, given a free address for a service of the test's own, to which then
    /// example.com's mail goes. Asked again when that address turns out to be taken.
    pub services: Option<&'a dyn Fn(SocketAddr) -> String>,
    /// A program to install as `smtp-dup` beside the daemons, in a daemon_directory of our own.
    pub daemon: Option<&'a Path>,
    /// Words before each command.
    pub prefix: Vec<String>,
}

impl Postfix {
    /// Starts an instance whose transport map sends example.com to `next_hop`. Bounces to
    /// sender.test vanish, mail to anywhere else is an error. `settings` are lines for main.cf.
    pub fn start(next_hop: SocketAddr, settings: &str) -> Postfix {
        Postfix::launch(Some(next_hop), Setup { settings, ..Setup::default() })
    }

    /// The same, where the mail goes to a service of the instance itself.
    pub fn hosting(setup: Setup) -> Postfix {
        Postfix::launch(None, setup)
    }

    fn launch(next_hop: Option<SocketAddr>, setup: Setup) -> Postfix {
        let dir = tempfile::Builder::new().prefix("pf-").tempdir().unwrap();
        // The daemons run as user postfix and must be able to get in.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let prefix = setup.prefix.clone();
        let (address, other) = (free_address(), next_hop.unwrap_or_else(free_address));
        let mut postfix = Postfix { dir, address, next_hop: other, prefix };
        fs::create_dir(postfix.path("etc")).unwrap();
        fs::create_dir(postfix.path("spool")).unwrap();
        let mut install = command("install");
        install.args(["-d", "-o", "postfix", "-m", "700"]);
        run(install.arg(postfix.path("data")));
        let mut text = main_cf(postfix.dir.path(), setup.settings);
        if let Some(program) = setup.daemon {
            postfix.install(program);
            writeln!(text, "daemon_directory = {}", postfix.path("libexec").display()).unwrap();
        }
        fs::write(postfix.path("etc/main.cf"), text).unwrap();
        // Somebody may take a port before the master does: try others then.
        for attempt in 1.. {
            let services = setup.services.map(|services| services(postfix.next_hop));
            postfix.set_services(&services.unwrap_or_default());
            let hop = format!("smtp:[{}]:{}", postfix.next_hop.ip(), postfix.next_hop.port());
            let transports = format!("example.com {hop}\nsender.test discard:\n");
            fs::write(postfix.path("etc/transport"), transports).unwrap();
            let output = postfix.command("postfix").arg("start").output().unwrap();
            if output.status.success() {
                break;
            }
            assert!(attempt < 5, "postfix start: {output:?}\n{}", postfix.log_text());
            postfix.address = free_address();
            postfix.next_hop = next_hop.unwrap_or_else(free_address);
        }
        postfix
    }

    /// The daemons, and a program of ours among them. Copies, since links are something that
    /// `postfix check` warns of; made by other processes, since a file that this one had open for
    /// writing while another thread forks could not be executed.
    fn install(&self, program: &Path) {
        let daemons = run(command("postconf").args(["-dh", "daemon_directory"])).stdout;
        let daemons = String::from_utf8(daemons).unwrap();
        run(command("cp").args(["-a", daemons.trim()]).arg(self.path("libexec")));
        let mut install = command("install");
        run(install.args(["-m", "755"]).arg(program).arg(self.path("libexec/smtp-dup")));
    }

    /// The path of something in its folder: `etc`, `spool` (its queue directory), `libexec`.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// From the next start or reload on, master.cf has these lines besides Postfix's own.
    pub fn set_services(&self, services: &str) {
        let text = master_cf(self.address) + services + "\n";
        fs::write(self.path("etc/master.cf"), text).unwrap();
    }

    /// From the next start on, main.cf has these lines, too.
    pub fn add_settings(&self, settings: &str) {
        let path = self.path("etc/main.cf");
        let text = fs::read_to_string(&path).unwrap() + settings + "\n";
        fs::write(path, text).unwrap();
    }

    /// `postfix`, `postqueue` and the like, for this instance. What hangs is ended.
    fn command(&self, name: &str) -> Command {
        let mut command = command("timeout");
        command.arg(PATIENCE.as_secs().to_string()).args(&self.prefix).arg(name);
        command.arg("-c").arg(self.path("etc"));
        command
    }

    /// `postfix WHAT`, which has to succeed: `start`, `stop`, `reload`, `check`. What it said.
    #[track_caller]
    pub fn postfix(&self, what: &str) -> String {
        let output = run(self.command("postfix").arg(what));
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    }

    /// Starts it again, as soon as the remains of one that was killed let go of its port.
    #[track_caller]
    pub fn start_after_kill(&self) {
        let end = Instant::now() + PATIENCE;
        while !self.command("postfix").arg("start").output().unwrap().status.success() {
            assert!(Instant::now() < end, "postfix does not start: {}", self.log_text());
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// The process of master(8).
    #[track_caller]
    pub fn master(&self) -> u32 {
        let text = fs::read_to_string(self.path("spool/pid/master.pid")).unwrap();
        text.trim().parse().unwrap()
    }

    /// Tries all deferred mail again now, dead destinations included.
    pub fn flush(&self) {
        run(self.command("postqueue").arg("-f"));
    }

    /// What is in the queue: one line of JSON a message.
    pub fn queue(&self) -> Vec<String> {
        let output = run(self.command("postqueue").arg("-j"));
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// Waits until the queue is empty. Tries again all the time what was put off, and what a queue
    /// manager found in the hands of its predecessor's agents, which can be until its next look.
    #[track_caller]
    pub fn drain(&self) {
        let end = Instant::now() + PATIENCE;
        while !self.queue().is_empty() {
            assert!(Instant::now() < end, "the queue does not drain: {:#?}", self.queue());
            self.flush();
            thread::sleep(Duration::from_millis(500));
        }
    }

    fn log_text(&self) -> String {
        let log = fs::read(self.path("mail.log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }

    /// The log lines that have each of `parts` in them.
    pub fn log(&self, parts: &[&str]) -> Vec<String> {
        self.log_text()
            .lines()
            .filter(|line| parts.iter().all(|part| line.contains(part)))
            .map(str::to_owned)
            .collect()
    }

    /// Waits until `count` log lines have each of `parts` in them, and returns them.
    #[track_caller]
    pub fn wait_log(&self, count: usize, parts: &[&str]) -> Vec<String> {
        let end = Instant::now() + PATIENCE;
        loop {
            let lines = self.log(parts);
            if lines.len() >= count {
                return lines;
            }
            assert!(
                Instant::now() < end,
                "{} of {count} log lines with {parts:?} after {PATIENCE:?}",
                lines.len()
            );
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until `count` messages have left the queue for good, bounces included, and checks
    /// that none is left.
    #[track_caller]
    pub fn wait_removed(&self, count: usize) {
        self.wait_log(count, &["/qmgr[", ": removed"]);
        assert_eq!(self.queue(), [""; 0]);
    }

    /// Waits until all that is in the queue, at least `count` messages, waits for its next try.
    /// The log line comes a little earlier, and a flush in between would miss the message.
    #[track_caller]
    pub fn wait_deferred(&self, count: usize) {
        let end = Instant::now() + PATIENCE;
        loop {
            let queue = self.queue();
            let deferred = |line: &String| line.contains("\"queue_name\": \"deferred\"");
            if queue.len() >= count && queue.iter().all(deferred) {
                return;
            }
            assert!(Instant::now() < end, "not {count} deferred: {queue:#?}");
            thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Drop for Postfix {
    fn drop(&mut self) {
        if thread::panicking() {
            let log = self.log(&[""]);
            let tail = log.len().saturating_sub(500);
            eprintln!("--- the log of Postfix:\n{}\n---", log[tail..].join("\n"));
        }
        let master = fs::read_to_string(self.path("spool/pid/master.pid"));
        let stopped = self.command("postfix").arg("stop").output();
        if stopped.is_ok_and(|output| output.status.success()) {
            return;
        }
        // Its number may belong to another process by now: only one with our folder in its
        // environment is killed.
        let Ok(pid) = master.unwrap_or_default().trim().parse::<i32>() else {
            return;
        };
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        let dir = self.dir.path().to_str().unwrap();
        if String::from_utf8_lossy(&environment).contains(dir) {
            let _ = command("kill").args(["-9", &pid.to_string()]).output();
        }
    }
}

#[track_caller]
fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    output
}

/// Ours and those of the test, which go before. Nothing stands there twice: of that every daemon
/// warns in the log, postlogd(8) too, which waits for itself for ever when its socket is full.
fn main_cf(dir: &Path, settings: &str) -> String {
    let dir = dir.display();
    let name = |line: &str| line.split_once('=').map(|(name, _)| name.trim().to_owned());
    let theirs: Vec<_> = settings.lines().filter_map(name).collect();
    let ours = format!(
        "compatibility_level = 3.6
queue_directory = {dir}/spool
data_directory = {dir}/data
maillog_file = {dir}/mail.log
maillog_file_prefixes = {dir}
myhostname = postfix.test
mydestination =
local_recipient_maps =
alias_maps =
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
mynetworks = 127.0.0.0/8
smtpd_relay_restrictions = permit_mynetworks, reject
smtpd_peername_lookup = no
smtpd_client_connection_count_limit = 0
smtp_host_lookup = native
smtp_bind_address = 127.0.0.1
transport_maps = texthash:{dir}/etc/transport
default_transport = error:no transport entry
# Headers pass as they are, so that only Received: is added.
local_header_rewrite_clients =
"
    );
    let is_left = |line: &&str| name(line).is_none_or(|name| !theirs.contains(&name));
    let left = ours.lines().filter(is_left).collect::<Vec<_>>().join("\n");
    format!("{left}\n{settings}\n")
}

fn master_cf(address: SocketAddr) -> String {
    // Name, private, wakeup, maxproc, command; nothing is chrooted.
    let services = [
        ("pickup", "n", "60", "1", "pickup"),
        ("cleanup", "n", "-", "0", "cleanup"),
        ("qmgr", "n", "300", "1", "qmgr"),
        ("rewrite", "-", "-", "-", "trivial-rewrite"),
        ("bounce", "-", "-", "0", "bounce"),
        ("defer", "-", "-", "0", "bounce"),
        ("trace", "-", "-", "0", "bounce"),
        ("flush", "n", "1000?", "0", "flush"),
        ("proxymap", "-", "-", "-", "proxymap"),
        ("smtp", "-", "-", "-", "smtp"),
        ("showq", "n", "-", "-", "showq"),
        ("error", "-", "-", "-", "error"),
        ("retry", "-", "-", "-", "error"),
        ("discard", "-", "-", "-", "discard"),
        ("anvil", "-", "-", "1", "anvil"),
        ("scache", "-", "-", "1", "scache"),
    ];
    // postlogd(8) leaves after max_use lines, and only master(8) can start the next: when that has
    // something to warn of just then and the socket is full, it waits for ever, and all with it.
    let postlogd = "postlogd -o max_use=1000000";
    let mut text =
        format!("{address} inet n - n - - smtpd\npostlog unix-dgram n - n - 1 {postlogd}\n");
    for (name, private, wakeup, maxproc, program) in services {
        writeln!(text, "{name} unix {private} - n {wakeup} {maxproc} {program}").unwrap();
    }
    text
}
