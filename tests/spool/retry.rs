//! Backups that fail: who waits for what, how often a recipient gets a message, and what ends in
//! `failed/`.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::common::*;
use crate::*;

/// How often each recipient got a message.
fn deliveries(sink: &Sink) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for message in sink.messages() {
        for to in recipients(&message) {
            *counts.entry(to.to_string()).or_default() += 1;
        }
    }
    counts
}

/// What `failed/` says about a copy for this backup.
#[track_caller]
fn note(folder: &Folder, backup: &Sink) -> String {
    let name = format!(".to.{}", backup.addr());
    let files = folder.files("failed");
    let file = files.iter().find(|file| file.ends_with(&name));
    folder.text(&format!("failed/{}", file.unwrap_or_else(|| panic!("{files:?}"))))
}

#[test]
fn a_backup_that_refuses_connections_is_held_until_it_is_back() {
    let folder = Folder::new();
    let primary = Sink::start();
    let (down, up) = (Sink::refusing(SinkOptions::default()), Sink::start());
    let dup = folder.start(&primary, &[&down, &up]);
    let mut client = Client::ready(dup.addr());
    (1..=20).for_each(|number| send(&mut client, number));
    // Nobody waits for it, and its copies alone are left.
    up.wait(20);
    let hold = format!("hold/{}", down.addr());
    wait_until("it is held", || folder.files("hold") == [down.addr().to_string()]);
    let text = folder.text(&hold);
    assert!(text.contains("refused") && text.contains("next "), "{text}");
    let owed = || folder.files("queue").iter().filter(|file| file.contains(".to.")).count();
    wait_until("the other's are done", || owed() == 20);
    assert_eq!(dup.log_lines("is down").len(), 1, "{}", dup.log());

    down.reopen();
    assert_eq!(bodies(&down.wait(20)), bodies(&up.messages()));
    folder.wait_empty();
    wait_until("it is not held any more", || folder.files("hold").is_empty());
    assert_eq!(dup.log_lines("is back").len(), 1);
    end(&dup);
    assert_eq!(deliveries(&down), BTreeMap::from([(TO.into(), 20)]));
    folder.assert_clean();
}

/// Several agents begin with it at once; that the first to be refused is not alone says nothing.
#[test]
fn a_backup_that_is_down_at_the_start_is_not_said_to_refuse_one_connection() {
    let folder = Folder::new();
    let primary = Sink::start();
    let down = Sink::refusing(SinkOptions::default());
    let dup = folder.start(&primary, &[&down]);
    let mut client = Client::ready(dup.addr());
    (1..=20).for_each(|number| send(&mut client, number));
    drop(client);
    kill(dup);
    // It takes connections and closes them after a while, so that all agents meet there.
    down.set_reply(|event| match event {
        Event::Connect(_) => Action::after(Duration::from_millis(200), Action::Close),
        _ => Action::Default,
    });
    down.reopen();
    let dup = folder.start(&primary, &[&down]);
    dup.wait_log("is down");
    assert!(down.connections() > 1, "only one agent was there");
    down.set_reply(|_| Action::Default);
    down.wait(20);
    folder.wait_empty();
    end(&dup);
    assert_eq!(dup.log_lines("is down").len(), 1, "{}", dup.log());
    assert_eq!(dup.log_lines("refuses one connection"), [""; 0], "{}", dup.log());
}

/// A message that a backup always breaks off at, where nothing but a flush comes by: each flush
/// ends with it, so it must not be the first each time.
#[test]
fn a_message_that_breaks_the_backup_does_not_stop_each_flush() {
    let folder = Folder::new();
    let primary = Sink::start();
    let backup = Sink::refusing(SinkOptions::default());
    let dup = folder.start(&primary, &[&backup]);
    let mut client = Client::ready(dup.addr());
    for number in 1..=10 {
        let to = format!("{number}@example.com");
        assert_eq!(client.message(FROM, &[&to], &numbered(number)).code, 250);
    }
    drop(client);
    kill(dup);
    // The first that it sees, whichever that is.
    let (bad, last) = (Mutex::new(None), Mutex::new(String::new()));
    backup.set_reply(move |event| match event {
        Event::Rcpt(line) => {
            bad.lock().unwrap().get_or_insert_with(|| line.clone());
            *last.lock().unwrap() = line.clone();
            Action::Default
        }
        Event::EndOfData(_) if *bad.lock().unwrap() == Some(last.lock().unwrap().clone()) => {
            Action::Close
        }
        _ => Action::Default,
    });
    backup.reopen();
    let yaml = folder.config(&primary, &[&backup], "");
    for pass in 1..=2 {
        let output = run(&["flush"], Some(&yaml), &[]);
        assert_eq!(output.status.code(), Some(1), "{pass}: {output:?}");
    }
    assert_eq!(backup.accepted(), 9, "{:?}", backup.commands());
    assert_eq!(ids(&folder.files("queue")).len(), 1);
    let state = folder.files("queue").into_iter().find(|file| file.contains(".to.")).unwrap();
    assert!(folder.text(&format!("queue/{state}")).contains("attempts 2"), "it is noted");
}

/// A clock that was ahead for a while: what came meanwhile does not wait, nor for a year what was
/// put off or held.
#[test]
fn a_clock_that_was_ahead_keeps_nothing_back() {
    let folder = Folder::new();
    let primary = Sink::start();
    let backup = Sink::refusing(SinkOptions::default());
    let dup = folder.start(&primary, &[&backup]);
    let mut client = Client::ready(dup.addr());
    (1..=2).for_each(|number| send(&mut client, number));
    drop(client);
    kill(dup);
    let year = Duration::from_secs(365 * 24 * 3600);
    let ahead = std::time::SystemTime::now() + year;
    let next = ahead.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let state = format!("attempts 1\nnext {next}\nreply 450 4.2.0 later\n");
    let files = folder.files("queue");
    let mut copies = files.iter().filter(|file| !file.ends_with(".mail"));
    let set = |path: &str, text: &str, ahead| {
        let path = folder.path().join(path);
        std::fs::write(&path, text).unwrap();
        std::fs::File::options().write(true).open(path).unwrap().set_modified(ahead).unwrap();
    };
    set(
        &format!("queue/{}", copies.next().unwrap()),
        "",
        std::time::SystemTime::now() + BOUND * 60,
    );
    set(&format!("queue/{}", copies.next().unwrap()), &state, ahead);
    set(&format!("hold/{}", backup.addr()), &state, ahead);
    let yaml = folder.config(&primary, &[&backup], "");
    let output = run(&["queue"], Some(&yaml), &[]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.matches(" now ").count() == 2 && !text.contains("is held"), "{text}");
    backup.reopen();
    let dup = Dup::start(&yaml);
    backup.wait(2);
    folder.wait_empty();
    end(&dup);
    assert_eq!(folder.files("hold"), [""; 0]);
}

/// A refusal before MAIL is about the server, not about the message.
#[test]
fn a_5xx_before_mail_holds_the_backup_and_fails_nothing() {
    for step in ["connect", "ehlo"] {
        let folder = Folder::new();
        let primary = Sink::start();
        let refusals = AtomicUsize::new(0);
        let backup = Sink::replying(move |event| match event {
            Event::Connect(_) if step == "connect" => {
                match refusals.fetch_add(1, Ordering::SeqCst) {
                    0 => Action::reply_then_close("554 5.7.1 go away"),
                    _ => Action::Default,
                }
            }
            Event::Ehlo(_) if step == "ehlo" => match refusals.fetch_add(1, Ordering::SeqCst) {
                0..2 => Action::reply_then_close("550 5.7.1 not you"),
                _ => Action::Default,
            },
            _ => Action::Default,
        });
        let dup = folder.start(&primary, &[&backup]);
        send(&mut Client::ready(dup.addr()), 1);
        dup.wait_log("is down");
        backup.wait(1);
        folder.wait_empty();
        end(&dup);
        folder.assert_clean();
        assert_eq!(folder.files("failed"), [""; 0], "{step}");
    }
}

/// Greylisting: half of the recipients are deferred for a while. The program is killed in between,
/// which changes nothing about who is owed what.
#[test]
fn recipients_that_are_deferred_are_tried_again_alone() {
    let folder = Folder::new();
    let primary = Sink::start();
    let seen = Mutex::new(BTreeMap::<String, usize>::new());
    let backup = Sink::replying(move |event| match event {
        Event::Rcpt(line) if line.contains("<grey") => {
            let mut seen = seen.lock().unwrap();
            let count = seen.entry(line.clone()).or_default();
            *count += 1;
            match count {
                1 | 2 => Action::reply("450 4.2.0 greylisted"),
                _ => Action::Default,
            }
        }
        _ => Action::Default,
    });
    let to = ["grey1@example.com", "one@example.com", "grey2@example.com", "two@example.com"];
    let dup = folder.start(&primary, &[&backup]);
    let mut client = Client::ready(dup.addr());
    assert_eq!(client.message(FROM, &to, &numbered(1)).code, 250);
    backup.wait_for("the first half", |backup| !backup.messages().is_empty());
    let state = || {
        let files = folder.files("queue");
        let copy = files.iter().find(|file| file.contains(".to."));
        copy.map(|copy| folder.text(&format!("queue/{copy}"))).unwrap_or_default()
    };
    wait_until("the deferral is noted", || state().contains("owed 0 2"));
    assert!(state().contains("greylisted") && state().contains("next "), "{}", state());
    drop(client);
    kill(dup);
    let dup = folder.start(&primary, &[&backup]);
    folder.wait_empty();
    end(&dup);
    assert_eq!(deliveries(&backup), to.iter().map(|to| (to.to_string(), 1)).collect());
    assert_eq!(backup.count("RCPT TO:<one@"), 1);
    assert_eq!(backup.count("RCPT TO:<grey1@"), 3);
    folder.assert_clean();
    assert_eq!(folder.files("failed"), [""; 0]);
}

#[test]
fn a_message_that_is_deferred_does_not_block_the_next() {
    let folder = Folder::new();
    let primary = Sink::start();
    let deferrals = AtomicUsize::new(0);
    let backup = Sink::replying(move |event| match event {
        Event::Mail(line)
            if line.contains("<slow@") && deferrals.fetch_add(1, Ordering::SeqCst) < 2 =>
        {
            Action::reply("451 4.3.0 not now")
        }
        _ => Action::Default,
    });
    let dup = folder.start(&primary, &[&backup]);
    let mut client = Client::ready(dup.addr());
    assert_eq!(client.message("slow@example.com", &[TO], &numbered(0)).code, 250);
    dup.wait_log("status=deferred");
    (1..=5).for_each(|number| send(&mut client, number));
    let messages = backup.wait(6);
    assert!(messages[5].mail.contains("<slow@"), "{messages:#?}");
    folder.wait_empty();
    drop(client);
    end(&dup);
    assert_eq!(backup.messages().len(), 6);
    folder.assert_clean();
}

#[test]
fn recipients_that_are_refused_go_to_failed_and_the_rest_is_delivered() {
    let folder = Folder::new();
    let primary = Sink::start();
    let choosy = Sink::replying(|event| match event {
        Event::Rcpt(line) if line.contains("<no@") => Action::reply("550 5.1.1 unknown user"),
        Event::Rcpt(line) if line.contains("<full@") => Action::reply("552 5.2.2 mailbox full"),
        _ => Action::Default,
    });
    let other = Sink::start();
    let dup = folder.start(&primary, &[&choosy, &other]);
    let mut client = Client::ready(dup.addr());
    let to = ["one@example.com", "no@example.com", "two@example.com", "full@example.com"];
    let body = mail_body(300_000);
    assert_eq!(client.message(FROM, &to, &body).code, 250);
    assert_eq!(recipients(&choosy.wait(1)[0]), ["one@example.com", "two@example.com"]);
    assert_eq!(recipients(&other.wait(1)[0]), to);
    folder.wait_empty();
    let failed = folder.files("failed");
    let id = &ids(&failed)[0];
    assert_eq!(failed, [format!("{id}.mail"), format!("{id}.to.{}", choosy.addr())]);
    let note = note(&folder, &choosy);
    assert!(note.contains("owed 1 3\n"), "{note}");
    for words in ["<no@example.com> 550 5.1.1 unknown user", "<full@example.com> 552 5.2.2 mailbox"]
    {
        assert!(note.contains(words), "{note}");
    }
    // The message is there whole, and a person can read for whom it was.
    let mail = folder.text(&format!("failed/{id}.mail"));
    assert!(mail.contains("\r\nRCPT TO:<no@example.com>\r\n"), "{}", &mail[..400]);
    assert!(mail.ends_with(&format!("{}.\r\n", String::from_utf8_lossy(&body))));
    end(&dup);
    folder.assert_clean();
}

#[test]
fn a_message_that_is_refused_goes_to_failed_with_the_reply() {
    let refusals = [
        ("550 5.7.1 not from you", "MAIL"),
        ("550 5.1.1 nobody here", "RCPT"),
        ("554 5.3.0 no data", "DATA"),
        ("554 5.7.1 spam", "."),
    ];
    for (reply, at) in refusals {
        let folder = Folder::new();
        let primary = Sink::start();
        let backup = Sink::replying(move |event| match (at, event) {
            ("MAIL", Event::Mail(_))
            | ("RCPT", Event::Rcpt(_))
            | ("DATA", Event::Data)
            | (".", Event::EndOfData(_)) => Action::reply(reply),
            _ => Action::Default,
        });
        let dup = folder.start(&primary, &[&backup]);
        let mut client = Client::ready(dup.addr());
        assert_eq!(client.message(FROM, &[TO, "c@example.com"], &numbered(1)).code, 250);
        folder.wait_empty();
        let note = note(&folder, &backup);
        assert!(note.contains("owed 0 1\n") && note.contains(reply), "{reply}: {note}");
        assert_eq!(ids(&folder.files("failed")).len(), 1);
        drop(client);
        end(&dup);
        assert!(dup.log_lines("error: ").iter().any(|line| line.contains(reply)), "{}", dup.log());
        assert_eq!(dup.log_lines("status=lost"), [""; 0]);
        folder.assert_clean();
        assert_eq!(backup.count("MAIL"), 1);
    }
}

#[test]
fn a_copy_that_is_deferred_for_too_long_goes_to_failed() {
    let folder = Folder::new();
    let primary = Sink::start();
    let backup = Sink::replying(|event| match event {
        Event::Rcpt(line) if line.contains("<never@") => Action::reply("450 4.2.0 greylisted"),
        _ => Action::Default,
    });
    let dup = Dup::start(&folder.config(&primary, &[&backup], "retry_for_seconds: 2"));
    let mut client = Client::ready(dup.addr());
    let since = Instant::now();
    assert_eq!(client.message(FROM, &["never@example.com", TO], &numbered(1)).code, 250);
    folder.wait_empty();
    assert!(since.elapsed() >= Duration::from_secs(2));
    let note = note(&folder, &backup);
    assert!(note.contains("owed 0\n") && note.contains("greylisted"), "{note}");
    assert!(note.contains("retry_for_seconds"), "{note}");
    drop(client);
    end(&dup);
    assert_eq!(deliveries(&backup), BTreeMap::from([(TO.into(), 1)]));
    folder.assert_clean();
}

/// The same for a backup that cannot be reached at all.
#[test]
fn a_copy_for_a_backup_that_is_down_for_too_long_goes_to_failed() {
    let folder = Folder::new();
    let primary = Sink::start();
    let backup = Sink::refusing(SinkOptions::default());
    let dup = Dup::start(&folder.config(&primary, &[&backup], "retry_for_seconds: 2"));
    let mut client = Client::ready(dup.addr());
    (1..=3).for_each(|number| send(&mut client, number));
    wait_until("they are given up", || ids(&folder.files("failed")).len() == 3);
    assert!(note(&folder, &backup).contains("refused"), "{}", note(&folder, &backup));
    folder.wait_empty();
    drop(client);
    end(&dup);
}

/// The same where there is no daemon, and passes alone try what waits.
#[test]
fn a_pass_gives_up_what_is_too_old() {
    let folder = Folder::new();
    let (primary, backup) = (Sink::start(), Sink::refusing(SinkOptions::default()));
    let yaml = folder.config(&primary, &[&backup], "retry_for_seconds: 2");
    let dup = Dup::start(&yaml);
    send(&mut Client::ready(dup.addr()), 1);
    kill(dup);
    wait_until("it is given up", || {
        run(&["flush"], Some(&yaml), &[]);
        ids(&folder.files("failed")).len() == 1
    });
    assert!(note(&folder, &backup).contains("refused"), "{}", note(&folder, &backup));
    assert!(folder.files("queue").is_empty(), "{:?}", folder.files("queue"));
}

/// Two messages of the same name: the clock of the names goes round in twelve days, and `failed/`
/// keeps what it has for longer.
#[test]
fn what_is_in_failed_is_not_taken_for_another_message() {
    let folder = Folder::new();
    let primary = Sink::start();
    let backup = Sink::replying(|event| match event {
        Event::EndOfData(_) => Action::reply("554 5.7.1 spam"),
        _ => Action::Default,
    });
    kill(folder.start(&primary, &[&backup]));
    let mail = |text: &str| {
        let name = backup.addr();
        format!("NOOP {name}\r\nMAIL FROM:<{FROM}>\r\nRCPT TO:<{TO}>\r\nDATA\r\n{text}\r\n.\r\n")
    };
    let put = |file: &str, text: &str| std::fs::write(folder.path().join(file), text).unwrap();
    std::fs::create_dir(folder.path().join("queue/2026112309")).unwrap();
    put("failed/5F3A9C20B1.mail", &mail("the old one"));
    put(&format!("failed/5F3A9C20B1.to.{}", backup.addr()), "reply 554 5.7.1 spam\nowed 0\n");
    put("queue/2026112309/5F3A9C20B1.mail", &mail("the new one"));
    put(&format!("queue/2026112309/5F3A9C20B1.to.{}", backup.addr()), "");
    let dup = folder.start(&primary, &[&backup]);
    backup.wait_for("an attempt", |backup| backup.attempts().len() == 1);
    dup.wait_log("status=");
    end(&dup);
    let texts: Vec<_> = ["failed", "queue"]
        .iter()
        .flat_map(|part| folder.files(part).into_iter().map(move |file| format!("{part}/{file}")))
        .filter(|file| file.ends_with(".mail"))
        .map(|file| folder.text(&file))
        .collect();
    for text in ["the old one", "the new one"] {
        assert!(texts.iter().any(|mail| mail.contains(text)), "{text}: {texts:#?}");
    }
}

/// `smtp-dup retry` is a new beginning, also for what had been tried for too long: one more
/// deferral is no reason to give it up at once.
#[test]
fn what_is_sent_again_by_hand_may_be_deferred_again() {
    let folder = Folder::new();
    let primary = Sink::start();
    let backup = Sink::replying(|event| match event {
        Event::Rcpt(_) => Action::reply("450 4.2.0 greylisted"),
        _ => Action::Default,
    });
    let yaml = folder.config(&primary, &[&backup], "retry_for_seconds: 2");
    let dup = Dup::start(&yaml);
    send(&mut Client::ready(dup.addr()), 1);
    wait_until("it is given up", || folder.files("failed").len() == 2);
    folder.wait_empty();
    end(&dup);
    let before = backup.count("RCPT");
    let refusals = AtomicUsize::new(0);
    backup.set_reply(move |event| match event {
        Event::Rcpt(_) if refusals.fetch_add(1, Ordering::SeqCst) == 0 => {
            Action::reply("450 4.2.0 greylisted, because it does not know us any more")
        }
        _ => Action::Default,
    });
    let output = run(&["retry", "--all"], Some(&yaml), &[]);
    assert!(output.status.success(), "{output:?}");
    let dup = Dup::start(&yaml);
    backup.wait_for("the first attempt", |backup| backup.count("RCPT") > before);
    wait_until("it is delivered or given up", || folder.files("queue").is_empty());
    end(&dup);
    assert_eq!(bodies(&backup.messages()), [numbered(1)], "{:?}", folder.files("failed"));
}

/// `smtp-dup retry` after the mailboxes were made: to just those that were refused.
#[test]
fn recipients_that_were_refused_are_sent_to_again_by_hand() {
    let folder = Folder::new();
    let primary = Sink::start();
    let backup = Sink::replying(|event| match event {
        Event::Rcpt(line) if line.contains("<new") => Action::reply("550 5.1.1 unknown user"),
        _ => Action::Default,
    });
    let dup = folder.start(&primary, &[&backup]);
    let to = ["new1@example.com", TO, "new2@example.com"];
    let mut client = Client::ready(dup.addr());
    assert_eq!(client.message(FROM, &to, &numbered(1)).code, 250);
    drop(client);
    folder.wait_empty();
    backup.set_reply(|_| Action::Default);
    let yaml = folder.config(&primary, &[&backup], "");
    let id = ids(&folder.files("failed")).remove(0);
    let output = run(&["retry", &id], Some(&yaml), &[]);
    assert!(output.status.success(), "{output:?}");
    let output = run(&["flush"], Some(&yaml), &[]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(recipients(&backup.wait(2)[1]), ["new1@example.com", "new2@example.com"]);
    folder.wait_empty();
    end(&dup);
    folder.assert_clean();
    assert_eq!(folder.files("failed"), [""; 0]);
}

/// The agent that stays to look into the spool does not keep its connection for that: after hours,
/// what lies between may have forgotten it without a word.
#[test]
fn a_connection_that_nobody_uses_is_closed() {
    let folder = Folder::new();
    let (primary, backup) = (Sink::start(), Sink::start());
    let dup = folder.start(&primary, &[&backup]);
    send(&mut Client::ready(dup.addr()), 1);
    backup.wait(1);
    let end = Instant::now() + Duration::from_secs(60) + BOUND;
    while backup.open_connections() > 0 {
        assert!(Instant::now() < end, "it is still open");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(backup.count("QUIT"), 1);
}
