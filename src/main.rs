//! Arguments, configuration, start. Exit codes: 0 the end was asked for; 1 something failed; 2 the
//! command line or the configuration is wrong.

use std::process::ExitCode;

use smtp_dup::cli::{Arguments, Command};
use smtp_dup::config::Config;
use smtp_dup::launch::{listener, signals::Signals};
use smtp_dup::{check, maillog, server};

const FAILED: u8 = 1;
const WRONG_USE: u8 = 2;

fn main() -> ExitCode {
    let words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
    let arguments = match Arguments::read(words) {
        Ok(arguments) => arguments,
        Err(exit) if exit.status.is_ok() => {
            print!("{}", exit.output);
            return ExitCode::SUCCESS;
        }
        Err(exit) => {
            eprintln!(
                "smtp-dup: {}; see smtp-dup --help",
                exit.output.trim().trim_end_matches('.')
            );
            return ExitCode::from(WRONG_USE);
        }
    };
    if arguments.version {
        println!("smtp-dup {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let environment = std::env::vars_os()
        .map(|(k, v)| (k.to_string_lossy().into_owned(), v.to_string_lossy().into_owned()));
    let (config, warnings) = match Config::load(arguments.config.as_deref(), environment) {
        Ok(loaded) => loaded,
        Err(mistake) => {
            eprintln!("smtp-dup: {mistake}");
            return ExitCode::from(WRONG_USE);
        }
    };
    maillog::start(config.log_level);
    for warning in warnings {
        maillog::configuration(&warning);
    }
    match arguments.command {
        Some(Command::Check(_)) => match check::run(&config) {
            true => ExitCode::SUCCESS,
            false => ExitCode::from(FAILED),
        },
        None => serve(&config),
    }
}

/// Serves until a signal ends it.
fn serve(config: &Config) -> ExitCode {
    let started =
        Signals::watch().map_err(|error| format!("signals: {error}")).and_then(|signals| {
            let listeners = listener::bind(&config.listen)?;
            Ok((signals, listeners))
        });
    match started {
        Ok((signals, listeners)) => {
            server::run(config, listeners, &signals);
            ExitCode::SUCCESS
        }
        Err(what) => {
            maillog::fatal(what);
            ExitCode::from(FAILED)
        }
    }
}
