//! A private Postfix with many servers, each with TLS of its own, and one sink behind them all:
//! what arrives there says in its Received header which of them took it, and how it came.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::{Received, Sink};
use crate::instance::{PATIENCE, Postfix, Setup, free_address};

/// A server to be.
pub struct Service {
    /// One word.
    pub name: &'static str,
    /// What stands behind `smtpd` in master.cf.
    pub options: String,
}

pub struct Farm {
    pub sink: Sink,
    pub postfix: Postfix,
    addresses: Vec<(&'static str, SocketAddr)>,
}

impl Farm {
    /// `settings` are lines for main.cf.
    pub fn start(services: &[Service], settings: &str) -> Farm {
        let sink = Sink::start();
        let settings = format!(
            "transport_maps = inline:{{ {{ example.com = smtp:[{}]:{} }} }}
smtpd_tls_security_level = may
smtpd_tls_received_header = yes
smtpd_tls_loglevel = 1
smtpd_error_sleep_time = 0
smtpd_tls_session_cache_database = btree:$data_directory/smtpd
{settings}",
            sink.addr().ip(),
            sink.addr().port(),
        );
        let addresses = RefCell::new(Vec::new());
        let lines = |_: SocketAddr| {
            let mut addresses = addresses.borrow_mut();
            *addresses = services.iter().map(|one| (one.name, free_address())).collect();
            let mut text = String::from("tlsmgr unix - - n 1000? 1 tlsmgr\n");
            for (service, (name, address)) in services.iter().zip(addresses.iter()) {
                text += &format!(
                    "{address} inet n - n - - smtpd -o syslog_name=postfix/{name} \
                     -o myhostname={name}.test {}\n",
                    service.options
                );
            }
            text
        };
        let setup = Setup { settings: &settings, services: Some(&lines), ..Setup::default() };
        let postfix = Postfix::hosting(setup);
        Farm { sink, postfix, addresses: addresses.into_inner() }
    }

    pub fn address(&self, name: &str) -> SocketAddr {
        self.addresses.iter().find(|(other, _)| *other == name).unwrap().1
    }

    /// A destination in YAML: a server, with these keys.
    pub fn destination(&self, name: &str, keys: &str) -> String {
        format!("{{address: \"{}\", {keys}}}", self.address(name))
    }

    /// What a server has logged, where each of `parts` is in it.
    pub fn log(&self, name: &str, parts: &[&str]) -> Vec<String> {
        let program = format!(" postfix/{name}/smtpd[");
        self.postfix.log(&[&[program.as_str()], parts].concat())
    }

    /// Waits until all sessions of a server are over, `count` or more.
    #[track_caller]
    pub fn wait_at_rest(&self, name: &str, count: usize) {
        let end = Instant::now() + PATIENCE;
        let lines = |what| self.log(name, &[what]).len();
        while lines(": disconnect from ") < lines(": connect from ").max(count) {
            assert!(Instant::now() < end, "{name} is not at rest: {:#?}", self.log(name, &[]));
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits for the one message to this recipient that came by way of this server.
    #[track_caller]
    pub fn wait_arrival(&self, name: &str, to: &str) -> Arrival {
        let end = Instant::now() + PATIENCE;
        loop {
            let mut arrivals = self.arrivals(name);
            arrivals.retain(|arrival| arrival.message.rcpts[0].contains(&format!("<{to}>")));
            assert!(arrivals.len() < 2, "{name} to {to}: {arrivals:?}");
            match arrivals.pop() {
                Some(arrival) => return arrival,
                None => assert!(Instant::now() < end, "nothing from {name} to {to}"),
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// What a server has passed on.
    pub fn arrivals(&self, name: &str) -> Vec<Arrival> {
        let by = format!("by {name}.test (Postfix)");
        let arrivals = self.sink.messages().into_iter().map(Arrival::of);
        arrivals.filter(|arrival| arrival.received.contains(&by)).collect()
    }
}

/// A message at the sink.
#[derive(Debug)]
pub struct Arrival {
    pub message: Received,
    /// The Received header of the server, in one line.
    received: String,
}

impl Arrival {
    fn of(message: Received) -> Arrival {
        let text = String::from_utf8_lossy(&message.data);
        let mut lines = text.split("\r\n");
        let mut received = lines.next().unwrap().to_owned();
        lines.take_while(|line| line.starts_with(['\t', ' '])).for_each(|line| received += line);
        Arrival { received: received.replace('\t', " "), message }
    }

    /// The version of TLS by which the server got it; none in clear.
    pub fn tls(&self) -> Option<&str> {
        let protocol = self.received.split(" with ").find(|part| part.starts_with("ESMTP"));
        let protocol = protocol.and_then(|part| part.split(' ').next()).unwrap();
        let version = self.received.split("(using ").nth(1).and_then(|rest| rest.split(' ').next());
        let has_tls = matches!(protocol, "ESMTPS" | "ESMTPSA");
        assert_eq!(version.is_some(), has_tls, "{}", self.received);
        version
    }

    /// The server knew who had sent it.
    pub fn is_logged_in(&self) -> bool {
        self.received.contains(" with ESMTPSA ")
    }
}
