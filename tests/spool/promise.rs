//! Promise 3: no copy is lost. The rest of this program is its small print.

use crate::common::*;
use crate::*;

/// What a client can send that has to survive on disk: path and parameters of MAIL, those of each
/// RCPT, and the body in wire form.
fn mails() -> Vec<(&'static str, Vec<&'static str>, Vec<u8>)> {
    let octets: Vec<u8> = (0..=255).filter(|octet| !b"\r\n".contains(octet)).collect();
    let eight_bit = [b"Subject: 8 bit\r\n\r\n..dot\r\n\xff\xfe\r\n", &octets[..], b"\r\n"].concat();
    let mut big = mail_body(700_000);
    big.extend_from_slice(&eight_bit);
    let mut spilled = mail_body(256 * 1024);
    spilled.extend_from_slice(b"a few octets over the size that is kept in memory\r\n");
    vec![
        ("<a@example.com>", vec!["<b@example.com>"], numbered(1)),
        // A bounce, to several of whom the primary wants some.
        ("<>", vec!["<b@example.com>", "<no@example.com>", "<c@example.com>"], numbered(2)),
        ("<a@example.com> BODY=8BITMIME", vec!["<b@example.com>"], eight_bit),
        ("<a@example.com> SIZE=700100", vec!["<later@example.com>", "<d@example.com>"], big),
        (
            "<\"a b\"@EXAMPLE.com> SMTPUTF8 RET=HDRS ENVID=QQ314159",
            vec![
                "<dürst@例え.example> ORCPT=utf-8;d@example.com NOTIFY=DELAY",
                "<b+c@[192.0.2.1]>",
                "<@hop.example:\"x>y\"@example.com>",
                "<no@example.com>",
            ],
            spilled,
        ),
        ("<a@example.com>", vec!["postmaster"], Vec::new()),
        ("<a@example.com>", vec!["<b@example.com>"], b"..\r\n..\r\n".to_vec()),
    ]
}

/// The line as a backup is to get it: nobody is to be notified of a copy.
fn copied(line: &str) -> String {
    let (path, parameters) = line
        .split_once("> ")
        .map_or((line, ""), |(path, parameters)| (&line[..path.len() + 1], parameters));
    let original = parameters.split(' ').find(|parameter| parameter.starts_with("ORCPT="));
    let original = original.map_or(String::new(), |original| format!(" {original}"));
    format!("RCPT TO:{path} NOTIFY=NEVER{original}")
}

#[test]
fn promise_3_no_copy_is_lost() {
    let folder = Folder::new();
    let primary = Sink::replying(|event| match event {
        Event::Rcpt(line) if line.contains("<no@") => Action::reply("550 5.1.1 unknown user"),
        Event::Rcpt(line) if line.contains("<later@") => Action::reply("450 4.2.1 later"),
        _ => Action::Default,
    });
    let backups = [(); 3].map(|()| Sink::refusing(SinkOptions::default()));
    let mut expected = Vec::new();
    let dup = folder.start(&primary, &backups.each_ref());
    let mut client = Client::ready(dup.addr());
    for (mail, rcpts, body) in mails() {
        client.expect(&format!("MAIL FROM:{mail}"), 250);
        let mut accepted = Vec::new();
        for rcpt in rcpts {
            if client.cmd(&format!("RCPT TO:{rcpt}")).code == 250 {
                accepted.push(copied(rcpt));
            }
        }
        client.expect("DATA", 354);
        assert_eq!(client.body(&body).code, 250, "{mail}");
        expected.push((format!("MAIL FROM:{mail}"), accepted, body));
    }
    kill(dup);
    assert_eq!(ids(&folder.files("queue")).len(), expected.len());
    assert!(backups.iter().all(|backup| backup.connections() == 0));

    backups.iter().for_each(Sink::reopen);
    let dup = folder.start(&primary, &backups.each_ref());
    for backup in &backups {
        backup.wait_for("all copies", |backup| backup.messages().len() >= expected.len());
    }
    folder.wait_empty();
    end(&dup);
    expected.sort();
    for backup in &backups {
        let mut got: Vec<_> = backup
            .attempts()
            .into_iter()
            .map(|message| (message.mail, message.rcpts, message.data))
            .collect();
        got.sort();
        assert_eq!(got.len(), expected.len());
        for (got, expected) in got.iter().zip(&expected) {
            assert_eq!((&got.0, &got.1), (&expected.0, &expected.1));
            assert!(got.2 == expected.2, "{}: {} octets", got.0, got.2.len());
        }
        assert!(backup.broken().is_empty());
    }
    folder.assert_clean();
    assert_eq!(folder.files("failed"), [""; 0]);
}

/// Kills while mail flows, a few times in a row: what was heard is there at the end.
#[test]
fn killed_again_and_again_under_load() {
    let folder = Folder::new();
    let primary = Sink::start();
    let backups = [Sink::start(), Sink::start()];
    let mut heard = Vec::new();
    for round in 0..5 {
        let dup = folder.start(&primary, &backups.each_ref());
        let senders: Vec<_> = (0..4)
            .map(|sender| {
                let addr = dup.addr();
                std::thread::spawn(move || {
                    let first = (round * 4 + sender) * 1000;
                    let accepted = |number: &usize| {
                        crash::try_message(addr, &[TO], &numbered(*number))
                            .is_some_and(|c| c == 250)
                    };
                    (first..first + 1000).take_while(accepted).collect::<Vec<_>>()
                })
            })
            .collect();
        let goal = primary.messages().len() + 40;
        primary.wait_for("some mail", |primary| primary.messages().len() >= goal);
        kill(dup);
        heard.extend(senders.into_iter().flat_map(|sender| sender.join().unwrap()));
    }
    let dup = folder.start(&primary, &backups.each_ref());
    folder.wait_empty();
    end(&dup);
    let offered = bodies(&primary.messages());
    for backup in &backups {
        let got = bodies(&backup.messages());
        let lost: Vec<_> =
            heard.iter().filter(|number| got.binary_search(&numbered(**number)).is_err()).collect();
        assert!(lost.is_empty(), "of {} that were heard, lost: {lost:?}", heard.len());
        assert!(got.iter().all(|body| offered.binary_search(body).is_ok()));
        let mut once = got.clone();
        once.dedup();
        // Four deliveries were open at most when each process died.
        assert!(got.len() - once.len() <= 5 * 4, "{} came twice", got.len() - once.len());
    }
    assert!(heard.len() >= 5 * 40 - 5 * 4, "{}", heard.len());
}
