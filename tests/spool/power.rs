//! Power loss: what has to be on disk before something is said or given up. That cannot be tried
//! here, but the order of the system calls can be seen, and the order is all that we owe.
//!
//! A name is durable when its folder was fsynced after it was made, the octets of a file when it
//! was fsynced after they were written.

use std::fs;

use crate::common::*;
use crate::crash::try_message;
use crate::tracer::{Call, Trace, Traced};
use crate::*;

/// All calls of this name about a path that begins and ends so.
fn all<'a>(trace: &'a Trace, name: &str, start: &str, end: &str) -> Vec<&'a Call> {
    let is_one = |call: &&Call| {
        call.name == name && call.what.starts_with(start) && call.what.ends_with(end)
    };
    trace.calls.iter().filter(is_one).collect()
}

/// The only one.
#[track_caller]
fn the<'a>(trace: &'a Trace, name: &str, start: &str, end: &str) -> &'a Call {
    let all = all(trace, name, start, end);
    assert_eq!(all.len(), 1, "{name} {start}…{end}: {:#?}", trace.calls);
    all[0]
}

/// The first began and ended well before the second began.
#[track_caller]
fn assert_order(trace: &Trace, first: &Call, second: &Call) {
    assert!(first.is_before(second), "{first:?}\n{second:?}\n{:#?}", trace.calls);
}

/// Some sync of this folder lies between the two.
#[track_caller]
fn assert_synced(trace: &Trace, folder: &str, after: &Call, before: &Call) {
    let is_between =
        |sync: &Call| sync.what == folder && after.is_before(sync) && sync.is_before(before);
    assert!(
        all(trace, "fsync", folder, "").into_iter().any(is_between),
        "{folder} is not synced between {after:?}\nand {before:?}\n{:#?}",
        trace.calls
    );
}

/// One message with two backups, from the start to the end of the program.
#[track_caller]
fn traced(folder: &Folder, second: Sink, body: &[u8]) -> (Trace, [Sink; 3]) {
    let sinks = [Sink::start(), Sink::start(), second];
    let yaml = folder.config(&sinks[0], &[&sinks[1], &sinks[2]], "");
    let traced = Traced::start(&yaml, &folder.path(), None);
    assert_eq!(try_message(traced.addr.unwrap(), &[TO, "c@example.com"], body), Some(250));
    folder.wait_empty();
    traced.terminate();
    (traced.trace(), sinks)
}

/// Everything about a message that has to be done before its client hears 250.
#[track_caller]
fn assert_durable(trace: &Trace, sinks: &[Sink; 3]) {
    let is_draft = |call: &&Call| call.creates && !call.what.contains(['.', '-']);
    let draft = all(trace, "openat", "tmp/", "").into_iter().find(is_draft).unwrap();
    let id = draft.what.strip_prefix("tmp/").unwrap();
    let rename = the(trace, "rename", &draft.what, "");
    let (hour, _) = rename.to.rsplit_once('/').unwrap();
    assert_eq!(rename.to, format!("{hour}/{id}.mail"));

    let sync = the(trace, "fdatasync", &draft.what, "");
    for write in all(trace, "write", &draft.what, "") {
        assert_order(trace, write, sync);
    }
    assert_order(trace, sync, rename);
    let mut copies: Vec<_> = all(trace, "openat", &format!("{hour}/{id}.to."), "");
    copies.retain(|call| call.creates);
    assert_eq!(copies.len(), 2, "{copies:#?}");
    for copy in &copies {
        assert_order(trace, copy, rename);
    }
    let reply = the(trace, "write", "socket 250 2.0.0 queued as ", "");
    assert_synced(trace, hour, rename, reply);
    // The hour's own name, and the folder that it is in.
    assert_synced(trace, "queue", the(trace, "mkdir", hour, hour), reply);
    assert_synced(trace, "", the(trace, "mkdir", "queue", "queue"), reply);
    // The primary's word comes before the commit, or it would be a copy of nothing.
    let dot = sinks[0].messages();
    assert_eq!(dot.len(), 1);
}

#[test]
fn a_message_is_durable_before_its_250() {
    let folder = Folder::new();
    let (trace, sinks) = traced(&folder, Sink::start(), &numbered(1));
    assert_durable(&trace, &sinks);
}

#[test]
fn a_big_message_is_durable_before_its_250() {
    let folder = Folder::new();
    let (trace, sinks) = traced(&folder, Sink::start(), &mail_body(1_000_000));
    assert_durable(&trace, &sinks);
    let octets = all(&trace, "write", "tmp/", "").iter().map(|call| call.result).sum::<i64>();
    assert!(octets > 1_000_000 - 78, "not all of {octets} octets were seen");
}

/// The message waits as it is in `tmp/` for the primary's word: nothing says that it is owed.
#[test]
fn nothing_is_committed_before_the_primary_has_accepted() {
    let folder = Folder::new();
    let path = folder.path();
    let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let looked = std::sync::Arc::clone(&seen);
    let primary = Sink::replying(move |event| {
        if let Event::EndOfData(_) = event {
            *looked.lock().unwrap() = files(&path.join("queue"));
        }
        Action::Default
    });
    let backup = Sink::start();
    let dup = folder.start(&primary, &[&backup]);
    send(&mut Client::ready(dup.addr()), 1);
    backup.wait(1);
    let seen = seen.lock().unwrap();
    assert!(ids(&seen).is_empty(), "{seen:?}");
}

/// A copy that is refused goes to `failed/`, and only when it is safe there from `queue/`.
#[test]
fn what_failed_is_durable_before_it_leaves_the_queue() {
    let folder = Folder::new();
    let second = Sink::replying(|event| match event {
        Event::EndOfData(_) => Action::reply("554 5.7.1 spam"),
        _ => Action::Default,
    });
    let (trace, sinks) = traced(&folder, second, &numbered(1));
    let name = sinks[2].addr().to_string();
    let removed = all(&trace, "unlink", "queue/", &name)[0];
    let link = all(&trace, "link", "queue/", ".mail")[0];
    let notes = all(&trace, "rename", "tmp/", &name);
    let note = notes.into_iter().rfind(|call| call.to.starts_with("failed/")).unwrap();
    assert_synced(&trace, "failed", link, removed);
    assert_synced(&trace, "failed", note, removed);
    // Its octets: a name for an empty file would say "all recipients", and not why.
    let synced = |name| all(&trace, name, &note.what, "").into_iter();
    let is_synced = synced("fdatasync").chain(synced("fsync")).any(|sync| {
        let writes = all(&trace, "write", &note.what, "");
        writes.iter().all(|write| write.is_before(sync)) && sync.is_before(note)
    });
    assert!(is_synced, "{:#?}", trace.calls);
}

/// Two clients in the first moment of an hour: who finds the folder there, made by the other an
/// instant ago, must not say 250 before its name is durable as well.
#[test]
fn a_new_hour_is_durable_for_everybody() {
    if !strace::available() {
        return;
    }
    let folder = Folder::new();
    let (primary, backup) = (Sink::start(), Sink::start());
    // The folders are made beforehand, so that -P finds queue/.
    kill(folder.start(&primary, &[&backup]));
    let queue = folder.path().join("queue");
    let log = folder.0.path().join("trace");
    let yaml = folder.config(&primary, &[&backup], "");
    let delay = ["-P", queue.to_str().unwrap(), "-e", "inject=fsync:delay_enter=2000000"];
    let dup = strace::start(&delay, &log, &yaml);
    let addr = dup.addr();
    let clients: Vec<_> = (1..=4)
        .map(|number| {
            std::thread::spawn(move || {
                assert_eq!(try_message(addr, &[TO], &numbered(number)), Some(250));
                std::time::Instant::now()
            })
        })
        .collect();
    let heard: Vec<_> = clients.into_iter().map(|client| client.join().unwrap()).collect();
    let (first, last) = (heard.iter().min().unwrap(), heard.iter().max().unwrap());
    let spread = last.duration_since(*first);
    assert!(fs::read_to_string(&log).unwrap().contains("fsync("), "no new hour was seen");
    // All of them have to wait for the two seconds that the fsync takes.
    assert!(spread.as_millis() < 1000, "the first 250 was heard {spread:?} before the last");
}
