//! The order of commands, kept by mailin's state machine.
//!
//! mailin parses less than real clients send (no null reverse-path, no ESMTP parameters, no
//! quoted local parts) and answers a command before anyone could be asked. So `session` decides
//! the reply first, by asking the primary, and then feeds mailin a constant stand-in for the
//! command, with the code of that reply for its handler to return. If the handler is not called,
//! the command was out of order.

use std::cell::Cell;
use std::net::{IpAddr, Ipv4Addr};
use std::rc::Rc;

use mailin::{Action, Handler, Response, Session, SessionBuilder};

use super::reply::{Class, Reply};

/// Where a client is in RFC 5321 §4.1.4.
pub struct Grammar {
    machine: Session<Answer>,
    code: Rc<Cell<Option<u16>>>,
}

/// A step that the state machine knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// EHLO or HELO.
    Hello,
    /// MAIL.
    Mail,
    /// RCPT.
    Rcpt,
    /// DATA.
    Data,
    /// The final dot.
    EndOfData,
    /// RSET.
    Rset,
}

impl Step {
    /// What mailin gets to see of it.
    fn stand_in(self) -> &'static [u8] {
        match self {
            Step::Hello => b"HELO x\r\n",
            Step::Mail => b"MAIL FROM:<x>\r\n",
            Step::Rcpt => b"RCPT TO:<x>\r\n",
            Step::Data => b"DATA\r\n",
            Step::EndOfData => b".\r\n",
            Step::Rset => b"RSET\r\n",
        }
    }
}

impl Grammar {
    /// A client that has not said anything yet.
    pub fn new() -> Grammar {
        let code = Rc::new(Cell::new(None));
        let answer = Answer(Rc::clone(&code));
        let nobody = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        Grammar { machine: SessionBuilder::new("").build(nobody, answer), code }
    }

    /// Takes a step that is being answered with `reply`. False when it was out of order, and
    /// nothing has changed.
    pub fn step(&mut self, step: Step, reply: &Reply) -> bool {
        // To mailin a 3xx is success, which it is to DATA alone.
        let code = match reply.class() {
            Class::Intermediate if step != Step::Data => 451,
            _ => reply.code(),
        };
        self.code.set(Some(code));
        let response = self.machine.process(step.stand_in());
        match step {
            Step::Rset => !response.is_error,
            _ => self.code.take().is_none(),
        }
    }
}

impl Default for Grammar {
    fn default() -> Self {
        Self::new()
    }
}

/// mailin's handler: returns the code that was decided beforehand.
struct Answer(Rc<Cell<Option<u16>>>);

impl Answer {
    fn take(&self) -> Response {
        let mut response = Response::custom(self.0.take().unwrap_or(451), String::new());
        // A 421 would end the state machine; ending the session is for `session` to do.
        response.action = Action::Reply;
        response
    }
}

impl Handler for Answer {
    fn helo(&mut self, _: IpAddr, _: &str) -> Response {
        self.take()
    }

    fn mail(&mut self, _: IpAddr, _: &str, _: &str) -> Response {
        self.take()
    }

    fn rcpt(&mut self, _: &str) -> Response {
        self.take()
    }

    fn data_start(&mut self, _: &str, _: &str, _: bool, _: &[String]) -> Response {
        self.take()
    }

    fn data_end(&mut self) -> Response {
        let mut response = self.take();
        // On an error mailin would stay in its data state and swallow the commands that follow.
        response.is_error = false;
        response
    }
}
