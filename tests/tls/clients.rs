//! STARTTLS for clients: offered where there is a certificate, and then all is the same as without.

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

use rustls::{
    ClientConfig, ClientConnection, HandshakeKind, RootCertStore, SupportedProtocolVersion,
};
use tempfile::NamedTempFile;

use crate::common::*;
use crate::front::{Front, swallow_reply};
use crate::pki::{Authority, file};
use crate::pump::{Side, pump};
use crate::{BODY, config, deliver, destination};

/// smtp-dup that offers STARTTLS, before a primary in clear.
pub struct Server {
    pub primary: Sink,
    pub dup: Dup,
    pub client: Arc<ClientConfig>,
    pub ca: NamedTempFile,
    _files: [NamedTempFile; 2],
}

pub fn server(smtp: &str) -> Server {
    server_before(Sink::start(), smtp, "")
}

#[track_caller]
pub fn server_before(primary: Sink, smtp: &str, relay: &str) -> Server {
    let authority = Authority::new();
    let pair = authority.issue("dup.example");
    let files = [file(&pair.certificate), file(&pair.key)];
    let keys = format!(
        "tls_certificate: \"{}\"\ntls_key: \"{}\"\n{smtp}",
        files[0].path().display(),
        files[1].path().display()
    );
    let dup = Dup::start(&config(&format!("\"{}\"", primary.addr()), &[], &keys, relay));
    let client = trusting(&authority, rustls::ALL_VERSIONS);
    Server { primary, dup, client, ca: file(&authority.pem), _files: files }
}

/// A client's configuration that verifies.
pub fn trusting(
    authority: &Authority,
    versions: &[&'static SupportedProtocolVersion],
) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(roots);
    Arc::new(builder.with_no_client_auth())
}

/// A connection that has heard the 220 to STARTTLS.
#[track_caller]
pub fn starting(addr: SocketAddr) -> TcpStream {
    let mut socket = TcpStream::connect_timeout(&addr, BOUND).unwrap();
    socket.set_nodelay(true).unwrap();
    socket.set_read_timeout(Some(BOUND)).unwrap();
    swallow_reply(&mut socket).unwrap();
    socket.write_all(b"EHLO client.example\r\n").unwrap();
    let ehlo = swallow_reply(&mut socket).unwrap();
    assert!(String::from_utf8_lossy(&ehlo).contains("STARTTLS"), "{}", ehlo.escape_ascii());
    socket.write_all(b"STARTTLS\r\n").unwrap();
    let reply = swallow_reply(&mut socket).unwrap();
    assert!(reply.starts_with(b"220 2.0.0 "), "{}", reply.escape_ascii());
    socket
}

/// Shakes hands, in writes of so many octets.
#[track_caller]
pub fn shake_hands(
    socket: &mut TcpStream,
    client: &Arc<ClientConfig>,
    octets: usize,
) -> ClientConnection {
    let mut tls =
        ClientConnection::new(Arc::clone(client), "dup.example".try_into().unwrap()).unwrap();
    while tls.is_handshaking() || tls.wants_write() {
        if tls.wants_write() {
            let mut flight = Vec::new();
            tls.write_tls(&mut flight).unwrap();
            flight.chunks(octets).for_each(|part| socket.write_all(part).unwrap());
        } else {
            assert_ne!(tls.read_tls(socket).unwrap(), 0, "closed in the handshake");
            tls.process_new_packets().unwrap();
        }
    }
    tls
}

/// A client whose octets travel through this session.
pub fn through(socket: TcpStream, tls: ClientConnection) -> Client {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        let (inner, _) = listener.accept().unwrap();
        inner.set_nodelay(true).unwrap();
        pump([Side::new(socket, Some(tls.into())), Side::new(inner, None)]);
    });
    Client::connect(addr)
}

impl Server {
    /// A client that has shaken hands.
    #[track_caller]
    pub fn secured(&self) -> Client {
        let mut socket = starting(self.dup.addr());
        let tls = shake_hands(&mut socket, &self.client, usize::MAX);
        through(socket, tls)
    }
}

#[test]
fn mail_comes_through_tls() {
    let server = server("");
    let mut client = server.secured();
    let ehlo = client.ehlo();
    assert!(!ehlo.offers("STARTTLS"), "{ehlo:?}");
    assert!(ehlo.offers("PIPELINING") && ehlo.offers("8BITMIME"), "{ehlo:?}");
    deliver(&mut client);
    assert_eq!(client.pipelined("a@example.com", "b@example.com", BODY).code, 250);
    client.expect("QUIT", 221);
    client.closed();
    let messages = server.primary.wait(2);
    assert!(messages.iter().all(|message| message.data == BODY));
    let line = server.dup.wait_log(" TLS: ");
    assert!(line.ends_with("TLS: TLSv1.3 TLS13_AES_256_GCM_SHA384"), "{line}");
    let from = line.split("client=").nth(1).unwrap().split(' ').next().unwrap();
    server.dup.wait_log(&format!("client={from} from=<a@example.com>"));
}

#[test]
fn both_versions_do() {
    let authority = Authority::new();
    let pair = authority.issue("dup.example");
    let files = [file(&pair.certificate), file(&pair.key)];
    let keys = format!(
        "tls_certificate: \"{}\"\ntls_key: \"{}\"",
        files[0].path().display(),
        files[1].path().display()
    );
    let primary = Sink::start();
    let dup = Dup::start(&config(&format!("\"{}\"", primary.addr()), &[], &keys, ""));
    for (version, name) in
        [(&rustls::version::TLS12, "TLSv1.2"), (&rustls::version::TLS13, "TLSv1.3")]
    {
        let client = trusting(&authority, &[version]);
        let mut kinds = Vec::new();
        for _ in 0..2 {
            let mut socket = starting(dup.addr());
            let tls = shake_hands(&mut socket, &client, usize::MAX);
            kinds.push(tls.handshake_kind().unwrap());
            let mut client = through(socket, tls);
            client.ehlo();
            deliver(&mut client);
            client.expect("QUIT", 221);
            client.closed();
        }
        dup.wait_logs(&format!(" TLS: {name} "), 2);
        assert_eq!(kinds, [HandshakeKind::Full, HandshakeKind::Resumed], "{name}");
    }
}

#[test]
fn it_is_offered_only_with_a_certificate() {
    let primary = Sink::start();
    primary.set_ehlo(&["STARTTLS", "DSN"]);
    let dup = Dup::start(&config(
        &format!("{{address: \"{}\", tls: none}}", primary.addr()),
        &[],
        "",
        "",
    ));
    let mut client = Client::greeted(dup.addr());
    assert!(!client.ehlo().offers("STARTTLS"));
    client.expect("STARTTLS", 502);
    let server = server("");
    assert!(Client::greeted(server.dup.addr()).ehlo().offers("STARTTLS"));
    let mut client = Client::greeted(server.dup.addr());
    assert_eq!(client.expect("HELO client.example", 250).lines.len(), 1);
}

#[test]
fn out_of_order() {
    let server = server("");
    let mut client = Client::ready(server.dup.addr());
    client.expect("STARTTLS now", 501);
    client.expect("MAIL FROM:<a@example.com>", 250);
    client.expect("STARTTLS", 503);
    // The transaction is as it was.
    client.expect("RCPT TO:<b@example.com>", 250);
    client.expect("STARTTLS", 503);
    client.expect("DATA", 354);
    assert_eq!(client.body(BODY).code, 250);
    let mut client = server.secured();
    client.expect("STARTTLS", 503);
    client.ehlo();
    client.expect("STARTTLS", 503);
    deliver(&mut client);
}

#[test]
fn the_session_begins_anew() {
    let server = server("");
    let mut client = server.secured();
    // It has said EHLO, in clear.
    client.expect("MAIL FROM:<a@example.com>", 503);
    client.expect("RCPT TO:<b@example.com>", 503);
    client.expect("DATA", 503);
    client.ehlo();
    deliver(&mut client);
    assert_eq!(server.primary.count("MAIL"), 1);
}

#[test]
fn a_big_message_comes_through() {
    let server = server("");
    let body = mail_body(20 << 20);
    let mut client = server.secured();
    client.ehlo();
    client.envelope("a@example.com", &["b@example.com"]);
    let sending = client.send_in_background([body.as_slice(), b".\r\n"].concat());
    let reply = client.reply_within(3 * BOUND);
    assert_eq!(reply.code, 250, "{reply:?}");
    sending.join().unwrap();
    assert!(server.primary.wait(1)[0].data == body);
}

#[test]
fn early_replies_of_the_primary_reach_it() {
    let primary = Sink::replying(|event| match event {
        Event::Body(_) => Action::reply("552 5.3.4 too big for me").then(Action::Close),
        _ => Action::Default,
    });
    let server = server_before(primary, "", "");
    let mut client = server.secured();
    client.ehlo();
    client.envelope("a@example.com", &["b@example.com"]);
    let sending = client.send_in_background([mail_body(4 << 20).as_slice(), b".\r\n"].concat());
    assert_eq!(client.reply_within(2 * BOUND).raw, b"552 5.3.4 too big for me\r\n");
    sending.join().unwrap();
    client.expect("NOOP", 250);
}

/// A process for one client has TLS too.
#[test]
fn one_process_a_connection() {
    let authority = Authority::new();
    let pair = authority.issue("dup.example");
    let files = [file(&pair.certificate), file(&pair.key)];
    let fronts = [(); 2].map(|()| Front::start(&authority.issue("127.0.0.1")));
    let ca = file(&authority.pem);
    let tls = format!("tls: required, ca_file: \"{}\"", ca.path().display());
    let [primary, backup] = fronts.each_ref().map(|front| destination(front, &tls));
    let keys = format!(
        "tls_certificate: \"{}\"\ntls_key: \"{}\"",
        files[0].path().display(),
        files[1].path().display()
    );
    let folder = tempfile::tempdir().unwrap();
    let yaml = config(&primary, &[backup], &keys, "");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let inetd = thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        let stdio = || Stdio::from(std::os::fd::OwnedFd::from(socket.try_clone().unwrap()));
        let mut command = command(&folder, Some(&yaml));
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        let mut child = command.spawn().unwrap();
        drop(socket);
        child.wait().unwrap()
    });
    let mut socket = starting(addr);
    let tls = shake_hands(&mut socket, &trusting(&authority, rustls::ALL_VERSIONS), usize::MAX);
    let mut client = through(socket, tls);
    client.ehlo();
    deliver(&mut client);
    client.expect("QUIT", 221);
    client.closed();
    assert!(inetd.join().unwrap().success());
    for front in &fronts {
        assert_eq!(front.sink.wait(1)[0].data, BODY);
        front.wait_secured(1);
    }
}

/// Runs a shell line with `$HOST`, `$PORT` and `$CA`; what it printed, if the tool is there.
fn shell(tool: &str, line: &str, server: &Server) -> Option<String> {
    let there = Command::new("sh").args(["-c", &format!("command -v {tool}")]).output().unwrap();
    if !there.status.success() {
        eprintln!("skipped: no {tool} on this machine");
        return None;
    }
    let addr = server.dup.addr();
    let output = Command::new("timeout")
        .args(["20", "sh", "-c", line])
        .env("HOST", addr.ip().to_string())
        .env("PORT", addr.port().to_string())
        .env("CA", server.ca.path())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {text}");
    Some(text.into_owned())
}

#[test]
fn openssl_is_content() {
    let server = server("");
    // With -quiet it waits for the server to close.
    let line = "printf 'EHLO x\\r\\nQUIT\\r\\n' | openssl s_client -starttls smtp -quiet \
                -verify_return_error -verify_hostname dup.example -CAfile \"$CA\" \
                -connect \"$HOST:$PORT\"";
    if let Some(text) = shell("openssl", line, &server) {
        assert!(text.contains("250-dup.example"), "{text}");
        assert!(text.contains("221 2.0.0 bye"), "{text}");
        server.dup.wait_log(" TLS: TLSv1.");
    }
}

#[test]
fn swaks_is_content() {
    let server = server("");
    let line = "swaks -tls --server \"$HOST:$PORT\" --from a@example.com --to b@example.com";
    // It is a script, whose Perl may have no TLS.
    let perl = Command::new("perl").args(["-MNet::SSLeay", "-e1"]).output();
    if !perl.is_ok_and(|output| output.status.success()) {
        return eprintln!("skipped: no Net::SSLeay on this machine");
    }
    if shell("swaks", line, &server).is_some() {
        server.primary.wait(1);
        server.dup.wait_log(" TLS: TLSv1.");
    }
}
