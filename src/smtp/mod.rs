//! The receiving side: what a client says, and what it hears.

pub mod client;
pub mod command;
pub mod envelope;
pub mod foreign;
pub mod grammar;
pub mod incoming;
pub mod origin;
pub mod reply;
pub mod session;
pub mod wire;
