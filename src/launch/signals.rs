//! The signals that end the program: SIGTERM and SIGINT.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::{flag, low_level};

/// What a shell reports for a program that SIGINT ended.
const INTERRUPTED: i32 = 128 + SIGINT;

/// Watches for the signals.
pub struct Signals {
    /// One has come. Set from within the signal's handler, so that it is seen wherever the program
    /// is just then.
    pub asked: Arc<AtomicBool>,
    interrupted: Arc<AtomicBool>,
}

impl Signals {
    /// Watches from now on. The first signal of either kind asks for the end; more SIGTERMs change
    /// nothing, for service managers send two; a second SIGINT is a person who will not wait.
    ///
    /// # Errors
    /// Those of sigaction(2).
    pub fn watch() -> io::Result<Signals> {
        let (asked, interrupted) = (Arc::default(), Arc::default());
        flag::register_conditional_shutdown(SIGINT, INTERRUPTED, Arc::clone(&interrupted))?;
        flag::register(SIGINT, Arc::clone(&interrupted))?;
        for signal in [SIGINT, SIGTERM] {
            flag::register(signal, Arc::clone(&asked))?;
        }
        // A limit on file sizes must cost a temporary file, not the program.
        flag::register(nix::libc::SIGXFSZ, Arc::default())?;
        Ok(Signals { asked, interrupted })
    }

    /// For poll(2): becomes readable when one comes after this call.
    ///
    /// # Errors
    /// Those of sigaction(2) and socketpair(2).
    pub fn bell(&self) -> io::Result<UnixStream> {
        let (bell, rope) = UnixStream::pair()?;
        low_level::pipe::register(SIGINT, rope.try_clone()?)?;
        low_level::pipe::register(SIGTERM, rope)?;
        Ok(bell)
    }

    /// One has come.
    pub fn came(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    /// The name of the one that came.
    pub fn name(&self) -> &'static str {
        if self.interrupted.load(Ordering::Relaxed) { "SIGINT" } else { "SIGTERM" }
    }
}
