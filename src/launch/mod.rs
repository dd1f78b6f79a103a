//! How the program is started, and told to end.

pub mod listener;
pub mod signals;
