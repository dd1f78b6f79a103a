//! What a client may say, and what it hears.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use crate::common::{Action, BOUND, Client, Event, Sink, mail_body};
use crate::{BODY, deliver, dup_with, relay};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn several_addresses_of_both_families() {
    let primary = Sink::start();
    let dup = dup_with(&primary, "listen: [\"127.0.0.1:0\", \"[::1]:0\", \"127.0.0.2:0\"]", "");
    assert_eq!(dup.addrs().len(), 3);
    assert!(dup.addrs()[1].is_ipv6());
    for addr in dup.addrs() {
        deliver(&mut Client::ready(*addr));
    }
    assert_eq!(primary.messages().len(), 3);
}

#[test]
fn one_client_too_many_waits_for_a_worker() {
    let primary = Sink::start();
    let dup = dup_with(&primary, "max_connections: 2", "");
    let mut first = Client::greeted(dup.addr());
    let _second = Client::greeted(dup.addr());
    let mut third = Client::connect(dup.addr());
    assert!(third.is_silent(Duration::from_millis(500)), "greeted beyond max_connections");
    first.expect("QUIT", 221);
    third.expect_reply(220);
    third.ehlo();
    deliver(&mut third);
}

#[test]
fn one_client_too_many_hears_421_in_the_end() {
    let primary = Sink::start();
    let dup = dup_with(&primary, "max_connections: 2", "");
    let mut first = Client::greeted(dup.addr());
    let _second = Client::greeted(dup.addr());
    let since = Instant::now();
    let mut third = Client::connect(dup.addr());
    let reply = third.expect_reply(421);
    assert!(reply.text().starts_with("4.3.2 "), "{reply:?}");
    // It waits for 5 s. Less than 4 would be no wait that is worth it.
    assert!(since.elapsed() >= Duration::from_secs(4), "after {:?}", since.elapsed());
    third.closed();
    first.ehlo();
    deliver(&mut first);
}

#[test]
fn only_allowed_clients_get_past_the_greeting() {
    let primary = Sink::start();
    let dup = dup_with(&primary, "allowed_clients: [\"127.0.0.1/32\"]", "");
    let mut stranger = Client::connect_from(ip("127.0.0.2"), dup.addr());
    let reply = stranger.expect_reply(421);
    assert!(
        reply.text().starts_with("4.7.1 ") && reply.text().contains("allowed_clients"),
        "{reply:?}"
    );
    stranger.closed();
    assert_eq!(primary.connections(), 0);
    deliver(&mut Client::ready(dup.addr()));
}

#[test]
fn allowed_networks_of_both_families() {
    let primary = Sink::start();
    let listen = "listen: [\"127.0.0.1:0\", \"[::1]:0\"]\n";
    let dup = dup_with(
        &primary,
        &format!("{listen}allowed_clients: [\"127.0.0.8/29\", \"::1/128\"]"),
        "",
    );
    Client::connect_from(ip("127.0.0.7"), dup.addr()).expect_reply(421);
    Client::connect_from(ip("127.0.0.8"), dup.addr()).expect_reply(220);
    Client::connect_from(ip("127.0.0.15"), dup.addr()).expect_reply(220);
    Client::connect_from(ip("127.0.0.16"), dup.addr()).expect_reply(421);
    Client::greeted(dup.addrs()[1]);
    let dup = dup_with(&primary, &format!("{listen}allowed_clients: [\"127.0.0.0/8\"]"), "");
    Client::connect(dup.addrs()[1]).expect_reply(421);
}

#[test]
fn an_ipv4_client_of_an_ipv6_listener_is_known_by_its_ipv4_address() {
    let primary = Sink::start();
    let dup = dup_with(&primary, "listen: \"[::]:0\"\nallowed_clients: [\"127.0.0.1/32\"]", "");
    let addr = SocketAddr::new(ip("127.0.0.1"), dup.addr().port());
    Client::connect_from(ip("127.0.0.2"), addr).expect_reply(421);
    deliver(&mut Client::ready(addr));
    let line = dup.wait_log(" from=<");
    assert!(line.contains(": client=127.0.0.1:"), "{line}");
}

/// Whoever copies from a log of IPv6 means IPv4 all the same.
#[test]
fn a_network_of_ipv4_may_stand_in_the_words_of_ipv6() {
    let primary = Sink::start();
    for (listen, allowed) in
        [("127.0.0.1:0", "::ffff:127.0.0.8/125"), ("[::]:0", "::ffff:7f00:8/125")]
    {
        let allowed = format!("allowed_clients: [\"{allowed}\", \"::ffff:127.0.0.3\"]");
        let dup = dup_with(&primary, &format!("listen: \"{listen}\"\n{allowed}"), "");
        let addr = SocketAddr::new(ip("127.0.0.1"), dup.addr().port());
        for (from, code) in
            [("127.0.0.3", 220), ("127.0.0.7", 421), ("127.0.0.8", 220), ("127.0.0.16", 421)]
        {
            Client::connect_from(ip(from), addr).expect_reply(code);
        }
    }
}

#[test]
fn without_a_setting_only_this_machine_is_allowed() {
    // An address of this machine that is not the loopback's; none, no test.
    let probe = UdpSocket::bind("0.0.0.0:0").unwrap();
    let Some(own) = probe.connect("192.0.2.1:9").and_then(|()| probe.local_addr()).ok() else {
        return eprintln!("skipped: no route");
    };
    if own.ip().is_loopback() || own.ip().is_unspecified() {
        return eprintln!("skipped: no address but the loopback's");
    }
    let primary = Sink::start();
    let dup = dup_with(&primary, "listen: \"0.0.0.0:0\"", "");
    let port = dup.addr().port();
    Client::connect(SocketAddr::new(own.ip(), port)).expect_reply(421);
    Client::greeted(SocketAddr::new(ip("127.0.0.1"), port));
    Client::connect_from(ip("127.9.9.9"), SocketAddr::new(ip("127.0.0.1"), port)).expect_reply(220);
}

/// Sends these as MAIL and RCPT; the primary has to see `seen`.
#[track_caller]
fn envelope_arrives(mail: &str, rcpt: &str, seen: [&str; 2]) {
    let (primary, dup) = relay();
    let mut client = Client::ready(dup.addr());
    client.expect(mail, 250);
    client.expect(rcpt, 250);
    client.expect("DATA", 354);
    assert_eq!(client.body(BODY).code, 250);
    let message = primary.wait(1).remove(0);
    assert_eq!([message.mail.as_str(), message.rcpts[0].as_str()], seen);
    assert_eq!(message.data, BODY);
}

#[test]
fn the_null_reverse_path() {
    envelope_arrives(
        "MAIL FROM:<>",
        "RCPT TO:<b@example.com>",
        ["MAIL FROM:<>", "RCPT TO:<b@example.com>"],
    );
    let mail = "MAIL FROM:<> SIZE=1234 BODY=8BITMIME";
    envelope_arrives(mail, "RCPT TO:<b@example.com>", [mail, "RCPT TO:<b@example.com>"]);
}

#[test]
fn parameters_pass_untouched() {
    let mail = "MAIL FROM:<a@example.com> SIZE=1000 body=8BitMime SMTPUTF8 RET=HDRS ENVID=QQ+2B=x";
    let rcpt = "RCPT TO:<b@example.com> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;B+2Bx@example.com";
    envelope_arrives(mail, rcpt, [mail, rcpt]);
    let mail = "MAIL FROM:<a@example.com> X-UNKNOWN=1";
    let rcpt = "RCPT TO:<b@example.com> X-FLAG";
    envelope_arrives(mail, rcpt, [mail, rcpt]);
}

#[test]
fn addresses_pass_as_they_are() {
    for path in [
        r#"<"a b"@example.com>"#,
        r#"<"a>b"@example.com>"#,
        r#"<"a\"> b"@example.com>"#,
        r#"<"a\\"@example.com>"#,
        r#"<" "@example.com>"#,
        "<@relay.example:b@example.com>",
        "<b@[192.0.2.1]>",
        "<b@[IPv6:2001:db8::1]>",
        "<postmaster>",
        "<no-domain>",
        "<a..b.@-example-.com>",
        "<B+tag=x!#$%&'*/?^_`{|}~@EXAMPLE.com>",
        "<grå@exämple.com>",
        "<b@example.com.>",
    ] {
        let (mail, rcpt) = (format!("MAIL FROM:{path}"), format!("RCPT TO:{path}"));
        envelope_arrives(&mail, &rcpt, [&mail, &rcpt]);
        let (mail, rcpt) =
            (format!("MAIL FROM:{path} SIZE=100"), format!("RCPT TO:{path} NOTIFY=NEVER"));
        envelope_arrives(&mail, &rcpt, [&mail, &rcpt]);
    }
}

#[test]
fn blanks_before_a_path() {
    let seen = ["MAIL FROM:<a@example.com>", "RCPT TO:<b@example.com>"];
    envelope_arrives("MAIL FROM: <a@example.com>", "RCPT TO: <b@example.com>", seen);
    envelope_arrives("MAIL FROM:  <a@example.com>", "RCPT TO:\t<b@example.com>", seen);
    let seen = ["MAIL FROM:<> SIZE=9", "RCPT TO:<b@example.com>"];
    envelope_arrives("MAIL FROM: <> SIZE=9", "RCPT TO: <b@example.com>", seen);
}

#[test]
fn commands_ended_by_lf_alone() {
    let (primary, dup) = relay();
    let mut client = Client::greeted(dup.addr());
    for (command, code) in [
        ("NOOP", 250),
        ("EHLO client.example", 250),
        ("MAIL FROM:<a@example.com>", 250),
        ("RCPT TO:<b@example.com>", 250),
        ("DATA", 354),
    ] {
        client.send(format!("{command}\n"));
        client.expect_reply(code);
    }
    assert_eq!(client.body(BODY).code, 250);
    client.send("QUIT\n");
    client.expect_reply(221);
    client.closed();
    assert_eq!(primary.wait(1)[0].data, BODY);
}

#[test]
fn commands_in_any_case() {
    let (primary, dup) = relay();
    let mut client = Client::greeted(dup.addr());
    client.expect("ehlo client.example", 250);
    client.expect("rSeT", 250);
    client.expect("nOOp", 250);
    client.expect("vrfy x", 252);
    client.expect("heLp", 214);
    client.expect("Mail From:<a@example.com>", 250);
    client.expect("rcpt tO:<b@example.com>", 250);
    client.expect("data", 354);
    assert_eq!(client.body(BODY).code, 250);
    client.expect("quit", 221);
    client.closed();
    assert_eq!(primary.messages().len(), 1);
}

#[test]
fn trailing_blanks() {
    let (primary, dup) = relay();
    let mut client = Client::greeted(dup.addr());
    client.expect("EHLO client.example ", 250);
    client.expect("NOOP  ", 250);
    client.expect("RSET \t ", 250);
    client.expect("HELP ", 214);
    client.expect("MAIL FROM:<a@example.com>   ", 250);
    client.expect("RCPT TO:<b@example.com> \t", 250);
    client.expect("DATA ", 354);
    assert_eq!(client.body(BODY).code, 250);
    client.expect("QUIT  ", 221);
    client.closed();
    let message = primary.wait(1).remove(0);
    assert_eq!(message.mail, "MAIL FROM:<a@example.com>");
    assert_eq!(message.rcpts, ["RCPT TO:<b@example.com>"]);
}

#[test]
fn noop_and_rset_with_arguments() {
    let (primary, dup) = relay();
    let mut client = Client::ready(dup.addr());
    client.expect("NOOP with some words", 250);
    client.expect("MAIL FROM:<a@example.com>", 250);
    client.expect("NOOP x", 250);
    client.expect("RSET x y", 250);
    client.expect("RCPT TO:<b@example.com>", 503);
    deliver(&mut client);
    assert_eq!(primary.messages().len(), 1);
}

#[test]
fn vrfy_help_and_expn_anywhere() {
    let (primary, dup) = relay();
    let mut client = Client::greeted(dup.addr());
    let ask = |client: &mut Client| {
        client.expect("VRFY b@example.com", 252);
        client.expect("HELP", 214);
        client.expect("HELP MAIL", 214);
        client.expect("EXPN list", 502);
    };
    ask(&mut client);
    client.ehlo();
    ask(&mut client);
    client.expect("MAIL FROM:<a@example.com>", 250);
    ask(&mut client);
    client.expect("RCPT TO:<b@example.com>", 250);
    ask(&mut client);
    client.expect("RCPT TO:<c@example.com>", 250);
    client.expect("DATA", 354);
    assert_eq!(client.body(BODY).code, 250);
    ask(&mut client);
    assert_eq!(primary.wait(1)[0].rcpts.len(), 2);
}

#[test]
fn helo() {
    let (primary, dup) = relay();
    let mut client = Client::greeted(dup.addr());
    let reply = client.expect("HELO client.example", 250);
    assert_eq!(reply.lines.len(), 1, "{reply:?}");
    deliver(&mut client);
    assert_eq!(primary.wait(1)[0].data, BODY);
}

#[test]
fn many_messages_in_one_connection() {
    let (primary, dup) = relay();
    let mut client = Client::ready(dup.addr());
    for number in 0..100 {
        let body = format!("Subject: {number}\r\n\r\nHello\r\n");
        let from = format!("a{number}@example.com");
        assert_eq!(client.message(&from, &["b@example.com"], body.as_bytes()).code, 250);
    }
    for (number, message) in primary.wait(100).iter().enumerate() {
        assert_eq!(message.mail, format!("MAIL FROM:<a{number}@example.com>"));
        assert_eq!(message.data, format!("Subject: {number}\r\n\r\nHello\r\n").as_bytes());
    }
}

#[test]
fn rset_anywhere() {
    let (primary, dup) = relay();
    let mut client = Client::greeted(dup.addr());
    client.expect("RSET", 250);
    client.ehlo();
    client.expect("RSET", 250);
    client.expect("MAIL FROM:<a@example.com>", 250);
    client.expect("RSET", 250);
    client.expect("MAIL FROM:<a@example.com>", 250);
    client.expect("RCPT TO:<dropped@example.com>", 250);
    client.expect("RSET", 250);
    client.expect("RSET", 250);
    deliver(&mut client);
    client.expect("RSET", 250);
    deliver(&mut client);
    // EHLO in mid-session is a RSET too (RFC 5321 §4.1.4).
    client.expect("MAIL FROM:<a@example.com>", 250);
    client.expect("RCPT TO:<dropped@example.com>", 250);
    client.ehlo();
    deliver(&mut client);
    for message in primary.wait(3) {
        assert_eq!(message.rcpts, ["RCPT TO:<b@example.com>"]);
    }
}

/// Two messages and everything around them.
fn session() -> Vec<u8> {
    let mut octets = b"EHLO client.example\r\nNOOP\r\n".to_vec();
    for number in 1..=2 {
        octets.extend_from_slice(b"MAIL FROM:<a@example.com>\r\n");
        octets.extend_from_slice(b"RCPT TO:<b@example.com>\r\nRCPT TO:<c@example.com>\r\nDATA\r\n");
        octets.extend_from_slice(format!("Subject: {number}\r\n\r\n..x\r\n\r\n.\r\n").as_bytes());
    }
    octets.extend_from_slice(b"RSET\r\nVRFY x\r\nQUIT\r\n");
    octets
}

#[track_caller]
fn hear_session(client: &mut Client, primary: &Sink) {
    for code in [220, 250, 250, 250, 250, 250, 354, 250, 250, 250, 250, 354, 250, 250, 252, 221] {
        client.expect_reply(code);
    }
    client.closed();
    for (message, number) in primary.wait(2).iter().zip(1..) {
        assert_eq!(message.data, format!("Subject: {number}\r\n\r\n..x\r\n\r\n").as_bytes());
        assert_eq!(message.rcpts.len(), 2);
    }
}

#[test]
fn the_whole_session_in_one_segment() {
    for ehlo in [vec!["PIPELINING"], vec![]] {
        let (primary, dup) = relay();
        primary.set_ehlo(&ehlo);
        let mut client = Client::connect(dup.addr());
        client.send(session());
        hear_session(&mut client, &primary);
    }
}

#[test]
fn one_octet_a_segment() {
    let (primary, dup) = relay();
    let mut client = Client::connect(dup.addr());
    client.send_slowly(session());
    hear_session(&mut client, &primary);
}

#[test]
fn the_replies_to_a_batch_come_in_one_write() {
    // The primary takes its time over one recipient; the replies are still one segment.
    let primary = Sink::replying(|event| match event {
        Event::Rcpt(line) if line.contains("slow") => {
            Action::after(Duration::from_millis(100), Action::Default)
        }
        _ => Action::Default,
    });
    let dup = dup_with(&primary, "", "");
    let mut client = Client::ready(dup.addr());
    client.send(
        "MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nRCPT TO:<slow@example.com>\r\n\
         RCPT TO:<d@example.com>\r\nDATA\r\n",
    );
    let octets = client.read_once();
    let replies = "250 2.1.0 sender ok\r\n250 2.1.5 recipient ok\r\n250 2.1.5 recipient ok\r\n\
                   250 2.1.5 recipient ok\r\n354 go on\r\n";
    assert_eq!(String::from_utf8_lossy(&octets), replies);
    assert_eq!(client.body(BODY).code, 250);
    // So are those to commands that are ours to answer.
    client.send("NOOP\r\nRSET\r\nVRFY x\r\n");
    let octets = client.read_once();
    assert_eq!(octets.iter().filter(|&&o| o == b'\n').count(), 3, "{}", octets.escape_ascii());
}

#[test]
fn a_line_that_is_too_long() {
    let (primary, dup) = relay();
    let mut client = Client::ready(dup.addr());
    // 2048 octets with the line end are allowed.
    client.expect(&format!("NOOP {}", "x".repeat(2048 - 7)), 250);
    for length in [2049, 2100, 5000, 70_000, 1_000_000] {
        client.expect(&format!("NOOP {}", "x".repeat(length - 7)), 500);
        client.expect("NOOP", 250);
    }
    client.expect("MAIL FROM:<a@example.com>", 250);
    client.expect(&format!("RCPT TO:<{}@example.com>", "x".repeat(3000)), 500);
    client.expect("RCPT TO:<b@example.com>", 250);
    // In a batch too: only that line is lost.
    client.send(format!(
        "RCPT TO:<c@example.com>\r\nRCPT TO:<{}@example.com>\r\nRCPT TO:<d@example.com>\r\nDATA\r\n",
        "x".repeat(100_000)
    ));
    for code in [250, 500, 250, 354] {
        client.expect_reply(code);
    }
    assert_eq!(client.body(BODY).code, 250);
    assert_eq!(primary.wait(1)[0].rcpts.len(), 3);
}

#[test]
fn a_long_line_within_the_limit_reaches_the_primary() {
    let rcpt = format!("RCPT TO:<b@example.com> NOTIFY=NEVER ORCPT=rfc822;{}", "x".repeat(1900));
    envelope_arrives("MAIL FROM:<a@example.com>", &rcpt, ["MAIL FROM:<a@example.com>", &rcpt]);
}

#[test]
fn too_many_recipients() {
    for pipelined in [false, true] {
        let primary = Sink::start();
        let dup = dup_with(&primary, "max_recipients: 3", "");
        let mut client = Client::ready(dup.addr());
        let mut commands = vec!["MAIL FROM:<a@example.com>".to_string()];
        commands.extend((0..5).map(|n| format!("RCPT TO:<b{n}@example.com>")));
        commands.push("DATA".to_string());
        if pipelined {
            client.send(format!("{}\r\n", commands.join("\r\n")));
        }
        for (command, code) in commands.iter().zip([250, 250, 250, 250, 452, 452, 354]) {
            if !pipelined {
                client.send(format!("{command}\r\n"));
            }
            let reply = client.expect_reply(code);
            assert!(code != 452 || reply.text().starts_with("4.5.3 "), "{reply:?}");
        }
        assert_eq!(client.body(BODY).code, 250);
        let message = primary.wait(1).remove(0);
        assert_eq!(message.rcpts.len(), 3);
        assert_eq!(primary.count("RCPT"), 3, "{:?}", primary.commands());
        let lines = dup.wait_logs("because of smtp.max_recipients", 1);
        assert_eq!(lines.len(), 1, "said for each: {lines:?}");
        // The next transaction counts anew.
        assert_eq!(client.message("a@example.com", &["b@example.com"; 3], BODY).code, 250);
    }
}

#[test]
fn recipients_that_the_primary_refuses_take_no_room() {
    let primary = Sink::replying(|event| match event {
        Event::Rcpt(line) if line.contains("bad") => Action::reply("550 5.1.1 unknown"),
        _ => Action::Default,
    });
    let dup = dup_with(&primary, "max_recipients: 2", "");
    let mut client = Client::ready(dup.addr());
    client.expect("MAIL FROM:<a@example.com>", 250);
    for _ in 0..5 {
        client.expect("RCPT TO:<bad@example.com>", 550);
    }
    client.expect("RCPT TO:<b@example.com>", 250);
    client.expect("RCPT TO:<c@example.com>", 250);
    client.expect("RCPT TO:<d@example.com>", 452);
    client.expect("DATA", 354);
    assert_eq!(client.body(BODY).code, 250);
}

#[test]
fn over_size_mail_is_refused_at_size() {
    let primary = Sink::start();
    let dup = dup_with(&primary, "max_message_size: 1000", "");
    let mut client = Client::ready(dup.addr());
    let reply = client.expect("MAIL FROM:<a@example.com> SIZE=1001", 552);
    assert!(reply.text().starts_with("5.3.4 "), "{reply:?}");
    assert_eq!(primary.count("MAIL"), 0, "{:?}", primary.commands());
    client.expect("MAIL FROM:<a@example.com> size=99999999999999999999", 552);
    client.expect("MAIL FROM:<a@example.com> SIZE=1000", 250);
    client.expect("RSET", 250);
    deliver(&mut client);
    assert_eq!(primary.messages().len(), 1);
}

#[test]
fn over_size_mail_is_refused_while_reading() {
    for lines in [1, 100, 1_000_000] {
        let primary = Sink::start();
        let dup = dup_with(&primary, "max_message_size: 1000", "");
        let mut client = Client::ready(dup.addr());
        client.envelope("a@example.com", &["b@example.com"]);
        let mut body = vec![b'x'; 999];
        body.extend_from_slice(&b"123456\r\n".repeat(lines));
        let reply = client.body(&body);
        assert_eq!(reply.code, 552, "{reply:?}");
        assert!(reply.text().starts_with("5.3.4 "), "{reply:?}");
        // The session lives, and the primary has seen no end.
        deliver(&mut client);
        assert_eq!(primary.wait(1)[0].data, BODY);
        assert_eq!(primary.attempts().len(), 1);
    }
}

#[test]
fn mail_of_just_the_allowed_size() {
    let primary = Sink::start();
    let dup = dup_with(&primary, "max_message_size: 1000", "");
    let mut client = Client::ready(dup.addr());
    let mut body = vec![b'x'; 998];
    body.extend_from_slice(b"\r\n");
    assert_eq!(client.message("a@example.com", &["b@example.com"], &body).code, 250);
    assert_eq!(primary.wait(1)[0].data, body);
}

#[test]
fn twenty_errors_in_a_row_are_too_many() {
    let (_primary, dup) = relay();
    let errors =
        ["WHAT", "RCPT TO:<b@example.com>", "MAIL FROM", "DATA", "EHLO", "RSETX", "MAIL <a@b>"];
    let mut client = Client::ready(dup.addr());
    // Any good command makes the count begin anew.
    for _ in 0..3 {
        for n in 0..19 {
            let reply = client.cmd(errors[n % errors.len()]);
            assert!((500..=503).contains(&reply.code), "{n}: {reply:?}");
        }
        client.expect("NOOP", 250);
    }
    for n in 0..19 {
        assert_ne!(client.cmd(errors[n % errors.len()]).code, 421);
    }
    // The twentieth may be answered first.
    let mut last = client.cmd("WHAT");
    if last.code == 500 {
        last = client.reply();
    }
    assert_eq!(last.code, 421, "{last:?}");
    assert!(last.has_enhanced_code(), "{last:?}");
    client.closed();
    deliver(&mut Client::ready(dup.addr()));
}

#[test]
fn the_primarys_refusals_are_no_errors() {
    let primary = Sink::replying(|event| match event {
        Event::Mail(line) if line.contains("bad") => Action::reply("550 5.7.1 no"),
        Event::Rcpt(line) if line.contains("bad") => Action::reply("550 5.1.1 unknown"),
        _ => Action::Default,
    });
    let dup = dup_with(&primary, "", "");
    let mut client = Client::ready(dup.addr());
    for _ in 0..100 {
        client.expect("MAIL FROM:<bad@example.com>", 550);
    }
    client.expect("MAIL FROM:<a@example.com>", 250);
    for _ in 0..100 {
        client.expect("RCPT TO:<bad@example.com>", 550);
    }
    client.expect("RCPT TO:<b@example.com>", 250);
    client.expect("DATA", 354);
    assert_eq!(client.body(BODY).code, 250);
}

#[test]
fn commands_out_of_order() {
    let (primary, dup) = relay();
    let mut client = Client::greeted(dup.addr());
    client.expect("MAIL FROM:<a@example.com>", 503);
    client.ehlo();
    client.expect("RCPT TO:<b@example.com>", 503);
    client.expect("DATA", 503);
    client.expect("MAIL FROM:<a@example.com>", 250);
    client.expect("DATA", 503);
    client.expect("MAIL FROM:<x@example.com>", 503);
    client.expect("RCPT TO:<b@example.com>", 250);
    client.expect("MAIL FROM:<x@example.com>", 503);
    client.expect("DATA", 354);
    assert_eq!(client.body(BODY).code, 250);
    assert_eq!(primary.wait(1)[0].mail, "MAIL FROM:<a@example.com>");
}

#[test]
fn what_is_no_command() {
    let (primary, dup) = relay();
    let mut client = Client::ready(dup.addr());
    client.expect("WHAT", 500);
    client.expect("", 500);
    client.expect("MAIL FROM", 501);
    client.expect("MAIL <a@example.com>", 501);
    client.expect("MAIL FROM:", 501);
    client.expect("MAIL FROM:<a@example.com", 501);
    client.expect("MAIL FROM:<a@example.com>SIZE=1", 501);
    client.expect("EHLO", 501);
    client.expect("HELO", 501);
    client.expect("MAIL FROM:<a\rb@example.com>", 501);
    client.expect("MAIL FROM:<a\0b@example.com>", 501);
    client.expect("DATA now", 501);
    client.send(b"\xff\xfe\r\n");
    client.expect_reply(500);
    deliver(&mut client);
    assert_eq!(primary.count("MAIL"), 1);
}

#[test]
fn what_is_not_offered() {
    let (_primary, dup) = relay();
    let mut client = Client::ready(dup.addr());
    for command in [
        "AUTH PLAIN AGEAYg==",
        "AUTH LOGIN",
        "STARTTLS",
        "BDAT 5 LAST",
        "XFORWARD NAME=x",
        "ETRN x",
    ] {
        client.expect(command, 502);
    }
    deliver(&mut client);
}

/// Runs a shell line with the address in `$HOST` and `$PORT`, within the bound.
fn shell(line: &str, addr: SocketAddr) -> Option<Output> {
    let tool = line.split('|').next_back().unwrap().split_whitespace().next().unwrap();
    let there = Command::new("sh").args(["-c", &format!("command -v {tool}")]).output().unwrap();
    if !there.status.success() {
        eprintln!("skipped: no {tool} on this machine");
        return None;
    }
    let output = Command::new("timeout")
        .args([&BOUND.as_secs().to_string(), "sh", "-c", line])
        .env("HOST", addr.ip().to_string())
        .env("PORT", addr.port().to_string())
        .output()
        .unwrap();
    assert_ne!(output.status.code(), Some(124), "{line} did not end: {output:?}");
    Some(output)
}

#[test]
fn the_health_check_with_printf_and_nc() {
    let (_primary, dup) = relay();
    // As nc -N or -q does it: everything in one segment, then the end of input.
    let mut client = Client::connect(dup.addr());
    client.send("EHLO test\nQUIT\n");
    client.half_close();
    client.expect_reply(220);
    assert!(client.expect_reply(250).offers("PIPELINING"));
    client.expect_reply(221);
    client.closed();
    if let Some(output) = shell(r"printf 'EHLO test\nQUIT\n' | nc $HOST $PORT", dup.addr()) {
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{output:?}");
        assert!(
            text.starts_with("220 ") && text.contains("\r\n250-") && text.contains("\r\n221 "),
            "{text}"
        );
    }
}

#[test]
fn a_client_that_closes_its_half_still_gets_its_replies() {
    let (primary, dup) = relay();
    let mut client = Client::connect(dup.addr());
    let mut octets = session();
    // Not even a QUIT.
    octets.truncate(octets.len() - "RSET\r\nVRFY x\r\nQUIT\r\n".len());
    client.send(octets);
    client.half_close();
    for code in [220, 250, 250, 250, 250, 250, 354, 250, 250, 250, 250, 354, 250] {
        client.expect_reply(code);
    }
    client.closed();
    assert_eq!(primary.messages().len(), 2);
}

#[test]
fn telnet() {
    let (_primary, dup) = relay();
    // telnet ends with its input, so that has to stay open until the answers are there.
    let line = "(echo EHLO test; sleep 0.5; echo QUIT; sleep 1) | telnet $HOST $PORT";
    if let Some(output) = shell(line, dup.addr()) {
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(text.contains("220 dup.example") && text.contains("250-dup.example"), "{output:?}");
        assert!(text.contains("221 "), "{output:?}");
    }
}

#[test]
fn swaks() {
    let (primary, dup) = relay();
    let line = "swaks --server $HOST:$PORT --from a@example.com --to b@example.com,c@example.com --body hello";
    let Some(output) = shell(line, dup.addr()) else { return };
    assert!(output.status.success(), "{output:?}");
    let message = primary.wait(1).remove(0);
    assert_eq!(message.rcpts.len(), 2);
    assert!(message.data.windows(7).any(|w| w == b"hello\r\n"));
    let line = "swaks --pipeline --server $HOST:$PORT --from '<>' --to b@example.com";
    let output = shell(line, dup.addr()).unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(primary.wait(2)[1].mail, "MAIL FROM:<>");
}

#[test]
fn a_client_that_is_silent_for_too_long() {
    let primary = Sink::start();
    let dup = dup_with(&primary, "timeout_seconds: 2", "");
    let since = Instant::now();
    let mut idle = Client::ready(dup.addr());
    let mut in_body = Client::ready(dup.addr());
    in_body.envelope("a@example.com", &["b@example.com"]);
    in_body.send("Subject: half");
    for client in [&mut idle, &mut in_body] {
        let reply = client.expect_reply(421);
        assert!(reply.has_enhanced_code(), "{reply:?}");
        client.closed();
    }
    // The bound of `expect_reply` is far below the five minutes of the default.
    assert!(since.elapsed() >= Duration::from_millis(1900), "after {:?}", since.elapsed());
    primary.wait_for("the broken body", |sink| {
        sink.open_connections() == 0 || !sink.broken().is_empty()
    });
    assert!(primary.attempts().is_empty());
}

#[test]
fn clients_come_and_go_without_a_word() {
    let (primary, dup) = relay();
    for octets in [
        "",
        "EHLO x",
        "EHLO x\r\nMAIL FROM:<a@b>\r\n",
        "EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n",
    ] {
        for _ in 0..5 {
            let mut client = Client::connect(dup.addr());
            client.try_send(octets);
        }
    }
    deliver(&mut Client::ready(dup.addr()));
    assert_eq!(primary.attempts().len(), 1);
    assert!(dup.is_running());
}

#[test]
fn a_hundred_clients_at_once() {
    let (primary, dup) = relay();
    let body = mail_body(20_000);
    std::thread::scope(|scope| {
        for number in 0..100 {
            let (body, addr) = (&body, dup.addr());
            scope.spawn(move || {
                let mut client = Client::ready(addr);
                for _ in 0..3 {
                    let from = format!("a{number}@example.com");
                    assert_eq!(client.pipelined(&from, "b@example.com", body).code, 250);
                }
            });
        }
    });
    let messages = primary.wait(300);
    assert!(messages.iter().all(|message| message.data == body));
    for number in 0..100 {
        let line = format!("MAIL FROM:<a{number}@example.com>");
        assert_eq!(messages.iter().filter(|message| message.mail == line).count(), 3);
    }
}
