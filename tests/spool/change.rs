//! Configurations that change between two starts, and folders that are refused at a start.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown, symlink};

use crate::common::*;
use crate::*;

/// Messages 1 to `count` are owed to all of these backups, which are down.
#[track_caller]
fn owed(folder: &Folder, primary: &Sink, backups: &[&Sink], count: usize) {
    let dup = folder.start(primary, backups);
    let mut client = Client::ready(dup.addr());
    (1..=count).for_each(|number| send(&mut client, number));
    drop(client);
    kill(dup);
    // What it was just writing about those that are down.
    for part in ["hold", "tmp"] {
        let _ = fs::remove_dir_all(folder.path().join(part));
    }
}

#[test]
fn a_backup_that_is_configured_no_more_keeps_its_copies() {
    let folder = Folder::new();
    let primary = Sink::start();
    let [gone, stays] = [(); 2].map(|()| Sink::refusing(SinkOptions::default()));
    owed(&folder, &primary, &[&gone, &stays], 3);
    gone.reopen();
    stays.reopen();
    let dup = folder.start(&primary, &[&stays]);
    stays.wait(3);
    let line = dup.wait_log("warning: relay=");
    let words =
        [&gone.addr().to_string(), "owed 3 copies", "retry --all --backup", "drop --all --backup"];
    assert!(words.iter().all(|word| line.contains(*word)), "{line}");
    let left = || folder.files("queue");
    wait_until("only those are left", || left().len() == 6 && ids(&left()).len() == 3);
    let end_of_name = format!(".to.{}", gone.addr());
    assert_eq!(left().iter().filter(|file| file.ends_with(&end_of_name)).count(), 3);
    end(&dup);
    // A new backup beside them gets new mail, and nothing of the old.
    let new = Sink::start();
    let dup = folder.start(&primary, &[&stays, &new]);
    send(&mut Client::ready(dup.addr()), 4);
    assert_eq!(new.wait(1)[0].data, numbered(4));
    end(&dup);
    assert_eq!((gone.connections(), new.attempts().len()), (0, 1));
    // And when it is a backup again they are delivered.
    let dup = folder.start(&primary, &[&gone, &stays]);
    assert_eq!(bodies(&gone.wait(3)), (1..=3).map(numbered).collect::<Vec<_>>());
    folder.wait_empty();
    end(&dup);
    assert_eq!(stays.attempts().len(), 4);
    folder.assert_clean();
}

/// A flush of all says what it cannot deliver: whoever waits for its status 0 would remove a spool
/// with copies in it.
#[test]
fn a_flush_speaks_of_a_backup_that_is_configured_no_more() {
    let folder = Folder::new();
    let primary = Sink::start();
    let [gone, stays] = [(); 2].map(|()| Sink::refusing(SinkOptions::default()));
    owed(&folder, &primary, &[&gone, &stays], 2);
    stays.reopen();
    let yaml = folder.config(&primary, &[&stays], "");
    let flush = |words: &[&str]| {
        let output = run(&[&["flush"], words].concat(), Some(&yaml), &[]);
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (status, said) = flush(&[]);
    let line = format!("{}: no destination any more, 2 copies left", gone.addr());
    assert!(status == Some(1) && said.contains(&line), "{said}");
    assert_eq!(stays.attempts().len(), 2);
    // Nobody asked about it.
    let (status, said) = flush(&[&stays.addr().to_string()]);
    assert!(status == Some(0) && !said.contains(&gone.addr().to_string()), "{said}");
    run(&["drop", "--all", "--backup", &gone.addr().to_string()], Some(&yaml), &[]);
    let (status, said) = flush(&[]);
    assert!(status == Some(0) && !said.contains(&gone.addr().to_string()), "{said}");
    folder.assert_clean();
}

/// With no backup left at all the spool is still looked after.
#[test]
fn the_last_backup_is_configured_no_more() {
    let folder = Folder::new();
    let primary = Sink::start();
    let gone = Sink::refusing(SinkOptions::default());
    owed(&folder, &primary, &[&gone], 2);
    let dup = folder.start(&primary, &[]);
    let line = dup.wait_log("warning: relay=");
    assert!(line.contains(&gone.addr().to_string()), "{line}");
    send(&mut Client::ready(dup.addr()), 3);
    end(&dup);
    let left = folder.files("queue");
    assert_eq!((left.len(), ids(&left).len()), (4, 2), "{left:?}");
}

/// The last phase of a migration: the new server becomes the primary, the old one a backup.
#[test]
fn primary_and_backup_swapped() {
    let folder = Folder::new();
    let (old, new) = (Sink::start(), Sink::refusing(SinkOptions::default()));
    owed(&folder, &old, &[&new], 5);
    assert_eq!(old.messages().len(), 5);
    new.reopen();
    let dup = folder.start(&new, &[&old]);
    let mut client = Client::ready(dup.addr());
    send(&mut client, 6);
    let expected: Vec<_> = (1..=6).map(numbered).collect();
    assert_eq!(bodies(&new.wait(6)), expected);
    assert_eq!(bodies(&old.wait(6)), expected);
    folder.wait_empty();
    drop(client);
    end(&dup);
    assert_eq!(new.attempts().len(), 6);
    assert_eq!(old.attempts().len(), 6);
    assert_eq!(dup.log_lines("warning: relay="), [""; 0]);
    folder.assert_clean();
}

/// More backups than fit on a line of SMTP.
#[test]
fn five_hundred_backups() {
    let folder = Folder::new();
    let primary = Sink::start();
    let last = Sink::refusing(SinkOptions::default());
    let mut yaml = folder.config(&primary, &[&last], "timeout_seconds: 1");
    // All on ports where nobody listens.
    let others: String =
        (0..499).map(|n| format!("    - \"127.1.{}.{}:1\"\n", n / 100 + 1, n % 100 + 1)).collect();
    yaml = yaml.replace("  destination_backups:\n", &format!("  destination_backups:\n{others}"));
    yaml.push_str("  backup_connections: 1\n");
    let dup = Dup::start(&yaml);
    send(&mut Client::ready(dup.addr()), 1);
    kill(dup);
    last.reopen();
    let dup = folder.start(&primary, &[&last]);
    wait_until("it is there or not", || {
        last.messages().len() == 1 || !folder.files("damaged").is_empty()
    });
    assert_eq!(folder.files("damaged"), [""; 0]);
    assert_eq!(last.messages()[0].data, numbered(1));
    drop(dup);
}

/// Why a start with this spool is refused.
#[track_caller]
fn refusal(spool: &str) -> String {
    let primary = Sink::start();
    let yaml = config(primary.addr(), &[], "", &format!("spool: \"{spool}\""));
    let output = run(&[], Some(&yaml), &[]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{text}");
    let wrong = text.lines().filter(|line| line.contains("relay.spool")).collect::<Vec<_>>();
    assert_eq!(wrong.len(), 1, "{text}");
    wrong[0].to_string()
}

#[test]
fn folders_that_are_refused() {
    let folder = Folder::new();
    let spool = folder.path();
    let name = spool.to_str().unwrap().to_string();
    fs::create_dir(&spool).unwrap();

    let line = refusal("spool");
    assert!(line.contains("\"spool\"") || line.contains(" spool"), "{line}");
    fs::set_permissions(&spool, fs::Permissions::from_mode(0o755)).unwrap();
    let line = refusal(&name);
    assert!(line.contains(&name) && line.contains("0755") && line.contains("chmod 700"), "{line}");
    fs::set_permissions(&spool, fs::Permissions::from_mode(0o700)).unwrap();
    if nix::unistd::geteuid().is_root() {
        chown(&spool, Some(12345), None).unwrap();
        let line = refusal(&name);
        assert!(line.contains(&name) && line.contains("12345"), "{line}");
        chown(&spool, Some(0), None).unwrap();
        // Given to another user without what is in it.
        let within = spool.join("queue");
        fs::create_dir(&within).unwrap();
        chown(&within, Some(12345), None).unwrap();
        let line = refusal(&name);
        assert!(line.contains(within.to_str().unwrap()) && line.contains("12345"), "{line}");
        fs::remove_dir_all(&spool).unwrap();
        fs::create_dir(&spool).unwrap();
        fs::set_permissions(&spool, fs::Permissions::from_mode(0o700)).unwrap();
    } else {
        assert!(std::env::var_os("CI").is_none(), "another's folder needs root, and CI is set");
        strace::skip("another's folder needs root");
    }
    // A folder that nobody has made, in one that is not there; and a file.
    let missing = format!("{name}/not/there");
    let line = refusal(&missing);
    assert!(line.contains("No such file") && line.contains("make it, with mode 700"), "{line}");
    for words in [["check"].as_slice(), &["queue"], &["flush"], &["retry", "--all"]] {
        let yaml = config(Sink::start().addr(), &[], "", &format!("spool: \"{missing}\""));
        let output = run(words, Some(&yaml), &[]);
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(said.contains(&missing) && said.contains("make it, with mode 700"), "{said}");
    }
    fs::write(spool.join("file"), "").unwrap();
    let line = refusal(&format!("{name}/file"));
    assert!(line.contains(&format!("{name}/file")), "{line}");
    // It is the file as it was: nothing is made or removed by a start that is refused.
    assert_eq!(fs::read_dir(&spool).unwrap().count(), 1);
}

/// The folder may lie elsewhere: that is for the administrator to say, by a link.
#[test]
fn a_spool_behind_a_link() {
    let folder = Folder::new();
    let real = folder.0.path().join("real");
    fs::create_dir(&real).unwrap();
    fs::set_permissions(&real, fs::Permissions::from_mode(0o700)).unwrap();
    symlink(&real, folder.path()).unwrap();
    let (primary, backup) = (Sink::start(), Sink::refusing(SinkOptions::default()));
    owed(&folder, &primary, &[&backup], 2);
    backup.reopen();
    let dup = folder.start(&primary, &[&backup]);
    backup.wait(2);
    folder.wait_empty();
    end(&dup);
}

/// Only its owner can look into what lies there.
#[test]
fn nobody_else_can_read_it() {
    let folder = Folder::new();
    let primary = Sink::start();
    let backup = Sink::replying(|event| match event {
        Event::Rcpt(line) if line.contains("<no@") => Action::reply("550 5.1.1 no"),
        Event::Rcpt(line) if line.contains("<later@") => Action::reply("450 4.2.0 later"),
        _ => Action::Default,
    });
    let down = Sink::refusing(SinkOptions::default());
    let dup = folder.start(&primary, &[&backup, &down]);
    let mut client = Client::ready(dup.addr());
    let to = ["no@example.com", "later@example.com", TO];
    assert_eq!(client.message(FROM, &to, &numbered(1)).code, 250);
    dup.wait_log("status=deferred");
    wait_until("all kinds of files", || {
        folder.files("failed").len() == 2
            && folder.files("hold").len() == 1
            && folder.files("queue").len() == 3
    });
    drop(client);
    kill(dup);
    let mut folders = vec![folder.path()];
    let mut count = 0;
    while let Some(next) = folders.pop() {
        assert_eq!(fs::metadata(&next).unwrap().permissions().mode() & 0o777, 0o700, "{next:?}");
        for entry in fs::read_dir(&next).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
                continue;
            }
            count += 1;
            let mode = entry.metadata().unwrap().permissions().mode() & 0o777;
            assert_eq!(mode, 0o600, "{:?}", entry.path());
        }
    }
    assert!(count >= 6, "{count}");
}
