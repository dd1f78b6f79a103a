//! STARTTLS: what a session does between its 220 and a new beginning.

use super::{End, Session, not_offered};
use crate::maillog;
use crate::smtp::grammar::Grammar;
use crate::smtp::reply::Reply;

impl Session<'_, '_, '_> {
    /// STARTTLS (RFC 3207): all that was said before the handshake is forgotten behind it, for
    /// anybody may have said it.
    pub(super) fn start_tls(&mut self) -> Result<(), End> {
        let Some(certificate) = self.shared.tls else {
            return self.mistake(not_offered());
        };
        if self.client.has_tls() {
            return self.mistake(Reply::new(503, "5.5.1", "TLS is there already"));
        }
        if self.transaction.is_some() {
            return self.mistake(Reply::new(503, "5.5.1", "STARTTLS out of order"));
        }
        let address = self.client.address;
        // Who can put octets behind STARTTLS would have them read as if they came through TLS
        // (CVE-2011-0411).
        if !self.client.input.unread().is_empty() || self.client.read_now()? {
            maillog::client_without_tls(address, "octets behind STARTTLS");
            return self.close(&Reply::new(554, "5.5.1", "nothing may stand behind STARTTLS"));
        }
        self.leave_transaction();
        self.primary.release();
        self.client.say(&Reply::new(220, "2.0.0", "go ahead"));
        self.client.flush()?;
        match certificate.session().and_then(|session| self.client.secure(session)) {
            Ok(cipher) => maillog::client_has_tls(address, &cipher),
            Err(why) => {
                maillog::client_without_tls(address, &why);
                return Err(End::Gone);
            }
        }
        self.grammar = Grammar::new();
        self.greeted = false;
        self.errors = 0;
        Ok(())
    }
}
