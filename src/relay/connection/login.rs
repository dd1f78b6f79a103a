//! AUTH: the mechanisms PLAIN and LOGIN of SASL (RFC 4954).

use lettre::transport::smtp::authentication::Mechanism;
use lettre::transport::smtp::commands::Auth;
use lettre::transport::smtp::response::Response;

use super::{Connection, Failure, Step};
use crate::relay::security::Login;
use crate::shutdown::Deadline;
use crate::smtp::reply::{Class, Reply};

/// LOGIN asks for the name and for the password. More questions than this are none of it.
const MOST_QUESTIONS: usize = 2;

/// In the place of what must not be seen.
const HIDDEN: &str = "(not shown: it repeats what was sent to log in)";

impl Connection {
    /// Logs in.
    ///
    /// # Errors
    /// [`Failure`], which shows nothing of what was sent.
    pub(super) fn log_in(&mut self, login: &Login, deadline: Deadline) -> Result<(), Failure> {
        let mut sent = Vec::new();
        self.exchange(login, &mut sent, deadline).map_err(|failure| masked(failure, login, &sent))
    }

    /// The commands, and their words in `sent`.
    fn exchange(
        &mut self,
        login: &Login,
        sent: &mut Vec<Vec<u8>>,
        deadline: Deadline,
    ) -> Result<(), Failure> {
        let step = Step::Auth;
        let mechanism = match (self.features.auth_plain, self.features.auth_login) {
            (true, _) => Mechanism::Plain,
            (false, true) => Mechanism::Login,
            (false, false) => {
                let what = "neither PLAIN nor LOGIN is offered; see username and tls";
                return Err(Failure::Unfit(step, what.into()));
            }
        };
        let mut command = Auth::new(mechanism, login.credentials(), None);
        for _ in 0..=MOST_QUESTIONS {
            let line = command.map_err(|error| Failure::Nonsense(step, error.to_string()))?;
            let line = line.to_string();
            sent.extend(line.split_whitespace().filter(|word| !is_known(word)).map(Into::into));
            self.send(line.as_bytes(), step, deadline)?;
            let reply = self.reply(step, deadline)?;
            match reply.class() {
                Class::Success => {
                    self.rest();
                    return Ok(());
                }
                Class::Intermediate if mechanism == Mechanism::Login => {
                    command = answer(login, &reply);
                }
                Class::Intermediate => return Err(Failure::Nonsense(step, reply.to_string())),
                _ => return Err(Failure::Unwelcome(step, reply)),
            }
        }
        Err(Failure::Nonsense(step, "more questions than LOGIN has".into()))
    }
}

/// The answer to a question of LOGIN.
fn answer(login: &Login, reply: &Reply) -> Result<Auth, lettre::transport::smtp::Error> {
    let text = String::from_utf8_lossy(reply.wire());
    let response: Response = text.parse()?;
    Auth::new_from_response(Mechanism::Login, login.credentials(), &response)
}

/// A word of the command that is no secret.
fn is_known(word: &str) -> bool {
    matches!(word, "AUTH" | "PLAIN" | "LOGIN")
}

/// The failure without what the server repeats of that which nobody else may know.
fn masked(failure: Failure, login: &Login, sent: &[Vec<u8>]) -> Failure {
    let hidden = |reply: Reply| match login.is_told_by(reply.wire(), sent) {
        true => Reply::new(reply.code(), "", HIDDEN),
        false => reply,
    };
    match failure {
        Failure::Unwelcome(step, reply) => Failure::Unwelcome(step, hidden(reply)),
        Failure::Untimely(step, reply) => Failure::Untimely(step, hidden(reply)),
        // What had to be escaped does not look like what it was.
        Failure::Nonsense(step, what)
            if what.contains('\\') || login.is_told_by(what.as_bytes(), sent) =>
        {
            Failure::Nonsense(step, HIDDEN.into())
        }
        other => other,
    }
}
