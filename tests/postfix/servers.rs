//! Other people's servers as destinations.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use tempfile::TempDir;

use crate::common::{Client, Dup, Sink, config};
use crate::instance::{PATIENCE, Postfix, available, command, free_address};
use crate::letters::{assert_is_letter, assert_same, letter, message_id, sorted, wait_count};
use crate::stop;

/// Postfix's smtp-sink(1), which stores each message in a file. It is killed when dropped.
struct SmtpSink {
    address: SocketAddr,
    files: TempDir,
    process: Child,
}

impl SmtpSink {
    fn start() -> SmtpSink {
        let files = tempfile::Builder::new().prefix("smtp-sink-").tempdir().unwrap();
        // As root it insists on becoming another user.
        fs::set_permissions(files.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let address = free_address();
        let process = command("smtp-sink")
            .args(["-u", "nobody", "-d"])
            .arg(files.path().join("m."))
            .args([&address.to_string(), "100"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let sink = SmtpSink { address, files, process };
        let end = Instant::now() + PATIENCE;
        while TcpStream::connect(address).is_err() {
            assert!(Instant::now() < end, "smtp-sink does not listen on {address}");
            thread::sleep(Duration::from_millis(20));
        }
        sink
    }

    /// The files that are complete: the last line, which is smtp-sink's own, is empty, as that of
    /// no message here is.
    fn files(&self) -> Vec<Vec<u8>> {
        let files = fs::read_dir(self.files.path()).unwrap();
        let texts = files.map(|file| fs::read(file.unwrap().path()).unwrap());
        texts.filter(|text| text.ends_with(b"\n\n")).collect()
    }

    #[track_caller]
    fn wait(&self, count: usize) {
        let end = Instant::now() + PATIENCE;
        while self.files().len() < count {
            assert!(Instant::now() < end, "{} of {count} messages", self.files().len());
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for SmtpSink {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A file of smtp-sink: lines on the connection and the envelope, a Received header of its own of
/// three lines, the message, an empty line. Line ends are LF, dots are not stuffed.
fn parse(text: &[u8]) -> (String, (String, Vec<u8>)) {
    let text = String::from_utf8(text.to_vec()).unwrap();
    let (envelope, rest) = text.split_once("Received: ").unwrap();
    let envelope = envelope.lines().filter(|line| line.contains("-Args: <"));
    let envelope = envelope.collect::<Vec<_>>().join("\n");
    let message = rest.splitn(4, '\n').nth(3).unwrap().strip_suffix('\n').unwrap();
    (message_id(message.as_bytes()), (envelope, message.into()))
}

#[test]
fn three_times_smtp_sink() {
    if !available() {
        return;
    }
    let sinks = [SmtpSink::start(), SmtpSink::start(), SmtpSink::start()];
    let dup = Dup::start(&config(sinks[0].address, &[sinks[1].address, sinks[2].address], "", ""));
    let postfix = Postfix::start(dup.addr(), "");
    let sent =
        |number: usize| letter(&format!("{number:02}"), b"..\r\n..two dots\r\nFrom me\r\nend\r\n");
    let mut client = Client::ready(postfix.address);
    for number in 0..20 {
        let to = format!("user{number}@example.com");
        client.message("a@sender.test", &[&to, "b@example.com"], &sent(number));
    }
    postfix.wait_removed(20);
    sinks.iter().for_each(|sink| sink.wait(20));
    stop(&dup);
    let [primary, first, second] = sinks.each_ref().map(|sink| {
        let files = sink.files();
        let messages: BTreeMap<_, _> = files.iter().map(|text| parse(text)).collect();
        assert_eq!((files.len(), messages.len()), (20, 20));
        messages
    });
    for (number, (id, (envelope, message))) in primary.iter().enumerate() {
        let letter = String::from_utf8(sent(number)).unwrap().replace("\r\n", "\n");
        assert_is_letter(message, letter.replace("\n..", "\n.").as_bytes());
        for copies in [&first, &second] {
            assert_same(&copies[id].1, message);
            // Both offer DSN: the copies ask for no reports, and differ in nothing else.
            let recipients = copies[id].0.replace(" NOTIFY=NEVER", "");
            assert_eq!(copies[id].0.matches(" NOTIFY=NEVER").count(), 2);
            assert_eq!(&recipients, envelope);
        }
    }
}

/// Postfix on both sides: the reply that the first one logs is the second one's.
#[test]
fn a_second_postfix_as_primary() {
    if !available() {
        return;
    }
    let sinks = [Sink::start(), Sink::start(), Sink::start()];
    let primary = Postfix::start(
        sinks[0].addr(),
        "smtpd_recipient_restrictions = check_recipient_access inline:{ {gone@example.com = 550 5.1.6 moved to the country} }",
    );
    let dup = Dup::start(&config(primary.address, &[sinks[1].addr(), sinks[2].addr()], "", ""));
    let postfix = Postfix::start(dup.addr(), "");

    let sent = |number: usize| letter(&format!("{number:02}"), b"..\r\nGr\xfc\xdfe\r\n");
    let mut client = Client::ready(postfix.address);
    for number in 0..20 {
        let to = ["b@example.com", "gone@example.com", "c@example.com"];
        client.message("a@sender.test", &to, &sent(number));
    }
    // Twenty messages and as many bounces.
    postfix.wait_removed(40);
    primary.wait_removed(20);

    sinks.iter().for_each(|sink| wait_count(sink, 20));
    stop(&dup);
    let stored = sinks.each_ref().map(sorted);
    assert_eq!(stored.each_ref().map(Vec::len), [20; 3]);
    for number in 0..20 {
        let [at_primary, first, second] = stored.each_ref().map(|messages| &messages[number]);
        assert_is_letter(&first.data, &sent(number));
        assert_same(&second.data, &first.data);
        // Below the header of the second Postfix the same octets.
        assert_is_letter(&at_primary.data, &first.data);
        for received in [at_primary, first, second] {
            assert_eq!(received.rcpts.len(), 2, "{:?}", received.rcpts);
        }
    }

    let bounces = postfix.log(&["to=<gone@example.com>", "status=bounced"]);
    assert_eq!(bounces.len(), 20);
    for line in bounces {
        let said =
            "said: 550 5.1.6 <gone@example.com>: Recipient address rejected: moved to the country";
        assert!(line.contains(said), "{line}");
    }
    let sent = postfix.log(&["@example.com>", "status=sent"]);
    assert_eq!(sent.len(), 40);
    for line in sent {
        let (_, id) = line.split_once("(250 2.0.0 Ok: queued as ").expect(&line);
        let id = id.trim_end_matches(')');
        assert_eq!(primary.log(&[&format!("{id}: removed")]).len(), 1, "{line}");
    }
}
