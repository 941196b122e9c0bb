//! Reads while the cache's disk hangs.

use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use super::silent_servers::{Pool, Silent};
use super::*;

/// A cache whose disk hangs while it is closed.
struct Hanging {
    cache: MemoryCache,
    open: Mutex<bool>,
    opened: Condvar,
    /// Calls that wait or have waited.
    calls: AtomicUsize,
    /// The calls of `answers`.
    reported: Mutex<Vec<bool>>,
}

impl Hanging {
    fn new(server: &Server, blocks: &[u64]) -> Arc<Self> {
        let cache = MemoryCache::default();
        for block in blocks {
            let from = (block * CACHE_BLOCK) as usize;
            cache.insert(*block, &server.bytes[from..from + CACHE_BLOCK as usize]);
        }
        Arc::new(Self {
            cache,
            open: Mutex::new(false),
            opened: Condvar::new(),
            calls: AtomicUsize::new(0),
            reported: Mutex::default(),
        })
    }

    fn wait(&self) {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let mut open = self.open.lock();
        while !*open {
            self.opened.wait(&mut open);
        }
    }

    fn set_open(&self) {
        *self.open.lock() = true;
        self.opened.notify_all();
    }
}

impl FetchCache for Hanging {
    fn read(&self, first: u64, buf: &mut [u8]) -> usize {
        self.wait();
        self.cache.read(first, buf)
    }

    fn contains(&self, block: u64) -> bool {
        self.wait();
        self.cache.contains(block)
    }

    fn insert(&self, first: u64, data: &[u8]) {
        self.wait();
        self.cache.insert(first, data);
    }

    fn answers(&self, answers: bool) {
        self.reported.lock().push(answers);
    }
}

/// Starts a reader. The channel delivers when the reader has its bytes; a reader that waits for the disk waits for the
/// whole test.
fn reads(source: &Arc<LazySource>, server: &Arc<Server>, offset: u64) -> std::sync::mpsc::Receiver<()> {
    let (source, server) = (source.clone(), server.clone());
    let (done, wait) = std::sync::mpsc::channel();
    thread::spawn(move || {
        assert_reads(&source, &server, offset, 4096);
        _ = done.send(());
    });
    wait
}

const LONG: Duration = Duration::from_secs(60);

/// Guards D41, D58.
#[test]
fn a_hanging_cache_disk_stops_no_reader_whose_server_answers() {
    let server = Server::new(64 << 20, 1 << 20);
    let cache = Hanging::new(&server, &[]);
    let source = Arc::new(lazy(&server, cache.clone()));
    for block in [0, 700, 3, 512, 90] {
        reads(&source, &server, block * CACHE_BLOCK).recv_timeout(LONG).expect("the server answers");
    }
    assert_eq!(*cache.reported.lock(), [false], "the hang is reported once");
    // One call searches for late blocks, one may have hung before the first read was late, the others are inserts.
    let inserts = server.requests().len();
    assert!(cache.calls.load(Ordering::SeqCst) <= 3 + inserts, "{:?} {inserts}", cache.calls);
    cache.set_open();
    wait_until_cached(&source);
    while cache.reported.lock().len() < 2 {
        thread::yield_now();
    }
    assert_eq!(*cache.reported.lock(), [false, true]);
    assert_reads(&source, &server, 700 * CACHE_BLOCK, 100_000);
}

/// Guards D58.
#[test]
fn blocks_that_only_a_hanging_cache_has_come_when_its_disk_answers() {
    let server = Server::new(4 << 20, 1 << 20);
    // Like a hydrated base whose server is gone.
    server.set_open(false);
    let blocks: Vec<u64> = (0..64).collect();
    let cache = Hanging::new(&server, &blocks);
    let source = Arc::new(lazy(&server, cache.clone()));
    let readers: Vec<_> =
        [0, 1, 17, 40, 63].iter().map(|block| reads(&source, &server, block * CACHE_BLOCK + 100)).collect();
    while cache.reported.lock().is_empty() {
        thread::yield_now();
    }
    let late = reads(&source, &server, 30 * CACHE_BLOCK);
    cache.set_open();
    for reader in readers.into_iter().chain([late]) {
        reader.recv_timeout(LONG).expect("the cache has it");
    }
    server.set_open(true);
}

#[test]
fn a_request_is_cancelled_when_the_cache_delivers_its_blocks_late() {
    let (server, pool) = (Silent::new(64 << 20), Pool::new());
    let cached = Server::new(4 << 20, 1 << 20);
    let cache = Hanging::new(&cached, &[5, 9]);
    let source = LazySource::new(
        server.clone(),
        cache.clone(),
        pool,
        Identity::Contents { size: server.size(), key: [0; 32] },
        Events::new().base(1, "debian"),
        Arc::default(),
        TimedReads::new(Arc::new(Threads)),
    );
    let mut buf = vec![0; 4096];
    let completions = [5, 9].map(|block| {
        let error = source.read_at(&mut buf, block * CACHE_BLOCK).unwrap_err();
        error.completion().cloned().expect("it waits")
    });
    assert!(source.is_busy());
    cache.set_open();
    completions.iter().for_each(Completion::wait);
    eventually("no request is under way", || !source.is_busy() && server.under_way() == 0);
    for block in [5, 9] {
        source.read_at(&mut buf, block * CACHE_BLOCK).unwrap();
        assert!(buf == cached.bytes[(block * CACHE_BLOCK) as usize..][..4096]);
    }
}
