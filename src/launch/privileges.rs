//! Giving up root, and the rest of the file system.
//!
//! `main` calls [`confine`] once, when everything that needs root is open and before there is any
//! thread.

use std::ffi::CString;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use nix::unistd::{
    Gid, Group, Uid, User as Entry, chdir, chroot, initgroups, setgid, setgroups, setuid,
};

/// A user to become, who is not root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Its number.
    pub uid: Uid,
    gid: Gid,
    name: String,
}

impl User {
    /// Looks up `name` or `name:group`, as spawn(8) and pipe(8) write it. Without a group it is
    /// the user's own.
    ///
    /// # Errors
    /// A text that says what is wrong and what to do.
    pub fn find(text: &str) -> Result<User, String> {
        let (name, group) = match text.split_once(':') {
            Some((name, group)) => (name, Some(group)),
            None => (text, None),
        };
        let entry = Entry::from_name(name)
            .map_err(|error| format!("user {name}: {error}"))?
            .ok_or_else(|| format!("user {name} does not exist; create it or name another"))?;
        let gid = match group {
            None => entry.gid,
            Some(group) => {
                Group::from_name(group)
                    .map_err(|error| format!("group {group}: {error}"))?
                    .ok_or_else(|| format!("group {group} does not exist; create it"))?
                    .gid
            }
        };
        if entry.uid.is_root() {
            return Err(format!("user {name} is root; name a user without privileges"));
        }
        Ok(User { uid: entry.uid, gid, name: name.into() })
    }
}

/// Becomes the user whose file or folder `path` is, if this is root: what root makes in that folder
/// would be in the user's way, and what root does by that file must be no more than the user could.
///
/// # Errors
/// Those of stat(2), and of the step that failed.
pub fn become_owner(path: &Path) -> std::io::Result<()> {
    let about = std::fs::metadata(path)?;
    let uid = Uid::from_raw(about.uid());
    if !Uid::effective().is_root() || uid.is_root() {
        return Ok(());
    }
    // The user's own group: that of the file may still be root's.
    let gid = Entry::from_uid(uid)?.map_or(Gid::from_raw(about.gid()), |entry| entry.gid);
    setgroups(&[])?;
    setgid(gid)?;
    setuid(uid)?;
    Ok(())
}

/// Becomes `user` for good, with its supplementary groups, within `root` if there is one. Someone
/// who is that user already stays it.
///
/// # Errors
/// A text that says which step failed.
pub fn confine(user: Option<&User>, root: Option<&Path>) -> Result<(), String> {
    let is_already = user.is_none_or(|user| user.uid == Uid::effective());
    if let Some(user) = user.filter(|_| !is_already) {
        let name = CString::new(user.name.as_str()).map_err(|error| error.to_string())?;
        // Before chroot, which hides the group file.
        initgroups(&name, user.gid).map_err(|error| failed(user, "initgroups", error))?;
    }
    if let Some(root) = root {
        let failed = |step: &str, error| format!("{step} {}: {error}", root.display());
        chroot(root).map_err(|error| failed("chroot", error))?;
        chdir("/").map_err(|error| failed("chdir to / in", error))?;
    }
    if let Some(user) = user.filter(|_| !is_already) {
        setgid(user.gid).map_err(|error| failed(user, "setgid", error))?;
        setuid(user.uid).map_err(|error| failed(user, "setuid", error))?;
    }
    Ok(())
}

/// A folder as a process sees it that has `root` for its root.
///
/// # Errors
/// A text, when the folder is not below it, or cannot be told to be.
pub fn inside(root: &Path, folder: &Path) -> Result<PathBuf, String> {
    if folder.components().any(|part| part == Component::ParentDir) {
        return Err(format!("{}: write it without ..", folder.display()));
    }
    match folder.strip_prefix(root) {
        Ok(inside) => Ok(Path::new("/").join(inside)),
        Err(_) => Err(format!(
            "{} is not below {}, which is all that this service can see: name a folder below it, \
             or write n for chroot in master.cf",
            folder.display(),
            root.display()
        )),
    }
}

fn failed(user: &User, step: &str, error: nix::Error) -> String {
    format!("cannot become user {}: {step}: {error}; only root can change the user", user.name)
}
