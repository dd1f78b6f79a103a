//! The sending side: the primary, live, and the backups' copies.

pub mod agent;
pub mod backup;
pub mod connection;
pub mod copy;
pub mod destination;
pub mod features;
pub mod pool;
pub mod primary;
pub mod security;
