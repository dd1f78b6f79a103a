//! Logs that are not there, or not read, hold nobody up; and nobody logs to the client.

use std::time::{Duration, Instant};

use crate::common::{Client, wait_until};
use crate::inetd::inetd;
use crate::instance::can_run;
use crate::one_session::Service;
use crate::program::{Launcher, Program, kill};
use crate::syslog::Syslog;
use crate::{Route, USER, numbered, write_config};

/// The program by itself, with everything in syslog.
fn standalone(syslog: &Syslog, route: &Route, program: &Program) -> Launcher {
    write_config(route.folder(), &(route.yaml("", "") + "log:\n  target: syslog\n"));
    let mut command = syslog.command(program.path().to_str().unwrap());
    command.arg("--config").arg(route.config_file()).args(["--user", USER]);
    Launcher::start(&mut command)
}

/// Where it listens, which it says in the log.
#[track_caller]
fn address(syslog: &Syslog) -> std::net::SocketAddr {
    let line = syslog.wait("]: starting smtp-dup ");
    line.split("listen=").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
}

/// A message in a session of its own, which must not take long.
#[track_caller]
fn deliver(address: std::net::SocketAddr, number: usize) {
    let since = Instant::now();
    let mut client = Client::ready(address);
    let reply = client.message("a@sender.test", &["b@example.com"], &numbered(number));
    assert_eq!(reply.code, 250, "{reply:?}");
    client.expect("QUIT", 221);
    client.closed();
    let took = since.elapsed();
    assert!(took < Duration::from_secs(5), "{took:?} for a message that nothing holds up");
}

#[test]
fn a_new_syslogd_is_found() {
    if !can_run(&["unshare"]) {
        return;
    }
    let (route, program, mut syslog) = (Route::start(), Program::copy(), Syslog::start());
    let launched = standalone(&syslog, &route, &program);
    let address = address(&syslog);
    deliver(address, 0);
    syslog.wait("role=primary");
    syslog.restart();
    deliver(address, 1);
    wait_until("the second message", || syslog.lines("role=primary").len() == 2);
    // One that has gone, and comes back later.
    syslog.stop();
    deliver(address, 2);
    route.wait(3);
    syslog.restart();
    deliver(address, 3);
    wait_until("the last message", || !syslog.lines("<00003@sender.test>").is_empty());
    syslog.wait("lines before this one were lost");
    assert_eq!(launched.log(), "");
}

/// The socket of a log takes ten lines by default, where nobody reads.
#[test]
fn a_syslogd_that_does_not_read_holds_nobody_up() {
    if !can_run(&["unshare"]) {
        return;
    }
    let (route, program, syslog) = (Route::start(), Program::copy(), Syslog::start());
    let mut launched = standalone(&syslog, &route, &program);
    let address = address(&syslog);
    let paused = syslog.pause();
    (0..50).for_each(|number| deliver(address, number));
    route.wait(50);
    drop(paused);
    wait_until("all lines", || syslog.lines("status=sent").len() == 150);
    // Nor does it hold the end up.
    let paused = syslog.pause();
    (50..60).for_each(|number| deliver(address, number));
    assert!(kill("TERM", launched.pid()));
    assert!(launched.wait_exit(Duration::from_secs(15)).success());
    drop(paused);
    assert_eq!(launched.log(), "");
}

/// One connection a process, whose last lines are all it has to say.
#[test]
fn neither_the_client_nor_the_process_waits_for_the_log() {
    inetd(Route::start(), "nowait", "inetd", |service, syslog| {
        let paused = syslog.pause();
        (0..5).for_each(|number| deliver(service.address, number));
        service.route.wait(5);
        service.program.wait_gone(Duration::from_secs(15));
        drop(paused);
    });
}

#[test]
fn without_any_syslogd_mail_passes() {
    if !can_run(&["unshare"]) {
        return;
    }
    let (route, program, mut syslog) = (Route::start(), Program::copy(), Syslog::start());
    let listener = crate::instance::free_address();
    syslog.stop();
    route.configure(&format!("listen: \"{listener}\""), "");
    let yaml = route.yaml(&format!("listen: \"{listener}\""), "") + "log:\n  target: syslog\n";
    write_config(route.folder(), &yaml);
    let mut command = syslog.command(program.path().to_str().unwrap());
    command.arg("--config").arg(route.config_file()).args(["--user", USER]);
    let _launched = Launcher::start(&mut command);
    wait_until("it listens", || std::net::TcpStream::connect(listener).is_ok());
    deliver(listener, 0);
    route.wait(1);
}

/// Whoever asks for stderr does not mean the client.
#[test]
fn stderr_is_not_the_client() {
    inetd(Route::start(), "nowait", "inetd", |service: &Service, _| {
        let route = service.route;
        for level in ["info", "debug"] {
            let log = format!("log:\n  target: stderr\n  level: {level}\n");
            write_config(route.folder(), &(route.yaml("", "") + &log));
            // `Client` takes nothing but replies, and here no more of them than it asks for.
            deliver(service.address, 0);
        }
        route.wait(2);
        service.program.wait_gone(Duration::from_secs(20));
    });
}

/// What somebody does to a copy by hand is in the log where the rest about its message is.
#[test]
fn the_commands_for_the_spool_leave_their_lines_in_syslog() {
    if !can_run(&["unshare"]) {
        return;
    }
    let (route, program, syslog) = (Route::start(), Program::copy(), Syslog::start());
    let [_, one, other] = &route.sinks;
    let relay = format!("spool: \"{}\"", route.folder().join("spool").display());
    route.configure("", &relay);
    let give = |words: &[&str]| {
        let mut command = syslog.command(program.path().to_str().unwrap());
        let output = command.arg("--config").arg(route.config_file()).args(words).output().unwrap();
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    one.close();
    other.close();
    let mut command = syslog.command(program.path().to_str().unwrap());
    let mut launched = Launcher::start(command.arg("--config").arg(route.config_file()));
    let line = launched.wait_log("starting smtp-dup ");
    let address = line.split("listen=").nth(1).unwrap().split(' ').next().unwrap();
    deliver(address.parse().unwrap(), 0);
    let line = launched.wait_log("role=primary");
    let id = line.split([' ', ':']).find(|word| word.len() == 10 && !word.contains('-')).unwrap();
    assert!(kill("TERM", launched.pid()));
    assert!(launched.wait_exit(Duration::from_secs(20)).success());

    let (from, to) = (other.addr().to_string(), one.addr().to_string());
    assert_eq!(give(&["drop", "--backup", &to, id]), "");
    syslog.wait(&format!("]: {id}: relay={to} role=backup status=dropped"));
    assert_eq!(give(&["retry", "--backup", &from, "--to", &to, id]), "");
    let start =
        format!("{id}: relay={from} role=backup status=deferred (smtp-dup retry: for {to}, as ");
    let line = syslog.wait(&start);
    let new = line.split(&start).nth(1).unwrap().trim_end_matches(')').to_owned();
    one.reopen();
    // Whoever flushes sees it, too.
    let sent = format!("{new}: relay={to} role=backup delay=");
    assert!(give(&["flush"]).contains(&sent));
    syslog.wait(&sent);
}
