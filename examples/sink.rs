//! A small SMTP server that stores what it gets in Maildir format: the destinations of `make demo`,
//! and for trying smtp-dup by hand. It believes every client; do not leave it in the open.
//!
//!     sink 127.0.0.1:2601=/tmp/old 127.0.0.1:0=/tmp/new
//!
//! A file in `new/` is the message alone, as it came over the wire with the dot-stuffing removed:
//! lines end in CR LF and no header is added, so that two copies can be compared octet for octet.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, BufWriter, ErrorKind, Read as _, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};
use std::{env, process, thread};

/// Listens on all addresses; prints the actual ones, as port 0 takes any that is free.
fn main() -> io::Result<()> {
    let mut listeners = Vec::new();
    for argument in env::args().skip(1) {
        let Some((address, maildir)) = argument.split_once('=') else {
            return Err(io::Error::other("usage: sink ADDRESS:PORT=MAILDIR..."));
        };
        for folder in ["tmp", "new", "cur"] {
            fs::create_dir_all(Path::new(maildir).join(folder))?;
        }
        let listener = TcpListener::bind(address)?;
        println!("listening on {} for {maildir}", listener.local_addr()?);
        listeners.push((listener, PathBuf::from(maildir)));
    }
    thread::scope(|scope| {
        for (listener, maildir) in &listeners {
            scope.spawn(move || {
                for client in listener.incoming().flatten() {
                    // A client that breaks off is no concern of the others.
                    scope.spawn(move || session(client, maildir).ok());
                }
            });
        }
    });
    Ok(())
}

/// One client, until it says QUIT or goes away. Replies wait for the last command that was
/// pipelined and go out in one write.
fn session(client: TcpStream, maildir: &Path) -> io::Result<()> {
    client.set_nodelay(true)?;
    let mut input = BufReader::new(client.try_clone()?);
    let mut output = BufWriter::new(client);
    let (mut sender, mut recipients) = (None, Vec::new());
    output.write_all(b"220 sink ESMTP\r\n")?;
    loop {
        if input.buffer().is_empty() {
            output.flush()?;
        }
        let line = String::from_utf8_lossy(&read_line(&mut input)?).trim_end().to_owned();
        let (verb, argument) = line.split_once([' ', ':']).unwrap_or((&line, ""));
        let reply = match (verb.to_ascii_uppercase().as_str(), &sender) {
            ("EHLO", _) => {
                "250-sink\r\n250-PIPELINING\r\n250-SIZE\r\n250-8BITMIME\r\n250-SMTPUTF8\r\n\
                 250-DSN\r\n250 ENHANCEDSTATUSCODES"
            }
            ("MAIL", None) => {
                sender = Some(argument.to_owned());
                "250 2.1.0 Ok"
            }
            ("RCPT", Some(_)) => {
                recipients.push(argument.to_owned());
                "250 2.1.5 Ok"
            }
            ("DATA", Some(from)) if !recipients.is_empty() => {
                output.write_all(b"354 End data with <CR><LF>.<CR><LF>\r\n")?;
                output.flush()?;
                let (name, size) = store(&mut input, maildir)?;
                let (maildir, to) = (maildir.display(), recipients.join(" "));
                println!("{maildir}/new/{name}: {from} {to}, {size} octets");
                (sender, recipients) = (None, Vec::new());
                &format!("250 2.0.0 Ok: stored as {name}")
            }
            ("MAIL" | "RCPT" | "DATA", _) => "503 5.5.1 Bad sequence of commands",
            ("HELO" | "RSET", _) => {
                (sender, recipients) = (None, Vec::new());
                "250 2.0.0 Ok"
            }
            ("NOOP", _) => "250 2.0.0 Ok",
            ("QUIT", _) => return output.write_all(b"221 2.0.0 Bye\r\n"),
            _ => "502 5.5.2 Command not recognized",
        };
        write!(output, "{reply}\r\n")?;
    }
}

/// A line with its LF, or 64 KiB of it; the end of the connection is an error.
fn read_line(input: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    match input.take(65536).read_until(b'\n', &mut line)? {
        0 => Err(ErrorKind::UnexpectedEof.into()),
        _ => Ok(line),
    }
}

/// Reads a message to CR LF . CR LF, in `tmp/` until it is whole; returns its name and size.
fn store(input: &mut impl BufRead, maildir: &Path) -> io::Result<(String, u64)> {
    static COUNT: AtomicU32 = AtomicU32::new(1);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let name = format!("{}.P{}Q{count}.sink", time.as_secs(), process::id());
    let mut file = BufWriter::new(File::create(maildir.join("tmp").join(&name))?);
    let (mut size, mut at_start) = (0, true);
    loop {
        let line = read_line(input)?;
        let text = match &line[..] {
            b".\r\n" if at_start => break,
            [b'.', rest @ ..] if at_start => rest,
            all => all,
        };
        file.write_all(text)?;
        size += text.len() as u64;
        at_start = line.ends_with(b"\r\n");
    }
    file.flush()?;
    fs::rename(maildir.join("tmp").join(&name), maildir.join("new").join(&name))?;
    Ok((name, size))
}
