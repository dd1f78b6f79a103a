//! How long a client may take: for a command line, a message, a session, and for reading what it
//! was told. A worker, and the primary's connection, are not to be had by sending an octet a minute.

use std::thread;
use std::time::{Duration, Instant};

use crate::common::{Action, BOUND, Client, Event, Sink, wait_until};
use crate::{BODY, deliver, dup_with};

/// Sends a piece of `octets` at a time until the other side speaks. What it says has to be 421
/// 4.4.2, not before `least`, and the end. On a busy machine we begin to count late, so `least` is
/// well below the limit.
#[track_caller]
fn trickle(mut client: Client, octets: &[u8], piece: usize, pause: Duration, least: Duration) {
    let since = Instant::now();
    for piece in octets.chunks(piece).cycle() {
        if !client.is_silent(pause) || !client.try_send(piece) {
            break;
        }
        assert!(since.elapsed() < Duration::from_secs(40), "it may go on for ever");
    }
    let reply = client.expect_reply(421);
    assert!(reply.text().starts_with("4.4.2 "), "{reply:?}");
    client.closed();
    assert!(since.elapsed() >= least, "after {:?}", since.elapsed());
}

const PAUSE: Duration = Duration::from_millis(250);

#[test]
fn a_command_line_has_its_time_and_no_more() {
    let primary = Sink::start();
    let dup = dup_with(&primary, "timeout_seconds: 2", "");
    let least = Duration::from_secs(1);
    thread::scope(|scope| {
        scope.spawn(|| trickle(Client::greeted(dup.addr()), b"x", 1, PAUSE, least));
        scope.spawn(|| trickle(Client::ready(dup.addr()), b"RCPT TO:<bbbbbbb", 1, PAUSE, least));
        // A line that was too long long ago, and does not end.
        let mut client = Client::ready(dup.addr());
        client.send([b'x'; 10_000]);
        scope.spawn(move || trickle(client, b"xxxx", 100, PAUSE, least));
        let mut client = Client::ready(dup.addr());
        client.expect("MAIL FROM:<a@example.com>", 250);
        scope.spawn(move || trickle(client, b"RCPT TO:<b", 1, PAUSE, least));
    });
    // The others are idle in the pool.
    primary.wait_for("the end of the transaction", |sink| sink.open_connections() == 2);
    deliver(&mut Client::ready(dup.addr()));
}

#[test]
fn who_dribbles_a_command_holds_no_connection_to_the_primary() {
    let primary = Sink::start();
    let dup = dup_with(&primary, "", "");
    let mut clients: Vec<Client> = (0..3).map(|_| Client::ready(dup.addr())).collect();
    assert_eq!(primary.connections(), 3);
    // For longer than the second after which a silent client's connection is given away.
    for _ in 0..10 {
        clients.iter_mut().for_each(|client| client.send("x"));
        thread::sleep(PAUSE);
    }
    for _ in 0..3 {
        deliver(&mut Client::ready(dup.addr()));
    }
    assert_eq!(primary.connections(), 3);
}

#[test]
fn a_message_has_to_come_at_some_rate() {
    let primary = Sink::start();
    let dup = dup_with(&primary, "timeout_seconds: 2", "");
    let in_message = || {
        let mut client = Client::ready(dup.addr());
        client.envelope("a@example.com", &["b@example.com"]);
        client
    };
    let least = Duration::from_secs(1);
    thread::scope(|scope| {
        scope.spawn(|| trickle(in_message(), b"x\r\n", 1, PAUSE, least));
        // 250 octets a second.
        scope.spawn(|| trickle(in_message(), &[b'x'; 25], 25, Duration::from_millis(100), least));
        // What came early buys no more than that time.
        let mut client = in_message();
        client.send(vec![b'x'; 1_000_000]);
        scope.spawn(move || trickle(client, b"x", 1, PAUSE, least));
        // Nor is it different where the message was refused, and is read for its end alone.
        let mut client = Client::ready(dup.addr());
        client.envelope("a@example.com", &["b@example.com"]);
        primary.wait_for("all to be in their messages", |sink| sink.count("DATA") == 4);
        primary.close_connections();
        scope.spawn(move || trickle(client, b"x\r\n", 1, PAUSE, least));
    });
    primary.wait_for("the broken bodies", |sink| sink.open_connections() == 0);
    assert!(primary.attempts().is_empty());
    deliver(&mut Client::ready(dup.addr()));
}

#[test]
fn a_slow_line_is_no_attack() {
    let primary = Sink::start();
    let dup = dup_with(&primary, "timeout_seconds: 4", "");
    let mut client = Client::ready(dup.addr());
    client.envelope("a@example.com", &["b@example.com"]);
    // Ten seconds, at some thousand octets each; and a silence that is nearly too long.
    let since = Instant::now();
    let mut body = Vec::new();
    while since.elapsed() < Duration::from_secs(10) {
        let line = [&[b'x'; 198], b"\r\n".as_slice()].concat();
        client.send(&line);
        body.extend_from_slice(&line);
        thread::sleep(Duration::from_millis(80));
    }
    thread::sleep(Duration::from_millis(1500));
    assert_eq!(client.body(b"").code, 250);
    assert_eq!(primary.wait(1)[0].data, body);
}

#[test]
fn a_session_without_mail_ends() {
    let primary = Sink::start();
    let dup = dup_with(&primary, "timeout_seconds: 2", "");
    let (addr, least) = (dup.addr(), Duration::from_secs(15));
    /// Says this again and again until it hears 421.
    fn repeat(mut client: Client, commands: &str, pause: Duration, least: Duration) {
        let since = Instant::now();
        let reply = loop {
            let reply = client.cmd(commands);
            if reply.code == 421 {
                break reply;
            }
            assert!(since.elapsed() < Duration::from_secs(40), "it may go on for ever");
            thread::sleep(pause);
        };
        assert!(reply.text().starts_with("4.4.2 "), "{reply:?}");
        assert!(since.elapsed() >= least, "after {:?}", since.elapsed());
        client.closed();
    }
    thread::scope(|scope| {
        for command in ["NOOP", "RSET", "EHLO x", "VRFY x"] {
            scope.spawn(move || repeat(Client::greeted(addr), command, PAUSE, least));
        }
        // As fast as can be.
        let quick = Duration::ZERO;
        scope.spawn(move || repeat(Client::ready(addr), "NOOP", quick, least));
        // Who brings mail now and then stays: the 421 at its end is that of its silence.
        scope.spawn(move || {
            let mut client = Client::ready(addr);
            let since = Instant::now();
            while since.elapsed() < Duration::from_secs(25) {
                client.expect("NOOP", 250);
                thread::sleep(PAUSE);
                deliver(&mut client);
            }
        });
    });
}

#[test]
fn what_the_primary_takes_is_not_the_clients_time() {
    let primary = Sink::replying(|event| match event {
        Event::Rcpt(_) => Action::after(Duration::from_millis(1500), Action::Default),
        _ => Action::Default,
    });
    let dup = dup_with(&primary, "timeout_seconds: 2", "");
    let mut client = Client::ready(dup.addr());
    // 24 seconds for the recipients, of 20 in which a message has to come to its end.
    assert_eq!(client.message("a@example.com", &["b@example.com"; 16], BODY).code, 250);
}

#[test]
fn who_does_not_read_has_gone() {
    let primary = Sink::start();
    let dup = dup_with(&primary, "timeout_seconds: 2", "");
    deliver(&mut Client::ready(dup.addr()));
    wait_until("the first to be gone", || dup.threads() == 1);
    let before = dup.resident();
    // The longest answer to the shortest commands.
    let commands = b"EHLO x\r\n".repeat(200_000);
    let mut clients: Vec<Client> = (0..4).map(|_| Client::greeted(dup.addr())).collect();
    thread::scope(|scope| {
        for client in &mut clients {
            client.hold(200_000);
            scope.spawn(|| client.try_send(&commands));
        }
        wait_until("workers", || dup.threads() == 5);
        // Filling what the system holds for them takes its time on a busy machine.
        let end = Instant::now() + BOUND * 4;
        let mut most = before;
        while dup.threads() > 1 {
            most = most.max(dup.resident());
            assert!(Instant::now() < end, "they are served for ever");
            thread::sleep(Duration::from_millis(20));
        }
        // A buffer of 128 KiB for what each has said, and what waits to be heard.
        let grown = most.saturating_sub(before) / 1024;
        assert!(grown < 4 * 512, "{grown} KiB for four clients that do not read");
    });
    deliver(&mut Client::ready(dup.addr()));
}

#[test]
fn nothing_is_said_twice_to_who_reads_too_late() {
    let primary = Sink::start();
    let dup = dup_with(&primary, "timeout_seconds: 2", "");
    let mut client = Client::greeted(dup.addr());
    let said = client.cmd("VRFY x").raw;
    let answer = client.cmd("NOOP").raw;
    let answers = [said, answer].concat();
    client.hold(200_000);
    client.try_send(b"VRFY x\r\nNOOP\r\n".repeat(300_000));
    // Past the two seconds in which it should have read, it does, for as long as there is anything.
    thread::sleep(Duration::from_secs(3));
    let mut heard = Vec::new();
    while let Some(octets) = client.read_if_any() {
        heard.extend_from_slice(&octets);
    }
    assert!(heard.len() > 100_000, "{} octets", heard.len());
    // On a busy machine it may have read before it was too late: then this is the end.
    let last = memchr::memmem::rfind(&heard, b"421 4.4.2 ").unwrap_or(heard.len());
    let heard = &heard[..last];
    for (number, chunk) in heard.chunks(answers.len()).enumerate() {
        assert!(answers.starts_with(chunk), "{number}: \"{}\"", chunk.escape_ascii());
    }
}
