//! Clients of another host, whose addresses are in `smtp.allowed_clients` or are not.

use std::net::{IpAddr, SocketAddr};

use crate::BODY;
use crate::common::{Client, Dup, Sink, config};
use crate::host::{Host, available};

/// All of a relay attempt at once: of a client that does not wait for answers.
const ATTEMPT: &str = "EHLO stranger.example\r\nMAIL FROM:<a@example.com>\r\n\
    RCPT TO:<victim@example.net>\r\nDATA\r\nSubject: spam\r\n\r\nspam\r\n.\r\nQUIT\r\n";

/// A host with smtp-dup and its primary, 192.0.2.1 and 2001:db8::1, and another host.
struct World {
    server: Host,
    other: Host,
    primary: Sink,
    dup: Dup,
}

impl World {
    /// With these lines of the configuration.
    #[track_caller]
    fn with(smtp: &str) -> World {
        let (server, other) = (Host::new(), Host::new());
        let theirs = ["192.0.2.2/24", "192.0.2.3/24", "2001:db8::2/64", "2001:db8::3/64"];
        server.join(&["192.0.2.1/24", "2001:db8::1/64"], &other, &theirs);
        let (primary, dup) = server.on(|| {
            let primary = Sink::start();
            let dup = Dup::start(&config(primary.addr(), &[], smtp, ""));
            (primary, dup)
        });
        World { server, other, primary, dup }
    }

    /// The other host connects, from this address of its own.
    #[track_caller]
    fn client(&self, from: &str) -> Client {
        let from: IpAddr = from.parse().unwrap();
        let to = if from.is_ipv4() { "192.0.2.1" } else { "2001:db8::1" };
        let to = SocketAddr::new(to.parse().unwrap(), self.dup.addr().port());
        self.other.on(|| Client::connect_from(from, to))
    }

    /// A client of this address gets nowhere, whatever it says, and the log says why.
    #[track_caller]
    fn refuses(&self, from: &str) {
        for attempt in ["", ATTEMPT] {
            let mut client = self.client(from);
            client.try_send(attempt);
            let reply = client.expect_reply(421);
            let text = reply.text();
            assert!(text.starts_with(&format!("4.7.1 {from} ")), "{reply:?}");
            assert!(text.contains("smtp.allowed_clients"), "{reply:?}");
            client.closed();
        }
        let shown = if from.contains(':') { format!("[{from}]") } else { from.into() };
        let denied = format!("client={shown}:");
        for line in self.dup.wait_logs(&denied, 2) {
            assert!(line.contains("warning: ") && line.contains("smtp.allowed_clients"), "{line}");
        }
    }

    /// A client of this address sends a message.
    #[track_caller]
    fn admits(&self, from: &str) {
        let before = self.primary.accepted();
        let mut client = self.client(from);
        client.expect_reply(220);
        client.ehlo();
        let reply = client.message("a@example.com", &["b@example.com"], BODY);
        assert_eq!(reply.code, 250, "{reply:?}");
        self.primary.wait(before + 1);
    }

    /// So do clients of the server's own host.
    #[track_caller]
    fn admits_its_own(&self, at: &str) {
        let addr = SocketAddr::new(at.parse().unwrap(), self.dup.addr().port());
        let mut client = self.server.on(|| Client::ready(addr));
        let reply = client.message("a@example.com", &["b@example.com"], BODY);
        assert_eq!(reply.code, 250, "{reply:?}");
    }
}

/// To listen everywhere is safe: that one mistake opens nothing.
#[test]
fn strangers_get_nowhere_where_nothing_is_said_of_them() {
    if !available() {
        return;
    }
    for listen in ["\":0\"", "[\"0.0.0.0:0\"]", "\"[::]:0\""] {
        let world = World::with(&format!("listen: {listen}"));
        world.refuses("192.0.2.2");
        // An IPv4 listener is not there for the others at all.
        if world.dup.addr().is_ipv6() {
            world.refuses("2001:db8::2");
        }
        assert_eq!(world.primary.connections(), 0);
        world.admits_its_own("127.0.0.1");
        if world.dup.addr().is_ipv6() {
            world.admits_its_own("::1");
        }
    }
}

#[test]
fn allowed_hosts_send_and_their_neighbours_do_not() {
    if !available() {
        return;
    }
    // The socket is one of IPv6, which sees the others as ::ffff:192.0.2.2.
    let world =
        World::with("listen: \"[::]:0\"\nallowed_clients: [\"192.0.2.2\", \"2001:db8::2/128\"]");
    world.refuses("192.0.2.3");
    world.refuses("2001:db8::3");
    assert_eq!(world.primary.connections(), 0);
    world.admits("192.0.2.2");
    world.admits("2001:db8::2");
    let line = world.dup.wait_log(": client=192.0.2.2:");
    assert!(line.contains(" from=<a@example.com>"), "{line}");
    world.dup.wait_log(": client=[2001:db8::2]:");
}

#[test]
fn allowed_networks() {
    if !available() {
        return;
    }
    let world =
        World::with("listen: \"[::]:0\"\nallowed_clients: [\"192.0.2.2/31\", \"2001:db8::/127\"]");
    world.admits("192.0.2.2");
    world.admits("192.0.2.3");
    world.refuses("2001:db8::2");
    // IPv4 in IPv6's clothes is IPv4: a network of IPv6 does not let it in.
    let world = World::with("listen: \"[::]:0\"\nallowed_clients: [\"::/0\"]");
    world.admits("2001:db8::3");
    world.refuses("192.0.2.2");
}
