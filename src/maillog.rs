//! Every line of the log, one function each, in the shapes that Postfix's users know.
//!
//! Everything that came from outside is kept on one line: control characters are escaped. No
//! line holds any of a message but its Message-ID.

use std::fmt::Display;
use std::net::SocketAddr;
use std::time::Instant;

use log::{Level, debug, error, info, log, warn};

use crate::config::Config;
use crate::launch::descriptors::Shortage;
use crate::logger::last_panic;
use crate::message::{QueueId, Scratch};
use crate::relay::connection::{Failure, Protection, delay};
use crate::relay::destination::Destination;
use crate::smtp::envelope::{Envelope, Path};
use crate::smtp::foreign::Foreign;
use crate::smtp::reply::{Class, Reply};

/// The level of the first and the last line: a process for one client is no event.
fn life(is_for_one: bool) -> Level {
    if is_for_one { Level::Debug } else { Level::Info }
}

/// The first line: which program, from where, to where.
pub fn starting(config: &Config, listen: &[SocketAddr], is_for_one: bool) {
    let listen = listen.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(",");
    let backups = config.backups.iter().map(Destination::to_string).collect::<Vec<_>>().join(",");
    log!(
        life(is_for_one),
        "starting smtp-dup {}: listen={listen} destination_primary={} destination_backups={backups}{}",
        env!("CARGO_PKG_VERSION"),
        config.primary,
        config
            .spool
            .as_ref()
            .map_or(String::new(), |spool| format!(" spool={}", spool.folder.display())),
    );
}

/// Something in the configuration that is odd but not wrong.
pub fn configuration(what: &str) {
    warn!("{}", one_line(what));
}

/// Big bodies have no place while they are here.
pub fn scratch_unusable(place: &Scratch, failure: &std::io::Error) {
    warn!(
        "temporary files cannot be made in {place} (TMPDIR): {failure}; without a spool, copies of \
         messages over 256 KiB are lost"
    );
}

/// The limit on open files does not do for all connections that the configuration allows.
pub fn few_descriptors(shortage: &Shortage) {
    let Shortage { needed, limit, clients } = shortage;
    warn!(
        "the limit on open files is {limit}, but all connections may need {needed}: \
         serving {clients} clients at a time; \
         raise it (ulimit -n, LimitNOFILE) or lower smtp.max_connections; \
         without a spool, copies of messages over 256 KiB are not kept"
    );
}

/// Nobody told it whom to become.
pub fn runs_as_root() {
    warn!("running as root, which nothing needs any more; name a user with --user");
}

/// A signal asked the program to end.
pub fn stopping(signal: &str) {
    info!("stopping on {signal}");
}

/// Under master(8): a reload, or the end of master.
pub fn relieved() {
    info!("relieved: master(8) has reloaded or ended; finishing what has begun");
}

/// The last line.
pub fn stopped(is_for_one: bool) {
    log!(life(is_for_one), "stopped");
}

/// A client that may not send.
pub fn client_denied(client: SocketAddr) {
    warn!("client={client} refused: its address is not in smtp.allowed_clients");
}

/// A client that found no free worker.
pub fn client_turned_away(client: SocketAddr, reason: &str) {
    warn!("client={client} turned away: {reason}");
}

/// accept(2) failed.
pub fn accept_failed(failure: &std::io::Error) {
    error!("accept: {failure}; trying again, 5 times a second");
}

/// A session came.
pub fn connected(client: SocketAddr) {
    debug!("client={client} connected");
}

/// A client has begun TLS.
pub fn client_has_tls(client: SocketAddr, cipher: &str) {
    info!("client={client} TLS: {cipher}");
}

/// A client wanted TLS, and the session ends without.
pub fn client_without_tls(client: SocketAddr, why: &str) {
    info!("client={client} TLS failed: {}", one_line(why));
}

/// A session ended.
pub fn disconnected(client: SocketAddr, how: &str) {
    debug!("client={client} {how}");
}

/// A session ended inside a transaction: that mail was not passed on.
pub fn transaction_lost(id: QueueId, client: SocketAddr, how: &str) {
    info!("{id}: client={client} {how}; nothing was delivered");
}

/// A command that was answered by us with an error.
pub fn command_refused(client: SocketAddr, reply: &Reply) {
    debug!("client={client} heard ({reply})");
}

/// A client sent something else, beginning like this.
pub fn not_smtp(client: SocketAddr, what: Foreign, head: &[u8]) {
    let line = head.split(|&octet| octet == b'\n').next().unwrap_or(head);
    let excerpt = line[..line.len().min(60)].trim_ascii_end().escape_ascii();
    warn!("client={client} cut off: it sent {what}, not SMTP: \"{excerpt}\"");
}

/// A limit of the configuration refused something.
pub fn over_limit(client: SocketAddr, reply: &Reply, key: &str) {
    info!("client={client} heard ({reply}), because of {key}");
}

/// A thread of ours panicked, which was caught there; nothing else suffers.
pub fn panicked(who: &str) {
    error!("{who}: a defect of smtp-dup, at {}, ended this; please report it", last_panic());
}

/// A thread could not be started.
pub fn no_thread(what: &str, failure: &std::io::Error) {
    error!("{what}: no thread: {failure}");
}

/// A message has come in whole, and what the primary said of it; or what we did, if it was kept
/// from the primary. Two lines in one write: this is
/// logged for every message, while its client waits.
pub fn message(seen: &Seen, primary: Option<&Destination>, since: Instant, reply: &Reply) {
    let Seen { id, client, envelope, size, message_id } = seen;
    let status = match reply.class() {
        Class::Success => "sent",
        Class::Permanent => "refused",
        Class::Intermediate | Class::Transient => "deferred",
    };
    let relay = primary.map_or("none".into(), |primary| format!("{primary} role=primary"));
    let original = envelope.origin.client();
    info!(
        "{id}: client={client}{} from={} size={size} nrcpt={} message-id={}\n\
         {id}: relay={relay} delay={} status={status} ({})",
        original.map_or(String::new(), |original| format!(" orig_client={original}")),
        envelope.reverse_path.display(),
        envelope.forward_paths.len(),
        message_id.map_or(String::new(), |octets| one_line(&String::from_utf8_lossy(octets))),
        delay(since),
        one_line(&reply.to_string()),
    );
}

/// What is logged of a message itself.
pub struct Seen<'a> {
    /// Its name in the log.
    pub id: QueueId,
    /// Who sent it.
    pub client: SocketAddr,
    /// Whom it is from, and to how many.
    pub envelope: &'a Envelope,
    /// Octets, without the final dot.
    pub size: u64,
    /// Its Message-ID field, if it was found.
    pub message_id: Option<&'a [u8]>,
}

/// The primary refused MAIL or RCPT.
pub fn primary_refused(id: QueueId, primary: &Destination, verb: &str, path: &Path, reply: &Reply) {
    let word = if verb == "MAIL" { "from" } else { "to" };
    let status = if reply.class() == Class::Permanent { "refused" } else { "deferred" };
    info!(
        "{id}: {word}={} relay={primary} role=primary status={status} ({})",
        path.display(),
        one_line(&reply.to_string())
    );
}

/// A connection to a destination has TLS.
pub fn relay_has_tls(to: &Destination, tls: &Protection) {
    info!("relay={to} TLS: {tls}");
}

/// A destination offers TLS and gets its mail without; said once until it is over.
pub fn goes_in_clear(to: &Destination, failure: &Failure) {
    info!("relay={to} gets mail in clear: {}", one_line(&failure.to_string()));
}

/// No connection to the primary.
pub fn primary_unavailable(primary: &Destination, failure: &Failure) {
    error!("relay={primary} role=primary is not available: {}", one_line(&failure.to_string()));
}

/// The primary failed inside a transaction.
pub fn primary_failed(primary: &Destination, failure: &Failure) {
    error!("relay={primary} role=primary failed: {}", one_line(&failure.to_string()));
}

/// A backup has a copy.
pub fn copy_sent(id: QueueId, backup: &Destination, since: Instant, reply: &Reply) {
    info!(
        "{id}: relay={backup} role=backup delay={} status=sent ({})",
        delay(since),
        one_line(&reply.to_string())
    );
}

/// A copy went out without something that the backup lacks.
pub fn copy_reduced(id: QueueId, backup: &Destination, what: &str) {
    info!("{id}: relay={backup} role=backup does not offer {what}: sent without");
}

/// A backup does not want to hear who the client was; said once.
pub fn origin_refused(backup: &Destination, reply: &Reply) {
    warn!(
        "relay={backup} role=backup offers XFORWARD and refuses it: copies are sent without ({})",
        one_line(&reply.to_string())
    );
}

/// A backup refused one recipient for good.
pub fn copy_recipient_refused(id: QueueId, backup: &Destination, path: &Path, reply: &Reply) {
    error!(
        "{id}: to={} relay={backup} role=backup status=refused ({})",
        path.display(),
        one_line(&reply.to_string())
    );
}

/// A copy will be tried again.
pub fn copy_deferred(
    id: QueueId,
    backup: &Destination,
    since: Instant,
    attempts: u32,
    next_seconds: u64,
    why: &str,
) {
    info!(
        "{id}: relay={backup} role=backup delay={} status=deferred attempts={attempts} next={next_seconds} ({})",
        delay(since),
        one_line(why)
    );
}

/// A copy is given up.
pub fn copy_lost(id: QueueId, backup: &Destination, why: &str) {
    error!("{id}: relay={backup} role=backup status=lost ({})", one_line(why));
}

/// A copy was refused for good, or tried for too long: the spool keeps it.
pub fn copy_failed(id: QueueId, backup: &Destination, why: &str) {
    error!(
        "{id}: relay={backup} role=backup status=failed ({}); kept in failed/: see smtp-dup queue --failed",
        one_line(why)
    );
}

/// Somebody has a copy sent again, perhaps to another backup, and under another name.
pub fn copy_retried(id: QueueId, backup: &str, to: &str, new: QueueId) {
    let name = if new == id { String::new() } else { format!(", as {new}") };
    info!("{id}: relay={backup} role=backup status=deferred (smtp-dup retry: for {to}{name})");
}

/// Somebody has given a copy up.
pub fn copy_dropped(id: QueueId, backup: &str) {
    info!("{id}: relay={backup} role=backup status=dropped (smtp-dup drop)");
}

/// A process for one client does not try a copy: the spool has it for others.
pub fn copy_kept(id: QueueId, backup: &Destination, why: &str) {
    info!(
        "{id}: relay={backup} role=backup status=deferred (kept in the spool: {})",
        one_line(why)
    );
}

/// A message could not be put into the spool.
pub fn spool_failed(id: QueueId, failure: &std::io::Error) {
    error!("{id}: the spool (relay.spool) failed: {failure}");
}

/// The spool failed for one backup, which changes nothing about mail.
pub fn spool_unreadable(backup: &Destination, failure: &std::io::Error) {
    error!("relay={backup} role=backup: the spool (relay.spool) failed: {failure}");
}

/// A file of the spool is not what it should be.
pub fn spool_damaged(id: QueueId, backup: &Destination, failure: &std::io::Error) {
    error!("{id}: relay={backup} role=backup status=failed ({failure})");
}

/// What a crash has left in the spool could not be looked through.
pub fn sweep_failed(failure: &std::io::Error) {
    error!("the spool (relay.spool) could not be cleared up: {failure}");
}

/// What earlier processes have left in the spool was looked through.
pub fn spool_swept(copies: u64) {
    info!("the spool was looked through: copies that are owed since before: {copies}");
}

/// What earlier processes have left in the spool.
pub fn spool_has(backup: &str, copies: u64) {
    info!("relay={backup} is owed {copies} copies by the spool");
}

/// The spool has copies for a backup that is not configured.
pub fn spool_orphans(backup: &str, copies: u64) {
    warn!(
        "relay={backup} is owed {copies} copies by the spool, but is no destination any more: \
         smtp-dup retry --all --backup {backup} --to OTHER, or smtp-dup drop --all --backup {backup}"
    );
}

/// A backup cannot be reached; its copies wait.
pub fn backup_down(backup: &Destination, why: &str) {
    error!("relay={backup} role=backup is down: {}", one_line(why));
}

/// A backup refuses one connection of several; the others serve it.
pub fn backup_full(backup: &Destination, why: &str) {
    info!(
        "relay={backup} role=backup refuses one connection of several \
         (see relay.backup_connections): {}",
        one_line(why)
    );
}

/// A backup that was down takes copies again.
pub fn backup_back(backup: &Destination) {
    info!("relay={backup} role=backup is back");
}

/// A backup that may write bounces for copies.
pub fn backup_without_dsn(backup: &Destination) {
    warn!(
        "relay={backup} role=backup does not offer DSN: it cannot be asked to send no bounces; \
         switch off its bounces and vacation replies while it gets copies"
    );
}

/// Text from outside on one line: control characters escaped.
pub fn one_line(text: &str) -> String {
    match text.contains(|c: char| c.is_control()) {
        true => text
            .chars()
            .flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] })
            .collect(),
        false => text.to_string(),
    }
}

/// Shows `what` as an error, for failures that end the program.
pub fn fatal(what: impl Display) {
    error!("{what}");
}
