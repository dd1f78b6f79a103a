//! Failures of system calls, made by strace(1), which has to be there.

use std::env;
use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::{Dup, binary};

/// Whether it can be used here. Under CI it has to be.
pub fn available() -> bool {
    let works = Command::new("strace").args(["-o", "/dev/null", "true"]).output();
    if works.is_ok_and(|output| output.status.success()) {
        return true;
    }
    assert!(env::var_os("CI").is_none(), "strace is missing or may not trace, and CI is set");
    skip("strace is missing or may not trace");
    false
}

/// Says that a test is not carried out.
pub fn skip(lacking: &str) {
    // Not eprintln: the test harness would keep the text of a test that passes.
    let notice = format!("SKIPPED, NOT TESTED: {lacking}\n");
    io::stderr().write_all(notice.as_bytes()).unwrap();
}

/// Starts the program under strace with these options. Only the calls that are tampered with are
/// traced, into `log`.
#[track_caller]
pub fn start(options: &[&str], log: &Path, yaml: &str) -> Dup {
    let under_strace = |command: &mut Command| {
        let mut strace = Command::new("strace");
        // -D: the process that was started becomes the program, and strace its grandchild, so that
        // signals and the end are the program's own.
        strace.args(["-D", "-f", "-qq", "-o"]).arg(log).args(options).arg(binary());
        strace.args(command.get_args());
        strace.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        strace.current_dir(command.get_current_dir().unwrap());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => strace.env(name, value),
                None => strace.env_remove(name),
            };
        }
        *command = strace;
    };
    Dup::start_with(under_strace, yaml)
}
