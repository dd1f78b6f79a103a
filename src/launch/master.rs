//! Started by Postfix's master(8), as an inet service that stays.
//!
//! `main` asks [`Master::found`] first of all. master starts the program at the first connection,
//! as root, with listening sockets and a channel on which it is told whether its child is free;
//! the channel closes when master reloads or ends. master starts no successor before the process
//! that it knows has exited, while what goes on here may take minutes. So there are two processes,
//! see [`Master::split`]: a keeper that master knows, without threads and without mail, and the
//! child that serves. On a reload the keeper leaves at once, and the child finishes what it has
//! begun while its successor serves already.
//!
//! master's arguments, descriptors and status messages are those of its master_spawn.c and
//! master_proto.h (Postfix 3.7).

use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockaddrLike, SockaddrStorage, getsockname};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};

use super::inherited::{Socket, adopt};
use super::privileges::inside;
use crate::logger::Place;

/// The pipe by which Postfix's own servers slow each other down. Not for us.
const FLOW: [i32; 2] = [3, 4];

/// The channel to master.
const CHANNEL: i32 = 5;

/// The first listening socket.
const LISTEN: i32 = 6;

/// Status messages.
const AVAILABLE: i32 = 1;
const TAKEN: i32 = 0;

/// The folder of main.cf, and whom Postfix's files belong to, where nothing else is said.
const CONFIG_DIRECTORY: &str = "/etc/postfix";
const MAIL_OWNER: &str = "postfix";

/// A process that master(8) started.
#[derive(Debug)]
pub struct Master {
    channel: UnixStream,
    generation: u32,
    /// The sockets of the service.
    pub listeners: Vec<TcpListener>,
    /// What the service's line in master.cf says.
    pub arguments: Arguments,
}

/// The arguments that master gives, and the words behind the command in master.cf.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Arguments {
    /// `-c`: master.cf has `y` for chroot.
    pub chroot: bool,
    /// `-v`, from master.cf.
    pub verbose: bool,
    /// `-s`: listening sockets.
    sockets: i32,
    /// `user=`.
    user: Option<String>,
    /// `directory=`.
    pub directory: Option<PathBuf>,
}

impl Master {
    /// What master left for this process; `None` when somebody else started it. `words` are the
    /// arguments behind the program's name.
    ///
    /// # Errors
    /// A text about a word that is not understood, or a socket that is not there.
    pub fn found(words: &[String]) -> Option<Result<Master, String>> {
        let generation = std::env::var("GENERATION").ok()?;
        let generation = u32::from_str_radix(&generation, 8).ok()?;
        let channel = adopt(CHANNEL).filter(is_unix).map(UnixStream::from)?;
        let Ok(Socket::Listener(first)) = Socket::new(adopt(LISTEN)?) else { return None };
        FLOW.into_iter().for_each(|number| drop(adopt(number)));
        let listeners = vec![first];
        Some(Arguments::read(words).and_then(|arguments| {
            Master { channel, generation, listeners, arguments }.with_all_sockets()
        }))
    }

    fn with_all_sockets(mut self) -> Result<Master, String> {
        for number in LISTEN + 1..LISTEN + self.arguments.sockets.max(1) {
            match adopt(number).map(Socket::new) {
                Some(Ok(Socket::Listener(listener))) => self.listeners.push(listener),
                _ => return Err(format!("descriptor {number}, from master(8), does not listen")),
            }
        }
        Ok(self)
    }

    /// Makes two processes of this one. Gives `None` to the child, which serves, with its end of
    /// the tie between the two; the keeper ends with the exit code for master when it has nothing
    /// left to wait for.
    ///
    /// # Errors
    /// Those of socketpair(2) and fork(2).
    pub fn split(self) -> io::Result<Role> {
        let (ours, childs) = UnixStream::pair()?;
        // A channel that is closed already tells of a reload that came meanwhile: the keeper will
        // find out, and leave to its successor what has not been accepted.
        let _ = self.tell(TAKEN).and_then(|()| self.tell(AVAILABLE));
        // SAFETY: there is one thread only, so that the child finds no lock held by another.
        match unsafe { fork() }? {
            ForkResult::Child => Ok(Role::Child(self.listeners, Tie(childs))),
            ForkResult::Parent { child } => {
                drop((childs, self.listeners));
                Ok(Role::Keeper(Keeper { channel: self.channel, tie: ours, child }))
            }
        }
    }

    /// Tells master how this process is. Both words at the start: master throttles a service for
    /// a minute when a process of it dies that was never heard of, and starts another at the next
    /// connection when it was.
    fn tell(&self, status: i32) -> io::Result<()> {
        let mut message = std::process::id().to_ne_bytes().to_vec();
        message.extend_from_slice(&self.generation.to_ne_bytes());
        message.extend_from_slice(&status.to_ne_bytes());
        (&self.channel).write_all(&message)
    }
}

/// Has something said by a process of its own, which may leave threads behind: here there must be
/// none before [`Master::split`].
///
/// # Errors
/// What it said, or what fork(2) did.
pub fn apart(say: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    let failed = |error: io::Error| format!("a process to look up names: {error}");
    let (mut ours, mut theirs) = UnixStream::pair().map_err(failed)?;
    // SAFETY: there is one thread only, so that the child finds no lock held by another.
    match unsafe { fork() }.map_err(|error| failed(error.into()))? {
        ForkResult::Child => {
            let said = say().err().unwrap_or_default();
            let _ = theirs.write_all(said.as_bytes());
            std::process::exit(0);
        }
        ForkResult::Parent { child } => {
            drop(theirs);
            let mut said = String::new();
            let heard = ours.read_to_string(&mut said);
            let _ = waitpid(child, None);
            heard.map_err(failed)?;
            if said.is_empty() { Ok(()) } else { Err(said) }
        }
    }
}

fn is_unix(descriptor: &OwnedFd) -> bool {
    getsockname::<SockaddrStorage>(descriptor.as_raw_fd())
        .is_ok_and(|address| address.family() == Some(AddressFamily::Unix))
}

/// Which of the two processes this is.
pub enum Role {
    /// The one that master knows.
    Keeper(Keeper),
    /// The one that serves, on these sockets.
    Child(Vec<TcpListener>, Tie),
}

/// The child's end of the tie to its keeper: readable when the keeper has gone.
#[derive(Debug)]
pub struct Tie(UnixStream);

impl Tie {
    /// The child stops because it was told to, and the keeper may leave: what the child does from
    /// now on needs no watch.
    pub fn let_go(&self) {
        let _ = (&self.0).write_all(b"!");
    }
}

impl AsFd for Tie {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The process that master knows.
pub struct Keeper {
    channel: UnixStream,
    tie: UnixStream,
    child: Pid,
}

impl Keeper {
    /// Waits until master reloads or ends, or the child does. A signal ends it as it ends any
    /// program.
    ///
    /// # Errors
    /// How the child died: the exit code has to be one that is not 0.
    pub fn watch(self) -> Result<(), String> {
        loop {
            let mut fds = [
                PollFd::new(self.channel.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.tie.as_fd(), PollFlags::POLLIN),
            ];
            // A failing poll(2) is an interrupted one: the descriptors are ours.
            if poll(&mut fds, PollTimeout::NONE).is_err() {
                continue;
            }
            if fds[0].any() == Some(true) {
                return Ok(());
            }
            if fds[1].any() == Some(true) {
                return match (&self.tie).read(&mut [0]) {
                    Ok(1) => Ok(()),
                    _ => Err(self.bury()),
                };
            }
        }
    }

    /// What became of the child, which has died unasked.
    fn bury(&self) -> String {
        let child = self.child;
        match waitpid(child, None) {
            Ok(status) => format!("the process that served, {child}, died: {status:?}"),
            Err(error) => format!("the process that served, {child}, died: {error}"),
        }
    }
}

impl Arguments {
    /// Reads what master puts behind the program's name.
    fn read(words: &[String]) -> Result<Arguments, String> {
        let mut arguments = Arguments::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let value = |name| word.strip_prefix(name).map(str::to_string);
            if let Some(letters) = word.strip_prefix('-') {
                arguments.options(letters, &mut words)?;
            } else if let Some(user) = value("user=") {
                arguments.user = Some(user);
            } else if let Some(directory) = value("directory=") {
                arguments.directory = Some(directory.into());
            } else {
                return Err(format!(
                    "\"{word}\" in master.cf is not understood; what may stand behind the command \
                     is user=NAME, directory=FOLDER and -v"
                ));
            }
        }
        Ok(arguments)
    }

    /// Reads one word of options, as getopt(3) does with the letters that Postfix's servers have.
    fn options<'a>(
        &mut self,
        letters: &str,
        words: &mut impl Iterator<Item = &'a String>,
    ) -> Result<(), String> {
        for (at, letter) in letters.char_indices() {
            match letter {
                'i' | 'm' | 'n' | 'o' | 's' | 't' => {
                    let rest = &letters[at + 1..];
                    let value = match rest {
                        "" => words.next().map_or("", String::as_str),
                        rest => rest,
                    };
                    if letter == 's' {
                        self.sockets = value
                            .parse()
                            .map_err(|_| format!("-s {value} from master(8) is no number"))?;
                    }
                    return Ok(());
                }
                'c' => self.chroot = true,
                'v' => self.verbose = true,
                // One process or many, the user, debugging: nothing to do for us.
                'd' | 'D' | 'l' | 'S' | 'u' | 'V' | 'z' => {}
                other => {
                    return Err(format!(
                        "-{other} in master.cf is not understood; what may stand behind the \
                         command is user=NAME, directory=FOLDER and -v"
                    ));
                }
            }
        }
        Ok(())
    }

    /// The name of the user to become: `user=`, else the owner of Postfix's queue.
    pub fn user(&self) -> String {
        self.user.clone().unwrap_or_else(mail_owner)
    }
}

/// `mail_owner` of main.cf.
fn mail_owner() -> String {
    let folder = std::env::var("MAIL_CONFIG").unwrap_or_else(|_| CONFIG_DIRECTORY.into());
    let text = std::fs::read_to_string(Path::new(&folder).join("main.cf")).unwrap_or_default();
    let mut owners = text.lines().filter_map(|line| {
        let (name, value) = line.split_once('=')?;
        (name.trim_end() == "mail_owner").then(|| value.trim().to_string())
    });
    // As in all of main.cf, the last one counts.
    owners.next_back().unwrap_or_else(|| MAIL_OWNER.into())
}

/// Where a process that master started logs: as all of Postfix does. `root` is the root that it is
/// going to have, if that is another.
pub fn log_place(root: Option<&Path>) -> Place {
    let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let name = variable("MAIL_LOGTAG").unwrap_or_else(|| "postfix".into());
    let tag = format!("{name}/smtp-dup");
    match (variable("POSTLOG_SERVICE"), variable("POSTLOG_HOSTNAME")) {
        (Some(socket), Some(name)) => {
            // As in Postfix's own lines, the first part of the name alone.
            let host = name.split('.').next().unwrap_or_default().to_string();
            let outside = PathBuf::from(socket);
            let inside = root.and_then(|root| inside(root, &outside).ok());
            Place::Postlog {
                sockets: [Some(outside), inside].into_iter().flatten().collect(),
                host,
                tag,
            }
        }
        _ => Place::Syslog { tag },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(words: &str) -> Result<Arguments, String> {
        Arguments::read(&words.split_whitespace().map(Into::into).collect::<Vec<_>>())
    }

    #[test]
    fn what_master_writes_is_understood() {
        let all = read("-l -n 127.0.0.1:2525 -t inet -u -c -o stress= -s 2 user=a directory=/b -v");
        let expected = Arguments {
            chroot: true,
            verbose: true,
            sockets: 2,
            user: Some("a".into()),
            directory: Some("/b".into()),
        };
        assert_eq!(all, Ok(expected));
        assert_eq!(read("-lu -s3").map(|arguments| arguments.sockets), Ok(3));
    }

    #[test]
    fn what_nobody_knows_is_named() {
        for word in ["--user=a", "-x", "/etc/config.yaml", "config=x"] {
            assert!(read(word).is_err_and(|what| what.contains("user=NAME")), "{word}");
        }
    }
}
