//! The files of `etc/` as an administrator takes them: each is loaded into a real Postfix, inetd
//! or systemd-socket-activate, and mail goes through. `tests/docs.rs` sees to it that README and
//! manual show these files.
//!
//! A test has no /etc/smtp-dup and no user smtp-dup, and other ports are free each time: those
//! words are exchanged for the test's own, and nothing else is.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::common::{Client, Sink};
use crate::instance::{Postfix, Setup, can_run, command, free_address};
use crate::letters::submit;
use crate::program::{Launcher, Program, assert_runs_as, binary};
use crate::syslog::Syslog;
use crate::{Route, USER, numbered};

/// What the words of a snippet are exchanged for.
struct Here<'a> {
    /// For `127.0.0.1:2525`.
    service: SocketAddr,
    /// For `/etc/smtp-dup`.
    folder: &'a Path,
    /// For `/usr/local/bin/smtp-dup`.
    program: &'a Path,
    /// Further pairs, longest first.
    others: Vec<(String, String)>,
}

impl Here<'_> {
    /// A file of `etc/`, fit for this place.
    fn snippet(&self, name: &str) -> String {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("etc").join(name);
        let mut text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{name}: {e}"));
        for (from, to) in &self.others {
            text = text.replace(from, to);
        }
        text.replace("/usr/local/bin/smtp-dup", &self.program.display().to_string())
            .replace("/etc/smtp-dup", &self.folder.display().to_string())
            .replace("user=smtp-dup", &format!("user={USER}"))
            .replace("127.0.0.1]:2525", &format!("127.0.0.1]:{}", self.service.port()))
            .replace("127.0.0.1:2525", &self.service.to_string())
    }
}

/// A program that runs smtp-dup with the configuration of a route, for snippets that rely on the
/// one in /etc. It is the same process afterwards.
fn with_config(route: &Route, program: &Program) -> PathBuf {
    let path = route.folder().join("smtp-dup");
    let (program, config) = (program.path().display(), route.config_file());
    let script = format!("#!/bin/sh\nexec {program} --config {} \"$@\"\n", config.display());
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Lets a running Postfix have these transports, as an administrator would.
#[track_caller]
fn use_transports(postfix: &Postfix, settings: &str, transports: &str) {
    let etc = postfix.path("etc");
    fs::write(etc.join("transport"), transports).unwrap();
    // Where it is not the snippet that says so, the map is the text itself.
    let settings = settings.replace("/etc/postfix", &etc.display().to_string());
    if settings.contains("hash:") {
        let map = format!("hash:{}", etc.join("transport").display());
        assert!(command("postmap").arg(map).status().unwrap().success());
    }
    // In place of the line that the instance began with, which Postfix would warn of.
    let main_cf = fs::read_to_string(etc.join("main.cf")).unwrap();
    let is_left = |line: &&str| !(settings.contains("hash:") && line.starts_with("transport_maps"));
    let left = main_cf.lines().filter(is_left).collect::<Vec<_>>().join("\n");
    fs::write(etc.join("main.cf"), format!("{left}\n{settings}")).unwrap();
    assert_eq!(postfix.postfix("check"), "");
    postfix.postfix("reload");
}

/// A Postfix whose master.cf has these snippets, with smtp-dup beside its daemons.
#[track_caller]
fn postfix_with(route: &Route, files: &[&str]) -> (Postfix, Program) {
    let services = |service| {
        let folder = route.folder();
        let here = Here { service, folder, program: binary(), others: Vec::new() };
        files.iter().map(|file| here.snippet(file)).collect::<Vec<_>>().join("")
    };
    let setup = Setup { services: Some(&services), daemon: Some(binary()), ..Setup::default() };
    let postfix = Postfix::hosting(setup);
    let program = Program::at(postfix.path("libexec/smtp-dup"));
    (postfix, program)
}

/// The snippets of main.cf and of a transport map, for that Postfix.
#[track_caller]
fn transports(postfix: &Postfix, settings: &[&str], map: &str) {
    let folder = Path::new("/nonexistent");
    let here = Here { service: postfix.next_hop, folder, program: folder, others: Vec::new() };
    let settings: String = settings.iter().map(|file| here.snippet(file)).collect();
    use_transports(postfix, &settings, &here.snippet(map));
}

/// Sends a letter to each of these recipients, and makes sure that all come through smtp-dup, by
/// the transport of its name.
#[track_caller]
fn come_through(postfix: &Postfix, route: &Route, recipients: &[&str]) {
    for (number, to) in recipients.iter().enumerate() {
        submit(postfix, "<a@sender.test>", &[&format!("<{to}>")], &numbered(number));
    }
    route.wait(recipients.len());
    postfix.drain();
    route.assert_numbered_by_postfix(recipients.len());
    assert_eq!(postfix.log(&["status=deferred"]), [""; 0]);
}

/// Mail to this address does not come through smtp-dup: Postfix has no other transport here, and
/// says so.
#[track_caller]
fn takes_another_way(postfix: &Postfix, to: &str) {
    let mut client = Client::ready(postfix.address);
    client.expect("MAIL FROM:<a@sender.test>", 250);
    let reply = client.cmd(&format!("RCPT TO:<{to}>"));
    assert!(reply.code == 550 && format!("{reply:?}").contains("no transport entry"), "{reply:?}");
}

const TRANSPORT: [&str; 1] = ["postfix/transport.main.cf"];

/// Everything of the recommended way together.
#[test]
fn the_permanent_service_its_transport_and_a_domain() {
    if !can_run(&["postfix"]) {
        return;
    }
    let route = Route::start();
    let files = ["postfix/service.master.cf", "postfix/transport.master.cf"];
    let (postfix, program) = postfix_with(&route, &files);
    transports(&postfix, &TRANSPORT, "postfix/domain.transport");
    come_through(&postfix, &route, &["b@example.com", "b@sub.example.com"]);
    let (parent, child) = program.parent_and_child(postfix.master());
    for pid in [parent, child] {
        assert_runs_as(pid, USER, USER);
    }
    // The transport's own name in the log, and both programs' words for the same message.
    assert_eq!(postfix.wait_log(2, &["postfix/smtp-dup/smtp[", "status=sent"]).len(), 2);
    assert_eq!(postfix.wait_log(2, &["postfix/smtp-dup[", "role=primary", "status=sent"]).len(), 2);
}

/// The service's variants, each with Postfix's own transport.
#[track_caller]
fn the_service(file: &str, check: impl FnOnce(&Program, u32)) {
    if !can_run(&["postfix"]) {
        return;
    }
    let route = Route::start();
    let (postfix, program) = postfix_with(&route, &[file]);
    transports(&postfix, &[], "postfix/plain.transport");
    come_through(&postfix, &route, &["b@example.com", "b@sub.example.com"]);
    let (_, child) = program.parent_and_child(postfix.master());
    check(&program, child);
}

#[test]
fn the_service_as_postfix_s_user() {
    the_service("postfix/service-user-postfix.master.cf", |_, child| {
        assert_runs_as(child, "postfix", "postfix");
    });
}

#[test]
fn the_service_in_a_chroot() {
    the_service("postfix/service-chroot.master.cf", |_, child| {
        let root = fs::read_link(format!("/proc/{child}/root")).unwrap();
        assert!(root.ends_with("spool"), "{}", root.display());
    });
}

#[test]
fn single_recipients() {
    if !can_run(&["postfix"]) {
        return;
    }
    let route = Route::start();
    let files = ["postfix/service.master.cf", "postfix/transport.master.cf"];
    let (postfix, _program) = postfix_with(&route, &files);
    transports(&postfix, &TRANSPORT, "postfix/user.transport");
    come_through(&postfix, &route, &["newsletter@example.com", "alerts@example.com"]);
    // Others of the domain are not meant.
    takes_another_way(&postfix, "c@example.com");
}

#[test]
fn a_domain_for_tests() {
    if !can_run(&["postfix"]) {
        return;
    }
    let route = Route::start();
    let files = ["postfix/service.master.cf", "postfix/transport.master.cf"];
    let (postfix, _program) = postfix_with(&route, &files);
    transports(&postfix, &TRANSPORT, "postfix/test-domain.transport");
    come_through(&postfix, &route, &["b@test.example.com"]);
    takes_another_way(&postfix, "c@example.com");
}

#[test]
fn all_mail() {
    if !can_run(&["postfix"]) {
        return;
    }
    let route = Route::start();
    let files = ["postfix/service.master.cf", "postfix/transport.master.cf"];
    let (postfix, _program) = postfix_with(&route, &files);
    transports(&postfix, &TRANSPORT, "postfix/all.transport");
    come_through(&postfix, &route, &["b@example.com", "b@anywhere.example"]);
    // The host's own domain is not meant.
    takes_another_way(&postfix, "c@localhost");
}

#[test]
fn a_process_a_connection() {
    if !can_run(&["postfix", "unshare"]) {
        return;
    }
    let (route, program, syslog) = (Route::start(), Program::copy(), Syslog::start());
    let script = with_config(&route, &program);
    let services = |service| {
        let here = Here { service, folder: route.folder(), program: &script, others: Vec::new() };
        here.snippet("postfix/spawn.master.cf")
    };
    let prefix = syslog.prefix();
    let postfix = Postfix::hosting(Setup { services: Some(&services), prefix, ..Setup::default() });
    transports(&postfix, &[], "postfix/plain.transport");
    come_through(&postfix, &route, &["b@example.com", "b@sub.example.com"]);
    assert!(!syslog.lines("smtp-dup[").is_empty());
}

#[test]
fn two_duplicators() {
    if !can_run(&["postfix"]) {
        return;
    }
    let (first, second) = (Route::start(), Route::start());
    let other = free_address();
    let others = || {
        vec![
            ("/etc/smtp-dup2".to_string(), second.folder().display().to_string()),
            ("127.0.0.1]:2526".into(), format!("127.0.0.1]:{}", other.port())),
            ("127.0.0.1:2526".into(), other.to_string()),
        ]
    };
    let here =
        |service| Here { service, folder: first.folder(), program: binary(), others: others() };
    let services = |service| {
        let files = ["service", "transport", "second"];
        let all = files.map(|file| here(service).snippet(&format!("postfix/{file}.master.cf")));
        all.join("")
    };
    let setup = Setup { services: Some(&services), daemon: Some(binary()), ..Setup::default() };
    let postfix = Postfix::hosting(setup);
    let _program = Program::at(postfix.path("libexec/smtp-dup"));
    let here = here(postfix.next_hop);
    let settings = ["postfix/transport.main.cf", "postfix/second.main.cf"];
    let settings: String = settings.iter().map(|file| here.snippet(file)).collect();
    use_transports(&postfix, &settings, &here.snippet("postfix/second.transport"));
    submit(&postfix, "<a@sender.test>", &["<b@internal.example>"], &numbered(0));
    first.wait(1);
    submit(&postfix, "<a@sender.test>", &["<b@external.example>"], &numbered(0));
    second.wait(1);
    postfix.drain();
    first.assert_numbered_by_postfix(1);
    second.assert_numbered_by_postfix(1);
    postfix.wait_log(1, &["postfix/smtp-dup2/smtp[", "status=sent"]);
}

/// Nobody listens where the duplicator should: the mail takes the fallback, and no copy is made.
#[test]
fn the_fallback() {
    if !can_run(&["postfix"]) {
        return;
    }
    let (route, old) = (Route::start(), Sink::start());
    let services = |service| {
        let to = format!("[{}]:{}", old.addr().ip(), old.addr().port());
        let others = vec![("[oldmail.example.com]:25".to_string(), to)];
        let here = Here { service, folder: route.folder(), program: binary(), others };
        here.snippet("postfix/fallback.master.cf")
    };
    let postfix = Postfix::hosting(Setup { services: Some(&services), ..Setup::default() });
    transports(&postfix, &TRANSPORT, "postfix/domain.transport");
    submit(&postfix, "<a@sender.test>", &["<b@example.com>"], &numbered(0));
    crate::letters::wait_count(&old, 1);
    postfix.drain();
    route.sinks.iter().for_each(|sink| assert_eq!(sink.messages().len(), 0));
}

#[test]
fn the_line_of_inetd() {
    if !can_run(&["inetd", "unshare"]) {
        return;
    }
    let (route, program, syslog) = (Route::start(), Program::copy(), Syslog::start());
    let script = with_config(&route, &program);
    let prepare = |service: SocketAddr| {
        // In this file the user is a field.
        let others = vec![(" smtp-dup /usr".to_string(), format!(" {USER} /usr"))];
        let here = Here { service, folder: route.folder(), program: &script, others };
        let file = route.folder().join("inetd.conf");
        fs::write(&file, here.snippet("inetd.conf")).unwrap();
        let mut command = syslog.command("inetd");
        command.arg("-i").arg(file);
        command
    };
    let (_inetd, address) = Launcher::listening(prepare);
    let mut client = Client::ready(address);
    assert_runs_as(program.wait_pids(1)[0], USER, USER);
    let reply = client.message("a@sender.test", &["b@example.com"], &numbered(0));
    assert_eq!(reply.code, 250, "{reply:?}");
    client.expect("QUIT", 221);
    client.closed();
    route.wait(1);
    route.assert_numbered(1);
}

/// The command of a unit, started with the sockets of another, as systemd would.
#[track_caller]
fn the_units(socket: &str, service: &str, accept: bool) {
    if !can_run(&["systemd-socket-activate"]) {
        return;
    }
    let (route, program) = (Route::start(), Program::copy());
    let value = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        line.unwrap_or_else(|| panic!("no {name}: {text}")).to_string()
    };
    let prepare = |address| {
        let folder = route.folder();
        let here = Here { service: address, folder, program: program.path(), others: Vec::new() };
        let socket = here.snippet(&format!("systemd/{socket}"));
        let service = here.snippet(&format!("systemd/{service}"));
        assert_eq!(value(&socket, "Accept"), if accept { "yes" } else { "no" });
        let mut command = command("systemd-socket-activate");
        command.args(["-l", &value(&socket, "ListenStream")]);
        command.args(accept.then_some("--accept"));
        // The unit's User=, which takes a systemd.
        assert_eq!(value(&service, "User"), "smtp-dup");
        // Behind the program, for the word inetd goes last.
        let exec = value(&service, "ExecStart");
        let (program, words) = exec.split_once(' ').unwrap();
        command.args([program, "--user", USER]).args(words.split(' '));
        command
    };
    let (_launcher, address) = Launcher::listening(prepare);
    let mut client = Client::ready(address);
    assert_runs_as(program.wait_pids(1)[0], USER, USER);
    let reply = client.message("a@sender.test", &["b@example.com"], &numbered(0));
    assert_eq!(reply.code, 250, "{reply:?}");
    client.expect("QUIT", 221);
    client.closed();
    route.wait(1);
    route.assert_numbered(1);
}

#[test]
fn the_units_of_the_service() {
    the_units("smtp-dup.socket", "smtp-dup.service", false);
}

#[test]
fn the_units_of_a_process_a_connection() {
    the_units("smtp-dup-inetd.socket", "smtp-dup-inetd@.service", true);
}
