//! A destination that is smtp-dup's own address, and does not look like it: refused at the start.
//!
//! On a host of its own, where the ports and the names are the test's.

use std::net::{SocketAddr, UdpSocket};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::common::{BOUND, Client, Dup, Sink, command};
use crate::host::{Host, available};

/// A host, 192.0.2.1 and 2001:db8::1, with names of its own.
struct World {
    host: Host,
    /// `hosts` and `resolv.conf`.
    etc: TempDir,
    // The cable's other end.
    _other: Host,
}

impl World {
    fn new() -> World {
        let (host, other) = (Host::new(), Host::new());
        host.join(&["192.0.2.1/24", "2001:db8::1/64"], &other, &["192.0.2.2/24"]);
        let world = World { host, etc: tempfile::tempdir().unwrap(), _other: other };
        world.know("127.0.0.1 localhost\n192.0.2.1 own.example\n192.0.2.2 other.example\n");
        std::fs::write(world.etc.path().join("resolv.conf"), "").unwrap();
        world
    }

    fn know(&self, hosts: &str) {
        std::fs::write(self.etc.path().join("hosts"), hosts).unwrap();
    }

    /// The same command where /etc has our files.
    fn inside(&self, inner: &Command) -> Command {
        let line = "mount --bind \"$0/hosts\" /etc/hosts && \
                    mount --bind \"$0/resolv.conf\" /etc/resolv.conf && exec \"$@\"";
        let mut outer = Command::new("unshare");
        outer.args(["-m", "sh", "-c", line]).arg(self.etc.path());
        outer.arg(inner.get_program()).args(inner.get_args());
        outer.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        outer
    }

    /// At its start, and by check.
    #[track_caller]
    fn refuses(&self, listen: &str, relay: &str, key: &str, address: &str) {
        let yaml = format!("smtp:\n  listen: {listen}\nrelay:\n{relay}");
        for words in [&[][..], &["check"]] {
            let folder = tempfile::tempdir().unwrap();
            let mut inner = Command::new("timeout");
            let command = command(&folder, Some(&yaml));
            inner.arg(BOUND.as_secs().to_string()).arg(command.get_program());
            let mut outer = self.inside(inner.args(command.get_args()).args(words));
            let output = self.host.on(|| outer.output().unwrap());
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(2), "{yaml}{words:?}: {stderr}");
            for part in [key, address, "smtp.listen", "circles"] {
                assert!(stderr.contains(part), "{yaml}{words:?}: no {part} in {stderr}");
            }
        }
    }

    #[track_caller]
    fn start(&self, yaml: &str) -> Dup {
        self.host.on(|| Dup::start_with(|command| *command = self.inside(command), yaml))
    }
}

#[test]
fn addresses_and_names_of_our_own() {
    if !available() {
        return;
    }
    let world = World::new();
    let primary = |to: &str| format!("  destination_primary: \"{to}\"\n");
    let key = "relay.destination_primary";
    // All addresses are those of the interfaces, too.
    for listen in ["\":2525\"", "\"0.0.0.0:2525\"", "\"[::]:2525\""] {
        world.refuses(listen, &primary("192.0.2.1:2525"), key, "\"192.0.2.1:2525\"");
        world.refuses(listen, &primary("own.example:2525"), key, "192.0.2.1:2525");
    }
    world.refuses("\"[::]:2525\"", &primary("[2001:db8::1]:2525"), key, "2001:db8::1");
    world.refuses("\"192.0.2.1:2525\"", &primary("own.example:2525"), key, "192.0.2.1:2525");
    let backup =
        "  destination_primary: \"192.0.2.2:25\"\n  destination_backups: [\"own.example:2525\"]\n";
    world.refuses("\":2525\"", backup, "relay.destination_backups", "own.example:2525");
    // One of several is enough to lose mail in.
    world.know("192.0.2.2 two.example\n192.0.2.1 two.example\n");
    world.refuses("\":2525\"", &primary("two.example:2525"), key, "two.example:2525");
}

/// The same name or address with another port, and other hosts with the same.
#[test]
fn neighbours() {
    if !available() {
        return;
    }
    let world = World::new();
    for to in [
        "own.example:2526",
        "192.0.2.1:2526",
        "other.example:2525",
        "192.0.2.2:2525",
        "none.example:2525",
    ] {
        let yaml = format!("smtp:\n  listen: \":2525\"\nrelay:\n  destination_primary: \"{to}\"\n");
        drop(world.start(&yaml));
    }
    // An address of ours at which it does not listen.
    drop(world.start("smtp:\n  listen: \"127.0.0.1:2525\"\nrelay:\n  destination_primary: \"own.example:2525\"\n"));
}

/// Nobody answers for minutes: it starts, and what could not be known at the start is seen then.
#[test]
fn a_resolver_that_does_not_answer() {
    if !available() {
        return;
    }
    let world = World::new();
    let silent = world.host.on(|| UdpSocket::bind("127.0.0.1:53").unwrap());
    silent.set_read_timeout(Some(BOUND)).unwrap();
    let resolver = "nameserver 127.0.0.1\noptions timeout:30 attempts:5\n";
    std::fs::write(world.etc.path().join("resolv.conf"), resolver).unwrap();
    let primary = world.host.on(Sink::start);
    let relay = format!(
        "relay:\n  destination_primary: \"{}\"\n  destination_backups: [\"slow.example:25\", \"slower.example:25\"]\n",
        primary.addr()
    );
    let dup = world.start(&format!("smtp:\n  listen: \"127.0.0.1:0\"\n{relay}"));
    let mut asked = [0; 512];
    assert!(silent.recv(&mut asked).unwrap() > 0);
    let addr: SocketAddr = dup.addr();
    let mut client = world.host.on(|| Client::ready(addr));
    assert_eq!(client.message("a@example.com", &["b@example.com"], crate::BODY).code, 250);
}
