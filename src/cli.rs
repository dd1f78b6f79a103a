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

    /// user to become, as name or name:group, once the sockets are open; only root can
    #[argh(option, arg_name = "user")]
    pub user: Option<String>,

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
    Inetd(Inetd),
}

/// Read the configuration, connect to each destination, say EHLO, and print what was found. The
/// exit code is 1 when the primary fails, 2 when the configuration is wrong.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "check")]
pub struct Check {}

/// Serve the one client whose connection is standard input, as inetd, spawn(8) and tcpserver start
/// it. That is found out without this word too; with it, any other standard input is a mistake.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "inetd")]
pub struct Inetd {}

impl Arguments {
    /// Reads the words behind the program's name.
    ///
    /// # Errors
    /// The text to print, and whether it was asked for (`--help`) or is about a mistake.
    pub fn read(words: &[String]) -> Result<Arguments, EarlyExit> {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        Arguments::from_args(&["smtp-dup"], &words)
    }
}
