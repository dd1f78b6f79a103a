//! A private Postfix for one test: its own configuration, queue and log below a temporary folder,
//! on the loopback only, stopped when dropped. The machine's own Postfix is not touched.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};
use std::{env, fs, io, thread};

use tempfile::TempDir;

/// How long a test waits for Postfix to log something. Deliveries here take seconds at most; a
/// delivery that was put off by mistake is next tried after Postfix's minimal_backoff_time, 300 s.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Whether these tests can run here. Under CI they have to.
pub fn available() -> bool {
    let lacking = if !Path::new("/usr/sbin/postfix").exists() {
        "Postfix is not installed"
    } else if !fs::metadata("/proc/self").is_ok_and(|me| me.uid() == 0) {
        "starting a private Postfix needs root"
    } else {
        return true;
    };
    assert!(env::var_os("CI").is_none(), "{lacking}, and CI is set");
    // Not eprintln: the test harness would keep the text of a test that passes.
    let notice = format!("SKIPPED, NOT TESTED: {lacking}\n");
    io::stderr().write_all(notice.as_bytes()).unwrap();
    false
}

/// A loopback address that nobody listens on, for programs that cannot be told to pick one. Below
/// the range that the kernel hands out, so that no outgoing connection takes it meanwhile.
pub fn free_address() -> SocketAddr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let step = NEXT.fetch_add(1, Ordering::Relaxed) + (std::process::id() % 9000) as u16;
        let address = SocketAddr::from(([127, 0, 0, 1], 12000 + step % 20000));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

/// A command of Postfix or of its test tools, which may be outside the PATH of this process.
pub fn command(name: &str) -> Command {
    let mut command = Command::new(name);
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command
}

pub struct Postfix {
    dir: TempDir,
    /// Where it takes mail.
    pub address: SocketAddr,
}

impl Postfix {
    /// Starts an instance whose transport map sends example.com to `next_hop`. Bounces to
    /// sender.test vanish, mail to anywhere else is an error. `settings` are lines for main.cf.
    pub fn start(next_hop: SocketAddr, settings: &str) -> Postfix {
        let dir = tempfile::Builder::new().prefix("pf-").tempdir().unwrap();
        // The daemons run as user postfix and must be able to get in.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let mut postfix = Postfix { dir, address: free_address() };
        let path = |name: &str| postfix.dir.path().join(name);
        fs::create_dir(path("etc")).unwrap();
        fs::create_dir(path("spool")).unwrap();
        let mut install = command("install");
        install.args(["-d", "-o", "postfix", "-m", "700"]);
        run(install.arg(path("data")));
        fs::write(
            path("etc/transport"),
            format!(
                "example.com smtp:[{}]:{}\nsender.test discard:\n",
                next_hop.ip(),
                next_hop.port()
            ),
        )
        .unwrap();
        fs::write(path("etc/main.cf"), main_cf(postfix.dir.path(), settings)).unwrap();
        // Somebody may take the port before the master does: try another one then.
        for attempt in 1.. {
            fs::write(postfix.dir.path().join("etc/master.cf"), master_cf(postfix.address))
                .unwrap();
            let output = postfix.command("postfix").arg("start").output().unwrap();
            if output.status.success() {
                break;
            }
            assert!(attempt < 5, "postfix start: {output:?}\n{}", postfix.log_text());
            postfix.address = free_address();
        }
        postfix
    }

    /// `postfix`, `postqueue` and the like, for this instance.
    fn command(&self, name: &str) -> Command {
        let mut command = command(name);
        command.arg("-c").arg(self.dir.path().join("etc"));
        command
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

    fn log_text(&self) -> String {
        let log: PathBuf = self.dir.path().join("mail.log");
        String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned()
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
        let master = fs::read_to_string(self.dir.path().join("spool/pid/master.pid"));
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

fn main_cf(dir: &Path, settings: &str) -> String {
    let dir = dir.display();
    format!(
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
{settings}
"
    )
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
    let mut text =
        format!("{address} inet n - n - - smtpd\npostlog unix-dgram n - n - 1 postlogd\n");
    for (name, private, wakeup, maxproc, program) in services {
        writeln!(text, "{name} unix {private} - n {wakeup} {maxproc} {program}").unwrap();
    }
    text
}
