//! The configuration and the command line, as a person meets them: what works, and what a mistake
//! is answered with.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::common::*;

/// Starts the program without a `--config`. `prepare` gets the command and its working folder.
#[track_caller]
fn start_bare(prepare: impl FnOnce(&mut Command, &Path)) -> Dup {
    Dup::start_with(
        |command| {
            let folder = command.get_current_dir().unwrap().to_path_buf();
            let mut bare = Command::new(binary());
            bare.current_dir(&folder);
            bare.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
            // As in the command that this takes the place of.
            for (name, value) in command.get_envs() {
                if value.is_none() {
                    bare.env_remove(name);
                }
            }
            prepare(&mut bare, &folder);
            *command = bare;
        },
        "",
    )
}

/// Starts it with nothing but these variables.
#[track_caller]
fn start_with_environment(variables: &[(&str, &str)]) -> Dup {
    start_bare(|command, _| _ = command.envs(variables.iter().copied()))
}

/// Starts it with a file and these variables.
#[track_caller]
fn start_with_both(yaml: &str, variables: &[(&str, &str)]) -> Dup {
    Dup::start_with(|command| _ = command.envs(variables.iter().copied()), yaml)
}

#[track_caller]
fn deliver(client: &mut Client) {
    let reply = client.message("a@example.com", &["b@example.com"], b"Subject: x\r\n\r\nx\r\n");
    assert_eq!(reply.code, 250, "{reply:?}");
}

/// Refused with exit code 2 and one line on stderr that has all of `words`.
#[track_caller]
fn assert_refused(output: &Output, words: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert_eq!(stderr.matches('\n').count(), 1, "not one line: {stderr}");
    assert!(stderr.ends_with('\n') && !stderr.contains('\r'), "not one line: {stderr:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    for word in words {
        assert!(stderr.contains(word), "no {word:?} in: {stderr}");
    }
}

/// False, and says so, where a configuration is installed: a start without a file would find it.
fn nothing_is_installed() -> bool {
    let installed = Path::new("/etc/smtp-dup/config.yaml");
    if installed.exists() {
        eprintln!("skipped: {} is there", installed.display());
    }
    !installed.exists()
}

// What works.

#[test]
fn a_file_of_gosmtp_dup_works_unchanged() {
    let (primary, one, two) = (Sink::start(), Sink::start(), Sink::start());
    let (a, b, c) = (primary.addr(), one.addr(), two.addr());
    let dup = Dup::start(&format!(
        "smtp:\n  listen: \":0\"\n  domain: \"localhost\"\n\n\
         relay:\n  destination_primary: \"{a}\"\n  destination_backups:\n    - \"{b}\"\n    - \"{c}\"\n  \
         timeout_seconds: 10\n"
    ));
    let port = dup.addr().port();
    let mut client = Client::connect(SocketAddr::from(([127, 0, 0, 1], port)));
    let greeting = client.expect_reply(220);
    assert!(greeting.lines[0].starts_with("localhost "), "{greeting:?}");
    client.ehlo();
    deliver(&mut client);
    for sink in [&primary, &one, &two] {
        sink.wait(1);
        assert!(sink.commands().iter().any(|(_, line)| line == "EHLO localhost"));
    }
    let starting = dup.wait_log(" starting ");
    assert!(starting.contains(&format!(" destination_primary={a} ")), "{starting}");
    assert!(starting.contains(&format!(" destination_backups={b},{c}")), "{starting}");
}

#[test]
fn the_variables_of_gosmtp_dup_work_unchanged_and_without_a_file() {
    if !nothing_is_installed() {
        return;
    }
    let (primary, one, two) = (Sink::start(), Sink::start(), Sink::start());
    let backups = format!("{},{}", one.addr(), two.addr());
    let dup = start_with_environment(&[
        ("SMTP_DUP_SMTP_LISTEN", "127.0.0.1:0"),
        ("SMTP_DUP_SMTP_DOMAIN", "from.environment.example"),
        ("SMTP_DUP_RELAY_DESTINATION_PRIMARY", &primary.addr().to_string()),
        ("SMTP_DUP_RELAY_DESTINATION_BACKUPS", &backups),
        ("SMTP_DUP_RELAY_TIMEOUT_SECONDS", "5"),
    ]);
    let mut client = Client::connect(dup.addr());
    let greeting = client.expect_reply(220);
    assert!(greeting.lines[0].starts_with("from.environment.example "), "{greeting:?}");
    client.ehlo();
    deliver(&mut client);
    for sink in [&primary, &one, &two] {
        sink.wait(1);
    }
    assert!(dup.log_lines("warning").iter().all(|line| !line.contains("SMTP_DUP_")));
}

#[test]
fn the_environment_comes_before_the_file_and_the_file_before_the_defaults() {
    let (primary, wrong, backup) = (Sink::start(), Sink::start(), Sink::start());
    let yaml = format!(
        "smtp:\n  listen: 127.0.0.1:0\n  domain: from.file.example\n  max_recipients: 2\n\
         relay:\n  destination_primary: \"{}\"\n  destination_backups: [\"{}\"]\n",
        wrong.addr(),
        backup.addr()
    );
    let primary_address = primary.addr().to_string();
    let dup = start_with_both(
        &yaml,
        &[
            ("SMTP_DUP_RELAY_DESTINATION_PRIMARY", &primary_address),
            ("SMTP_DUP_SMTP_MAX_RECIPIENTS", "1"),
        ],
    );
    let mut client = Client::connect(dup.addr());
    let greeting = client.expect_reply(220);
    assert!(greeting.lines[0].starts_with("from.file.example "), "{greeting:?}");
    client.ehlo();
    client.expect("MAIL FROM:<a@example.com>", 250);
    client.expect("RCPT TO:<b@example.com>", 250);
    let reply = client.expect("RCPT TO:<c@example.com>", 452);
    assert!(reply.text().starts_with("4.5.3 "), "{reply:?}");
    client.expect("DATA", 354);
    assert_eq!(client.body(b"x\r\n").code, 250);
    primary.wait(1);
    backup.wait(1);
    assert_eq!(wrong.connections(), 0);
}

#[test]
fn lists_and_numbers_in_variables() {
    let primary = Sink::start();
    let yaml = config(primary.addr(), &[], "", "");
    let dup = start_with_both(
        &yaml,
        &[
            ("SMTP_DUP_SMTP_LISTEN", "127.0.0.1:0, 127.0.0.2:0"),
            ("SMTP_DUP_SMTP_ALLOWED_CLIENTS", "127.0.0.8/32,127.0.0.9/32"),
            ("SMTP_DUP_SMTP_MAX_MESSAGE_SIZE", "12345"),
        ],
    );
    assert_eq!(dup.addrs().len(), 2);
    for &addr in dup.addrs() {
        Client::connect(addr).expect_reply(421);
        let mut client = Client::connect_from("127.0.0.9".parse().unwrap(), addr);
        client.expect_reply(220);
        let ehlo = client.ehlo();
        assert!(ehlo.lines.iter().any(|line| line == "SIZE 12345"), "{ehlo:?}");
    }
}

#[test]
fn an_empty_variable_empties_a_list() {
    // Compose files pass variables on whether they are set or not.
    let (primary, backup) = (Sink::start(), Sink::start());
    let yaml = config(primary.addr(), &[backup.addr()], "", "");
    let dup = start_with_both(&yaml, &[("SMTP_DUP_RELAY_DESTINATION_BACKUPS", "")]);
    deliver(&mut Client::ready(dup.addr()));
    dup.signal(Signal::Term);
    assert!(dup.wait_exit(BOUND).success());
    assert_eq!(backup.connections(), 0);
}

#[test]
fn a_file_in_the_working_folder_is_found() {
    let primary = Sink::start();
    let yaml = config(primary.addr(), &[], "domain: found.example", "");
    let dup = start_bare(|_, folder| std::fs::write(folder.join("config.yaml"), &yaml).unwrap());
    let greeting = Client::connect(dup.addr()).expect_reply(220);
    assert!(greeting.lines[0].starts_with("found.example "), "{greeting:?}");

    // One that is named comes first.
    let named = config(primary.addr(), &[], "domain: named.example", "");
    let dup = Dup::start_with(
        |command| {
            let folder = command.get_current_dir().unwrap();
            std::fs::write(folder.join("config.yaml"), &yaml).unwrap();
        },
        &named,
    );
    let greeting = Client::connect(dup.addr()).expect_reply(220);
    assert!(greeting.lines[0].starts_with("named.example "), "{greeting:?}");
}

#[test]
fn ways_to_write_it() {
    let (primary, backup) = (Sink::start(), Sink::start());
    let (a, b) = (primary.addr(), backup.addr());
    let minimal =
        format!("smtp: {{listen: \"127.0.0.1:0\"}}\nrelay:\n  destination_primary: \"{a}\"\n");
    for yaml in [
        // Numbers in quotes, a list of addresses, a mapping with the address, one backup.
        format!(
            "smtp:\n  listen:\n  - 127.0.0.1:0\n  - 127.0.0.2:0\n  max_connections: \"7\"\n\
             relay:\n  destination_primary:\n    address: \"{a}\"\n  destination_backups: \"{b}\"\n"
        ),
        format!("{minimal}  destination_backups:\n    - address: \"{b}\"\n"),
        format!("---\n# comment\n{minimal}  destination_backups: [\"{b}\"]\n"),
        format!("{minimal}  destination_backups: [\"{b}\"]\n").replace('\n', "\r\n"),
        // An editor's byte order mark.
        format!("\u{feff}{minimal}  destination_backups: [\"{b}\"]\n"),
        // Sections and keys whose values were commented out.
        format!("{minimal}  destination_backups: [\"{b}\"]\n  timeout_seconds:\nlog:\n"),
    ] {
        let dup = Dup::start(&yaml);
        let before = backup.messages().len();
        deliver(&mut Client::ready(dup.addr()));
        backup.wait(before + 1);
    }
    // No backups at all.
    for yaml in [
        minimal.clone(),
        format!("{minimal}  destination_backups:\n"),
        format!("{minimal}  destination_backups: []\n"),
    ] {
        deliver(&mut Client::ready(Dup::start(&yaml).addr()));
    }
}

#[test]
fn host_names_are_looked_up() {
    let primary = Sink::start();
    let port = primary.addr().port();
    let dup = Dup::start(&format!(
        "smtp:\n  listen: 127.0.0.1:0\nrelay:\n  destination_primary: localhost:{port}\n"
    ));
    deliver(&mut Client::ready(dup.addr()));
    assert!(dup.wait_log("role=primary").contains(&format!("relay=localhost:{port} ")));
}

#[test]
fn ipv6() {
    let Ok(probe) = TcpListener::bind("[::1]:0") else { return };
    drop(probe);
    let primary = Sink::with(SinkOptions { ip: "::1".parse().unwrap(), ..SinkOptions::default() });
    let dup = Dup::start(&config(primary.addr(), &[], "listen: \"[::1]:0\"", ""));
    assert!(dup.addr().is_ipv6());
    deliver(&mut Client::ready(dup.addr()));
    primary.wait(1);
}

#[test]
fn a_variable_that_is_no_setting_is_a_warning() {
    let primary = Sink::start();
    let yaml = config(primary.addr(), &[], "", "");
    // The first three as Kubernetes sets them for a service of this name.
    let dup = start_with_both(
        &yaml,
        &[
            ("SMTP_DUP_PORT", "tcp://10.0.0.1:25"),
            ("SMTP_DUP_SERVICE_HOST", "10.0.0.1"),
            ("SMTP_DUP_PORT_25_TCP_ADDR", "10.0.0.1"),
            ("SMTP_DUP_RELAY_DESTINATION_BACKUP", "b.example.com:25"),
        ],
    );
    deliver(&mut Client::ready(dup.addr()));
    for name in ["SMTP_DUP_PORT ", "SMTP_DUP_SERVICE_HOST ", "SMTP_DUP_PORT_25_TCP_ADDR "] {
        let lines = dup.log_lines(name);
        assert_eq!(lines.len(), 1, "{name}: {}", dup.log());
        assert!(lines[0].contains(" warning: "), "{lines:?}");
    }
    let line = dup.wait_log("SMTP_DUP_RELAY_DESTINATION_BACKUP ");
    assert!(line.contains("SMTP_DUP_RELAY_DESTINATION_BACKUPS"), "{line}");
}

// Mistakes.

/// A whole configuration around these lines, which would be accepted without them.
fn around(smtp: &str, relay: &str) -> String {
    let section =
        |lines: &str| -> String { lines.lines().map(|line| format!("  {line}\n")).collect() };
    format!(
        "smtp:\n{}relay:\n{}",
        section(&format!("listen: 127.0.0.1:2525\n{smtp}")),
        section(&format!("destination_primary: mx.example.com:25\n{relay}"))
    )
}

#[test]
fn a_mistake_is_one_line_with_key_value_and_remedy() {
    let smtp = |lines: &str| around(lines, "");
    let relay = |lines: &str| around("", lines);
    let primary = |value: &str| format!("relay:\n  destination_primary: {value}\n");
    let listen =
        |value: &str| format!("smtp:\n  listen: {value}\n{}", primary("mx.example.com:25"));
    // The file; key, value, and a piece of the remedy.
    let mistakes: Vec<(String, &[&str])> = vec![
        // Keys that are not known, with the nearest that is.
        (
            relay("destination_backup: [\"b:25\"]"),
            &["relay.destination_backup", "relay.destination_backups"],
        ),
        (smtp("max_conections: 5"), &["smtp.max_conections", "smtp.max_connections"]),
        (smtp("listne: x"), &["smtp.listne", "smtp.listen"]),
        (relay("colour: blue"), &["relay.colour", "smtp-dup.yaml(5)"]),
        (format!("{}rely:\n  destination_backups: []\n", smtp("")), &["rely", "relay"]),
        (format!("{}weather: fine\n", smtp("")), &["weather", "smtp-dup.yaml(5)"]),
        (
            "destination_primary: a:25\n".into(),
            &["destination_primary", "relay.destination_primary"],
        ),
        ("SMTP:\n  listen: a:25\n".into(), &["SMTP", "smtp"]),
        (relay("spool: spool/here"), &["relay.spool", "spool/here", "begins with /"]),
        (relay("spool_required: maybe"), &["relay.spool_required", "maybe", "true nor false"]),
        (relay("spool_required: true"), &["relay.spool_required", "set relay.spool"]),
        (
            relay(&format!("spool: /s\ndestination_backups: [\"{}.example:25\"]", "x".repeat(231))),
            &["relay.spool", "xxx.example:25", "a shorter name"],
        ),
        (relay("retry_for_seconds: 0"), &["relay.retry_for_seconds", "0", "from 1"]),
        // Half of what TLS takes.
        (smtp("tls_certificate: /etc/cert.pem"), &["smtp.tls_certificate"]),
        (smtp("tls_key: /etc/key.pem"), &["smtp.tls_key"]),
        (
            format!("{}log:\n  target: file\n", smtp("")),
            &["log.target", "file", "stderr or syslog"],
        ),
        (
            relay("destination_backups:\n- address: b:25\n  tls: always"),
            &["relay.destination_backups", "tls"],
        ),
        (
            relay("destination_backups:\n- address: b:25\n  username: u"),
            &["relay.destination_backups", "username"],
        ),
        // The primary.
        (
            "smtp:\n  domain: mail.example.com\n".into(),
            &["relay.destination_primary", "not set", "mail.example.com:25"],
        ),
        ("".into(), &["relay.destination_primary", "SMTP_DUP_RELAY_DESTINATION_PRIMARY"]),
        ("# only a comment\n".into(), &["relay.destination_primary"]),
        ("relay:\n".into(), &["relay.destination_primary"]),
        (primary(""), &["relay.destination_primary", "mail.example.com:25"]),
        (primary("\"\""), &["relay.destination_primary", "mail.example.com:25"]),
        // Host and port.
        (
            primary("mx.example.com"),
            &["relay.destination_primary", "mx.example.com", "mx.example.com:25"],
        ),
        (
            primary("\"mx.example.com:\""),
            &["relay.destination_primary", "mx.example.com:", "1 to 65535"],
        ),
        (primary("mx.example.com:smtp"), &["relay.destination_primary", "smtp", "1 to 65535"]),
        (
            primary("mx.example.com:0"),
            &["relay.destination_primary", "mx.example.com:0", "1 to 65535"],
        ),
        (primary("mx.example.com:65536"), &["relay.destination_primary", "65536", "1 to 65535"]),
        (primary("mx.example.com:-1"), &["relay.destination_primary", "-1", "1 to 65535"]),
        (primary("mx.example.com:+25"), &["relay.destination_primary", "+25", "1 to 65535"]),
        (primary("\":25\""), &["relay.destination_primary", ":25", "host:port"]),
        (
            primary("\"2001:db8::1:25\""),
            &["relay.destination_primary", "2001:db8::1:25", "[2001:db8::1]:25"],
        ),
        (
            primary("\"[2001:db8::1]\""),
            &["relay.destination_primary", "[2001:db8::1]", "[2001:db8::1]:25"],
        ),
        // As Postfix writes it, who looks up no MX then.
        (primary("\"[mx.example.com]:25\""), &["[mx.example.com]:25", "a host name without them"]),
        (primary("\"a b:25\""), &["relay.destination_primary", "a b:25"]),
        (primary("\"a\\nb:25\""), &["relay.destination_primary", "host:port"]),
        (primary("25"), &["relay.destination_primary", "25", "host:port"]),
        (primary("[\"a:25\", \"b:25\"]"), &["relay.destination_primary", "host:port"]),
        (
            primary("{host: a, port: 25}"),
            &["relay.destination_primary", "host", "smtp-dup.yaml(5)"],
        ),
        (
            relay("destination_backups: [\"mx.example.com:25\"]"),
            &["relay.destination_backups", "mx.example.com:25", "take it out"],
        ),
        (
            relay("destination_backups: [\"b.example.com:25\", \"\"]"),
            &["relay.destination_backups", "\"\"", "host:port"],
        ),
        (
            relay("destination_backups: [\"b.example.com\"]"),
            &["relay.destination_backups", "b.example.com", "b.example.com:25"],
        ),
        (
            relay("destination_backups: [\"b:25\", \"c:99999\"]"),
            &["relay.destination_backups", "99999", "1 to 65535"],
        ),
        (relay("destination_backups: [25]"), &["relay.destination_backups", "25", "host:port"]),
        (relay("destination_backups: [{}]"), &["relay.destination_backups", "address"]),
        (
            relay("destination_backups: [\"b:25\", \"b:25\"]"),
            &["relay.destination_backups", "b:25", "once"],
        ),
        // Numbers.
        (smtp("max_connections: many"), &["smtp.max_connections", "many", "1 to "]),
        (smtp("max_connections: 0"), &["smtp.max_connections", "0", "1 to "]),
        (smtp("max_connections: -1"), &["smtp.max_connections", "-1", "1 to "]),
        (smtp("max_connections: 1.5"), &["smtp.max_connections", "1.5", "1 to "]),
        (smtp("max_connections: [5]"), &["smtp.max_connections", "list", "1 to "]),
        (smtp("max_connections: {a: 5}"), &["smtp.max_connections", "1 to "]),
        (smtp("max_connections: true"), &["smtp.max_connections", "true", "1 to "]),
        (
            smtp("max_connections: 99999999999999999999999"),
            &["smtp.max_connections", "99999999999999999999999"],
        ),
        (smtp("max_recipients: 0"), &["smtp.max_recipients", "0", "1 to "]),
        (smtp("max_message_size: 10M"), &["smtp.max_message_size", "10M", "0 to "]),
        (smtp("max_message_size: -1"), &["smtp.max_message_size", "-1", "0 to "]),
        (smtp("timeout_seconds: 0"), &["smtp.timeout_seconds", "0", "1 to "]),
        (smtp("timeout_seconds: 5m"), &["smtp.timeout_seconds", "5m", "1 to "]),
        (relay("timeout_seconds: ten"), &["relay.timeout_seconds", "ten", "1 to "]),
        (relay("command_timeout_seconds: -5"), &["relay.command_timeout_seconds", "-5", "1 to "]),
        (relay("data_timeout_seconds: 0"), &["relay.data_timeout_seconds", "0", "1 to "]),
        (relay("backup_connections: 0"), &["relay.backup_connections", "0", "1 to "]),
        (relay("backup_memory: 64MB"), &["relay.backup_memory", "64MB", "0 to "]),
        // Addresses of our own.
        (listen("2525"), &["smtp.listen", "2525", "127.0.0.1:2525"]),
        (listen("127.0.0.1"), &["smtp.listen", "127.0.0.1", "127.0.0.1:2525"]),
        (listen("\"127.0.0.1:99999\""), &["smtp.listen", "127.0.0.1:99999", "65535"]),
        (listen("\"127.0.0.1:smtp\""), &["smtp.listen", "127.0.0.1:smtp", "65535"]),
        (listen("\"::1\""), &["smtp.listen", "::1"]),
        (listen("\"300.0.0.1:25\""), &["smtp.listen", "300.0.0.1:25"]),
        (listen("[]"), &["smtp.listen", "127.0.0.1:2525"]),
        (listen("{a: b}"), &["smtp.listen"]),
        // Mail in circles.
        (
            relay("").replace("mx.example.com:25", "127.0.0.1:2525"),
            &["relay.destination_primary", "127.0.0.1:2525", "smtp.listen"],
        ),
        (
            relay("").replace("mx.example.com:25", "localhost:2525"),
            &["relay.destination_primary", "localhost:2525", "smtp.listen"],
        ),
        (
            relay("").replace("mx.example.com:25", "\"[::ffff:127.0.0.1]:2525\""),
            &["relay.destination_primary", "smtp.listen"],
        ),
        (
            relay("destination_backups: [\"b:25\", \"127.0.0.1:2525\"]"),
            &["relay.destination_backups", "127.0.0.1:2525", "smtp.listen"],
        ),
        (
            format!("smtp:\n  listen: \"0.0.0.0:2525\"\n{}", primary("127.0.0.1:2525")),
            &["relay.destination_primary", "127.0.0.1:2525", "smtp.listen"],
        ),
        (
            format!("smtp:\n  listen: \":2525\"\n{}", primary("127.0.0.1:2525")),
            &["relay.destination_primary", "127.0.0.1:2525", "smtp.listen"],
        ),
        (
            format!("smtp:\n  listen: \":2525\"\n{}", primary("\"[::1]:2525\"")),
            &["relay.destination_primary", "[::1]:2525", "smtp.listen"],
        ),
        (
            format!("smtp:\n  listen: \":2525\"\n{}", primary("localhost:2525")),
            &["relay.destination_primary", "localhost:2525", "smtp.listen"],
        ),
        (
            format!(
                "smtp:\n  listen: [\"127.0.0.1:2526\", \"127.0.0.1:2525\"]\n{}",
                primary("127.0.0.1:2525")
            ),
            &["relay.destination_primary", "127.0.0.1:2525", "smtp.listen"],
        ),
        (
            listen("\"127.0.0.1:2525\"").replace("mx.example.com:25", "0.0.0.0:2525"),
            &["relay.destination_primary", "0.0.0.0:2525", "smtp.listen"],
        ),
        // Others.
        (
            smtp("allowed_clients: [\"10.0.0.0/33\"]"),
            &["smtp.allowed_clients", "10.0.0.0/33", "192.0.2.0/24"],
        ),
        (
            smtp("allowed_clients: [\"everyone\"]"),
            &["smtp.allowed_clients", "everyone", "192.0.2.0/24"],
        ),
        (smtp("allowed_clients: 10"), &["smtp.allowed_clients", "10", "192.0.2.0/24"]),
        (smtp("domain: \"\""), &["smtp.domain", "mail.example.com"]),
        (smtp("domain: \"two words\""), &["smtp.domain", "two words", "mail.example.com"]),
        (smtp("domain: \"a\\r\\nb\""), &["smtp.domain", "mail.example.com"]),
        (smtp("domain: [a, b]"), &["smtp.domain"]),
        (format!("{}log:\n  level: loud\n", smtp("")), &["log.level", "loud", "debug"]),
        (format!("{}log: debug\n", smtp("")), &["log", "debug"]),
        // What is no such file at all.
        ("smtp: listen: x\n".into(), &["test.yaml", "line 1"]),
        ("smtp:\n\tlisten: x\n".into(), &["test.yaml", "line 2"]),
        ("smtp: [unclosed\n".into(), &["test.yaml", "line"]),
        (format!("{0}{0}", smtp("")), &["test.yaml", "smtp"]),
        (format!("{}---\n{}", smtp(""), smtp("")), &["test.yaml"]),
        ("just words\n".into(), &["test.yaml", "just words"]),
        ("- a\n- b\n".into(), &["test.yaml", "list"]),
        ("smtp: 5\n".into(), &["smtp", "5"]),
        ("smtp:\n- listen\n".into(), &["smtp", "list"]),
    ];
    let mut bad = Vec::new();
    for (yaml, words) in &mistakes {
        let attempt =
            std::panic::catch_unwind(|| assert_refused(&run(&[], Some(yaml), &[]), words));
        if let Err(why) = attempt {
            let why = why.downcast_ref::<String>().cloned().unwrap_or_default();
            bad.push(format!("{yaml}=> {why}"));
        }
    }
    assert!(bad.is_empty(), "{} of {}:\n{}", bad.len(), mistakes.len(), bad.join("\n"));
}

#[test]
fn a_mistake_in_a_variable_names_the_variable() {
    let good = around("", "");
    for (name, value, remedy) in [
        ("SMTP_DUP_SMTP_MAX_CONNECTIONS", "many", "1 to "),
        ("SMTP_DUP_SMTP_MAX_CONNECTIONS", "-1", "1 to "),
        ("SMTP_DUP_RELAY_TIMEOUT_SECONDS", "", "1 to "),
        ("SMTP_DUP_RELAY_DESTINATION_PRIMARY", "mx.example.com", "mx.example.com:25"),
        (
            "SMTP_DUP_RELAY_DESTINATION_BACKUPS",
            "a.example.com:25,b.example.com",
            "b.example.com:25",
        ),
        ("SMTP_DUP_SMTP_LISTEN", "nowhere", "127.0.0.1:2525"),
        ("SMTP_DUP_SMTP_ALLOWED_CLIENTS", "127.0.0.0/8,all", "192.0.2.0/24"),
        ("SMTP_DUP_LOG_LEVEL", "loud", "debug"),
    ] {
        let output = run(&[], Some(&good), &[(name, value)]);
        // Of a list it names the item that is wrong, the last here.
        let item = value.rsplit(',').next().unwrap();
        assert_refused(&output, &[name, item, remedy]);
    }
}

#[test]
fn no_configuration_at_all() {
    if !nothing_is_installed() {
        return;
    }
    let words = ["relay.destination_primary", "SMTP_DUP_RELAY_DESTINATION_PRIMARY"];
    assert_refused(&run(&[], None, &[]), &words);
    assert_refused(&run(&[], None, &[("SMTP_DUP_SMTP_DOMAIN", "x.example")]), &words);
    assert_refused(&run(&["check"], None, &[]), &words);
}

#[test]
fn a_file_that_cannot_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    std::fs::write(path("latin1"), b"smtp:\n  domain: \"\xfc\"\n").unwrap();
    std::fs::write(path("secret"), "").unwrap();
    for (name, word) in [("missing", "No such file"), ("", "directory"), ("latin1", "UTF-8")] {
        let path = path(name);
        assert_refused(&run(&["--config", &path], None, &[]), &[&path, word, "--config"]);
        assert_refused(&run(&["--config", &path, "check"], None, &[]), &[&path]);
    }
    // One that is found must not be passed over either.
    let output = Command::new(binary())
        .current_dir({
            std::fs::create_dir(path("config.yaml")).unwrap();
            folder.path()
        })
        .env("SMTP_DUP_RELAY_DESTINATION_PRIMARY", "")
        .output()
        .unwrap();
    assert_refused(&output, &["config.yaml", "directory"]);
    // Root may read everything.
    use std::os::unix::fs::PermissionsExt;
    let secret = path("secret");
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o0)).unwrap();
    if std::fs::File::open(&secret).is_err() {
        assert_refused(&run(&["--config", &secret], None, &[]), &[&secret, "denied"]);
    }
}

#[test]
fn an_address_in_use_is_named() {
    let primary = Sink::start();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let yaml = config(primary.addr(), &[], &format!("listen: \"{address}\""), "");
    let output = run(&[], Some(&yaml), &[]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{stderr}");
    let lines: Vec<_> = stderr.lines().filter(|line| line.contains("error: ")).collect();
    assert_eq!(lines.len(), 1, "{stderr}");
    assert!(lines[0].contains(&address.to_string()), "{stderr}");
    assert!(!stderr.contains("starting"), "{stderr}");
}

#[test]
fn an_address_of_another_machine_is_named() {
    let primary = Sink::start();
    // TEST-NET-1 (RFC 5737).
    let yaml = config(primary.addr(), &[], "listen: [\"127.0.0.1:0\", \"192.0.2.1:2525\"]", "");
    let output = run(&[], Some(&yaml), &[]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{stderr}");
    assert!(stderr.contains("error: ") && stderr.contains("192.0.2.1:2525"), "{stderr}");
}

// The command line.

#[test]
fn mistakes_on_the_command_line() {
    for (args, word) in [
        (&["--colour"][..], "--colour"),
        (&["--config"], "--config"),
        (&["chek"], "chek"),
        (&["-x"], "-x"),
        (&["--config", "/dev/null", "extra"], "extra"),
        (&["check", "extra"], "extra"),
    ] {
        let output = run(args, None, &[]);
        assert_refused(&output, &[word, "--help"]);
    }
}

#[test]
fn version_and_help() {
    let output = run(&["--version"], None, &[]);
    assert!(output.status.success());
    let version = format!("smtp-dup {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!(String::from_utf8_lossy(&output.stdout), version);
    assert!(output.stderr.is_empty());

    let output = run(&["--help"], None, &[]);
    let help = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success());
    assert!(output.stderr.is_empty());
    for word in ["--config", "--version", "--help", "check"] {
        assert!(help.contains(word), "no {word} in {help}");
    }
    let output = run(&["check", "--help"], None, &[]);
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("smtp-dup check"));

    // Neither needs a configuration, a broken one in the environment included.
    assert!(run(&["--version"], None, &[("SMTP_DUP_SMTP_LISTEN", "x")]).status.success());
}

#[test]
fn check_says_what_it_found() {
    let (primary, backup) = (Sink::start(), Sink::start());
    primary.set_ehlo(&["PIPELINING", "8BITMIME", "SIZE 54321"]);
    let dead = Sink::refusing(SinkOptions::default());
    let yaml = config(primary.addr(), &[backup.addr(), dead.addr()], "", "");
    let output = run(&["check"], Some(&yaml), &[]);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    for word in
        ["primary", "backup", "sink.example ESMTP", "PIPELINING", "8BITMIME", "SIZE 54321", "DSN"]
    {
        assert!(stdout.contains(word), "no {word} in {stdout}");
    }
    for sink in [&primary, &backup, &dead] {
        assert!(stdout.contains(&sink.addr().to_string()), "{stdout}");
    }
    let line = stdout.lines().find(|line| line.contains(&dead.addr().to_string())).unwrap();
    assert!(line.contains("refused"), "{line}");
    // It leaves politely and sends nothing.
    primary.wait_for("QUIT", |primary| primary.count("QUIT") == 1);
    assert_eq!(primary.count("MAIL") + backup.count("MAIL"), 0);
}

/// Strangers are let in, and the primary takes them for this host.
#[test]
fn check_warns_of_an_open_relay() {
    let open = Sink::start();
    let shut = Sink::replying(|event| match event {
        Event::Rcpt(_) => Action::reply("554 5.7.1 relay access denied"),
        _ => Action::Default,
    });
    let no_null_sender = Sink::replying(|event| match event {
        Event::Mail(_) => Action::reply("550 5.7.1 no"),
        _ => Action::Default,
    });
    let check = |primary: &Sink, network: &str| {
        let allowed = format!("allowed_clients: [\"127.0.0.0/8\", \"{network}\"]");
        let output = run(&["check"], Some(&config(primary.addr(), &[], &allowed, "")), &[]);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    for network in ["0.0.0.0/0", "::/0", "128.0.0.0/1", "2000::/3", "192.0.0.0/7", "2001::/31"] {
        let said = check(&open, network);
        for word in ["smtp.allowed_clients", network, "OPEN RELAY", "250 2.1.5", ".invalid"] {
            assert!(said.contains(word), "{network}: no {word} in {said}");
        }
    }
    for (primary, reply) in [(&shut, "554 5.7.1 relay"), (&no_null_sender, "550 5.7.1 no")] {
        let said = check(primary, "0.0.0.0/0");
        assert!(said.contains("smtp.allowed_clients: warning") && said.contains(reply), "{said}");
        assert!(!said.contains("OPEN RELAY"), "{said}");
    }
    // It takes back what it has begun, and leaves politely.
    for sink in [&open, &shut, &no_null_sender] {
        sink.wait_for("QUIT", |sink| sink.count("QUIT") == sink.connections());
        assert_eq!((sink.count("RSET"), sink.count("DATA")), (sink.connections(), 0));
    }
    // Networks that somebody has are nobody's business.
    let asked = open.count("MAIL");
    for network in ["10.0.0.0/8", "192.0.2.1/32", "2001:db8::/32", "fc00::/7", "fe80::/10"] {
        let said = check(&open, network);
        assert!(!said.contains("allowed_clients"), "{network}: {said}");
    }
    assert_eq!(open.count("MAIL"), asked);
}

#[test]
fn check_fails_with_the_primary() {
    let backup = Sink::start();
    let dead = Sink::refusing(SinkOptions::default());
    let closing = Sink::replying(|_| Action::Close);
    let rejecting = Sink::replying(|event| match event {
        Event::Connect(_) => Action::reply("554 5.7.1 go away"),
        _ => Action::Default,
    });
    let silent = Sink::replying(|_| Action::Silence);
    for (primary, word) in [
        (&dead, "refused"),
        (&closing, "lost"),
        (&rejecting, "554 5.7.1 go away"),
        (&silent, "timed out"),
    ] {
        let limits = "timeout_seconds: 1\ncommand_timeout_seconds: 1";
        let yaml = config(primary.addr(), &[backup.addr()], "", limits);
        let output = run(&["check"], Some(&yaml), &[]);
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let line = stdout.lines().find(|line| line.contains(&primary.addr().to_string()));
        assert!(line.is_some_and(|line| line.contains(word)), "{stdout}");
        // The others are looked at all the same.
        assert!(stdout.contains("sink.example ESMTP"), "{stdout}");
    }
}

#[test]
fn check_needs_a_configuration_without_mistakes() {
    assert_refused(&run(&["check"], Some(""), &[]), &["relay.destination_primary"]);
    assert_refused(&run(&["check"], Some("smtp:\n  listne: x\n"), &[]), &["smtp.listne"]);
}

#[test]
fn check_does_not_need_the_address_that_the_daemon_holds() {
    let primary = Sink::start();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = format!("listen: \"{}\"", taken.local_addr().unwrap());
    let output = run(&["check"], Some(&config(primary.addr(), &[], &listen, "")), &[]);
    assert!(output.status.success(), "{output:?}");
}

// The log's level.

#[test]
fn the_log_level() {
    let primary = Sink::start();
    let at = |level: &str, variables: &[(&str, &str)]| {
        let yaml = config(primary.addr(), &[], "", "");
        let dup = start_with_both(&format!("{yaml}log:\n  level: {level}\n"), variables);
        deliver(&mut Client::ready(dup.addr()));
        dup.signal(Signal::Term);
        assert!(dup.wait_exit(BOUND).success());
        dup
    };
    assert!(at("info", &[]).log_lines(" debug: ").is_empty());
    assert!(!at("debug", &[]).log_lines(" debug: ").is_empty());
    assert!(!at("info", &[("SMTP_DUP_LOG_LEVEL", "debug")]).log_lines(" debug: ").is_empty());
    // RUST_LOG is for the one who looks for something just now.
    assert!(!at("error", &[("RUST_LOG", "debug")]).log_lines(" debug: ").is_empty());
    assert!(at("debug", &[("RUST_LOG", "info")]).log_lines(" debug: ").is_empty());
    assert!(!at("error", &[("RUST_LOG", "smtp_dup=info")]).log_lines("status=sent").is_empty());
}

#[test]
fn a_quiet_log_has_the_errors_only() {
    let primary = Sink::refusing(SinkOptions::default());
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = format!("listen: \"{}\"", taken.local_addr().unwrap());
    let yaml = config(primary.addr(), &[], &listen, "");
    // Where the port is taken it ends at once, which shows all that it says at this level.
    let output = run(
        &[],
        Some(&format!("{yaml}log:\n  level: error\n")),
        &[("SMTP_DUP_PORT", "a warning at another level")],
    );
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains(" error: "), "{stderr}");
}

/// The small program, which has no TLS, takes no key for something that it would not do.
#[test]
fn a_program_without_tls_refuses_what_asks_for_it() {
    let server = Sink::start();
    let with = |smtp: &str, keys: &str| {
        let yaml = format!(
            "smtp:\n  listen: 127.0.0.1:0\n{smtp}relay:\n  destination_primary:\n    address: \"{}\"\n{keys}",
            server.addr()
        );
        run(&["check"], Some(&yaml), &[])
    };
    let asked = with("", "    tls: opportunistic\n");
    if asked.status.success() {
        return eprintln!("skipped: this program has TLS");
    }
    for (key, value) in [
        ("tls", "opportunistic"),
        ("tls", "required"),
        ("ca_file", "/etc/ca.pem"),
        ("fingerprint", "ab"),
        ("server_name", "a.example"),
        ("username", "u"),
        ("password_file", "/etc/secret"),
        ("allow_plaintext_auth", "true"),
    ] {
        assert_refused(&with("", &format!("    {key}: {value}\n")), &[key, "built without TLS"]);
    }
    for key in ["tls_certificate", "tls_key"] {
        let output = with(&format!("  {key}: /etc/file.pem\n"), "");
        assert_refused(&output, &["smtp.", key, "built without TLS"]);
    }
    assert!(with("", "    tls: none\n").status.success());
}
