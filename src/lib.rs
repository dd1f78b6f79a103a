//! smtp-dup, an SMTP duplicator: each transaction live to one primary server, and a copy of every
//! message that the primary accepted to any number of backups.
//!
//! The modules in the order in which a message meets them:
//!
//! - [`cli`], [`config`]: how the program is told what to do;
//! - [`maillog`], [`logger`]: how it tells what it did, and where;
//! - [`launch`]: who started it, and where connections come from;
//! - [`identity`]: who we are to others;
//! - [`server`]: a worker thread for each, and the end of them all;
//! - [`stream`], [`tls`]: the socket that it has there, and those to the destinations;
//! - [`smtp`]: the client's side of a session;
//! - [`relay`]: the primary's side, and the backups;
//! - [`message`], [`buffers`], [`spool`]: what is held meanwhile, in memory and on disk;
//! - [`shutdown`]: how long everybody may still wait;
//! - [`check`], [`operator`]: the commands that people give.

pub mod buffers;
pub mod check;
pub mod cli;
pub mod config;
pub mod identity;
pub mod launch;
pub mod logger;
pub mod maillog;
pub mod message;
pub mod operator;
pub mod relay;
pub mod server;
pub mod shutdown;
pub mod smtp;
pub mod spool;
pub mod stream;
#[cfg(feature = "tls")]
pub mod tls;
#[cfg(not(feature = "tls"))]
#[path = "tls/none.rs"]
pub mod tls;
