//! A configuration: YAML, and behind each NUL a variable of the environment, as `NAME=value`.

use std::collections::HashSet;
use std::io::{Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use nix::libc::{addrinfo, c_char, c_int};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, fchmod};
use smtp_dup::config::{Config, Mistake};
use smtp_dup::relay::destination::Destination;

/// Nobody is asked for the names that come up here: no resolver is there to be tested.
#[unsafe(no_mangle)]
extern "C" fn getaddrinfo(
    _: *const c_char,
    _: *const c_char,
    _: *const addrinfo,
    _: *mut *mut addrinfo,
) -> c_int {
    nix::libc::EAI_NONAME
}

/// Reads these octets as a configuration.
///
/// # Panics
/// When one that is taken is out of its ranges, or a mistake is not one printable line.
pub fn run(octets: &[u8]) {
    let mut parts = octets.split(|&octet| octet == 0);
    let yaml = parts.next().unwrap_or_default();
    let variables: Vec<(String, String)> = parts
        .map(|part| String::from_utf8_lossy(part).into_owned())
        .filter_map(|part| part.split_once('=').map(|(name, value)| (name.into(), value.into())))
        .collect();
    match load(yaml, &variables) {
        Ok((config, _)) => {
            check(&config);
            if let Err(mistake) = config.refuse_circles(&config.listen) {
                is_one_line(&mistake.to_string());
            }
        }
        Err(mistake) => is_one_line(&mistake.to_string()),
    }
}

/// From a file that is in memory alone.
fn load(yaml: &[u8], variables: &[(String, String)]) -> Result<(Config, Vec<String>), Mistake> {
    static FILE: Mutex<Option<std::fs::File>> = Mutex::new(None);
    let mut file = FILE.lock().expect("no panic before");
    let file = file.get_or_insert_with(|| {
        let memory = memfd_create(c"config", MFdFlags::MFD_CLOEXEC).expect("a file in memory");
        fchmod(&memory, Mode::S_IRUSR | Mode::S_IWUSR).expect("its owner's");
        memory.into()
    });
    file.set_len(0).expect("an empty file");
    file.seek(SeekFrom::Start(0)).expect("its start");
    file.write_all(yaml).expect("room in it");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    Config::load(Some(&path), variables.iter().cloned(), None)
}

/// What smtp-dup.yaml(5) says of the values.
fn check(config: &Config) {
    let day = Duration::from_secs(1)..=Duration::from_secs(86_400);
    assert!((1..=100_000).contains(&config.max_connections));
    assert!((1..=1_000_000).contains(&config.max_recipients));
    assert!((1..=1000).contains(&config.backup_connections));
    assert!(config.max_message_size <= i64::MAX as u64);
    assert!(config.backup_memory <= i64::MAX as u64);
    let limits = config.limits;
    for time in [config.timeout, limits.connect, limits.command, limits.data] {
        assert!(day.contains(&time), "{time:?}");
    }
    assert!(!config.listen.is_empty());
    assert!(!config.domain.is_empty());
    assert!(!config.domain.contains(|c: char| c.is_whitespace() || c.is_control()));
    let servers = || config.backups.iter().chain([&config.primary]);
    let names: HashSet<String> = servers().map(Destination::to_string).collect();
    assert_eq!(names.len(), config.backups.len() + 1, "a name that is there twice: {names:?}");
    for name in names {
        assert_eq!(Destination::parse(&name).map(|again| again.to_string()).as_ref(), Ok(&name));
        // It stands in file names, commands, log lines.
        assert!(
            !name.contains(|c: char| c == '/' || c.is_whitespace() || c.is_control()),
            "{name}"
        );
    }
    if let Some(spool) = &config.spool {
        assert!(spool.folder.is_absolute());
        assert!(spool.retry_for >= Duration::from_secs(1));
        assert!(spool.retry_for <= Duration::from_secs(315_360_000));
        assert!(spool.max_bytes <= i64::MAX as u64);
    }
}

fn is_one_line(text: &str) {
    assert!(!text.is_empty() && !text.contains(char::is_control), "{text:?}");
}
