//! Certificates, keys and passwords, whoever starts the program: they are read before root and the
//! rest of the file system are given up, and again by each successor.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::process::Output;

use crate::common::{Action, Event, Sink, wait_until};
use crate::front::{Front, Options};
use crate::instance::{available, can_run, command};
use crate::master::Hosted;
use crate::pki::{Authority, Pair};
use crate::program::{Program, user_and_group};
use crate::{Route, USER, write_config};

/// `\0relay\0one` and `\0relay\0two`.
const ONE: &str = "AUTH PLAIN AHJlbGF5AG9uZQ==";
const TWO: &str = "AUTH PLAIN AHJlbGF5AHR3bw==";

/// A primary that wants TLS and a password, and the files that it takes to send to it.
struct Secured {
    front: Front,
    authority: Authority,
    folder: PathBuf,
}

impl Secured {
    /// With its files in the folder of `route`.
    fn start(route: &Route) -> Secured {
        let authority = Authority::new();
        let sink = Sink::replying(|event| match event {
            Event::Other(line) if line.starts_with("AUTH") => Action::reply("235 2.7.0 welcome"),
            _ => Action::Default,
        });
        sink.set_ehlo(&["PIPELINING", "AUTH PLAIN"]);
        let front = Front::with(Options::new(&authority.issue("127.0.0.1")), sink);
        let secured = Secured { front, authority, folder: route.folder().into() };
        secured.show(&secured.authority.issue("one.example"));
        secured.put("password", "one\n");
        secured.put("ca.pem", &secured.authority.pem);
        secured
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A file that only root can read.
    fn put(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
        fs::set_permissions(self.path(name), PermissionsExt::from_mode(0o600)).unwrap();
    }

    /// Who we are to clients.
    fn show(&self, pair: &Pair) {
        self.put("cert.pem", &pair.certificate);
        self.put("key.pem", &pair.key);
    }

    /// The configuration; `ca` are further keys of the primary, `relay` a line of the section.
    fn configure(&self, ca: &str, relay: &str) {
        let path = |name| self.path(name).display().to_string();
        let yaml = format!(
            "smtp:\n  listen: \"127.0.0.1:0\"\n  tls_certificate: \"{}\"\n  tls_key: \"{}\"\n\
             relay:\n  destination_primary: {{address: \"{}\", tls: required, {ca}\
             username: relay, password_file: \"{}\"}}\n  {relay}\n",
            path("cert.pem"),
            path("key.pem"),
            self.front.addr(),
            path("password"),
        );
        write_config(&self.folder, &yaml);
    }

    fn ca_file(&self) -> String {
        format!("ca_file: \"{}\", ", self.path("ca.pem").display())
    }
}

/// The certificate that a client is shown, in one line; nothing if it is shown none.
fn shown(hosted: &Hosted) -> String {
    let mut openssl = command("openssl");
    openssl.args(["s_client", "-starttls", "smtp", "-connect", &hosted.service().to_string()]);
    let output = openssl.stdin(std::process::Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let pem = text.find("-----BEGIN").map_or("", |begin| &text[begin..]);
    pem.lines().take_while(|line| !line.starts_with("-----END")).collect()
}

fn in_one_line(pair: &Pair) -> String {
    pair.certificate.lines().take_while(|line| !line.starts_with("-----END")).collect()
}

/// All of them lie where nobody can see them from within the chroot, and only root can read them. A
/// reload brings new ones.
#[test]
fn in_a_chroot_of_postfix() {
    if !available() || !can_run(&["openssl"]) {
        return;
    }
    let route = Route::start();
    let secured = Secured::start(&route);
    secured.configure(&secured.ca_file(), "");
    let (first, second) =
        (secured.authority.issue("first.example"), secured.authority.issue("second.example"));
    secured.show(&first);
    let hosted = Hosted::entry(route, "n - y - 1", &format!("user={USER}"));
    let primary = &secured.front.sink;
    hosted.deliver(0);
    primary.wait(1);
    assert_eq!(shown(&hosted), in_one_line(&first));
    assert!(primary.count(ONE) > 0 && primary.count(TWO) == 0);
    let (_, child) = hosted.parent_and_child();
    let root = fs::read_link(format!("/proc/{child}/root")).unwrap();
    assert_eq!(root, hosted.postfix.path("spool"));

    secured.show(&second);
    secured.put("password", "two\n");
    hosted.postfix.postfix("reload");
    wait_until("the new certificate", || shown(&hosted) == in_one_line(&second));
    hosted.deliver(1);
    primary.wait(2);
    assert!(primary.count(TWO) > 0);
    hosted.stop();
}

/// So are the CAs of the system, here those that the environment names.
#[test]
fn the_system_s_cas_in_a_chroot_of_postfix() {
    if !available() {
        return;
    }
    let route = Route::start();
    let secured = Secured::start(&route);
    secured.configure("", "");
    let file = secured.path("ca.pem").display().to_string();
    let hosted = Hosted::entry(route, "n - y - 1", &format!("user={USER}"));
    hosted.import_environment(&format!("SSL_CERT_FILE={file} SSL_CERT_DIR=/nonexistent"));
    hosted.deliver(0);
    secured.front.sink.wait(1);
    hosted.stop();
}

/// Secrets of the service's user are good enough for the service, and so for root who looks after
/// it, by whatever command.
#[test]
fn secrets_of_the_service_s_user() {
    if !can_run(&["setpriv"]) {
        return;
    }
    let (route, program) = (Route::start(), Program::copy());
    let secured = Secured::start(&route);
    let spool = secured.path("copies");
    fs::create_dir(&spool).unwrap();
    fs::set_permissions(&spool, PermissionsExt::from_mode(0o700)).unwrap();
    let relay = format!("spool: \"{}\"", spool.display());
    secured.configure(&secured.ca_file(), &relay);
    let (uid, gid) = user_and_group(USER);
    let (user, group) = (uid.to_string(), gid.to_string());
    for name in ["copies", "password", "key.pem", "cert.pem", "ca.pem"] {
        chown(secured.path(name), Some(uid), Some(gid)).unwrap();
    }
    let (config, file) = (route.config_file(), program.path());
    let said = |output: Output| {
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&said).into_owned())
    };
    let as_root = |words: &[&str]| {
        let mut command = command(file.to_str().unwrap());
        said(command.arg("--config").arg(&config).args(words).output().unwrap())
    };
    let as_user = |words: &[&str]| {
        let mut command = command("setpriv");
        command.args(["--reuid", &user, "--regid", &group, "--clear-groups"]).arg(file);
        said(command.arg("--config").arg(&config).args(words).output().unwrap())
    };
    for words in [["check"], ["queue"], ["flush"]] {
        for (code, said) in [as_user(&words), as_root(&words), as_root(&["--user", USER, words[0]])]
        {
            assert_eq!(code, Some(0), "{words:?}: {said}");
        }
    }
    // The one who runs it says what is to be done for him.
    chown(secured.path("password"), Some(0), Some(0)).unwrap();
    let (code, said) = as_user(&["check"]);
    assert_eq!(code, Some(2), "{said}");
    for part in ["password_file: ", &format!("user {user} runs this"), "chgrp", "0640"] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
    chown(secured.path("password"), Some(0), Some(gid)).unwrap();
    fs::set_permissions(secured.path("password"), PermissionsExt::from_mode(0o640)).unwrap();
    assert_eq!(as_user(&["check"]).0, Some(0));
    // Anybody else's are nobody's business.
    let (other, _) = user_and_group("mail");
    chown(secured.path("password"), Some(other), Some(gid)).unwrap();
    for (code, said) in [as_user(&["check"]), as_root(&["--user", USER, "check"])] {
        assert!(code == Some(2) && said.contains("belongs to user"), "{code:?} {said}");
    }
}
