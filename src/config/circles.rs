//! Mail in circles: a destination at which we listen ourselves.
//!
//! What is found here is refused at the start. The rest is found at run time, by the greeting: see
//! [`crate::identity`].

use std::net::SocketAddr;
use std::time::Duration;

use nix::ifaddrs::getifaddrs;

use super::{Config, Mistake};
use crate::relay::destination::Destination;
use crate::shutdown::Deadline;

/// All names together are looked up for no longer: a resolver that is ill must not keep the
/// program from its start.
const LOOK_UP: Duration = Duration::from_secs(2);

impl Config {
    /// No destination may be one of the addresses `own`, where our clients reach us; as far as can
    /// be said without looking up names.
    ///
    /// # Errors
    /// The [`Mistake`] in the first that is.
    pub fn refuse_circles(&self, own: &[SocketAddr]) -> Result<(), Mistake> {
        self.refuse(own, |destination| {
            destination.literal().or_else(|| destination.local_name()).into_iter().collect()
        })
    }

    /// The same with names looked up, those that can be in time. Takes threads.
    ///
    /// # Errors
    /// As [`Config::refuse_circles`].
    pub fn refuse_named_circles(&self, own: &[SocketAddr]) -> Result<(), Mistake> {
        let deadline = Deadline::uncut(LOOK_UP);
        self.refuse(own, |destination| destination.addresses(deadline).unwrap_or_default())
    }

    /// A destination is given by name.
    pub fn has_names(&self) -> bool {
        self.backups.iter().chain([&self.primary]).any(|destination| !destination.is_literal())
    }

    fn refuse(
        &self,
        own: &[SocketAddr],
        addresses: impl Fn(&Destination) -> Vec<SocketAddr>,
    ) -> Result<(), Mistake> {
        let own = with_interfaces(own);
        let keys = self.backups.iter().map(|backup| ("relay.destination_backups", backup));
        for (key, destination) in keys.chain([("relay.destination_primary", &self.primary)]) {
            for address in addresses(destination) {
                if let Some(own) = own.iter().find(|own| is_same(destination, address, own)) {
                    return Err(Mistake(format!(
                        "{key}: \"{destination}\" is our own address {own} (smtp.listen): mail would go in circles; \
                         write another server's address"
                    )));
                }
            }
        }
        Ok(())
    }
}

/// Who listens on all addresses listens on those of each interface. All of IPv6 is IPv4 too.
fn with_interfaces(own: &[SocketAddr]) -> Vec<SocketAddr> {
    let mut all = own.to_vec();
    for everywhere in own.iter().filter(|own| own.ip().is_unspecified()) {
        // Without a list of them, the greeting tells.
        let Ok(interfaces) = getifaddrs() else { break };
        let addresses = interfaces.filter_map(|interface| {
            let address = interface.address?;
            let ipv4 = address.as_sockaddr_in().map(|address| address.ip().into());
            ipv4.or_else(|| address.as_sockaddr_in6().map(|address| address.ip().into()))
        });
        let addresses = addresses.map(|ip| SocketAddr::new(ip, everywhere.port()));
        all.extend(addresses.filter(|ours| ours.is_ipv4() || everywhere.is_ipv6()));
    }
    all
}

/// The destination, which is at `address`, is the address that we listen on.
fn is_same(destination: &Destination, address: SocketAddr, listen: &SocketAddr) -> bool {
    let (theirs, ours) = (address.ip().to_canonical(), listen.ip().to_canonical());
    let is_local = theirs.is_loopback() || theirs.is_unspecified();
    // localhost, or no address in particular, may be any of the loopback's.
    let is_vague = destination.local_name().is_some() || theirs.is_unspecified();
    let is_ours =
        theirs == ours || is_local && (ours.is_unspecified() || is_vague && ours.is_loopback());
    is_ours && address.port() == listen.port()
}
