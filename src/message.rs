//! A message that the primary accepted, held for the backups until each has its copy.
//!
//! `smtp::session` collects the body while it streams to the primary ([`Collector`]) and makes a
//! [`Message`] of it; the delivery agents share that. What is held is counted against
//! `relay.backup_memory`, files included, from the first octet until the last copy is done.
//! Whatever fails here costs copies, never mail.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::launch::privileges::inside;
use crate::smtp::envelope::Envelope;
use crate::spool::Entry;
use crate::spool::claim::Mail;
use crate::spool::draft::{Draft, Stored};

/// A body above this many octets moves from memory to an unlinked temporary file.
pub const MEMORY_THRESHOLD: usize = 256 * 1024;

/// Octets counted for each message beside its body and its envelope.
const OVERHEAD: u64 = 512;

/// Names a message in the log: ten hexadecimal digits that grow with time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueId(u64);

impl QueueId {
    /// The microseconds since 1970, cut to 40 bits; never the same twice in one process.
    pub fn next() -> QueueId {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_micros() as u64);
        let mut id = now;
        let _ = LAST.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| {
            id = now.max(last + 1);
            Some(id)
        });
        QueueId(id & 0xFF_FFFF_FFFF)
    }

    /// Reads what Display writes.
    pub fn parse(text: &str) -> Option<QueueId> {
        let is_one = text.len() == 10 && text.bytes().all(|o| o.is_ascii_hexdigit());
        u64::from_str_radix(text, 16).ok().filter(|_| is_one).map(QueueId)
    }
}

impl fmt::Display for QueueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:010X}", self.0)
    }
}

/// Where the big bodies lie, in files without a name.
#[derive(Debug)]
pub enum Scratch {
    /// On the file system of this folder.
    Folder(PathBuf),
    /// In memory, memfd_create(2): in a chroot that has no folder for them.
    Memory,
}

impl Scratch {
    /// For a process that is going to have `root` for its root: TMPDIR, where it is set, named as
    /// seen from outside.
    ///
    /// # Errors
    /// A text about a TMPDIR that will not be there.
    pub fn within(root: &Path) -> Result<Scratch, String> {
        let Some(folder) = std::env::var_os("TMPDIR").map(PathBuf::from) else {
            return Ok(Scratch::Memory);
        };
        inside(root, &folder).map(Scratch::Folder).map_err(|what| format!("TMPDIR: {what}"))
    }

    /// Tries whether a file can be had.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn try_out(&self) -> io::Result<()> {
        self.file().map(drop)
    }

    fn file(&self) -> io::Result<File> {
        match self {
            Scratch::Folder(folder) => tempfile::tempfile_in(folder),
            Scratch::Memory => Ok(memfd_create(c"smtp-dup", MFdFlags::MFD_CLOEXEC)?.into()),
        }
    }
}

impl fmt::Display for Scratch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Scratch::Folder(folder) => write!(f, "{}", folder.display()),
            Scratch::Memory => f.write_str("memory"),
        }
    }
}

/// The octets that may be held for all backups together: `relay.backup_memory`.
#[derive(Debug)]
pub struct Budget {
    limit: u64,
    held: AtomicU64,
    most_files: u64,
    files: AtomicU64,
    scratch: Scratch,
}

impl Budget {
    /// A budget of `limit` octets, in memory and in at most `most_files` files in `scratch`.
    pub fn new(limit: u64, most_files: u64, scratch: Scratch) -> Arc<Budget> {
        let (held, files) = (AtomicU64::new(0), AtomicU64::new(0));
        Arc::new(Budget { limit, held, most_files, files, scratch })
    }

    fn failed(&self, error: io::Error) -> NoCopy {
        NoCopy::TemporaryFile(self.scratch.to_string(), error)
    }
}

/// Octets taken out of a [`Budget`], given back when this is dropped.
#[derive(Debug)]
pub struct Held {
    budget: Arc<Budget>,
    octets: u64,
    files: u64,
}

impl Held {
    fn nothing(budget: &Arc<Budget>) -> Held {
        Held { budget: Arc::clone(budget), octets: 0, files: 0 }
    }

    /// Takes `octets` more, if the budget has them.
    fn grow(&mut self, octets: u64) -> bool {
        let taken = take(&self.budget.held, octets, self.budget.limit);
        self.octets += if taken { octets } else { 0 };
        taken
    }

    /// Takes leave to have one more file open, if there is one left.
    fn take_file(&mut self) -> Result<(), NoCopy> {
        if !take(&self.budget.files, 1, self.budget.most_files) {
            return Err(NoCopy::TooManyFiles(self.budget.most_files));
        }
        self.files += 1;
        Ok(())
    }

    /// Takes a temporary file.
    fn open_file(&mut self) -> Result<File, NoCopy> {
        self.take_file()?;
        self.budget.scratch.file().map_err(|error| self.budget.failed(error))
    }
}

/// Adds to a sum that must not pass its limit. False when it would.
fn take(sum: &AtomicU64, more: u64, limit: u64) -> bool {
    let within = |sum: u64| sum.checked_add(more).filter(|sum| *sum <= limit);
    sum.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).is_ok()
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.held.fetch_sub(self.octets, Ordering::Relaxed);
        self.budget.files.fetch_sub(self.files, Ordering::Relaxed);
    }
}

/// The octets after DATA in canonical wire form: dot-stuffed, with the final dot.
#[derive(Debug)]
pub enum Body {
    /// A small one.
    Memory(Box<[u8]>),
    /// A big one, or one of the spool: `length` octets of a file from `start` on. Read with explicit
    /// offsets only, since all agents share it.
    File { file: File, start: u64, length: u64 },
}

/// A message that the primary accepted.
#[derive(Debug)]
pub struct Message {
    /// Its name in the log.
    pub id: QueueId,
    /// The reverse-path and the recipients that the primary accepted.
    pub envelope: Envelope,
    /// What is sent after DATA.
    pub body: Body,
    /// When the primary had accepted it.
    pub accepted: Instant,
    /// Its place in the spool, which has a file for each copy that is owed.
    pub place: Option<Place>,
    _held: Option<Held>,
}

/// Where a message lies in the spool.
#[derive(Debug, Clone)]
pub struct Place {
    /// The message.
    pub entry: Entry,
    /// Who can have a file of what it is owed.
    pub backups: Arc<[String]>,
}

impl Message {
    /// A message that was read from the spool.
    pub fn from_spool(entry: Entry, mail: Mail) -> Message {
        let age = SystemTime::now().duration_since(mail.arrived).unwrap_or_default();
        let now = Instant::now();
        Message {
            id: entry.id,
            envelope: mail.envelope,
            body: Body::File { file: mail.file, start: mail.start, length: mail.length },
            accepted: now.checked_sub(age).unwrap_or(now),
            place: Some(Place { entry, backups: mail.backups.into() }),
            _held: None,
        }
    }
}

/// Why there is no copy of a message.
#[derive(Debug)]
pub enum NoCopy {
    /// `relay.backup_memory`, so many octets, is in use.
    OverBudget(u64),
    /// So many copies lie in files, and the rest of the descriptors is for connections.
    TooManyFiles(u64),
    /// The temporary file, in this place, could not be made or written.
    TemporaryFile(String, io::Error),
}

impl fmt::Display for NoCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NoCopy::OverBudget(limit) => {
                write!(f, "copies held fill relay.backup_memory, {limit} octets")
            }
            NoCopy::TooManyFiles(most) => {
                write!(f, "copies held use all {most} files that the limit on open files leaves")
            }
            NoCopy::TemporaryFile(place, error) => write!(f, "temporary file in {place}: {error}"),
        }
    }
}

/// Holds a body while it streams, in memory or a temporary file, and in the spool if there is one.
#[derive(Debug)]
pub struct Collector {
    kept: Result<Kept, NoCopy>,
    draft: Option<Draft>,
}

#[derive(Debug)]
struct Kept {
    held: Held,
    /// What does not fit into memory, unless the spool has it.
    file: Option<(File, u64)>,
    /// So many octets the spool has, and memory has not.
    spooled: u64,
}

/// What became of a message that the primary accepted.
#[derive(Debug)]
pub enum Collected {
    /// It is here, and in the spool if there is one.
    Held(Message),
    /// It is in the spool alone.
    Stored,
    /// There will be no copies.
    Lost(NoCopy),
}

impl Collector {
    /// Nothing held yet; `draft` is the place in the spool that the message goes to.
    pub fn new(budget: &Arc<Budget>, draft: Option<Draft>) -> Collector {
        let held = Held::nothing(budget);
        Collector { kept: Ok(Kept { held, file: None, spooled: 0 }), draft }
    }

    /// The body has grown by `octets`, which the caller still holds in memory. False when they
    /// need not be held, because there will be no copy but from the spool.
    pub fn count(&mut self, octets: usize) -> bool {
        if let Ok(kept) = &mut self.kept
            && !kept.held.grow(octets as u64)
        {
            self.kept = Err(NoCopy::OverBudget(kept.held.budget.limit));
        }
        self.kept.is_ok()
    }

    /// Writes octets to the spool, if there is one.
    ///
    /// # Errors
    /// Those of the file system. From then on it is as if there were no spool.
    pub fn store(&mut self, octets: &[u8]) -> io::Result<()> {
        self.with_draft(|draft| draft.write(octets))
    }

    /// Moves octets, counted before and stored, out of memory: into the temporary file where the
    /// spool has not got them.
    pub fn spill(&mut self, octets: &[u8]) {
        let Ok(kept) = &mut self.kept else { return };
        if self.draft.is_some() {
            kept.spooled += octets.len() as u64;
        } else if let Err(error) = kept.spill(octets) {
            self.kept = Err(error);
        }
    }

    /// Makes all that was stored durable, before anybody is told that the message is accepted.
    ///
    /// # Errors
    /// As [`Collector::store`].
    pub fn secure(&mut self) -> io::Result<()> {
        self.with_draft(|draft| draft.sync().and_then(|()| draft.address()))
    }

    /// Does something with the draft; one that fails is given up, and what only it had is saved.
    fn with_draft(&mut self, act: impl FnOnce(&mut Draft) -> io::Result<()>) -> io::Result<()> {
        let Some(draft) = &mut self.draft else { return Ok(()) };
        let Err(error) = act(draft) else { return Ok(()) };
        if let Some(draft) = self.draft.take() {
            self.rescue(draft);
        }
        Err(error)
    }

    /// The spool has failed with a body that memory has not got any more.
    fn rescue(&mut self, mut draft: Draft) {
        if let Ok(kept) = &mut self.kept
            && let spooled @ 1.. = std::mem::take(&mut kept.spooled)
            && let Err(error) = kept.rescue(&mut draft, spooled)
        {
            self.kept = Err(error);
        }
    }

    /// The message is whole and the primary has accepted it; `rest` are the octets, counted
    /// before, that were not spilled. It is owed from here on. A spool that fails at the last
    /// moment is told to `complain`, and memory has to do.
    pub fn finish(
        mut self,
        id: QueueId,
        envelope: Envelope,
        rest: &[u8],
        complain: impl FnOnce(&io::Error),
    ) -> Collected {
        let mut stored = None;
        if let Some(draft) = self.draft.take() {
            let backups = draft.backups();
            match draft.commit() {
                Ok(done) => stored = Some((done, backups)),
                Err((error, draft)) => {
                    complain(&error);
                    self.rescue(draft);
                }
            }
        }
        if self.kept.as_ref().is_ok_and(|kept| kept.file.is_some()) {
            self.spill(rest);
        }
        self.count((envelope.octets() + OVERHEAD) as usize);
        let Kept { mut held, file, spooled } = match self.kept {
            Ok(kept) => kept,
            Err(_) if stored.is_some() => return Collected::Stored,
            Err(why) => return Collected::Lost(why),
        };
        let place = stored
            .as_ref()
            .map(|(done, backups)| Place { entry: done.entry, backups: Arc::clone(backups) });
        let body = match (file, stored) {
            (Some((file, length)), _) => Body::File { file, start: 0, length },
            (None, Some((Stored { file, start, length, .. }, _))) if spooled > 0 => {
                if held.take_file().is_err() {
                    return Collected::Stored;
                }
                Body::File { file, start, length }
            }
            _ => Body::Memory(rest.into()),
        };
        let accepted = Instant::now();
        Collected::Held(Message { id, envelope, body, accepted, place, _held: Some(held) })
    }
}

impl Kept {
    fn spill(&mut self, octets: &[u8]) -> Result<(), NoCopy> {
        let (file, length) = match &mut self.file {
            Some(file) => file,
            None => self.file.insert((self.held.open_file()?, 0)),
        };
        file.write_all(octets).map_err(|error| self.held.budget.failed(error))?;
        *length += octets.len() as u64;
        Ok(())
    }

    fn rescue(&mut self, draft: &mut Draft, spooled: u64) -> Result<(), NoCopy> {
        let mut file = self.held.open_file()?;
        let length =
            draft.rescue(&mut file, spooled).map_err(|error| self.held.budget.failed(error))?;
        self.file = Some((file, length));
        Ok(())
    }
}
