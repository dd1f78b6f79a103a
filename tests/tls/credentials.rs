//! Logging in at destinations: how, when, and that nobody else hears the password.

use std::process::Stdio;

use tempfile::NamedTempFile;

use crate::common::*;
use crate::front::{Front, Options};
use crate::pki::{Authority, file, self_signed};
use crate::{BODY, config, deliver, destination, dup};

const PASSWORD: &str = "Rumpelstilzchen";

/// `\0relay\0Rumpelstilzchen`, and the two halves for LOGIN.
const PLAIN: &str = "AHJlbGF5AFJ1bXBlbHN0aWx6Y2hlbg==";
const NAME: &str = "cmVsYXk=";
const SECRET: &str = "UnVtcGVsc3RpbHpjaGVu";

/// What a server says that knows this one user.
fn knows_relay(event: &Event) -> Action {
    let Event::Other(line) = event else { return Action::Default };
    Action::reply(match line.as_str() {
        line if line == format!("AUTH PLAIN {PLAIN}") => "235 2.7.0 welcome",
        "AUTH LOGIN" => "334 VXNlcm5hbWU6",
        NAME => "334 UGFzc3dvcmQ6",
        SECRET => "235 2.7.0 welcome",
        _ => "535 5.7.8 who are you",
    })
}

struct Server {
    front: Front,
    /// The destination in YAML, logging in.
    destination: String,
    keys: String,
    _password: NamedTempFile,
}

/// A server with TLS that offers these mechanisms.
fn server(auth: &'static str, reply: impl Fn(&Event) -> Action + Send + Sync + 'static) -> Server {
    let pair = self_signed("127.0.0.1");
    let front = Front::with(Options::new(&pair), Sink::replying(reply));
    front.sink.set_ehlo(&["PIPELINING", auth]);
    let password = file(format!("{PASSWORD}\r\nsecond line\n"));
    let keys = format!(
        "tls: required, fingerprint: \"{}\", username: relay, password_file: \"{}\"",
        pair.fingerprint(),
        password.path().display()
    );
    let destination = destination(&front, &keys);
    Server { front, destination, keys, _password: password }
}

/// No form of the password is in `text`.
#[track_caller]
fn assert_no_secret(text: &str) {
    for secret in [PASSWORD, PLAIN, SECRET, "Rumpel", "stilz", &PLAIN[10..], &SECRET[6..]] {
        assert!(!text.contains(secret), "{secret} in: {text}");
    }
}

#[test]
fn plain_before_login() {
    for (auth, expected) in [
        ("AUTH LOGIN PLAIN", vec![format!("AUTH PLAIN {PLAIN}")]),
        ("auth plain", vec![format!("AUTH PLAIN {PLAIN}")]),
        ("AUTH CRAM-MD5 LOGIN", vec!["AUTH LOGIN".into(), NAME.into(), SECRET.into()]),
        ("AUTH=LOGIN", vec!["AUTH LOGIN".into(), NAME.into(), SECRET.into()]),
    ] {
        let server = server(auth, knows_relay);
        let dup = dup(&server.front, &server.keys, "");
        let mut client = Client::ready(dup.addr());
        deliver(&mut client);
        deliver(&mut client);
        let commands = server.front.sink.commands();
        let commands: Vec<_> = commands.iter().map(|(_, line)| line.as_str()).collect();
        assert_eq!(commands[0], "EHLO dup.example");
        assert_eq!(commands[1..=expected.len()], expected, "{auth}");
        assert_eq!(commands[expected.len() + 1], "MAIL FROM:<a@example.com>");
        assert_eq!(server.front.sink.count("AUTH"), 1, "once a connection");
        assert_no_secret(&dup.log());
    }
}

#[test]
fn the_client_is_offered_no_auth() {
    let server = server("AUTH PLAIN", knows_relay);
    let dup = dup(&server.front, &server.keys, "");
    let mut client = Client::greeted(dup.addr());
    assert!(!client.ehlo().offers("AUTH"));
    client.expect("AUTH PLAIN AGEAYg==", 502);
}

#[test]
fn in_clear_only_when_that_is_said_twice() {
    let sink = Sink::replying(knows_relay);
    sink.set_ehlo(&["AUTH PLAIN"]);
    let password = file(PASSWORD);
    let primary = format!(
        "{{address: \"{}\", tls: none, allow_plaintext_auth: true, username: relay, \
         password_file: \"{}\"}}",
        sink.addr(),
        password.path().display()
    );
    let dup = Dup::start(&config(&primary, &[], "", ""));
    deliver(&mut Client::ready(dup.addr()));
    assert_eq!(sink.count(&format!("AUTH PLAIN {PLAIN}")), 1);
}

#[test]
fn nobody_gets_the_password_who_is_not_the_server() {
    // A server that strips, and one with another certificate.
    let stripping = server("AUTH PLAIN", knows_relay);
    stripping.front.change(|options| options.ehlo = vec!["AUTH PLAIN"]);
    let other = server("AUTH PLAIN", knows_relay);
    other.front.change(|options| options.config = Authority::new().issue("127.0.0.1").server());
    for Server { front, keys, .. } in [&stripping, &other] {
        let dup = dup(front, keys, "");
        Client::greeted(dup.addr()).expect("EHLO client.example", 421);
        drop(dup);
        assert_eq!(front.sink.connections(), 0);
        for seen in front.seen() {
            assert!(!String::from_utf8_lossy(&seen.clear).contains("AUTH"), "{seen:?}");
        }
    }
}

#[test]
fn a_refused_login_defers_the_mail() {
    let replies = ["535 5.7.8 not you", "454 4.7.0 later", "421 4.3.2 bye", "500 5.5.1 what"];
    for reply in replies {
        let server = server("AUTH PLAIN LOGIN", move |event| match event {
            Event::Other(_) => Action::reply(reply),
            _ => Action::Default,
        });
        let dup = dup(&server.front, &server.keys, "");
        let mut client = Client::greeted(dup.addr());
        let heard = client.expect("EHLO client.example", 421);
        client.closed();
        let name = format!("primary {}", server.front.addr());
        assert!(heard.text().starts_with("4.7.0 "), "{heard:?}");
        assert!(heard.text().contains(&name), "{heard:?}");
        assert!(heard.text().contains(&format!("AUTH: {reply}")), "{heard:?}");
        assert_eq!(server.front.sink.count("MAIL"), 0);
    }
}

#[test]
fn a_server_without_auth_is_not_good_enough() {
    for auth in ["8BITMIME", "AUTH", "AUTH GSSAPI CRAM-MD5", "AUTHPLAIN"] {
        let server = server(auth, knows_relay);
        let dup = dup(&server.front, &server.keys, "");
        let heard = Client::greeted(dup.addr()).expect("EHLO client.example", 421);
        assert!(heard.text().contains("AUTH: neither PLAIN nor LOGIN is offered"), "{heard:?}");
    }
}

#[test]
fn a_backup_that_refuses_the_login_is_held_and_loses_nothing() {
    let server = server("AUTH PLAIN", |event| match event {
        Event::Other(_) => Action::reply("535 5.7.8 not you"),
        _ => Action::Default,
    });
    let primary = Sink::start();
    let backups = [server.destination.clone()];
    let dup = Dup::start(&config(&format!("\"{}\"", primary.addr()), &backups, "", ""));
    deliver(&mut Client::ready(dup.addr()));
    let line = dup.wait_log("role=backup is down: ");
    assert!(line.contains("AUTH: 535 5.7.8 not you"), "{line}");
    assert_eq!(server.front.sink.count("MAIL"), 0);
    server.front.sink.set_reply(knows_relay);
    assert_eq!(server.front.sink.wait(1)[0].data, BODY);
}

/// Whatever a server repeats of what it heard, nobody sees it: not in the log at its loudest, nor
/// the client, nor the spool, nor who asks `check`.
#[test]
fn what_a_server_repeats_is_not_shown() {
    let echo: &[fn(&str) -> Vec<u8>] = &[
        |line| format!("535 5.7.8 no: {line}\r\n").into(),
        |line| format!("535-5.7.8 no\r\n535 {}\r\n", line.rsplit(' ').next().unwrap()).into(),
        |_| format!("535 your password {PASSWORD} is wrong\r\n").into(),
        |_| format!("535 \0relay\0{PASSWORD}\r\n").into(),
        |line| format!("{line}\r\n").into(),
        |_| format!("{PASSWORD}\r\n").into(),
        |_| format!("354 {PASSWORD}\r\n").into(),
        |_| format!("250x{PASSWORD}\r\n").into(),
        |line| format!("454 {}\r\n", &line[line.len() - 14..]).into(),
    ];
    for (n, &echo) in echo.iter().enumerate() {
        for auth in ["AUTH PLAIN", "AUTH LOGIN"] {
            let server = server(auth, move |event| match event {
                Event::Other(line) if line == "AUTH LOGIN" => Action::reply("334 VXNlcm5hbWU6"),
                Event::Other(line) if line == NAME => Action::reply("334 UGFzc3dvcmQ6"),
                Event::Other(line) => Action::raw(echo(line)),
                _ => Action::Default,
            });
            let folder = tempfile::tempdir().unwrap();
            let spool = folder.path().join("spool");
            let primary = Sink::start();
            let backups = [server.destination.clone()];
            let relay = format!("spool: \"{}\"", spool.display());
            let yaml = config(&format!("\"{}\"", primary.addr()), &backups, "", &relay);
            let dup = Dup::start(&format!("{yaml}log:\n  level: trace\n"));
            deliver(&mut Client::ready(dup.addr()));
            let line = dup.wait_log("role=backup is down: ");
            assert!(line.contains("AUTH: "), "{line}");
            let is_hidden = ["not shown", "more questions"].iter().any(|what| line.contains(what));
            assert!(is_hidden, "{n} {auth}: {line}");
            assert_no_secret(&dup.log());
            let mut queue = String::new();
            wait_until("the reason in the spool", || {
                let output = run(&["queue"], Some(&yaml), &[]);
                queue = String::from_utf8_lossy(&output.stdout).into_owned();
                queue.contains("AUTH")
            });
            assert_no_secret(&queue);

            let yaml = config(&server.destination, &[], "", "");
            let check = run(&["check"], Some(&yaml), &[]);
            assert_eq!(check.status.code(), Some(1));
            assert_no_secret(&format!("{check:?}"));
            let dup = Dup::start(&yaml);
            let heard = Client::greeted(dup.addr()).expect("EHLO client.example", 421);
            assert_no_secret(&heard.text());
        }
    }
}

#[test]
fn a_login_that_asks_for_ever_is_given_up() {
    let server = server("AUTH LOGIN", |event| match event {
        Event::Other(_) => Action::reply("334 UGFzc3dvcmQ6"),
        _ => Action::Default,
    });
    let dup = dup(&server.front, &server.keys, "");
    let heard = Client::greeted(dup.addr()).expect("EHLO client.example", 421);
    assert!(heard.text().contains("AUTH: "), "{heard:?}");
    for question in ["334 ", "334 !!!", "334 d2hhdD8="] {
        server.front.sink.set_reply(move |event| match event {
            Event::Other(_) => Action::reply(question),
            _ => Action::Default,
        });
        let heard = Client::greeted(dup.addr()).expect("EHLO client.example", 421);
        assert!(heard.text().contains("AUTH: "), "{heard:?}");
    }
}

#[test]
fn check_says_who_it_is_and_no_more() {
    let server = server("AUTH PLAIN", knows_relay);
    let yaml = config(&server.destination, &[], "", "");
    let output = run(&["check"], Some(&yaml), &[("RUST_LOG", "trace")]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("  logged in as relay\n"), "{text}");
    assert_no_secret(&format!("{text}{}", String::from_utf8_lossy(&output.stderr)));
}

/// Neither arguments nor environment have it, which others on the host can look at.
#[test]
fn the_process_does_not_show_it() {
    let server = server("AUTH PLAIN", knows_relay);
    let dup = Dup::start_with(
        |command| _ = command.stdout(Stdio::null()),
        &config(&server.destination, &[], "", ""),
    );
    deliver(&mut Client::ready(dup.addr()));
    for file in ["cmdline", "environ", "status"] {
        let octets = std::fs::read(format!("/proc/{}/{file}", dup.pid())).unwrap();
        assert_no_secret(&String::from_utf8_lossy(&octets));
    }
}

/// Root reads what only root may, and is root no more when it is used.
#[test]
fn files_are_read_before_root_is_given_up() {
    if !nix::unistd::Uid::effective().is_root() {
        return eprintln!("skipped: this is not root");
    }
    let server = server("AUTH PLAIN", knows_relay);
    let pair = Authority::new().issue("dup.example");
    let files = [file(&pair.certificate), file(&pair.key)];
    let smtp = format!(
        "tls_certificate: \"{}\"\ntls_key: \"{}\"",
        files[0].path().display(),
        files[1].path().display()
    );
    let dup = Dup::start_with(
        |command| _ = command.args(["--user", "nobody"]),
        &config(&server.destination, &[], &smtp, ""),
    );
    let status = std::fs::read_to_string(format!("/proc/{}/status", dup.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("Uid:")).unwrap();
    assert!(!line.split_whitespace().any(|word| word == "0"), "{line}");
    let mut client = Client::greeted(dup.addr());
    assert!(client.ehlo().offers("STARTTLS"));
    deliver(&mut client);
    assert_eq!(server.front.sink.count("AUTH PLAIN"), 1);
}
