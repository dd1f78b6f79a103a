//! systemd's sockets, by way of systemd-socket-activate, which passes them as systemd does; what
//! it is told by sd_notify(3), and what its journal is sent.

use std::fs;
use std::net::{Ipv6Addr, SocketAddr, TcpListener};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixDatagram};
use std::process::Command;
use std::time::Duration;

use crate::common::{BOUND, Client, Dup, Signal, Sink, config, wait_until};
use crate::instance::{can_run, command, free_address};
use crate::one_session::{self, Service};
use crate::program::{Launcher, Program, assert_runs_as, binary, kill};
use crate::{Route, USER, numbered, write_config};

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

/// ListenStream= with a port alone is a socket of IPv6 that takes IPv4, too, whose clients then
/// look foreign.
#[test]
fn sockets_for_both_families() {
    if TcpListener::bind("[::1]:0").is_err() || !can_run(&[ACTIVATE]) {
        return;
    }
    for accept in [false, true] {
        let (route, program) = (Route::start(), Program::copy());
        let prepare = |address: SocketAddr| {
            let mut command = command(ACTIVATE);
            command.args(["-l", &address.port().to_string()]);
            command.args(accept.then_some("--accept"));
            run(&mut command, &program, &route);
            command
        };
        let (_launcher, address) = Launcher::listening(prepare);
        let ipv6 = SocketAddr::from((Ipv6Addr::LOCALHOST, address.port()));
        for (number, address) in [address, ipv6].into_iter().enumerate() {
            let mut client = Client::ready(address);
            let reply = client.message("a@sender.test", &["b@example.com"], &numbered(number));
            assert_eq!(reply.code, 250, "{reply:?}");
        }
        route.wait(2);
    }
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
    let primary = Sink::start();
    let others = |command: &mut Command| {
        command.env("LISTEN_PID", "1").env("LISTEN_FDS", "1");
    };
    let dup = Dup::start_with(others, &config(primary.addr(), &[], "", ""));
    Client::ready(dup.addr());
}

/// Type=notify: told when clients can come, and when no more can.
#[test]
fn it_notifies() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("notify");
    assert_notifies(&UnixDatagram::bind(&path).unwrap(), path.to_str().unwrap());
}

/// The other kind of socket that sd_notify(3) knows.
#[test]
fn it_notifies_an_abstract_socket() {
    let name = format!("smtp-dup-test-{}", std::process::id());
    let address = UnixAddress::from_abstract_name(&name).unwrap();
    assert_notifies(&UnixDatagram::bind_addr(&address).unwrap(), &format!("@{name}"));
}

#[track_caller]
fn assert_notifies(socket: &UnixDatagram, variable: &str) {
    socket.set_read_timeout(Some(BOUND)).unwrap();
    let primary = Sink::start();
    let prepare = |command: &mut Command| {
        command.env("NOTIFY_SOCKET", variable);
    };
    let dup = Dup::start_with(prepare, &config(primary.addr(), &[], "", ""));
    assert!(heard(socket).lines().any(|line| line == "READY=1"));
    Client::ready(dup.addr()).expect("QUIT", 221);
    dup.signal(Signal::Term);
    assert!(heard(socket).lines().any(|line| line == "STOPPING=1"));
    assert!(dup.wait_exit(BOUND).success());
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
    let journal = fs::File::create(&path).unwrap();
    let of_file = journal.metadata().unwrap();
    let primary = Sink::refusing(Default::default());
    write_config(folder.path(), &config(primary.addr(), &[], "", ""));
    let mut command = Command::new(binary());
    command.current_dir(folder.path()).stderr(journal);
    command.env("JOURNAL_STREAM", format!("{}:{}", of_file.dev(), of_file.ino()));
    let mut child = command.spawn().unwrap();
    let said = || fs::read_to_string(&path).unwrap();
    let line = |start: &str| said().lines().find(|line| line.starts_with(start)).map(String::from);
    wait_until("<6>starting", || line("<6>starting smtp-dup ").is_some());
    let starting = line("<6>starting").unwrap();
    let address = starting.split("listen=").nth(1).unwrap().split(' ').next().unwrap();
    Client::greeted(address.parse().unwrap()).expect("EHLO client.example", 421);
    wait_until("<3>error", || line("<3>error: relay=").is_some());
    child.kill().unwrap();
    child.wait().unwrap();
}
