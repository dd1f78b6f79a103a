//! How the program is started, and told to end.

pub mod descriptors;
pub mod listener;
pub mod signals;
