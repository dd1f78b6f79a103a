//! A message on its way into the spool.
//!
//! `message` writes one while the body streams and commits it when the primary has said yes. One
//! that is dropped before that leaves nothing behind.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use nix::fcntl::Flock;

use super::{Entry, Spool, create, is_there, sync_folder};
use crate::message::QueueId;
use crate::smtp::command::Relayed;
use crate::smtp::envelope::Envelope;

/// After so many names that others have, something is wrong with the file system.
const MOST_NAMES: usize = 100;

/// A message that is being written.
#[derive(Debug)]
pub struct Draft {
    spool: Arc<Spool>,
    id: QueueId,
    /// Locked, so that nobody sweeps it away.
    file: Flock<File>,
    /// Where the body begins.
    start: u64,
    /// Octets of the body.
    length: u64,
    backups: Arc<[String]>,
    /// What has to be removed if it comes to nothing.
    made: Vec<PathBuf>,
    entry: Option<Entry>,
}

impl Draft {
    /// Begins a message for `backups`, under the name `id` unless another process has had it too:
    /// they are the microseconds at which mail began.
    ///
    /// # Errors
    /// Those of the file system; `StorageFull` when a limit leaves no room.
    pub fn begin(
        spool: &Arc<Spool>,
        mut id: QueueId,
        envelope: &Envelope,
        backups: &Arc<[String]>,
    ) -> io::Result<Draft> {
        spool.has_room()?;
        let mut reserved = spool.reserve_new(id);
        for _ in 0..MOST_NAMES {
            let Err(error) = &reserved else { break };
            if error.kind() != io::ErrorKind::AlreadyExists {
                break;
            }
            id = QueueId::next();
            reserved = spool.reserve_new(id);
        }
        let (path, file) = reserved?;
        let header = header(envelope, backups);
        let mut draft = Draft {
            spool: Arc::clone(spool),
            id,
            file,
            start: header.len() as u64,
            length: 0,
            backups: Arc::clone(backups),
            made: vec![path],
            entry: None,
        };
        draft.file.write_all(&header)?;
        Ok(draft)
    }

    /// Its name.
    pub fn id(&self) -> QueueId {
        self.id
    }

    /// Appends to the body.
    ///
    /// # Errors
    /// Those of write(2).
    pub fn write(&mut self, octets: &[u8]) -> io::Result<()> {
        self.file.write_all(octets)?;
        self.length += octets.len() as u64;
        Ok(())
    }

    /// Makes the message durable, all but its name.
    ///
    /// # Errors
    /// Those of fsync(2).
    pub fn sync(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Makes the names of what is going to be owed.
    ///
    /// # Errors
    /// Those of the file system; `AlreadyExists` when there is a message of this name.
    pub fn address(&mut self) -> io::Result<()> {
        let entry = Entry::now(self.id);
        self.spool.ready_hour(entry)?;
        // Nobody else can be about to make it: they would need tmp/ID, which is ours.
        if is_there(&self.spool.mail(entry)) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        for backup in self.backups.iter() {
            let path = self.spool.copy(entry, backup);
            create(&path, false)?;
            self.made.push(path);
        }
        self.entry = Some(entry);
        Ok(())
    }

    /// The message is owed from now on, after a power loss too.
    ///
    /// # Errors
    /// Those of rename(2) and fsync(2), with the draft, which is as it was before.
    pub fn commit(mut self) -> Result<Stored, (io::Error, Draft)> {
        match self.put_in_place() {
            Ok(stored) => {
                self.made.clear();
                Ok(stored)
            }
            Err(error) => Err((error, self)),
        }
    }

    fn put_in_place(&mut self) -> io::Result<Stored> {
        let entry = self.entry.ok_or(io::ErrorKind::InvalidInput)?;
        let file = self.file.try_clone()?;
        let mail = self.spool.mail(entry);
        fs::rename(&self.made[0], &mail)?;
        // From here on that is what has to go if it comes to nothing, before the names of the
        // copies: they stay owed for as long as there is a message.
        self.made[0] = mail;
        sync_folder(&self.spool.hour(entry))?;
        self.spool.has_grown(self.start + self.length);
        Ok(Stored { entry, file, start: self.start, length: self.length })
    }

    /// The backups that it is for.
    pub fn backups(&self) -> Arc<[String]> {
        Arc::clone(&self.backups)
    }

    /// Copies so many octets of the body from its beginning, for a spool that failed in the middle.
    /// What the draft has behind them memory has too, and brings it itself.
    ///
    /// # Errors
    /// Those of reading and writing.
    pub fn rescue(&mut self, into: &mut File, octets: u64) -> io::Result<u64> {
        self.file.seek(SeekFrom::Start(self.start))?;
        let mut written = io::Read::take(&*self.file, octets);
        io::copy(&mut written, into)
    }
}

impl Spool {
    /// As [`Spool::reserve`], for a name that no message of this hour has.
    pub(super) fn reserve_new(&self, id: QueueId) -> io::Result<(PathBuf, Flock<File>)> {
        let (path, file) = self.reserve(id)?;
        // Looked for behind that: who has the name puts the message in place before leaving it.
        if is_there(&self.mail(Entry::now(id))) {
            fs::remove_file(path)?;
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        Ok((path, file))
    }
}

impl Entry {
    /// The place of a message that is committed now.
    pub(super) fn now(id: QueueId) -> Entry {
        Entry { hour: hour_of(SystemTime::now()), id }
    }
}

/// A draft that came to nothing.
impl Drop for Draft {
    fn drop(&mut self) {
        for path in &self.made {
            // What stays is swept away at the next start.
            let _ = fs::remove_file(path);
        }
    }
}

/// A message that was committed.
#[derive(Debug)]
pub struct Stored {
    /// Its place.
    pub entry: Entry,
    /// The open file …
    pub file: File,
    /// … where its body begins …
    pub start: u64,
    /// … and how long that is.
    pub length: u64,
}

/// Batch SMTP up to the body. The NOOP says who may have a file of what it is owed; to a program
/// that replays the batch it means nothing.
fn header(envelope: &Envelope, backups: &[String]) -> Vec<u8> {
    let mut header = format!("NOOP {}\r\n", backups.join(" ")).into_bytes();
    for attributes in envelope.origin.arguments(|_| true) {
        Relayed::Xforward(attributes).write(&mut header);
    }
    Relayed::Mail(envelope.reverse_path.clone()).write(&mut header);
    for path in &envelope.forward_paths {
        Relayed::Rcpt(path.clone()).write(&mut header);
    }
    Relayed::Data.write(&mut header);
    header
}

/// The name of the folder for messages that are committed at this time.
pub(super) fn hour_of(time: SystemTime) -> u32 {
    let now = jiff::Timestamp::try_from(time).unwrap_or_default();
    let now = now.to_zoned_datetime(jiff::tz::TimeZone::UTC);
    ((now.year() as u32 * 100 + now.month() as u32) * 100 + now.day() as u32) * 100
        + now.hour() as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::smtp::command::Command;
    use crate::spool::Settings;

    /// Two processes that begin a message in the same microsecond.
    #[test]
    fn a_name_that_somebody_has_is_nobody_elses() {
        let folder = tempfile::tempdir().unwrap();
        let settings = Settings {
            folder: folder.path().join("spool"),
            required: false,
            retry_for: std::time::Duration::from_secs(60),
            max_bytes: 0,
        };
        let spools = [(); 2].map(|()| Arc::new(Spool::open(&settings).unwrap()));
        let path = |line: &[u8]| match Command::parse(line) {
            Ok(Command::Relayed(Relayed::Mail(path) | Relayed::Rcpt(path))) => path,
            other => panic!("{other:?}"),
        };
        let envelope = Envelope {
            origin: Default::default(),
            reverse_path: path(b"MAIL FROM:<a@example.com>"),
            forward_paths: vec![path(b"RCPT TO:<b@example.com>")],
        };
        let backups: Arc<[String]> = [String::from("b.example:25")].into();
        let id = QueueId::next();
        let begin = |spool: &Arc<Spool>| {
            let mut draft = Draft::begin(spool, id, &envelope, &backups).unwrap();
            draft.write(b".\r\n").unwrap();
            draft
        };
        let commit = |mut draft: Draft| {
            draft.address().unwrap();
            draft.commit().unwrap().entry.id
        };
        let (first, second) = (begin(&spools[0]), begin(&spools[1]));
        let mut names = vec![commit(first)];
        // The name is in the queue now, and nowhere else.
        names.push(commit(begin(&spools[1])));
        names.push(commit(second));
        assert_eq!(names[0], id);
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 3);
    }
}
