//! The kinds of servers, and what has to come of each.

use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

use super::farm::{Farm, Service};
use crate::instance::command;
use crate::pki::{Authority, Pair, self_signed};

/// What `tls: required` makes of a server.
#[derive(Clone, Copy)]
pub enum Verdict {
    /// Mail, by TLS.
    Good,
    /// No mail. The words are in what is said of it.
    Bad(&'static [&'static str]),
}

use Verdict::{Bad, Good};

pub struct Case {
    /// That of the server.
    pub name: &'static str,
    options: String,
    /// What stands in the configuration beside `tls`, where it is verified.
    pub keys: String,
    /// The version of TLS, if it comes to that.
    pub version: Option<&'static str>,
    pub required: Verdict,
}

/// Cases, and the folder of their files.
pub struct Cases {
    pub all: Vec<Case>,
    folder: TempDir,
}

const ANY: Option<&str> = Some("TLSv1.3");

/// For what OpenSSL does not take for secure any more.
const OLD: &str = "-o tls_medium_cipherlist=ALL:@SECLEVEL=0 -o smtpd_tls_protocols=";

const UNTRUSTED: Verdict =
    Bad(&["4.7.5", "TLS: the certificate is from an issuer that is not trusted", "fingerprint"]);

impl Cases {
    /// All of them.
    pub fn new() -> Cases {
        let mut cases = Cases { all: Vec::new(), folder: tempfile::tempdir().unwrap() };
        cases.add_certificates();
        cases.add_versions();
        cases.add_old_ways();
        cases
    }

    /// The servers.
    pub fn farm(&self) -> Farm {
        let service = |case: &Case| Service { name: case.name, options: case.options.clone() };
        Farm::start(&self.all.iter().map(service).collect::<Vec<_>>(), "")
    }

    fn add(
        &mut self,
        name: &'static str,
        options: &str,
        keys: &str,
        version: Option<&'static str>,
        required: Verdict,
    ) {
        let (options, keys) = (options.into(), keys.into());
        self.all.push(Case { name, options, keys, version, required });
    }

    /// A file in the folder.
    fn file(&self, name: &str, text: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// The option for a server that shows this certificate.
    fn showing(&self, name: &str, pair: &Pair) -> String {
        let path = self.file(name, &(pair.key.clone() + &pair.certificate));
        format!("-o smtpd_tls_chain_files={}", path.display())
    }

    /// The key for this CA.
    fn trusting(&self, name: &str, pem: &str) -> String {
        format!("ca_file: \"{}\"", self.file(name, pem).display())
    }

    fn add_certificates(&mut self) {
        let authority = Authority::new();
        let ca = self.trusting("ca", &authority.pem);

        let here = authority.issue("127.0.0.1");
        let good = self.showing("good", &here);
        self.add("good", &good, &ca, ANY, Good);

        let elsewhere = self_signed("elsewhere.example");
        let alone = self.showing("alone", &elsewhere);
        self.add("selfsigned", &alone, &ca, ANY, UNTRUSTED);
        self.add("pinned", &alone, &pin(&elsewhere), ANY, Good);
        self.add("otherpin", &alone, &pin(&here), ANY, Bad(&["4.7.5", "its fingerprint is "]));

        let expired = self.showing("expired", &authority.issue_expired("127.0.0.1"));
        let old = Bad(&["4.7.5", "expired at 2021-01-01", "renew it"]);
        self.add("expired", &expired, &ca, ANY, old);
        let early = self.showing("early", &authority.issue_early("127.0.0.1"));
        let young = Bad(&["4.7.5", "not valid before 2090-01-01", "clock"]);
        self.add("early", &early, &ca, ANY, young);

        let new = self.showing("new", &authority.issue("new.example.com"));
        let wrong = Bad(&["4.7.5", "not valid for name 127.0.0.1", "set server_name"]);
        self.add("wrongname", &new, &ca, ANY, wrong);
        let name = format!("{ca}, server_name: new.example.com");
        self.add("rightname", &new, &name, ANY, Good);

        let unknown = self.showing("unknown", &Authority::new().issue("127.0.0.1"));
        self.add("unknownca", &unknown, &ca, ANY, UNTRUSTED);

        // A server has to send the certificate of a CA below the one that is known, and does not
        // always.
        let below = authority.subordinate();
        let leaf = below.issue("127.0.0.1");
        let gap = self.showing("gap", &leaf);
        self.add("gap", &gap, &ca, ANY, UNTRUSTED);
        let whole = Pair { certificate: leaf.certificate + &below.pem, key: leaf.key };
        let whole = self.showing("whole", &whole);
        self.add("whole", &whole, &ca, ANY, Good);
    }

    /// What is wrong with the server itself, or is about to be.
    fn add_versions(&mut self) {
        let authority = Authority::new();
        let ca = self.trusting("ca2", &authority.pem);
        let good = self.showing("good2", &authority.issue("127.0.0.1"));
        let unable = Bad(&["4.7.5", "TLS: the server takes neither TLS 1.2 nor TLS 1.3: "]);

        let options = format!("{good} -o smtpd_tls_protocols=TLSv1.2");
        self.add("tls12", &options, &ca, Some("TLSv1.2"), Good);
        self.add("tls11", &format!("{good} {OLD}TLSv1.1"), &ca, None, unable);
        self.add("tls10", &format!("{good} {OLD}TLSv1"), &ca, None, unable);

        let options = format!("{good} -o smtpd_tls_security_level=none");
        self.add("notls", &options, &ca, None, Bad(&["4.7.4", "STARTTLS: not offered"]));
        // In these states Postfix offers STARTTLS all the same: it has no certificate, it says 454,
        // it dies.
        let options = "-o smtpd_tls_chain_files=/nonexistent/chain.pem";
        let alert = Bad(&["4.7.5", "TLS: received fatal alert: HandshakeFailure"]);
        self.add("nocertificate", options, &ca, None, alert);
        let options = format!("{good} -o smtpd_tls_CAfile=/nonexistent/ca.pem");
        self.add("unable", &options, &ca, None, Bad(&["4.4.1", "STARTTLS: 454 4.7.0 "]));
        let options = format!("{good} -o tls_medium_cipherlist=NONSENSE");
        // Before the handshake or within it, as it happens: STARTTLS or TLS.
        self.add("mortal", &options, &ca, None, Bad(&["TLS: "]));
    }

    /// Certificates as people have made them with openssl for decades, with a name in CN alone.
    fn add_old_ways(&mut self) {
        let rsa = self.openssl("req -x509 -newkey rsa:2048");
        let options = self.showing("rsa", &rsa);
        self.add("rsa", &options, &pin(&rsa), ANY, Good);
        // Made thus it is one of a CA, which is not good for a server.
        let own = self.trusting("rsa.ca", &rsa.certificate);
        self.add("ownca", &options, &own, ANY, Bad(&["4.7.5", "TLS: ", "fingerprint"]));

        let leaf = self.openssl("req -x509 -newkey rsa:2048 -addext basicConstraints=CA:FALSE");
        let options = self.showing("leaf", &leaf);
        let own = self.trusting("leaf.ca", &leaf.certificate);
        self.add("noname", &options, &own, ANY, Bad(&["4.7.5", "TLS: ", "set fingerprint"]));

        let weak = self.openssl("req -x509 -newkey rsa:1024 -sha1");
        let options = format!("{} {OLD}>=TLSv1", self.showing("weak", &weak));
        self.add("weak", &options, &pin(&weak), ANY, Bad(&["4.7.5", "too weak"]));

        // Without extensions it is of version 1.
        let request = self.openssl("req -newkey rsa:2048");
        let [csr, key] = [("csr", &request.certificate), ("csr.key", &request.key)]
            .map(|(name, text)| self.file(name, text));
        let output = command("openssl")
            .args(["x509", "-req", "-days", "2", "-in"])
            .arg(csr)
            .arg("-signkey")
            .arg(key)
            .output()
            .unwrap();
        let certificate = String::from_utf8(output.stdout).unwrap();
        let first = Pair { certificate, key: request.key };
        let options = self.showing("v1", &first);
        self.add("version1", &options, &pin(&first), ANY, Bad(&["4.7.5", "renew it"]));
    }

    /// What `openssl LINE` makes for CN=127.0.0.1.
    fn openssl(&self, line: &str) -> Pair {
        let [key, made] = ["key", "made"].map(|name| self.folder.path().join(name));
        let output = command("openssl")
            .args(line.split(' '))
            .args(["-nodes", "-subj", "/CN=127.0.0.1", "-keyout"])
            .arg(&key)
            .arg("-out")
            .arg(&made)
            .output()
            .unwrap();
        assert!(output.status.success(), "{line}: {output:?}");
        let [key, certificate] = [key, made].map(|path| fs::read_to_string(path).unwrap());
        Pair { certificate, key }
    }
}

/// The key for this very certificate.
fn pin(pair: &Pair) -> String {
    format!("fingerprint: \"{}\"", pair.fingerprint())
}
