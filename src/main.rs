//! Arguments, configuration, start. Exit codes: 0 the end was asked for; 1 something failed; 2 the
//! command line or the configuration is wrong.
//!
//! The order is that of privileges: sockets and configuration are opened as whoever started the
//! program, then root is given up, and only then is there a second thread or a client's word.

use std::io::{self, ErrorKind};
use std::net::TcpListener;
use std::process::ExitCode;
use std::sync::Arc;

use nix::unistd::{Uid, chdir};
use smtp_dup::cli::{Arguments, Command};
use smtp_dup::config::{self, Config};
use smtp_dup::launch::master::{self, Master, Role, Tie};
use smtp_dup::launch::privileges::{User, become_owner, confine, inside};
use smtp_dup::launch::signals::Signals;
use smtp_dup::launch::{Clients, Launch, addresses, inherited, listener, systemd};
use smtp_dup::logger::{self, Place, Target};
use smtp_dup::message::Scratch;
use smtp_dup::server::Store;
use smtp_dup::spool::Spool;
use smtp_dup::{check, maillog, operator, server};

const FAILED: u8 = 1;
const WRONG_USE: u8 = 2;

fn main() -> ExitCode {
    let words: Vec<String> =
        std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    let code = match Master::found(&words) {
        Some(master) => under_master(master),
        None => by_hand(&words),
    };
    log::logger().flush();
    code
}

/// Started by a person, a supervisor, or a super-server with a client's connection.
fn by_hand(words: &[String]) -> ExitCode {
    let arguments = match Arguments::read(words) {
        Err(exit) if exit.status.is_ok() => {
            print!("{}", exit.output);
            return ExitCode::SUCCESS;
        }
        Ok(arguments) if arguments.version => {
            println!("smtp-dup {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Ok(arguments) if arguments.command.as_ref().is_some_and(Command::is_for_people) => {
            return command(&arguments);
        }
        read => read.map_err(|exit| {
            let what = exit.output.trim().trim_end_matches('.').to_string();
            format!("{what}; see smtp-dup --help")
        }),
    };
    // Before anything is said: standard error may lead to a client.
    let launch = match Launch::find() {
        Ok(launch) => launch,
        Err(what) => return refuse(Launch::ALONE, &what),
    };
    let has_client = matches!(launch.clients, Some(Clients::One(_)));
    if arguments.as_ref().is_ok_and(|arguments| arguments.command.is_some()) && !has_client {
        let is_heard = inherited::stderr_is_stdin();
        let log = if is_heard { Place::syslog() } else { launch.log };
        let why = "inetd: standard input is no connection of a client; this is for inetd, \
                   spawn(8) and the like to start";
        return refuse(Launch { clients: launch.clients, log }, why);
    }
    let loaded = arguments.and_then(|arguments| load(&arguments, &launch));
    match loaded {
        Ok((config, warnings, user)) => {
            open_log(&config, [launch.log]);
            warn(&warnings);
            serve(&config, launch.clients, user.as_ref())
        }
        Err(what) => refuse(launch, &what),
    }
}

/// Nothing can be served, and the log is not open yet.
fn refuse(launch: Launch, why: &str) -> ExitCode {
    launch.refuse(why);
    ExitCode::from(WRONG_USE)
}

/// What is wrong with command line and configuration is found here.
fn load(
    arguments: &Arguments,
    launch: &Launch,
) -> Result<(Config, Vec<String>, Option<User>), String> {
    let user = arguments.user.as_deref().map(User::find).transpose()?;
    let file = arguments.config.as_deref();
    let (config, warnings) = Config::load(file, environment(), user.as_ref().map(|user| user.uid))
        .map_err(|mistake| mistake.to_string())?;
    let addresses = launch.clients.as_ref().map(Clients::addresses);
    config
        .refuse_circles(addresses.as_deref().unwrap_or(&config.listen))
        .map_err(|mistake| mistake.to_string())?;
    Ok((config, warnings, user))
}

fn environment() -> impl Iterator<Item = (String, String)> {
    let text = |octets: std::ffi::OsString| octets.to_string_lossy().into_owned();
    std::env::vars_os().map(move |(name, value)| (text(name), text(value)))
}

fn open_log(config: &Config, auto: impl IntoIterator<Item = Place>) {
    let place = |auto| config.log_target.place(auto);
    let mut places: Vec<Place> = auto.into_iter().map(place).collect();
    places.dedup();
    logger::start(places, config.log_level);
}

/// Where a command logs that people give. What becomes of a copy by it must be in the log that has
/// the rest about its message, and not on a terminal alone.
fn heard(command: Option<&Command>) -> Vec<Place> {
    match command {
        Some(Command::Flush(_)) if !logger::is_journal() => vec![Place::Stderr, Place::syslog()],
        // They print a line for each copy themselves.
        Some(Command::Retry(_) | Command::Drop(_)) => vec![Place::syslog()],
        _ => vec![Place::Stderr],
    }
}

fn warn(warnings: &[String]) {
    warnings.iter().for_each(|warning| maillog::configuration(warning));
}

/// A command that people give: it prints, and does not serve.
fn command(arguments: &Arguments) -> ExitCode {
    let is_check = matches!(arguments.command, Some(Command::Check(_)));
    // Check answers for the service, which would not start with what others may write.
    let trusted = if is_check { Ok(()) } else { trust(arguments) };
    let (config, user) = match trusted.and_then(|()| load(arguments, &Launch::ALONE)) {
        Ok((config, warnings, user)) => {
            open_log(&config, heard(arguments.command.as_ref()));
            warn(&warnings);
            (config, user)
        }
        Err(what) => return refuse(Launch::ALONE, &what),
    };
    let done = match &arguments.command {
        Some(Command::Check(_)) => match config.refuse_named_circles(&config.listen) {
            Ok(()) => Ok(check::run(&config)),
            Err(mistake) => return refuse(Launch::ALONE, &mistake.to_string()),
        },
        Some(command) => with_spool(&config, user.as_ref(), command),
        None => Ok(true),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(FAILED),
        // Whoever read our output has seen enough.
        Err(error) if error.kind() == ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("smtp-dup: {error}");
            let is_wrong = error.kind() == ErrorKind::InvalidInput;
            ExitCode::from(if is_wrong { WRONG_USE } else { FAILED })
        }
    }
}

/// Whoever may write the configuration says which folder is the spool. Root is not led by that to
/// more than its owner could do, for root becomes its owner first. One that is found in the folder
/// where root happens to be is not meant: that is left to be refused.
fn trust(arguments: &Arguments) -> Result<(), String> {
    let file = arguments.config.as_deref();
    let file = file.or_else(|| config::found().filter(|file| file.is_absolute()));
    match file.filter(|_| arguments.user.is_none()) {
        Some(file) if file.exists() => {
            become_owner(file).map_err(|error| format!("{}: {error}", file.display()))
        }
        _ => Ok(()),
    }
}

/// A command on the spool, as the user that was named, or the one whose it is.
fn with_spool(config: &Config, user: Option<&User>, command: &Command) -> io::Result<bool> {
    let settings = config.spool.as_ref().ok_or_else(|| {
        io::Error::new(ErrorKind::InvalidInput, "relay.spool is not set: there is no spool")
    })?;
    let wrong = |what| io::Error::new(ErrorKind::InvalidInput, what);
    confine(user, None).map_err(wrong)?;
    become_owner(&settings.folder).map_err(|error| wrong(settings.missing(&error)))?;
    let spool = Arc::new(Spool::open(settings).map_err(wrong)?);
    match command {
        Command::Queue(order) => operator::queue(config, &spool, order),
        Command::Flush(order) => operator::flush(config, &spool, order, &Signals::watch()?),
        Command::Retry(order) => operator::retry(config, &spool, order),
        Command::Drop(order) => operator::drop(&spool, order),
        Command::Check(_) | Command::Inetd(_) => Ok(true),
    }
}

/// Serves the clients that came with the start, or else whoever connects.
fn serve(config: &Config, clients: Option<Clients>, user: Option<&User>) -> ExitCode {
    let clients = match clients {
        Some(clients) => Ok(clients),
        None => listener::bind(&config.listen).map(Clients::Many),
    };
    let clients = match clients {
        Ok(clients) => clients,
        Err(what) => {
            // The configuration may name a log that nobody keeps.
            if config.log_target == Target::Syslog {
                eprintln!("smtp-dup: {what}");
            }
            return ended(Err(what));
        }
    };
    // What root, or the configuration, has to put right is no failure that passes.
    let spool = confine(user, None)
        .and_then(|()| refuse_circles(config, &clients))
        .and_then(|()| open_spool(config));
    let spool = match spool {
        Ok(spool) => spool,
        Err(what) => {
            clients.turn_away();
            maillog::fatal(what);
            return ExitCode::from(WRONG_USE);
        }
    };
    if Uid::effective().is_root() {
        maillog::runs_as_root();
    }
    let store = Store { scratch: Scratch::Folder(std::env::temp_dir()), spool };
    let served = Signals::watch().and_then(|signals| {
        systemd::ready();
        server::run(config, clients, &signals, None, store)
    });
    ended(served.map_err(|error| format!("signals: {error}")))
}

/// The destinations that are names may be ours, too. A process for one client has no time to look
/// them up; it sees when it comes to itself.
fn refuse_circles(config: &Config, clients: &Clients) -> Result<(), String> {
    match clients {
        Clients::One(_) => Ok(()),
        Clients::Many(listeners) => config
            .refuse_named_circles(&addresses(listeners))
            .map_err(|mistake| mistake.to_string()),
    }
}

/// As the user who serves, so that the files are that user's.
fn open_spool(config: &Config) -> Result<Option<Arc<Spool>>, String> {
    config.spool.as_ref().map(|settings| Spool::open(settings).map(Arc::new)).transpose()
}

/// The exit code, and the last word in the log if something failed.
fn ended(result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(what) => {
            maillog::fatal(what);
            ExitCode::from(FAILED)
        }
    }
}

/// Started by Postfix's master(8): see [`master`].
fn under_master(master: Result<Master, String>) -> ExitCode {
    let (master, ready) = match master.and_then(prepare) {
        Ok(prepared) => prepared,
        Err(what) => {
            let launch = Launch { clients: None, log: master::log_place(None) };
            return refuse(launch, &what);
        }
    };
    ended(match master.split() {
        Ok(Role::Keeper(keeper)) => keeper.watch(),
        Ok(Role::Child(listeners, tie)) => serve_for_master(ready, listeners, tie),
        Err(error) => Err(format!("two processes under master(8): {error}")),
    })
}

/// What was read and looked up before there were two processes.
struct Ready {
    config: Config,
    warnings: Vec<String>,
    store: Store,
}

/// Reads the configuration, opens the log, gives up root: all that must come before
/// [`Master::split`]. Nothing is logged here, for that may take a thread.
fn prepare(master: Master) -> Result<(Master, Ready), String> {
    let queue = std::env::current_dir().map_err(|error| format!("current folder: {error}"))?;
    if let Some(folder) = &master.arguments.directory {
        let wrong = |error| format!("directory={}, in master.cf: {error}", folder.display());
        chdir(folder).map_err(wrong)?;
    }
    let user = User::find(&master.arguments.user()).map_err(|what| format!("user=: {what}"))?;
    let (mut config, warnings) =
        Config::load(None, environment(), Some(user.uid)).map_err(|mistake| mistake.to_string())?;
    config.refuse_circles(&addresses(&master.listeners)).map_err(|mistake| mistake.to_string())?;
    if master.arguments.verbose {
        config.log_level = config.log_level.max(log::LevelFilter::Debug);
    }
    let root = master.arguments.chroot.then_some(queue.as_path());
    let scratch = match root {
        Some(root) => Scratch::within(root)?,
        None => Scratch::Folder(std::env::temp_dir()),
    };
    if let (Some(root), Some(spool)) = (root, &mut config.spool) {
        spool.folder =
            inside(root, &spool.folder).map_err(|what| format!("relay.spool: {what}"))?;
    }
    open_log(&config, [master::log_place(root)]);
    confine(Some(&user), root)?;
    if config.has_names() {
        let own = addresses(&master.listeners);
        master::apart(|| config.refuse_named_circles(&own).map_err(|mistake| mistake.to_string()))?;
    }
    let spool = open_spool(&config)?;
    Ok((master, Ready { config, warnings, store: Store { scratch, spool } }))
}

fn serve_for_master(ready: Ready, listeners: Vec<TcpListener>, tie: Tie) -> Result<(), String> {
    let Ready { config, warnings, store } = ready;
    warn(&warnings);
    Signals::watch()
        .and_then(|signals| {
            server::run(&config, Clients::Many(listeners), &signals, Some(tie), store)
        })
        .map_err(|error| format!("signals: {error}"))
}
