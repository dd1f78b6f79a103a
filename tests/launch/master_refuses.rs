//! What smtp-dup refuses under master(8): it ends with an exit code that is not 0, for a process
//! that ends well without having served is started again and again; and says why in the mail log,
//! for nobody hears its stderr.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::common::{BOUND, Client, wait_until};
use crate::instance::{Postfix, Setup, available, can_run};
use crate::master::Hosted;
use crate::program::{Program, binary, user_and_group};
use crate::{Route, USER, open_folder, write_config};

/// Something wrong, and what has to be said about it.
struct Mistake {
    /// Words for the command; FOLDER stands for the folder with the configuration.
    words: String,
    /// Spoils the folder.
    spoil: fn(&Path),
    /// All of this is in one line of the log.
    said: &'static [&'static str],
}

fn mistakes() -> Vec<Mistake> {
    fn file(folder: &Path) -> PathBuf {
        folder.join("config.yaml")
    }
    fn mode(folder: &Path, mode: u32) {
        fs::set_permissions(file(folder), fs::Permissions::from_mode(mode)).unwrap();
    }
    let usual = format!("user={USER} directory=FOLDER");
    let mistake = |words: &str, spoil, said| Mistake { words: words.into(), spoil, said };
    vec![
        mistake(
            &usual,
            |folder| {
                write_config(folder, "relay:\n  destination_primry: \"127.0.0.1:1\"\n");
            },
            &["/config.yaml: ", "destination_primry", "relay.destination_primary"],
        ),
        mistake(&usual, |folder| mode(folder, 0o646), &["config.yaml", "write"]),
        // As root its group may be anybody.
        mistake(&usual, |folder| mode(folder, 0o664), &["config.yaml", "write"]),
        mistake(
            &usual,
            |folder| chown(file(folder), Some(user_and_group("mail").0), None).unwrap(),
            &["config.yaml", "own"],
        ),
        mistake("user=nobody-at-all directory=FOLDER", |_| {}, &["user=", "nobody-at-all"]),
        mistake("user=daemon:no-such-group directory=FOLDER", |_| {}, &["user=", "no-such-group"]),
        mistake("user=root directory=FOLDER", |_| {}, &["user=", "root"]),
        mistake("user=daemon directory=FOLDER/none", |_| {}, &["directory=", "/none"]),
        mistake("user=daemon dircetory=FOLDER", |_| {}, &["dircetory="]),
    ]
}

/// A Postfix whose master has an entry for each of the mistakes, on addresses that differ in
/// their last octet.
#[test]
fn mistakes_are_refused_with_the_reason() {
    if !available() {
        return;
    }
    let route = Route::start();
    let mistakes = mistakes();
    let folders: Vec<TempDir> = mistakes.iter().map(|_| open_folder()).collect();
    for (mistake, folder) in mistakes.iter().zip(&folders) {
        write_config(folder.path(), &route.yaml("", ""));
        (mistake.spoil)(folder.path());
    }
    let address = |first: SocketAddr, number: usize| {
        SocketAddr::from(([127, 0, 0, 1 + number as u8], first.port()))
    };
    let entries = |first| {
        let entries =
            mistakes.iter().zip(&folders).enumerate().map(|(number, (mistake, folder))| {
                let words = mistake.words.replace("FOLDER", folder.path().to_str().unwrap());
                format!("{} inet n - n - 1 smtp-dup {words}\n", address(first, number))
            });
        entries.collect::<String>()
    };
    let setup = Setup { services: Some(&entries), daemon: Some(binary()), ..Setup::default() };
    let postfix = Postfix::hosting(setup);
    let program = Program::at(postfix.path("libexec/smtp-dup"));
    // The connections stay: only such make a storm.
    let clients: Vec<_> = (0..mistakes.len())
        .map(|number| Client::connect(address(postfix.next_hop, number)))
        .collect();
    let mut wrong = Vec::new();
    for mistake in &mistakes {
        let mut parts = vec!["postfix/smtp-dup[", "]: error: "];
        parts.extend(mistake.said);
        let end = Instant::now() + BOUND / 4;
        while postfix.log(&parts).is_empty() && Instant::now() < end {
            thread::sleep(Duration::from_millis(20));
        }
        if postfix.log(&parts).is_empty() {
            wrong.push(format!("{}: not said: {:?}", mistake.words, mistake.said));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    // Each was started once, and master(8) saw it fail.
    let failed =
        postfix.wait_log(mistakes.len(), &["/master[", "/libexec/smtp-dup pid ", " exit status "]);
    // Nothing is awaited here: a storm would bring several in this time.
    thread::sleep(Duration::from_secs(2));
    assert_eq!(postfix.log(&["/master[", "exit status"]).len(), failed.len());
    assert_eq!(failed.len(), mistakes.len());
    assert_eq!(program.pids(), [0; 0]);
    assert_eq!(route.sinks.each_ref().map(|sink| sink.connections()), [0; 3]);
    drop(clients);
}

/// It is looked up before there are two processes, and without a thread in the first.
#[test]
fn a_name_of_our_own() {
    if !can_run(&["postfix", "unshare"]) {
        return;
    }
    let folder = open_folder();
    let hosts = folder.path().join("hosts");
    fs::write(&hosts, "127.0.0.1 localhost\n127.0.0.1 own.example\n").unwrap();
    let line = format!("mount --bind {} /etc/hosts && exec \"$@\"", hosts.display());
    let prefix = ["unshare", "--mount", "sh", "-c", &line, "sh"].map(String::from).to_vec();
    let path = folder.path().display();
    let entry = |address: SocketAddr| {
        let primary = format!("own.example:{}", address.port());
        let yaml = format!("relay:\n  destination_primary: \"{primary}\"\n");
        write_config(folder.path(), &yaml);
        format!("{address} inet n - n - 1 smtp-dup user={USER} directory={path}")
    };
    let setup = Setup { services: Some(&entry), prefix, ..Setup::default() };
    let hosted = Hosted::with(Route::start(), setup);
    let _client = Client::connect(hosted.service());
    let own = format!("our own address {}", hosted.service());
    let said = ["postfix/smtp-dup[", "]: error: ", "own.example", &own, "circles"];
    hosted.postfix.wait_log(1, &said);
    hosted.postfix.wait_log(1, &["/master[", "exit status "]);
    assert_eq!(hosted.program.wait_pids(0), [0; 0]);
}

/// A file within that is to be found outside.
#[test]
fn a_temporary_folder_outside_of_the_chroot() {
    if !available() {
        return;
    }
    let hosted = Hosted::entry(Route::start(), "n - y - 1", &format!("user={USER}"));
    hosted.import_environment("TMPDIR=/var/tmp");
    let _client = Client::connect(hosted.service());
    hosted.postfix.wait_log(1, &["postfix/smtp-dup[", "]: error: ", "TMPDIR", "/var/tmp"]);
    hosted.postfix.wait_log(1, &["/master[", "exit status "]);
}

/// A path that leaves the chroot again names one folder inside, and another outside.
#[test]
fn a_spool_that_climbs_out_of_the_chroot() {
    if !available() {
        return;
    }
    let hosted = Hosted::entry(Route::start(), "n - y - 1", &format!("user={USER}"));
    let spool = hosted.postfix.path("spool/../elsewhere");
    hosted.route.configure("", &format!("spool: {}", spool.display()));
    let _client = Client::connect(hosted.service());
    hosted.postfix.wait_log(1, &["postfix/smtp-dup[", "]: error: ", "relay.spool", "without .."]);
    hosted.postfix.wait_log(1, &["/master[", "exit status "]);
}

/// A mistake that a reload brings is said; once it is mended, another reload serves.
#[test]
fn a_mistake_is_mended_by_a_reload() {
    if !available() {
        return;
    }
    // For so long master(8) leaves the service alone, reload or not; the default is a minute.
    let settings = "service_throttle_time = 2s";
    let route = Route::start();
    let folder = route.folder().display().to_string();
    let entry =
        |address| format!("{address} inet n - n - 1 smtp-dup user={USER} directory={folder}");
    let setup = Setup { settings, services: Some(&entry), ..Setup::default() };
    let hosted = Hosted::with(route, setup);
    hosted.deliver(0);
    let (parent, _) = hosted.parent_and_child();
    write_config(hosted.route.folder(), "relay: nonsense\n");
    hosted.postfix.postfix("reload");
    wait_until("the parent gone", || !hosted.program.pids().contains(&parent));
    let client = Client::connect(hosted.service());
    hosted.postfix.wait_log(1, &["postfix/smtp-dup[", "]: error: ", "config.yaml"]);
    hosted.postfix.wait_log(1, &["/master[", "exit status "]);
    hosted.route.configure("", "");
    hosted.postfix.postfix("reload");
    hosted.deliver(1);
    drop(client);
    hosted.route.wait(2);
}
