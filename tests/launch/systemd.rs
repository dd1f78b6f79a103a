//! systemd's sockets, by way of systemd-socket-activate, which passes them as systemd does; what
//! it is told by sd_notify(3), and what its journal is sent.

use std::fs;
use std::net::SocketAddr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixDatagram};
use std::process::Command;
use std::time::Duration;

use crate::common::{BOUND, Client, Dup, Signal};
use crate::instance::{can_run, command, free_address};
use crate::one_session::{self, Service};
use crate::program::{Launcher, Program, assert_runs_as, kill};
use crate::{Route, USER, numbered};

const ACTIVATE: &str = "systemd-socket-activate";

/// Runs a test with systemd-socket-activate and these options.
#[track_caller]
fn activated(options: &[&str], test: impl FnOnce(&Service)) {
    if !can_run(&[ACTIVATE]) {
        return;
    }
    let (route, program) = (Route::start(), Program::copy());
    let prepare = |address: SocketAddr| {
        let mut command = command(ACTIVATE);
        command.args(["-l", &address.to_string()]).args(options);
        run(&mut command, &program, &route);
        command
    };
    let (launcher, address) = Launcher::listening(prepare);
    let log = || launcher.log();
    test(&Service { address, route: &route, program: &program, log: &log });
}

/// The command that is to be launched, which drops root by itself.
fn run(command: &mut Command, program: &Program, route: &Route) {
    command.arg(program.path()).arg("--config").arg(route.config_file()).args(["--user", USER]);
}

/// One process with the listening socket, which serves all that come.
#[track_caller]
fn serves_all(service: &Service) {
    let mut clients: Vec<_> = (0..5).map(|_| Client::ready(service.address)).collect();
    for (number, client) in clients.iter_mut().enumerate() {
        let reply = client.message("a@sender.test", &["b@example.com"], &numbered(number));
        assert_eq!(reply.code, 250, "{reply:?}");
    }
    let pids = service.program.wait_pids(1);
    assert_runs_as(pids[0], USER, USER);
    service.route.wait(5);
    assert!(kill("TERM", pids[0]));
    service.program.wait_gone(Duration::from_secs(20));
    service.route.assert_numbered(5);
}

/// Accept=no.
#[test]
fn listening_socket() {
    activated(&[], serves_all);
}

/// Accept=no with several sockets of one unit.
#[test]
fn several_listening_sockets() {
    if !can_run(&[ACTIVATE]) {
        return;
    }
    let (route, program) = (Route::start(), Program::copy());
    let other = free_address();
    let prepare = |address: SocketAddr| {
        let mut command = command(ACTIVATE);
        command.args(["-l", &address.to_string(), "-l", &other.to_string()]);
        run(&mut command, &program, &route);
        command
    };
    let (launcher, address) = Launcher::listening(prepare);
    for (number, address) in [other, address, other].into_iter().enumerate() {
        let mut client = Client::ready(address);
        let reply = client.message("a@sender.test", &["b@example.com"], &numbered(number));
        assert_eq!(reply.code, 250, "{reply:?}");
    }
    let starting = launcher.wait_log("starting smtp-dup ");
    assert!(starting.contains(&format!("listen={address},{other} ")), "{starting}");
    route.wait(3);
    assert_eq!(program.pids().len(), 1);
}

/// Accept=yes: fd 3 is the connection.
#[test]
fn connection() {
    activated(&["--accept"], |service| one_session::many_at_once(service, 50));
}

#[test]
fn connection_and_a_mistake() {
    activated(&["--accept"], |service| one_session::a_mistake_is_421(service));
}

#[test]
fn connection_and_a_silent_backup() {
    activated(&["--accept"], |service| one_session::a_silent_backup_keeps_nobody(service));
}

#[test]
fn connection_and_the_log() {
    activated(&["--accept"], |service| one_session::the_log_is_not_on_the_wire(service));
}

/// StandardInput=socket with Accept=yes: as inetd's nowait.
#[test]
fn connection_as_standard_input() {
    activated(&["--accept", "--inetd"], |service| one_session::many_at_once(service, 50));
}

/// StandardInput=socket with Accept=no: as inetd's wait.
#[test]
fn listening_socket_as_standard_input() {
    activated(&["--inetd"], serves_all);
}

/// Sockets that are somebody else's, as those of a process that was started by the one meant.
#[test]
fn sockets_of_another_process_are_left_alone() {
    let primary = crate::common::Sink::start();
    let yaml = crate::common::config(primary.addr(), &[], "", "");
    let others = |command: &mut Command| {
        command.env("LISTEN_PID", "1").env("LISTEN_FDS", "1");
    };
    let dup = Dup::start_with(others, &yaml);
    Client::ready(dup.addr());
}

/// Type=notify: told when clients can come, and when no more can. Both kinds of sockets.
#[test]
fn it_notifies() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    let name = format!("smtp-dup-test-{}", std::process::id());
    let named = UnixAddress::from_abstract_name(&name).unwrap();
    for (socket, variable) in [
        (UnixDatagram::bind(&path).unwrap(), path.to_str().unwrap().to_owned()),
        (UnixDatagram::bind_addr(&named).unwrap(), format!("@{name}")),
    ] {
        socket.set_read_timeout(Some(BOUND)).unwrap();
        let primary = crate::common::Sink::start();
        let yaml = crate::common::config(primary.addr(), &[], "", "");
        let prepare = |command: &mut Command| {
            command.env("NOTIFY_SOCKET", &variable);
        };
        let dup = Dup::start_with(prepare, &yaml);
        assert!(heard(&socket).lines().any(|line| line == "READY=1"));
        Client::ready(dup.addr()).expect("QUIT", 221);
        dup.signal(Signal::Term);
        assert!(heard(&socket).lines().any(|line| line == "STOPPING=1"));
        assert!(dup.wait_exit(BOUND).success());
    }
}

#[track_caller]
fn heard(socket: &UnixDatagram) -> String {
    let mut octets = [0; 4096];
    let count = socket.recv(&mut octets).unwrap();
    String::from_utf8_lossy(&octets[..count]).into_owned()
}

/// The journal has the time by itself, and takes the level from the line.
#[test]
fn the_journal_gets_priorities() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal");
    let file = fs::File::create(&path).unwrap();
    let of_file = file.metadata().unwrap();
    let primary = crate::common::Sink::refusing(Default::default());
    let yaml = crate::common::config(primary.addr(), &[], "listen: \"127.0.0.1:0\"", "");
    let config = folder.path().join("test.yaml");
    fs::write(&config, yaml).unwrap();
    let mut command = Command::new(crate::program::binary());
    command.arg("--config").arg(config).current_dir(folder.path()).stderr(file);
    command.env("JOURNAL_STREAM", format!("{}:{}", of_file.dev(), of_file.ino()));
    let mut child = command.spawn().unwrap();
    let said = || fs::read_to_string(&path).unwrap();
    let is_there = || said().lines().any(|line| line.starts_with("<6>starting smtp-dup "));
    let mut ended = false;
    crate::common::wait_until("the first line, or the end", || {
        ended = child.try_wait().unwrap().is_some();
        is_there() || ended
    });
    let text = said();
    let address = text.split("listen=").nth(1).and_then(|rest| rest.split(' ').next());
    let address = address.and_then(|text| text.parse().ok());
    if let Some(address) = address {
        let mut client = Client::greeted(address);
        assert_eq!(client.cmd("EHLO client.example").code, 421);
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let lines = said();
    assert!(lines.lines().any(|line| line.starts_with("<6>starting smtp-dup ")), "{lines}");
    assert!(lines.lines().any(|line| line.starts_with("<3>error: relay=")), "{lines}");
}
