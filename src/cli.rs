//! The command line.

use std::path::PathBuf;

use argh::{EarlyExit, FromArgs};

/// An SMTP duplicator: passes each mail transaction live to one primary server, and sends a copy
/// of every message it accepted to each backup. See smtp-dup(8) and smtp-dup.yaml(5).
#[derive(FromArgs, Debug)]
pub struct Arguments {
    /// configuration file; without it ./config.yaml or /etc/smtp-dup/config.yaml
    #[argh(option, arg_name = "file")]
    pub config: Option<PathBuf>,

    /// print name and version
    #[argh(switch)]
    pub version: bool,

    #[argh(subcommand)]
    pub command: Option<Command>,
}

/// What to do instead of serving.
#[derive(FromArgs, Debug)]
#[argh(subcommand)]
pub enum Command {
    Check(Check),
}

/// Read the configuration, connect to each destination, say EHLO, and print what was found. The
/// exit code is 1 when the primary fails, 2 when the configuration is wrong.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "check")]
pub struct Check {}

impl Arguments {
    /// Reads the command line.
    ///
    /// # Errors
    /// The text to print, and whether it was asked for (`--help`) or is about a mistake.
    pub fn read(arguments: impl Iterator<Item = String>) -> Result<Arguments, EarlyExit> {
        let all: Vec<String> = arguments.collect();
        let rest: Vec<&str> = all.iter().skip(1).map(String::as_str).collect();
        Arguments::from_args(&["smtp-dup"], &rest)
    }
}
