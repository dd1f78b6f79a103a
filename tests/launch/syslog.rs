//! A syslogd for one test. Programs see its socket as /dev/log, in a /dev of their own; that of
//! the machine is left alone.

use std::fs;
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use tempfile::TempDir;

use crate::common::wait_until;
use crate::instance::command;
use crate::open_folder;

/// Runs its arguments from the second on with the folder in the first as /dev: some devices, and
/// a link to the test's socket.
const PRIVATE_DEV: &str = r#"
set -e
dev=$0
mount -t tmpfs -o mode=755 none "$dev"
for device in null zero random urandom; do
    : >"$dev/$device"
    mount --bind "/dev/$device" "$dev/$device"
done
ln -s /proc/self/fd "$dev/fd"
ln -s "${dev%/dev}/log" "$dev/log"
mount --rbind "$dev" /dev
exec "$@""#;

pub struct Syslog {
    folder: TempDir,
    socket: Option<UnixDatagram>,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Syslog {
    pub fn start() -> Syslog {
        let folder = open_folder();
        fs::create_dir(folder.path().join("dev")).unwrap();
        let mut syslog = Syslog { folder, socket: None, lines: Arc::default() };
        syslog.restart();
        syslog
    }

    /// Ends it. Its socket goes.
    pub fn stop(&mut self) {
        if let Some(socket) = self.socket.take() {
            fs::remove_file(self.folder.path().join("log")).unwrap();
            // This ends the thread.
            socket.shutdown(Shutdown::Both).unwrap();
        }
    }

    /// Starts it (again), with a new socket.
    pub fn restart(&mut self) {
        self.stop();
        let path = self.folder.path().join("log");
        let socket = UnixDatagram::bind(&path).unwrap();
        // As /dev/log is: for everybody.
        fs::set_permissions(path, fs::Permissions::from_mode(0o666)).unwrap();
        let (receiver, lines) = (socket.try_clone().unwrap(), Arc::clone(&self.lines));
        self.socket = Some(socket);
        thread::spawn(move || collect(&receiver, &lines));
    }

    /// It takes nothing from its socket until this is dropped; a single line at most.
    pub fn pause(&self) -> MutexGuard<'_, Vec<String>> {
        self.lines.lock().unwrap()
    }

    /// Words before a command that is to log here, for [`Setup::prefix`].
    ///
    /// [`Setup::prefix`]: crate::instance::Setup
    pub fn prefix(&self) -> Vec<String> {
        let dev = self.folder.path().join("dev").to_str().unwrap().to_owned();
        ["unshare", "--mount", "sh", "-c", PRIVATE_DEV, &dev].map(str::to_owned).to_vec()
    }

    /// A command that is to log here. It becomes this program, with the same process number.
    pub fn command(&self, program: &str) -> Command {
        let prefix = self.prefix();
        let mut command = command(&prefix[0]);
        command.args(&prefix[1..]).arg(program);
        command
    }

    /// The lines so far that have `needle`, each as it came: `<22>tag[pid]: text`.
    pub fn lines(&self, needle: &str) -> Vec<String> {
        let lines = self.lines.lock().unwrap();
        lines.iter().filter(|line| line.contains(needle)).cloned().collect()
    }

    /// Waits for a line with `needle` in it; the first one.
    #[track_caller]
    pub fn wait(&self, needle: &str) -> String {
        wait_until(&format!("{needle:?} in the log"), || !self.lines(needle).is_empty());
        self.lines(needle).remove(0)
    }
}

impl Drop for Syslog {
    fn drop(&mut self) {
        self.stop();
        if thread::panicking() {
            eprintln!("--- syslog:\n{}\n---", self.lines("").join("\n"));
        }
    }
}

fn collect(socket: &UnixDatagram, lines: &Mutex<Vec<String>>) {
    let mut octets = vec![0; 65536];
    while let Ok(count @ 1..) = socket.recv(&mut octets) {
        let text = String::from_utf8_lossy(&octets[..count]).into_owned();
        lines.lock().unwrap().push(text);
    }
}
