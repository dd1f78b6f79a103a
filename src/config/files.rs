//! Who may write, and read, the configuration and what it names.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

use nix::unistd::Uid;

/// Who can write the configuration decides where all mail goes: that must be no one else.
pub fn is_trusted(file: &Metadata, service: Option<Uid>) -> Result<(), String> {
    if let Some(owner) = stranger(file, service) {
        return Err(format!(
            "it belongs to user {owner}, who could have all mail sent elsewhere; make it root's: \
             chown root"
        ));
    }
    // A group of one's own is harmless, but root can have no friends that it does not know.
    let others = if Uid::effective().is_root() { 0o022 } else { 0o002 };
    match file.mode() & others {
        0 => Ok(()),
        _ => Err(format!(
            "others may write it (mode {:04o}), and could have all mail sent elsewhere; \
             chmod go-w",
            file.mode() & 0o7777
        )),
    }
}

/// A secret is read by its owner, and by a group that was made for that. Root who does not become
/// somebody looks after a service whose user it does not know: it may be anybody.
#[cfg(feature = "tls")]
pub fn is_secret(file: &Metadata, service: Option<Uid>) -> Result<(), String> {
    let knows_who = service.is_some() || !Uid::effective().is_root();
    if let Some(owner) = stranger(file, service).filter(|_| knows_who) {
        return Err(format!(
            "it belongs to user {owner}, who could read the secret in it; make it root's: chown root"
        ));
    }
    match file.mode() & 0o027 {
        0 => Ok(()),
        _ => Err(format!(
            "others may read the secret in it, or change it (mode {:04o}); chmod g-w,o-rwx",
            file.mode() & 0o7777
        )),
    }
}

/// The owner, if it is neither root, nor who runs this, nor `service`, whom that will become.
fn stranger(file: &Metadata, service: Option<Uid>) -> Option<Uid> {
    let owner = Uid::from_raw(file.uid());
    let is_known = owner.is_root() || owner == Uid::effective() || Some(owner) == service;
    (!is_known).then_some(owner)
}
