//! The commands for the spool, and a process for one client, killed before every system call that
//! changes the spool: alone on it, and beside a daemon that has just started and looks through it.
//!
//! In the spool waits one message: backup A is owed all of it, and backup B has refused one
//! recipient, whose copy lies in `failed/`. Afterwards the order is given once more, as somebody
//! would who saw it die, and a daemon delivers what is there.

use std::fs;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::sync::Arc;
use std::thread;

use crate::common::*;
use crate::crash::try_message;
use crate::crowd::{Gate, wait_until_ended};
use crate::tracer::Traced;
use crate::*;

const ID: &str = "5F3A9C20B1";
const HOUR: &str = "queue/2026112309";
const RCPTS: [&str; 3] = ["one@example.com", "later@example.com", "no@example.com"];

/// What is done to the spool.
struct Order {
    words: fn(backups: &[String; 2]) -> Vec<String>,
    /// How often each of the recipients gets message 1 from A and from B, at least and at most.
    gets: [[(usize, usize); 3]; 2],
    /// The copy in `failed/` is still there at the end.
    stays: bool,
}

const ONCE: (usize, usize) = (1, 1);
/// Once more for a delivery that was open, or an order that is given twice.
const TWICE: (usize, usize) = (1, 2);
const NEVER: (usize, usize) = (0, 0);

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| word.to_string()).collect()
}

/// Gives it until it is not killed any more.
#[track_caller]
fn lives(order: &Order, beside: bool) {
    let mut at = 1;
    while one_life(order, at, beside) {
        at += 1;
    }
    // The look at the locks alone makes four.
    assert!(at > 6, "the calls are not seen: only {at}");
}

fn write_spool(folder: &Folder, backups: &[String; 2]) {
    let root = folder.path();
    for part in ["", "queue", HOUR, "failed"] {
        let part = root.join(part);
        fs::create_dir_all(&part).unwrap();
        fs::set_permissions(&part, fs::Permissions::from_mode(0o700)).unwrap();
    }
    let mut mail = format!("NOOP {}\r\nMAIL FROM:<{FROM}>\r\n", backups.join(" "));
    RCPTS.iter().for_each(|to| mail += &format!("RCPT TO:<{to}>\r\n"));
    mail += "DATA\r\n";
    let mail = [mail.as_bytes(), &numbered(1), b".\r\n"].concat();
    let [queue, failed] = [HOUR, "failed"].map(|part| root.join(part));
    fs::write(queue.join(format!("{ID}.mail")), mail).unwrap();
    fs::write(queue.join(format!("{ID}.to.{}", backups[0])), "").unwrap();
    fs::hard_link(queue.join(format!("{ID}.mail")), failed.join(format!("{ID}.mail"))).unwrap();
    let note = "attempts 1\nreply 550 5.1.1 no\nowed 2\n# 2 <no@example.com> 550 5.1.1 no\n";
    fs::write(failed.join(format!("{ID}.to.{}", backups[1])), note).unwrap();
}

/// True when it was killed.
#[track_caller]
fn one_life(order: &Order, kill_at: usize, beside: bool) -> bool {
    let folder = Folder::new();
    let primary = Sink::start();
    let backups = [Sink::start(), Sink::start()];
    let names = backups.each_ref().map(|backup| backup.addr().to_string());
    let yaml = folder.config(&primary, &backups.each_ref(), "");
    write_spool(&folder, &names);
    let words = (order.words)(&names);
    let is_inetd = words == ["inetd"];

    let daemon = beside.then(|| Dup::start(&yaml));
    let (killed, heard) = killed(&yaml, &words, &folder, kill_at);
    let left = folder.files("");
    let shown =
        format!("{words:?}, killed before the {kill_at}th, heard {heard:?}, left {left:#?}");
    assert!(heard.is_none_or(|code| code == 250), "{shown}");
    if let Some(daemon) = daemon {
        end(&daemon);
    }
    if !is_inetd {
        let words: Vec<_> = words.iter().map(String::as_str).collect();
        run(&words, Some(&yaml), &[]);
    }
    // Twice: what the first finds in the queue the second may find to be owed to nobody.
    for _ in 0..2 {
        let dup = Dup::start(&yaml);
        wait_until(&shown, || !folder.files("queue").iter().any(|file| file.contains(".to.")));
        dup.wait_log("was looked through");
        end(&dup);
    }

    let was_accepted = primary.messages().len() == 1;
    let mut reached = 0;
    for (backup, gets) in backups.iter().zip(order.gets) {
        let (first, second): (Vec<_>, Vec<_>) =
            backup.messages().into_iter().partition(|message| message.data == numbered(1));
        for (to, (least, most)) in RCPTS.iter().zip(gets) {
            let count = first.iter().filter(|message| recipients(message).contains(to)).count();
            assert!((least..=most).contains(&count), "{shown}: {to} got it {count} times");
        }
        assert!(second.iter().all(|message| message.data == numbered(2)), "{shown}");
        assert!(second.len() <= 2, "{shown}: {}", second.len());
        reached += usize::from(!second.is_empty());
    }
    // The message of the client: heard, on both; not accepted, on none.
    assert!(heard.is_none() || reached == 2, "{shown}");
    assert!(reached == 0 || was_accepted && reached == 2, "{shown}");

    let failed = folder.files("failed");
    match order.stays {
        true => assert_eq!(failed, [format!("{ID}.mail"), format!("{ID}.to.{}", names[1])]),
        false => assert_eq!(failed, [""; 0], "{shown}"),
    }
    assert_eq!((folder.files("queue"), folder.files("hold")), (Vec::new(), Vec::new()), "{shown}");
    assert_eq!(folder.files("damaged"), [""; 0], "{shown}");
    killed
}

/// Lets it run into its end: whether it was killed, and for a process for one client, the code of
/// the reply to its message, if that was heard.
#[track_caller]
fn killed(yaml: &str, words: &[String], folder: &Folder, kill_at: usize) -> (bool, Option<u16>) {
    let place = tempfile::tempdir().unwrap();
    let mut command = command(&place, Some(yaml));
    command.args(words);
    if words != ["inetd"] {
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let traced = Traced::run(command, place, &folder.path(), Some(kill_at));
        return (traced.trace().killed, None);
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let client = thread::spawn(move || try_message(addr, &[TO], &numbered(2)));
    let socket = OwnedFd::from(listener.accept().unwrap().0);
    command.stdin(socket.try_clone().unwrap()).stdout(socket);
    let traced = Traced::run(command, place, &folder.path(), Some(kill_at));
    let heard = client.join().unwrap();
    (traced.trace().killed, heard)
}

/// While one copy of a message is just being put into `failed/`, another is dropped there: the
/// message must not go with it.
#[test]
fn a_drop_beside_a_refusal() {
    if !strace::available() {
        return;
    }
    let folder = Folder::new();
    let gate = Arc::new(Gate::default());
    let door = Arc::clone(&gate);
    let primary = Sink::start();
    let refusing = |event: &Event| match event {
        Event::EndOfData(_) => Action::reply("554 5.7.1 spam"),
        _ => Action::Default,
    };
    let first = Sink::replying(refusing);
    let second = Sink::replying(move |event| {
        if let Event::EndOfData(_) = event {
            door.pass();
        }
        refusing(event)
    });
    // So that there is time between the message's name in `failed/` and that of the copy.
    let delay = ["-e", "inject=fsync:delay_enter=1000000"];
    let yaml = folder.config(&primary, &[&first, &second], "");
    let dup = strace::start(&delay, &folder.0.path().join("trace"), &yaml);
    send(&mut Client::ready(dup.addr()), 1);
    wait_until("the first is there", || folder.files("failed").len() == 2);
    wait_until("it is not in the queue", || folder.files("queue").len() == 2);
    gate.open();
    let end_of_name = format!(".to.{}", second.addr());
    wait_until("the second is coming", || {
        folder.files("tmp").iter().any(|file| file.ends_with(&end_of_name))
    });
    let words = ["drop", "--all", "--backup", &first.addr().to_string()];
    let output = run(&words, Some(&yaml), &[]);
    assert!(output.status.success(), "{output:?}");
    folder.wait_empty();
    end(&dup);
    let failed = folder.files("failed");
    let id = &ids(&failed)[0];
    assert_eq!(failed, [format!("{id}.mail"), format!("{id}{end_of_name}")]);
}

/// While a copy is just being put back into the queue, the last of the same message that was there
/// is delivered: the message must not go with it.
#[test]
fn a_retry_beside_a_delivery() {
    if !strace::available() {
        return;
    }
    let folder = Folder::new();
    let gate = Arc::new(Gate::default());
    let door = Arc::clone(&gate);
    let primary = Sink::start();
    let slow = Sink::replying(move |event| {
        if let Event::EndOfData(_) = event {
            door.pass();
        }
        Action::Default
    });
    let refusing = Sink::replying(|event| match event {
        Event::EndOfData(_) => Action::reply("554 5.7.1 spam"),
        _ => Action::Default,
    });
    let dup = folder.start(&primary, &[&slow, &refusing]);
    send(&mut Client::ready(dup.addr()), 1);
    wait_until("it is refused", || folder.files("failed").len() == 2);
    wait_until("it is not in the queue", || folder.files("queue").len() == 2);
    refusing.set_reply(|_| Action::Default);

    let yaml = folder.config(&primary, &[&slow, &refusing], "");
    let place = tempfile::tempdir().unwrap();
    let mut retry = std::process::Command::new("strace");
    let log = place.path().join("trace");
    retry.args(["-f", "-qq", "-e", "inject=fsync:delay_enter=1000000", "-o"]).arg(log);
    let command = command(&place, Some(&yaml));
    retry.arg(command.get_program()).args(command.get_args()).args(["retry", "--all"]);
    let mut retry = retry.stdout(Stdio::null()).spawn().unwrap();
    let coming = format!(".to.{}", refusing.addr());
    wait_until("it is coming", || folder.files("tmp").iter().any(|file| file.ends_with(&coming)));
    gate.open();
    assert!(wait_until_ended(&mut retry).success());
    slow.wait(1);
    end(&dup);
    let dup = folder.start(&primary, &[&slow, &refusing]);
    dup.wait_log("was looked through");
    folder.wait_empty();
    end(&dup);
    assert_eq!(bodies(&refusing.messages()), [numbered(1)], "{:?}", folder.files(""));
    assert_eq!(slow.attempts().len(), 1);
    folder.assert_clean();
    assert_eq!(folder.files("failed"), [""; 0]);
}

/// What A is owed comes from the daemon at the end.
const RETRY: Order = Order {
    words: |_| words(&["retry", "--all"]),
    gets: [[ONCE; 3], [NEVER, NEVER, TWICE]],
    stays: false,
};

const RETRY_TO_ANOTHER: Order = Order {
    words: |backups| words(&["retry", "--all", "--to", &backups[0]]),
    gets: [[ONCE, ONCE, (2, 3)], [NEVER; 3]],
    stays: false,
};

const RETRY_WHAT_WAITS: Order = Order {
    words: |backups| words(&["retry", "--backup", &backups[0], ID]),
    gets: [[ONCE; 3], [NEVER; 3]],
    stays: true,
};

const DROP_FAILED: Order = Order {
    words: |backups| words(&["drop", "--all", "--backup", &backups[1]]),
    gets: [[ONCE; 3], [NEVER; 3]],
    stays: false,
};

/// The last that is owed of it, in the queue.
const DROP_WAITING: Order = Order {
    words: |backups| words(&["drop", "--backup", &backups[0], ID]),
    gets: [[(0, 1); 3], [NEVER; 3]],
    stays: true,
};

const FLUSH: Order =
    Order { words: |_| words(&["flush"]), gets: [[TWICE; 3], [NEVER; 3]], stays: true };

const ONE_CLIENT: Order =
    Order { words: |_| words(&["inetd"]), gets: [[ONCE; 3], [NEVER; 3]], stays: true };

#[test]
fn a_retry_that_is_killed() {
    lives(&RETRY, false);
}

#[test]
fn a_retry_that_is_killed_beside_a_daemon() {
    lives(&RETRY, true);
}

#[test]
fn a_retry_for_another_backup_that_is_killed() {
    lives(&RETRY_TO_ANOTHER, false);
}

#[test]
fn a_retry_for_another_backup_that_is_killed_beside_a_daemon() {
    lives(&RETRY_TO_ANOTHER, true);
}

#[test]
fn a_retry_of_what_waits_that_is_killed() {
    lives(&RETRY_WHAT_WAITS, false);
    lives(&RETRY_WHAT_WAITS, true);
}

#[test]
fn a_drop_of_what_failed_that_is_killed() {
    lives(&DROP_FAILED, false);
    lives(&DROP_FAILED, true);
}

#[test]
fn a_drop_of_what_waits_that_is_killed() {
    lives(&DROP_WAITING, false);
    lives(&DROP_WAITING, true);
}

#[test]
fn a_flush_that_is_killed() {
    lives(&FLUSH, false);
}

#[test]
fn a_flush_that_is_killed_beside_a_daemon() {
    lives(&FLUSH, true);
}

#[test]
fn a_process_for_one_client_that_is_killed() {
    lives(&ONE_CLIENT, false);
}

#[test]
fn a_process_for_one_client_that_is_killed_beside_a_daemon() {
    lives(&ONE_CLIENT, true);
}
