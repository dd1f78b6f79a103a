//! One copy of one message over one connection to a backup.
//!
//! An `agent` calls [`Copy::send`]. The primary's word has been given already, so everything here
//! is done to get the copy in: what the backup lacks is left out, recipients are judged one by
//! one, and a refusal of some does not keep the others from theirs.

use std::sync::Arc;

use super::connection::{Connection, Failure, Step};
use super::features::Features;
use super::primary::MAX_UNANSWERED;
use crate::message::{Body, Message};
use crate::shutdown::{Deadline, Shutdown};
use crate::smtp::command::Relayed;
use crate::smtp::envelope::{Envelope, Path, split_parameter};
use crate::smtp::reply::{Class, Reply};
use crate::spool::claim::Claim;

/// What one backup is still owed of a message.
#[derive(Debug)]
pub struct Copy {
    /// The message, shared with the other backups.
    pub message: Arc<Message>,
    /// The recipients that have not got it, by their place in the envelope.
    pub owed: Vec<usize>,
    /// How often it was tried.
    pub attempts: u32,
    /// For one of the spool, while it is being tried: nobody else may.
    pub claim: Option<Claim>,
}

/// What became of an attempt in which the backup answered everything.
#[derive(Debug)]
pub struct Attempt {
    /// The reply that decided over the message: the one to end-of-data, or the refusal before it.
    /// `None` when no recipient was left to send it for.
    pub verdict: Option<Reply>,
    /// Recipients refused for good.
    pub refused: Vec<(usize, Reply)>,
    /// Recipients to be tried again.
    pub deferred: Vec<(usize, Reply)>,
    /// What the message had to do without.
    pub without: Vec<&'static str>,
    /// The refusal of XFORWARD, which changes nothing about the copy.
    pub unforwarded: Option<Reply>,
}

impl Copy {
    /// A copy for all recipients.
    pub fn new(message: &Arc<Message>) -> Copy {
        let owed = (0..message.envelope.forward_paths.len()).collect();
        Copy { message: Arc::clone(message), owed, attempts: 0, claim: None }
    }

    /// A copy of the spool, of which somebody has taken hold: what is owed of it.
    pub fn claimed(mut self, claim: Claim) -> Copy {
        self.attempts = claim.owed.attempts;
        let most = self.message.envelope.forward_paths.len();
        // A state with other places is not this message's: then all is owed.
        if let Some(places) = &claim.owed.places
            && places.iter().all(|&place| place < most)
        {
            self.owed = places.clone();
        }
        self.claim = Some(claim);
        self
    }

    /// It is in the spool: nothing of it is lost when this goes.
    pub fn is_stored(&self) -> bool {
        self.message.place.is_some()
    }

    /// A recipient by its place in the envelope.
    pub fn recipient(&self, place: usize) -> &Path {
        &self.message.envelope.forward_paths[place]
    }

    /// Sends it for all recipients that are owed it, and leaves the connection at rest if it
    /// can be used again.
    ///
    /// # Errors
    /// [`Failure`], a 421 included: the connection is of no more use, and the message may have
    /// been taken or not.
    pub fn send(
        &self,
        connection: &mut Connection,
        shutdown: &Shutdown,
    ) -> Result<Attempt, Failure> {
        let mut attempt = Attempt {
            verdict: None,
            refused: Vec::new(),
            deferred: Vec::new(),
            without: Vec::new(),
            unforwarded: None,
        };
        let features = connection.features().clone();
        let Some((commands, places)) = self.commands(&features, &mut attempt) else {
            return Ok(attempt);
        };
        let mut replies = converse(connection, &commands, shutdown)?.into_iter();

        let forwards = commands.iter().filter(|(verb, _)| *verb == "XFORWARD").count();
        attempt.unforwarded =
            replies.by_ref().take(forwards).filter(|r| r.class() != Class::Success).last();
        let mail = replies.next();
        let mut accepted = 0;
        for (place, reply) in places.into_iter().zip(&mut replies) {
            match reply.class() {
                Class::Success => accepted += 1,
                Class::Permanent => attempt.refused.push((place, reply)),
                Class::Transient | Class::Intermediate => attempt.deferred.push((place, reply)),
            }
        }
        let data = replies.next();
        match (mail, data) {
            (Some(mail), _) if mail.class() != Class::Success => {
                attempt.refused.clear();
                attempt.deferred.clear();
                attempt.verdict = Some(mail);
            }
            (_, Some(data)) if data.class() == Class::Intermediate => {
                if accepted == 0 {
                    // It would take a message for nobody (RFC 2920 §3.1); the connection is left
                    // as it is, not at rest, so that it is closed.
                    return Ok(attempt);
                }
                attempt.verdict = Some(self.send_body(connection, shutdown)?);
                return Ok(attempt);
            }
            (_, Some(data)) if accepted > 0 => attempt.verdict = Some(data),
            _ => {}
        }
        // All has been said about this copy, whatever becomes of the connection now.
        let reset = converse(connection, &[("RSET", b"RSET\r\n".to_vec())], shutdown);
        if reset.is_ok_and(|replies| replies.iter().all(|r| r.class() == Class::Success)) {
            connection.rest();
        }
        Ok(attempt)
    }

    /// The commands for what this backup can take, and the places of their recipients; what it
    /// cannot take goes into `attempt`.
    fn commands(
        &self,
        features: &Features,
        attempt: &mut Attempt,
    ) -> Option<(Commands, Vec<usize>)> {
        let Envelope { origin, reverse_path, .. } = &self.message.envelope;
        let impossible = |path: &Path| path.is_utf8() && !features.utf8;
        let no_utf8 = || {
            Reply::new(550, "5.6.7", "the backup does not offer SMTPUTF8, which this address needs")
        };
        if impossible(reverse_path) {
            attempt.verdict = Some(no_utf8());
            return None;
        }
        let attributes = origin.arguments(|name| features.xforward.iter().any(|own| own == name));
        let mut commands: Commands =
            attributes.into_iter().map(|argument| line(&Relayed::Xforward(argument))).collect();
        let mail = reduce_mail(reverse_path, features, &mut attempt.without);
        commands.push(line(&Relayed::Mail(mail)));
        let mut places = Vec::with_capacity(self.owed.len());
        for &place in &self.owed {
            let path = self.recipient(place);
            if impossible(path) {
                attempt.refused.push((place, no_utf8()));
            } else {
                commands.push(line(&Relayed::Rcpt(reduce_rcpt(path, features))));
                places.push(place);
            }
        }
        if places.is_empty() {
            return None;
        }
        commands.push(line(&Relayed::Data));
        Some((commands, places))
    }

    /// Sends what follows the 354, and gives the reply to it. The connection is at rest after a
    /// reply to the whole; one that refused in the middle is of no more use.
    fn send_body(
        &self,
        connection: &mut Connection,
        shutdown: &Shutdown,
    ) -> Result<Reply, Failure> {
        let deadline = Deadline::of_copy(connection.limits().data, shutdown);
        let sent = connection.check_quiet(Step::Message).and_then(|()| match &self.message.body {
            Body::Memory(octets) => connection.send_message(octets, deadline),
            Body::File { file, start, length } => {
                connection.send_file(file, *start, *length, deadline)
            }
        });
        match sent {
            Ok(()) => {}
            Err(Failure::Untimely(_, reply)) if is_refusal(&reply) => return Ok(reply),
            Err(failure) => return Err(failure),
        }
        let reply = connection.reply(Step::EndOfData, deadline)?;
        match reply.class() {
            Class::Intermediate => Err(Failure::Nonsense(Step::EndOfData, reply.to_string())),
            _ if reply.code() == 421 => Err(Failure::Unwelcome(Step::EndOfData, reply)),
            _ => {
                connection.rest();
                Ok(reply)
            }
        }
    }
}

/// A refusal of this message, and not the end of the connection.
fn is_refusal(reply: &Reply) -> bool {
    matches!(reply.class(), Class::Transient | Class::Permanent) && reply.code() != 421
}

/// Command lines with their verbs.
type Commands = Vec<(&'static str, Vec<u8>)>;

fn line(command: &Relayed) -> (&'static str, Vec<u8>) {
    let mut line = Vec::new();
    command.write(&mut line);
    (command.verb(), line)
}

/// Sends commands, as many at once as the server takes, and gives their replies. Stops behind a
/// refused MAIL when it has not sent more.
fn converse(
    connection: &mut Connection,
    commands: &[(&'static str, Vec<u8>)],
    shutdown: &Shutdown,
) -> Result<Vec<Reply>, Failure> {
    let deadline = Deadline::of_copy(connection.limits().command, shutdown);
    let most = if connection.features().pipelining { MAX_UNANSWERED } else { 0 };
    let mut replies = Vec::with_capacity(commands.len());
    let mut batch = Vec::new();
    let mut rest = commands;
    while let [(first, _), ..] = rest {
        batch.clear();
        let mut count = 0;
        for (_, line) in rest {
            if count > 0 && batch.len() + line.len() > most {
                break;
            }
            batch.extend_from_slice(line);
            count += 1;
        }
        let (sent, later) = rest.split_at(count);
        rest = later;
        connection.send(&batch, Step::Command(first), deadline)?;
        for (verb, _) in sent {
            let step = Step::Command(verb);
            let reply = match connection.reply(step, deadline) {
                Ok(reply) if reply.code() != 421 => reply,
                // The refusal of MAIL stands, though the server closes behind it.
                _ if is_refused(commands, &replies) => return Ok(replies),
                Ok(reply) => return Err(Failure::Unwelcome(step, reply)),
                Err(failure) => return Err(failure),
            };
            match reply.class() {
                Class::Success if *verb == "DATA" => {
                    return Err(Failure::Nonsense(step, reply.to_string()));
                }
                Class::Intermediate if *verb != "DATA" => {
                    return Err(Failure::Nonsense(step, reply.to_string()));
                }
                _ => replies.push(reply),
            }
        }
        if is_refused(commands, &replies) {
            break;
        }
    }
    Ok(replies)
}

/// MAIL was refused.
fn is_refused(commands: &[(&'static str, Vec<u8>)], replies: &[Reply]) -> bool {
    let mut answered = commands.iter().zip(replies);
    answered.any(|((verb, _), reply)| *verb == "MAIL" && reply.class() != Class::Success)
}

/// MAIL's argument with the parameters that the server knows.
fn reduce_mail(path: &Path, features: &Features, without: &mut Vec<&'static str>) -> Path {
    let keep = path.parameters().filter(|parameter| {
        let (keyword, _) = split_parameter(parameter);
        match keyword.to_ascii_uppercase().as_slice() {
            b"SIZE" => features.size.is_some(),
            b"RET" | b"ENVID" => features.dsn,
            b"BODY" => {
                features.eight_bit || {
                    without.push("8BITMIME");
                    false
                }
            }
            b"SMTPUTF8" => {
                features.utf8 || {
                    without.push("SMTPUTF8");
                    false
                }
            }
            _ => false,
        }
    });
    Path { parameters: keep.collect::<Vec<_>>().join(&b' '), path: path.path.clone() }
}

/// RCPT's argument; a server that knows DSN is asked never to notify anyone of a copy (RFC 3461
/// §4.1).
fn reduce_rcpt(path: &Path, features: &Features) -> Path {
    let mut parameters = Vec::new();
    if features.dsn {
        parameters.extend_from_slice(b"NOTIFY=NEVER");
        let is_fit = |value: &&[u8]| !value.is_empty() && (features.utf8 || value.is_ascii());
        if let Some(original) = path.value("ORCPT").filter(is_fit) {
            parameters.extend_from_slice(b" ORCPT=");
            parameters.extend_from_slice(original);
        }
    }
    Path { parameters, path: path.path.clone() }
}
