//! Keeps what is written about smtp-dup true: the keys are the same in code, sample and manual,
//! the examples are configurations that it accepts, and the manuals are well-formed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use serde_yaml::{Mapping, Value};
use smtp_dup::config::{Config, KEYS};

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

/// Loads a configuration as smtp-dup does, with nothing in the environment but `environment`.
fn load(yaml: &str, environment: &[(&str, &str)]) -> Result<Config, String> {
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
    let entries = manual.split("\n.It Cm ").skip(1).map(|entry| {
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

/// The literal blocks of a manual, or the code blocks of a Markdown file.
fn examples(name: &str) -> Vec<String> {
    let whole = text(name);
    let (begin, end) = if name.ends_with(".md") {
        ("\n```yaml\n", "\n```\n")
    } else {
        ("\n.Bd -literal -offset indent\n", "\n.Ed\n")
    };
    let blocks = whole.split(begin).skip(1).map(|rest| rest.split(end).next().unwrap_or(rest));
    blocks.map(String::from).collect()
}

#[test]
fn examples_of_configurations_are_valid() {
    for (name, least) in [("README.md", 1), ("man/smtp-dup.8", 1), ("man/smtp-dup.yaml.5", 2)] {
        let is_configuration =
            |block: &String| block.starts_with("smtp:\n") || block.starts_with("relay:\n");
        let blocks: Vec<String> = examples(name).into_iter().filter(is_configuration).collect();
        assert!(blocks.len() >= least, "{name}: the examples were not found");
        for block in blocks {
            if let Err(mistake) = load(&block, &[]) {
                panic!("{name}: {mistake}\n{block}");
            }
        }
    }
}

#[test]
fn the_manuals_are_well_formed() {
    let manuals = ["man/smtp-dup.8", "man/smtp-dup.yaml.5"];
    let lint = Command::new("mandoc")
        .args(["-T", "lint", "-W", "warning"])
        .args(manuals)
        .current_dir(path(""))
        .output();
    match lint {
        Err(error) if error.kind() == ErrorKind::NotFound && std::env::var_os("CI").is_none() => {
            eprintln!("not looked at: there is no mandoc here");
        }
        lint => {
            let lint = lint.expect("mandoc, which CI must have, runs");
            let found = String::from_utf8_lossy(&lint.stdout);
            assert!(lint.status.success() && found.is_empty(), "{found}");
        }
    }
}

/// The sample goes beside the configuration and never in its place.
#[test]
fn install_brings_program_manuals_and_sample() {
    let make = Command::new("make")
        .args(["-n", "install", "PREFIX=/prefix", "DESTDIR=/stage"])
        .current_dir(path(""))
        .env_remove("MAKEFLAGS") // those of the make that runs this test
        .output()
        .expect("make runs");
    let commands = String::from_utf8_lossy(&make.stdout);
    assert!(make.status.success(), "{make:?}");
    for target in [
        "\"/stage/prefix/bin/smtp-dup\"",
        "\"/stage/prefix/share/man/man8/smtp-dup.8\"",
        "\"/stage/prefix/share/man/man5/smtp-dup.yaml.5\"",
        "\"/stage/etc/smtp-dup/config.yaml.sample\"",
    ] {
        assert!(commands.contains(target), "no {target} in:\n{commands}");
    }
    assert!(!commands.contains("smtp-dup/config.yaml\""), "{commands}");
}
