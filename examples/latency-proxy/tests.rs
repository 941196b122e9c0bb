use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::proxy::{Proxy, Settings};

/// An echo server, and a proxy in front of it.
fn echo(settings: Settings) -> (Proxy, SocketAddr) {
    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = server.local_addr().unwrap().to_string();
    thread::spawn(move || {
        for stream in server.incoming() {
            let stream = stream.unwrap();
            thread::spawn(move || std::io::copy(&mut &stream, &mut &stream));
        }
    });
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let proxy = Proxy::new(Settings { to, ..settings });
    let server = proxy.clone();
    thread::spawn(move || server.serve(&listener));
    (proxy, address)
}

/// Pseudorandom bytes, different for each seed.
fn bytes(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..length).map(|_| next()).collect()
}

#[test]
fn each_of_many_connections_receives_all_its_own_bytes() {
    let (proxy, address) = echo(Settings { round_trip: Duration::from_millis(2), ..Settings::default() });
    let clients = (0..64u64).map(|number| {
        thread::spawn(move || {
            let sent = bytes(number, 300_000 + number as usize);
            let stream = TcpStream::connect(address).unwrap();
            let sender = thread::spawn({
                let (mut stream, sent) = (stream.try_clone().unwrap(), sent.clone());
                move || {
                    stream.write_all(&sent).unwrap();
                    stream.shutdown(Shutdown::Write).unwrap();
                }
            });
            let mut got = Vec::new();
            (&stream).read_to_end(&mut got).unwrap();
            sender.join().unwrap();
            assert!(got == sent, "connection {number}: {} of {} bytes, or others", got.len(), sent.len());
            sent.len() as u64
        })
    });
    let total: u64 = clients.collect::<Vec<_>>().into_iter().map(|client| client.join().unwrap()).sum();
    let stats = proxy.stats();
    assert_eq!((stats.connections, stats.up, stats.down, stats.dropped), (64, total, total, 0));
}

#[test]
fn an_answer_takes_one_round_trip_and_the_first_answer_two() {
    let round_trip = Duration::from_millis(20);
    let (_, address) = echo(Settings { round_trip, ..Settings::default() });
    let begin = Instant::now();
    let mut stream = TcpStream::connect(address).unwrap();
    for answers in 1..4 {
        stream.write_all(b"?").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        // On a busy machine the answer may come later, but never earlier.
        assert!(
            begin.elapsed() >= round_trip * (answers + 1),
            "answer {answers} after {:?}",
            begin.elapsed()
        );
    }
}

#[test]
fn connections_share_the_bandwidth() {
    // 8 MB at 40 MB/s: a fifth of a second, for all of them together.
    let settings = Settings { round_trip: Duration::ZERO, bytes_per_second: 40e6, ..Settings::default() };
    let (_, address) = echo(settings);
    let begin = Instant::now();
    let clients: Vec<_> = (0..4)
        .map(|_| {
            thread::spawn(move || {
                let stream = TcpStream::connect(address).unwrap();
                let mut sender = stream.try_clone().unwrap();
                thread::spawn(move || sender.write_all(&vec![7; 2_000_000]).unwrap());
                (&stream).take(2_000_000).read_to_end(&mut Vec::new()).unwrap();
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().unwrap());
    assert!(begin.elapsed() >= Duration::from_millis(200), "{:?}", begin.elapsed());
}

#[test]
fn a_stopped_connection_stays_open_and_resumes() {
    let (proxy, address) = echo(Settings { round_trip: Duration::from_millis(1), ..Settings::default() });
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"a").unwrap();
    stream.read_exact(&mut [0]).unwrap();
    proxy.stop();
    stream.write_all(b"b").unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let error = stream.read(&mut [0]).unwrap_err();
    assert!(matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut), "{error}");
    proxy.resume();
    stream.set_read_timeout(None).unwrap();
    let mut got = [0];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"b");
}

#[test]
fn connections_break_on_command_and_at_random() {
    let (proxy, address) = echo(Settings { round_trip: Duration::from_millis(1), ..Settings::default() });
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(b"a").unwrap();
    stream.read_exact(&mut [0]).unwrap();
    proxy.drop_all();
    assert!(matches!(stream.read(&mut [0]), Ok(0) | Err(_)));
    proxy.refuse(true);
    let mut refused = TcpStream::connect(address).unwrap();
    assert!(matches!(refused.read(&mut [0]), Ok(0) | Err(_)));
    proxy.refuse(false);
    TcpStream::connect(address).unwrap().write_all(b"c").unwrap();
    assert_eq!(proxy.stats().dropped, 1);

    let settings = Settings { round_trip: Duration::ZERO, drop_every: 100_000, ..Settings::default() };
    let (proxy, address) = echo(settings);
    let stream = TcpStream::connect(address).unwrap();
    let mut sender = stream.try_clone().unwrap();
    // The connection breaks during this.
    thread::spawn(move || sender.write_all(&bytes(1, 20_000_000)));
    let mut got = Vec::new();
    let _ = (&stream).read_to_end(&mut got);
    assert!(got.len() < 20_000_000, "{} bytes came through", got.len());
    assert!(proxy.stats().dropped > 0);
}
