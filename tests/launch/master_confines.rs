//! Who it is under master(8), and in which root: whatever master.cf says, never root for long.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::thread;

use crate::common::mail_body;
use crate::instance::available;
use crate::letters::{assert_same, submit};
use crate::master::Hosted;
use crate::program::assert_runs_as;
use crate::{Route, USER};

/// master(8) itself never drops root nor changes its root: with each of its fields the process
/// ends up as the same unprivileged user.
#[test]
fn with_and_without_chroot_and_privileges() {
    if !available() {
        return;
    }
    thread::scope(|scope| {
        for unprivileged in ["-", "y", "n"] {
            for chroot in ["y", "n"] {
                scope.spawn(move || {
                    let fields = format!("n {unprivileged} {chroot} - 1");
                    let hosted = Hosted::entry(Route::start(), &fields, &format!("user={USER}"));
                    hosted.submit(0..1);
                    let (parent, child) = hosted.parent_and_child();
                    for pid in [parent, child] {
                        assert_runs_as(pid, USER, USER);
                    }
                    let inside =
                        if chroot == "y" { hosted.postfix.path("spool") } else { "/".into() };
                    let root = fs::read_link(format!("/proc/{child}/root")).unwrap();
                    assert_eq!(root, inside, "{fields}");
                    hosted.assert_delivered(1);
                });
            }
        }
    });
}

/// A message that is too big for memory needs no folder there, and takes one if told to.
#[test]
fn big_messages_in_a_chroot() {
    if !available() {
        return;
    }
    let body = mail_body(3_000_000);
    for with_folder in [false, true] {
        let hosted = Hosted::entry(Route::start(), "n - y - 1", &format!("user={USER}"));
        if with_folder {
            let inside = hosted.postfix.path("spool/smtp-dup");
            fs::create_dir(&inside).unwrap();
            fs::set_permissions(&inside, fs::Permissions::from_mode(0o1777)).unwrap();
            hosted.import_environment(&format!("TMPDIR={}", inside.display()));
        }
        submit(&hosted.postfix, "<a@sender.test>", &["<b@example.com>"], &body);
        hosted.route.wait(1);
        for message in hosted.route.sinks.each_ref().map(|sink| sink.messages().remove(0)) {
            let added = message.data.len() - body.len();
            assert_same(&message.data[added..], &body);
        }
        assert_eq!(hosted.postfix.log(&["smtp-dup[", "error: "]), [""; 0]);
        assert_eq!(hosted.postfix.log(&["smtp-dup[", "warning: "]), [""; 0]);
    }
}

#[test]
fn both_processes_are_the_user_and_nothing_else() {
    if !available() {
        return;
    }
    // Without a user it is the one that owns the queue.
    for (words, user, group) in [
        (format!("user={USER}"), USER, USER),
        (format!("user={USER}:mail"), USER, "mail"),
        ("user=postfix".into(), "postfix", "postfix"),
        (String::new(), "postfix", "postfix"),
    ] {
        let hosted = Hosted::entry(Route::start(), "n n n - 1", &words);
        hosted.submit(0..1);
        let (parent, child) = hosted.parent_and_child();
        for pid in [parent, child] {
            assert_runs_as(pid, user, group);
        }
        // The parent has nothing to do with mail.
        let threads = fs::read_dir(format!("/proc/{parent}/task")).unwrap().count();
        assert_eq!(threads, 1);
        hosted.assert_delivered(1);
    }
}
