//! Other hosts: clients that are not this machine, over a cable of their own.
//!
//! Each host is a network namespace (`host`). `strangers` are clients whose address is not allowed,
//! `circles` destinations that are the host's own.
//!
//! These tests need root, and leave to make namespaces. Without they say so and pass, but not when
//! CI is set.

mod circles;
#[path = "../common/mod.rs"]
mod common;
mod host;
#[path = "../postfix/instance.rs"]
mod instance;
mod strangers;

/// A small message in wire form.
const BODY: &[u8] = b"Subject: test\r\n\r\nHello\r\n";
