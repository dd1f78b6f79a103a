//! The signals that end the program: SIGTERM, SIGINT and, unless whoever started the program has it
//! ignored as nohup(1) does, SIGHUP.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::{flag, low_level};

/// What a shell reports for a program that SIGINT ended.
const INTERRUPTED: i32 = 128 + SIGINT;

/// Watches for the signals.
pub struct Signals {
    /// One has come. Set from within the signal's handler, so that it is seen wherever the program
    /// is just then.
    pub asked: Arc<AtomicBool>,
    interrupted: Arc<AtomicBool>,
    hung_up: Arc<AtomicBool>,
    all: Vec<i32>,
}

impl Signals {
    /// Watches from now on. The first signal of any kind asks for the end; more SIGTERMs change
    /// nothing, for service managers send two; a second SIGINT is a person who will not wait.
    ///
    /// # Errors
    /// Those of sigaction(2).
    pub fn watch() -> io::Result<Signals> {
        let (asked, interrupted, hung_up) = (Arc::default(), Arc::default(), Arc::default());
        let mut all = vec![SIGINT, SIGTERM];
        if !is_ignored(SIGHUP) {
            all.push(SIGHUP);
            flag::register(SIGHUP, Arc::clone(&hung_up))?;
        }
        flag::register_conditional_shutdown(SIGINT, INTERRUPTED, Arc::clone(&interrupted))?;
        flag::register(SIGINT, Arc::clone(&interrupted))?;
        for signal in &all {
            flag::register(*signal, Arc::clone(&asked))?;
        }
        // A limit on file sizes must cost a temporary file, not the program.
        flag::register(nix::libc::SIGXFSZ, Arc::default())?;
        Ok(Signals { asked, interrupted, hung_up, all })
    }

    /// For poll(2): becomes readable when one comes after this call.
    ///
    /// # Errors
    /// Those of sigaction(2) and socketpair(2).
    pub fn bell(&self) -> io::Result<UnixStream> {
        let (bell, rope) = UnixStream::pair()?;
        for signal in &self.all {
            low_level::pipe::register(*signal, rope.try_clone()?)?;
        }
        Ok(bell)
    }

    /// One has come.
    pub fn came(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    /// The name of the one that came.
    pub fn name(&self) -> &'static str {
        match (self.interrupted.load(Ordering::Relaxed), self.hung_up.load(Ordering::Relaxed)) {
            (true, _) => "SIGINT",
            (false, true) => "SIGHUP",
            (false, false) => "SIGTERM",
        }
    }
}

/// The signal was ignored before this program began (proc(5), SigIgn). Where that cannot be found
/// out it was not.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal - 1) & 1 == 1
}
