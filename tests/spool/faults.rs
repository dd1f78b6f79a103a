//! Disks that fail: mail flows all the same, and copies by way of memory, or the client hears 452
//! where the spool is required. Nothing is lost in silence, and when the fault is gone the spool
//! is used again.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::ptr;
use std::time::{Duration, Instant};

use nix::libc;

use crate::common::*;
use crate::*;

const COMPLAINT: &str = "the spool (relay.spool) failed";

/// Starts the program with a working spool, breaks it, sends, mends it and sends again: small and
/// big bodies, with and without `spool_required`.
#[track_caller]
fn withstands(folder: &Folder, shatter: impl Fn(&Dup), mend: impl Fn(&Dup)) {
    withstands_with(folder, [numbered(1), mail_body(700_000)], shatter, mend);
}

#[track_caller]
fn withstands_with(
    folder: &Folder,
    sent: [Vec<u8>; 2],
    shatter: impl Fn(&Dup),
    mend: impl Fn(&Dup),
) {
    for required in [false, true] {
        let primary = Sink::start();
        let backup = Sink::start();
        let yaml = folder.config(&primary, &[&backup], &format!("spool_required: {required}"));
        let dup = Dup::start(&yaml);
        // Whatever the first message needs is there afterwards.
        let mut client = Client::ready(dup.addr());
        send(&mut client, 0);
        backup.wait(1);
        folder.wait_empty();
        let mut expected = vec![numbered(0)];
        for (round, body) in sent.clone().into_iter().enumerate() {
            client.expect(&format!("MAIL FROM:<{FROM}>"), 250);
            client.expect(&format!("RCPT TO:<{TO}>"), 250);
            shatter(&dup);
            client.expect("DATA", 354);
            let reply = client.body(&body);
            if required {
                assert_eq!(reply.code, 452, "{reply:?}");
                assert!(reply.text().starts_with("4.3.1 "), "{reply:?}");
            } else {
                assert_eq!(reply.code, 250, "{reply:?}");
                expected.push(body.clone());
            }
            assert!(dup.wait_logs(COMPLAINT, round + 1)[round].contains(" error: "));
            mend(&dup);
            backup.wait_for("the copies", |backup| backup.messages().len() >= expected.len());
            // The client of a queue comes again with what was not taken.
            assert_eq!(client.message(FROM, &[TO], &body).code, 250);
            expected.push(body);
            backup.wait_for("the copies", |backup| backup.messages().len() >= expected.len());
            folder.wait_empty();
        }
        drop(client);
        end(&dup);
        expected.sort();
        for sink in [&primary, &backup] {
            assert!(bodies(&sink.attempts()) == expected, "required: {required}\n{}", dup.log());
        }
        assert_eq!(dup.log_lines("status=lost"), [""; 0]);
        folder.assert_clean();
    }
}

#[test]
fn a_folder_that_is_missing() {
    for part in ["tmp", "queue"] {
        let folder = Folder::new();
        let (place, away) = (folder.path().join(part), folder.path().join("away"));
        let there = || fs::rename(&place, &away).unwrap();
        let back = || fs::rename(&away, &place).unwrap();
        withstands(&folder, |_| there(), |_| back());
    }
}

#[test]
fn the_whole_spool_is_missing() {
    let folder = Folder::new();
    let (place, away) = (folder.path(), folder.0.path().join("away"));
    let there = || fs::rename(&place, &away).unwrap();
    let back = || fs::rename(&away, &place).unwrap();
    withstands(&folder, |_| there(), |_| back());
}

#[test]
fn a_file_stands_where_a_folder_should() {
    let folder = Folder::new();
    let (place, away) = (folder.path().join("tmp"), folder.path().join("away"));
    let shatter = || {
        fs::rename(&place, &away).unwrap();
        fs::write(&place, "").unwrap();
    };
    let mend = || {
        fs::remove_file(&place).unwrap();
        fs::rename(&away, &place).unwrap();
    };
    withstands(&folder, |_| shatter(), |_| mend());
}

/// No descriptor is left for a file.
#[test]
fn out_of_descriptors() {
    let folder = Folder::new();
    let limit = |dup: &Dup, count: Option<usize>| {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        let pid = dup.pid() as libc::pid_t;
        // SAFETY: `limit` is ours, and the process is our child.
        unsafe {
            assert_eq!(libc::prlimit(pid, libc::RLIMIT_NOFILE, ptr::null(), &mut limit), 0);
            limit.rlim_cur = count.map_or(limit.rlim_max, |count| count as libc::rlim_t);
            assert_eq!(libc::prlimit(pid, libc::RLIMIT_NOFILE, &limit, ptr::null_mut()), 0);
        }
    };
    // A big body has no other place: that one would be lost, with an error line. Numbers below
    // the highest that is open may be free: none of them may be used either.
    let small = [numbered(1), numbered(2)];
    withstands_with(&folder, small, |dup| limit(dup, Some(3)), |dup| limit(dup, None));
}

/// Where descriptors are few, as many clients are let in as have one for their place in the spool,
/// beside those that wait.
#[test]
fn few_descriptors_are_for_places_in_the_spool_too() {
    let folder = Folder::new();
    let primary = Sink::start();
    let backup = Sink::start();
    let limit = || {
        let most = libc::rlimit { rlim_cur: 200, rlim_max: 200 };
        // SAFETY: `most` is ours.
        match unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &most) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    let yaml = folder.config(&primary, &[&backup], "spool_required: true");
    let poor = |command: &mut std::process::Command| {
        // SAFETY: between fork and exec there is only this one system call.
        unsafe { command.pre_exec(limit) };
    };
    let dup = Dup::start_with(poor, &yaml);
    let line = dup.wait_log("clients at a time");
    let words: Vec<&str> = line.split_whitespace().collect();
    let at = words.iter().position(|word| *word == "serving").unwrap();
    let most: usize = words[at + 1].parse().unwrap();
    let mut clients: Vec<Client> = (0..most).map(|_| Client::ready(dup.addr())).collect();
    for client in &mut clients {
        client.envelope(FROM, &[TO]);
    }
    let _waiting: Vec<Client> = (0..most).map(|_| Client::connect(dup.addr())).collect();
    let replies: Vec<u16> =
        clients.iter_mut().map(|client| client.body(&numbered(1)).code).collect();
    assert_eq!(replies, vec![250; most], "{}", dup.log());
    backup.wait(most);
    assert_eq!(dup.log_lines(COMPLAINT), [""; 0]);
}

/// A tmpfs of this thread's own on `folder`, which the programs that it starts see too. False
/// where that may not be made.
fn mount_on(folder: &Path, options: &str) -> bool {
    // SAFETY: it takes no memory; the other threads keep the namespace that they have.
    let is_private = unsafe { libc::unshare(libc::CLONE_NEWNS) } == 0
        && mount(Path::new("/"), libc::MS_REC | libc::MS_PRIVATE, "").is_ok();
    fs::create_dir_all(folder).unwrap();
    if is_private && mount(folder, 0, &format!("mode=700,{options}")).is_ok() {
        return true;
    }
    assert!(std::env::var_os("CI").is_none(), "mounts need root, and CI is set");
    strace::skip("mounts need root");
    false
}

fn mount(on: &Path, flags: libc::c_ulong, options: &str) -> io::Result<()> {
    const TMPFS: &CStr = c"tmpfs";
    let on = CString::new(on.as_os_str().as_bytes())?;
    let options = CString::new(options)?;
    // SAFETY: all of them are strings.
    let done = unsafe {
        libc::mount(TMPFS.as_ptr(), on.as_ptr(), TMPFS.as_ptr(), flags, options.as_ptr().cast())
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[test]
fn a_file_system_that_turns_read_only() {
    let folder = Folder::new();
    let spool = folder.path();
    if !mount_on(&spool, "size=200m") {
        return;
    }
    let turn = |flags| {
        wait_until("nobody writes", || mount(&spool, libc::MS_REMOUNT | flags, "size=200m").is_ok())
    };
    withstands(&folder, |_| turn(libc::MS_RDONLY), |_| turn(0));
}

#[test]
fn a_disk_without_room_for_another_file() {
    let folder = Folder::new();
    let spool = folder.path();
    if !mount_on(&spool, "size=200m,nr_inodes=60") {
        return;
    }
    let fill = || {
        fs::create_dir(spool.join("fill")).unwrap();
        (0..).find(|number| fs::write(spool.join(format!("fill/{number}")), "").is_err());
    };
    withstands(&folder, |_| fill(), |_| fs::remove_dir_all(spool.join("fill")).unwrap());
}

/// The reserve that is left to others, 64 MiB, is reached.
#[test]
fn a_disk_that_is_nearly_full() {
    let folder = Folder::new();
    let spool = folder.path();
    if !mount_on(&spool, "size=80m") {
        return;
    }
    let fill = || fs::write(spool.join("fill"), vec![0; 20 << 20]).unwrap();
    withstands(&folder, |_| fill(), |_| fs::remove_file(spool.join("fill")).unwrap());
}

/// A message that was begun with room and ends without: what the spool has already must not be
/// missing in the copy.
#[test]
fn a_disk_that_is_full_in_the_middle_of_a_message() {
    for required in [false, true] {
        let folder = Folder::new();
        let spool = folder.path();
        if !mount_on(&spool, "size=70m") {
            return;
        }
        let (primary, backup) = (Sink::start(), Sink::start());
        let relay = format!("spool_required: {required}\nbackup_memory: 200000000");
        let dup = Dup::start(&folder.config(&primary, &[&backup], &relay));
        let body = mail_body(72 << 20);
        let mut client = Client::ready(dup.addr());
        client.envelope(FROM, &[TO]);
        let reply = client.body(&body);
        dup.wait_log(COMPLAINT);
        if required {
            assert_eq!(reply.code, 452, "{reply:?}");
            assert_eq!(primary.attempts().len(), 0);
        } else {
            assert_eq!(reply.code, 250, "{reply:?}");
            backup.wait_for("the copy", |backup| !backup.attempts().is_empty());
            assert!(backup.messages()[0].data == body);
        }
        // All of its room is free again.
        folder.wait_empty();
        wait_until("the draft is gone", || folder.files("tmp").is_empty());
        send(&mut client, 1);
        backup.wait_for("the next", |backup| {
            backup.messages().last().is_some_and(|message| message.data == numbered(1))
        });
        drop(client);
        end(&dup);
        assert_eq!(backup.attempts().len(), if required { 1 } else { 2 });
        folder.assert_clean();
    }
}

/// The same, step by step: the disk fills up while some octets are in memory and in the draft. The
/// copy has each of them once, and its end is the end: what followed would be taken for commands.
#[test]
fn a_disk_that_is_full_between_two_parts_of_a_message() {
    for last in [100_000, 400_000] {
        let folder = Folder::new();
        let spool = folder.path();
        if !mount_on(&spool, "size=70m") {
            return;
        }
        let (primary, backup) = (Sink::start(), Sink::start());
        let dup = folder.start(&primary, &[&backup]);
        let body = mail_body(400_000 + last);
        let mut client = Client::ready(dup.addr());
        client.envelope(FROM, &[TO]);
        let draft = || {
            let files = folder.files("tmp");
            files.first().map_or(0, |file| {
                fs::metadata(spool.join("tmp").join(file)).map_or(0, |about| about.len())
            })
        };
        // More than is kept in memory, then a little that is.
        client.send(&body[..300_000]);
        wait_until("the first part is in the draft", || draft() > 300_000);
        client.send(&body[300_000..400_000]);
        wait_until("the second part is in the draft", || draft() > 400_000);
        let full = fs::write(spool.join("fill"), vec![0; 100 << 20]);
        assert!(full.is_err(), "the disk is not full");
        client.send([&body[400_000..], b".\r\n"].concat());
        client.expect_reply(250);
        dup.wait_log(COMPLAINT);
        fs::remove_file(spool.join("fill")).unwrap();
        backup.wait_for("the copy", |backup| !backup.attempts().is_empty());
        drop(client);
        end(&dup);
        assert_only_this(&backup, &body);
        folder.assert_clean();
    }
}

/// It got this message, and nothing but commands of SMTP around it.
#[track_caller]
fn assert_only_this(sink: &Sink, body: &[u8]) {
    let attempts = sink.attempts();
    let strange = |(_, line): &(usize, String)| {
        let verb = line.split([' ', ':']).next().unwrap_or("");
        !["EHLO", "MAIL", "RCPT", "DATA", "RSET", "QUIT"].contains(&verb)
    };
    let strange: Vec<_> = sink.commands().into_iter().filter(strange).take(3).collect();
    assert!(strange.is_empty(), "part of the message was sent as commands: {strange:?}");
    assert_eq!(attempts.len(), 1);
    let got = &attempts[0].data;
    let same = got.iter().zip(body).take_while(|(got, sent)| got == sent).count();
    assert!(got == body, "{} octets of {}, the first {same} are right", got.len(), body.len());
}

/// The disk gives an error where the message is made durable.
#[test]
fn an_error_of_fdatasync() {
    if !strace::available() {
        return;
    }
    for (required, body) in [(false, numbered(1)), (false, mail_body(700_000)), (true, numbered(1))]
    {
        let folder = Folder::new();
        let (primary, backup) = (Sink::start(), Sink::start());
        let yaml = folder.config(&primary, &[&backup], &format!("spool_required: {required}"));
        let log = folder.0.path().join("trace");
        let dup = strace::start(&["-e", "inject=fdatasync:error=EIO"], &log, &yaml);
        let reply = try_body(&dup, &body);
        assert!(dup.wait_log(COMPLAINT).contains("Input/output error"));
        if required {
            assert_eq!((reply.code, reply.text().starts_with("4.3.1 ")), (452, true), "{reply:?}");
        } else {
            assert_eq!(reply.code, 250, "{reply:?}");
            backup.wait(1);
        }
        end(&dup);
        if !required {
            assert_only_this(&backup, &body);
        }
        let count = usize::from(!required);
        assert_eq!((primary.attempts().len(), backup.attempts().len()), (count, count));
        assert_eq!(dup.log_lines("status=lost"), [""; 0]);
        folder.assert_clean();
    }
}

/// The primary has taken the message and only then the commit fails: whatever is required, it is
/// too late for a 452, which would make the client send it twice.
#[test]
fn an_error_of_the_commit() {
    if !strace::available() {
        return;
    }
    let faults = ["rename:error=EIO", "rename:error=EROFS", "fsync:error=EIO:when=2+"];
    for (fault, required) in faults.into_iter().flat_map(|fault| [(fault, false), (fault, true)]) {
        for body in [numbered(1), mail_body(700_000)] {
            let folder = Folder::new();
            let (primary, backup) = (Sink::start(), Sink::start());
            let yaml = folder.config(&primary, &[&backup], &format!("spool_required: {required}"));
            let log = folder.0.path().join("trace");
            // The first fsync of the worker's thread is that of queue/.
            let dup = strace::start(&["-e", &format!("inject={fault}")], &log, &yaml);
            let reply = try_body(&dup, &body);
            assert_eq!(reply.code, 250, "{fault}: {reply:?}");
            dup.wait_log(COMPLAINT);
            backup.wait(1);
            end(&dup);
            assert_only_this(&backup, &body);
            assert_eq!(primary.attempts().len(), 1);
            assert_eq!(dup.log_lines("status=lost"), [""; 0]);
            folder.assert_clean();
            // And it is not brought a second time by the next start.
            let dup = Dup::start(&yaml);
            folder.assert_clean();
            end(&dup);
            assert_eq!(backup.attempts().len(), 1, "{fault}");
        }
    }
}

#[track_caller]
fn try_body(dup: &Dup, body: &[u8]) -> Reply {
    let mut client = Client::ready(dup.addr());
    client.envelope(FROM, &[TO]);
    client.body(body)
}

/// What the backup refuses for good goes to `failed/`, or else it is owed still: it must not be
/// gone because it could not be written down.
#[test]
fn a_refusal_that_cannot_be_kept_stays_owed() {
    for whole in [true, false] {
        let folder = Folder::new();
        let primary = Sink::start();
        let backup = Sink::replying(move |event| match event {
            Event::EndOfData(_) if whole => Action::reply("554 5.7.1 spam"),
            Event::Rcpt(line) if !whole && line.contains("<no@") => Action::reply("550 5.1.1 no"),
            _ => Action::Default,
        });
        let dup = folder.start(&primary, &[&backup]);
        let (place, away) = (folder.path().join("failed"), folder.path().join("away"));
        fs::rename(&place, &away).unwrap();
        let mut client = Client::ready(dup.addr());
        let reply = client.message(FROM, &["no@example.com", TO], &numbered(1));
        assert_eq!(reply.code, 250, "{reply:?}");
        dup.wait_log("failed/ in the spool");
        drop(client);
        // In order, so that whatever it does about it is done.
        end(&dup);
        fs::rename(&away, &place).unwrap();
        assert_eq!(ids(&folder.files("queue")).len(), 1, "gone; whole: {whole}\n{}", dup.log());
        // With the folder there it finds its end.
        let dup = folder.start(&primary, &[&backup]);
        wait_until("it is in failed/", || folder.files("failed").len() == 2);
        folder.wait_empty();
        end(&dup);
    }
}

/// What would keep each message out of the spool is found before mail flows.
#[test]
fn check_says_that_the_spool_has_no_place() {
    let folder = Folder::new();
    let spool = folder.path();
    if !mount_on(&spool, "size=80m") {
        return;
    }
    let primary = Sink::start();
    let check = |relay: &str| {
        let output = run(&["check"], Some(&folder.config(&primary, &[], relay)), &[]);
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        let line = stdout.lines().find(|line| line.starts_with("spool")).map(str::to_owned);
        (output.status.code(), line.expect("a line about the spool"))
    };
    let (status, line) = check("");
    assert!(status == Some(0) && line.ends_with(": ok"), "{line}");
    folder.assert_clean();
    fs::write(spool.join("fill"), vec![0; 20 << 20]).unwrap();
    let (status, line) = check("");
    assert!(status == Some(1) && line.contains("67108864 are left to others"), "{line}");
    fs::remove_file(spool.join("fill")).unwrap();
    fs::write(spool.join("failed/5F3A9C20B1.mail"), vec![0; 2000]).unwrap();
    let (status, line) = check("spool_max_bytes: 2000");
    assert!(status == Some(1) && line.contains("relay.spool_max_bytes"), "{line}");
    mount(&spool, libc::MS_REMOUNT | libc::MS_RDONLY, "size=80m").unwrap();
    let (status, line) = check("");
    assert!(status == Some(1) && line.contains("Read-only file system"), "{line}");
}

/// `relay.spool_max_bytes` is a disk that is full, and room that is made is seen within seconds.
#[test]
fn the_limit_of_the_spool() {
    for required in [false, true] {
        let folder = Folder::new();
        let primary = Sink::start();
        let (down, up) = (Sink::refusing(SinkOptions::default()), Sink::start());
        let relay = format!("spool_max_bytes: 2000\nspool_required: {required}");
        let dup = Dup::start(&folder.config(&primary, &[&down, &up], &relay));
        let mut client = Client::ready(dup.addr());
        let body = mail_body(1000);
        for _ in 0..2 {
            assert_eq!(client.message(FROM, &[TO], &body).code, 250);
        }
        let full = client.message(FROM, &[TO], &body);
        let line = dup.wait_log(COMPLAINT);
        assert!(line.contains("spool_max_bytes"), "{line}");
        assert_eq!(full.code, if required { 452 } else { 250 }, "{full:?}");
        let count = if required { 2 } else { 3 };
        up.wait_for("its copies", |up| up.messages().len() >= count);
        assert_eq!(ids(&folder.files("queue")).len(), 2);
        down.reopen();
        down.wait_for("its copies", |down| down.messages().len() >= count);
        folder.wait_empty();
        let before = dup.log_lines(COMPLAINT).len();
        let mut sent = count;
        wait_until("there is room again", || {
            let complaints = dup.log_lines(COMPLAINT).len();
            sent += usize::from(client.message(FROM, &[TO], &body).code == 250);
            std::thread::sleep(std::time::Duration::from_millis(100));
            dup.log_lines(COMPLAINT).len() == complaints
        });
        assert!(dup.log_lines(COMPLAINT).len() > before, "it was not full");
        drop(client);
        down.wait_for("all", |down| down.messages().len() >= sent);
        folder.wait_empty();
        end(&dup);
        assert_eq!((up.attempts().len(), down.attempts().len()), (sent, sent));
        assert_eq!(primary.attempts().len(), sent);
        assert_eq!(dup.log_lines("status=lost"), [""; 0]);
        folder.assert_clean();
    }
}

/// What lies in the spool is counted again each minute, and more often when it seems to be full,
/// which may take seconds where there is much: no mail waits for that.
#[track_caller]
fn mail_does_not_wait_for_a_count(max_bytes: u64) {
    if !strace::available() {
        return;
    }
    let folder = Folder::new();
    let (primary, backup) = (Sink::start(), Sink::start());
    let yaml = folder.config(&primary, &[&backup], &format!("spool_max_bytes: {max_bytes}"));
    let delay = ["-e", "inject=getdents64:delay_enter=1000000"];
    let dup = strace::start(&delay, &folder.0.path().join("trace"), &yaml);
    let mut client = Client::ready(dup.addr());
    let tasks = format!("/proc/{}/task", dup.pid());
    let is_counting = || {
        fs::read_dir(&tasks)
            .unwrap()
            .flatten()
            .any(|task| fs::read(task.path().join("comm")).is_ok_and(|name| name == b"count\n"))
    };
    let end = Instant::now() + Duration::from_secs(100);
    let mut number = 0;
    while !is_counting() {
        number += 1;
        send(&mut client, number);
        assert!(Instant::now() < end, "nobody counts");
        std::thread::sleep(Duration::from_millis(100));
    }
    send(&mut client, number + 1);
    assert!(is_counting(), "the mail has waited for it");
    kill(dup);
}

#[test]
fn mail_does_not_wait_for_a_count_with_room() {
    mail_does_not_wait_for_a_count(1_000_000);
}

#[test]
fn mail_does_not_wait_for_a_count_without_room() {
    mail_does_not_wait_for_a_count(1);
}

/// That a backup is down, or has deferred a copy, is written to disk; new mail does not wait for
/// that.
#[track_caller]
fn mail_does_not_wait_for_the_state(is_down: bool) {
    if !strace::available() {
        return;
    }
    let folder = Folder::new();
    let primary = Sink::start();
    let backup = Sink::refusing(SinkOptions::replying(|event| match event {
        Event::Rcpt(_) => Action::reply("450 4.2.0 later"),
        _ => Action::Default,
    }));
    let dup = folder.start(&primary, &[&backup]);
    send(&mut Client::ready(dup.addr()), 1);
    kill(dup);
    let name = match is_down {
        true => backup.addr().to_string(),
        false => {
            backup.reopen();
            format!("{}.to.{}", ids(&folder.files("queue"))[0], backup.addr())
        }
    };
    // strace wants to know the file before: it is written anew, and long in coming to disk.
    let new = folder.path().join("tmp").join(name);
    fs::write(&new, "old").unwrap();
    let delay = ["-P", new.to_str().unwrap(), "-e", "inject=fsync:delay_enter=12000000"];
    let yaml = folder.config(&primary, &[&backup], "");
    let dup = strace::start(&delay, &folder.0.path().join("trace"), &yaml);
    let mut client = Client::ready(dup.addr());
    let is_coming = || fs::read_to_string(&new).is_ok_and(|text| text.contains("reply"));
    wait_until("it is being written", is_coming);
    send(&mut client, 2);
    assert!(is_coming(), "the mail has waited for it");
    kill(dup);
}

#[test]
fn mail_does_not_wait_for_a_hold_to_be_written() {
    mail_does_not_wait_for_the_state(true);
}

#[test]
fn mail_does_not_wait_for_a_deferral_to_be_written() {
    mail_does_not_wait_for_the_state(false);
}

/// Two processes write it down, each in its own time.
#[test]
fn two_that_find_a_backup_down_at_the_same_time() {
    if !strace::available() {
        return;
    }
    let folder = Folder::new();
    let primary = Sink::start();
    let backup = Sink::refusing(SinkOptions::default());
    let dup = folder.start(&primary, &[&backup]);
    let mut client = Client::ready(dup.addr());
    (1..=20).for_each(|number| send(&mut client, number));
    drop(client);
    dup.wait_log("is down");
    kill(dup);
    let yaml = folder.config(&primary, &[&backup], "");
    let dups = ["one", "two"].map(|log| {
        let delay = ["-e", "inject=fsync:delay_enter=1000000"];
        strace::start(&delay, &folder.0.path().join(log), &yaml)
    });
    for dup in &dups {
        dup.wait_logs("status=deferred", 2);
    }
    backup.reopen();
    backup.wait(20);
    folder.wait_empty();
    dups.iter().for_each(end);
    for dup in &dups {
        assert_eq!(dup.log_lines(COMPLAINT), [""; 0]);
        assert_eq!(dup.log_lines("the spool (relay.spool)"), [""; 0]);
    }
}

/// Another process looks through the spool while a state is on its way to disk.
#[test]
fn a_state_that_is_being_written_is_not_swept_away() {
    if !strace::available() {
        return;
    }
    let folder = Folder::new();
    let primary = Sink::start();
    let backup = Sink::replying(|event| match event {
        Event::Rcpt(line) if line.contains("<later@") => Action::reply("450 4.2.0 later"),
        _ => Action::Default,
    });
    let yaml = folder.config(&primary, &[&backup], "");
    let delay = ["-e", "inject=fsync:delay_enter=1000000"];
    let dup = strace::start(&delay, &folder.0.path().join("trace"), &yaml);
    let mut client = Client::ready(dup.addr());
    assert_eq!(client.message(FROM, &[TO, "later@example.com"], &numbered(1)).code, 250);
    let is_coming = || folder.files("tmp").iter().any(|file| file.contains(".to."));
    wait_until("it is being written", is_coming);
    let output = run(&["flush", &primary.addr().to_string()], Some(&yaml), &[]);
    assert!(output.status.success(), "{output:?}");
    wait_until("it is written", || !is_coming());
    kill(dup);
    let copy = folder.files("queue").into_iter().find(|file| file.contains(".to.")).unwrap();
    assert!(folder.text(&format!("queue/{copy}")).contains("owed 1\n"), "all are owed again");
}

/// Who has a copy does not get it again because it cannot be written down that others still wait
/// for theirs.
#[test]
fn a_deferral_that_cannot_be_kept_sends_no_copy_twice() {
    for code in ["450 4.2.0 later", "550 5.1.1 no"] {
        let folder = Folder::new();
        let (place, away) = (folder.path().join("tmp"), folder.path().join("away"));
        let (from, to) = (place.clone(), away.clone());
        let primary = Sink::start();
        let backup = Sink::replying(move |event| match event {
            Event::Mail(_) => {
                let _ = fs::rename(&from, &to);
                Action::Default
            }
            Event::Rcpt(line) if line.contains("<no@") => Action::reply(code),
            _ => Action::Default,
        });
        let dup = folder.start(&primary, &[&backup]);
        let mut client = Client::ready(dup.addr());
        let reply = client.message(FROM, &["no@example.com", TO], &numbered(1));
        assert_eq!(reply.code, 250, "{reply:?}");
        dup.wait_logs("status=deferred", 3);
        fs::rename(&away, &place).unwrap();
        backup.set_reply(|_| Action::Default);
        folder.wait_empty();
        drop(client);
        end(&dup);
        let got: Vec<_> = backup.messages();
        let got: Vec<_> = got.iter().map(recipients).collect();
        assert_eq!(got, [[TO], ["no@example.com"]], "{code}\n{}", dup.log());
        folder.assert_clean();
    }
}

/// The same for a copy that is given up, which cannot be written down either.
#[test]
fn a_copy_that_cannot_be_given_up_is_sent_to_nobody_twice() {
    let folder = Folder::new();
    let primary = Sink::start();
    let (place, away) = (folder.path().join("tmp"), folder.path().join("away"));
    let (from, to) = (place.clone(), away.clone());
    let backup = Sink::refusing(SinkOptions::replying(move |event| match event {
        Event::Mail(_) => {
            let _ = fs::rename(&from, &to);
            Action::Default
        }
        Event::Rcpt(line) if line.contains("<no@") => Action::reply("450 4.2.0 later"),
        _ => Action::Default,
    }));
    let yaml = folder.config(&primary, &[&backup], "retry_for_seconds: 600");
    let dup = Dup::start(&yaml);
    let mut client = Client::ready(dup.addr());
    assert_eq!(client.message(FROM, &["no@example.com", TO], &numbered(1)).code, 250);
    kill(dup);
    let mail = &folder.files("queue")[0];
    assert!(mail.ends_with(".mail"), "{mail}");
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(3600);
    let mail = fs::File::open(folder.path().join("queue").join(mail)).unwrap();
    mail.set_modified(long_ago).unwrap();
    backup.reopen();
    let dup = Dup::start(&yaml);
    dup.wait_log("the spool (relay.spool) failed");
    backup.set_reply(|event| match event {
        Event::Rcpt(line) if line.contains("<no@") => Action::reply("450 4.2.0 later"),
        _ => Action::Default,
    });
    fs::rename(&away, &place).unwrap();
    // For this one, which has to wait, it looks into the spool again.
    let mut client = Client::ready(dup.addr());
    assert_eq!(client.message(FROM, &["no@example.com"], &numbered(2)).code, 250);
    dup.wait_log("attempts=3");
    assert_eq!(bodies(&backup.messages()), [numbered(1)], "{}", dup.log());
}
