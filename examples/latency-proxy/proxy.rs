//! Connections over two links, one for each direction. Each connection has blocking threads, because the timers of an
//! event loop are too coarse for a millisecond.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crate::link::Link;

/// Bytes of one read from a connection. It sends these before another connection may send.
const PIECE: usize = 32 * 1024;
/// Bytes in flight in one direction of one connection, as in a receive window. Far more than 1 Gbit/s times 10 ms.
const WINDOW: usize = 8 << 20;

/// The properties of the network.
pub struct Settings {
    /// The server's address.
    pub to: String,
    /// The time from sending a byte to receiving the answer's first byte.
    pub round_trip: Duration,
    /// The part of `round_trip` that the proxy itself takes to wake threads and by late timers. See
    /// [`measure_overhead`].
    pub overhead: Duration,
    /// The bandwidth of all connections together, in each direction.
    pub bytes_per_second: f64,
    /// The average number of bytes after which a connection breaks; 0 for never.
    pub drop_every: u64,
    /// The seed of the random numbers for that.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        let (round_trip, bytes_per_second) = (Duration::from_millis(10), 125e6);
        Self {
            to: String::new(),
            round_trip,
            overhead: Duration::ZERO,
            bytes_per_second,
            drop_every: 0,
            seed: 1,
        }
    }
}

/// Counters of the proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Connections so far.
    pub connections: u64,
    pub open: u64,
    /// Bytes to the server, and from it.
    pub up: u64,
    pub down: u64,
    /// Connections that were broken on purpose.
    pub dropped: u64,
}

impl Stats {
    pub fn to_json(self) -> String {
        let Self { connections, open, up, down, dropped } = self;
        format!(
            r#"{{"connections":{connections},"open":{open},"up":{up},"down":{down},"dropped":{dropped}}}"#
        )
    }
}

/// Measures by how much a round trip through a proxy exceeds `round_trip` on this machine: the median over several
/// round trips to an echo server.
pub fn measure_overhead(round_trip: Duration) -> io::Result<Duration> {
    let server = TcpListener::bind("127.0.0.1:0")?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let settings = Settings { to: server.local_addr()?.to_string(), round_trip, ..Settings::default() };
    let to = listener.local_addr()?;
    thread::spawn(move || {
        let (mut stream, _) = server.accept().ok()?;
        stream.set_nodelay(true).ok()?;
        let mut byte = [0];
        while stream.read(&mut byte).is_ok_and(|read| read > 0) {
            stream.write_all(&byte).ok()?;
        }
        Some(())
    });
    let proxy = Proxy::new(settings);
    thread::spawn(move || {
        let (client, _) = listener.accept().ok()?;
        proxy.0.connect(client);
        Some(())
    });
    let mut client = TcpStream::connect(to)?;
    client.set_nodelay(true)?;
    let mut times = Vec::new();
    for _ in 0..31 {
        let begin = Instant::now();
        client.write_all(&[1])?;
        client.read_exact(&mut [0])?;
        times.push(begin.elapsed());
    }
    times.sort();
    Ok(times[times.len() / 2].saturating_sub(round_trip).min(round_trip / 2))
}

/// The proxy. Clones share it.
#[derive(Clone)]
pub struct Proxy(Arc<Shared>);

struct Shared {
    settings: Settings,
    up: Link,
    down: Link,
    connections: AtomicU64,
    dropped: AtomicU64,
    passed: [AtomicU64; 2],
    refusing: AtomicBool,
    stopped: Mutex<bool>,
    resumed: Condvar,
    open: Mutex<HashMap<u64, [TcpStream; 2]>>,
    random: Mutex<u64>,
}

/// The bytes in flight in one direction of one connection.
struct Pipe {
    state: Mutex<InFlight>,
    changed: Condvar,
}

#[derive(Default)]
struct InFlight {
    /// When each piece arrives, and its bytes. An empty piece is the end of the stream.
    pieces: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
    /// Whether the receiver is gone.
    broken: bool,
}

impl Proxy {
    pub fn new(settings: Settings) -> Self {
        let one_way = settings.round_trip.saturating_sub(settings.overhead) / 2;
        let link = || Link::new(settings.bytes_per_second, one_way);
        Self(Arc::new(Shared {
            up: link(),
            down: link(),
            connections: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            passed: [AtomicU64::new(0), AtomicU64::new(0)],
            refusing: AtomicBool::new(false),
            stopped: Mutex::new(false),
            resumed: Condvar::new(),
            open: Mutex::new(HashMap::new()),
            random: Mutex::new(settings.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            settings,
        }))
    }

    /// Accepts connections, for ever.
    pub fn serve(&self, listener: &TcpListener) {
        loop {
            let client = match listener.accept() {
                Ok((client, _)) => client,
                Err(error) => {
                    // The process is probably out of descriptors. Without a pause this loop would spin.
                    eprintln!("latency-proxy: cannot accept: {error}");
                    thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            if self.0.refusing.load(Ordering::SeqCst) {
                continue;
            }
            let shared = self.0.clone();
            thread::spawn(move || shared.connect(client));
        }
    }

    pub fn stats(&self) -> Stats {
        let read = |count: &AtomicU64| count.load(Ordering::SeqCst);
        Stats {
            connections: read(&self.0.connections),
            open: self.0.open.lock().expect("not poisoned").len() as u64,
            up: read(&self.0.passed[0]),
            down: read(&self.0.passed[1]),
            dropped: read(&self.0.dropped),
        }
    }

    /// Stops all traffic, as when a cable is unplugged. Connections stay open.
    pub fn stop(&self) {
        *self.0.stopped.lock().expect("not poisoned") = true;
    }

    pub fn resume(&self) {
        *self.0.stopped.lock().expect("not poisoned") = false;
        self.0.resumed.notify_all();
    }

    /// Breaks all connections.
    pub fn drop_all(&self) {
        for ends in self.0.open.lock().expect("not poisoned").values() {
            close(ends);
            self.0.dropped.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Whether new connections are closed at once.
    pub fn refuse(&self, refuse: bool) {
        self.0.refusing.store(refuse, Ordering::SeqCst);
    }
}

fn close(ends: &[TcpStream; 2]) {
    for end in ends {
        // This fails when the end is already closed.
        let _ = end.shutdown(Shutdown::Both);
    }
}

impl Shared {
    fn connect(self: Arc<Self>, client: TcpStream) {
        let number = self.connections.fetch_add(1, Ordering::SeqCst);
        // The handshake with the proxy took no time. Over the network the first byte is sent a round trip later.
        let begin = Instant::now() + self.settings.round_trip;
        let server = match TcpStream::connect(&self.settings.to) {
            Ok(server) => server,
            Err(error) => {
                eprintln!("latency-proxy: cannot reach {}: {error}", self.settings.to);
                return;
            }
        };
        let clone = |stream: &TcpStream| stream.try_clone().expect("there are descriptors left");
        for stream in [&client, &server] {
            stream.set_nodelay(true).expect("a TCP socket");
        }
        self.open.lock().expect("not poisoned").insert(number, [clone(&client), clone(&server)]);
        let mut threads = Vec::new();
        for (from, to, direction) in [(&client, &server, 0), (&server, &client, 1)] {
            let pipe = Arc::new(Pipe { state: Mutex::default(), changed: Condvar::new() });
            let (shared, ends, other) = (self.clone(), [clone(from), clone(to)], pipe.clone());
            threads.push(thread::spawn(move || shared.receive(&ends, &other, direction, begin)));
            let (shared, ends) = (self.clone(), [clone(from), clone(to)]);
            threads.push(thread::spawn(move || shared.deliver(&ends, &pipe, direction)));
        }
        for thread in threads {
            let _ = thread.join();
        }
        self.open.lock().expect("not poisoned").remove(&number);
    }

    /// Reads bytes from one end and sends them over the link.
    fn receive(&self, ends: &[TcpStream; 2], pipe: &Pipe, direction: usize, begin: Instant) {
        thread::sleep(begin.saturating_duration_since(Instant::now()));
        let link = if direction == 0 { &self.up } else { &self.down };
        let mut buffer = vec![0; PIECE];
        loop {
            let length = (&ends[0]).read(&mut buffer).unwrap_or(0);
            let (arrives, wait) = link.send(length);
            let mut state = pipe.state.lock().expect("not poisoned");
            while state.bytes > WINDOW && !state.broken {
                state = pipe.changed.wait(state).expect("not poisoned");
            }
            if state.broken {
                return;
            }
            state.bytes += length;
            state.pieces.push_back((arrives, buffer[..length].to_vec()));
            pipe.changed.notify_all();
            drop(state);
            if length == 0 {
                return;
            }
            thread::sleep(wait);
        }
    }

    /// Writes the bytes that have arrived to the other end.
    fn deliver(&self, ends: &[TcpStream; 2], pipe: &Pipe, direction: usize) {
        loop {
            let mut state = pipe.state.lock().expect("not poisoned");
            let (arrives, piece) = loop {
                match state.pieces.pop_front() {
                    Some(piece) => break piece,
                    None => state = pipe.changed.wait(state).expect("not poisoned"),
                }
            };
            drop(state);
            thread::sleep(arrives.saturating_duration_since(Instant::now()));
            let mut stopped = self.stopped.lock().expect("not poisoned");
            while *stopped {
                stopped = self.resumed.wait(stopped).expect("not poisoned");
            }
            drop(stopped);
            if piece.is_empty() {
                let _ = ends[1].shutdown(Shutdown::Write);
                return;
            }
            let broken = self.breaks(piece.len());
            if broken {
                self.dropped.fetch_add(1, Ordering::SeqCst);
            }
            // Counted before the receiver gets the piece, so that a receiver with all bytes finds all of them in the
            // count.
            self.passed[direction].fetch_add(piece.len() as u64, Ordering::SeqCst);
            if broken || (&ends[1]).write_all(&piece).is_err() {
                close(ends);
                pipe.state.lock().expect("not poisoned").broken = true;
                pipe.changed.notify_all();
                return;
            }
            pipe.state.lock().expect("not poisoned").bytes -= piece.len();
            pipe.changed.notify_all();
        }
    }

    /// Decides at random whether the connection breaks after this many bytes.
    fn breaks(&self, bytes: usize) -> bool {
        if self.settings.drop_every == 0 {
            return false;
        }
        let mut random = self.random.lock().expect("not poisoned");
        *random ^= *random << 13;
        *random ^= *random >> 7;
        *random ^= *random << 17;
        ((*random >> 11) as f64 / (1u64 << 53) as f64) < bytes as f64 / self.settings.drop_every as f64
    }
}
