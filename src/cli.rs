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
    Queue(Queue),
    Flush(Flush),
    Retry(Retry),
    Drop(Drop),
}

impl Command {
    /// It prints for people, and serves nobody.
    pub fn is_for_people(&self) -> bool {
        !matches!(self, Command::Inetd(_))
    }
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

/// Show the copies that wait in the spool: for whom, since when, why, and when they are tried next.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "queue")]
pub struct Queue {
    /// show those that were given up instead
    #[argh(switch)]
    pub failed: bool,

    /// one JSON object a line, for programs
    #[argh(switch)]
    pub json: bool,
}

/// Try all copies in the spool once, now, and exit; or those of the named backups alone.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "flush")]
pub struct Flush {
    /// host:port, as configured
    #[argh(positional)]
    pub backup: Vec<String>,
}

/// Send copies again that were given up, and let those that wait be due now.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "retry")]
pub struct Retry {
    /// all that were given up, and all whose backup is configured no more
    #[argh(switch)]
    pub all: bool,

    /// only those for this backup
    #[argh(option, arg_name = "backup")]
    pub backup: Option<String>,

    /// send them to this configured backup instead
    #[argh(option, arg_name = "backup")]
    pub to: Option<String>,

    /// the messages, by the name that they have in the log
    #[argh(positional)]
    pub id: Vec<String>,
}

/// Give copies up and remove them, in whichever part of the spool they are.
#[derive(FromArgs, Debug)]
#[argh(subcommand, name = "drop")]
pub struct Drop {
    /// all for the backup that --backup names
    #[argh(switch)]
    pub all: bool,

    /// only those for this backup
    #[argh(option, arg_name = "backup")]
    pub backup: Option<String>,

    /// the messages, by the name that they have in the log
    #[argh(positional)]
    pub id: Vec<String>,
}

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
