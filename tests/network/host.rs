//! Network namespaces that stand in for hosts. They are gone when nothing uses them any more.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

use crate::instance::{can_run, command};

/// A host with nothing but a loopback, until it gets a cable.
pub struct Host(File);

/// Whether there can be hosts here. Under CI there have to be.
pub fn available() -> bool {
    can_run(&["unshare", "ip"])
}

impl Host {
    pub fn new() -> Host {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            ip("link set lo up");
            Host(File::open("/proc/thread-self/ns/net").unwrap())
        };
        thread::spawn(make).join().unwrap()
    }

    /// Does something on this host: its sockets, threads and processes are the host's.
    #[track_caller]
    pub fn on<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        let name = thread::current().name().unwrap_or_default().to_owned();
        let act = || {
            setns(&self.0, CloneFlags::CLONE_NEWNET).unwrap();
            act()
        };
        thread::scope(|scope| {
            let thread = thread::Builder::new().name(name).spawn_scoped(scope, act).unwrap();
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Joins two hosts by a cable, and gives each these addresses, with the length of their
    /// network.
    pub fn join(&self, own: &[&str], other: &Host, theirs: &[&str]) {
        let there = format!("/proc/{}/fd/{}", std::process::id(), other.0.as_raw_fd());
        self.on(|| ip(&format!("link add cable type veth peer name cable netns {there}")));
        for (host, addresses) in [(self, own), (other, theirs)] {
            host.on(|| {
                for address in addresses {
                    // An address of IPv6 would otherwise be looked for in vain, for seconds.
                    let nodad = if address.contains(':') { "nodad" } else { "" };
                    ip(&format!("address add {address} dev cable {nodad}"));
                }
                ip("link set cable up");
            });
        }
    }
}

/// Runs ip(8), which has to succeed.
#[track_caller]
fn ip(words: &str) {
    let output = command("ip").args(words.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {words}: {output:?}");
}
