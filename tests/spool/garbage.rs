//! What does not belong into the spool, or is not what its name says: put aside or left alone with
//! a line in the log, never followed, never fatal, and no reason to keep mail from anybody.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::common::*;
use crate::*;

const HOUR: &str = "queue/2026112309";

/// A message as it lies in the spool.
fn mail(backup: &Sink, body: &[u8]) -> Vec<u8> {
    let name = backup.addr();
    let head = format!("NOOP {name}\r\nMAIL FROM:<{FROM}>\r\nRCPT TO:<{TO}>\r\nDATA\r\n");
    [head.as_bytes(), body, b".\r\n"].concat()
}

/// A spool with one good message in it, number 1, and what `put` adds. It takes the hour's folder
/// and the name of a backup's copy for an id. The program delivers the good one and one more that
/// it gets now. Gives its log.
#[track_caller]
fn survives(put: impl Fn(&Path, &dyn Fn(&str) -> String)) -> (Folder, Sink, String) {
    let folder = Folder::new();
    let primary = Sink::start();
    let backup = Sink::start();
    kill(folder.start(&primary, &[&backup]));
    let hour = folder.path().join(HOUR);
    fs::create_dir(&hour).unwrap();
    let copy = |id: &str| format!("{id}.to.{}", backup.addr());
    fs::write(hour.join("5F3A9C20B1.mail"), mail(&backup, &numbered(1))).unwrap();
    fs::write(hour.join(copy("5F3A9C20B1")), "").unwrap();
    put(&hour, &copy);
    let dup = folder.start(&primary, &[&backup]);
    send(&mut Client::ready(dup.addr()), 2);
    backup.wait_for("the good ones", |backup| backup.messages().len() >= 2);
    let name = backup.addr().to_string();
    let is_left = |file: &String| {
        file.contains("5F3A9C20B1.") || file.ends_with(&name) && !file.starts_with("2026112309/")
    };
    wait_until("they are settled", || !folder.files("queue").iter().any(is_left));
    // What it makes of the rest it has made when it has ended.
    dup.wait_log("the spool was looked through");
    end(&dup);
    let mut expected = vec![numbered(1), numbered(2)];
    expected.sort();
    assert_eq!(bodies(&backup.attempts()), expected, "{}", dup.log());
    (folder, backup, dup.log())
}

/// A message or state whose octets are wrong is put aside, whole.
#[test]
fn files_that_cannot_be_read_are_put_aside() {
    let good = |backup: &str, body: &str| {
        format!("NOOP {backup}\r\nMAIL FROM:<{FROM}>\r\nRCPT TO:<{TO}>\r\nDATA\r\n{body}")
    };
    let long = format!("MAIL FROM:<{}@example.com>", "x".repeat(1 << 20));
    let mails: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", Vec::new()),
        ("cut off in the envelope", good("b:25", "")[..30].into()),
        ("no body", good("b:25", "").into()),
        ("cut off in the body", good("b:25", "Subject: x\r\n\r\nHel").into()),
        ("ends in a dot that is none", good("b:25", "x\r\n.\n").into()),
        ("binary", (0..=255).cycle().take(100_000).collect()),
        ("NULs, as after a power loss", vec![0; 4096]),
        ("a huge line", format!("NOOP b:25\r\n{long}\r\nRCPT TO:<{TO}>\r\nDATA\r\n.\r\n").into()),
        ("a huge line without end", vec![b'x'; 10 << 20]),
        ("no recipient", format!("NOOP b:25\r\nMAIL FROM:<{FROM}>\r\nDATA\r\n.\r\n").into()),
        ("no sender", format!("NOOP b:25\r\nRCPT TO:<{TO}>\r\nDATA\r\n.\r\n").into()),
        ("another command", good("b:25\r\nVRFY x", ".\r\n").into()),
        ("bare LF", good("b:25", "x\r\n.\r\n").replace("\r\n", "\n").into()),
    ];
    let states: Vec<(&str, &[u8])> = vec![
        ("binary", b"\xff\xfe\0\n"),
        ("NULs", &[0; 512]),
        ("no such word", b"attempts 1\nwhatever\n"),
        ("no number", b"attempts one\n"),
        ("too many digits", b"next 99999999999999999999999\n"),
        ("no place", b"owed 0 x\n"),
    ];
    let count = mails.len();
    let id = |place: usize| format!("00000000{place:02X}");
    let (folder, backup, log) = survives(|hour, copy| {
        for (place, (_, octets)) in mails.iter().enumerate() {
            fs::write(hour.join(format!("{}.mail", id(place))), octets).unwrap();
            fs::write(hour.join(copy(&id(place))), "").unwrap();
        }
        for (place, (_, octets)) in states.iter().enumerate() {
            let id = id(count + place);
            let head = good("b:25", "Subject: good\r\n\r\n.\r\n");
            fs::write(hour.join(format!("{id}.mail")), head).unwrap();
            fs::write(hour.join(copy(&id)), octets).unwrap();
        }
    });
    for (place, (what, octets)) in mails.iter().enumerate() {
        let aside = folder.path().join(format!("damaged/{}.mail", id(place)));
        assert!(fs::read(&aside).is_ok_and(|found| found == *octets), "{what}\n{log}");
        assert!(log.contains(&format!("error: {}: ", id(place))), "{what}\n{log}");
    }
    for (place, (what, octets)) in states.iter().enumerate() {
        let name = format!("damaged/{}.to.{}", id(count + place), backup.addr());
        let aside = folder.path().join(name);
        assert!(fs::read(&aside).is_ok_and(|found| found == *octets), "{what}\n{log}");
    }
    assert!(!log.contains("panicked"), "{log}");
}

/// A state that names recipients which the message has not got is not that message's: all of it is
/// owed, for twice is better than never.
#[test]
fn a_state_for_recipients_that_there_are_none_of() {
    let folder = Folder::new();
    let (primary, backup) = (Sink::start(), Sink::start());
    kill(folder.start(&primary, &[&backup]));
    let hour = folder.path().join(HOUR);
    fs::create_dir(&hour).unwrap();
    for (number, owed) in ["7", "18446744073709551615 7", "0 7"].iter().enumerate() {
        let id = format!("5F3A9C20B{number}");
        fs::write(hour.join(format!("{id}.mail")), mail(&backup, &numbered(number))).unwrap();
        let state = format!("attempts 2\nreply 450 4.2.0 greylisted\nowed {owed}\n");
        fs::write(hour.join(format!("{id}.to.{}", backup.addr())), state).unwrap();
    }
    let dup = folder.start(&primary, &[&backup]);
    assert_eq!(bodies(&backup.wait(3)), [0, 1, 2].map(numbered));
    end(&dup);
    assert!(!dup.log().contains("panic"), "{}", dup.log());
}

/// Things that are no files, under names like ours.
fn things(hour: &Path, copy: &dyn Fn(&str) -> String) {
    let good = hour.join("5F3A9C20B1.mail");
    let mkfifo = |name: &str| mkfifo(&hour.join(name), Mode::S_IRWXU).unwrap();
    // In the place of a copy, with a message …
    for id in ["0000000001", "0000000002", "0000000003", "0000000004"] {
        fs::copy(&good, hour.join(format!("{id}.mail"))).unwrap();
    }
    fs::create_dir(hour.join(copy("0000000001"))).unwrap();
    mkfifo(&copy("0000000002"));
    symlink("/etc/passwd", hour.join(copy("0000000003"))).unwrap();
    symlink("/nowhere", hour.join(copy("0000000004"))).unwrap();
    // … and in the place of a message, with a copy.
    fs::create_dir(hour.join("0000000005.mail")).unwrap();
    mkfifo("0000000006.mail");
    symlink(&good, hour.join("0000000007.mail")).unwrap();
    symlink("/dev/zero", hour.join("0000000008.mail")).unwrap();
    symlink("/nowhere", hour.join("0000000009.mail")).unwrap();
    for id in ["0000000005", "0000000006", "0000000007", "0000000008", "0000000009"] {
        fs::write(hour.join(copy(id)), "").unwrap();
    }
}

#[test]
fn what_is_no_file_is_never_followed_and_blocks_nothing() {
    let (_folder, _, log) = survives(things);
    for number in 1..=9 {
        assert!(log.contains(&format!("error: 000000000{number}: ")), "{number}\n{log}");
    }
    assert!(fs::metadata("/etc/passwd").unwrap().len() > 0);
    assert!(!log.contains("panicked"), "{log}");
}

/// The line in the log says that it was put aside.
#[test]
fn what_is_no_file_is_put_aside() {
    let (folder, _, log) = survives(things);
    let damaged: Vec<_> = fs::read_dir(folder.path().join("damaged"))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    for number in 1..=9 {
        let start = format!("000000000{number}.");
        let is_it = |name: &std::ffi::OsString| name.to_str().unwrap().starts_with(&start);
        assert!(damaged.iter().any(is_it), "{number}: {damaged:?}\n{log}");
    }
}

/// Files of others, which are nothing to us.
#[test]
fn foreign_files_are_left_alone() {
    let foreign = ["README", "5F3A9C20B9.mail.bak", "5F3A9C20B9x.mail", ".hidden", "x.to.y:25"];
    let (folder, _, log) = survives(|hour, _| {
        for name in foreign {
            fs::write(hour.join(name), "mine").unwrap();
        }
        let queue = hour.parent().unwrap();
        let root = queue.parent().unwrap();
        for (place, name) in
            [(queue, "lost+found"), (queue, "20261123"), (queue, "notanhour!"), (root, "mine")]
        {
            fs::create_dir(place.join(name)).unwrap();
            fs::write(place.join(name).join("file"), "mine").unwrap();
        }
        symlink("/", queue.join("2026112400")).unwrap();
        fs::write(queue.join("2026112401"), "mine").unwrap();
        fs::write(root.join("hold/mine"), "mine").unwrap();
        fs::write(root.join("failed/mine"), "mine").unwrap();
    });
    for name in foreign {
        assert_eq!(folder.text(&format!("{HOUR}/{name}")), "mine", "{name}");
    }
    for name in
        ["queue/lost+found/file", "queue/20261123/file", "mine/file", "hold/mine", "failed/mine"]
    {
        assert_eq!(folder.text(name), "mine", "{name}");
    }
    assert!(!log.contains(" error: "), "{log}");
}

/// A copy whose message was put aside is owed by nobody any more: it goes along, or each look at
/// the spool finds it again.
#[test]
fn the_copies_of_a_damaged_message_go_along() {
    let folder = Folder::new();
    let (primary, backup) = (Sink::start(), Sink::refusing(SinkOptions::default()));
    kill(folder.start(&primary, &[&backup]));
    let hour = folder.path().join(HOUR);
    fs::create_dir(&hour).unwrap();
    for (id, octets) in [("5F3A9C20B1", mail(&backup, &numbered(1))), ("5F3A9C20B2", Vec::new())] {
        fs::write(hour.join(format!("{id}.mail")), octets).unwrap();
        fs::write(hour.join(format!("{id}.to.{}", backup.addr())), "").unwrap();
    }
    let dup = folder.start(&primary, &[&backup]);
    // Not before the sweep of the start, which would remove the copy.
    dup.wait_log("is owed");
    dup.wait_log("is down");
    backup.reopen();
    backup.wait(1);
    wait_until("it is put aside", || !folder.files("damaged").is_empty());
    end(&dup);
    assert_eq!(folder.files("queue"), [""; 0], "{:?}", folder.files("damaged"));
}

/// What a crash may leave, made by hand, is settled at the start; without a word of error, since
/// nothing is wrong.
#[test]
fn what_a_crash_leaves_is_no_error() {
    for _ in 0..10 {
        let (folder, _, log) = survives(|hour, copy| {
            let tmp = hour.parent().unwrap().parent().unwrap().join("tmp");
            fs::write(hour.join(copy("5F3A9C20B2")), "").unwrap();
            fs::write(tmp.join("5F3A9C20B2"), "NOOP x\r\nMAIL FR").unwrap();
            fs::write(hour.join("5F3A9C20B3.mail"), "owed to nobody").unwrap();
        });
        folder.assert_clean();
        assert!(!log.contains(" error: "), "{log}");
    }
}

/// A message that is owed to nobody any more, and lies in `failed/` as well.
#[test]
fn what_failed_does_not_stay_in_the_queue() {
    let (folder, ..) = survives(|hour, copy| {
        let failed = hour.parent().unwrap().parent().unwrap().join("failed");
        fs::copy(hour.join("5F3A9C20B1.mail"), hour.join("5F3A9C20B2.mail")).unwrap();
        fs::hard_link(hour.join("5F3A9C20B2.mail"), failed.join("5F3A9C20B2.mail")).unwrap();
        fs::write(failed.join(copy("5F3A9C20B2")), "reply 554 no\nowed 0\n").unwrap();
    });
    folder.assert_clean();
    assert_eq!(folder.files("failed").len(), 2);
}
