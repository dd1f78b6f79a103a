//! What the fuzz targets run; `main.rs` runs the same on the kept corpus.

pub mod dialogue;
pub mod primary;
pub mod rules;
pub mod server;
pub mod session;
pub mod spool;
pub mod transport;
pub mod yaml;
