//! The commands for those who look after the spool: `queue`, `flush`, `retry`, `drop`.
//!
//! `main` calls them with the configuration of the service, as the user whose spool it is. Each
//! works beside running daemons, prints what it did, and gives false when something of it failed.

use std::collections::{HashMap, HashSet};
use std::io::{self, Write};
use std::sync::Arc;
use std::time::SystemTime;

use jiff::tz::TimeZone;
use serde_json::json;

use crate::cli::{Drop, Flush, Queue, Retry};
use crate::config::Config;
use crate::launch::signals::Signals;
use crate::maillog;
use crate::message::QueueId;
use crate::relay::destination::Destination;
use crate::server;
use crate::smtp::envelope::Path as Address;
use crate::spool::claim::{Mail, Owed, wait_for};
use crate::spool::inventory::{Done, Item, Part};
use crate::spool::{self, Spool};

/// Who is configured to get copies, the primary included: for it there may be some of a time at
/// which it was a backup.
fn destinations(config: &Config) -> Vec<Destination> {
    config.backups.iter().chain([&config.primary]).cloned().collect()
}

/// `smtp-dup queue`: a line for each copy, as they are found.
///
/// # Errors
/// Those of reading the spool, and of writing to a terminal or pipe.
pub fn queue(config: &Config, spool: &Arc<Spool>, order: &Queue) -> io::Result<bool> {
    let part = if order.failed { Part::Failed } else { Part::Queue };
    let known = spool::names(&destinations(config));
    let mut out = io::BufWriter::new(io::stdout().lock());
    let held: HashMap<&String, (SystemTime, String)> =
        known.iter().filter_map(|name| Some((name, spool.held(name)?))).collect();
    if !order.json {
        for (backup, (until, reply)) in &held {
            writeln!(out, "{backup} is held until {}: {reply}", local(*until))?;
        }
    }
    let mut count: u64 = 0;
    for item in spool.items(part)? {
        let item = item?;
        // Delivered meanwhile.
        let Some(state) = spool.state(&item) else { continue };
        if !spool.is_committed(&item) {
            continue;
        }
        let held_until = held.get(&item.backup).map(|(until, _)| *until);
        let mail = spool.item_mail(&item).ok();
        let is_orphan = !known.contains(&item.backup);
        if order.json {
            writeln!(out, "{}", for_programs(&item, &state, mail.as_ref(), is_orphan, held_until))?;
        } else {
            if count == 0 {
                writeln!(
                    out,
                    "{:10}  {:19}  {:>9}  {:28}  {:>5}  {:19}",
                    "id", "since", "octets", "for", "tries", "next"
                )?;
            }
            for_people(&mut out, &item, &state, mail.as_ref(), is_orphan, held_until)?;
        }
        count += 1;
    }
    if !order.json {
        let what = if order.failed { "given up" } else { "waiting" };
        let folder = spool.settings().folder.display();
        writeln!(out, "{what} in {folder}: {}", copies(count))?;
    }
    out.flush()?;
    Ok(true)
}

/// The recipients that a copy is owed for.
fn owed<'a>(state: &Owed, mail: &'a Mail) -> Vec<&'a Address> {
    let all = &mail.envelope.forward_paths;
    match &state.places {
        Some(places) => places.iter().filter_map(|&place| all.get(place)).collect(),
        None => all.iter().collect(),
    }
}

fn for_people(
    out: &mut impl Write,
    item: &Item,
    state: &Owed,
    mail: Option<&Mail>,
    is_orphan: bool,
    held_until: Option<SystemTime>,
) -> io::Result<()> {
    let is_ahead = |next: &SystemTime| !wait_for(*next).is_zero();
    let later = [state.next, held_until].into_iter().flatten().filter(is_ahead).max();
    let next = match later {
        _ if item.part == Part::Failed || is_orphan => "never".into(),
        Some(next) => local(next),
        None => "now".into(),
    };
    let since = mail.map_or("?".into(), |mail| local(mail.arrived));
    let octets = mail.map_or("?".into(), |mail| mail.length.to_string());
    let Item { entry, backup, .. } = item;
    writeln!(
        out,
        "{}  {since:19}  {octets:>9}  {backup:28}  {:>5}  {next:19}",
        entry.id, state.attempts
    )?;
    if is_orphan {
        writeln!(out, "            orphaned: {backup} is no destination any more")?;
    }
    if let Some(mail) = mail {
        let from = mail.envelope.reverse_path.display();
        let to = owed(state, mail);
        let first = to.first().map_or(String::new(), |path| path.display());
        let more = if to.len() > 1 { format!(" and {} more", to.len() - 1) } else { String::new() };
        writeln!(out, "            from={from} to={first}{more}")?;
    }
    if !state.reply.is_empty() {
        writeln!(out, "            ({})", state.reply)?;
    }
    Ok(())
}

fn for_programs(
    item: &Item,
    state: &Owed,
    mail: Option<&Mail>,
    is_orphan: bool,
    held_until: Option<SystemTime>,
) -> String {
    let to: Option<Vec<_>> =
        mail.map(|mail| owed(state, mail).iter().map(|path| path.display()).collect());
    let object = json!({
        "id": item.entry.id.to_string(),
        "part": if item.part == Part::Failed { "failed" } else { "queue" },
        "backup": item.backup,
        "orphaned": is_orphan,
        "arrived": mail.map(|mail| spool::seconds(mail.arrived)),
        "octets": mail.map(|mail| mail.length),
        "from": mail.map(|mail| mail.envelope.reverse_path.display()),
        "to": to,
        "attempts": state.attempts,
        "next": state.next.filter(|_| item.part == Part::Queue).map(spool::seconds),
        "held_until": held_until.map(spool::seconds),
        "reply": state.reply,
    });
    object.to_string()
}

/// A time as people here write it.
fn local(time: SystemTime) -> String {
    let stamp = jiff::Timestamp::try_from(time).unwrap_or_default();
    stamp.to_zoned_datetime(TimeZone::system()).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// `smtp-dup flush`.
///
/// # Errors
/// Those of reading the spool; `InvalidInput` for a backup that is none.
pub fn flush(
    config: &Config,
    spool: &Arc<Spool>,
    order: &Flush,
    signals: &Signals,
) -> io::Result<bool> {
    let all = destinations(config);
    for name in &order.backup {
        known(&all, name)?;
    }
    let is_meant =
        |to: &Destination| order.backup.is_empty() || order.backup.contains(&to.to_string());
    let names = spool::names(&all);
    let meant: Vec<_> = all.into_iter().filter(is_meant).collect();
    // What a crash of a process for one client has left, nobody else clears up where none stays.
    let owed = spool.sweep(&spool::names(&meant))?.owed;
    let failed_for = |to: &Destination| spool.count(Part::Failed, &to.to_string());
    let before: Vec<u64> = meant.iter().map(failed_for).collect::<io::Result<_>>()?;
    let mut well = true;
    let flushed = server::flush(config, spool, &meant, signals);
    for ((to, tried), before) in meant.iter().zip(flushed).zip(before) {
        let left = spool.count(Part::Queue, &to.to_string())?;
        let failed = failed_for(to)?.saturating_sub(before);
        match tried {
            // The primary is only spoken of when there was something for it.
            Ok(0) if left == 0 && *to == config.primary && order.backup.is_empty() => {}
            Ok(tried) => {
                let tried = copies(tried);
                println!("{to}: {tried} tried, {left} left, {failed} given up (queue --failed)");
            }
            Err(error) => {
                println!("{to}: FAILED: {error}");
                well = false;
            }
        }
        well &= left == 0 && failed == 0;
    }
    // Who flushed all and heard nothing of these would take the queue for empty.
    let orphans = owed.iter().filter(|(name, _)| order.backup.is_empty() && !names.contains(name));
    for (name, left) in orphans {
        println!("{name}: no destination any more, {} left (retry --to, or drop)", copies(*left));
        well = false;
    }
    Ok(well)
}

fn copies(count: u64) -> String {
    if count == 1 { "1 copy".into() } else { format!("{count} copies") }
}

fn known<'a>(all: &'a [Destination], name: &str) -> io::Result<&'a Destination> {
    all.iter().find(|to| to.to_string() == name).ok_or_else(|| {
        let names = spool::names(all).join(", ");
        wrong(format!("\"{name}\" is no destination; configured are {names}"))
    })
}

fn wrong(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

/// `smtp-dup retry`.
///
/// # Errors
/// As [`flush`].
pub fn retry(config: &Config, spool: &Arc<Spool>, order: &Retry) -> io::Result<bool> {
    if order.all != order.id.is_empty() {
        return Err(wrong("retry: name messages, or give --all".into()));
    }
    let all = destinations(config);
    if let Some(name) = &order.to {
        known(&all, name)?;
    }
    let names = spool::names(&all);
    let ids = ids(&order.id)?;
    let is_meant = |item: &Item| {
        let is_for = order.backup.as_ref().is_none_or(|backup| *backup == item.backup);
        is_for
            && match order.all {
                false => ids.contains(&item.entry.id),
                true => {
                    let is_orphan = !names.contains(&item.backup);
                    item.part == Part::Failed || order.to.is_some() && is_orphan
                }
            }
    };
    each(spool, &ids, is_meant, |item| {
        if order.to.is_none() && !names.contains(&item.backup) {
            let backup = &item.backup;
            return Err(wrong(format!("{backup} is no destination any more; use --to BACKUP")));
        }
        Ok(match spool.retry(item, order.to.as_deref())? {
            Done::Yes(id) => {
                let backup = order.to.as_ref().unwrap_or(&item.backup);
                maillog::copy_retried(item.entry.id, &item.backup, backup, id);
                let name = if id == item.entry.id { String::new() } else { format!(", as {id}") };
                format!("is due now for {backup}{name}")
            }
            other => unchanged(other).into(),
        })
    })
}

/// `smtp-dup drop`.
///
/// # Errors
/// As [`flush`].
pub fn drop(spool: &Arc<Spool>, order: &Drop) -> io::Result<bool> {
    if order.all != order.id.is_empty() || order.all && order.backup.is_none() {
        return Err(wrong("drop: name the messages, or give --all and --backup".into()));
    }
    let ids = ids(&order.id)?;
    let is_meant = |item: &Item| {
        let is_for = order.backup.as_ref().is_none_or(|backup| *backup == item.backup);
        is_for && (order.all || ids.contains(&item.entry.id))
    };
    each(spool, &ids, is_meant, |item| {
        Ok(match spool.drop_item(item)? {
            Done::Yes(id) => {
                maillog::copy_dropped(id, &item.backup);
                format!("dropped the copy for {}", item.backup)
            }
            other => unchanged(other).into(),
        })
    })
}

fn ids(words: &[String]) -> io::Result<HashSet<QueueId>> {
    let id = |word: &String| {
        QueueId::parse(word).ok_or_else(|| {
            wrong(format!("\"{word}\" is no message; they have ten digits, see smtp-dup queue"))
        })
    };
    words.iter().map(id).collect()
}

fn unchanged(done: Done) -> &'static str {
    match done {
        Done::Busy => "is being tried just now",
        Done::Yes(_) | Done::Gone => "has gone meanwhile",
    }
}

/// Does something with each copy that is meant, says what, and which of `ids` there is none of.
fn each(
    spool: &Arc<Spool>,
    ids: &HashSet<QueueId>,
    is_meant: impl Fn(&Item) -> bool,
    act: impl Fn(&Item) -> io::Result<String>,
) -> io::Result<bool> {
    let (mut missing, mut well) = (ids.clone(), true);
    // All before the first is touched: what is sent again comes from one part to the other.
    let mut items: Vec<Item> = Vec::new();
    for part in [Part::Failed, Part::Queue] {
        for item in spool.items(part)? {
            let is_owed = |item: &Item| is_meant(item) && spool.is_committed(item);
            items.extend(Some(item?).filter(is_owed));
        }
    }
    if items.is_empty() && ids.is_empty() {
        println!("nothing to do");
    }
    for item in items {
        let id = item.entry.id;
        missing.remove(&id);
        match act(&item) {
            Ok(what) => println!("{id}: {what}"),
            Err(error) => {
                println!("{id}: FAILED: {error}");
                well = false;
            }
        }
    }
    for id in &missing {
        println!("{id}: not in the spool");
        well = false;
    }
    Ok(well)
}
