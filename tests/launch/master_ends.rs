//! Whoever of the three is killed, master(8), the parent or the child: the mail goes on within
//! seconds, none of it is lost, and no process stays behind.

use std::net::TcpStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{Client, wait_until};
use crate::instance::{Setup, available, can_run};
use crate::letters::wait_count;
use crate::master::Hosted;
use crate::program::kill;
use crate::syslog::Syslog;
use crate::{Gate, Route, USER, numbered};

/// Far less than the minute for which master(8) leaves a service alone whose process died early.
const SECONDS: Duration = Duration::from_secs(10);

/// A Postfix that does not hold a destination back after failures, as it otherwise does for
/// minutes: it is not the one under test.
const PERSISTENT: &str = "default_destination_concurrency_failed_cohort_limit = 100000";

fn hosted(route: Route) -> Hosted {
    let folder = route.folder().display().to_string();
    let entry =
        |address| format!("{address} inet n - n - 1 smtp-dup user={USER} directory={folder}");
    let setup = Setup { settings: PERSISTENT, services: Some(&entry), ..Setup::default() };
    Hosted::with(route, setup)
}

/// Sends 300 letters, kills one of the two processes a few times while they flow, and wants a
/// message to pass soon after each. How many letters there were, and Postfix stopped.
#[track_caller]
pub fn kill_under_load(route: Route, victim: impl Fn((u32, u32)) -> u32) -> (Hosted, usize) {
    const COUNT: usize = 300;
    const KILLS: usize = 3;
    let syslog = Syslog::start();
    let hosted = Hosted::with_syslog(route, PERSISTENT, &syslog);
    let primary = &hosted.route.sinks[0];
    thread::scope(|scope| {
        scope.spawn(|| hosted.submit(0..COUNT));
        for kills in 1..=KILLS {
            wait_count(primary, 50 * kills);
            // One that was about to leave may have taken the last message: then who comes next
            // starts another.
            while hosted.program.pair(hosted.postfix.master()).is_none() {
                drop(TcpStream::connect(hosted.service()));
                thread::sleep(Duration::from_millis(20));
            }
            let victim = victim(hosted.parent_and_child());
            assert!(kill("KILL", victim));
            let since = Instant::now();
            // The connections that the victim had break, and so may the first one to come.
            let deliver = || hosted.deliver(COUNT + kills);
            while catch_unwind(AssertUnwindSafe(deliver)).is_err() {
                assert!(since.elapsed() < SECONDS, "no message passes");
                thread::sleep(Duration::from_millis(20));
            }
            assert!(since.elapsed() < SECONDS, "a message took {:?}", since.elapsed());
        }
    });
    // What was in the middle of it was put off.
    hosted.postfix.drain();
    hosted.stop();
    hosted.route.assert_none_lost(COUNT);
    assert_eq!(syslog.lines("/smtp-dup pid ").len(), KILLS);
    assert_eq!(syslog.lines("throttling"), [""; 0]);
    assert_eq!(syslog.lines("status=bounced"), [""; 0]);
    (hosted, COUNT)
}

#[test]
fn the_child_is_killed() {
    if !can_run(&["postfix", "unshare"]) {
        return;
    }
    kill_under_load(Route::start(), |(_, child)| child);
}

#[test]
fn the_parent_is_killed() {
    if !can_run(&["postfix", "unshare"]) {
        return;
    }
    kill_under_load(Route::start(), |(parent, _)| parent);
}

/// master(8) hears of the child's death by the parent's exit status.
#[test]
fn the_parent_fails_with_its_child() {
    if !available() {
        return;
    }
    let hosted = hosted(Route::start());
    hosted.deliver(0);
    let (parent, child) = hosted.parent_and_child();
    assert!(kill("KILL", child));
    hosted.postfix.wait_log(1, &["/master[", &format!("pid {parent} exit status ")]);
    let since = Instant::now();
    hosted.deliver(1);
    assert!(since.elapsed() < SECONDS, "it took {:?}", since.elapsed());
    assert_eq!(hosted.postfix.log(&["throttling"]), [""; 0]);
}

/// The child without its parent ends what it had begun, and takes nothing new.
#[test]
fn a_child_without_parent_drains() {
    if !available() {
        return;
    }
    let gate = Gate::default();
    let hosted = hosted(Route::behind(&gate));
    let mut slow = hosted.in_flight(&gate);
    let (parent, child) = hosted.parent_and_child();
    assert!(kill("KILL", parent));
    for number in 1..=20 {
        let since = Instant::now();
        hosted.deliver(number);
        assert!(since.elapsed() < SECONDS, "it took {:?}", since.elapsed());
    }
    let (_, successor) = hosted.parent_and_child();
    assert_ne!(successor, child);
    gate.open();
    slow.expect_reply(250);
    wait_until("the old child gone", || !hosted.program.pids().contains(&child));
    hosted.route.wait(21);
}

/// Nobody tells them: they see it.
#[test]
fn master_is_killed() {
    if !available() {
        return;
    }
    let gate = Gate::default();
    let hosted = hosted(Route::behind(&gate));
    let mut slow = hosted.in_flight(&gate);
    assert!(kill("KILL", hosted.postfix.master()));
    // The listeners have to go before the next Postfix comes, transaction or not.
    hosted.postfix.start_after_kill();
    for number in 1..=20 {
        hosted.deliver(number);
    }
    let (parent, child) = hosted.parent_and_child();
    gate.open();
    slow.expect_reply(250);
    wait_until("the old ones gone", || hosted.program.pids() == sorted([parent, child]));
    hosted.route.wait(21);
    hosted.stop();
}

#[test]
fn master_is_killed_and_nothing_is_left() {
    if !available() {
        return;
    }
    let hosted = hosted(Route::start());
    hosted.deliver(0);
    // One client more may send what it has come with, and then has to go.
    let mut client = Client::ready(hosted.service());
    let (parent, _) = hosted.parent_and_child();
    assert!(kill("KILL", hosted.postfix.master()));
    wait_until("the parent gone", || !hosted.program.pids().contains(&parent));
    let reply = client.message("a@sender.test", &["b@example.com"], &numbered(1));
    assert_eq!(reply.code, 250, "{reply:?}");
    hosted.program.wait_gone(Duration::from_secs(20));
    hosted.route.wait(2);
}

/// SIGTERM to all of the group, as `postfix stop` sends it, or to any of the two.
#[test]
fn a_signal_does_not_cut_a_transaction() {
    if !available() {
        return;
    }
    for (to_parent, to_child) in [(true, false), (false, true), (true, true)] {
        let gate = Gate::default();
        let route = Route::behind(&gate);
        route.configure("", "timeout_seconds: 1");
        let hosted = hosted(route);
        let mut slow = hosted.in_flight(&gate);
        let (parent, child) = hosted.parent_and_child();
        for (pid, _) in [(parent, to_parent), (child, to_child)].iter().filter(|(_, is)| *is) {
            assert!(kill("TERM", *pid));
        }
        // The child hears the signal, or that the parent has gone; either is its second line.
        hosted.postfix.wait_log(2, &[&format!("/smtp-dup[{child}]: ")]);
        // Others are served meanwhile.
        hosted.deliver(1);
        // Nothing happens when timeout_seconds are over, nor for as long again.
        assert!(slow.is_silent(Duration::from_millis(2500)));
        gate.open();
        slow.expect_reply(250);
        wait_until("both gone", || {
            !hosted.program.pids().iter().any(|pid| [parent, child].contains(pid))
        });
        hosted.route.wait(2);
    }
}

fn sorted(mut pids: [u32; 2]) -> [u32; 2] {
    pids.sort_unstable();
    pids
}
