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

use crate::smtp::envelope::Envelope;

/// A body above this many octets moves from memory to an unlinked temporary file.
pub const MEMORY_THRESHOLD: usize = 256 * 1024;

/// Octets counted for each message beside its body and its envelope.
const OVERHEAD: u64 = 512;

/// Names a message in the log: ten hexadecimal digits that grow with time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
        match folder.strip_prefix(root) {
            Ok(inside) => Ok(Scratch::Folder(Path::new("/").join(inside))),
            Err(_) => Err(format!(
                "TMPDIR={} is not below {}, which is all that this service can see: name a folder \
                 below it, leave TMPDIR unset, or write n for chroot in master.cf",
                folder.display(),
                root.display()
            )),
        }
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

    /// Takes a file, if there is one left to have.
    fn open_file(&mut self) -> Result<File, NoCopy> {
        if !take(&self.budget.files, 1, self.budget.most_files) {
            return Err(NoCopy::TooManyFiles(self.budget.most_files));
        }
        self.files += 1;
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
    /// A big one: an unlinked file and its length. Read with explicit offsets only, since all
    /// agents share it.
    File(File, u64),
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
    _held: Held,
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

/// Holds a body while it streams.
#[derive(Debug)]
pub struct Collector {
    kept: Result<Kept, NoCopy>,
}

#[derive(Debug)]
struct Kept {
    held: Held,
    file: Option<(File, u64)>,
}

impl Collector {
    /// Nothing held yet.
    pub fn new(budget: &Arc<Budget>) -> Collector {
        Collector { kept: Ok(Kept { held: Held::nothing(budget), file: None }) }
    }

    /// The body has grown by `octets`, which the caller still holds in memory. False when they
    /// need not be held, because there will be no copy.
    pub fn count(&mut self, octets: usize) -> bool {
        if let Ok(kept) = &mut self.kept
            && !kept.held.grow(octets as u64)
        {
            self.kept = Err(NoCopy::OverBudget(kept.held.budget.limit));
        }
        self.kept.is_ok()
    }

    /// Moves octets, counted before, to the temporary file.
    pub fn spill(&mut self, octets: &[u8]) {
        if let Ok(kept) = &mut self.kept
            && let Err(error) = kept.spill(octets)
        {
            self.kept = Err(error);
        }
    }

    /// The message is whole and the primary has accepted it; `rest` are the octets, counted
    /// before, that were not spilled.
    ///
    /// # Errors
    /// Why there is no copy.
    pub fn finish(
        mut self,
        id: QueueId,
        envelope: Envelope,
        rest: &[u8],
    ) -> Result<Message, NoCopy> {
        if self.kept.as_ref().is_ok_and(|kept| kept.file.is_some()) {
            self.spill(rest);
        }
        self.count((envelope.octets() + OVERHEAD) as usize);
        let Kept { held, file } = self.kept?;
        let body = match file {
            Some((file, length)) => Body::File(file, length),
            None => Body::Memory(rest.into()),
        };
        Ok(Message { id, envelope, body, accepted: Instant::now(), _held: held })
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
}
