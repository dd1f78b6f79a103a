//! Any octets at all, from wherever octets come: the corpus of the fuzz targets, as a test.
//!
//! Each target is a function that takes octets and panics when a promise is broken: [`session`]
//! (what a client says), [`server`] (what a server says to the sending side), [`yaml`] and
//! [`spool`] (files). `make fuzz` runs them under cargo-fuzz, which looks for new octets that reach
//! new code; here they run on the kept corpus, which needs no fuzzer: seeds written by hand, what
//! fuzzing found worth keeping, and every input that has ever shown a bug.

mod dialogue;
mod primary;
mod rules;
mod server;
mod session;
mod spool;
mod transport;
mod yaml;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;

/// Runs a target on each file of its corpus. Says which one it was that failed.
fn replay(target: &str, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let mut files: Vec<_> =
        fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "no corpus in {}", folder.display());
    for file in files {
        let octets = fs::read(&file).unwrap();
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(&octets))) {
            eprintln!("this was {}", file.display());
            resume_unwind(panic);
        }
    }
}

#[test]
fn clients() {
    replay("session", session::run);
}

#[test]
fn servers() {
    replay("server", server::run);
}

#[test]
fn configurations() {
    replay("yaml", yaml::run);
}

#[test]
fn spool_files() {
    replay("spool", spool::run);
}
