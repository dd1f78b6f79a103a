//! In the place of `tls.rs` in a build without TLS: there is no session, and none can be had.

use std::io;
use std::net::TcpStream;

use crate::shutdown::Expired;
use crate::stream::Unsecured;

/// No TLS with a destination.
#[derive(Debug)]
pub enum Peer {}

impl Peer {
    /// There is none.
    pub fn session(&self) -> Result<Session, String> {
        match *self {}
    }

    /// There is none.
    pub fn is_verified(&self) -> bool {
        match *self {}
    }

    /// There is none.
    pub fn goes_in_clear(&self, _: bool) -> bool {
        match *self {}
    }
}

/// No certificate to show.
#[derive(Debug, Clone)]
pub enum Certificate {}

impl Certificate {
    /// There is none.
    pub fn session(&self) -> Result<Session, String> {
        match *self {}
    }
}

/// No session.
pub enum Session {}

impl Session {
    pub fn handshake(
        &mut self,
        _: &TcpStream,
        _: impl Fn() -> Result<(), Expired>,
    ) -> Result<(), Unsecured> {
        match *self {}
    }

    pub fn about(&self) -> String {
        match *self {}
    }

    pub fn is_behind(&self) -> bool {
        match *self {}
    }

    pub fn write(&mut self, _: &TcpStream, _: &[u8]) -> io::Result<usize> {
        match *self {}
    }

    pub fn write_last(&mut self, _: &TcpStream, _: &[u8]) {
        match *self {}
    }

    pub fn read(&mut self, _: &TcpStream, _: &mut [u8]) -> io::Result<usize> {
        match *self {}
    }

    pub fn read_now(&mut self, _: &TcpStream, _: &mut [u8]) -> io::Result<usize> {
        match *self {}
    }

    pub fn close(&mut self, _: &TcpStream) {
        match *self {}
    }
}
