//! inetd and tcpserver. inetd's `nowait` and tcpserver start a process for each connection,
//! inetd's `wait` one that gets the listening socket. inetd gives fd 2 away as well, tcpserver
//! keeps it.

use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use crate::common::{Client, wait_until};
use crate::instance::{Postfix, can_run, command};
use crate::letters::submit;
use crate::one_session::{self, Service};
use crate::program::{Launcher, Program, assert_runs_as, kill, user_and_group};
use crate::spawn::assert_tagged;
use crate::syslog::Syslog;
use crate::{Gate, Route, USER, numbered};

/// Runs a test with an inetd that starts smtp-dup. `kind` is its `wait` or `nowait`, `words` are
/// for smtp-dup.
#[track_caller]
pub fn inetd(route: Route, kind: &str, words: &str, test: impl FnOnce(&Service, &Syslog)) {
    if !can_run(&["inetd", "unshare"]) {
        return;
    }
    let (program, syslog) = (Program::copy(), Syslog::start());
    let (path, config) = (program.path().display(), route.config_file());
    let prepare = |address: SocketAddr| {
        let (ip, port) = (address.ip(), address.port());
        let line = format!(
            "{ip}:{port} stream tcp4 {kind} {USER} {path} smtp-dup --config {} {words}\n",
            config.display()
        );
        let file = route.folder().join("inetd.conf");
        fs::write(&file, line).unwrap();
        let mut command = syslog.command("inetd");
        command.args(["-i", "-q", "250"]).arg(file);
        command
    };
    let (_inetd, address) = Launcher::listening(prepare);
    let log = || syslog.lines("").join("\n");
    test(&Service { address, route: &route, program: &program, log: &log }, &syslog);
    assert_tagged(&syslog);
}

/// inetd's default of 256 starts a minute would do, just.
#[track_caller]
fn nowait(test: impl FnOnce(&Service)) {
    inetd(Route::start(), "nowait.1000", "inetd", |service, _| test(service));
}

/// Runs a test with a tcpserver that starts smtp-dup, which sees by itself what it has got.
#[track_caller]
fn tcpserver(test: impl FnOnce(&Service)) {
    if !can_run(&["tcpserver"]) {
        return;
    }
    let (route, program) = (Route::start(), Program::copy());
    let (uid, gid) = user_and_group(USER);
    let prepare = |address: SocketAddr| -> Command {
        let mut command = command("tcpserver");
        // No look-ups of names, and no questions to the client's identd.
        command.args(["-RHl0", "-c", "250", "-b", "250"]);
        command.args(["-u", &uid.to_string(), "-g", &gid.to_string()]);
        command.args([address.ip().to_string(), address.port().to_string()]);
        command.arg(program.path()).arg("--config").arg(route.config_file());
        command
    };
    let (tcpserver, address) = Launcher::listening(prepare);
    let log = || tcpserver.log();
    test(&Service { address, route: &route, program: &program, log: &log });
}

/// Mail from Postfix, which keeps its connections.
#[track_caller]
fn from_postfix(service: &Service) {
    let postfix = Postfix::start(service.address, "");
    for number in 0..20 {
        submit(&postfix, "<a@sender.test>", &["<b@example.com>"], &numbered(number));
    }
    postfix.wait_removed(20);
    service.route.wait(20);
    assert_eq!(postfix.log(&["status=deferred"]), [""; 0]);
}

/// Whatever kind of socket it is, nothing but SMTP goes to whoever is at its other end.
#[test]
fn a_unix_socket_hears_nothing() {
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixStream;
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let copy = || std::process::Stdio::from(OwnedFd::from(theirs.try_clone().unwrap()));
    let mut command = Command::new(crate::program::binary());
    command.arg("inetd").stdin(copy()).stdout(copy()).stderr(copy());
    let mut child = command.spawn().unwrap();
    drop((command, theirs));
    let mut heard = String::new();
    ours.read_to_string(&mut heard).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(2));
    assert_eq!(heard, "");
}

#[test]
fn mail_through_inetd() {
    if can_run(&["postfix"]) {
        nowait(|service| {
            from_postfix(service);
            service.program.wait_gone(Duration::from_secs(60));
            service.route.assert_numbered_by_postfix(20);
        });
    }
}

#[test]
fn two_hundred_at_once_through_inetd() {
    nowait(|service| one_session::many_at_once(service, 200));
}

#[test]
fn inetd_s_client_hears_no_log() {
    nowait(|service| one_session::the_log_is_not_on_the_wire(service));
}

#[test]
fn a_circle_through_inetd() {
    nowait(|service| one_session::a_circle_is_seen(service));
}

#[test]
fn a_mistake_is_421_to_inetd_s_client() {
    nowait(|service| one_session::a_mistake_is_421(service));
}

#[test]
fn a_silent_backup_keeps_nobody_at_inetd() {
    nowait(|service| one_session::a_silent_backup_keeps_nobody(service));
}

#[test]
fn a_client_that_leaves_inetd() {
    nowait(|service| one_session::a_client_that_leaves(service));
}

#[test]
fn a_signal_does_not_cut_a_transaction() {
    let gate = Gate::default();
    inetd(Route::behind(&gate), "nowait", "inetd", |service, _| {
        one_session::a_signal_does_not_cut(service, &gate);
    });
}

/// Nobody waits for a client that has nothing to say.
#[test]
fn a_signal_ends_an_idle_session() {
    nowait(|service| {
        let mut client = Client::ready(service.address);
        assert!(kill("TERM", service.program.wait_pids(1)[0]));
        client.expect_reply(421);
        client.closed();
        service.program.wait_gone(Duration::from_secs(5));
    });
}

/// Without the word `inetd`: it sees the socket. One client needs one thread, until there is a
/// copy to send.
#[test]
fn a_connected_socket_is_seen() {
    inetd(Route::start(), "nowait", "", |service, _| {
        let mut client = Client::ready(service.address);
        let pid = service.program.wait_pids(1)[0];
        assert_runs_as(pid, USER, USER);
        assert_eq!(fs::read_dir(format!("/proc/{pid}/task")).unwrap().count(), 1);
        let reply = client.message("a@sender.test", &["b@example.com"], &numbered(0));
        assert_eq!(reply.code, 250, "{reply:?}");
        client.expect("QUIT", 221);
        client.closed();
        service.route.wait(1);
        service.program.wait_gone(Duration::from_secs(20));
    });
}

/// One process takes all connections until it is told to end; inetd starts the next one then.
#[test]
fn inetd_wait() {
    inetd(Route::start(), "wait", "", |service, _| {
        for number in 0..3 {
            let mut client = Client::ready(service.address);
            let reply = client.message("a@sender.test", &["b@example.com"], &numbered(number));
            assert_eq!(reply.code, 250, "{reply:?}");
        }
        let first = service.program.wait_pids(1)[0];
        assert_runs_as(first, USER, USER);
        service.route.wait(3);
        assert!(kill("TERM", first));
        wait_until("its end", || !service.program.pids().contains(&first));
        let mut client = Client::ready(service.address);
        let reply = client.message("a@sender.test", &["b@example.com"], &numbered(3));
        assert_eq!(reply.code, 250, "{reply:?}");
        service.route.wait(4);
        assert!(kill("TERM", service.program.wait_pids(1)[0]));
        service.program.wait_gone(Duration::from_secs(20));
        service.route.assert_numbered(4);
    });
}

/// The same two hundred, who find one process.
#[test]
fn two_hundred_at_once_with_inetd_wait() {
    inetd(Route::start(), "wait", "", |service, _| {
        service.route.configure("max_connections: 250", "");
        let end = std::thread::scope(|scope| {
            let end = scope.spawn(|| {
                // The process has to be ended by a signal, once all is there.
                service.route.wait(200);
                for pid in service.program.pids() {
                    assert!(kill("TERM", pid));
                }
            });
            one_session::many_at_once(service, 200);
            end.join()
        });
        end.unwrap();
    });
}

#[test]
fn mail_through_tcpserver() {
    if can_run(&["postfix"]) {
        tcpserver(|service| {
            from_postfix(service);
            service.program.wait_gone(Duration::from_secs(60));
            service.route.assert_numbered_by_postfix(20);
        });
    }
}

#[test]
fn two_hundred_at_once_through_tcpserver() {
    tcpserver(|service| one_session::many_at_once(service, 200));
}

#[test]
fn tcpserver_s_client_hears_no_log() {
    tcpserver(|service| one_session::the_log_is_not_on_the_wire(service));
}

#[test]
fn a_mistake_is_421_to_tcpserver_s_client() {
    tcpserver(|service| one_session::a_mistake_is_421(service));
}

#[test]
fn a_silent_backup_keeps_nobody_at_tcpserver() {
    tcpserver(|service| one_session::a_silent_backup_keeps_nobody(service));
}
