//! With a spool, whoever started the processes that share it: no copy is lost, also when one of
//! them is killed or leaves, and none of them needs another to be delivered.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::common::{Client, Sink};
use crate::inetd::inetd;
use crate::instance::{available, can_run};
use crate::letters::{assert_is_letter, by_id, message_id, wait_count};
use crate::master::Hosted;
use crate::master_ends::kill_under_load;
use crate::one_session::Service;
use crate::program::{Program, kill, user_and_group};
use crate::reload::{under_load, wait_domain, wait_for_more};
use crate::{Route, USER, numbered};

/// A folder that belongs to the user, and a configuration with it.
fn with_spool(route: &Route) -> PathBuf {
    let folder = user_s_folder(route.folder());
    route.configure("", &format!("spool: {}", folder.display()));
    folder
}

/// A new folder below this one, for the user and nobody else.
fn user_s_folder(parent: &Path) -> PathBuf {
    let folder = parent.join("copies");
    fs::create_dir(&folder).unwrap();
    let (uid, gid) = user_and_group(USER);
    chown(&folder, Some(uid), Some(gid)).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
    folder
}

/// Tries all that waits, as an administrator does: as root, who becomes the spool's owner.
#[track_caller]
fn flush(program: &Program, route: &Route) {
    let mut command = crate::instance::command(program.path().to_str().unwrap());
    let output = command.arg("--config").arg(route.config_file()).arg("flush").output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

/// What lies in the spool, and in its folders for what is given up or broken.
fn left(spool: &Path) -> Vec<PathBuf> {
    let mut folders: Vec<_> = ["queue", "failed", "damaged"].map(|name| spool.join(name)).into();
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    files
}

/// Each of the letters is there at least once: copies are.
#[track_caller]
fn assert_copies(sink: &Sink, count: usize, spool: &Path) {
    let arrived = by_id(sink);
    for number in 0..count {
        let letter = numbered(number);
        let found = arrived.get(&message_id(&letter));
        let found = found.unwrap_or_else(|| panic!("copy {number} is lost: {:?}", left(spool)));
        found.iter().for_each(|data| assert_is_letter(data, &letter));
    }
}

/// One backup is down all the time, and the other one well.
#[test]
fn no_copy_is_lost_with_the_child() {
    if !can_run(&["postfix", "unshare"]) {
        return;
    }
    let route = Route::start();
    let spool = with_spool(&route);
    route.sinks[2].close();
    let (hosted, count) = kill_under_load(route, |(_, child)| child);
    hosted.route.sinks[2].reopen();
    flush(&hosted.program, &hosted.route);
    assert_copies(&hosted.route.sinks[1], count, &spool);
    assert_copies(&hosted.route.sinks[2], count, &spool);
}

/// Old and new processes work on the same spool.
#[test]
fn reloads_share_the_spool() {
    if !available() {
        return;
    }
    let route = Route::start();
    let spool = with_spool(&route);
    let relay = format!("spool: {}", spool.display());
    let hosted = Hosted::start(route);
    let down = &hosted.route.sinks[2];
    let count = under_load(&hosted, || {
        for number in 1..=6 {
            // It comes and goes.
            if number % 2 == 0 {
                down.close()
            } else if number > 1 {
                down.reopen()
            }
            let domain = format!("dup{number}.example");
            hosted.route.configure(&format!("domain: {domain}"), &relay);
            hosted.postfix.postfix("reload");
            wait_domain(&hosted, &domain);
            wait_for_more(&hosted);
        }
    });
    down.reopen();
    wait_count(&hosted.route.sinks[0], count);
    hosted.postfix.drain();
    hosted.stop();
    flush(&hosted.program, &hosted.route);
    assert!(left(&spool).is_empty(), "{:?}", left(&spool));
    assert_eq!(hosted.route.sinks[0].accepted(), count);
    for sink in &hosted.route.sinks {
        assert_copies(sink, count, &spool);
    }
    assert_eq!(hosted.postfix.log(&["status=deferred", "/smtp["]), [""; 0]);
    assert_eq!(hosted.postfix.log(&["smtp-dup[", "status=lost"]), [""; 0]);
}

/// A path from outside, which has to be within.
#[test]
fn a_spool_in_a_chroot() {
    if !available() {
        return;
    }
    let hosted = Hosted::entry(Route::start(), "n - y - 1", &format!("user={USER}"));
    let spool = user_s_folder(&hosted.postfix.path("spool"));
    hosted.route.configure("", &format!("spool: {}", spool.display()));
    hosted.route.sinks[2].close();
    hosted.submit(0..10);
    wait_count(&hosted.route.sinks[1], 10);
    hosted.stop();
    hosted.route.sinks[2].reopen();
    // Root sees it from outside.
    flush(&hosted.program, &hosted.route);
    hosted.route.assert_numbered_by_postfix(10);
    assert_eq!(hosted.postfix.log(&["status=deferred", "/smtp["]), [""; 0]);
}

#[test]
fn a_spool_outside_of_the_chroot() {
    if !available() {
        return;
    }
    let hosted = Hosted::entry(Route::start(), "n - y - 1", &format!("user={USER}"));
    let spool = with_spool(&hosted.route);
    let _client = Client::connect(hosted.service());
    let spool = spool.to_str().unwrap();
    hosted.postfix.wait_log(1, &["postfix/smtp-dup[", "]: error: relay.spool: ", spool]);
    hosted.postfix.wait_log(1, &["/master[", "exit status "]);
}

#[track_caller]
fn sessions(service: &Service, count: usize) {
    for number in 0..count {
        let mut client = Client::ready(service.address);
        let reply = client.message("a@sender.test", &["b@example.com"], &numbered(number));
        assert_eq!(reply.code, 250, "{reply:?}");
        client.expect("QUIT", 221);
        client.closed();
    }
}

/// A process for one client does its own copies, and needs nobody to look after them.
#[test]
fn one_connection_a_process_delivers_its_copies() {
    inetd(Route::start(), "nowait.1000", "inetd", |service, _| {
        with_spool(service.route);
        sessions(service, 40);
        service.program.wait_gone(Duration::from_secs(40));
        service.route.assert_numbered(40);
    });
}

/// What it cannot deliver it leaves, and takes no time about it.
#[test]
fn one_connection_a_process_leaves_copies_for_a_flush() {
    inetd(Route::start(), "nowait.1000", "inetd", |service, _| {
        with_spool(service.route);
        service.route.sinks[2].close();
        sessions(service, 20);
        service.program.wait_gone(Duration::from_secs(40));
        service.route.sinks[2].reopen();
        flush(service.program, service.route);
        service.route.assert_numbered(20);
    });
}

/// While some come, some flush and some are killed: whoever finds a copy delivers it.
#[test]
fn flushes_and_kills_among_many_processes() {
    inetd(Route::start(), "nowait.1000", "inetd", |service, _| {
        let route = service.route;
        let spool = with_spool(route);
        thread::scope(|scope| {
            for sender in 0..4 {
                scope.spawn(move || {
                    for number in (0..80).filter(|number| number % 4 == sender) {
                        // A process that is killed takes its client along, who comes again.
                        while !try_deliver(service, number) {}
                    }
                });
            }
            for step in 1..=10 {
                wait_count(&route.sinks[0], 7 * step);
                flush_whatever(service);
                if let Some(pid) = service.program.pids().last() {
                    kill("KILL", *pid);
                }
            }
        });
        service.program.wait_gone(Duration::from_secs(40));
        // What a process had not committed when it was killed stays for a while, and is nobody's.
        flush_whatever(service);
        let primary = by_id(&route.sinks[0]);
        for sink in &route.sinks {
            let copies = by_id(sink);
            let lost: Vec<_> = primary.keys().filter(|id| !copies.contains_key(*id)).collect();
            assert!(lost.is_empty(), "of {} lost: {lost:?}; {:?}", primary.len(), left(&spool));
        }
        assert_eq!(primary.len(), 80);
    });
}

fn try_deliver(service: &Service, number: usize) -> bool {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    let deliver = || {
        let mut client = Client::ready(service.address);
        let reply = client.message("a@sender.test", &["b@example.com"], &numbered(number));
        assert_eq!(reply.code, 250, "{reply:?}");
    };
    catch_unwind(AssertUnwindSafe(deliver)).is_ok()
}

/// A flush among others' work, which may not find all of it free.
fn flush_whatever(service: &Service) {
    let mut command = crate::instance::command(service.program.path().to_str().unwrap());
    let _ = command.arg("--config").arg(service.route.config_file()).arg("flush").output();
}

/// Root's commands become the owner of what they are led by.
#[test]
fn a_configuration_of_the_spool_s_owner() {
    if !crate::instance::can_run(&[]) {
        return;
    }
    let (route, program) = (Route::start(), Program::copy());
    let spool = with_spool(&route);
    let file = route.config_file();
    let run = |named: bool, words: &[&str]| {
        let mut command = crate::instance::command(program.path().to_str().unwrap());
        if named {
            command.arg("--config").arg(&file);
        }
        let output = command.args(words).current_dir(route.folder()).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&said).into_owned())
    };
    let owner = |user| {
        let (uid, gid) = user_and_group(user);
        chown(&file, Some(uid), Some(gid)).unwrap();
    };
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();

    // Nobody leads root to the folder of somebody else.
    owner("mail");
    let (code, said) = run(true, &["queue"]);
    assert!(code == Some(2) && said.contains("belongs to user"), "{code:?} {said}");
    let (code, said) = run(true, &["--user", "mail", "queue"]);
    assert!(code == Some(2) && said.contains("belongs to user"), "{code:?} {said}");
    assert_eq!(fs::read_dir(&spool).unwrap().count(), 0);

    owner(USER);
    for words in [&["queue"][..], &["flush"], &["--user", USER, "queue"]] {
        let (code, said) = run(true, words);
        assert_eq!(code, Some(0), "{words:?}: {said}");
    }
    let made = fs::read_dir(&spool).unwrap().map(|entry| entry.unwrap().metadata().unwrap());
    let (uid, gid) = user_and_group(USER);
    let made: Vec<_> = made.map(|about| (about.uid(), about.gid())).collect();
    assert_eq!(made, vec![(uid, gid); 5]);
    // The group of a file may be root's though its owner is not in it.
    chown(&file, None, Some(0)).unwrap();
    assert_eq!(run(true, &["queue"]).0, Some(0));

    // What lies about is not taken for the administrator's word, and the service would not start.
    for (named, words) in [(false, &["queue"][..]), (true, &["check"])] {
        let (code, said) = run(named, words);
        assert!(code == Some(2) && said.contains("chown root"), "{words:?}: {code:?} {said}");
    }
}
