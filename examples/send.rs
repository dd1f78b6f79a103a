//! The smallest SMTP client that can send one message: for `make demo`, so that it needs nothing
//! that is not in this repository. Prints the dialogue; any 4xx or 5xx ends it with exit code 1.
//!
//!     send 127.0.0.1:2525 a@example.com b@example.com... < message
//!
//! The message needs CR LF line ends; nothing is changed but the dots that SMTP itself asks for.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::{env, process};

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let result = match &arguments[..] {
        [server, from, to @ ..] if !to.is_empty() => send(server, from, to),
        _ => Err(io::Error::other("usage: send HOST:PORT FROM TO... < MESSAGE")),
    };
    if let Err(error) = result {
        eprintln!("send: {error}");
        process::exit(1);
    }
}

fn send(server: &str, from: &str, to: &[String]) -> io::Result<()> {
    let mut message = Vec::new();
    io::stdin().read_to_end(&mut message)?;
    let mut output = TcpStream::connect(server)?;
    output.set_nodelay(true)?; // the message and its dot are two writes
    let mut replies = BufReader::new(output.try_clone()?);
    expect_success(&mut replies)?;

    let mut commands = vec!["EHLO localhost".into(), format!("MAIL FROM:<{from}> BODY=8BITMIME")];
    commands.extend(to.iter().map(|address| format!("RCPT TO:<{address}>")));
    commands.extend(["DATA".into(), ".".into(), "QUIT".into()]);
    for command in commands {
        if command == "." {
            println!("  C: (the message, {} octets)", message.len());
            output.write_all(&dot_stuffed(&message))?;
        }
        println!("  C: {command}");
        output.write_all(format!("{command}\r\n").as_bytes())?;
        expect_success(&mut replies)?;
    }
    Ok(())
}

/// The message with a second dot in front of every line that begins with one (RFC 5321 §4.5.2).
fn dot_stuffed(message: &[u8]) -> Vec<u8> {
    let lines = message.split_inclusive(|&octet| octet == b'\n');
    lines
        .flat_map(|line| [if line.starts_with(b".") { b"." } else { &b""[..] }, line].concat())
        .collect()
}

/// Reads one reply to its last line.
fn expect_success(replies: &mut impl BufRead) -> io::Result<()> {
    loop {
        let mut line = String::new();
        replies.read_line(&mut line)?;
        println!("  S: {}", line.trim_end());
        match line.as_bytes() {
            [b'2' | b'3', _, _, b'-', ..] => {}
            [b'2' | b'3', ..] => return Ok(()),
            _ => return Err(io::Error::other("the server did not accept that")),
        }
    }
}
