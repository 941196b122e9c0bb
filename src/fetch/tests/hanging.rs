//! The cache's disk hangs.

use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use super::*;

/// A shelf whose disk hangs while it is closed.
struct Hanging {
    shelf: Shelf,
    open: Mutex<bool>,
    opened: Condvar,
    /// Calls that wait or have waited.
    calls: AtomicUsize,
    told: Mutex<Vec<bool>>,
}

impl Hanging {
    fn new(server: &Server, blocks: &[u64]) -> Arc<Self> {
        let shelf = Shelf::default();
        for block in blocks {
            let from = (block * CACHE_BLOCK) as usize;
            shelf.insert(*block, &server.bytes[from..from + CACHE_BLOCK as usize]);
        }
        Arc::new(Self {
            shelf,
            open: Mutex::new(false),
            opened: Condvar::new(),
            calls: AtomicUsize::new(0),
            told: Mutex::default(),
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

impl Keep for Hanging {
    fn read(&self, first: u64, buf: &mut [u8]) -> usize {
        self.wait();
        self.shelf.read(first, buf)
    }

    fn contains(&self, block: u64) -> bool {
        self.wait();
        self.shelf.contains(block)
    }

    fn insert(&self, first: u64, data: &[u8]) {
        self.wait();
        self.shelf.insert(first, data);
    }

    fn answers(&self, answers: bool) {
        self.told.lock().push(answers);
    }
}

/// Ends when the reader has its bytes: a reader that waits for the disk waits for as long as the test takes.
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
fn a_cache_whose_disk_hangs_holds_no_reader_whose_server_answers() {
    let server = Server::new(64 << 20, 1 << 20);
    let keep = Hanging::new(&server, &[]);
    let source = Arc::new(lazy(&server, keep.clone()));
    for block in [0, 700, 3, 512, 90] {
        reads(&source, &server, block * CACHE_BLOCK).recv_timeout(LONG).expect("the server answers");
    }
    assert_eq!(*keep.told.lock(), [false], "it is told once");
    // One looks for what was late, one may have hung before the first was late, others keep what came.
    let inserts = server.requests().len();
    assert!(keep.calls.load(Ordering::SeqCst) <= 3 + inserts, "{:?} {inserts}", keep.calls);
    keep.set_open();
    settle(&source);
    while keep.told.lock().len() < 2 {
        thread::yield_now();
    }
    assert_eq!(*keep.told.lock(), [false, true]);
    assert_reads(&source, &server, 700 * CACHE_BLOCK, 100_000);
}

/// Guards D58.
#[test]
fn what_only_a_hanging_cache_has_comes_when_its_disk_answers() {
    let server = Server::new(4 << 20, 1 << 20);
    // As a hydrated base whose server is gone.
    server.set_open(false);
    let blocks: Vec<u64> = (0..64).collect();
    let keep = Hanging::new(&server, &blocks);
    let source = Arc::new(lazy(&server, keep.clone()));
    let readers: Vec<_> =
        [0, 1, 17, 40, 63].iter().map(|block| reads(&source, &server, block * CACHE_BLOCK + 100)).collect();
    while keep.told.lock().is_empty() {
        thread::yield_now();
    }
    let late = reads(&source, &server, 30 * CACHE_BLOCK);
    keep.set_open();
    for reader in readers.into_iter().chain([late]) {
        reader.recv_timeout(LONG).expect("the cache has it");
    }
    server.set_open(true);
}

#[test]
fn what_the_cache_had_after_all_is_not_asked_of_the_server_for_ever() {
    let (server, pool) = (Silent::new(64 << 20), Pool::new());
    let shelf = Server::new(4 << 20, 1 << 20);
    let keep = Hanging::new(&shelf, &[5, 9]);
    let source = LazySource::new(
        server.clone(),
        keep.clone(),
        pool,
        Identity::Contents { size: server.size(), key: [0; 32] },
        Events::new().base(1, "debian"),
        Arc::default(),
        Patience::new(Arc::new(Threads)),
    );
    let mut buf = vec![0; 4096];
    let arrivals = [5, 9].map(|block| {
        let error = source.read_at(&mut buf, block * CACHE_BLOCK).unwrap_err();
        error.arrival().cloned().expect("it waits")
    });
    assert!(source.is_busy());
    keep.set_open();
    arrivals.iter().for_each(Arrival::wait);
    eventually("no request is under way", || !source.is_busy() && server.under_way() == 0);
    for block in [5, 9] {
        source.read_at(&mut buf, block * CACHE_BLOCK).unwrap();
        assert!(buf == shelf.bytes[(block * CACHE_BLOCK) as usize..][..4096]);
    }
}
