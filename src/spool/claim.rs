//! One copy that is owed: taking it for an attempt, and what becomes of it.
//!
//! A delivery agent claims a copy, tries it, and says here how it went. While the claim is held no
//! other process touches the copy; when it is dropped without a word, nothing has changed.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::fcntl::{Flock, FlockArg};

use super::{Entry, MAIL, Spool, TO, create, ignore_missing, is_still, is_there, sync_folder};
use crate::message::QueueId;
use crate::smtp::command::{Command, Relayed};
use crate::smtp::envelope::{Envelope, Path as Address};
use crate::smtp::origin::Origin;

/// Longest line of an envelope in the spool, in octets: the names of all backups are one.
const MAX_LINE: u64 = 1 << 20;

/// Nothing is put off for longer, so what seems to be was put off, or written, while the clock was
/// wrong.
const LONGEST_WAIT: Duration = Duration::from_secs(2 * 3600);

/// A copy that this process alone may touch.
#[derive(Debug)]
pub struct Claim {
    spool: Arc<Spool>,
    entry: Entry,
    backup: String,
    /// What is owed of it.
    pub owed: Owed,
    _lock: Flock<File>,
}

/// The state of a copy, as it stands in its file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Owed {
    /// Attempts so far.
    pub attempts: u32,
    /// Not before this time.
    pub next: Option<SystemTime>,
    /// When it was sent again by hand: since then it counts as new.
    pub since: Option<SystemTime>,
    /// What the backup said last, or the failure.
    pub reply: String,
    /// The recipients, by their place in the envelope; `None` for all.
    pub places: Option<Vec<usize>>,
}

/// A message as it is read from the spool.
#[derive(Debug)]
pub struct Mail {
    /// Reverse-path and recipients.
    pub envelope: Envelope,
    /// Who can have a file of what it is owed.
    pub backups: Vec<String>,
    /// The open file …
    pub file: File,
    /// … where its body begins …
    pub start: u64,
    /// … and how long that is.
    pub length: u64,
    /// When it was written.
    pub arrived: SystemTime,
}

/// How taking a copy went.
#[derive(Debug)]
pub enum Claimed {
    /// It is ours.
    Yes(Claim),
    /// Somebody else is at it.
    Busy,
    /// It has been delivered, or dropped; or its message is not accepted yet.
    Gone,
}

impl Spool {
    /// Takes a copy, unless somebody has it.
    ///
    /// # Errors
    /// Those of the file system; `InvalidData` for a file that is no state of a copy, which was
    /// moved aside.
    pub fn claim(self: &Arc<Self>, entry: Entry, backup: &str) -> io::Result<Claimed> {
        // The names of its copies are there before a message is: it waits for the primary's word,
        // or its writer is gone.
        if !is_there(&self.mail(entry)) {
            return Ok(Claimed::Gone);
        }
        self.claim_path(entry, backup, &self.copy(entry, backup))
    }

    pub(super) fn claim_path(
        self: &Arc<Self>,
        entry: Entry,
        backup: &str,
        path: &Path,
    ) -> io::Result<Claimed> {
        let file = match open(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Claimed::Gone),
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                self.renew_state(path)?;
                return Err(error);
            }
            other => other?,
        };
        let lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((_, nix::Error::EWOULDBLOCK)) => return Ok(Claimed::Busy),
            Err((_, error)) => return Err(error.into()),
        };
        // Somebody may have replaced or removed it between open and lock.
        if !is_still(path, &lock) {
            return Ok(Claimed::Gone);
        }
        let mut text = String::new();
        let read = (&*lock).take(64 << 20).read_to_string(&mut text);
        let Some(owed) = read.ok().and_then(|_| Owed::parse(&text)) else {
            self.renew_state(path)?;
            return Err(damaged(path));
        };
        let spool = Arc::clone(self);
        Ok(Claimed::Yes(Claim { spool, entry, backup: backup.into(), owed, _lock: lock }))
    }

    /// Reads the envelope of a message, and where its body is.
    ///
    /// # Errors
    /// Those of the file system; `InvalidData` for a file that is no message of ours, which was
    /// moved aside.
    pub fn load(&self, entry: Entry) -> io::Result<Mail> {
        let path = self.mail(entry);
        read_mail(&path).inspect_err(|error| {
            if error.kind() == ErrorKind::InvalidData {
                // An error line follows; that it could not be moved changes nothing about it.
                let _ = self.move_aside(&path);
            }
        })
    }

    /// A state that cannot be read is moved aside, and all is owed again: twice is better than
    /// never.
    fn renew_state(&self, path: &Path) -> io::Result<()> {
        self.move_aside(path)?;
        create(path, false).map(drop)
    }

    /// Gives a message a place in `failed/`: under its own name, or another if there is a message
    /// of that name already (names begin anew after twelve days).
    fn link_failed(&self, entry: Entry) -> io::Result<QueueId> {
        let from = self.mail(entry);
        let own = fs::metadata(&from)?.ino();
        let mut id = entry.id;
        loop {
            let to = self.failed().join(format!("{id}{MAIL}"));
            match fs::hard_link(&from, &to) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    if fs::metadata(&to).is_ok_and(|other| other.ino() == own) {
                        return Ok(id);
                    }
                    id = QueueId::next();
                }
                linked => return linked.map(|()| id),
            }
        }
    }

    /// Moves a file that cannot be read out of the way, under its own name.
    pub(super) fn move_aside(&self, path: &Path) -> io::Result<()> {
        let name = path.file_name().unwrap_or(path.as_os_str());
        fs::rename(path, self.root.join("damaged").join(name))
    }
}

/// Opens a regular file, and nothing else: no link is followed, and no fifo waited for.
pub(super) fn open(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK;
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(|error| {
        match error.raw_os_error() {
            Some(nix::libc::ELOOP) => damaged(path),
            _ => error,
        }
    })?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(damaged(path)),
    }
}

fn damaged(path: &Path) -> io::Error {
    let text = format!("{} is not what it should be; moved to damaged/", path.display());
    io::Error::new(ErrorKind::InvalidData, text)
}

pub(super) fn read_mail(path: &Path) -> io::Result<Mail> {
    let wrong = || damaged(path);
    let file = open(path)?;
    let about = file.metadata()?;
    let mut reader = BufReader::new(&file);
    let (mut start, mut backups, mut origin) = (0, None, Origin::default());
    let (mut reverse_path, mut forward_paths) = (None, Vec::new());
    loop {
        let mut line = Vec::new();
        start += (&mut reader).take(MAX_LINE).read_until(b'\n', &mut line)? as u64;
        let line = line.strip_suffix(b"\r\n").ok_or_else(wrong)?;
        match Command::parse(line).map_err(|_| wrong())? {
            Command::Noop if backups.is_none() => {
                let text = String::from_utf8_lossy(line);
                backups = Some(text.split_whitespace().skip(1).map(Into::into).collect());
            }
            Command::Relayed(Relayed::Xforward(attributes)) if reverse_path.is_none() => {
                origin.take(&attributes);
            }
            Command::Relayed(Relayed::Mail(path)) if reverse_path.is_none() => {
                reverse_path = Some(path);
            }
            Command::Relayed(Relayed::Rcpt(path)) => forward_paths.push(path),
            Command::Relayed(Relayed::Data) => break,
            _ => return Err(wrong()),
        }
    }
    let length = about.len().checked_sub(start).ok_or_else(wrong)?;
    // A message that was torn has no end.
    let mut end = [0; 3];
    let mut tail = &file;
    tail.seek(SeekFrom::Start(about.len().saturating_sub(3)))?;
    tail.read_exact(&mut end)?;
    match (reverse_path, backups) {
        (Some(reverse_path), Some(backups))
            if end == *b".\r\n" && length >= 3 && !forward_paths.is_empty() =>
        {
            let arrived = about.modified().unwrap_or(UNIX_EPOCH);
            let envelope = Envelope { origin, reverse_path, forward_paths };
            Ok(Mail { envelope, backups, file, start, length, arrived })
        }
        _ => Err(wrong()),
    }
}

impl Claim {
    /// The message whose copy it is.
    pub fn entry(&self) -> Entry {
        self.entry
    }

    /// The message of this copy could not be read: one that was moved aside takes the copy along.
    /// Gives the error to be logged.
    pub fn without_mail(&self, error: io::Error) -> io::Error {
        if error.kind() == ErrorKind::InvalidData {
            // What cannot be moved is swept away at the next start.
            let _ = self.spool.move_aside(&self.path());
        }
        error
    }

    /// The backup has it, for all that were still owed it.
    ///
    /// # Errors
    /// Those of the file system: the copy may come a second time.
    pub fn delivered(&self, backups: &[String]) -> io::Result<()> {
        ignore_missing(fs::remove_file(self.path()))?;
        self.spool.settle(self.entry, backups)
    }

    /// Some of it is owed still: from now on `owed` is its state.
    ///
    /// # Errors
    /// Those of the file system: the state is then what it was.
    pub fn put_off(&self, owed: &Owed) -> io::Result<()> {
        let since = self.owed.since;
        write_state(&self.spool, &self.path(), &Owed { since, ..owed.clone() }, "")
    }

    /// The backup has refused these recipients for good: they are kept in `failed/`, with its
    /// words. What else is owed stays owed.
    ///
    /// # Errors
    /// Those of the file system: they stay owed then.
    pub fn refused(
        &self,
        mail: &Envelope,
        refused: &[(usize, String)],
        attempts: u32,
    ) -> io::Result<()> {
        let failed = self.spool.failed();
        let _alone = self.spool.lock_failed()?;
        let id = self.spool.link_failed(self.entry)?;
        let path = failed.join(format!("{id}{TO}{}", self.backup));
        // Others of the same message may have been refused before.
        let before = fs::read_to_string(&path).unwrap_or_default();
        let mut places = Owed::parse(&before).and_then(|owed| owed.places).unwrap_or_default();
        let mut notes: String =
            before.split_inclusive('\n').filter(|line| line.starts_with('#')).collect();
        for (place, reply) in refused {
            if !places.contains(place) {
                places.push(*place);
            }
            let recipient = mail.forward_paths.get(*place).map(Address::display);
            notes += &format!("# {place} {} {reply}\n", recipient.unwrap_or_default());
        }
        let reply = refused.last().map_or(String::new(), |(_, reply)| reply.clone());
        let owed = Owed { places: Some(places), reply, attempts, ..Owed::default() };
        write_state(&self.spool, &path, &owed, &notes)?;
        sync_folder(&failed)
    }

    fn path(&self) -> PathBuf {
        self.spool.copy(self.entry, &self.backup)
    }
}

/// Puts a new state in place of the old, whole at any time.
pub(super) fn write_state(spool: &Spool, path: &Path, owed: &Owed, notes: &str) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let new = spool.tmp().join(name);
    let mut file = create(&new, true)?;
    file.write_all(owed.text().as_bytes())?;
    file.write_all(notes.as_bytes())?;
    // A reader of the folder sees without opening it that it is not due.
    file.set_modified(owed.next.unwrap_or_else(SystemTime::now))?;
    // A name must never lead to less than this, or a power loss would make all owed again.
    file.sync_all()?;
    fs::rename(&new, path)
}

impl Owed {
    /// The file's text: a word and its value in each line. Lines with a # are for people.
    fn text(&self) -> String {
        let mut text = format!("attempts {}\n", self.attempts);
        if let Some(next) = self.next {
            text += &format!("next {}\n", seconds(next));
        }
        if let Some(since) = self.since {
            text += &format!("since {}\n", seconds(since));
        }
        if !self.reply.is_empty() {
            text += &format!("reply {}\n", in_a_line(&self.reply));
        }
        if let Some(places) = &self.places {
            let places = places.iter().map(usize::to_string).collect::<Vec<_>>();
            text += &format!("owed {}\n", places.join(" "));
        }
        text
    }

    pub(super) fn parse(text: &str) -> Option<Owed> {
        let mut owed = Owed::default();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let (word, value) = line.split_once(' ')?;
            match word {
                "attempts" => owed.attempts = value.parse().ok()?,
                "next" => owed.next = Some(time(value.parse().ok()?)),
                "since" => owed.since = Some(time(value.parse().ok()?)),
                "reply" => owed.reply = in_a_line(value),
                "owed" => {
                    let places = value.split(' ').map(str::parse).collect::<Result<Vec<_>, _>>();
                    owed.places = Some(places.ok()?);
                }
                _ => return None,
            }
        }
        Some(owed)
    }
}

/// A reply as the file has it.
fn in_a_line(reply: &str) -> String {
    reply.replace(['\r', '\n'], " ")
}

/// How long it is until a copy or a backup may be tried: nothing, when it may be by now, or when no
/// clock that was right can have said so.
pub fn wait_for(next: SystemTime) -> Duration {
    let left = next.duration_since(SystemTime::now()).unwrap_or_default();
    if left > LONGEST_WAIT { Duration::ZERO } else { left }
}

/// Seconds since 1970.
pub fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// As many seconds since 1970; what no clock can show is now.
pub(super) fn time(seconds: u64) -> SystemTime {
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or_else(SystemTime::now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_reads_as_it_was_written() {
        let owed = Owed {
            attempts: 3,
            next: Some(time(1_764_060_000)),
            since: Some(time(1_764_050_000)),
            reply: "450 4.2.0 greylisted".into(),
            places: Some(vec![0, 2]),
        };
        assert_eq!(Owed::parse(&(owed.text() + "# 2 <b@example.com> 550 no\n")), Some(owed));
        assert_eq!(Owed::parse(""), Some(Owed::default()));
    }

    #[test]
    fn a_clock_that_was_wrong_puts_nothing_off() {
        let now = SystemTime::now();
        let hour = Duration::from_secs(3600);
        assert!(wait_for(now + hour) > hour / 2);
        for next in [now - hour, now + 24 * hour, now + 24 * 365 * hour, UNIX_EPOCH] {
            assert_eq!(wait_for(next), Duration::ZERO, "{next:?}");
        }
    }

    #[test]
    fn what_is_no_state_is_none() {
        for text in ["attempts", "attempts x\n", "owed 1 x\n", "something else\n", "\0\n"] {
            assert_eq!(Owed::parse(text), None, "{text:?}");
        }
    }
}
