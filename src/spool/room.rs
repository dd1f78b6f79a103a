//! How much there is room for.
//!
//! Two limits: `relay.spool_max_bytes` for the messages that lie here, and a reserve of free disk,
//! for a full disk stops more than this program. `draft` asks before it begins a message.

use std::fs;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::statvfs::statvfs;

use super::{MAIL, Spool};

/// Free space that is left to others, in octets.
const RESERVE: u64 = 64 * 1024 * 1024;

/// The messages are counted again after this time, for other processes come and go …
const RECOUNT: Duration = Duration::from_secs(60);

/// … or after this, when there seems to be no room: they may have gone.
const RECOUNT_FULL: Duration = Duration::from_secs(5);

/// What the messages took when they were last counted, and what has come since.
#[derive(Debug, Default)]
pub(super) struct Used(Mutex<Option<(Instant, u64)>>);

impl Spool {
    /// There is room for one more message, as far as can be said before it has come.
    ///
    /// # Errors
    /// `StorageFull` with the limit that says no; those of counting.
    pub(super) fn has_room(&self) -> io::Result<()> {
        let full = |text| Err(io::Error::new(io::ErrorKind::StorageFull, text));
        let system = statvfs(&self.tmp())?;
        let free = system.blocks_available().saturating_mul(system.fragment_size());
        if free < RESERVE {
            return full(format!("{free} octets are free there, and {RESERVE} are left to others"));
        }
        let most = self.settings.max_bytes;
        if most > 0 && self.used(RECOUNT)? >= most && self.used(RECOUNT_FULL)? >= most {
            return full(format!("relay.spool_max_bytes, {most} octets, are in use"));
        }
        Ok(())
    }

    /// So many octets have been added.
    pub(super) fn has_grown(&self, octets: u64) {
        let mut used = self.used.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, used)) = &mut *used {
            *used += octets;
        }
    }

    /// What the messages take, by a count that is not older than `age`.
    fn used(&self, age: Duration) -> io::Result<u64> {
        let mut used = self.used.0.lock().unwrap_or_else(PoisonError::into_inner);
        match *used {
            Some((at, used)) if at.elapsed() < age => Ok(used),
            _ => {
                let counted = self.octets()?;
                *used = Some((Instant::now(), counted));
                Ok(counted)
            }
        }
    }

    fn octets(&self) -> io::Result<u64> {
        let hours = self.hours()?.into_iter().map(|(_, folder)| folder);
        let mut sum = 0;
        for folder in hours.chain([self.failed()]) {
            for file in fs::read_dir(folder)? {
                let file = file?;
                if file.file_name().to_str().is_some_and(|name| name.ends_with(MAIL)) {
                    // One that goes meanwhile takes nothing.
                    sum += file.metadata().map_or(0, |about| about.len());
                }
            }
        }
        Ok(sum)
    }
}
