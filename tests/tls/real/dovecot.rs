//! A private Dovecot for one test: its own configuration and folders below a temporary one, on the
//! loopback only, and ended when dropped. The machine's own Dovecot is not touched.

use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use tempfile::TempDir;

use crate::instance::{PATIENCE, command, free_address};
use crate::pki::Pair;

pub struct Dovecot {
    dir: TempDir,
    process: Child,
    /// Where its submission server takes mail.
    pub address: SocketAddr,
}

/// What an instance is to have.
pub struct Setup<'a> {
    pub pair: &'a Pair,
    /// The one user's name and password.
    pub login: (&'a str, &'a str),
    /// `plain`, `login`, or both.
    pub mechanisms: &'a str,
    /// Where mail is passed on to.
    pub relay: SocketAddr,
}

impl Dovecot {
    #[track_caller]
    pub fn start(setup: Setup) -> Dovecot {
        let dir = tempfile::Builder::new().prefix("dc-").tempdir().unwrap();
        // Its processes run as several users.
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("cert.pem", &setup.pair.certificate);
        write("key.pem", &setup.pair.key);
        write("users", &format!("{}:{{PLAIN}}{}\n", setup.login.0, setup.login.1));
        let address = free_address();
        write("dovecot.conf", &configuration(dir.path(), address, &setup));
        let process = command("dovecot")
            .arg("-F")
            .arg("-c")
            .arg(dir.path().join("dovecot.conf"))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut dovecot = Dovecot { dir, process, address };
        let end = Instant::now() + PATIENCE;
        while !dovecot.auth_socket().exists() || TcpStream::connect(address).is_err() {
            let ended = dovecot.process.try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < end, "{ended:?}: {}", dovecot.log());
            thread::sleep(Duration::from_millis(20));
        }
        dovecot
    }

    /// Where it answers a Postfix that wants to know whether a password is right.
    pub fn auth_socket(&self) -> PathBuf {
        self.dir.path().join("postfix-auth")
    }

    pub fn log(&self) -> String {
        let log = fs::read(self.dir.path().join("log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    }
}

impl Drop for Dovecot {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- the log of Dovecot:\n{}\n---", self.log());
        }
        // It ends its children, which SIGKILL would leave.
        let _ = command("kill").arg(self.process.id().to_string()).output();
        let end = Instant::now() + Duration::from_secs(10);
        while matches!(self.process.try_wait(), Ok(None)) && Instant::now() < end {
            thread::sleep(Duration::from_millis(20));
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn configuration(dir: &Path, address: SocketAddr, setup: &Setup) -> String {
    let dir = dir.display();
    let (ip, port) = (address.ip(), address.port());
    let (relay_ip, relay_port) = (setup.relay.ip(), setup.relay.port());
    let mechanisms = setup.mechanisms;
    format!(
        "base_dir = {dir}/run
state_dir = {dir}/state
log_path = {dir}/log
protocols = submission
listen = {ip}
hostname = dovecot.test
ssl = required
ssl_cert = <{dir}/cert.pem
ssl_key = <{dir}/key.pem
disable_plaintext_auth = yes
auth_mechanisms = {mechanisms}
auth_verbose = yes
auth_failure_delay = 0
mail_location = maildir:{dir}/mail
passdb {{
  driver = passwd-file
  args = {dir}/users
}}
userdb {{
  driver = static
  args = uid=nobody gid=nogroup home={dir}/home
}}
submission_relay_host = {relay_ip}
submission_relay_port = {relay_port}
service submission-login {{
  inet_listener submission {{
    port = {port}
  }}
}}
service auth {{
  unix_listener {dir}/postfix-auth {{
    mode = 0666
  }}
}}
# Who was wrong need not wait.
service anvil {{
  unix_listener anvil-auth-penalty {{
    mode = 0
  }}
}}
"
    )
}
