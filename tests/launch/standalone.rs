//! Started by hand, or by whatever keeps a program in the foreground: it can have a port of
//! root's, and then be root no longer.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::common::{Client, run};
use crate::instance::{can_run, command};
use crate::program::{Launcher, Program, assert_runs_as, binary, kill, user_and_group};
use crate::{Route, USER, numbered, open_folder, write_config};

/// A port that only root can have, and nobody has.
fn low_port() -> SocketAddr {
    let first = (std::process::id() % 500) as u16;
    let ports = (0..500).map(|step| 1023 - (first + step) % 500);
    let addresses = ports.map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    let is_free = |address: &SocketAddr| TcpListener::bind(address).is_ok();
    addresses.into_iter().find(is_free).expect("a free port below 1024")
}

/// The log may be where nobody is; whoever started it by hand hears all the same.
#[test]
fn a_failure_is_said_where_syslog_is_not() {
    if !can_run(&["unshare"]) {
        return;
    }
    let route = Route::start();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let listen = format!("listen: \"{}\"", taken.local_addr().unwrap());
    let yaml = route.yaml(&listen, "") + "log:\n  target: syslog\n";
    write_config(route.folder(), &yaml);
    // A /dev without log in it.
    let script = format!(
        "mount -t tmpfs none /dev && exec {} --config {}",
        binary().display(),
        route.config_file().display()
    );
    let output = command("unshare").args(["-m", "sh", "-c", &script]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(said.contains("smtp.listen") && said.contains("stop what listens"), "{said}");
}

#[test]
fn user_drops_root_once_it_listens() {
    if !can_run(&["setpriv"]) {
        return;
    }
    for (user, group) in [(USER.to_owned(), USER), (format!("{USER}:mail"), "mail")] {
        let (route, program) = (Route::start(), Program::copy());
        let address = low_port();
        route.configure(&format!("listen: \"{address}\""), "");
        // Some groups of root's that it must not keep.
        let mut command = command("setpriv");
        command.args(["--groups", "0,4,24"]).arg(program.path());
        command.arg("--config").arg(route.config_file()).args(["--user", &user]);
        let mut launched = Launcher::start(&mut command);
        launched.wait_log("starting smtp-dup ");
        assert_runs_as(launched.pid(), USER, group);
        let mut client = Client::ready(address);
        let reply = client.message("a@sender.test", &["b@example.com"], &numbered(0));
        assert_eq!(reply.code, 250, "{reply:?}");
        drop(client);
        route.wait(1);
        assert!(kill("TERM", launched.pid()));
        assert!(launched.wait_exit(Duration::from_secs(20)).success());
        assert!(!launched.log().contains("warning: "), "{}", launched.log());
    }
}

#[test]
fn root_is_warned_of_itself() {
    if !can_run(&[]) {
        return;
    }
    let (route, program) = (Route::start(), Program::copy());
    let mut command = command(program.path().to_str().unwrap());
    let launched = Launcher::start(command.arg("--config").arg(route.config_file()));
    launched.wait_log("starting smtp-dup ");
    let warning = launched.wait_log("warning: ");
    assert!(warning.contains("root") && warning.contains("--user"), "{warning}");
}

/// Runs it with these arguments and this `config.yaml`, which then has to be refused.
#[track_caller]
fn refused(file: &Path, arguments: &[&str], said: &[&str]) {
    let config = file.to_str().unwrap();
    let output = run(&[&["--config", config], arguments].concat(), None, &[]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    for part in said {
        assert!(stderr.contains(part), "{arguments:?}: no {part:?} in {stderr}");
    }
    assert!(output.stdout.is_empty());
}

#[test]
fn a_configuration_that_others_may_write() {
    let route = Route::start();
    let file = route.config_file();
    let mode = |mode| fs::set_permissions(&file, fs::Permissions::from_mode(mode)).unwrap();
    mode(0o646);
    refused(&file, &[], &["config.yaml", "write"]);
    if !can_run(&[]) {
        return;
    }
    mode(0o664);
    refused(&file, &["--user", USER], &["config.yaml", "write"]);
    mode(0o644);
    let (uid, gid) = user_and_group("mail");
    chown(&file, Some(uid), Some(gid)).unwrap();
    refused(&file, &["--user", USER], &["config.yaml", "own"]);
}

/// The program, started by somebody who is not root.
fn as_user(program: &Program) -> Command {
    let mut command = command("setpriv");
    command.args(["--reuid", USER, "--regid", USER, "--clear-groups"]).arg(program.path());
    command
}

/// Another file, or --config, is no remedy where that is the one that is meant.
#[test]
fn a_configuration_that_only_root_can_read() {
    if !can_run(&["setpriv"]) {
        return;
    }
    let (route, program) = (Route::start(), Program::copy());
    let file = route.config_file();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let output = as_user(&program).arg("--config").arg(&file).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("let the user that smtp-dup runs as read it"), "{said}");
    assert!(!said.contains("--config"), "{said}");
}

/// A group may write what does not concern root.
#[test]
fn a_configuration_of_one_s_own_group() {
    if !can_run(&["setpriv"]) {
        return;
    }
    let (route, program) = (Route::start(), Program::copy());
    let file = route.config_file();
    let (uid, gid) = user_and_group(USER);
    chown(&file, Some(uid), Some(gid)).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o664)).unwrap();
    let mut command = as_user(&program);
    let launched = Launcher::start(command.arg("--config").arg(&file));
    launched.wait_log("starting smtp-dup ");
}

#[test]
fn users_that_are_not_there() {
    if !can_run(&[]) {
        return;
    }
    let route = Route::start();
    let file = route.config_file();
    refused(&file, &["--user", "nobody-at-all"], &["nobody-at-all"]);
    refused(&file, &["--user", "daemon:no-such-group"], &["no-such-group"]);
}

/// What is not root cannot become somebody else.
#[test]
fn user_without_root() {
    if !can_run(&["setpriv"]) {
        return;
    }
    let (route, program) = (Route::start(), Program::copy());
    let mut command = as_user(&program);
    command.arg("--config").arg(route.config_file()).args(["--user", "mail"]);
    let mut launched = Launcher::start(&mut command);
    assert!(!launched.wait_exit(Duration::from_secs(20)).success());
    assert!(launched.log().contains("mail"), "{}", launched.log());
}

/// `smtp-dup inetd` insists on a client.
#[test]
fn inetd_without_a_socket() {
    let folder = open_folder();
    let route = Route::start();
    let file = folder.path().join("config.yaml");
    fs::copy(route.config_file(), &file).unwrap();
    refused(&file, &["inetd"], &["inetd"]);
}
