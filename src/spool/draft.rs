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
    /// Begins a message for `backups`.
    ///
    /// # Errors
    /// Those of the file system; `StorageFull` when a limit leaves no room.
    pub fn begin(
        spool: &Arc<Spool>,
        id: QueueId,
        envelope: &Envelope,
        backups: &Arc<[String]>,
    ) -> io::Result<Draft> {
        spool.has_room()?;
        let (path, file) = spool.reserve(id)?;
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
        let entry = Entry { hour: hour_of(SystemTime::now()), id: self.id };
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
