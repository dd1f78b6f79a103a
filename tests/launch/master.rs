//! Postfix's master(8) starts it at the first connection and keeps it: `inet` services of
//! master.cf, with and without chroot, privileges, further listeners.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::ops::Range;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use crate::common::{Client, wait_until};
use crate::instance::{Postfix, Setup, available, can_run, command};
use crate::program::{Program, binary, kill, parent_of};
use crate::syslog::Syslog;
use crate::{Gate, Route, USER, numbered};

/// A Postfix with smtp-dup as a service of its master, and where the mail goes from there.
pub struct Hosted {
    pub postfix: Postfix,
    pub program: Program,
    pub route: Route,
}

impl Hosted {
    /// The usual entry of master.cf, with a user of its own.
    pub fn start(route: Route) -> Hosted {
        Hosted::entry(route, "n - n - 1", &format!("user={USER}"))
    }

    /// An entry with these fields from `private` to `maxproc`, and these words besides
    /// `directory=`.
    pub fn entry(route: Route, fields: &str, words: &str) -> Hosted {
        let folder = route.folder().display().to_string();
        let entry =
            |address| format!("{address} inet {fields} smtp-dup {words} directory={folder}");
        Hosted::with(route, Setup { services: Some(&entry), ..Setup::default() })
    }

    /// The usual entry, with these lines for main.cf and the log in `syslog`: for load with reloads
    /// or processes that are killed. Postfix's own postlogd(8) may then come to hang, or to wait for
    /// itself, and all of Postfix waits for it.
    pub fn with_syslog(route: Route, settings: &str, syslog: &Syslog) -> Hosted {
        let folder = route.folder().display().to_string();
        let entry =
            |address| format!("{address} inet n - n - 1 smtp-dup user={USER} directory={folder}");
        let settings = format!("maillog_file =\n{settings}");
        let services = Some(&entry as &dyn Fn(_) -> _);
        let prefix = syslog.prefix();
        Hosted::with(route, Setup { settings: &settings, services, prefix, ..Setup::default() })
    }

    /// Whatever `setup` says.
    pub fn with(route: Route, setup: Setup) -> Hosted {
        let postfix = Postfix::hosting(Setup { daemon: Some(binary()), ..setup });
        let program = Program::at(postfix.path("libexec/smtp-dup"));
        Hosted { postfix, program, route }
    }

    /// Where smtp-dup takes mail.
    pub fn service(&self) -> SocketAddr {
        self.postfix.next_hop
    }

    /// Gives letters to Postfix, over ten connections at once.
    #[track_caller]
    pub fn submit(&self, numbers: Range<usize>) {
        let Range { start, end } = numbers;
        thread::scope(|scope| {
            for sender in start..end.min(start + 10) {
                scope.spawn(move || {
                    let mut client = Client::ready(self.postfix.address);
                    for number in (sender..end).step_by(10) {
                        let to = ["b@example.com"];
                        let reply = client.message("a@sender.test", &to, &numbered(number));
                        assert_eq!(reply.code, 250, "{reply:?}");
                    }
                });
            }
        });
    }

    /// Starts Postfix anew with this in the environment of its daemons.
    pub fn import_environment(&self, variable: &str) {
        self.postfix.postfix("stop");
        let usual = "MAIL_CONFIG MAIL_LOGTAG LANG=C POSTLOG_SERVICE POSTLOG_HOSTNAME";
        self.postfix.add_settings(&format!("import_environment = {usual} {variable}"));
        self.postfix.postfix("start");
    }

    /// A message straight to smtp-dup, without Postfix's queue before it. A process that is about
    /// to leave says so behind it.
    #[track_caller]
    pub fn deliver(&self, number: usize) {
        let mut client = Client::ready(self.service());
        let reply = client.message("a@sender.test", &["b@example.com"], &numbered(number));
        assert_eq!(reply.code, 250, "{reply:?}");
        let reply = client.cmd("QUIT");
        assert!([221, 421].contains(&reply.code), "{reply:?}");
        client.closed();
    }

    /// A client of smtp-dup's whose final dot the primary has, and does not answer.
    #[track_caller]
    pub fn in_flight(&self, gate: &Gate) -> Client {
        let mut slow = Client::ready(self.service());
        slow.envelope("a@sender.test", &["b@example.com"]);
        slow.send([numbered(0), b".\r\n".to_vec()].concat());
        gate.wait();
        slow
    }

    /// The two processes, once both are there.
    #[track_caller]
    pub fn parent_and_child(&self) -> (u32, u32) {
        self.program.parent_and_child(self.postfix.master())
    }

    /// The letters up to `count` are at all destinations, each once, and Postfix has never had to
    /// put one off. Stops everything.
    #[track_caller]
    pub fn assert_delivered(&self, count: usize) {
        self.route.wait(count);
        self.postfix.drain();
        self.stop();
        self.route.assert_numbered_by_postfix(count);
        assert_eq!(self.postfix.log(&["status=deferred"]), [""; 0]);
    }

    /// After this nothing can arrive any more.
    #[track_caller]
    pub fn stop(&self) {
        self.postfix.postfix("stop");
        // Transactions and copies have timeout_seconds each, 10; the rest is for a busy machine.
        self.program.wait_gone(Duration::from_secs(60));
    }
}

#[test]
fn the_first_connection_starts_it() {
    if !available() {
        return;
    }
    let hosted = Hosted::start(Route::start());
    assert_eq!(hosted.program.pids(), [0; 0]);
    hosted.submit(0..1);
    let (parent, child) = hosted.parent_and_child();
    assert_eq!(hosted.program.pids().len(), 2);
    // The child is the one that serves.
    let starting = &hosted.postfix.wait_log(1, &["postfix/smtp-dup[", "]: starting smtp-dup "])[0];
    assert!(starting.contains(&format!("/smtp-dup[{child}]: ")), "not {child}: {starting}");
    assert!(starting.contains(&format!("listen={} ", hosted.service())), "{starting}");
    // And it is the same two that serve what comes later.
    hosted.submit(1..2);
    hosted.route.wait(2);
    assert_eq!(hosted.parent_and_child(), (parent, child));
    hosted.assert_delivered(2);
}

#[test]
fn a_thousand_messages() {
    if !available() {
        return;
    }
    let hosted = Hosted::start(Route::start());
    hosted.submit(0..1000);
    hosted.assert_delivered(1000);
}

/// `-s 2`: an entry without an address stands for each of inet_interfaces.
#[test]
fn two_listeners() {
    if !available() {
        return;
    }
    // Machines without IPv6 have more than one address of IPv4.
    let second = if TcpListener::bind("[::1]:0").is_ok() { "::1" } else { "127.0.0.2" };
    let settings = format!("inet_interfaces = 127.0.0.1, [{second}]\ninet_protocols = all");
    let settings = settings.replace("[127.0.0.2]", "127.0.0.2");
    let route = Route::start();
    let folder = route.folder().display().to_string();
    let entry = |address: SocketAddr| {
        let port = address.port();
        format!("{port} inet n - n - 1 smtp-dup user={USER} directory={folder}")
    };
    let setup = Setup { settings: &settings, services: Some(&entry), ..Setup::default() };
    let hosted = Hosted::with(route, setup);
    let port = hosted.service().port();
    for (number, ip) in ["127.0.0.1", second].into_iter().enumerate() {
        let mut client = Client::ready(SocketAddr::new(ip.parse().unwrap(), port));
        let reply = client.message("a@sender.test", &["b@example.com"], &numbered(number));
        assert_eq!(reply.code, 250, "{reply:?}");
    }
    hosted.route.wait(2);
    let starting = &hosted.postfix.wait_log(1, &["]: starting smtp-dup "])[0];
    let other = SocketAddr::new(second.parse().unwrap(), port);
    for listener in [hosted.service(), other] {
        assert!(starting.contains(&listener.to_string()), "no {listener}: {starting}");
    }
}

/// `-v` as an administrator may write it, and `-z` and `-o stress=` as master(8) gives them when
/// there may be more than one process.
#[test]
fn verbose_and_with_several_processes() {
    if !available() {
        return;
    }
    for most in ["-", "0", "5"] {
        let fields = format!("n - n - {most}");
        let hosted = Hosted::entry(Route::start(), &fields, &format!("-v user={USER}"));
        hosted.submit(0..20);
        hosted.postfix.wait_log(1, &["postfix/smtp-dup[", "]: debug: client=127.0.0.1:"]);
        hosted.assert_delivered(20);
    }
}

/// A time in the wakeup field starts it together with Postfix, by a connection that says `W`.
#[test]
fn woken_up() {
    if !available() {
        return;
    }
    let hosted = Hosted::entry(Route::start(), "n - n 3 1", &format!("user={USER}"));
    let first = hosted.parent_and_child();
    hosted.submit(0..1);
    assert_eq!(hosted.parent_and_child(), first);
    hosted.assert_delivered(1);
    assert_eq!(hosted.postfix.log(&["smtp-dup[", "error: "]), [""; 0]);
}

/// Two duplicators with two configurations, each of which only root can read.
#[test]
fn two_services() {
    if !available() {
        return;
    }
    let (route, other) = (Route::start(), Route::start());
    for folder in [route.folder(), other.folder()] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).unwrap();
        let config = folder.join("config.yaml");
        fs::set_permissions(config, fs::Permissions::from_mode(0o600)).unwrap();
    }
    let folders = [route.folder(), other.folder()].map(|folder| folder.display().to_string());
    let second = |first: SocketAddr| SocketAddr::from((Ipv4Addr::new(127, 0, 0, 2), first.port()));
    let entries = |first| {
        let [one, two] = &folders;
        format!(
            "{first} inet n - n - 1 smtp-dup user={USER} directory={one}\n\
             {} inet n - y - 1 smtp-dup user={USER} directory={two}",
            second(first)
        )
    };
    let hosted = Hosted::with(route, Setup { services: Some(&entries), ..Setup::default() });
    hosted.submit(0..5);
    let mut client = Client::ready(second(hosted.service()));
    let reply = client.message("a@sender.test", &["b@example.com"], &numbered(0));
    assert_eq!(reply.code, 250, "{reply:?}");
    drop(client);
    other.wait(1);
    hosted.program.wait_pids(4);
    hosted.assert_delivered(5);
    other.assert_numbered(1);
}

#[test]
fn postfix_check_has_nothing_to_say() {
    if !available() {
        return;
    }
    let hosted = Hosted::start(Route::start());
    hosted.submit(0..1);
    hosted.route.wait(1);
    let before = hosted.postfix.log(&[""]).len();
    assert_eq!(hosted.postfix.postfix("check"), "");
    let log = hosted.postfix.log(&[""]);
    let said = log[before..].iter().filter(|line| line.contains("postfix-script"));
    assert_eq!(said.collect::<Vec<_>>(), [""; 0]);
}

/// Without maillog_file the log is that of the whole machine.
#[test]
fn without_a_log_file_it_logs_to_syslog() {
    if !can_run(&["postfix", "unshare"]) {
        return;
    }
    for chroot in ["n", "y"] {
        let syslog = Syslog::start();
        let route = Route::start();
        let folder = route.folder().display().to_string();
        let entry = |address| {
            format!("{address} inet n - {chroot} - 1 smtp-dup user={USER} directory={folder}")
        };
        let setup = Setup {
            settings: "maillog_file =",
            services: Some(&entry),
            prefix: syslog.prefix(),
            ..Setup::default()
        };
        let hosted = Hosted::with(route, setup);
        hosted.submit(0..1);
        hosted.route.wait(1);
        let (_, child) = hosted.parent_and_child();
        // <22>: facility mail, level info.
        let line = syslog.wait("]: starting smtp-dup ");
        assert!(line.starts_with(&format!("<22>postfix/smtp-dup[{child}]: ")), "{line}");
        syslog.wait("role=backup delay=");
    }
}

/// The child that a signal of Postfix's reaches through the process group is not the only one: an
/// administrator may mean the parent, whom master(8) knows.
#[test]
fn the_parent_s_end_is_known_to_master() {
    if !available() {
        return;
    }
    let hosted = Hosted::start(Route::start());
    hosted.submit(0..1);
    let (parent, child) = hosted.parent_and_child();
    assert_eq!(parent_of(parent), Some(hosted.postfix.master()));
    assert!(kill("TERM", parent));
    wait_until("both gone", || {
        !hosted.program.pids().iter().any(|pid| [parent, child].contains(pid))
    });
    hosted.submit(1..2);
    hosted.assert_delivered(2);
}

/// A thousand at once, by Postfix's own generator, straight to smtp-dup.
#[test]
fn a_thousand_from_smtp_source() {
    if !can_run(&["postfix", "smtp-source"]) {
        return;
    }
    let hosted = Hosted::start(Route::start());
    let mut source = command("smtp-source");
    source.args(["-m", "1000", "-s", "20", "-l", "3000", "-f", "a@sender.test"]);
    source.args(["-t", "b@example.com"]).arg(format!("inet:{}", hosted.service()));
    let output = source.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    hosted.route.wait(1000);
    hosted.stop();
    let [primary, first, second] = hosted.route.sinks.each_ref().map(|sink| {
        let mut messages: Vec<_> = sink.messages().into_iter().map(|m| m.data).collect();
        messages.sort_unstable();
        messages
    });
    assert_eq!(primary.len(), 1000);
    assert!(primary == first && primary == second, "the copies differ");
}
