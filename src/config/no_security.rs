//! In the place of `security` in a build without TLS: all that it takes is refused.

use std::path::Path;

use nix::unistd::Uid;

use super::destination::Words;
use crate::relay::destination::Destination;
use crate::tls::Certificate;

/// What to say of a key that asks for more than there is.
const REFUSAL: &str = "this smtp-dup was built without TLS; leave the key out, or build it with the \
                       feature tls";

/// Who we are to clients: nobody.
pub fn certificate(
    certificate: Option<&Path>,
    key: Option<&Path>,
    _: Option<Uid>,
) -> Result<Option<Certificate>, String> {
    match (certificate, key) {
        (None, None) => Ok(None),
        (Some(_), _) => Err(format!("smtp.tls_certificate: {REFUSAL}")),
        (None, Some(_)) => Err(format!("smtp.tls_key: {REFUSAL}")),
    }
}

/// The destination, if the other keys ask for nothing.
pub fn secured(to: Destination, words: &Words, _: Option<Uid>) -> Result<Destination, String> {
    let is_plain = words.get("tls")?.is_none_or(|level| level == "none");
    let asked = words.0.keys().find(|key| *key != "address" && (*key != "tls" || !is_plain));
    match asked {
        None => Ok(to),
        Some(key) => Err(format!("{key}: {REFUSAL}")),
    }
}
