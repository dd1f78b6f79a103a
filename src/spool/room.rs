//! How much there is room for.
//!
//! Two limits: `relay.spool_max_bytes` for the messages that lie here, and a reserve of free disk,
//! for a full disk stops more than this program. `draft` asks before it begins a message.

use std::fs;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use nix::sys::statvfs::statvfs;

use super::reader::files_of;
use super::{MAIL, Spool};
use crate::message::QueueId;

/// Free space that is left to others, in octets.
const RESERVE: u64 = 64 * 1024 * 1024;

/// The messages are counted again after this time, for other processes come and go. That may take
/// seconds, and mail does not wait for it …
const RECOUNT: Duration = Duration::from_secs(60);

/// … or after this, when there seems to be no room: they may have gone.
const RECOUNT_FULL: Duration = Duration::from_secs(5);

/// What the messages take.
#[derive(Debug, Default)]
pub(super) struct Used {
    /// When they were last counted, what they took, and what has come since.
    last: Mutex<Option<(Instant, u64)>>,
    /// Whoever counts has this.
    counting: Mutex<()>,
    /// A thread counts, or is about to.
    has_thread: AtomicBool,
}

impl Used {
    fn last(&self) -> MutexGuard<'_, Option<(Instant, u64)>> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Spool {
    /// There is room for one more message, as far as can be said before it has come.
    ///
    /// # Errors
    /// `StorageFull` with the limit that says no; those of counting.
    pub(super) fn has_room(self: &Arc<Self>) -> io::Result<()> {
        let full = |text| Err(io::Error::new(io::ErrorKind::StorageFull, text));
        let system = statvfs(&self.tmp())?;
        let free = system.blocks_available().saturating_mul(system.fragment_size());
        if free < RESERVE {
            return full(format!(
                "{free} octets are free there, and {RESERVE} are left to others; make room"
            ));
        }
        let most = self.settings.max_bytes;
        if most > 0 && self.used(most)? >= most {
            return full(format!("relay.spool_max_bytes, {most} octets, are in use; raise it"));
        }
        Ok(())
    }

    /// A message that came now would find a place: there is room, and a file can be made.
    ///
    /// # Errors
    /// Those of [`Draft::begin`](super::draft::Draft::begin).
    pub fn has_place(self: &Arc<Self>) -> io::Result<()> {
        self.has_room()?;
        let (path, _file) = self.reserve_new(QueueId::next())?;
        fs::remove_file(path)
    }

    /// So many octets have been added.
    pub(super) fn has_grown(&self, octets: u64) {
        if let Some((_, used)) = &mut *self.used.last() {
            *used += octets;
        }
    }

    /// What the messages take, as far as is known; a thread finds out when that is old.
    fn used(self: &Arc<Self>, most: u64) -> io::Result<u64> {
        let Some((at, used)) = *self.used.last() else { return self.recount(RECOUNT) };
        let (age, is_full) = (at.elapsed(), used >= most);
        if is_full && age >= RECOUNT {
            // Mail that comes so seldom would find it full each time.
            return self.recount(RECOUNT);
        }
        if age >= if is_full { RECOUNT_FULL } else { RECOUNT } {
            self.recount_aside();
        }
        Ok(used)
    }

    /// Counts on a thread of its own, unless one does.
    fn recount_aside(self: &Arc<Self>) {
        if self.used.has_thread.swap(true, Ordering::Relaxed) {
            return;
        }
        let spool = Arc::clone(self);
        let count = move || {
            // What fails is tried again by who comes next.
            let _ = spool.recount(RECOUNT_FULL);
            spool.used.has_thread.store(false, Ordering::Relaxed);
        };
        if Builder::new().name("count".into()).spawn(count).is_err() {
            self.used.has_thread.store(false, Ordering::Relaxed);
        }
    }

    /// What the messages take, by a count that is not older than `age`.
    fn recount(&self, age: Duration) -> io::Result<u64> {
        let _alone = self.used.counting.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *self.used.last();
        if let Some((_, used)) = before.filter(|(at, _)| at.elapsed() < age) {
            return Ok(used);
        }
        let counted = self.octets()?;
        let mut last = self.used.last();
        // What came meanwhile may be in it or not: better twice.
        let came = last.zip(before).map_or(0, |((_, now), (_, before))| now.saturating_sub(before));
        *last = Some((Instant::now(), counted + came));
        Ok(counted + came)
    }

    fn octets(&self) -> io::Result<u64> {
        let hours = self.hours()?.into_iter().map(|(_, folder)| folder);
        let mut sum = 0;
        for folder in hours.chain([self.failed()]) {
            for file in files_of(&folder)?.into_iter().flatten() {
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
