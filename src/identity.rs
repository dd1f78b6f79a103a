//! Who we are, to clients and servers: a name, and which of all running programs.
//!
//! The greeting has both. A server that greets with our own instance is ourselves, by whatever
//! address we came to it: mail would go in circles.

use std::fs;
use std::hash::{BuildHasher, DefaultHasher, Hash, Hasher, RandomState};
use std::io;
use std::os::unix::fs::MetadataExt;

use crate::config::Config;
use crate::smtp::reply::Reply;

/// The name in greeting and EHLO, and the instance.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Our name, `smtp.domain`.
    pub domain: String,
    instance: String,
}

impl Identity {
    /// A process that is there for all clients: its instance is random.
    pub fn new(domain: &str) -> Identity {
        Identity::of(domain, RandomState::new().hash_one(domain))
    }

    /// A process for one client. Mail in circles comes to another process of the same kind: its
    /// instance is that of all which send the same way on this host. Where that cannot be told, it
    /// is random.
    pub fn for_one(config: &Config) -> Identity {
        match same_way(config) {
            Ok(instance) => Identity::of(&config.domain, instance),
            Err(_) => Identity::new(&config.domain),
        }
    }

    fn of(domain: &str, instance: u64) -> Identity {
        Identity { domain: domain.into(), instance: format!("{instance:016x}") }
    }

    /// The text of our greeting.
    pub fn greeting(&self) -> String {
        format!("{} ESMTP smtp-dup {}", self.domain, self.instance)
    }

    /// A server that greets like this is ourselves.
    pub fn greets(&self, greeting: &Reply) -> bool {
        greeting
            .texts()
            .flat_map(|text| text.split(|&o| o == b' '))
            .any(|word| word == self.instance.as_bytes())
    }
}

/// A number that is the same for all processes of this host that have the same destinations. If one of these is such a process, it is its own destination as well.
fn same_way(config: &Config) -> io::Result<u64> {
    let mut hasher = DefaultHasher::new();
    // A sandbox may hide the first.
    let host = fs::read("/proc/sys/kernel/random/boot_id").or_else(|_| fs::read("/etc/machine-id"));
    host?.hash(&mut hasher);
    // A container may know other hosts by the same names.
    fs::metadata("/proc/self/ns/net")?.ino().hash(&mut hasher);
    for destination in config.backups.iter().chain([&config.primary]) {
        destination.to_string().hash(&mut hasher);
    }
    Ok(hasher.finish())
}
