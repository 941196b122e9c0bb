//! A client of the listeners of a daemon, and a web server for its events.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;

/// Longer than any answer takes.
pub const BOUND: Duration = Duration::from_secs(30);

/// An address that was free a moment ago.
pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// The status and the body of an answer; `None` when there is no connection, or no whole answer within the bound.
pub fn get(address: SocketAddr, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(BOUND)).ok()?;
    write!(stream, "GET {path} HTTP/1.0\r\nhost: {address}\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
}

/// A web server that takes events.
pub struct Hook {
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    hangs: AtomicBool,
    /// Connections whose requests are not answered.
    held: Mutex<Vec<TcpStream>>,
    events: Mutex<Vec<Value>>,
}

impl Hook {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let hook = Self { address: listener.local_addr().unwrap(), shared: Arc::default() };
        let shared = hook.shared.clone();
        // The thread ends with the test program.
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let shared = shared.clone();
                std::thread::spawn(move || shared.serve(stream));
            }
        });
        hook
    }

    pub fn url(&self) -> String {
        format!("http://{}/hook", self.address)
    }

    /// From now on requests get no answer.
    pub fn hang(&self) {
        self.shared.hangs.store(true, Ordering::SeqCst);
    }

    /// Answers again. The requests that hung end without an answer.
    pub fn go_on(&self) {
        self.shared.hangs.store(false, Ordering::SeqCst);
        self.shared.held.lock().unwrap().clear();
    }

    /// The number of requests that hang.
    pub fn held(&self) -> usize {
        self.shared.held.lock().unwrap().len()
    }

    /// The events that it accepted, in their order.
    pub fn events(&self) -> Vec<Value> {
        self.shared.events.lock().unwrap().clone()
    }
}

impl Shared {
    fn serve(&self, stream: TcpStream) -> Option<()> {
        let mut reader = BufReader::new(stream.try_clone().ok()?);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            (reader.read_line(&mut head).ok()? > 0).then_some(())?;
        }
        let head = head.to_lowercase();
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "))?;
        let mut body = vec![0; length.parse().ok()?];
        reader.read_exact(&mut body).ok()?;
        if self.hangs.load(Ordering::SeqCst) {
            drop(reader);
            self.held.lock().unwrap().push(stream);
            return Some(());
        }
        let text = String::from_utf8(body).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str(line).unwrap());
        self.events.lock().unwrap().extend(lines);
        (&stream).write_all(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n").ok()
    }
}
