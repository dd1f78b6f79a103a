//! Many copies and many processes on one spool: each copy once, nobody waits for another, and
//! memory does not grow with what waits.

use std::fs;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use crate::common::*;
use crate::*;

/// Sends so many messages over a few connections, numbered from `first`.
#[track_caller]
fn send_many(dup: &Dup, first: usize, count: usize) {
    thread::scope(|scope| {
        for part in 0..4 {
            scope.spawn(move || {
                let mut client = Client::ready(dup.addr());
                for number in (first..first + count).skip(part).step_by(4) {
                    let reply = client.pipelined(FROM, TO, &numbered(number));
                    assert_eq!(reply.code, 250, "{number}: {reply:?}");
                }
            });
        }
    });
}

fn expected(count: usize) -> Vec<Vec<u8>> {
    let mut expected: Vec<_> = (1..=count).map(numbered).collect();
    expected.sort();
    expected
}

/// Messages 1 to `count` wait in the spool for each of these, as smtp-dup-spool(5) writes them.
fn write_spool(folder: &Folder, backups: &[Sink], count: usize) {
    let hour = folder.path().join("queue/2026112309");
    std::fs::create_dir_all(&hour).unwrap();
    for made in [folder.path(), folder.path().join("queue"), hour.clone()] {
        std::fs::set_permissions(made, std::fs::Permissions::from_mode(0o700)).unwrap();
    }
    let names: Vec<_> = backups.iter().map(|backup| backup.addr().to_string()).collect();
    for number in 1..=count {
        let mut mail =
            format!("NOOP {}\r\nMAIL FROM:<{FROM}>\r\nRCPT TO:<{TO}>\r\nDATA\r\n", names.join(" "))
                .into_bytes();
        mail.extend(numbered(number));
        mail.extend(b".\r\n");
        let id = format!("{number:010X}");
        for name in &names {
            std::fs::write(hour.join(format!("{id}.to.{name}")), "").unwrap();
        }
        std::fs::write(hour.join(format!("{id}.mail")), mail).unwrap();
    }
}

/// Daemons, flushes and processes for one client: twenty that work on 10,000 copies at once.
#[test]
fn twenty_processes_deliver_each_copy_once() {
    const COUNT: usize = 5000;
    const DAEMONS: usize = 4;
    const FLUSHES: usize = 10;
    const CLIENTS: usize = 6;
    /// So many messages each of the clients sends.
    const EACH: usize = 20;
    let folder = Folder::new();
    let primary = Sink::start();
    let backups = [Sink::start(), Sink::start()];
    write_spool(&folder, &backups, COUNT);
    let yaml = folder.config(&primary, &backups.each_ref(), "");
    let dups: Vec<_> = (0..DAEMONS).map(|_| Dup::start(&yaml)).collect();
    let tried: u64 = thread::scope(|scope| {
        let flushes: Vec<_> =
            (0..FLUSHES).map(|_| scope.spawn(|| flush(&yaml, &backups))).collect();
        for client in 0..CLIENTS {
            let yaml = &yaml;
            scope.spawn(move || {
                let mut process = OneClient::start(yaml);
                let first = COUNT + 1 + client * EACH;
                (first..first + EACH).for_each(|number| send(&mut process.client, number));
                process.end();
            });
        }
        flushes.into_iter().map(|flush| flush.join().unwrap()).sum()
    });
    let all = COUNT + CLIENTS * EACH;
    let end_of_wait = Instant::now() + BOUND * 6;
    while backups.iter().any(|backup| backup.accepted() < all) {
        assert!(Instant::now() < end_of_wait, "{:?}", backups.each_ref().map(Sink::accepted));
        thread::sleep(Duration::from_millis(20));
    }
    folder.wait_empty();
    dups.iter().for_each(end);
    for backup in &backups {
        assert_eq!(backup.attempts().len(), all);
        assert!(bodies(&backup.messages()) == expected(all));
    }
    // All kinds had a share in it, or this has shown nothing.
    assert!(tried > 0);
    for dup in &dups {
        let sent = dup.log_lines("role=backup delay=").len();
        assert!(sent > 0, "{}", dup.log());
    }
    folder.assert_clean();
}

/// How many copies `smtp-dup flush` says that it has tried.
#[track_caller]
fn flush(yaml: &str, backups: &[Sink]) -> u64 {
    let place = tempfile::tempdir().unwrap();
    let output = command(&place, Some(yaml)).arg("flush").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(!text.contains("FAILED"), "{output:?}");
    let about = |backup: &Sink| {
        let start = format!("{}: ", backup.addr());
        let rest = text.lines().find_map(|line| line.strip_prefix(&start)).unwrap_or_default();
        let count = rest.split(' ').next().unwrap_or_default().parse::<u64>();
        count.unwrap_or_else(|_| panic!("{text}"))
    };
    backups.iter().map(about).sum()
}

/// smtp-dup as inetd starts it, for one client, who is here.
struct OneClient {
    client: Client,
    process: std::process::Child,
    _place: tempfile::TempDir,
}

impl OneClient {
    fn start(yaml: &str) -> OneClient {
        let place = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let client = thread::spawn(move || Client::connect(addr));
        let socket = OwnedFd::from(listener.accept().unwrap().0);
        let mut inetd = command(&place, Some(yaml));
        inetd.arg("inetd").stdin(socket.try_clone().unwrap()).stdout(socket).stderr(Stdio::null());
        let process = inetd.spawn().unwrap();
        drop(inetd);
        let mut client = client.join().unwrap();
        client.expect_reply(220);
        client.ehlo();
        OneClient { client, process, _place: place }
    }

    /// The client goes, and the process after it.
    #[track_caller]
    fn end(self) {
        let OneClient { client, mut process, _place } = self;
        drop(client);
        assert!(wait_until_ended(&mut process).success());
    }
}

/// One daemon takes the mail of two, and they share the spool while it flows.
#[test]
fn two_daemons_take_mail_into_one_spool() {
    let folder = Folder::new();
    let primary = Sink::start();
    let backups = [Sink::start(), Sink::start()];
    let yaml = folder.config(&primary, &backups.each_ref(), "");
    let dups = [Dup::start(&yaml), Dup::start(&yaml)];
    thread::scope(|scope| {
        scope.spawn(|| send_many(&dups[0], 1, 150));
        scope.spawn(|| send_many(&dups[1], 151, 150));
    });
    for backup in &backups {
        assert!(bodies(&backup.wait(300)) == expected(300));
    }
    folder.wait_empty();
    dups.iter().for_each(end);
    assert_eq!(backups.each_ref().map(|backup| backup.attempts().len()), [300, 300]);
    for dup in &dups {
        assert_eq!(dup.log_lines(" error: "), [""; 0]);
    }
    folder.assert_clean();
}

/// A process that was stopped (SIGSTOP, a debugger, a container that is frozen) while it had
/// `failed/` or `hold/` to itself.
#[test]
fn who_is_stopped_keeps_nobody_waiting_for_ever() {
    let folder = Folder::new();
    let primary = Sink::start();
    let refuses = Sink::replying(|event| match event {
        Event::Mail(_) => Action::reply("550 5.7.1 not from you"),
        _ => Action::Default,
    });
    let (down, up) = (Sink::refusing(SinkOptions::default()), Sink::start());
    let dup = folder.start(&primary, &[&refuses, &down, &up]);
    let lock = |name| {
        let folder = fs::File::open(folder.path().join(name)).unwrap();
        Flock::lock(folder, FlockArg::LockExclusive).unwrap()
    };
    let stopped = [lock("failed"), lock("hold")];
    let mut client = Client::ready(dup.addr());
    send(&mut client, 1);
    send(&mut client, 2);
    assert_eq!(bodies(&up.wait(2)), expected(2));
    let kept = "another process has kept its lock";
    let line =
        dup.wait_log(&format!("failed/ in the spool: {}/failed: {kept}", folder.path().display()));
    assert!(line.contains("status=deferred"), "{line}");
    dup.wait_log(&format!("/spool/hold: {kept}"));
    drop(stopped);
    down.reopen();
    folder.wait_empty();
    assert_eq!(folder.files("failed").iter().filter(|file| file.contains(".to.")).count(), 2);
    assert_eq!(bodies(&down.messages()), expected(2));
    drop(client);
    end(&dup);
    folder.assert_clean();
}

/// A door that the test opens.
#[derive(Default)]
pub struct Gate(Mutex<bool>, Condvar);

impl Gate {
    pub fn pass(&self) {
        let open = self.0.lock().unwrap();
        drop(self.1.wait_timeout_while(open, BOUND * 3, |open| !*open).unwrap());
    }

    pub fn open(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }
}

#[test]
fn a_backup_that_stalls_in_a_message_keeps_it_from_nobody() {
    let folder = Folder::new();
    let primary = Sink::start();
    let gate = Arc::new(Gate::default());
    let stalled = Arc::new(AtomicBool::new(false));
    let (door, has_stalled) = (Arc::clone(&gate), Arc::clone(&stalled));
    let stalling = Sink::replying(move |event| {
        if let Event::EndOfData(_) = event
            && !has_stalled.swap(true, Ordering::SeqCst)
        {
            door.pass();
        }
        Action::Default
    });
    let well = Sink::refusing(SinkOptions::default());
    let dup = folder.start(&primary, &[&stalling, &well]);
    let mut client = Client::ready(dup.addr());
    send(&mut client, 1);
    wait_until("it stalls", || stalled.load(Ordering::SeqCst));
    // The other backup gets it from the spool, by this process and by another one.
    well.reopen();
    well.wait(1);
    let other = folder.start(&primary, &[&stalling, &well]);
    // Messages behind it reach both, over other connections.
    (2..=5).for_each(|number| send(&mut client, number));
    stalling.wait_for("the others", |sink| sink.messages().len() >= 4);
    well.wait(5);
    // The one that stalls is owed still, and nobody else tries it.
    wait_until("only one is owed", || folder.files("queue").len() == 2);
    assert_eq!(stalling.count("MAIL"), 5);
    gate.open();
    folder.wait_empty();
    drop(client);
    end(&dup);
    end(&other);
    assert_eq!(bodies(&stalling.attempts()), expected(5));
    assert_eq!(well.attempts().len(), 5);
    folder.assert_clean();
}

/// A backup is down for 10,000 messages. The speed of live mail meanwhile is shown and not judged
/// here, for the machine has other things to do: that is what the benchmark is for.
#[test]
fn a_long_outage_costs_no_memory() {
    const COUNT: usize = 10_000;
    const LIVE: usize = 1000;
    let folder = Folder::new();
    let primary = Sink::start();
    let down = Sink::refusing(SinkOptions::default());
    let dup = folder.start(&primary, &[&down]);
    let mut resident = Vec::new();
    for part in 0..4 {
        send_many(&dup, part * COUNT / 4 + 1, COUNT / 4);
        resident.push(dup.resident());
    }
    assert_eq!(ids(&folder.files("queue")).len(), COUNT);
    // 7,500 more of them wait than at the first look: less than 100 octets for each is noise.
    assert!(resident[3] < resident[0] + 700 * 1024, "{resident:?}");

    down.reopen();
    // The pause has grown with the outage.
    let end_of_wait = Instant::now() + BOUND * 9;
    while down.accepted() == 0 {
        assert!(Instant::now() < end_of_wait, "it is not tried again: {}", dup.log());
        thread::sleep(Duration::from_millis(5));
    }
    let timed = |first| {
        let start = Instant::now();
        send_many(&dup, first, LIVE);
        LIVE as f64 / start.elapsed().as_secs_f64()
    };
    let beside = timed(COUNT + 1);
    let early = down.accepted();
    let end_of_wait = Instant::now() + BOUND * 3;
    while down.accepted() < COUNT + LIVE {
        assert!(Instant::now() < end_of_wait, "{} have come", down.accepted());
        thread::sleep(Duration::from_millis(20));
    }
    folder.wait_empty();
    resident.push(dup.resident());
    assert!(resident[4] < resident[3] + 1024 * 1024, "{resident:?}");
    let alone = timed(COUNT + LIVE + 1);
    eprintln!(
        "live mail beside the backlog: {beside:.0}/s, {:.2} of {alone:.0}/s alone; {early} copies \
         had come by its end; resident {resident:?}",
        beside / alone
    );
    folder.wait_empty();
    end(&dup);
    assert!(bodies(&down.attempts()) == expected(COUNT + 2 * LIVE), "not each once and whole");
    folder.assert_clean();
}

/// Oldest first, as far as the hours tell.
#[test]
fn the_oldest_hour_goes_first() {
    let folder = Folder::new();
    let primary = Sink::start();
    let backup = Sink::refusing(SinkOptions::default());
    let dup = folder.start(&primary, &[&backup]);
    let mut client = Client::ready(dup.addr());
    for round in 0..3 {
        (1..=20).for_each(|number| send(&mut client, round * 100 + number));
    }
    drop(client);
    kill(dup);
    // As if they had come in three hours of the past, the last ones first.
    let queue = folder.path().join("queue");
    let (mut files, names) = (folder.files("queue"), ["2026112301", "2026112223", "2025123100"]);
    files.sort_by_key(|file| file.rsplit('/').next().unwrap()[..10].to_string());
    let mut messages = ids(&files);
    messages.dedup();
    for (place, id) in messages.iter().enumerate() {
        let hour = queue.join(names[place / 20]);
        std::fs::create_dir_all(&hour).unwrap();
        for file in files.iter().filter(|file| file.contains(id.as_str())) {
            std::fs::rename(queue.join(file), hour.join(file.rsplit('/').next().unwrap())).unwrap();
        }
    }
    backup.reopen();
    // Only one connection: others would mix it.
    let dup = Dup::start(&folder.config(&primary, &[&backup], "backup_connections: 1"));
    let messages = backup.wait(60);
    for (place, round) in [(0, 2), (20, 1), (40, 0)] {
        let mut expected: Vec<_> = (1..=20).map(|number| numbered(round * 100 + number)).collect();
        expected.sort();
        assert_eq!(bodies(&messages[place..place + 20]), expected);
    }
    folder.wait_empty();
    end(&dup);
}

/// While the primary thinks about a message, its copies have their names already: whoever comes by
/// must not take them for remains.
#[test]
fn a_message_that_waits_for_the_primary_is_left_alone_by_others() {
    let folder = Folder::new();
    let (gate, asked) = (Arc::new(Gate::default()), Arc::new(AtomicBool::new(false)));
    let (door, is_asked) = (Arc::clone(&gate), Arc::clone(&asked));
    let primary = Sink::replying(move |event| {
        if let Event::EndOfData(_) = event {
            is_asked.store(true, Ordering::SeqCst);
            door.pass();
        }
        Action::Default
    });
    let backup = Sink::start();
    let dup = folder.start(&primary, &[&backup]);
    let mut client = Client::ready(dup.addr());
    client.envelope(FROM, &[TO]);
    client.send([&numbered(1)[..], b".\r\n"].concat());
    wait_until("the primary is asked", || asked.load(Ordering::SeqCst));
    wait_until("the copies have names", || !folder.files("queue").is_empty());
    // One that sweeps and looks for work at its start, and one that does so once.
    let other = folder.start(&primary, &[&backup]);
    let yaml = folder.config(&primary, &[&backup], "");
    run(&["flush"], Some(&yaml), &[]);
    end(&other);
    gate.open();
    client.expect_reply(250);
    assert_eq!(bodies(&backup.wait(1)), [numbered(1)], "{:?}", folder.files("damaged"));
    folder.wait_empty();
    drop(client);
    end(&dup);
    folder.assert_clean();
    for log in [dup.log(), other.log()] {
        assert!(!log.contains(" error: "), "{log}");
    }
}

/// A copy that another process works on is not forgotten when that one dies in the middle.
#[test]
fn what_another_process_died_on_is_delivered() {
    let folder = Folder::new();
    let primary = Sink::start();
    let first = AtomicBool::new(true);
    let backup = Sink::replying(move |event| match event {
        Event::EndOfData(_) if first.swap(false, Ordering::SeqCst) => Action::Silence,
        _ => Action::Default,
    });
    let dups = [(); 2].map(|()| folder.start(&primary, &[&backup]));
    let mut client = Client::ready(dups[0].addr());
    send(&mut client, 1);
    backup.wait_for("the first attempt", |backup| backup.attempts().len() == 1);
    // Now the other one has a reason to look.
    send(&mut Client::ready(dups[1].addr()), 2);
    backup.wait_for("the other's", |backup| !backup.messages().is_empty());
    let [one, two] = dups;
    kill(one);
    let end_of_wait = std::time::Instant::now() + Duration::from_secs(90);
    while backup.messages().len() < 2 {
        assert!(std::time::Instant::now() < end_of_wait, "{}", two.log());
        thread::sleep(Duration::from_millis(100));
    }
    folder.wait_empty();
    end(&two);
}

/// An administrator who has seen enough of a flush: the copy that is under way has its time, and
/// all stay owed.
#[test]
fn a_flush_ends_when_it_is_told_to() {
    let folder = Folder::new();
    let (primary, refusing) = (Sink::start(), Sink::refusing(SinkOptions::default()));
    let dup = folder.start(&primary, &[&refusing]);
    send_many(&dup, 1, 8);
    kill(dup);
    // Takes each message and never says so.
    let silent = Sink::replying(|event| match event {
        Event::EndOfData(_) => Action::Silence,
        _ => Action::Default,
    });
    let yaml = folder.config(&primary, &[&silent], "timeout_seconds: 2");
    let old = format!(".to.{}", refusing.addr());
    for file in folder.files("queue").iter().filter(|file| file.ends_with(&old)) {
        let path = folder.path().join("queue").join(file);
        let new = file.replace(&old, &format!(".to.{}", silent.addr()));
        std::fs::rename(&path, folder.path().join("queue").join(new)).unwrap();
    }
    let place = tempfile::tempdir().unwrap();
    let mut flush = command(&place, Some(&yaml)).arg("flush").spawn().unwrap();
    silent.wait_for("a message", |silent| !silent.attempts().is_empty());
    let term = format!("kill -TERM {}", flush.id());
    assert!(std::process::Command::new("sh").args(["-c", &term]).status().unwrap().success());
    let ended = wait_until_ended(&mut flush);
    assert_eq!(ended.code(), Some(1), "some are left");
    assert_eq!(ids(&folder.files("queue")).len(), 8);
}

/// Kills what does not end, so that nothing is left behind by a test that fails.
#[track_caller]
pub fn wait_until_ended(child: &mut std::process::Child) -> std::process::ExitStatus {
    let end = std::time::Instant::now() + BOUND;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if std::time::Instant::now() > end {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("it does not end");
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// A spool takes its time to be looked through: a big one on a slow disk, or one where somebody
/// else is. Who ends the program does not wait for that.
#[test]
fn the_end_does_not_wait_for_the_sweep() {
    let folder = Folder::new();
    let (primary, backup) = (Sink::start(), Sink::start());
    let yaml = folder.config(&primary, &[&backup], "timeout_seconds: 1");
    end(&Dup::start(&yaml));
    let failed = fs::File::open(folder.path().join("failed")).unwrap();
    let lock = Flock::lock(failed, FlockArg::LockExclusive).map_err(|(_, error)| error).unwrap();
    let dup = Dup::start(&yaml);
    let mut client = Client::ready(dup.addr());
    send(&mut client, 1);
    drop(client);
    backup.wait(1);
    dup.signal(Signal::Term);
    // The sweep waits for ten seconds.
    assert!(dup.wait_exit(Duration::from_secs(6)).success(), "{}", dup.log());
    assert_eq!(dup.log_lines("looked through"), [""; 0]);
    drop(lock);
}

/// An hour is removed when it is over and nothing is left of it: a program that runs for years
/// would look through more and more of them.
#[test]
fn hours_that_are_over_are_removed() {
    let folder = Folder::new();
    let (primary, backup) = (Sink::start(), Sink::refusing(SinkOptions::default()));
    let dup = folder.start(&primary, &[&backup]);
    dup.wait_log("looked through");
    let hours = ["2020010100", "2020010101"].map(|hour| folder.path().join("queue").join(hour));
    for hour in &hours {
        fs::create_dir(hour).unwrap();
    }
    fs::write(hours[1].join("README"), "nothing of ours").unwrap();
    let long_ago = std::time::SystemTime::now() - Duration::from_secs(3 * 3600);
    for hour in &hours {
        fs::File::open(hour).unwrap().set_modified(long_ago).unwrap();
    }
    // It looks for what it has put off.
    send(&mut Client::ready(dup.addr()), 1);
    dup.wait_log("status=deferred");
    backup.reopen();
    backup.wait(1);
    wait_until("it is removed", || !hours[0].exists());
    end(&dup);
    assert!(hours[1].join("README").exists());
}
