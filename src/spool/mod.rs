//! Copies on disk: no copy is lost, whatever dies when.
//!
//! `smtp::session` stores a message here while it streams and commits it before its client hears
//! 250; the delivery agents of any number of processes take copies out ([`claim`], [`reader`]).
//! smtp-dup-spool(5) describes the same files for people.
//!
//! ```text
//! tmp/ID                      being written, locked by its writer
//! queue/2026112309/           one folder an hour (UTC), for an order that is roughly that of time
//!     ID.mail                 envelope and body as batch SMTP (RFC 2442), with XFORWARD before
//!                             MAIL where the client is known; never changed
//!     ID.to.new.example:25    what that backup is still owed; empty: all, and not tried yet
//! failed/                     the same pair, with the replies that refused
//! damaged/                    what could not be read
//! hold/new.example:25         that backup is down: the next probe, the last reply
//! ```
//!
//! A message is committed by the rename of `tmp/ID` to `ID.mail`. In this order:
//!
//! | step | after a crash behind it | what [`Spool::sweep`] does |
//! |---|---|---|
//! | `tmp/ID` is written | a file in `tmp/` that nobody has locked | removes it: no 250 was said |
//! | it is fsynced | the same | the same |
//! | `ID.to.*` are made | these too, without `ID.mail` | removes them: no 250 was said |
//! | `tmp/ID` becomes `ID.mail` | a message that is owed | nothing: it is delivered. The primary has it; the client did not hear 250 and sends again |
//! | the folder is fsynced | the same, after a power loss too | nothing |
//! | 250 | the same | nothing |
//! | a backup has it: `ID.to.B` goes | the others stay owed | nothing |
//! | the last `ID.to.*` goes | `ID.mail` that is owed to nobody | removes it |
//! | `ID.mail` goes | nothing is left | |
//!
//! Between a backup's 250 and the removal of `ID.to.B` a crash makes that backup get the copy
//! twice: copies are at-least-once.
//!
//! A claim is an exclusive flock(2) on `ID.to.B`. A new state of it is a new file, put in place by
//! rename, so that a lock may turn out to be on a file that is no more: that is looked at after
//! locking. Whoever removes the last `ID.to.*` removes `ID.mail`; which there can be is written in
//! `ID.mail` itself, so that nobody has to read the folder for it.

pub mod claim;
pub mod draft;
pub mod hold;
pub mod inventory;
pub mod reader;
mod room;
mod sweep;

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

pub use self::claim::seconds;

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::Uid;

use crate::message::QueueId;
use crate::relay::destination::Destination;

/// What stands between the id and the backup in the name of a copy.
const TO: &str = ".to.";

/// The end of the name of a message.
const MAIL: &str = ".mail";

/// How long anybody waits for who has `failed/` or `hold/` to itself.
const LONGEST_LOCK: Duration = Duration::from_secs(10);

/// A folder of spooled messages, shared by any number of processes of one user.
#[derive(Debug)]
pub struct Spool {
    root: PathBuf,
    settings: Settings,
    used: room::Used,
    /// The last folder of an hour whose name is known to be durable.
    durable_hour: Mutex<u32>,
}

/// What the configuration says of the spool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// `relay.spool`.
    pub folder: PathBuf,
    /// `relay.spool_required`: no mail without a place for its copies.
    pub required: bool,
    /// `relay.retry_for_seconds`: a copy that is older goes to `failed/`.
    pub retry_for: Duration,
    /// `relay.spool_max_bytes`: octets of messages; 0 for as many as there are.
    pub max_bytes: u64,
}

impl Settings {
    /// Says what is wrong with the folder.
    pub fn wrong(&self, what: &impl std::fmt::Display) -> String {
        format!("relay.spool: {}: {what}", self.folder.display())
    }

    /// Says that there is no folder, and cannot be.
    pub fn missing(&self, error: &io::Error) -> String {
        let remedy = "make it, with mode 700, for the user that smtp-dup runs as";
        self.wrong(&format!("{error}; {remedy}"))
    }
}

/// A message in the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Entry {
    /// The hour of its commit, as a number like 2026112309.
    hour: u32,
    /// Its name.
    pub id: QueueId,
}

impl Spool {
    /// Opens the spool, and makes it where it is not there yet.
    ///
    /// # Errors
    /// A text that says what is wrong with the folder and what to do.
    pub fn open(settings: &Settings) -> Result<Spool, String> {
        let root = settings.folder.clone();
        let wrong = |what: String| settings.wrong(&what);
        let failed = |error: io::Error| wrong(error.to_string());
        make_folder(&root).map_err(|error| settings.missing(&error))?;
        let folder = owned(&root)?;
        if folder.mode() & 0o077 != 0 {
            return Err(wrong(format!(
                "others may look into it (mode {:04o}); chmod 700",
                folder.mode() & 0o7777
            )));
        }
        let mut is_new = false;
        for name in ["tmp", "queue", "failed", "damaged", "hold"] {
            is_new |= make_folder(&root.join(name)).map_err(failed)?;
            owned(&root.join(name))?;
        }
        // Not each time: a process that is there for one client has no time for it.
        if is_new {
            sync_folder(&root).map_err(failed)?;
        }
        let used = room::Used::default();
        let settings = settings.clone();
        let spool = Spool { root, settings, used, durable_hour: Mutex::default() };
        spool.try_locks()?;
        Ok(spool)
    }

    /// Makes sure that a lock keeps others out. On some network file systems it does not. Where
    /// no file can be made, for a full disk, that is said of each message, whose copies are then
    /// held in memory: no reason to keep mail out.
    fn try_locks(&self) -> Result<(), String> {
        let path = self.tmp().join(format!("lock-{}", std::process::id()));
        let lock = |file| Flock::lock(file, FlockArg::LockExclusiveNonblock);
        // Opened as a copy is when it is claimed: for NFS it makes a difference whether a file that
        // is locked can be written.
        let open = || create(&path, true).and_then(|_| claim::open(&path));
        let (Ok(first), Ok(second)) = (open(), open()) else { return Ok(()) };
        let (first, second) = (lock(first), lock(second));
        // One that stays is swept away.
        let _ = fs::remove_file(&path);
        match (first, second) {
            (Ok(_), Err(_)) => Ok(()),
            _ => Err(format!(
                "relay.spool: {}: flock(2) does not work on this file system; choose a local one",
                self.root.display()
            )),
        }
    }

    /// What the configuration says of it.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    fn tmp(&self) -> PathBuf {
        self.root.join("tmp")
    }

    fn queue(&self) -> PathBuf {
        self.root.join("queue")
    }

    fn failed(&self) -> PathBuf {
        self.root.join("failed")
    }

    fn holds(&self) -> PathBuf {
        self.root.join("hold")
    }

    fn hour(&self, entry: Entry) -> PathBuf {
        self.queue().join(format!("{:010}", entry.hour))
    }

    fn mail(&self, entry: Entry) -> PathBuf {
        self.hour(entry).join(format!("{}{MAIL}", entry.id))
    }

    fn copy(&self, entry: Entry, backup: &str) -> PathBuf {
        self.hour(entry).join(format!("{}{TO}{backup}", entry.id))
    }

    /// Makes sure that the folder for a message is there, and stays. Whoever finds that another has
    /// just made it cannot know whether that has been synced yet, so each process does it once.
    fn ready_hour(&self, entry: Entry) -> io::Result<()> {
        let mut durable = self.durable_hour.lock().unwrap_or_else(PoisonError::into_inner);
        // An hour that was over long ago may have been removed.
        if make_folder(&self.hour(entry))? || *durable != entry.hour {
            sync_folder(&self.queue())?;
            *durable = entry.hour;
        }
        Ok(())
    }

    /// Makes `tmp/ID` and locks it: nobody else makes a message of this name meanwhile, or takes
    /// what there is of it for the remains of a crash. `AlreadyExists` when somebody else has it.
    fn reserve(&self, id: QueueId) -> io::Result<(PathBuf, Flock<File>)> {
        let path = self.tmp().join(id.to_string());
        let file = match create(&path, false) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if !remove_abandoned(&path)? {
                    return Err(error);
                }
                create(&path, false)?
            }
            made => made?,
        };
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(file) if is_still(&path, &file) => Ok((path, file)),
            // Who came between the two has taken it for abandoned.
            Ok(_) | Err((_, nix::Error::EWOULDBLOCK)) => Err(io::ErrorKind::AlreadyExists.into()),
            Err((_, error)) => Err(error.into()),
        }
    }

    /// Whoever puts something into `failed/`, or takes it out, is alone there: a message must not
    /// go with its last copy when another is just coming.
    fn lock_failed(&self) -> io::Result<Flock<File>> {
        lock_folder(&self.failed())
    }

    /// Removes a message that is owed to nobody any more.
    fn settle(&self, entry: Entry, backups: &[String]) -> io::Result<()> {
        if backups.iter().any(|backup| is_there(&self.copy(entry, backup))) {
            return Ok(());
        }
        ignore_missing(fs::remove_file(self.mail(entry)))
    }
}

/// Copies for a backup of this name can be files: longer names no file system has (NAME_MAX).
pub fn is_fit(backup: &str) -> bool {
    const LONGEST: usize = 255;
    backup.len() + "5F3A9C20B1".len() + TO.len() <= LONGEST
}

/// The backups' names as they stand in file names.
pub fn names(backups: &[Destination]) -> Vec<String> {
    backups.iter().map(Destination::to_string).collect()
}

/// What there is to know of a folder of the spool, which has to belong to whoever runs this.
fn owned(path: &Path) -> Result<Metadata, String> {
    let wrong = |what: String| format!("relay.spool: {}: {what}", path.display());
    let folder = fs::metadata(path).map_err(|error| wrong(error.to_string()))?;
    let (owner, user) = (Uid::from_raw(folder.uid()), Uid::effective());
    match owner == user {
        true => Ok(folder),
        false => Err(wrong(format!(
            "belongs to user {owner}, and this is user {user}: run all of smtp-dup as one user, \
             or chown -R the whole spool to it"
        ))),
    }
}

/// Makes a folder that is for its owner alone; one that is there already stays as it is. True when
/// it is new.
fn make_folder(path: &Path) -> io::Result<bool> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// A file to write, for its owner alone; `again` when it may be there already.
fn create(path: &Path, again: bool) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600).custom_flags(nix::libc::O_NOFOLLOW);
    if again {
        options.create(true).truncate(true)
    } else {
        options.create_new(true)
    };
    options.open(path)
}

/// There is something of this name. A link is something, whether or not it leads anywhere.
fn is_there(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// A file that was opened has this name still.
fn is_still(path: &Path, file: &File) -> bool {
    fs::symlink_metadata(path)
        .is_ok_and(|now| file.metadata().is_ok_and(|own| own.ino() == now.ino()))
}

/// Removes a draft whose writer is gone: nobody has it locked. False when somebody has.
fn remove_abandoned(path: &Path) -> io::Result<bool> {
    let file = match claim::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
        opened => opened?,
    };
    let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { return Ok(false) };
    // Removed while it is locked: its writer, if there is one, looks at it afterwards.
    if is_still(path, &lock) {
        ignore_missing(fs::remove_file(path))?;
    }
    Ok(true)
}

/// Waits until nobody else has this folder, for as long as the lock is there. Each has it for
/// moments; one who is stopped meanwhile (SIGSTOP, a container that is frozen) is not waited for.
///
/// # Errors
/// `TimedOut`, and those of open(2).
fn lock_folder(path: &Path) -> io::Result<Flock<File>> {
    let end = Instant::now() + LONGEST_LOCK;
    let mut folder = File::open(path)?;
    let mut pause = Duration::from_millis(1);
    loop {
        match Flock::lock(folder, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((again, nix::Error::EWOULDBLOCK)) if Instant::now() < end => folder = again,
            Err((_, nix::Error::EWOULDBLOCK)) => {
                let text = format!(
                    "{}: another process has kept its lock for {} s, and may be stopped; find it \
                     with lslocks(8)",
                    path.display(),
                    LONGEST_LOCK.as_secs()
                );
                return Err(io::Error::new(io::ErrorKind::TimedOut, text));
            }
            Err((_, error)) => return Err(error.into()),
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Makes the names in a folder durable.
fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Removing what has gone already is done.
fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
