//! TLS with the programs of other people: Postfix and Dovecot as servers, Postfix, openssl and
//! swaks as clients.
//!
//! `farm` is a Postfix with many servers, and `cases` the kinds of them. What comes of these by
//! `tls` is in `primary` and `backup`, and what servers ask for in `demands`; `dovecot` is a
//! private Dovecot and `logins` logging in, `clients` are those who send us mail.
//!
//! These tests need root and the programs. Without them they say so and pass, but not when CI is
//! set.

mod backup;
mod cases;
mod clients;
mod demands;
mod dovecot;
mod farm;
mod logins;
mod primary;
