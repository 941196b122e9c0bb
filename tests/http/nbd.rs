//! NBD servers that do what real ones do, and what they should not: tests/fuse/nbd.rs has the real ones.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use plyfs::config::HttpConfig;
use plyfs::source::SourceErrorKind::{Changed, Denied, GivenUp, Protocol, Unreachable};
use plyfs::source::http::RemoteOptions;
use plyfs::source::nbd::{Nbd, NbdSource};
use plyfs::source::{NbdIdentity, OpenHere, OpenImage, Purpose, RemoteSource, SourceError, StallKind};

use crate::harness::{Client, MIB, briefly, quick, until};
use crate::server::Object;

const GO: [u8; 12] = [0x00, 0x03, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9, 0, 0, 0, 7];

/// What a server does with its clients.
#[derive(Clone, Default)]
struct Manner {
    /// The size that it says, when that is not the object's.
    size: Option<u64>,
    /// Its least block; 0: it says none.
    block: u32,
    /// All that it sends, instead of a handshake.
    instead: Option<Vec<u8>>,
    /// Error numbers of the next replies.
    errors: VecDeque<u32>,
    /// Replies only when so many reads are here, the last one first.
    gathers: usize,
    /// Reads get no reply.
    is_silent: bool,
    /// Replies name reads that were not sent.
    lies: bool,
}

#[derive(Default)]
struct Seen {
    connections: Vec<TcpStream>,
    reads: Vec<(u64, u32)>,
}

struct Server {
    port: u16,
    object: Object,
    manner: Arc<Mutex<Manner>>,
    seen: Arc<Mutex<Seen>>,
}

impl Server {
    fn start(object: &Object, manner: Manner) -> Self {
        Self::at(0, object, manner)
    }

    fn at(port: u16, object: &Object, manner: Manner) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let this =
            Self { port, object: object.clone(), manner: Arc::new(Mutex::new(manner)), seen: Arc::default() };
        let (object, manner, seen) = (this.object.clone(), this.manner.clone(), this.seen.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, object, manner, seen) =
                    (stream.unwrap(), object.clone(), manner.clone(), seen.clone());
                seen.lock().unwrap().connections.push(stream.try_clone().unwrap());
                thread::spawn(move || {
                    let _ = serve(&mut stream, &object, &manner, &seen);
                    let _ = stream.shutdown(Shutdown::Both);
                });
            }
        });
        this
    }

    fn url(&self) -> String {
        format!("nbd://127.0.0.1:{}/golden", self.port)
    }

    fn now(&self, change: impl FnOnce(&mut Manner)) {
        change(&mut self.manner.lock().unwrap());
    }

    fn connections(&self) -> usize {
        self.seen.lock().unwrap().connections.len()
    }

    /// Ends all connections.
    fn hang_up(&self) {
        for stream in &self.seen.lock().unwrap().connections {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn option_reply(kind: u32, data: &[u8]) -> Vec<u8> {
    [&GO[..], &kind.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

fn greeting() -> Vec<u8> {
    [&b"NBDMAGICIHAVEOPT"[..], &[0, 3]].concat()
}

fn serve(
    stream: &mut TcpStream,
    object: &Object,
    manner: &Mutex<Manner>,
    seen: &Mutex<Seen>,
) -> std::io::Result<()> {
    let now = manner.lock().unwrap().clone();
    if let Some(instead) = now.instead {
        stream.write_all(&instead)?;
        // Takes what comes, until the client has enough.
        std::io::copy(stream, &mut std::io::sink())?;
        return Ok(());
    }
    stream.write_all(&greeting())?;
    let mut head = [0; 4 + 8 + 4 + 4];
    stream.read_exact(&mut head)?;
    assert_eq!(
        (&head[..4], &head[4..12], &head[12..16]),
        (&[0, 0, 0, 3][..], &b"IHAVEOPT"[..], &[0, 0, 0, 7][..])
    );
    let mut option = vec![0; u32::from_be_bytes(head[16..].try_into().unwrap()) as usize];
    stream.read_exact(&mut option)?;
    assert_eq!(&option[4..4 + 6], b"golden");
    let size = now.size.unwrap_or(object.bytes.len() as u64);
    stream.write_all(&option_reply(3, &[&[0, 0][..], &size.to_be_bytes(), &[0, 3]].concat()))?;
    if now.block > 0 {
        let sizes =
            [&[0, 3][..], &now.block.to_be_bytes(), &4096u32.to_be_bytes(), &(32u32 << 20).to_be_bytes()];
        stream.write_all(&option_reply(3, &sizes.concat()))?;
    }
    stream.write_all(&option_reply(1, &[]))?;
    let mut gathered = Vec::new();
    loop {
        let mut request = [0; 28];
        stream.read_exact(&mut request)?;
        assert_eq!(&request[..8], [0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0]);
        let cookie: [u8; 8] = request[8..16].try_into().unwrap();
        let offset = u64::from_be_bytes(request[16..24].try_into().unwrap());
        let length = u32::from_be_bytes(request[24..].try_into().unwrap());
        seen.lock().unwrap().reads.push((offset, length));
        let (error, now) = {
            let mut manner = manner.lock().unwrap();
            (manner.errors.pop_front().unwrap_or(0), manner.clone())
        };
        if now.is_silent {
            continue;
        }
        let block = u64::from(now.block.max(1));
        let is_wrong = offset % block != 0 || u64::from(length) % block != 0;
        let error = if is_wrong { 22 } else { error };
        let cookie = if now.lies { [0xff; 8] } else { cookie };
        let mut reply = [&[0x67, 0x44, 0x66, 0x98][..], &error.to_be_bytes(), &cookie].concat();
        if error == 0 {
            reply.extend_from_slice(&object.bytes[offset as usize..offset as usize + length as usize]);
        }
        gathered.push(reply);
        if gathered.len() >= now.gathers {
            for reply in gathered.drain(..).rev() {
                stream.write_all(&reply)?;
            }
        }
    }
}

struct Reader {
    client: Client,
    nbd: Arc<Nbd>,
}

impl Reader {
    fn new() -> Self {
        Self::with(&HttpConfig { min_rate: 1 << 20, ..quick() })
    }

    fn with(config: &HttpConfig) -> Self {
        let client = Client::with(config);
        let opener: Arc<dyn OpenImage> = Arc::new(OpenHere);
        let nbd = Nbd::new(&client.http, &opener);
        Self { client, nbd }
    }

    fn probe(&self, urls: &[String]) -> Result<(NbdIdentity, Vec<u8>), SourceError> {
        let (nbd, urls) = (self.nbd.clone(), urls.to_vec());
        self.client.wait(async move { nbd.probe(&urls, &RemoteOptions::default()).await })
    }

    fn open(&self, urls: &[String], object: &Object, options: RemoteOptions) -> Arc<NbdSource> {
        let identity = NbdIdentity { size: object.bytes.len() as u64, export: "golden".into() };
        self.nbd.open(urls, &identity, options)
    }

    fn start(
        &self,
        source: &Arc<NbdSource>,
        range: Range<u64>,
        purpose: Purpose,
    ) -> tokio::task::JoinHandle<Result<Vec<u8>, SourceError>> {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let into = bytes.clone();
        let deliver = Box::new(move |piece: &[u8]| into.lock().unwrap().extend_from_slice(piece));
        let fetch = source.clone().fetch(range, purpose, Instant::now(), deliver);
        self.client.runtime.spawn(async move { fetch.await.map(|()| bytes.lock().unwrap().clone()) })
    }

    fn read(&self, source: &Arc<NbdSource>, range: Range<u64>) -> Result<Vec<u8>, SourceError> {
        let reading = self.start(source, range, Purpose::Demand);
        self.client.wait(reading).unwrap()
    }
}

#[track_caller]
fn is(found: Result<Vec<u8>, SourceError>, object: &Object, range: Range<u64>) {
    let wanted = &object.bytes[range.start as usize..range.end as usize];
    assert!(found.unwrap() == wanted, "other bytes in {range:?}");
}

#[test]
fn an_export_is_read_over_one_connection_with_reads_in_flight() {
    let (object, reader) = (Object::new(3 * MIB + 512), Reader::new());
    let server = Server::start(&object, Manner { block: 512, ..Manner::default() });
    let (identity, head) = reader.probe(&[server.url()]).unwrap();
    assert_eq!(identity, NbdIdentity { size: object.bytes.len() as u64, export: "golden".into() });
    assert!(head == object.bytes[..64 << 10]);
    let source = reader.open(&[server.url()], &object, RemoteOptions::default());
    // The server answers nothing until four reads are there, and the last one first.
    server.now(|manner| manner.gathers = 4);
    is(reader.read(&source, 0..MIB as u64), &object, 0..MIB as u64);
    server.now(|manner| manner.gathers = 0);
    // Offsets that the server would not take.
    for range in [1..3, 511..513, 12_345..700_001, 3 * MIB as u64 + 5..3 * MIB as u64 + 512] {
        is(reader.read(&source, range.clone()), &object, range);
    }
    assert_eq!(server.connections(), 2, "one for the probe");
}

/// Guards H3.
#[test]
fn a_read_waits_for_whatever_a_server_may_recover_from() {
    let (object, reader) = (Object::new(MIB), Reader::new());
    let server = Server::start(&object, Manner { errors: [5, 108, 12].into(), ..Manner::default() });
    let source = reader.open(&[server.url()], &object, RemoteOptions::default());
    is(reader.read(&source, 100..200_000), &object, 100..200_000);
    assert_eq!(source.stall(), None);
    // An error that does not end.
    server.now(|manner| manner.errors = [5; 1000].into());
    let waiting = reader.start(&source, 0..4096, Purpose::Demand);
    until("a reader that waits", || source.stall().is_some());
    let stall = source.stall().unwrap();
    assert!(stall.kind == StallKind::Waiting && stall.why.contains("EIO"), "{stall:?}");
    until("a URL in trouble", || {
        source.urls()[0].trouble.as_ref().is_some_and(|trouble| trouble.contains("EIO"))
    });
    // Work for which nothing waits gives up.
    let error = reader.client.wait(reader.start(&source, 0..4096, Purpose::Hydrate)).unwrap().unwrap_err();
    assert_eq!(error.kind(), Unreachable);
    server.now(|manner| manner.errors.clear());
    is(reader.client.wait(waiting).unwrap(), &object, 0..4096);
    // The server ends every connection, and one that was idle is no failure.
    server.hang_up();
    is(reader.read(&source, 5..9), &object, 5..9);
    // A server that does not answer: its connection is given up.
    server.now(|manner| manner.is_silent = true);
    let waiting = reader.start(&source, 0..4096, Purpose::Demand);
    until("a reader that waits", || source.stall().is_some());
    assert!(source.stall().unwrap().why.contains("has not answered a read for"));
    server.now(|manner| manner.is_silent = false);
    is(reader.client.wait(waiting).unwrap(), &object, 0..4096);
}

/// Guards D107.
#[test]
fn no_byte_of_an_export_of_another_size_is_used() {
    let (object, reader) = (Object::new(MIB), Reader::new());
    let server = Server::start(&object, Manner { size: Some(MIB as u64 - 512), ..Manner::default() });
    let source = reader.open(&[server.url()], &object, RemoteOptions::default());
    let waiting = reader.start(&source, 0..4096, Purpose::Demand);
    until("a reader that waits", || source.stall().is_some());
    let stall = source.stall().unwrap();
    assert!(
        stall.kind == StallKind::Changed && stall.why.contains("it has 1048064 bytes, not 1048576"),
        "{stall:?}"
    );
    assert!(server.seen.lock().unwrap().reads.is_empty());
    server.now(|manner| manner.size = None);
    is(reader.client.wait(waiting).unwrap(), &object, 0..4096);
    let brief = reader.open(&[server.url()], &object, briefly());
    server.now(|manner| manner.size = Some(512));
    server.hang_up();
    assert_eq!(reader.read(&brief, 0..4096).unwrap_err().kind(), Changed);
}

#[test]
fn another_url_serves_while_one_is_down_or_the_base_is_moved() {
    let (object, reader) = (Object::new(MIB), Reader::new());
    let (one, other) = (Server::start(&object, Manner::default()), Server::start(&object, Manner::default()));
    let dead = {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        format!("nbd://127.0.0.1:{}/golden", listener.local_addr().unwrap().port())
    };
    let source = reader.open(&[dead.clone(), one.url()], &object, RemoteOptions::default());
    is(reader.read(&source, 0..99_999), &object, 0..99_999);
    assert!(source.urls()[0].trouble.is_some() && source.urls()[1].trouble.is_none());
    let source = reader.open(std::slice::from_ref(&dead), &object, RemoteOptions::default());
    let waiting = reader.start(&source, 7..4096, Purpose::Demand);
    until("a reader that waits", || source.stall().is_some());
    source.set_urls(&[other.url()]).unwrap();
    is(reader.client.wait(waiting).unwrap(), &object, 7..4096);
    assert_eq!(source.set_urls(&["nbd://h/e#x".into()]).unwrap_err().kind(), Protocol);
    source.set_urls(std::slice::from_ref(&dead)).unwrap();
    let waiting = reader.start(&source, 0..4096, Purpose::Demand);
    until("a reader that waits", || source.stall().is_some());
    source.give_up(true);
    assert_eq!(reader.client.wait(waiting).unwrap().unwrap_err().kind(), GivenUp);
    let brief = reader.open(&[dead], &object, briefly());
    assert_eq!(reader.read(&brief, 0..4096).unwrap_err().kind(), Unreachable);
    // Two exports that are not one object.
    let mut longer = Object::new(MIB + 4096);
    let third = Server::start(&longer, Manner::default());
    let error = reader.probe(&[one.url(), third.url()]).unwrap_err().to_string();
    assert!(
        error.contains("it is another object than") && error.contains("1052672 bytes, not 1048576"),
        "{error}"
    );
    let mut bytes = object.bytes.to_vec();
    bytes[9] ^= 1;
    longer.bytes = Arc::new(bytes);
    let fourth = Server::start(&longer, Manner::default());
    let error = reader.probe(&[one.url(), fourth.url()]).unwrap_err().to_string();
    assert!(error.contains("begins with other bytes"), "{error}");
}

#[test]
fn what_is_no_server_or_refuses_is_told_by_its_own_word() {
    let reader = Reader::new();
    let object = Object::new(MIB);
    let export = |size: u64| option_reply(3, &[&[0, 0][..], &size.to_be_bytes(), &[0, 3]].concat());
    let block = |size: u32| option_reply(3, &[&[0, 3][..], &size.to_be_bytes(), &[0; 8]].concat());
    let with = |replies: &[Vec<u8>]| [greeting(), replies.concat()].concat();
    let error = |number: u32, text: &str| with(&[option_reply(1 << 31 | number, text.as_bytes())]);
    let huge = [&GO[..], &3u32.to_be_bytes(), &u32::MAX.to_be_bytes()].concat();
    let cases: Vec<(Vec<u8>, _, &str)> = vec![
        (b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), Protocol, "no NBD server"),
        (b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53".to_vec(), Protocol, "before 2011"),
        (b"NBDMAGICIHAVEOPT\0\0".to_vec(), Protocol, "fixed newstyle"),
        (with(&[huge]), Protocol, "with 4294967295 bytes"),
        (with(&[export(512), block(3)]), Protocol, "a block has 3 bytes"),
        (with(&[export(512), block(1 << 20)]), Protocol, "a block has 1048576 bytes"),
        (with(&[option_reply(1, &[])]), Protocol, "does not say the size"),
        (with(&[export(1 << 63), option_reply(1, &[])]), Protocol, "9223372036854775808 bytes"),
        (with(&vec![option_reply(3, &[9, 9]); 65]), Protocol, "without end"),
        (with(&[option_reply(2, &[])]), Protocol, "unknown reply"),
        (error(1, ""), Protocol, "NBD_OPT_GO"),
        (error(6, "no such\nexport"), Denied, "no such export (no suchexport); check the name"),
        (error(5, ""), Denied, "demands TLS"),
        (error(2, "not you"), Denied, "(not you)"),
        (error(7, ""), Unreachable, "shutting down"),
    ];
    for (instead, kind, why) in cases {
        let server = Server::start(&object, Manner { instead: Some(instead), ..Manner::default() });
        let error = reader.probe(&[server.url()]).unwrap_err();
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains(why), "{why}: {error}");
    }
    // An answer to a read that was not sent.
    let server = Server::start(&object, Manner { lies: true, ..Manner::default() });
    let error = reader.probe(&[server.url()]).unwrap_err();
    assert!(error.to_string().contains("a read that was not sent"), "{error}");
    // A server that says nothing ends with the time for it.
    let server = Server::start(&object, Manner { instead: Some(Vec::new()), ..Manner::default() });
    let begin = Instant::now();
    let error = reader.probe(&[server.url()]).unwrap_err();
    assert!(error.kind() == Unreachable && begin.elapsed() < Duration::from_secs(20), "{error}");
}
