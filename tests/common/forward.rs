//! A detour: an address that leads to another, as no look at addresses can see.

use std::io::copy;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

/// Forwards all connections to an address that is set later, and may change.
pub struct Detour {
    addr: SocketAddr,
    to: Arc<Mutex<Option<SocketAddr>>>,
}

impl Detour {
    pub fn start() -> Detour {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let detour = Detour { addr: listener.local_addr().unwrap(), to: Arc::default() };
        let to = Arc::clone(&detour.to);
        // It ends with the process.
        thread::spawn(move || {
            for stream in listener.incoming() {
                let to = *to.lock().unwrap();
                let Some(other) = to.and_then(|to| TcpStream::connect(to).ok()) else { continue };
                let stream = stream.unwrap();
                join(&stream, &other);
                join(&other, &stream);
            }
        });
        detour
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub fn lead_to(&self, addr: SocketAddr) {
        *self.to.lock().unwrap() = Some(addr);
    }
}

/// What comes from the one goes to the other.
fn join(from: &TcpStream, to: &TcpStream) {
    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
    thread::spawn(move || {
        let _ = copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    });
}
