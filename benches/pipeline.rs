//! A load generator that pipelines MAIL, RCPT and DATA as Postfix's SMTP client does.
//!
//! smtp-source cannot, and comparing two different programs would not say what pipelining is
//! worth; so this one can leave it off too (`--one-by-one`) and is otherwise the same. Each
//! session is a thread that keeps its connection for all its messages. The latency is that of a
//! whole transaction, from MAIL to the reply to end-of-data.
//!
//! One line on stdout, for `benches/end-to-end` to read:
//! `messages=5000 seconds=1.234 rate=4052 median_ms=2.345 p99_ms=5.678`

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const USAGE: &str =
    "usage: pipeline [--one-by-one] [--sessions N] [--messages N] [--size OCTETS] HOST:PORT";

/// A server that is silent for longer has failed; the slowest honest reply here takes seconds.
const TIMEOUT: Duration = Duration::from_secs(120);

struct Options {
    one_by_one: bool,
    sessions: usize,
    messages: usize,
    size: usize,
    server: String,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Option<Options> {
        let mut options = Options {
            one_by_one: false,
            sessions: 10,
            messages: 1000,
            size: 10_000,
            server: String::new(),
        };
        while let Some(argument) = arguments.next() {
            let number = match argument.as_str() {
                "--sessions" => &mut options.sessions,
                "--messages" => &mut options.messages,
                "--size" => &mut options.size,
                "--one-by-one" => {
                    options.one_by_one = true;
                    continue;
                }
                _ if argument.starts_with('-') || !options.server.is_empty() => return None,
                _ => {
                    options.server = argument;
                    continue;
                }
            };
            *number = arguments.next()?.parse().ok().filter(|number| *number > 0)?;
        }
        (!options.server.is_empty()).then_some(options)
    }
}

/// A client's connection. A reply may come in pieces, and several in one.
struct Connection {
    stream: TcpStream,
    unread: Vec<u8>,
}

impl Connection {
    fn open(server: &str) -> io::Result<Connection> {
        let stream = TcpStream::connect(server)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        let mut connection = Connection { stream, unread: Vec::new() };
        connection.reply("220")?;
        connection.command(b"EHLO pipeline.example\r\n", "250")?;
        Ok(connection)
    }

    /// Reads one whole reply, every line of it, which has to begin with `code`.
    fn reply(&mut self, code: &str) -> io::Result<()> {
        loop {
            let mut start = 0;
            while let Some(length) = self.unread[start..].iter().position(|&octet| octet == b'\n') {
                let line = &self.unread[start..start + length];
                start += length + 1;
                if line.get(3) == Some(&b'-') {
                    continue;
                }
                if !line.starts_with(code.as_bytes()) {
                    let line = String::from_utf8_lossy(line);
                    return Err(io::Error::other(format!("{} instead of {code}", line.trim_end())));
                }
                self.unread.drain(..start);
                return Ok(());
            }
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                length => self.unread.extend_from_slice(&buffer[..length]),
            }
        }
    }

    fn command(&mut self, line: &[u8], code: &str) -> io::Result<()> {
        self.stream.write_all(line)?;
        self.reply(code)
    }

    fn transaction(&mut self, one_by_one: bool, message: &[u8]) -> io::Result<()> {
        let envelope: [(&[u8], &str); 3] = [
            (b"MAIL FROM:<sender@example.com>\r\n", "250"),
            (b"RCPT TO:<recipient@example.com>\r\n", "250"),
            (b"DATA\r\n", "354"),
        ];
        if one_by_one {
            for (line, code) in envelope {
                self.command(line, code)?;
            }
        } else {
            self.stream.write_all(&envelope.map(|(line, _)| line).concat())?;
            for (_, code) in envelope {
                self.reply(code)?;
            }
        }
        self.command(message, "250")
    }
}

/// A message of about `size` octets with its end-of-data, in lines of 78 octets.
fn message(size: usize) -> Vec<u8> {
    let mut message = b"From: <sender@example.com>\r\nTo: <recipient@example.com>\r\n\
        Date: Thu, 1 Jan 1970 00:00:00 +0000\r\nMessage-ID: <1@pipeline.example>\r\n\r\n"
        .to_vec();
    let line = [&[b'x'; 76][..], b"\r\n"].concat();
    while message.len() < size {
        message.extend_from_slice(&line);
    }
    message.extend_from_slice(b".\r\n");
    message
}

fn run(options: &Options) -> io::Result<()> {
    let message = message(options.size);
    let taken = AtomicUsize::new(0);
    let latencies = Mutex::new(Vec::with_capacity(options.messages));
    let session = || -> io::Result<()> {
        let mut connection = Connection::open(&options.server)?;
        let mut own = Vec::new();
        while taken.fetch_add(1, Ordering::Relaxed) < options.messages {
            let start = Instant::now();
            connection.transaction(options.one_by_one, &message)?;
            own.push(start.elapsed());
        }
        connection.command(b"QUIT\r\n", "221")?;
        latencies.lock().unwrap().extend(own);
        Ok(())
    };

    let start = Instant::now();
    thread::scope(|scope| {
        let sessions: Vec<_> = (0..options.sessions).map(|_| scope.spawn(session)).collect();
        sessions.into_iter().try_for_each(|session| session.join().expect("a session panicked"))
    })?;
    let seconds = start.elapsed().as_secs_f64();

    let mut latencies = latencies.into_inner().unwrap();
    latencies.sort_unstable();
    let quantile =
        |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
    println!(
        "messages={} seconds={seconds:.3} rate={:.0} median_ms={:.3} p99_ms={:.3}",
        latencies.len(),
        latencies.len() as f64 / seconds,
        quantile(0.5),
        quantile(0.99),
    );
    Ok(())
}

fn main() -> ExitCode {
    let Some(options) = Options::parse(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pipeline: {}: {error}", options.server);
            ExitCode::FAILURE
        }
    }
}
