//! `postfix reload`, and Postfix stopped and started, while mail flows: the successor serves at
//! once and with the new configuration, and no mail notices.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{Client, wait_until};
use crate::instance::{PATIENCE, Setup, available, can_run};
use crate::letters::{compared, wait_count};
use crate::master::Hosted;
use crate::program::{assert_runs_as, kill, parent_of};
use crate::syslog::Syslog;
use crate::{Gate, Route, USER, numbered};

/// Letters on their way at a time: enough that mail flows always, and that the end comes soon.
const IN_FLIGHT: usize = 40;

/// Gives numbered letters to Postfix, over five connections at once, as long as `what` runs. How
/// many they were.
#[track_caller]
pub fn under_load(hosted: &Hosted, what: impl FnOnce()) -> usize {
    let (next, done) = (AtomicUsize::new(0), AtomicBool::new(false));
    let (next, done) = (&next, &done);
    // A panic in `what` has to end the load, too.
    struct Done<'a>(&'a AtomicBool);
    impl Drop for Done<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }
    let send = move || {
        while !done.load(Ordering::SeqCst) {
            // Postfix's own server takes part in the reload; each of its sessions is short.
            let mut client = Client::ready(hosted.postfix.address);
            for _ in 0..5 {
                let number = next.fetch_add(1, Ordering::SeqCst);
                let to = ["b@example.com"];
                let reply = client.message("a@sender.test", &to, &numbered(number));
                assert_eq!(reply.code, 250, "{reply:?}");
                let end = Instant::now() + PATIENCE;
                while number > hosted.route.sinks[0].accepted() + IN_FLIGHT {
                    assert!(Instant::now() < end, "mail does not flow");
                    thread::sleep(Duration::from_millis(2));
                }
            }
        }
    };
    thread::scope(|scope| {
        (0..5).for_each(|_| drop(scope.spawn(send)));
        let _done = Done(done);
        what();
    });
    next.load(Ordering::SeqCst)
}

/// Waits until a client is greeted with this name.
#[track_caller]
pub fn wait_domain(hosted: &Hosted, domain: &str) {
    wait_until(domain, || {
        let greeting = Client::connect(hosted.service()).reply();
        assert_eq!(greeting.code, 220, "{greeting:?}");
        greeting.lines[0].split(' ').next() == Some(domain)
    });
}

/// More mail than is on its way has to come: that which was sent after now.
#[track_caller]
pub fn wait_for_more(hosted: &Hosted) {
    let primary = &hosted.route.sinks[0];
    wait_count(primary, primary.accepted() + 2 * IN_FLIGHT);
}

#[test]
fn ten_reloads_under_load() {
    if !available() {
        return;
    }
    let hosted = Hosted::start(Route::start());
    let count = under_load(&hosted, || {
        wait_for_more(&hosted);
        for number in 1..=10 {
            let domain = format!("dup{number}.example");
            hosted.route.configure(&format!("domain: {domain}"), "");
            hosted.postfix.postfix("reload");
            wait_domain(&hosted, &domain);
            wait_for_more(&hosted);
        }
    });
    hosted.assert_delivered(count);
    // Each reload brought another process, and each was asked to end but not hurried.
    let mut served: Vec<_> = hosted.postfix.log(&["]: starting smtp-dup "]);
    served.iter_mut().for_each(|line| line.truncate(line.find("]: ").unwrap()));
    served.dedup_by_key(|line| line.rsplit('[').next().unwrap().to_owned());
    assert_eq!(served.len(), 11, "{served:#?}");
    assert_eq!(hosted.postfix.log(&["smtp-dup[", "error: "]), [""; 0]);
    assert_eq!(hosted.postfix.log(&["master[", "exit status"]), [""; 0]);
}

/// The client whose connection has started it is greeted soon, at whatever point of the start the
/// reload came: not after the minute for which master(8) leaves alone what fails early.
#[test]
fn a_reload_while_it_starts() {
    if !can_run(&["postfix", "unshare"]) {
        return;
    }
    let syslog = Syslog::start();
    let hosted = Hosted::with_syslog(Route::start(), "", &syslog);
    for step in 0..40 {
        let mut client = Client::connect(hosted.service());
        thread::sleep(Duration::from_micros(250 * step));
        assert!(kill("HUP", hosted.postfix.master()));
        let greeting = client.reply_within(Duration::from_secs(10));
        assert_eq!(greeting.code, 220, "{greeting:?}");
        drop(client);
        // All that master(8) knows have to go, so that the next connection starts one.
        let master = hosted.postfix.master();
        assert!(kill("HUP", master));
        let is_known = |pid: &u32| parent_of(*pid) == Some(master);
        wait_until("no process", || !hosted.program.pids().iter().any(is_known));
    }
    assert_eq!(syslog.lines("throttling"), [""; 0]);
}

/// Faster than any of them can start; what `postfix reload` does besides the signal takes longer.
#[test]
fn sixty_reloads_in_a_second() {
    if !can_run(&["postfix", "unshare"]) {
        return;
    }
    let syslog = Syslog::start();
    let hosted = Hosted::with_syslog(Route::start(), "", &syslog);
    let count = under_load(&hosted, || {
        wait_for_more(&hosted);
        for number in 0..60 {
            assert!(kill("HUP", hosted.postfix.master()));
            thread::sleep(Duration::from_millis(number % 7 * 5));
        }
        wait_for_more(&hosted);
    });
    hosted.assert_delivered(count);
    assert_eq!(syslog.lines("status=deferred"), [""; 0]);
    assert_eq!(syslog.lines("throttling"), [""; 0]);
}

/// The old process has a transaction that takes its time; the new one does not wait for it.
#[test]
fn a_slow_transaction_does_not_hold_the_reload() {
    if !available() {
        return;
    }
    let gate = Gate::default();
    let hosted = Hosted::start(Route::behind(&gate));
    let mut slow = hosted.in_flight(&gate);
    let (_, old) = hosted.parent_and_child();
    hosted.route.configure("domain: new.example", "");
    hosted.postfix.postfix("reload");
    wait_domain(&hosted, "new.example");
    hosted.deliver(1);
    assert!(hosted.program.pids().contains(&old), "the old process has left its transaction");
    // What master(8) does not know any more is still nobody else.
    assert_runs_as(old, USER, USER);
    gate.open();
    slow.expect_reply(250);
    wait_until("the old process gone", || !hosted.program.pids().contains(&old));
    hosted.route.wait(2);
    hosted.stop();
    assert_eq!(hosted.route.sinks.each_ref().map(|sink| sink.accepted()), [2; 3]);
}

/// `postfix stop` ends the listeners at once and not the transactions; a Postfix that is started
/// at once gets each connection. The old process logs where the new ones do, in a chroot, too, if
/// its user may: the new postlogd's socket lies in a folder that only Postfix may enter. Other
/// users' words are in syslog.
#[test]
fn stop_and_start_at_once() {
    if !can_run(&["postfix", "unshare"]) {
        return;
    }
    for (chroot, user) in [("n", USER), ("y", USER), ("n", "postfix"), ("y", "postfix")] {
        let (gate, syslog) = (Gate::default(), Syslog::start());
        let route = Route::behind(&gate);
        let folder = route.folder().display().to_string();
        let entry = |address| {
            format!("{address} inet n - {chroot} - 1 smtp-dup user={user} directory={folder}")
        };
        let setup = Setup { services: Some(&entry), prefix: syslog.prefix(), ..Setup::default() };
        let hosted = Hosted::with(route, setup);
        let mut slow = hosted.in_flight(&gate);
        let (_, old) = hosted.parent_and_child();
        hosted.postfix.postfix("stop");
        hosted.postfix.postfix("start");
        // A listener that the old process had kept would get some of them.
        for number in 1..=20 {
            hosted.deliver(number);
        }
        hosted.submit(21..31);
        hosted.postfix.wait_removed(10);
        assert!(hosted.program.pids().contains(&old), "the old process has left its transaction");
        gate.open();
        slow.expect_reply(250);
        hosted.route.wait(31);
        wait_until("the old process gone", || !hosted.program.pids().contains(&old));
        let of_old = format!("/smtp-dup[{old}]: ");
        let log = |what| match user {
            "postfix" => hosted.postfix.log(&[&of_old, what]),
            _ => syslog.lines(&of_old).into_iter().filter(|line| line.contains(what)).collect(),
        };
        wait_until(&format!("its log, chroot {chroot}"), || !log("stopped").is_empty());
        let sent = log("status=sent");
        assert_eq!(sent.len(), 3, "{sent:#?}");
        assert_eq!(hosted.postfix.log(&["status=deferred"]), [""; 0]);
        hosted.stop();
        assert_eq!(hosted.route.sinks.each_ref().map(|sink| sink.accepted()), [31; 3]);
    }
}

#[test]
fn stop_and_start_under_load() {
    if !available() {
        return;
    }
    let hosted = Hosted::start(Route::start());
    hosted.submit(0..200);
    wait_count(&hosted.route.sinks[0], 20);
    for _ in 0..5 {
        hosted.postfix.postfix("stop");
        hosted.postfix.postfix("start");
    }
    // Postfix may have been ended between a final dot and its answer, and sends again. Nothing is
    // lost, and every copy of what the primary has was sent before the process ended.
    hosted.postfix.drain();
    hosted.stop();
    hosted.route.assert_none_lost(200);
    compared(&hosted.route.sinks, hosted.route.sinks[0].accepted());
}

/// An entry that is removed from master.cf: master(8) waits for the process that it knows, and
/// does nothing else meanwhile.
#[test]
fn master_does_not_wait_for_a_service_that_is_removed() {
    if !available() {
        return;
    }
    let gate = Gate::default();
    let hosted = Hosted::start(Route::behind(&gate));
    let mut slow = hosted.in_flight(&gate);
    let (parent, _) = hosted.parent_and_child();
    assert_eq!(parent_of(parent), Some(hosted.postfix.master()));
    hosted.postfix.set_services("");
    hosted.postfix.postfix("reload");
    // Its other services go on: a message to nowhere is answered by a daemon that it has to start.
    let mut client = Client::ready(hosted.postfix.address);
    let reply = client.message("a@sender.test", &["b@sender.test"], &numbered(0));
    assert_eq!(reply.code, 250, "{reply:?}");
    hosted.postfix.wait_log(1, &["to=<b@sender.test>", "status=sent"]);
    wait_until("the parent gone", || !hosted.program.pids().contains(&parent));
    wait_until("refused connections", || std::net::TcpStream::connect(hosted.service()).is_err());
    gate.open();
    slow.expect_reply(250);
    hosted.program.wait_gone(Duration::from_secs(20));
    hosted.route.wait(1);
}
