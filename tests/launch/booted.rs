//! `make install` and the units of `etc/systemd`, unchanged, under a systemd that runs: one that is
//! booted for the test, as a container is, with the machine's own files below an overlay and a
//! network of its own. So their port, user and folders are those that they name.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};

use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;

use crate::common::{Client, wait_until};
use crate::instance::{FOLDERS, can_run, command};
use crate::program::{binary, kill, parent_of, pids};
use crate::{Gate, Route, numbered};

/// Boots in the folder `$0`, behind which stands the command that installs. No other unit of the
/// machine is there: the journal, and what the test starts.
const BOOT: &str = r#"
set -e
mount -t tmpfs -o mode=755 none "$0"
cd "$0"
mkdir upper work root
mount -t overlay -o "lowerdir=/,upperdir=$0/upper,workdir=$0/work" overlay root
rm -rf root/etc/systemd/system root/var/spool/smtp-dup root/etc/smtp-dup
mkdir root/etc/systemd/system
cat >root/etc/systemd/system/test.target <<.
[Unit]
Wants=systemd-journald.service
After=systemd-journald.service
.
"$@" "DESTDIR=$0/root"
cd root
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount -t tmpfs -o mode=755 none dev
for device in null zero full random urandom tty; do
    : >dev/$device
    mount --bind /dev/$device dev/$device
done
mkdir dev/shm dev/pts
mount -t tmpfs none dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
mount -t tmpfs -o mode=755 none run
mount -t tmpfs -o mode=1777 none tmp
if [ -d /sys/fs/cgroup/systemd ]; then
    mount -t tmpfs -o mode=755 none sys/fs/cgroup
    mkdir sys/fs/cgroup/systemd
    mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd
else
    mount -t cgroup2 cgroup2 sys/fs/cgroup
fi
mkdir run/before
pivot_root . run/before
umount -l /run/before
exec env -i container=test PATH="$PATH" \
    /lib/systemd/systemd --unit=test.target --log-target=journal --show-status=0
"#;

/// A running systemd. It ends with this.
struct Booted {
    unshare: Child,
    systemd: u32,
    _folder: TempDir,
}

impl Booted {
    /// Boots; this thread, and those that it starts, are in the same network from now on.
    #[track_caller]
    fn start() -> Booted {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let up = command("ip").args(["link", "set", "lo", "up"]).output().unwrap();
        assert!(up.status.success(), "{up:?}");
        let folder = tempfile::tempdir().unwrap();
        // `make install` takes what has been built; here that is the program under test.
        let built = folder.path().join("built/release");
        fs::create_dir_all(&built).unwrap();
        std::os::unix::fs::symlink(binary(), built.join("smtp-dup")).unwrap();
        let root = folder.path().join("booted");
        fs::create_dir(&root).unwrap();
        let errors = folder.path().join("errors");
        let stderr = fs::File::create(&errors).unwrap();
        let mut unshare = command("unshare")
            .args(["--mount", "--pid", "--uts", "--ipc", "--cgroup", "--fork", "--kill-child"])
            .args(["sh", "-c", BOOT, root.to_str().unwrap()])
            .args(["make", "--silent", "-C", env!("CARGO_MANIFEST_DIR"), "install"])
            .arg(format!("CARGO_TARGET_DIR={}", folder.path().join("built").display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap();
        let said = || fs::read_to_string(&errors).unwrap();
        let mut systemd = None;
        wait_until("systemd's process", || {
            assert_eq!(unshare.try_wait().unwrap(), None, "{}", said());
            systemd = pids().into_iter().find(|pid| parent_of(*pid) == Some(unshare.id()));
            systemd.is_some()
        });
        let mut booted = Booted { unshare, systemd: systemd.unwrap(), _folder: folder };
        wait_until("systemd to boot", || {
            assert_eq!(booted.unshare.try_wait().unwrap(), None, "{}", said());
            booted.try_run("systemctl is-active test.target").status.success()
        });
        booted
    }

    fn try_run(&self, shell: &str) -> Output {
        let mut enter = command("nsenter");
        enter.args(["-t", &self.systemd.to_string(), "-m", "-p", "-u", "-i", "-C"]);
        enter.args(["env", "-i", &format!("PATH={FOLDERS}"), "sh", "-c", shell]).output().unwrap()
    }

    /// What a command prints that has to succeed.
    #[track_caller]
    fn run(&self, shell: &str) -> String {
        let output = self.try_run(shell);
        assert!(output.status.success(), "{shell}: {output:?}\n{}", self.journal(""));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The values of these properties of a unit, a line each.
    #[track_caller]
    fn show(&self, unit: &str, properties: &str) -> String {
        self.run(&format!("systemctl show --value -p {properties} {unit}"))
    }

    #[track_caller]
    fn wait_state(&self, unit: &str, state: &str) {
        wait_until(&format!("{unit} {state}"), || self.show(unit, "ActiveState").trim() == state);
    }

    /// The journal's lines, less with these options.
    fn journal(&self, options: &str) -> String {
        let output = self.try_run(&format!("journalctl --no-pager -q -o cat {options}"));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A file in there.
    fn path(&self, path: &str) -> PathBuf {
        Path::new(&format!("/proc/{}/root", self.systemd)).join(path)
    }

    fn configure(&self, yaml: &str) {
        fs::write(self.path("etc/smtp-dup/config.yaml"), yaml).unwrap();
    }

    /// The process of the service, which has to be this user's.
    #[track_caller]
    fn service(&self) -> String {
        let pid = self.show("smtp-dup.service", "MainPID");
        let user = self.run(&format!("ps -o user= -p {pid}"));
        assert_eq!(user.trim(), "smtp-dup");
        pid.trim().to_string()
    }
}

impl Drop for Booted {
    fn drop(&mut self) {
        // The first process of all in there: the others go with it.
        kill("KILL", self.systemd);
        let _ = self.unshare.wait();
    }
}

#[track_caller]
fn deliver(number: usize) {
    let mut client = Client::ready(([127, 0, 0, 1], 2525).into());
    let reply = client.message("a@sender.test", &["b@example.com"], &numbered(number));
    assert_eq!(reply.code, 250, "{reply:?}");
    client.expect("QUIT", 221);
    client.closed();
}

#[test]
fn the_units_as_they_are_installed() {
    let needed = ["unshare", "nsenter", "systemd-analyze", "systemd-sysusers", "ip", "make", "ps"];
    if !can_run(&needed) {
        return;
    }
    let (booted, gate) = (Booted::start(), Gate::default());
    let route = Route::behind(&gate);
    gate.open();
    let yaml = route.yaml("listen: 127.0.0.1:2525", "spool: /var/spool/smtp-dup");
    booted.configure(&yaml);
    booted.run("systemd-sysusers /usr/local/lib/sysusers.d/smtp-dup.conf");
    booted.run("systemd-tmpfiles --create /usr/local/lib/tmpfiles.d/smtp-dup.conf");
    assert_eq!(booted.run("stat -c %U:%G:%a /var/spool/smtp-dup"), "smtp-dup:smtp-dup:700\n");

    // Type=notify: clients can come as soon as the start is over.
    booted.run("systemctl start smtp-dup.service");
    deliver(0);
    route.wait(1);
    let pid = booted.service();
    let journal = booted.journal("-u smtp-dup");
    assert!(journal.contains("\nstarting smtp-dup ") || journal.starts_with("starting smtp-dup "));
    assert!(journal.contains("role=primary"), "{journal}");
    assert_eq!(booted.journal("-u smtp-dup -p warning"), "");

    // What kills it brings another.
    booted.run(&format!("kill -KILL {pid}"));
    wait_until("a new process", || {
        let [state, main] =
            ["SubState", "MainPID"].map(|what| booted.show("smtp-dup.service", what));
        state.trim() == "running" && main.trim() != pid
    });
    booted.service();
    deliver(1);
    route.wait(2);
    booted.run("systemctl stop smtp-dup.service");
    assert_eq!(booted.show("smtp-dup.service", "Result"), "success\n");

    // No restart cures a mistake; the journal knows it for an error.
    booted.configure(&yaml.replace("spool:", "spol:"));
    assert!(!booted.try_run("systemctl start smtp-dup.service").status.success());
    booted.wait_state("smtp-dup.service", "failed");
    assert_eq!(booted.show("smtp-dup.service", "NRestarts"), "0\n");
    assert!(booted.journal("-u smtp-dup -p err").contains("did you mean relay.spool"));
    booted.configure(&yaml);
    booted.run("systemctl reset-failed smtp-dup.service");

    // systemd listens; the first connection starts it.
    booted.run("systemctl start smtp-dup.socket");
    booted.wait_state("smtp-dup.service", "inactive");
    deliver(2);
    booted.service();
    booted.run("systemctl stop smtp-dup.socket smtp-dup.service");
    route.wait(3);

    // A process a connection, what one of them leaves, and a pass for that.
    booted.run("systemctl start smtp-dup-inetd.socket");
    route.sinks[2].close();
    (3..8).for_each(deliver);
    [&route.sinks[0], &route.sinks[1]].iter().for_each(|sink| {
        wait_until("copies of each process", || sink.accepted() == 8);
    });
    booted.run("systemctl stop smtp-dup-inetd.socket");
    wait_until("no unit of a connection any more", || {
        booted.run("systemctl list-units --plain --no-legend 'smtp-dup-inetd@*'").is_empty()
    });
    route.sinks[2].reopen();
    let queue = booted.run("/usr/local/bin/smtp-dup queue");
    assert!(queue.contains("5 copies"), "{queue}");
    // The hold of the last failure may last for a moment still.
    wait_until("the copies", || {
        booted.run("systemctl start smtp-dup-flush.service");
        route.sinks[2].accepted() == 8
    });
    booted.run("systemctl start smtp-dup-flush.timer");

    // A transaction outlives the order to stop, and the service ends well.
    let gate = Gate::default();
    let [primary, ..] = &route.sinks;
    primary.set_reply(gate.reply());
    booted.run("systemctl start smtp-dup.service");
    let mut slow = Client::ready(([127, 0, 0, 1], 2525).into());
    slow.envelope("a@sender.test", &["b@example.com"]);
    slow.send([numbered(8), b".\r\n".to_vec()].concat());
    gate.wait();
    booted.run("systemctl stop --no-block smtp-dup.service");
    booted.wait_state("smtp-dup.service", "deactivating");
    gate.open();
    slow.expect_reply(250);
    booted.wait_state("smtp-dup.service", "inactive");
    assert_eq!(booted.show("smtp-dup.service", "Result"), "success\n");

    // A port that only root may take.
    booted.configure(&yaml.replace("127.0.0.1:2525", "127.0.0.1:25"));
    booted.run(
        "cd /etc/systemd/system && mkdir smtp-dup.service.d && \
         cp /usr/local/share/doc/smtp-dup/systemd/port-25.conf smtp-dup.service.d && \
         systemctl daemon-reload && systemctl start smtp-dup.service",
    );
    booted.service();
    Client::ready(([127, 0, 0, 1], 25).into()).expect("QUIT", 221);
    booted.run("systemctl stop smtp-dup.service");
    route.wait(9);
    route.assert_numbered(9);
    // For people who look into such things, and without any claim: how exposed it is.
    let exposure = booted.run("systemd-analyze security --threshold=20 smtp-dup.service");
    assert!(exposure.contains("OK"), "{exposure}");
}
