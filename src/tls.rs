//! TLS by rustls: what is asked of a destination, and what is shown to clients.
//!
//! `config` makes a [`Peer`] for each destination and a [`Certificate`] for clients while it is being
//! loaded: certificates and keys are read then, as whoever started the program, and never again.
//! A [`Stream`](crate::stream::Stream) holds the [`Session`] that either of them gives.
//!
//! TLS 1.2 and 1.3, and what rustls with ring takes for good enough in them. Sessions are resumed,
//! within one process and one destination.

mod session;

use std::fmt;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, OtherError,
    RootCertStore, ServerConfig, ServerConnection, SignatureScheme,
};

pub use self::session::Session;

/// Whose certificate is good enough.
pub enum Trust {
    /// Anybody's, good or not: keeps out who only listens, and nobody who can do more.
    Anybody,
    /// One that one of these CAs has given to the destination's name.
    Authorities(Arc<RootCertStore>),
    /// This very one, whatever it says of itself.
    Pinned(Fingerprint),
}

/// TLS with one destination.
pub struct Peer {
    trust: Trust,
    /// Made for the first session: a process that is there for one client greets that first, and
    /// has no use for it with a server that offers no TLS.
    config: OnceLock<Arc<ClientConfig>>,
    name: ServerName<'static>,
    is_verified: bool,
    /// It offers TLS, and the last connection does without.
    in_clear: AtomicBool,
}

impl Peer {
    /// TLS with the server of this name, or address.
    ///
    /// # Errors
    /// A text about the name.
    pub fn new(name: &str, trust: Trust) -> Result<Peer, String> {
        let is_verified = !matches!(trust, Trust::Anybody);
        let text = name.strip_suffix('.').unwrap_or(name);
        let name = match ServerName::try_from(text) {
            Ok(name) => name.to_owned(),
            Err(_) if is_verified => {
                return Err(format!("\"{text}\" can be no name in a certificate; set server_name"));
            }
            // An address is not sent along, and no name has to be.
            Err(_) => ServerName::from(std::net::IpAddr::from(Ipv4Addr::UNSPECIFIED)),
        };
        let (config, in_clear) = (OnceLock::new(), AtomicBool::new(false));
        Ok(Peer { trust, config, name, is_verified, in_clear })
    }

    /// The beginning of a session.
    ///
    /// # Errors
    /// What rustls says.
    pub fn session(&self) -> Result<Session, String> {
        self.config()
            .and_then(|config| ClientConnection::new(config, self.name.clone()))
            .map(|connection| Session::new(connection.into()))
            .map_err(|error| error.to_string())
    }

    /// One for all sessions, which are resumed by it.
    fn config(&self) -> Result<Arc<ClientConfig>, rustls::Error> {
        if let Some(config) = self.config.get() {
            return Ok(Arc::clone(config));
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?;
        let config = match &self.trust {
            Trust::Anybody => unchained(builder, Unchained { pinned: None, provider }),
            Trust::Pinned(one) => unchained(builder, Unchained { pinned: Some(*one), provider }),
            Trust::Authorities(store) => {
                builder.with_root_certificates(Arc::clone(store)).with_no_client_auth()
            }
        };
        // Another thread may have made one as well meanwhile: the first is everybody's.
        Ok(Arc::clone(self.config.get_or_init(|| Arc::new(config))))
    }

    /// It is known who is at the other end of a session.
    pub fn is_verified(&self) -> bool {
        self.is_verified
    }

    /// Notes whether a connection to a server that offers TLS does without. True when that has
    /// changed.
    pub fn goes_in_clear(&self, in_clear: bool) -> bool {
        self.in_clear.swap(in_clear, Ordering::Relaxed) != in_clear
    }
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Peer({:?}, is_verified: {})", self.name, self.is_verified)
    }
}

type Builder = rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>;

fn unchained(builder: Builder, verifier: Unchained) -> ClientConfig {
    builder.dangerous().with_custom_certificate_verifier(Arc::new(verifier)).with_no_client_auth()
}

/// The CAs of the system.
///
/// # Errors
/// A text that says that there are none.
pub fn system_authorities() -> Result<Arc<RootCertStore>, String> {
    let found = rustls_native_certs::load_native_certs();
    let mut store = RootCertStore::empty();
    // Some systems ship CAs that webpki cannot read; the others do without those.
    let (good, _) = store.add_parsable_certificates(found.certs);
    match good {
        0 => {
            Err("tls: this system has no CA certificates; install them (ca-certificates), or set \
                  ca_file or fingerprint"
                .into())
        }
        _ => Ok(Arc::new(store)),
    }
}

/// The CAs in the text of a file, in PEM.
///
/// # Errors
/// A text that says what is wrong with it.
pub fn authorities(text: &[u8]) -> Result<Arc<RootCertStore>, String> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(text)? {
        store.add(certificate).map_err(|error| error.to_string())?;
    }
    Ok(Arc::new(store))
}

/// The certificates in the text of a file, in PEM; at least one.
///
/// # Errors
/// A text that says what is wrong with it.
pub fn certificates(text: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text).collect();
    match all {
        Ok(all) if !all.is_empty() => Ok(all),
        Ok(_) => Err("holds no certificate; write them in PEM (BEGIN CERTIFICATE)".into()),
        Err(error) => Err(format!("holds no certificate in PEM: {error}")),
    }
}

/// The private key in the text of a file, in PEM.
///
/// # Errors
/// A text that says what is wrong with it, and nothing of the key.
pub fn private_key(text: &[u8]) -> Result<PrivateKeyDer<'static>, String> {
    PrivateKeyDer::from_pem_slice(text)
        .map_err(|_| "holds no private key; write it in PEM, and not encrypted".into())
}

/// The SHA-256 of a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Reads 64 hexadecimal digits of either case, with colons or without, as openssl prints them.
    pub fn parse(text: &str) -> Option<Fingerprint> {
        let digits: Vec<u8> = text.bytes().filter(|&octet| octet != b':').collect();
        let mut octets = [0; 32];
        if digits.len() != 2 * octets.len() {
            return None;
        }
        for (octet, pair) in octets.iter_mut().zip(digits.chunks(2)) {
            let digit = |digit: u8| char::from(digit).to_digit(16);
            *octet = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
        }
        Some(Fingerprint(octets))
    }

    fn of(certificate: &CertificateDer) -> Fingerprint {
        let mut octets = [0; 32];
        let digest = ring::digest::digest(&ring::digest::SHA256, certificate);
        octets.copy_from_slice(digest.as_ref());
        Fingerprint(octets)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pairs: Vec<String> = self.0.iter().map(|octet| format!("{octet:02X}")).collect();
        f.write_str(&pairs.join(":"))
    }
}

/// Another certificate than the one that is pinned.
#[derive(Debug)]
struct NotPinned(Fingerprint);

impl fmt::Display for NotPinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "its fingerprint is {}, not the one configured", self.0)
    }
}

impl std::error::Error for NotPinned {}

/// Judges a certificate by itself, and not by who has signed it.
#[derive(Debug)]
struct Unchained {
    pinned: Option<Fingerprint>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Unchained {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match self.pinned {
            Some(pinned) if Fingerprint::of(certificate) != pinned => {
                let why = NotPinned(Fingerprint::of(certificate));
                Err(CertificateError::Other(OtherError(Arc::new(why))).into())
            }
            _ => Ok(ServerCertVerified::assertion()),
        }
    }

    // Without a pin a signature would prove nothing, and old certificates cannot be read for it.

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        if self.pinned.is_none() {
            return Ok(HandshakeSignatureValid::assertion());
        }
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        if self.pinned.is_none() {
            return Ok(HandshakeSignatureValid::assertion());
        }
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Who we are to clients: a certificate with its chain, and its key.
#[derive(Debug, Clone)]
pub struct Certificate(Arc<ServerConfig>);

impl Certificate {
    /// Takes our certificate, with those that lead from it to a CA, and its key.
    ///
    /// # Errors
    /// A text about the key.
    pub fn new(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Certificate, String> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, key))
            .map_err(|error| match error {
                rustls::Error::InconsistentKeys(_) => {
                    "is not the key of the certificate in smtp.tls_certificate; name the two that \
                     belong together"
                        .to_string()
                }
                error => format!("does not do with smtp.tls_certificate: {error}"),
            })?;
        Ok(Certificate(Arc::new(config)))
    }

    /// The beginning of a session.
    ///
    /// # Errors
    /// What rustls says.
    pub fn session(&self) -> Result<Session, String> {
        ServerConnection::new(Arc::clone(&self.0))
            .map(|connection| Session::new(connection.into()))
            .map_err(|error| error.to_string())
    }
}
