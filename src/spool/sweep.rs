//! What a crash has left, settled at the start. The table at the head of [`super`] has the states.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::claim::{Owed, read_mail, seconds};
use super::reader::files_of;
use super::{Entry, MAIL, Spool, TO, ignore_missing, is_there, remove_abandoned};
use crate::message::QueueId;

/// An hour is left alone while somebody may just be committing to it.
const YOUNG: Duration = Duration::from_secs(2 * 3600);

/// What there is, by backup.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Census {
    /// Copies that are owed.
    pub owed: BTreeMap<String, u64>,
}

impl Spool {
    /// Removes what was never committed or is owed to nobody, and counts the rest. To be called
    /// once, at the start of a process that stays; others may be at work meanwhile.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn sweep(&self, backups: &[String]) -> io::Result<Census> {
        self.sweep_drafts()?;
        self.sweep_holds()?;
        let mut census = Census::default();
        for (hour, folder) in self.hours()? {
            for file in files_of(&folder)?.into_iter().flatten() {
                let name = file?.file_name();
                let Some(name) = name.to_str() else { continue };
                if let Some(id) = name.strip_suffix(MAIL).and_then(QueueId::parse) {
                    self.sweep_mail(&folder, id, backups)?;
                } else if let Some((id, backup)) = name.split_once(TO)
                    && let Some(id) = QueueId::parse(id)
                    && self.sweep_copy(Entry { hour, id }, backup)?
                {
                    *census.owed.entry(backup.into()).or_default() += 1;
                }
            }
            ignore_missing(remove_hour(&folder))?;
        }
        self.sweep_failed(backups)?;
        Ok(census)
    }

    /// Messages whose last copy was just being put here or taken out.
    fn sweep_failed(&self, backups: &[String]) -> io::Result<()> {
        let _alone = self.lock_failed()?;
        for file in fs::read_dir(self.failed())? {
            let name = file?.file_name();
            let id = name.to_str().and_then(|name| name.strip_suffix(MAIL));
            if let Some(id) = id.and_then(QueueId::parse) {
                self.sweep_mail(&self.failed(), id, backups)?;
            }
        }
        Ok(())
    }

    /// Holds that are over: who wrote them may not be there to end them.
    fn sweep_holds(&self) -> io::Result<()> {
        for file in fs::read_dir(self.holds())? {
            let path = file?.path();
            let state = fs::read_to_string(&path).ok().and_then(|text| Owed::parse(&text));
            // What says no time is nothing of ours.
            if state.and_then(|state| state.next).is_some_and(|next| next <= SystemTime::now()) {
                ignore_missing(fs::remove_file(path))?;
            }
        }
        Ok(())
    }

    /// Drafts whose writer is gone: nobody has them locked.
    fn sweep_drafts(&self) -> io::Result<()> {
        for file in fs::read_dir(self.tmp())? {
            let path = file?.path();
            let about = fs::symlink_metadata(&path);
            let Some(about) = about.ok().filter(fs::Metadata::is_file) else { continue };
            // States that are about to be put in place are never locked, and there for a moment. Their
            // time of modification is that of the next attempt.
            let age = seconds(SystemTime::now()).cast_signed().saturating_sub(about.ctime());
            let is_young = age < 60;
            let is_draft = path.file_name().and_then(|name| name.to_str()).and_then(QueueId::parse);
            if is_draft.is_none() && is_young {
                continue;
            }
            remove_abandoned(&path)?;
        }
        Ok(())
    }

    /// False, and removed, when there is no message to a copy: its writer is gone before the
    /// commit, or is just about to make it.
    fn sweep_copy(&self, entry: Entry, backup: &str) -> io::Result<bool> {
        let is_committed = || is_there(&self.mail(entry));
        // In this order: the message moves from the one place to the other.
        if is_committed() || is_there(&self.tmp().join(entry.id.to_string())) || is_committed() {
            return Ok(true);
        }
        ignore_missing(fs::remove_file(self.copy(entry, backup)))?;
        Ok(false)
    }

    /// Removes a message that is owed to nobody. The `backups` of today are looked for first, then
    /// those of its own time, which is enough for nearly all; before anything is removed the whole
    /// folder is looked through.
    fn sweep_mail(&self, folder: &Path, id: QueueId, backups: &[String]) -> io::Result<()> {
        let start = format!("{id}{TO}");
        let is_owed = |backup: &String| is_there(&folder.join(format!("{start}{backup}")));
        if backups.iter().any(is_owed) {
            return Ok(());
        }
        let path = folder.join(format!("{id}{MAIL}"));
        if read_mail(&path).is_ok_and(|mail| mail.backups.iter().any(is_owed)) {
            return Ok(());
        }
        // Somebody is just putting it there.
        if is_there(&self.tmp().join(id.to_string())) {
            return Ok(());
        }
        for file in files_of(folder)?.into_iter().flatten() {
            if file?.file_name().to_str().is_some_and(|name| name.starts_with(&start)) {
                return Ok(());
            }
        }
        ignore_missing(fs::remove_file(path))
    }
}

/// Removes an hour that is over, when nothing is left of it.
pub(super) fn remove_hour(folder: &Path) -> io::Result<()> {
    let is_old = fs::metadata(folder)?
        .modified()
        .is_ok_and(|at| SystemTime::now().duration_since(at).is_ok_and(|age| age > YOUNG));
    if is_old {
        // Fails when something is in it, as it should.
        let _ = fs::remove_dir(folder);
    }
    Ok(())
}
