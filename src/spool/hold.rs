//! Backups that are down, for all processes on one spool.
//!
//! `hold/BACKUP` is there while a backup is held: until the time in it nobody tries that backup.
//! The delivery agents write it when a backup fails as a whole, and remove it when it answers.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::SystemTime;

use super::claim::{Owed, wait_for, write_state};
use super::{Spool, ignore_missing, lock_folder};

impl Spool {
    /// Nobody tries `backup` before `until`, because of `reply`.
    ///
    /// # Errors
    /// Those of the file system: other processes go on trying.
    pub fn hold(&self, backup: &str, until: SystemTime, reply: &str) -> io::Result<()> {
        // Several may find at the same time that it is down.
        let _alone = lock_folder(&self.holds())?;
        let state = Owed { next: Some(until), reply: reply.into(), ..Owed::default() };
        write_state(self, &self.hold_path(backup), &state, "")
    }

    /// Until when `backup` is held, and why; `None` when it may be tried.
    pub fn held(&self, backup: &str) -> Option<(SystemTime, String)> {
        let state = Owed::parse(&fs::read_to_string(self.hold_path(backup)).ok()?)?;
        let until = state.next.filter(|until| !wait_for(*until).is_zero())?;
        Some((until, state.reply))
    }

    /// `backup` has answered.
    ///
    /// # Errors
    /// Those of the file system: others wait in vain until the hold ends by itself.
    pub fn release(&self, backup: &str) -> io::Result<()> {
        ignore_missing(fs::remove_file(self.hold_path(backup)))
    }

    fn hold_path(&self, backup: &str) -> PathBuf {
        self.holds().join(backup)
    }
}
