//! Hosts that serve each other what they have cached.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use crate::harness::{TestDaemon, open, read_at, same, until};
use crate::server::{Object, Reply, Server};
use crate::web::{BOUND, free_address};

const MIB: usize = 1 << 20;
const BLOCK: u64 = 16 << 10;

/// A host that serves others, and where.
fn host() -> (TestDaemon, SocketAddr) {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let address = free_address();
    daemon.try_start(&["--export-http", &address.to_string()]).unwrap();
    (daemon, address)
}

fn add(daemon: &TestDaemon, source: &str, more: &[&str]) {
    daemon.ok(&[&["base", "add", "b", source], more].concat());
    daemon.ok(&["disk", "create", "b", "--base", "b"]);
}

fn read(daemon: &TestDaemon, object: &Object, at: usize, len: usize) {
    let bytes = read_at(&open(&daemon.disk("b")), at as u64, len);
    same(&bytes, &object.bytes[at..at + len], "a disk");
}

fn cached(daemon: &TestDaemon) -> u64 {
    daemon.json(&["base", "show", "b"])["cached_bytes"].as_u64().unwrap()
}

/// A server of an object and its proof, and the hash.
fn served(daemon: &TestDaemon, object: &Object) -> (Server, String) {
    let image = daemon.path("sealed.img");
    fs::write(&image, &*object.bytes).unwrap();
    let made = daemon.json(&["base", "seal", image.to_str().unwrap()]);
    let server = Server::start(object.clone());
    server.set_proof(fs::read(made["proof"].as_str().unwrap()).unwrap());
    (server, made["blake3"].as_str().unwrap().to_owned())
}

struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value).next()
    }
}

fn ask(address: SocketAddr, method: &str, path: &str, lines: &str) -> Answer {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(BOUND)).unwrap();
    write!(stream, "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{lines}\r\n").unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    let end = all.windows(4).position(|four| four == b"\r\n\r\n").unwrap();
    let head = String::from_utf8(all[..end].to_vec()).unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head, body: all[end + 4..].to_vec() }
}

fn range(address: SocketAddr, path: &str, range: &str) -> Answer {
    ask(address, "GET", path, &format!("Range: bytes={range}\r\n"))
}

#[test]
fn a_host_reads_what_another_has_and_makes_it_fetch_nothing() {
    let object = Object::new(8 * MIB + 777);
    let (warm, address) = host();
    let (server, root) = served(&warm, &object);
    add(&warm, &server.url("/b"), &[]);
    read(&warm, &object, 0, 4 * MIB);
    until("it to be kept", || (cached(&warm) >= 4 * MIB as u64).then_some(()));
    let at_warm = cached(&warm);
    let mut cold = TestDaemon::on_disk();
    add(&cold, &server.url("/b"), &["--mirror", &format!("plyfs://{address}"), "--blake3", &root]);
    let shown = cold.json(&["base", "show", "b"]);
    assert_eq!(shown["mirrors"][0], format!("plyfs://{address}"));
    server.forget_requests();
    read(&cold, &object, 0, 3 * MIB);
    // Readahead goes further than what the other has.
    for (first, _) in server.requests().iter().filter_map(|request| request.range()) {
        let there = range(address, &format!("/blake3/{root}"), &format!("{first}-{first}"));
        assert_eq!(there.status, 504, "the server was asked for {first}, which the other host has");
    }
    // What the other does not have comes from the server, and the other does not fetch it.
    read(&cold, &object, 6 * MIB, 2 * MIB + 777);
    assert!(server.requests().iter().all(|request| request.range().unwrap().1 >= 4 * MIB as u64 - BLOCK));
    assert!(!server.requests().is_empty());
    assert_eq!(cached(&warm), at_warm);
    let metrics = warm.json(&["status"]);
    assert_eq!(metrics["export"]["listen"], format!("plyfs://{address}"));
    assert!(metrics["export"]["trouble"].is_null());
    // The other is gone, with its host.
    drop(warm);
    read(&cold, &object, 4 * MIB, MIB);
    cold.restart();
    read(&cold, &object, 0, 8 * MIB + 777);
    let show = cold.json(&["base", "show", "b"]);
    assert_eq!(show["state"], "ok", "{show}");
}

/// A block that the other host is fetching for itself is waited for.
#[test]
fn a_block_that_is_on_its_way_to_one_host_is_fetched_once() {
    let object = Object::new(4 * MIB);
    let (warm, address) = host();
    let (server, _) = served(&warm, &object);
    add(&warm, &server.url("/b"), &[]);
    let cold = TestDaemon::on_disk();
    add(&cold, &server.url("/b"), &["--mirror", &format!("plyfs://{address}")]);
    server.forget_requests();
    server.on(|request| match request.is_for_a_proof() {
        true => Reply::Object,
        false => Reply::After(Duration::from_millis(700), Box::new(Reply::Object)),
    });
    thread::scope(|scope| {
        scope.spawn(|| read(&warm, &object, 2 * MIB, 4096));
        server.wait_for_requests(1);
        scope.spawn(|| read(&cold, &object, 2 * MIB, 4096));
    });
    let requests = server.requests();
    let covering = requests
        .iter()
        .filter_map(|request| request.range())
        .filter(|(first, last)| (*first..=*last).contains(&(2 * MIB as u64)));
    assert_eq!(covering.count(), 1, "{requests:?}");
}

/// Guards D120.
#[test]
fn only_bytes_that_were_compared_are_served() {
    let object = Object::new(2 * MIB + 5);
    let (daemon, address) = host();
    let server = Server::start(object.clone());
    let image = daemon.path("image");
    fs::write(&image, &*object.bytes).unwrap();
    let root = daemon.json(&["base", "seal", image.to_str().unwrap()])["blake3"].as_str().unwrap().to_owned();
    let path = format!("/blake3/{root}");
    assert_eq!(range(address, &path, "0-9").status, 404);
    // The hash is a claim until all was compared with it.
    add(&daemon, &server.url("/b"), &["--blake3", &root]);
    read(&daemon, &object, 0, MIB);
    until("it to be kept", || (cached(&daemon) >= MIB as u64).then_some(()));
    let answer = range(address, &path, "0-99");
    assert_eq!((answer.status, answer.header("plyfs-missing")), (504, Some("0-16383")), "{}", answer.head);
    daemon.ok(&["base", "hydrate", "b"]);
    let answer = range(address, &path, "5-99");
    assert_eq!(answer.status, 206, "{}", answer.head);
    assert_eq!(answer.body, object.bytes[5..100]);
    assert_eq!(answer.header("etag"), Some(&*format!("\"blake3:{root}\"")));
    assert_eq!(answer.header("content-range"), Some(&*format!("bytes 5-99/{}", object.bytes.len())));
    // At most half a MiB at a time.
    let all = range(address, &path, "0-");
    assert_eq!((all.status, all.body.len()), (206, MIB / 2));
    same(&all.body, &object.bytes[..MIB / 2], "the answer");
    let end = range(address, &path, "-7");
    assert_eq!((end.status, &*end.body), (206, &object.bytes[object.bytes.len() - 7..]));
    let head = ask(address, "HEAD", &path, "");
    assert_eq!((head.status, head.header("content-length")), (200, Some(&*object.bytes.len().to_string())));
    let other = "If-Match: \"blake3:00\"\r\nRange: bytes=0-9\r\n";
    for (method, lines, status) in [
        ("GET", "", 400),
        ("POST", "Range: bytes=0-9\r\n", 405),
        ("GET", "Range: bytes=0-9,20-29\r\n", 416),
        ("GET", "Range: bytes=99999999-\r\n", 416),
        ("GET", other, 412),
    ] {
        assert_eq!(ask(address, method, &path, lines).status, status, "{method} {lines}");
    }
    for path in ["/", "/blake3/", "/blake3/00", "/sha256/00", "/../etc/passwd", "/blake3/..%2f"] {
        assert_eq!(range(address, path, "0-9").status, 404, "{path}");
    }
    let sent = daemon.json(&["status"]);
    assert!(sent["export"]["trouble"].is_null(), "{sent}");
}

/// Guards D121.
#[test]
fn hosts_that_are_many_and_slow_hurt_no_guest_and_no_other_host_for_long() {
    let object = Object::new(8 * MIB);
    let (daemon, address) = host();
    let (server, root) = served(&daemon, &object);
    add(&daemon, &server.url("/b"), &[]);
    read(&daemon, &object, 0, 8 * MIB);
    until("it to be kept", || (cached(&daemon) == 8 * MIB as u64).then_some(()));
    let path = format!("/blake3/{root}");
    // Clients that ask for much and read nothing, that say nothing, and that say half of something.
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nrange: bytes=0-1048575\r\n\r\n");
    let mut held = Vec::new();
    for number in 0..300 {
        let Ok(mut stream) = TcpStream::connect(address) else { continue };
        let _ = match number % 3 {
            0 => stream.write_all(request.repeat(5).as_bytes()),
            1 => stream.write_all(&request.as_bytes()[..30]),
            _ => Ok(()),
        };
        held.push(stream);
    }
    let begin = Instant::now();
    for at in 0..8 {
        read(&daemon, &object, at * MIB, MIB);
    }
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    let files = fs::read_dir(format!("/proc/{}/fd", daemon.worker())).unwrap().count();
    assert!(files < 300, "{files} descriptors");
    drop(held);
    until("another host to be served", || {
        let mut stream = TcpStream::connect(address).ok()?;
        stream.set_read_timeout(Some(BOUND)).ok()?;
        stream.write_all(request.as_bytes()).ok()?;
        let mut line = [0; 12];
        stream.read_exact(&mut line).ok()?;
        (&line == b"HTTP/1.1 206").then_some(())
    });
}

#[test]
fn a_crash_and_an_upgrade_refuse_no_connection_of_another_host() {
    let object = Object::new(2 * MIB);
    let (daemon, address) = host();
    let (server, root) = served(&daemon, &object);
    add(&daemon, &server.url("/b"), &[]);
    read(&daemon, &object, 0, MIB);
    until("it to be kept", || (cached(&daemon) >= MIB as u64).then_some(()));
    let path = format!("/blake3/{root}");
    let serves = |what: &str| {
        let answer = range(address, &path, "0-65535");
        assert_eq!(answer.status, 206, "{what}: {}", answer.head);
        same(&answer.body, &object.bytes[..65536], what);
    };
    serves("at first");
    daemon.kill_worker();
    serves("the next worker");
    daemon.ok(&["upgrade"]);
    serves("after an upgrade");
    assert!(daemon.json(&["status"])["export"]["trouble"].is_null());
}

#[test]
fn peers_that_cannot_be_are_refused_with_the_remedy() {
    let object = Object::new(MIB);
    let daemon = TestDaemon::on_disk();
    let server = Server::start(object.clone());
    let url = server.url("/b");
    let zeros = "00".repeat(32);
    for (arguments, part) in [
        (vec!["plyfs://10.0.0.2:7070"], "as --mirror"),
        (vec![&*url, "--mirror", "plyfs://10.0.0.2:7070"], "give --blake3 or --sha256"),
        (vec![&*url, "--mirror", "plyfs://10.0.0.2", "--sha256", &zeros], "plyfs://HOST:PORT"),
        (vec![&*url, "--mirror", "plyfs://10.0.0.2:7070/b", "--sha256", &zeros], "plyfs://HOST:PORT"),
    ] {
        let error = daemon.fails(&[&["base", "add", "b"], &*arguments].concat());
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
    let mut other = TestDaemon::unstarted("/var/tmp");
    for address in ["0.0.0.0:7070", "7070", "host:7070", "127.0.0.1:0"] {
        let error = other.try_start(&["--export-http", address]).unwrap_err();
        assert!(error.contains("export.http"), "{error}");
    }
    // An address that is taken: disks are served all the same, and the log and the status say it.
    let taken = server.address().to_string();
    other.try_start(&["--export-http", &taken]).unwrap();
    let status = other.json(&["status"]);
    assert!(status["export"]["trouble"].as_str().unwrap().contains("[export] http"), "{status}");
    assert!(other.log().contains("cannot listen for other hosts"), "{}", other.log());
}
