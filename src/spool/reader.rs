//! What is owed to one backup, read from the folders a little at a time.
//!
//! The folders are the queue: a million copies that wait take no memory. Oldest hour first; within
//! an hour in whatever order the file system has them.

use std::collections::VecDeque;
use std::fs::{self, ReadDir};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::draft::hour_of;
use super::sweep::remove_hour;
use super::{Entry, Spool, TO};
use crate::message::QueueId;

/// One pass over all that is owed to a backup.
#[derive(Debug)]
pub struct Reader {
    end: String,
    /// Hours that are still to be read.
    hours: VecDeque<(u32, PathBuf)>,
    open: Option<Hour>,
}

/// An hour that is being read.
#[derive(Debug)]
struct Hour {
    number: u32,
    path: PathBuf,
    files: ReadDir,
    is_empty: bool,
}

/// A copy that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Its message.
    pub entry: Entry,
    /// Not to be tried before this time.
    pub due: SystemTime,
}

impl Found {
    /// It was not tried yet.
    pub fn is_new(&self) -> bool {
        self.due == SystemTime::UNIX_EPOCH
    }
}

impl Spool {
    /// Begins a pass for `backup`.
    ///
    /// # Errors
    /// Those of readdir(3).
    pub fn reader(&self, backup: &str) -> io::Result<Reader> {
        Ok(Reader { end: format!("{TO}{backup}"), hours: self.hours()?.into(), open: None })
    }

    /// A pass over those hours alone in which there are messages for which
    /// `relay.retry_for_seconds` are over.
    ///
    /// # Errors
    /// Those of readdir(3).
    pub fn old(&self, backup: &str) -> io::Result<Reader> {
        let mut reader = self.reader(backup)?;
        let last = SystemTime::now().checked_sub(self.settings.retry_for).map_or(0, hour_of);
        reader.hours.retain(|(hour, _)| *hour <= last);
        Ok(reader)
    }

    /// The folders of the queue, oldest first. What is no hour is nothing of ours.
    pub(super) fn hours(&self) -> io::Result<Vec<(u32, PathBuf)>> {
        let mut hours = Vec::new();
        for folder in fs::read_dir(self.queue())? {
            let folder = folder?;
            let name = folder.file_name();
            if let Some(hour) = name.to_str().filter(|name| name.len() == 10)
                && let Ok(hour) = hour.parse()
                && folder.file_type().is_ok_and(|kind| kind.is_dir())
            {
                hours.push((hour, folder.path()));
            }
        }
        hours.sort_unstable();
        Ok(hours)
    }
}

/// What is in the folder of an hour; `None` for one that was removed, for all of it has gone.
pub(super) fn files_of(hour: &Path) -> io::Result<Option<ReadDir>> {
    match fs::read_dir(hour) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        files => files.map(Some),
    }
}

impl Reader {
    /// At most `count` more copies. Fewer mean that the pass is over.
    ///
    /// # Errors
    /// Those of readdir(3); the pass goes on with the next folder.
    pub fn read(&mut self, count: usize) -> io::Result<Vec<Found>> {
        let mut all = Vec::new();
        while all.len() < count {
            let Some(hour) = &mut self.open else {
                let Some((number, path)) = self.hours.pop_front() else { break };
                let files = files_of(&path)?;
                self.open = files.map(|files| Hour { number, path, files, is_empty: true });
                continue;
            };
            match hour.files.next() {
                Some(Ok(file)) => {
                    hour.is_empty = false;
                    let name = file.file_name();
                    let id = name.to_str().and_then(|name| name.strip_suffix(&self.end));
                    if let Some(id) = id.and_then(QueueId::parse)
                        && let Ok(about) = file.metadata()
                    {
                        let entry = Entry { hour: hour.number, id };
                        // One that is empty was not tried yet, whenever that clock says.
                        let put_off = about.modified().ok().filter(|_| about.len() > 0);
                        let due = put_off.unwrap_or(SystemTime::UNIX_EPOCH);
                        all.push(Found { entry, due });
                    }
                }
                Some(Err(error)) => {
                    self.open = None;
                    return Err(error);
                }
                None => {
                    // Else a process that stays would read more and more of them.
                    if hour.is_empty {
                        // Another may have removed it.
                        let _ = remove_hour(&hour.path);
                    }
                    self.open = None;
                }
            }
        }
        Ok(all)
    }
}
