//! The signals that end the program: SIGTERM and SIGINT.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::{flag, low_level};

/// What a shell reports for a program that SIGINT ended.
const INTERRUPTED: i32 = 128 + SIGINT;

/// Becomes readable when the program has to end.
pub struct Signals {
    pipe: UnixStream,
    interrupted: Arc<AtomicBool>,
}

impl Signals {
    /// Watches from now on. The first signal of either kind asks for the end; more SIGTERMs change
    /// nothing, for service managers send two; a second SIGINT is a person who will not wait.
    ///
    /// # Errors
    /// Those of sigaction(2) and socketpair(2).
    pub fn watch() -> io::Result<Signals> {
        let (pipe, sender) = UnixStream::pair()?;
        let interrupted = Arc::new(AtomicBool::new(false));
        flag::register_conditional_shutdown(SIGINT, INTERRUPTED, Arc::clone(&interrupted))?;
        flag::register(SIGINT, Arc::clone(&interrupted))?;
        // A limit on file sizes must cost a temporary file, not the program.
        flag::register(nix::libc::SIGXFSZ, Arc::default())?;
        low_level::pipe::register(SIGINT, sender.try_clone()?)?;
        low_level::pipe::register(SIGTERM, sender)?;
        Ok(Signals { pipe, interrupted })
    }

    /// The name of the signal that came.
    pub fn name(&self) -> &'static str {
        if self.interrupted.load(Ordering::Relaxed) { "SIGINT" } else { "SIGTERM" }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}
