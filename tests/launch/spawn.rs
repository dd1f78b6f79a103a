//! Postfix's spawn(8): a process for each connection, whose fd 0, 1 and 2 are the client's
//! socket. What it logs goes to /dev/log, for spawn(8) tells it of no other place.

use std::time::Duration;

use crate::common::Client;
use crate::instance::{Postfix, Setup, can_run};
use crate::letters::submit;
use crate::one_session::{self, Service};
use crate::program::{Program, assert_runs_as};
use crate::syslog::Syslog;
use crate::{Gate, Route, USER, numbered};

/// Runs a test with a Postfix that has spawn(8) start smtp-dup.
#[track_caller]
fn spawned(test: impl FnOnce(&Service, &Postfix)) {
    spawned_for(Route::start(), test);
}

#[track_caller]
fn spawned_for(route: Route, test: impl FnOnce(&Service, &Postfix)) {
    if !can_run(&["postfix", "unshare"]) {
        return;
    }
    let (program, syslog) = (Program::copy(), Syslog::start());
    let (path, config) = (program.path().display(), route.config_file());
    let entry = |address| {
        format!(
            "{address} inet n n n - 250 spawn user={USER} argv={path} --config {} inetd",
            config.display()
        )
    };
    let setup = Setup { services: Some(&entry), prefix: syslog.prefix(), ..Setup::default() };
    let postfix = Postfix::hosting(setup);
    let log = || syslog.lines("").join("\n");
    let address = postfix.next_hop;
    test(&Service { address, route: &route, program: &program, log: &log }, &postfix);
    assert_tagged(&syslog);
}

/// Every line of ours names the program and the process, below facility mail.
#[track_caller]
pub fn assert_tagged(syslog: &Syslog) {
    for line in syslog.lines("smtp-dup[") {
        // 16 to 23 are mail's: 19 errors, 20 warnings, 22 information, 23 for the search of bugs.
        let level =
            [("<19>", "]: error: "), ("<20>", "]: warning: "), ("<22>", "]: "), ("<23>", "]: ")];
        let of_level = |(priority, mark)| line.starts_with(priority) && line.contains(mark);
        assert!(level.into_iter().any(of_level), "{line}");
    }
}

#[test]
fn mail_through_spawn() {
    spawned(|service, postfix| {
        for number in 0..20 {
            submit(postfix, "<a@sender.test>", &["<b@example.com>"], &numbered(number));
        }
        postfix.wait_removed(20);
        service.route.wait(20);
        service.program.wait_gone(Duration::from_secs(60));
        service.route.assert_numbered_by_postfix(20);
        assert_eq!(postfix.log(&["status=deferred"]), [""; 0]);
    });
}

#[test]
fn two_hundred_at_once() {
    spawned(|service, _| one_session::many_at_once(service, 200));
}

#[test]
fn it_is_the_user_of_the_entry() {
    spawned(|service, _| {
        let mut client = Client::ready(service.address);
        assert_runs_as(service.program.wait_pids(1)[0], USER, USER);
        client.expect("QUIT", 221);
        client.closed();
        service.program.wait_gone(Duration::from_secs(20));
    });
}

#[test]
fn the_log_is_not_on_the_wire() {
    spawned(|service, _| one_session::the_log_is_not_on_the_wire(service));
}

#[test]
fn a_circle() {
    spawned(|service, _| one_session::a_circle_is_seen(service));
}

#[test]
fn a_mistake_is_421() {
    spawned(|service, _| one_session::a_mistake_is_421(service));
}

#[test]
fn a_silent_backup_keeps_nobody() {
    spawned(|service, _| one_session::a_silent_backup_keeps_nobody(service));
}

/// Neither of the two is for a session that has begun.
#[test]
fn reload_and_stop_leave_a_session_alone() {
    let gate = Gate::default();
    spawned_for(Route::behind(&gate), |service, postfix| {
        let mut slow = Client::ready(service.address);
        slow.envelope("a@sender.test", &["b@example.com"]);
        slow.send([numbered(0), b".\r\n".to_vec()].concat());
        gate.wait();
        postfix.postfix("reload");
        postfix.postfix("stop");
        gate.open();
        slow.expect_reply(250);
        let reply = slow.message("a@sender.test", &["b@example.com"], &numbered(1));
        assert_eq!(reply.code, 250, "{reply:?}");
        slow.expect("QUIT", 221);
        slow.closed();
        service.route.wait(2);
        service.program.wait_gone(Duration::from_secs(20));
    });
}

/// Here spawn(8) waits as well, and ends no later.
#[test]
fn a_client_that_leaves() {
    spawned(|service, _| one_session::a_client_that_leaves(service));
}
