//! Keeps what is written about smtp-dup true: the keys are the same in code, sample and manual,
//! the examples are configurations that it accepts, README and manuals show the files of etc/, the
//! manuals and units are well-formed, and the Makefile installs all of it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;

use serde_yaml::{Mapping, Value};
use smtp_dup::config::{Config, KEYS, destination};
use tempfile::TempDir;

const PRIMARY: &str = "SMTP_DUP_RELAY_DESTINATION_PRIMARY";

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn text(name: &str) -> String {
    fs::read_to_string(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The sample with the keys in force that are commented out. There a `#` stands right before
/// the key, and in a comment a blank follows it.
fn whole_sample() -> String {
    let sample = text("etc/config.yaml");
    let lines = sample.lines().map(|line| {
        let (indent, rest) = line.split_at(line.len() - line.trim_start().len());
        match rest.strip_prefix('#') {
            Some(key) if !key.is_empty() && !key.starts_with(' ') => format!("{indent}{key}\n"),
            _ => format!("{line}\n"),
        }
    });
    lines.collect()
}

/// The keys of a configuration, as `section.key`, with their values.
fn keys(yaml: &str) -> BTreeMap<String, Value> {
    let sections: Mapping = serde_yaml::from_str(yaml).expect("YAML");
    let mut all = BTreeMap::new();
    for (section, settings) in sections {
        let section = section.as_str().expect("a section is a word");
        for (key, value) in settings.as_mapping().expect("a section holds keys") {
            let key = key.as_str().expect("a key is a word");
            all.insert(format!("{section}.{key}"), value.clone());
        }
    }
    all
}

fn known_keys() -> BTreeSet<String> {
    KEYS.iter().map(|key| key.name.to_string()).collect()
}

/// A folder with what stands in /etc/smtp-dup where there is TLS.
fn etc_of_a_host() -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let own = rcgen::generate_simple_self_signed(["mail.example.com".into()]).expect("its own");
    let (certificate, key) = (own.cert.pem(), own.signing_key.serialize_pem());
    for (name, text) in [("cert.pem", &certificate), ("key.pem", &key), ("ca.pem", &certificate)] {
        fs::write(folder.path().join(name), text).expect("writable");
    }
    fs::write(folder.path().join("archive.secret"), "secret\n").expect("writable");
    for secret in ["key.pem", "archive.secret"] {
        fs::set_permissions(folder.path().join(secret), PermissionsExt::from_mode(0o600))
            .expect("ours");
    }
    folder
}

/// Loads a configuration as smtp-dup does, with nothing in the environment but `environment`.
/// Files of /etc/smtp-dup are those of [`etc_of_a_host`].
fn load(yaml: &str, environment: &[(&str, &str)]) -> Result<Config, String> {
    let etc = etc_of_a_host();
    let yaml = yaml.replace("/etc/smtp-dup/", &format!("{}/", etc.path().display()));
    let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
    file.write_all(yaml.as_bytes()).expect("writable");
    let owned = |&(name, value): &(&str, &str)| (name.to_string(), value.to_string());
    let loaded = Config::load(Some(file.path()), environment.iter().map(owned), None);
    loaded.map(|(config, _)| config).map_err(|mistake| mistake.to_string())
}

#[test]
fn the_sample_has_every_key_and_no_other() {
    let sample: BTreeSet<String> = keys(&whole_sample()).into_keys().collect();
    assert_eq!(sample, known_keys());
}

#[test]
fn the_sample_changes_no_default() {
    let primary = [(PRIMARY, "mail.example.com:25")];
    let defaults = load("", &primary).expect("the environment is enough");
    let sample = load(&text("etc/config.yaml"), &primary).expect("the sample is valid");
    assert_eq!(format!("{sample:?}"), format!("{defaults:?}"));
}

#[test]
fn the_sample_is_valid_with_all_its_keys() {
    load(&whole_sample(), &[]).expect("the sample is valid once it is all in force");
    load(&text("etc/demo.yaml"), &[]).expect("the demo's configuration is valid");
}

/// The binary itself takes the sample, once the one key without default is there.
#[test]
fn smtp_dup_accepts_the_sample() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("bound").to_string();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept()?;
        stream.write_all(b"220 mail.example.com ESMTP\r\n")?;
        BufReader::new(stream.try_clone()?).read_line(&mut String::new())?;
        stream.write_all(b"250 mail.example.com\r\n")
    });
    let output = Command::new(env!("CARGO_BIN_EXE_smtp-dup"))
        .args(["--config", "etc/config.yaml", "check"])
        .current_dir(path(""))
        .env(PRIMARY, address)
        .output()
        .expect("smtp-dup runs");
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

/// The entries for keys in the manual: key, environment variable, and text without its macros.
fn manual_entries() -> Vec<(String, String, String)> {
    let manual = text("man/smtp-dup.yaml.5");
    // The keys of a destination have none.
    let has_variable =
        |entry: &&str| entry.lines().next().is_some_and(|head| head.contains(" Pq Ev "));
    let entries = manual.split("\n.It Cm ").skip(1).filter(has_variable);
    let entries = entries.map(|entry| {
        let (head, body) = entry.split_once('\n').expect("an entry has a text");
        let (key, variable) = head.split_once(" Pq Ev ").expect("a key has a variable");
        let body = body.split("\n.El").next().unwrap_or(body);
        let words = body.split_whitespace().filter(|word| !matches!(*word, ".Ql" | "Ql"));
        let body = words.collect::<Vec<_>>().join(" ").replace(" ,", ",").replace(" .", ".");
        (key.to_string(), variable.to_string(), body)
    });
    entries.collect()
}

#[test]
fn the_manual_has_every_key_and_no_other() {
    let entries = manual_entries();
    let manual: BTreeSet<String> = entries.iter().map(|(key, ..)| key.clone()).collect();
    assert_eq!(manual, known_keys());
    assert_eq!(entries.len(), manual.len(), "a key stands there twice");
}

#[test]
fn manual_and_sample_have_every_key_of_a_destination() {
    let (manual, sample) = (text("man/smtp-dup.yaml.5"), text("etc/config.yaml"));
    for key in destination::KEYS {
        assert!(manual.contains(&format!("\n.It Cm {key}\n")), "{key} is not in the manual");
        assert!(sample.contains(key), "{key} is not in the sample");
    }
}

#[test]
fn the_manual_has_every_variable() {
    for (key, variable, _) in manual_entries() {
        let known = KEYS.iter().find(|known| known.name == key);
        assert_eq!(Some(variable), known.map(|known| known.env()), "variable of {key}");
    }
}

/// The sample's values are the defaults, says another test.
#[test]
fn the_manual_has_every_default() {
    let manual = manual_entries();
    for (key, value) in keys(&text("etc/config.yaml")) {
        let scalar = |value: &Value| match value {
            Value::String(text) => text.clone(),
            value => serde_yaml::to_string(value).expect("YAML").trim().to_string(),
        };
        let default = match &value {
            Value::Sequence(items) => items.iter().map(scalar).collect::<Vec<_>>().join(", "),
            value => scalar(value),
        };
        let entry = manual.iter().find(|(name, ..)| *name == key);
        let (_, _, body) = entry.unwrap_or_else(|| panic!("{key} is not in the manual"));
        let stands = [",", ".", " "].map(|end| body.contains(&format!("default {default}{end}")));
        assert!(stands.contains(&true), "{key}: no \"default {default}\" in: {body}");
    }
}

/// A block of literal text in README or manual: its language if it has one, and what it shows.
struct Block {
    language: String,
    text: String,
}

/// The code blocks of a Markdown file, or the literal blocks of a manual.
fn blocks(name: &str) -> Vec<Block> {
    let whole = text(name);
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for line in whole.lines() {
        let (fence, displayed) = (line.strip_prefix("```"), line.starts_with(".Bd "));
        match &mut open {
            Some(_) if fence.is_some() || line == ".Ed" => blocks.extend(open.take()),
            Some(block) => {
                let line = if name.ends_with(".md") { line.into() } else { unescaped(line) };
                block.text.push_str(&line);
                block.text.push('\n');
            }
            None if fence.is_some() || displayed => {
                let language = fence.unwrap_or_default().to_string();
                open = Some(Block { language, text: String::new() });
            }
            None => {}
        }
    }
    assert!(open.is_none(), "{name}: a block without an end");
    assert!(!blocks.is_empty(), "{name}: the blocks were not found");
    blocks
}

/// A line of a literal block in a manual, as a reader sees it.
fn unescaped(line: &str) -> String {
    line.replace("\\&", "").replace("\\-", "-").replace("\\e", "\\")
}

/// Where snippets are shown.
const DOCUMENTS: [&str; 4] =
    ["README.md", "man/smtp-dup.8", "man/smtp-dup.yaml.5", "man/smtp-dup-spool.5"];

/// The first words of the commands that a reader is told to type.
const COMMANDS: [&str; 33] = [
    "(sleep",
    "cd",
    "cp",
    "echo",
    "grep",
    "install",
    "journalctl",
    "kill",
    "less",
    "ls",
    "mailq",
    "make",
    "man",
    "mv",
    "postconf",
    "postfix",
    "postmap",
    "printf",
    "ps",
    "sed",
    "sendmail",
    "service",
    "smtp-dup",
    "ss",
    "swaks",
    "systemctl",
    "systemd-sysusers",
    "systemd-tmpfiles",
    "tail",
    "tar",
    "tcpserver",
    "telnet",
    "useradd",
];

/// What a block shows, if it shows commands: each line is one. In a manual a prompt tells, `$` or,
/// where it takes root, `#`.
fn commands(document: &str, block: &Block) -> Option<Vec<String>> {
    let joined = block.text.replace("\\\n", " ");
    let lines = joined.lines();
    if document.ends_with(".md") {
        return (block.language == "sh").then(|| lines.map(String::from).collect());
    }
    lines
        .map(|line| line.strip_prefix("$ ").or(line.strip_prefix("# ")).map(String::from))
        .collect()
}

/// The word that a command begins with, after `sudo` and variables.
fn first_word(command: &str) -> &str {
    let mut words = command.split_whitespace();
    words.find(|word| *word != "sudo" && !word.starts_with("SMTP_DUP_")).unwrap_or_default()
}

/// All files below etc/.
fn files_of_etc() -> Vec<String> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            if path.is_dir() { walk(&path, found) } else { found.push(path) }
        }
    }
    let mut found = Vec::new();
    walk(&path("etc"), &mut found);
    let name = |file: &PathBuf| {
        let name = file.strip_prefix(path("")).expect("below the repository");
        name.to_str().expect("a plain name").to_string()
    };
    found.iter().map(name).collect()
}

/// The lines of a file that are no comments.
fn without_comments(text: &str) -> String {
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    lines.map(|line| format!("{line}\n")).collect()
}

/// Snippets are tested as files, so what is shown must be a file, with or without its comments.
#[test]
fn every_snippet_is_a_file() {
    let files: Vec<String> = files_of_etc().iter().map(|file| text(file)).collect();
    for document in DOCUMENTS {
        for block in blocks(document) {
            let shown = &block.text;
            if let Some(commands) = commands(document, &block) {
                for command in commands {
                    let known = COMMANDS.contains(&first_word(&command));
                    assert!(known, "{document}: not a command that is known here: {command}");
                }
            } else if block.language == "log" {
                // A queue id begins each of these lines.
                let is_line =
                    |line: &str| line.split_once(": ").is_some_and(|(id, _)| id.len() == 10);
                assert!(shown.lines().all(is_line), "{document}: not lines of the log:\n{shown}");
            } else {
                let is_shown = |file: &String| file == shown || without_comments(file) == *shown;
                assert!(files.iter().any(is_shown), "{document}: in no file of etc/:\n{shown}");
            }
        }
    }
}

#[test]
fn every_file_of_etc_is_shown_or_named() {
    let shown: Vec<String> =
        DOCUMENTS.iter().flat_map(|name| blocks(name)).map(|block| block.text).collect();
    let others = ["Makefile", "etc/demo.sh"].map(text);
    let documents = DOCUMENTS.map(text).join("\n") + &others.join("\n");
    for file in files_of_etc() {
        let content = text(&file);
        let name = file.rsplit('/').next().unwrap_or(&file);
        let is_there = documents.contains(name)
            || shown.contains(&content)
            || shown.contains(&without_comments(&content));
        assert!(is_there, "{file} is neither shown nor named");
    }
}

#[test]
fn examples_of_configurations_are_valid() {
    let files = files_of_etc();
    let examples: Vec<_> = files.iter().filter(|file| file.starts_with("etc/examples/")).collect();
    assert!(!examples.is_empty(), "the examples were not found");
    for file in examples {
        assert!(file.ends_with(".yaml"), "{file}");
        if let Err(mistake) = load(&text(file), &[]) {
            panic!("{file}: {mistake}");
        }
    }
}

/// Runs a program that CI must have; `None` where it is missing elsewhere.
fn run_if_there(command: &mut Command) -> Option<Output> {
    match command.current_dir(path("")).output() {
        Err(error) if error.kind() == ErrorKind::NotFound && std::env::var_os("CI").is_none() => {
            eprintln!("SKIPPED, NOT TESTED: there is no {command:?} here");
            None
        }
        output => Some(output.unwrap_or_else(|error| panic!("{command:?}: {error}"))),
    }
}

#[test]
fn the_manuals_are_well_formed() {
    let manuals = DOCUMENTS.iter().filter(|name| name.starts_with("man/"));
    let mut lint = Command::new("mandoc");
    if let Some(lint) = run_if_there(lint.args(["-T", "lint", "-W", "warning"]).args(manuals)) {
        let found = String::from_utf8_lossy(&lint.stdout);
        assert!(lint.status.success() && found.is_empty(), "{found}");
    }
}

/// What `make` installs for packagers, with `PREFIX=/usr`, below a folder.
struct Installed {
    folder: TempDir,
}

impl Installed {
    /// Installs the program that the tests were built with.
    fn with(target: &str, variables: &[&str]) -> Installed {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let release = folder.path().join("target/release");
        fs::create_dir_all(&release).expect("writable");
        fs::copy(env!("CARGO_BIN_EXE_smtp-dup"), release.join("smtp-dup")).expect("writable");
        let make = Command::new("make")
            .args([target, "PREFIX=/usr"])
            .arg(format!("CARGO_TARGET_DIR={}", folder.path().join("target").display()))
            .arg(format!("DESTDIR={}", folder.path().join("stage").display()))
            .args(variables)
            .current_dir(path(""))
            .env_remove("MAKEFLAGS") // those of the make that runs this test
            .output()
            .expect("make runs");
        assert!(make.status.success(), "{make:?}");
        Installed { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("stage").join(name)
    }

    fn mode(&self, name: &str) -> u32 {
        let file = fs::metadata(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        file.permissions().mode() & 0o7777
    }
}

/// The sample goes beside the configuration and never in its place.
#[test]
fn install_brings_all_that_belongs_to_the_program() {
    let installed = Installed::with("install", &[]);
    assert_eq!(installed.mode("usr/bin/smtp-dup"), 0o755);
    for name in [
        "etc/smtp-dup/config.yaml.sample",
        "usr/share/man/man8/smtp-dup.8",
        "usr/share/man/man5/smtp-dup.yaml.5",
        "usr/share/man/man5/smtp-dup-spool.5",
        "usr/lib/systemd/system/smtp-dup.service",
        "usr/lib/systemd/system/smtp-dup.socket",
        "usr/lib/systemd/system/smtp-dup-inetd.socket",
        "usr/lib/systemd/system/smtp-dup-inetd@.service",
        "usr/lib/systemd/system/smtp-dup-flush.service",
        "usr/lib/systemd/system/smtp-dup-flush.timer",
        "usr/lib/sysusers.d/smtp-dup.conf",
        "usr/lib/tmpfiles.d/smtp-dup.conf",
        "usr/share/doc/smtp-dup/inetd.conf",
        "usr/share/doc/smtp-dup/smtp-dup.cron",
        "usr/share/doc/smtp-dup/spool/5F3A9C20B1.mail",
        "usr/share/doc/smtp-dup/migration.yaml",
        "usr/share/doc/smtp-dup/postfix/service.master.cf",
        "usr/share/doc/smtp-dup/systemd/port-25.conf",
    ] {
        assert_eq!(installed.mode(name), 0o644, "{name}");
    }
    assert!(!installed.path("etc/smtp-dup/config.yaml").exists());
    assert!(!installed.path("usr/local").exists(), "something ignores PREFIX");
    for name in
        ["man/man8/smtp-dup.8", "doc/smtp-dup/inetd.conf", "doc/smtp-dup/postfix/spawn.master.cf"]
    {
        let text = fs::read_to_string(installed.path("usr/share").join(name)).expect("text");
        assert!(!text.contains("/usr/local/bin/smtp-dup"), "{name} ignores PREFIX");
        assert!(text.contains("/usr/bin/smtp-dup"), "{name}");
    }
}

/// Where that is, Postfix says.
#[test]
fn install_postfix_puts_the_program_beside_its_daemons() {
    // Answers what it is asked for, with a slash before it.
    let postconf = "POSTCONF=printf '%.0s/%s'";
    let installed = Installed::with("install-postfix", &[postconf]);
    assert_eq!(installed.mode("daemon_directory/smtp-dup"), 0o755);
}

/// The units as they were installed, in a folder where systemd-analyze(1) finds their program.
fn installed_units(installed: &Installed) -> Vec<PathBuf> {
    let folder = installed.path("units");
    fs::create_dir(&folder).expect("writable");
    let program = format!("ExecStart={}", installed.path("usr/bin/smtp-dup").display());
    let units = fs::read_dir(installed.path("usr/lib/systemd/system")).expect("units");
    let copy = |unit: std::io::Result<fs::DirEntry>| {
        let unit = unit.expect("a unit");
        let text = fs::read_to_string(unit.path()).expect("text");
        let runs_nothing = text.contains("[Socket]") || text.contains("[Timer]");
        assert!(text.contains("ExecStart=/usr/bin/smtp-dup ") || runs_nothing);
        let copy = folder.join(unit.file_name());
        fs::write(&copy, text.replace("ExecStart=/usr/bin/smtp-dup", &program)).expect("writable");
        copy
    };
    units.map(copy).collect()
}

#[test]
fn the_units_are_well_formed() {
    let installed = Installed::with("install", &[]);
    let units = installed_units(&installed);
    assert_eq!(units.len(), 6, "{units:?}");
    let mut verify = Command::new("systemd-analyze");
    if let Some(found) = run_if_there(verify.args(["verify", "--man=no"]).args(units)) {
        assert!(found.status.success() && found.stderr.is_empty(), "{found:?}");
    }
}

/// In the terms of systemd-analyze(1): 0 is nothing to attack, 10 is all.
#[test]
fn the_services_are_hardened() {
    let installed = Installed::with("install", &[]);
    for unit in installed_units(&installed) {
        if unit.extension().is_some_and(|extension| extension == "service") {
            let mut security = Command::new("systemd-analyze");
            security.args(["security", "--no-pager", "--offline=true", "--threshold=20"]);
            if let Some(found) = run_if_there(security.arg(unit)) {
                assert!(found.status.success(), "{}", String::from_utf8_lossy(&found.stdout));
            }
        }
    }
}

#[test]
fn systemd_makes_the_user() {
    let root = tempfile::tempdir().expect("a temporary folder");
    fs::create_dir(root.path().join("etc")).expect("writable");
    let mut sysusers = Command::new("systemd-sysusers");
    sysusers.arg(format!("--root={}", root.path().display()));
    if let Some(made) = run_if_there(sysusers.arg(path("etc/sysusers.d/smtp-dup.conf"))) {
        let users = fs::read_to_string(root.path().join("etc/passwd")).unwrap_or_default();
        assert!(users.starts_with("smtp-dup:x:"), "{made:?}\n{users}");
        assert!(users.ends_with("/nologin\n"), "{users}");
    }
}

#[test]
fn systemd_makes_the_spool() {
    let root = tempfile::tempdir().expect("a temporary folder");
    fs::create_dir_all(root.path().join("var/spool")).expect("writable");
    let mut tmpfiles = Command::new("systemd-tmpfiles");
    tmpfiles.arg("--create").arg(format!("--root={}", root.path().display()));
    // There is no user smtp-dup here, so it becomes the folder of whoever runs this.
    let text = text("etc/tmpfiles.d/smtp-dup.conf").replace(" smtp-dup smtp-dup ", " - - ");
    let file = root.path().join("smtp-dup.conf");
    fs::write(&file, text).expect("writable");
    if let Some(made) = run_if_there(tmpfiles.arg(file)) {
        let folder = fs::metadata(root.path().join("var/spool/smtp-dup"));
        let mode = folder.map(|folder| folder.permissions().mode() & 0o7777).ok();
        assert_eq!(mode, Some(0o700), "{made:?}");
    }
}

/// What smtp-dup-spool(5) shows, smtp-dup reads as the manual says.
#[test]
fn the_files_of_the_spool_are_some() {
    let root = tempfile::tempdir().expect("a temporary folder");
    let spool = root.path().join("spool");
    let hour = spool.join("queue/2026112309");
    fs::create_dir_all(&hour).expect("writable");
    fs::set_permissions(&spool, fs::Permissions::from_mode(0o700)).expect("ours");
    let (mail, copy) = ("5F3A9C20B1.mail", "5F3A9C20B1.to.newmail.example.com:25");
    let wire = text(&format!("etc/spool/{mail}")).replace('\n', "\r\n");
    fs::write(hour.join(mail), wire).expect("writable");
    fs::copy(path("etc/spool").join(copy), hour.join(copy)).expect("writable");
    let output = Command::new(env!("CARGO_BIN_EXE_smtp-dup"))
        .args(["--config", "etc/examples/migration.yaml", "queue", "--json"])
        .current_dir(path(""))
        .env("SMTP_DUP_RELAY_SPOOL", &spool)
        .output()
        .expect("smtp-dup runs");
    let line = String::from_utf8_lossy(&output.stdout);
    let shown: BTreeMap<String, Value> = serde_yaml::from_str(&line).expect("JSON is YAML");
    let is = |key: &str, value: Value| assert_eq!(shown.get(key), Some(&value), "{output:?}");
    is("backup", "newmail.example.com:25".into());
    is("orphaned", false.into());
    is("from", "<ada@example.com>".into());
    is("to", vec![Value::from("<alan@example.com>")].into());
    is("attempts", 3.into());
    is("next", 1_795_602_446.into());
    is("reply", "<alan@example.com>: 450 4.2.0 greylisted".into());
}

/// What the timer and cron start is a command that works.
#[test]
fn the_spool_is_flushed_from_time_to_time() {
    let root = tempfile::tempdir().expect("a temporary folder");
    let config = root.path().join("config.yaml");
    let spool = root.path().join("spool");
    fs::create_dir(&spool).expect("writable");
    fs::set_permissions(&spool, fs::Permissions::from_mode(0o700)).expect("ours");
    fs::copy(path("etc/examples/migration.yaml"), &config).expect("writable");
    for file in ["etc/systemd/smtp-dup-flush.service", "etc/smtp-dup.cron"] {
        let text = text(file);
        let (_, rest) = text.split_once("/usr/local/bin/smtp-dup ").expect("the program");
        let words = rest.lines().next().unwrap_or_default();
        let words = words.replace("/etc/smtp-dup/config.yaml", &config.display().to_string());
        let output = Command::new("sh")
            .arg("-c")
            .arg(format!("{} {words}", env!("CARGO_BIN_EXE_smtp-dup")))
            .env("SMTP_DUP_RELAY_SPOOL", &spool)
            .output()
            .expect("sh runs");
        assert_eq!(output.status.code(), Some(0), "{file}: {output:?}");
        assert!(output.stderr.is_empty(), "{file}: {output:?}");
    }
}
