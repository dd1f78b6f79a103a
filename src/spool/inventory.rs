//! What lies in the spool, for the people who look after it: listing, sending again, dropping.
//!
//! `queue` (the commands) calls this beside running daemons. Everything that changes a copy claims
//! it first.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use nix::fcntl::Flock;

use super::claim::{Claimed, Mail, Owed, open, read_mail, write_state};
use super::reader::files_of;
use super::{Entry, MAIL, Spool, TO, ignore_missing, is_there, sync_folder};
use crate::message::QueueId;

/// Which part of the spool a copy lies in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// It will be tried.
    Queue,
    /// It was refused, or tried for too long.
    Failed,
}

/// One copy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Where it lies.
    pub part: Part,
    /// Its message; in `failed/` the hour means nothing.
    pub entry: Entry,
    /// For whom it is.
    pub backup: String,
}

/// What became of an order of the operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Done {
    /// It was carried out; the message has this name now.
    Yes(QueueId),
    /// Somebody is delivering it just now.
    Busy,
    /// It is not there any more.
    Gone,
}

impl Spool {
    /// All copies of a part, as they are found: nothing is collected.
    ///
    /// # Errors
    /// Those of readdir(3).
    pub fn items(&self, part: Part) -> io::Result<impl Iterator<Item = io::Result<Item>>> {
        let folders = match part {
            Part::Queue => self.hours()?,
            Part::Failed => vec![(0, self.failed())],
        };
        Ok(folders.into_iter().flat_map(move |(hour, path)| in_folder(part, hour, path)))
    }

    /// The state of a copy. `None` when it has gone meanwhile, or cannot be read.
    pub fn state(&self, item: &Item) -> Option<Owed> {
        let mut text = String::new();
        // No link is followed, and no fifo waited for.
        open(&self.item_path(item)).ok()?.read_to_string(&mut text).ok()?;
        Owed::parse(&text)
    }

    /// A copy of a message that was accepted: before that, it is not owed yet.
    pub fn is_committed(&self, item: &Item) -> bool {
        is_there(&self.item_mail_path(item))
    }

    /// How many copies of accepted messages for a backup lie in a part.
    ///
    /// # Errors
    /// Those of readdir(3).
    pub fn count(&self, part: Part, backup: &str) -> io::Result<u64> {
        let mut count = 0;
        for item in self.items(part)? {
            let item = item?;
            count += u64::from(item.backup == backup && self.is_committed(&item));
        }
        Ok(count)
    }

    /// The message of a copy.
    ///
    /// # Errors
    /// Those of the file system, and `InvalidData`.
    pub fn item_mail(&self, item: &Item) -> io::Result<Mail> {
        read_mail(&self.item_mail_path(item))
    }

    /// Lets a copy be tried again, at once and as if for the first time; for another backup if
    /// there is a `new` one. Only one that is configured may be named, who will look for it.
    ///
    /// # Errors
    /// Those of the file system: the copy is then where it was.
    pub fn retry(self: &Arc<Self>, item: &Item, new: Option<&str>) -> io::Result<Done> {
        let _claim = match self.claim_item(item)? {
            Claimed::Yes(claim) => claim,
            Claimed::Busy => return Ok(Done::Busy),
            Claimed::Gone => return Ok(Done::Gone),
        };
        let places = self.state(item).and_then(|owed| owed.places);
        let mut fresh = Owed { places, since: Some(SystemTime::now()), ..Owed::default() };
        if item.part == Part::Queue && new.is_none() {
            write_state(self, &self.item_path(item), &fresh, "")?;
            return Ok(Done::Yes(item.entry.id));
        }
        let backup = new.unwrap_or(&item.backup);
        // Others of the same message may be owed it still: it stays one copy. While that is ours,
        // its message stays.
        let twin = match new {
            None => self.twin(item.entry.id, backup)?,
            Some(_) => None,
        };
        let mut entry = Entry::now(item.entry.id);
        let other = match twin.as_ref().map(|twin| self.claim_item(twin)).transpose()? {
            Some(Claimed::Yes(claim)) => {
                fresh.places = union(fresh.places, claim.owed.places.clone());
                entry = claim.entry();
                Some(claim)
            }
            Some(Claimed::Busy) => return Ok(Done::Busy),
            Some(Claimed::Gone) | None => None,
        };
        // Under another name when it is for somebody else: whom a message can be owed to is
        // written in it, and that list must hold for all that have its name. And when it lies there
        // for others, who may take it along at any moment.
        if new.is_some() || other.is_none() && is_there(&self.mail(entry)) {
            entry.id = QueueId::next();
        }
        self.ready_hour(entry)?;
        // Nobody is to take what is being made for what a crash has left.
        let _mark = match self.reserve(entry.id) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(Done::Busy),
            reserved => Mark(reserved?),
        };
        match fs::hard_link(self.item_mail_path(item), self.mail(entry)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists && other.is_some() => {}
            linked => linked?,
        }
        write_state(self, &self.copy(entry, backup), &fresh, "")?;
        sync_folder(&self.hour(entry))?;
        self.remove_item(item)?;
        Ok(Done::Yes(entry.id))
    }

    /// The copy of the same message for the same backup that waits in the queue.
    fn twin(&self, id: QueueId, backup: &str) -> io::Result<Option<Item>> {
        for (hour, _) in self.hours()? {
            let entry = Entry { hour, id };
            if is_there(&self.copy(entry, backup)) {
                return Ok(Some(Item { part: Part::Queue, entry, backup: backup.into() }));
            }
        }
        Ok(None)
    }

    /// Gives a copy up.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn drop_item(self: &Arc<Self>, item: &Item) -> io::Result<Done> {
        match self.claim_item(item)? {
            Claimed::Yes(_claim) => self.remove_item(item).map(|()| Done::Yes(item.entry.id)),
            Claimed::Busy => Ok(Done::Busy),
            Claimed::Gone => Ok(Done::Gone),
        }
    }

    /// What is in `failed/` nobody else works on, but for other operators.
    fn claim_item(self: &Arc<Self>, item: &Item) -> io::Result<Claimed> {
        self.claim_path(item.entry, &item.backup, &self.item_path(item))
    }

    /// Removes a copy, and its message with the last one.
    fn remove_item(&self, item: &Item) -> io::Result<()> {
        let mail = self.item_mail(item);
        match item.part {
            Part::Queue => {
                ignore_missing(fs::remove_file(self.item_path(item)))?;
                self.settle(item.entry, &mail?.backups)
            }
            Part::Failed => {
                let _alone = self.lock_failed()?;
                ignore_missing(fs::remove_file(self.item_path(item)))?;
                // One that cannot be read is left to the sweep, who looks at every name.
                let Ok(mail) = mail else { return Ok(()) };
                let is_owed = |backup: &String| {
                    is_there(&self.item_path(&Item { backup: backup.clone(), ..item.clone() }))
                };
                match mail.backups.iter().any(is_owed) {
                    true => Ok(()),
                    false => ignore_missing(fs::remove_file(self.item_mail_path(item))),
                }
            }
        }
    }

    fn item_path(&self, item: &Item) -> PathBuf {
        match item.part {
            Part::Queue => self.copy(item.entry, &item.backup),
            Part::Failed => self.failed().join(format!("{}{TO}{}", item.entry.id, item.backup)),
        }
    }

    fn item_mail_path(&self, item: &Item) -> PathBuf {
        match item.part {
            Part::Queue => self.mail(item.entry),
            Part::Failed => self.failed().join(format!("{}{MAIL}", item.entry.id)),
        }
    }
}

/// A locked file in `tmp/`, as a writer has it, for as long as this is there.
struct Mark((PathBuf, Flock<File>));

impl Drop for Mark {
    fn drop(&mut self) {
        // What stays is swept away.
        let _ = fs::remove_file(&self.0.0);
    }
}

/// Who is owed by the one or the other; `None` is everybody.
fn union(one: Option<Vec<usize>>, other: Option<Vec<usize>>) -> Option<Vec<usize>> {
    let (mut all, other) = (one?, other?);
    all.extend(other);
    all.sort_unstable();
    all.dedup();
    Some(all)
}

fn in_folder(part: Part, hour: u32, path: PathBuf) -> Box<dyn Iterator<Item = io::Result<Item>>> {
    let files = match files_of(&path) {
        Ok(files) => files.into_iter().flatten(),
        Err(error) => return Box::new(std::iter::once(Err(error))),
    };
    Box::new(files.filter_map(move |file| {
        let name = match file {
            Ok(file) => file.file_name(),
            Err(error) => return Some(Err(error)),
        };
        let (id, backup) = name.to_str()?.split_once(TO)?;
        let entry = Entry { hour, id: QueueId::parse(id)? };
        Some(Ok(Item { part, entry, backup: backup.into() }))
    }))
}
