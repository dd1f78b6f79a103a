//! Descriptors and threads that lack: whoever can be served is, nobody else hears worse than 421,
//! and the program neither ends nor spins.

use std::io::Error;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::libc;

use crate::common::{Client, Dup, Sink, config, wait_until};
use crate::{BODY, deliver, dup_with};

/// Starts the program with this as its limit, soft and hard.
fn limited(command: &mut Command, resource: libc::__rlimit_resource_t, most: u64) {
    let limit = move || {
        let most = libc::rlimit { rlim_cur: most, rlim_max: most };
        match unsafe { libc::setrlimit(resource, &most) } {
            0 => Ok(()),
            _ => Err(Error::last_os_error()),
        }
    };
    // Between fork and exec: only this one system call.
    unsafe { command.pre_exec(limit) };
}

/// Processor time that it has used so far.
fn used(dup: &Dup) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", dup.pid())).unwrap();
    let words: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    // In hundredths of a second (proc_pid_stat(5)): utime and stime.
    Duration::from_millis(words[11..13].iter().map(|n| n.parse::<u64>().unwrap() * 10).sum())
}

#[test]
fn accepting_that_fails_is_tried_again_without_haste() {
    let primary = Sink::start();
    let dup = dup_with(&primary, "", "");
    deliver(&mut Client::ready(dup.addr()));
    let pid = dup.pid() as libc::pid_t;
    let set = |most| {
        let most = libc::rlimit { rlim_cur: most, rlim_max: 1000 };
        let none = std::ptr::null_mut();
        let done = unsafe { libc::prlimit(pid, libc::RLIMIT_NOFILE, &most, none) };
        assert_eq!(done, 0, "{}", Error::last_os_error());
    };
    // From here on it can open nothing more; at first, not even wait for so many (poll(2)).
    set(1);
    let mut clients: Vec<Client> = (0..50).map(|_| Client::connect(dup.addr())).collect();
    let is_at_rest = || {
        let before = used(&dup);
        thread::sleep(Duration::from_secs(2));
        let spent = used(&dup) - before;
        assert!(spent < Duration::from_millis(400), "{spent:?} of 2 s for nothing");
    };
    is_at_rest();
    set(4);
    let line = dup.wait_log("error: accept: ");
    // EMFILE, whose name each libc has its own words for.
    assert!(line.contains("os error 24"), "{line}");
    is_at_rest();
    assert_eq!(dup.log_lines("accept:").len(), 1);
    // Those who have waited are served, once that can be.
    set(1000);
    for client in &mut clients {
        client.expect_reply(220);
    }
    clients[49].ehlo();
    deliver(&mut clients[49]);
}

#[test]
fn few_descriptors_are_for_few_clients_who_are_served() {
    let primary = Sink::start();
    let yaml = config(primary.addr(), &[], "timeout_seconds: 2", "");
    let dup = Dup::start_with(|command| limited(command, libc::RLIMIT_NOFILE, 64), &yaml);
    let line = dup.wait_log("warning: the limit on open files is 64");
    assert!(line.contains("serving 10 clients at a time"), "{line}");
    let (silent, good) = crate::load::size().few;
    let _silent: Vec<Client> = (0..silent).map(|_| Client::connect(dup.addr())).collect();
    // Whoever hears 421 tries again; whoever is greeted has all that it needs.
    thread::scope(|scope| {
        for _ in 0..good {
            scope.spawn(|| {
                wait_until("a place", || {
                    let mut client = Client::connect(dup.addr());
                    let is_in = client.reply().code == 220;
                    if is_in {
                        client.ehlo();
                        deliver(&mut client);
                        client.expect("QUIT", 221);
                    }
                    is_in
                });
            });
        }
    });
    assert_eq!(primary.accepted(), good);
    println!("load: {good} clients served beside {silent}; resident {} KiB", dup.resident() / 1024);
    assert!(dup.log_lines("error:").is_empty(), "{}", dup.log());
}

#[test]
fn a_thread_that_cannot_be_had_is_a_421() {
    // Its limit is for a user, and for root there is none: one that nobody else is.
    let user = 50_000 + std::process::id() % 10_000;
    if !nix::unistd::Uid::effective().is_root() {
        return eprintln!("skipped: not root");
    }
    let primary = Sink::start();
    let yaml = config(primary.addr(), &[], "", "");
    let poor = |command: &mut Command| {
        // A copy that this user can start, for the place of ours may be root's alone. Another
        // process makes it: a descriptor of ours, open for writing, might be in a child of
        // another test just when the copy is started.
        let folder = command.get_current_dir().unwrap().to_path_buf();
        let program = folder.join("smtp-dup");
        let mut install = Command::new("install");
        install.args(["-m", "755"]).arg(command.get_program()).arg(&program);
        assert!(install.status().unwrap().success());
        std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o755)).unwrap();
        let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
        *command = Command::new(program);
        command.env_clear().args(arguments).current_dir(folder).uid(user).gid(user);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // The first thread, and two workers.
        limited(command, libc::RLIMIT_NPROC, 3);
    };
    let dup = Dup::start_with(poor, &yaml);
    let mut served = [Client::ready(dup.addr()), Client::ready(dup.addr())];
    for _ in 0..3 {
        let mut client = Client::connect(dup.addr());
        let reply = client.expect_reply(421);
        assert!(reply.text().starts_with("4.3.2 "), "{reply:?}");
        client.closed();
    }
    dup.wait_logs("error: a client: no thread: ", 3);
    for client in &mut served {
        let reply = client.message("a@example.com", &["b@example.com"], BODY);
        assert_eq!(reply.code, 250, "{reply:?}");
        client.expect("QUIT", 221);
    }
    wait_until("threads", || dup.threads() == 1);
    deliver(&mut Client::ready(dup.addr()));
}
