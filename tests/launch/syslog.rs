//! A syslogd for one test. Programs see its socket as /dev/log, in a /dev of their own; that of
//! the machine is left alone.

use std::fs;
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::process::Command;
use std::sync::{Arc, Mutex};
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
    socket: UnixDatagram,
    lines: Arc<Mutex<Vec<String>>>,
}

impl Syslog {
    pub fn start() -> Syslog {
        let folder = open_folder();
        fs::create_dir(folder.path().join("dev")).unwrap();
        let path = folder.path().join("log");
        let socket = UnixDatagram::bind(&path).unwrap();
        // As /dev/log is: for everybody.
        fs::set_permissions(path, fs::Permissions::from_mode(0o666)).unwrap();
        let lines = Arc::default();
        let (receiver, collected) = (socket.try_clone().unwrap(), Arc::clone(&lines));
        thread::spawn(move || collect(&receiver, &collected));
        Syslog { folder, socket, lines }
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
        // This ends the thread.
        let _ = self.socket.shutdown(Shutdown::Both);
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
