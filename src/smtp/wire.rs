//! The octets of a client: bounded command lines, and the framing of a message.
//!
//! `session` calls both halves: [`Input`] cuts what was read into command lines, and
//! [`BodyDecoder`] turns the octets after DATA into the canonical wire form that goes to every
//! destination. Neither does I/O, and neither can fail: any octets at all are some message.
//!
//! The canonical wire form is what RFC 5321 §2.3.8 and §4.5.2 ask for: every line ends in CR LF,
//! no CR or LF stands alone, lines that begin with a dot are dot-stuffed, and CR LF . CR LF is at
//! the end and nowhere else. Servers disagree about where a sloppier message ends, and that
//! disagreement is SMTP smuggling: a message inside a message. So nothing sloppy leaves us.

use memchr::{memchr, memchr2};

use super::foreign::Foreign;

/// Longest command line that is read, in octets, its ending included. RFC 5321 §4.5.3.1.4 asks
/// for 512; the parameters of DSN (RFC 3461 §5.4) and SMTPUTF8 need more.
pub const MAX_COMMAND_LINE: usize = 2048;

/// A run of CRs, or of NULs behind a dot, is not waited for beyond this length, so that it cannot
/// be used to fill the memory: the CRs count as bare, the dot as lone.
const MAX_RUN: usize = 1024;

/// What was read from a client and not yet used.
pub struct Input {
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// A command line was too long, and its rest is being thrown away.
    overlong: bool,
}

/// A command line as [`Input::peek_line`] finds it.
#[derive(Debug, PartialEq, Eq)]
pub enum Line<'a> {
    /// A whole line, without its ending.
    Whole(&'a [u8]),
    /// A line that is longer than [`MAX_COMMAND_LINE`].
    TooLong,
    /// The rest of the line has not come yet.
    Partial,
    /// No line of SMTP, whole or not.
    Foreign(Foreign),
}

impl Input {
    /// An empty input over `buffer`, whose length is the most that one read takes.
    pub fn new(buffer: Vec<u8>) -> Input {
        debug_assert!(buffer.len() > MAX_COMMAND_LINE);
        Input { buffer, start: 0, end: 0, overlong: false }
    }

    /// The next command line, ended by LF or CR LF; it stays until [`Input::consume_line`].
    pub fn peek_line(&mut self) -> Line<'_> {
        if !self.overlong
            && let Some(what) = Foreign::find(self.unread())
        {
            return Line::Foreign(what);
        }
        match memchr(b'\n', self.unread()) {
            Some(at) if self.overlong || at >= MAX_COMMAND_LINE => Line::TooLong,
            Some(at) => {
                let line = &self.buffer[self.start..self.start + at];
                Line::Whole(line.strip_suffix(b"\r").unwrap_or(line))
            }
            None => {
                self.overlong |= self.unread().len() >= MAX_COMMAND_LINE;
                if self.overlong {
                    self.start = self.end;
                }
                Line::Partial
            }
        }
    }

    /// Drops the line that [`Input::peek_line`] showed.
    pub fn consume_line(&mut self) {
        if let Some(at) = memchr(b'\n', self.unread()) {
            self.start += at + 1;
            self.overlong = false;
        }
    }

    /// Everything that was read and not yet used.
    pub fn unread(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Drops the first `octets` of [`Input::unread`].
    pub fn consume(&mut self, octets: usize) {
        self.start = self.end.min(self.start.saturating_add(octets));
    }

    /// Room for the next read; [`Input::filled`] says how much of it was used.
    pub fn room(&mut self) -> &mut [u8] {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        } else if self.end == self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.buffer[self.end..]
    }

    /// The first `octets` of [`Input::room`] were read.
    pub fn filled(&mut self, octets: usize) {
        self.end += octets;
    }

    /// Exchanges the buffer for another, to read big pieces during a message and to hold little
    /// while idle. Gives the old one back, or `buffer` itself when what is unread does not fit.
    pub fn swap(&mut self, mut buffer: Vec<u8>) -> Vec<u8> {
        let unread = self.end - self.start;
        if unread > buffer.len() {
            return buffer;
        }
        buffer[..unread].copy_from_slice(&self.buffer[self.start..self.end]);
        self.start = 0;
        self.end = unread;
        std::mem::replace(&mut self.buffer, buffer)
    }

    /// Octets that one read can take at most.
    pub fn capacity(&self) -> usize {
        self.buffer.len()
    }
}

/// Finds the end of a message and makes its octets canonical, however they were cut into reads.
///
/// - Only CR LF . CR LF ends the message, or . CR LF at its very start.
/// - CRs before a CR LF are dropped; any other bare CR or LF becomes CR LF.
/// - A line that begins after a bare CR or LF was not stuffed by a sender who saw no line there:
///   its dot is doubled.
/// - A lone dot that is ended by anything but exactly CR LF is doubled: behind us its ending will
///   be CR LF. NULs beside such a dot count as nothing, for there are servers that drop them and
///   would see the dot alone.
#[derive(Debug)]
pub struct BodyDecoder {
    state: State,
    /// Dots written at the start of a line: each is there to be taken away again.
    stuffing: u64,
}

/// What [`BodyDecoder::decode`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Decoded {
    /// The message goes on.
    More,
    /// The message ended within this input, after `consumed` octets of it.
    End { consumed: usize },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// At the start of a line that follows a CR LF, or of the message.
    LineStart,
    /// At the start of a line that follows a bare CR or LF.
    SloppyLineStart,
    /// Only NULs so far in this line.
    Nuls,
    /// A dot, and so many NULs behind it, none written yet; at a [`State::LineStart`], or else
    /// behind [`State::Nuls`].
    Dot { at_start: bool, nuls: usize },
    /// A dot alone at a [`State::LineStart`], and a CR, neither written yet.
    DotCr,
    /// Somewhere in a line.
    InLine,
    /// This many CRs, none written yet.
    Crs(usize),
}

impl Default for BodyDecoder {
    fn default() -> Self {
        Self::new()
    }
}

impl BodyDecoder {
    /// A decoder for the octets that follow the 354 reply.
    pub fn new() -> BodyDecoder {
        BodyDecoder { state: State::LineStart, stuffing: 0 }
    }

    /// How many octets of the wire form are dot-stuffing, which is not part of the message.
    pub fn stuffing(&self) -> u64 {
        self.stuffing
    }

    /// Appends the canonical wire form of `input` to `out`, up to and with the final dot.
    ///
    /// An octet whose meaning depends on the next (a CR, a dot at a line's start) is kept back
    /// until that has come. Grows `out` by less than twice the input and 2 KiB.
    pub fn decode(&mut self, input: &[u8], out: &mut Vec<u8>) -> Decoded {
        let mut at = 0;
        while let Some(&octet) = input.get(at) {
            at += match (self.state, octet) {
                (State::LineStart, b'.') => self.to(State::Dot { at_start: true, nuls: 0 }),
                (State::SloppyLineStart, b'.') => {
                    self.stuffing += 1;
                    self.put(b"..", out, State::InLine)
                }
                (State::LineStart | State::SloppyLineStart | State::Nuls, 0) => {
                    self.put(b"\0", out, State::Nuls)
                }
                (State::Nuls, b'.') => self.to(State::Dot { at_start: false, nuls: 0 }),
                (State::LineStart | State::SloppyLineStart | State::Nuls | State::InLine, _) => {
                    self.lines(&input[at..], out)
                }

                (State::Dot { at_start: true, nuls: 0 }, b'\r') => self.to(State::DotCr),
                (State::Dot { at_start, nuls }, 0) if nuls < MAX_RUN => {
                    self.to(State::Dot { at_start, nuls: nuls + 1 })
                }
                (State::Dot { at_start, nuls }, _) => {
                    let is_lone = matches!(octet, 0 | b'\r' | b'\n');
                    out.extend_from_slice(if is_lone { b".." } else { b"." });
                    out.resize(out.len() + nuls, 0);
                    self.stuffing += u64::from(at_start);
                    self.again(b"", out, State::InLine)
                }

                (State::DotCr, b'\n') => {
                    out.extend_from_slice(b".\r\n");
                    self.state = State::LineStart;
                    return Decoded::End { consumed: at + 1 };
                }
                (State::DotCr, _) => {
                    self.stuffing += 1;
                    self.again(b"..", out, State::Crs(1))
                }

                (State::Crs(_), b'\n') => self.put(b"\r\n", out, State::LineStart),
                (State::Crs(run), b'\r') if run < MAX_RUN => self.to(State::Crs(run + 1)),
                (State::Crs(run), _) => {
                    for _ in 0..run {
                        out.extend_from_slice(b"\r\n");
                    }
                    self.again(b"", out, State::SloppyLineStart)
                }
            };
        }
        Decoded::More
    }

    /// Copies the ordinary lines at the head of `input` (each ended by CR LF, none beginning with
    /// a dot or NUL) in one piece, and deals with the one odd octet behind them, if any. Nearly
    /// all octets of nearly all mail pass here, one `memchr2` a line.
    fn lines(&mut self, input: &[u8], out: &mut Vec<u8>) -> usize {
        let mut end = 0;
        let (next, odd) = loop {
            match memchr2(b'\r', b'\n', &input[end..]) {
                None => {
                    end = input.len();
                    break (State::InLine, 0);
                }
                Some(n) => end += n,
            }
            match (input[end], input.get(end + 1)) {
                (b'\r', Some(b'\n')) => end += 2,
                (b'\r', _) => break (State::Crs(1), 1),
                _ => break (State::SloppyLineStart, 1),
            }
            if let None | Some(b'.' | 0) = input.get(end) {
                break (State::LineStart, 0);
            }
        };
        out.extend_from_slice(&input[..end]);
        if next == State::SloppyLineStart {
            out.extend_from_slice(b"\r\n");
        }
        self.state = next;
        end + odd
    }

    /// Takes the octet without writing anything yet.
    fn to(&mut self, state: State) -> usize {
        self.state = state;
        1
    }

    /// Takes the octet and writes `octets` for it.
    fn put(&mut self, octets: &[u8], out: &mut Vec<u8>, state: State) -> usize {
        out.extend_from_slice(octets);
        self.state = state;
        1
    }

    /// Writes `octets` for what was kept back, and looks at the octet again in the new state.
    fn again(&mut self, octets: &[u8], out: &mut Vec<u8>, state: State) -> usize {
        out.extend_from_slice(octets);
        self.state = state;
        0
    }
}
