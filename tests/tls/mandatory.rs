//! A server that takes no mail over a connection like ours: 530 asks for STARTTLS (RFC 3207 §4) or
//! for AUTH (RFC 4954 §6). That is a matter of our configuration, and no mail may bounce of it.

use crate::common::*;
use crate::{BODY, config, deliver};

const WANTED: &str = "530 5.7.0 Must issue a STARTTLS command first";

fn demanding() -> Sink {
    Sink::replying(|event| match event {
        Event::Mail(_) | Event::Rcpt(_) | Event::Data => Action::reply(WANTED),
        _ => Action::Default,
    })
}

#[test]
fn a_primary_that_wants_more_defers_the_mail() {
    let primary = demanding();
    let dup = Dup::start(&config(&format!("\"{}\"", primary.addr()), &[], "", ""));
    let mut client = Client::ready(dup.addr());
    let reply = client.expect("MAIL FROM:<a@example.com>", 451);
    let name = format!("primary {}: MAIL: {WANTED}; ", primary.addr());
    assert!(reply.text().starts_with("4.7.0 ") && reply.text().contains(&name), "{reply:?}");
    assert!(reply.text().ends_with("see tls and username"), "{reply:?}");
    dup.wait_log(&name);
    client.expect("RSET", 250);
    client.send("MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n");
    (0..3).for_each(|_| _ = client.expect_reply(451));

    // Mail flows in the same session, once the server is content.
    client.expect("RSET", 250);
    primary.set_reply(|_| Action::Default);
    deliver(&mut client);
}

#[test]
fn a_backup_that_wants_more_is_held_and_loses_nothing() {
    let (primary, backup) = (Sink::start(), demanding());
    let backups = [format!("\"{}\"", backup.addr())];
    let folder = tempfile::tempdir().unwrap();
    let spool = format!("spool: \"{}\"", folder.path().join("spool").display());
    for spool in ["", spool.as_str()] {
        let before = backup.accepted();
        backup.set_reply(|event| match event {
            Event::Mail(_) => Action::reply(WANTED),
            _ => Action::Default,
        });
        let dup = Dup::start(&config(&format!("\"{}\"", primary.addr()), &backups, "", spool));
        deliver(&mut Client::ready(dup.addr()));
        let line = dup.wait_log("role=backup is down: ");
        assert!(line.contains(&format!("MAIL: {WANTED}; see tls and username")), "{line}");
        backup.set_reply(|_| Action::Default);
        assert_eq!(backup.wait(before + 1)[before].data, BODY);
    }
}
