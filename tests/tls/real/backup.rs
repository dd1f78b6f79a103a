//! Postfix as backup: each kind of server at once, and a spool for what cannot go there.

use std::fs;
use std::path::Path;

use super::cases::{Case, Cases, Verdict};
use super::farm::Farm;
use crate::common::*;
use crate::instance::can_run;
use crate::{BODY, config};

/// smtp-dup before all these backups, each with the keys that `keys` gives.
#[track_caller]
fn before(
    primary: &Sink,
    (farm, cases): (&Farm, &[&Case]),
    keys: impl Fn(&Case) -> String,
    spool: &Path,
) -> Dup {
    let backups: Vec<_> =
        cases.iter().map(|case| farm.destination(case.name, &keys(case))).collect();
    let relay = format!("spool: \"{}\"", spool.display());
    Dup::start(&config(&format!("\"{}\"", primary.addr()), &backups, "", &relay))
}

/// How many copies are owed.
fn owed(spool: &Path) -> usize {
    let folders = fs::read_dir(spool.join("queue")).unwrap();
    let files = folders.flat_map(|folder| fs::read_dir(folder.unwrap().path()).unwrap());
    files
        .filter(|file| file.as_ref().unwrap().file_name().to_string_lossy().contains(".to."))
        .count()
}

#[test]
fn copies_wait_for_tls_that_is_required() {
    if !can_run(&["postfix", "openssl"]) {
        return;
    }
    let cases = Cases::new();
    let farm = cases.farm();
    // One that dies at its first command is not started again for a minute.
    let all: Vec<_> = cases.all.iter().filter(|case| case.name != "mortal").collect();
    let (good, bad): (Vec<_>, Vec<_>) =
        all.iter().copied().partition(|case| matches!(case.required, Verdict::Good));
    let primary = Sink::start();
    let folder = tempfile::tempdir().unwrap();
    let spool = folder.path().join("spool");

    let required = |case: &Case| format!("tls: required, {}", case.keys);
    let dup = before(&primary, (&farm, &all), required, &spool);
    let reply = Client::ready(dup.addr()).message("a@example.com", &["b@example.com"], BODY);
    assert_eq!(reply.code, 250, "{reply:?}");
    for case in &good {
        let arrival = farm.wait_arrival(case.name, "b@example.com");
        assert_eq!(arrival.tls(), case.version, "{}", case.name);
        let relay = format!("relay={} role=backup", farm.address(case.name));
        dup.wait_log(&format!("{relay} delay="));
    }
    for case in &bad {
        let Verdict::Bad(words) = case.required else { unreachable!() };
        let relay = format!("relay={} role=backup", farm.address(case.name));
        let line = dup.wait_log(&format!("{relay} is down: "));
        // The first word is the code for a client.
        for word in &words[1..] {
            assert!(line.contains(word), "{}: no {word:?} in {line}", case.name);
        }
    }
    dup.signal(Signal::Term);
    assert!(dup.wait_exit(2 * BOUND).success());
    assert_eq!(owed(&spool), bad.len());
    for case in &bad {
        farm.wait_at_rest(case.name, 1);
        assert_eq!(farm.log(case.name, &[": client="]), [""; 0]);
    }

    // What was held goes out once less is asked, and nothing of it twice.
    let dup = before(&primary, (&farm, &all), |_| "tls: opportunistic".into(), &spool);
    for case in &bad {
        let arrival = farm.wait_arrival(case.name, "b@example.com");
        assert_eq!(arrival.tls(), case.version, "{}", case.name);
    }
    wait_until("the spool is empty", || owed(&spool) == 0);
    dup.signal(Signal::Term);
    assert!(dup.wait_exit(2 * BOUND).success());
    assert_eq!(farm.sink.accepted(), all.len());
}
