//! The spool at work, seen from outside: what the client heard, what the destinations got, and
//! what lies in the folder. The real binary throughout, and it dies a lot.
//!
//! `promise` is promise 3 in one test; `crash` kills at every system call that touches the spool
//! (`orders` the commands, and a process for one client) and `power` looks at the order of those
//! calls, by way of `tracer`; `faults` are disks that
//! fail, `retry` backups that do, `change` configurations that change, `crowd` many copies and
//! many processes, `garbage` what does not belong into the folder.

#[path = "../common/mod.rs"]
mod common;

mod change;
mod crash;
mod crowd;
mod faults;
mod garbage;
mod orders;
mod power;
mod promise;
mod retry;
mod strace;
mod tracer;

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use common::{BOUND, Client, Dup, Received, Signal, Sink, config, wait_until};

const FROM: &str = "a@example.com";
const TO: &str = "b@example.com";

/// A spool folder of one test's own, removed with it.
struct Folder(TempDir);

impl Folder {
    fn new() -> Folder {
        Folder(tempfile::tempdir().unwrap())
    }

    /// The folder that `relay.spool` names; the program makes it.
    fn path(&self) -> PathBuf {
        self.0.path().join("spool")
    }

    /// A configuration with this spool. `relay` are further lines for that section.
    fn config(&self, primary: &Sink, backups: &[&Sink], relay: &str) -> String {
        spooled(&self.path(), primary, backups, relay)
    }

    #[track_caller]
    fn start(&self, primary: &Sink, backups: &[&Sink]) -> Dup {
        Dup::start(&self.config(primary, backups, ""))
    }

    /// All files below this part of it, by their path within the part.
    fn files(&self, part: &str) -> Vec<String> {
        files(&self.path().join(part))
    }

    /// The text of a file.
    fn text(&self, file: &str) -> String {
        let path = self.path().join(file);
        let text = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Waits until nothing is owed any more.
    #[track_caller]
    fn wait_empty(&self) {
        wait_until(&format!("the queue is empty: {:?}", self.files("queue")), || {
            self.files("queue").is_empty()
        });
    }

    /// Nothing was left behind, but perhaps in `failed/`.
    #[track_caller]
    fn assert_clean(&self) {
        for part in ["queue", "tmp", "damaged", "hold"] {
            assert_eq!(self.files(part), [""; 0], "{part}");
        }
    }
}

fn spooled(spool: &Path, primary: &Sink, backups: &[&Sink], relay: &str) -> String {
    let backups: Vec<_> = backups.iter().map(|backup| backup.addr()).collect();
    let relay = format!("spool: \"{}\"\n{relay}", spool.display());
    config(primary.addr(), &backups, "", &relay)
}

fn files(folder: &Path) -> Vec<String> {
    let (mut found, mut folders) = (Vec::new(), vec![folder.to_path_buf()]);
    while let Some(next) = folders.pop() {
        // What goes while this looks is gone.
        for entry in fs::read_dir(next).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                _ => {
                    let path = entry.path();
                    found.push(path.strip_prefix(folder).unwrap().display().to_string());
                }
            }
        }
    }
    found.sort();
    found
}

/// Dies without a chance to do anything about it.
#[track_caller]
fn kill(dup: Dup) {
    dup.signal(Signal::Kill);
    dup.wait_exit(BOUND);
}

/// Ends it in order; after that nothing more can arrive anywhere. It would not wait for its sweep.
#[track_caller]
fn end(dup: &Dup) {
    let is_swept = || {
        let log = dup.log();
        log.contains("looked through") || log.contains("cleared up") || !log.contains(" spool=")
    };
    wait_until("it has looked through the spool", is_swept);
    dup.signal(Signal::Term);
    assert!(dup.wait_exit(BOUND).success(), "{}", dup.log());
}

/// A small body that no other message has.
fn numbered(number: usize) -> Vec<u8> {
    format!("Subject: {number}\r\n\r\nThis is number {number}.\r\n").into_bytes()
}

#[track_caller]
fn send(client: &mut Client, number: usize) {
    let reply = client.message(FROM, &[TO], &numbered(number));
    assert_eq!(reply.code, 250, "{number}: {reply:?}");
}

/// The bodies, in an order that does not depend on when each came.
fn bodies(messages: &[Received]) -> Vec<Vec<u8>> {
    let mut bodies: Vec<_> = messages.iter().map(|message| message.data.clone()).collect();
    bodies.sort();
    bodies
}

/// What stands between the angle brackets of each of its RCPT lines.
fn recipients(message: &Received) -> Vec<&str> {
    message.rcpts.iter().map(|line| line.split(['<', '>']).nth(1).unwrap()).collect()
}

/// The names of the messages in a list of files, `5F3A9C20B1` of each `….mail`.
fn ids(files: &[String]) -> Vec<String> {
    let names = files.iter().filter_map(|file| file.strip_suffix(".mail"));
    names.map(|name| name.rsplit('/').next().unwrap().to_string()).collect()
}
