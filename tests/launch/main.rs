//! How the program is launched: by Postfix's master(8) and spawn(8), inetd, tcpserver, systemd, or
//! by hand; each time the real one, and the same mail through it.
//!
//! One file for each launcher. Those that start a process for each connection share the tests in
//! `one_session`. `program` finds the processes of the program under test, `syslog` is a syslogd
//! for one test and `logging` what happens when that is ill, `secrets` is what only root can read, `instance` and `letters` are the private Postfix and what is sent through it.
//!
//! These tests need root, and the launchers installed. Without them they say so and pass, but not
//! when CI is set.

mod booted;
#[path = "../common/mod.rs"]
mod common;
#[cfg(feature = "tls")]
#[path = "../tls/front.rs"]
#[allow(dead_code)]
mod front;
mod inetd;
#[path = "../postfix/instance.rs"]
mod instance;
#[path = "../postfix/letters.rs"]
mod letters;
mod logging;
mod master;
mod master_confines;
mod master_ends;
mod master_refuses;
mod one_session;
#[cfg(feature = "tls")]
#[path = "../tls/pki.rs"]
#[allow(dead_code)]
mod pki;
mod program;
#[cfg(feature = "tls")]
#[path = "../tls/pump.rs"]
mod pump;
mod reload;
#[cfg(feature = "tls")]
mod secrets;
mod snippets;
mod spawn;
mod spooled;
mod standalone;
mod syslog;
mod systemd;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use common::{Action, Event, Sink, SinkOptions, wait_until};
use instance::PATIENCE;
use letters::{assert_is_letter, assert_same, by_id, compared, letter, message_id, wait_count};

/// The user that stands in for the dedicated one: every system has it, and it owns nothing.
const USER: &str = "daemon";

/// Where the mail goes, and the folder with the `config.yaml` that says so.
struct Route {
    /// The primary first.
    sinks: [Sink; 3],
    folder: TempDir,
}

impl Route {
    fn start() -> Route {
        Route::with(Default::default())
    }

    fn with(options: [SinkOptions; 3]) -> Route {
        let folder = open_folder();
        let route = Route { sinks: options.map(Sink::with), folder };
        route.configure("", "");
        route
    }

    /// With a primary behind this gate.
    fn behind(gate: &Gate) -> Route {
        Route::with([gate.options(), Default::default(), Default::default()])
    }

    /// A configuration with further lines for its two sections.
    fn yaml(&self, smtp: &str, relay: &str) -> String {
        let [primary, backups @ ..] = self.sinks.each_ref().map(Sink::addr);
        common::config(primary, &backups, smtp, relay)
    }

    /// Writes the configuration.
    fn configure(&self, smtp: &str, relay: &str) {
        write_config(self.folder(), &self.yaml(smtp, relay));
    }

    fn folder(&self) -> &Path {
        self.folder.path()
    }

    fn config_file(&self) -> PathBuf {
        self.folder().join("config.yaml")
    }

    /// Waits until `count` messages have arrived at each destination.
    #[track_caller]
    fn wait(&self, count: usize) {
        self.sinks.iter().for_each(|sink| wait_count(sink, count));
    }

    /// The numbered letters from 0 on, and no more, are at each destination, octet for octet. To
    /// be called when nothing can arrive any more.
    #[track_caller]
    fn assert_numbered(&self, count: usize) {
        for (number, at) in compared(&self.sinks, count).iter().enumerate() {
            assert_same(&at[0].data, &numbered(number));
        }
    }

    /// The same when Postfix has passed them on, with a header of its own.
    #[track_caller]
    fn assert_numbered_by_postfix(&self, count: usize) {
        for (number, at) in compared(&self.sinks, count).iter().enumerate() {
            assert_is_letter(&at[0].data, &numbered(number));
        }
    }

    /// The primary has each of the numbered letters that Postfix passed on at least once.
    #[track_caller]
    fn assert_none_lost(&self, count: usize) {
        let arrived = by_id(&self.sinks[0]);
        for number in 0..count {
            let letter = numbered(number);
            let found = arrived.get(&message_id(&letter));
            let found = found.unwrap_or_else(|| panic!("letter {number} is lost"));
            found.iter().for_each(|data| assert_is_letter(data, &letter));
        }
    }
}

/// A folder that every user may enter, as a temporary one by itself is not.
fn open_folder() -> TempDir {
    let folder = tempfile::Builder::new().prefix("dup-").tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    folder
}

/// Writes `config.yaml` in this folder, at once as a whole: a process may be about to read it.
fn write_config(folder: &Path, yaml: &str) {
    let new = folder.join("config.yaml.new");
    fs::write(&new, yaml).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o644)).unwrap();
    fs::rename(new, folder.join("config.yaml")).unwrap();
}

/// The letter with this number, with lines that need dot-stuffing.
fn numbered(number: usize) -> Vec<u8> {
    let number = format!("{number:05}");
    let body = [b"..\r\n..number ", number.as_bytes(), b"\r\nGr\xfc\xdfe\r\n"].concat();
    letter(&number, &body)
}

/// Holds a primary's answer to the first final dot back until it is opened.
#[derive(Clone, Default)]
struct Gate {
    reached: Arc<AtomicBool>,
    open: Arc<AtomicBool>,
}

impl Gate {
    /// A primary behind this gate.
    fn options(&self) -> SinkOptions {
        SinkOptions::replying(self.reply())
    }

    fn reply(&self) -> impl Fn(&Event) -> Action + Send + Sync + 'static {
        let gate = self.clone();
        move |event| {
            if matches!(event, Event::EndOfData(_)) && !gate.reached.swap(true, Ordering::SeqCst) {
                let end = Instant::now() + PATIENCE;
                while !gate.open.load(Ordering::SeqCst) && Instant::now() < end {
                    thread::sleep(Duration::from_millis(5));
                }
            }
            Action::Default
        }
    }

    /// Waits until a final dot waits here.
    #[track_caller]
    fn wait(&self) {
        wait_until("a final dot at the primary", || self.reached.load(Ordering::SeqCst));
    }

    fn open(&self) {
        self.open.store(true, Ordering::SeqCst);
    }
}
