mod hanging;
mod holdings;
mod silent_servers;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::task::{Context, Wake, Waker};
use std::thread;
use std::time::Instant;

use parking_lot::Condvar;

use super::*;
use crate::events::Events;
use crate::source::{Deliver, Fetch, UrlState, observe};

/// Runs each future on a thread of its own.
struct Threads;

struct Unpark(thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

impl Spawn for Threads {
    fn spawn(&self, mut future: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>) {
        thread::spawn(move || {
            let waker = Waker::from(Arc::new(Unpark(thread::current())));
            while future.as_mut().poll(&mut Context::from_waker(&waker)).is_pending() {
                thread::park();
            }
        });
    }

    fn spawn_blocking(&self, job: Box<dyn FnOnce() + Send>) {
        thread::spawn(job);
    }
}

/// Decides whether a request fails, and with which error.
type Answer = Box<dyn FnMut(&Range<u64>, Purpose) -> Option<SourceErrorKind> + Send>;

/// A server in memory.
struct Server {
    bytes: Vec<u8>,
    /// Bytes that are delivered at once.
    piece: usize,
    requests: Mutex<Vec<(Range<u64>, Purpose)>>,
    answer: Mutex<Answer>,
    /// Requests stop before their first byte while it is closed.
    open: Mutex<bool>,
    opened: Condvar,
    /// Whether each request delivers only half of its bytes.
    cut: AtomicBool,
    /// Whether requests stop after half of their bytes while `open` is false, instead of before their first.
    in_the_middle: AtomicBool,
}

impl Server {
    fn new(len: usize, piece: usize) -> Arc<Self> {
        Arc::new(Self {
            bytes: (0..len as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect(),
            piece,
            requests: Mutex::default(),
            answer: Mutex::new(Box::new(|_, _| None)),
            open: Mutex::new(true),
            opened: Condvar::new(),
            cut: AtomicBool::new(false),
            in_the_middle: AtomicBool::new(false),
        })
    }

    fn set_open(&self, open: bool) {
        *self.open.lock() = open;
        self.opened.notify_all();
    }

    fn requests(&self) -> Vec<Range<u64>> {
        self.requests.lock().iter().map(|(range, _)| range.clone()).collect()
    }

    /// The largest number of requests for any one block.
    fn max_requests_per_block(&self) -> usize {
        let mut count = HashMap::new();
        for range in self.requests() {
            assert!(range.start.is_multiple_of(CACHE_BLOCK) && range.start < range.end);
            for block in range.start / CACHE_BLOCK..range.end.div_ceil(CACHE_BLOCK) {
                *count.entry(block).or_insert(0) += 1;
            }
        }
        count.into_values().max().unwrap_or(0)
    }
}

impl RemoteSource for Server {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn shown(&self) -> String {
        "http://server/image".into()
    }

    fn fetch(
        self: Arc<Self>,
        range: Range<u64>,
        purpose: Purpose,
        _since: Instant,
        mut deliver: Deliver,
    ) -> Fetch {
        self.requests.lock().push((range.clone(), purpose));
        Box::pin(async move {
            let wait_until_open = || {
                let mut open = self.open.lock();
                while !*open {
                    self.opened.wait(&mut open);
                }
            };
            let stops_later = self.in_the_middle.load(Ordering::Relaxed);
            if !stops_later {
                wait_until_open();
            }
            if let Some(kind) = (self.answer.lock())(&range, purpose) {
                return Err(SourceError::remote(kind, "read", self.shown(), "the test says so", "nothing"));
            }
            let mut bytes = &self.bytes[range.start as usize..range.end as usize];
            if self.cut.load(Ordering::Relaxed) {
                bytes = &bytes[..bytes.len() / 2];
            }
            let half = bytes.len() / 2;
            bytes[..half].chunks(self.piece).for_each(&mut deliver);
            if stops_later {
                wait_until_open();
            }
            bytes[half..].chunks(self.piece).for_each(&mut deliver);
            Ok(())
        })
    }

    fn stall(&self) -> Option<Stall> {
        None
    }

    fn set_urls(&self, _urls: &[String]) -> Result<(), SourceError> {
        Ok(())
    }

    fn give_up(&self, _given_up: bool) {}

    fn urls(&self) -> Vec<UrlState> {
        Vec::new()
    }
}

/// A cache in memory; a test may remove any block at any time.
#[derive(Default)]
struct MemoryCache {
    blocks: Mutex<HashMap<u64, Vec<u8>>>,
}

impl FetchCache for MemoryCache {
    fn read(&self, first: u64, buf: &mut [u8]) -> usize {
        let blocks = self.blocks.lock();
        let mut done = 0;
        for (part, block) in buf.chunks_mut(CACHE_BLOCK as usize).zip(first..) {
            match blocks.get(&block) {
                Some(bytes) if bytes.len() == part.len() => part.copy_from_slice(bytes),
                _ => return done,
            }
            done += 1;
        }
        done
    }

    fn contains(&self, block: u64) -> bool {
        self.blocks.lock().contains_key(&block)
    }

    fn insert(&self, first: u64, data: &[u8]) {
        let mut blocks = self.blocks.lock();
        for (bytes, block) in data.chunks(CACHE_BLOCK as usize).zip(first..) {
            blocks.insert(block, bytes.to_vec());
        }
    }

    fn hold(&self, first: u64, rows: &mut [HeldRow]) {
        let blocks = self.blocks.lock();
        for (no, row) in (first..).zip(rows) {
            let held = (0..64).filter(|at| blocks.contains_key(&(no * 64 + at)));
            row.cached |= held.map(|at| 1 << at).sum::<u64>();
        }
    }

    fn next_held(&self, row: u64) -> Option<u64> {
        self.blocks.lock().keys().map(|block| block / 64).filter(|held| *held >= row).min()
    }
}

fn lazy(server: &Arc<Server>, cache: Arc<dyn FetchCache>) -> LazySource {
    let identity = Identity::Contents { size: server.size(), key: [0; 32] };
    LazySource::new(
        server.clone(),
        cache,
        Arc::new(Threads),
        identity,
        Events::new().base(1, "debian"),
        Arc::default(),
        TimedReads::new(Arc::new(Threads)),
    )
}

/// Bytes that readers found in the cache, and bytes that were fetched for any reason.
fn counters(source: &LazySource) -> (u64, u64) {
    let bytes = |reasons: &[Reason]| reasons.iter().map(|r| source.shared.traffic.total(*r).bytes).sum();
    (bytes(&[Reason::Disk]), bytes(&[Reason::Demand, Reason::Readahead, Reason::Prefetch, Reason::Hydrate]))
}

/// Reads as a request does: runs again until nothing is missing, and holds the completions of all attempts.
fn read(source: &LazySource, offset: u64, len: usize) -> Result<Vec<u8>, SourceError> {
    let mut held = Vec::new();
    loop {
        let mut buf = vec![0xee; len];
        match source.read_at(&mut buf, offset) {
            Ok(read) => {
                buf.truncate(read);
                return Ok(buf);
            }
            Err(error) => match error.completion() {
                Some(completion) => {
                    held.push(completion.clone());
                    assert!(held.len() < 1000, "a read that does not end");
                    completion.wait();
                }
                None => return Err(error),
            },
        }
    }
}

fn assert_reads(source: &LazySource, server: &Server, offset: u64, len: usize) {
    let end = (offset as usize + len).min(server.bytes.len());
    assert!(read(source, offset, len).unwrap() == server.bytes[offset as usize..end], "{offset}+{len}");
}

/// Waits until nothing is in transit: the cache has every block that came.
fn wait_until_cached(source: &LazySource) {
    while source.shared.in_transit.load(Ordering::Relaxed) > 0 {
        thread::yield_now();
    }
}

fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let end = Instant::now() + std::time::Duration::from_secs(60);
    while !so() {
        assert!(Instant::now() < end, "timed out waiting until {what}");
        thread::yield_now();
    }
}

/// Guards D7, D38.
#[test]
fn reads_return_the_objects_bytes_whatever_the_cache_holds_and_however_they_come() {
    const LEN: usize = 3 * (1 << 20) + 777;
    for (seed, piece) in [(1u64, 100), (2, 16384), (3, 40_000), (4, 1 << 22)] {
        let caches: [Arc<dyn FetchCache>; 2] = [Arc::new(MemoryCache::default()), Arc::new(NoCache)];
        for cache in caches {
            let server = Server::new(LEN, piece);
            let source = Arc::new(lazy(&server, cache));
            let threads = (0..4u64).map(|n| {
                let (source, server) = (source.clone(), server.clone());
                thread::spawn(move || {
                    let mut state = seed.wrapping_mul(0x2545_f491_4f6c_dd1d) + n;
                    let mut next = |below: u64| {
                        state ^= state << 13;
                        state ^= state >> 7;
                        state ^= state << 17;
                        state % below
                    };
                    for _ in 0..60 {
                        let offset = next(LEN as u64);
                        let len = [1, 512, 4096, 16384, 100_000, 400_000][next(6) as usize];
                        assert_reads(&source, &server, offset, len);
                    }
                })
            });
            threads.collect::<Vec<_>>().into_iter().for_each(|thread| thread.join().unwrap());
        }
    }
}

#[test]
fn a_reader_learns_whether_its_bytes_were_kept_or_fetched() {
    let server = Server::new(1 << 20, 5000);
    let source = lazy(&server, Arc::new(MemoryCache::default()));
    let provenance = |offset, len| observe(|| assert_reads(&source, &server, offset, len)).1;
    assert_eq!(provenance(0, 100_000), Some(Provenance::Fetched));
    wait_until_cached(&source);
    assert_eq!(provenance(0, 100_000), Some(Provenance::Kept));
    assert_eq!(provenance(500_000, 0), None);
}

/// Guards D40.
#[test]
fn a_block_is_fetched_once_for_any_number_of_readers() {
    let server = Server::new(1 << 20, 5000);
    server.set_open(false);
    let source = Arc::new(lazy(&server, Arc::new(MemoryCache::default())));
    let readers: Vec<_> = (0..10)
        .map(|n| {
            let (source, server) = (source.clone(), server.clone());
            thread::spawn(move || assert_reads(&source, &server, n * 100, 300_000))
        })
        .collect();
    // This is the last reader: when it has asked, all have.
    let mut buf = vec![0; 300_000];
    let completion = source.read_at(&mut buf, 0).unwrap_err().completion().cloned().unwrap();
    assert!(!completion.is_complete());
    server.set_open(true);
    readers.into_iter().for_each(|reader| reader.join().unwrap());
    wait_until_cached(&source);
    drop(completion);
    assert_reads(&source, &server, 0, 300_000);
    assert_eq!(server.max_requests_per_block(), 1, "{:?}", server.requests());
    let (hit, fetched) = counters(&source);
    assert!(hit >= 300_000 && fetched >= 300_000, "{hit} {fetched}");
}

/// Guards D41.
#[test]
fn a_reader_gets_its_block_while_the_rest_of_the_request_is_under_way() {
    let server = Server::new(2 << 20, 5000);
    server.set_open(false);
    server.in_the_middle.store(true, Ordering::Relaxed);
    let source = lazy(&server, Arc::new(NoCache));
    let mut buf = vec![0; 1 << 20];
    let whole = source.read_at(&mut buf, 0).unwrap_err().completion().cloned().unwrap();
    assert_reads(&source, &server, 0, 4096);
    assert!(!whole.is_complete());
    assert_eq!(server.requests().len(), 1, "{:?}", server.requests());
    server.set_open(true);
    whole.wait();
    assert_reads(&source, &server, 0, 1 << 20);
}

#[test]
fn neighbouring_misses_are_one_request() {
    let server = Server::new(4 << 20, 1 << 20);
    let source = lazy(&server, Arc::new(MemoryCache::default()));
    assert_reads(&source, &server, 5, 1 << 20);
    assert_eq!(server.requests().first().unwrap().start, 0);
    assert!(server.requests()[0].end >= (1 << 20) + 5);
    wait_until_cached(&source);
    assert_eq!(counters(&source).0, 0);
    assert_reads(&source, &server, 5, 1 << 20);
    assert_eq!((counters(&source).0, server.max_requests_per_block()), (1 << 20, 1));
}

/// Guards D39.
#[test]
fn a_reader_that_goes_away_does_not_affect_other_readers_of_the_block() {
    let server = Server::new(1 << 20, 1 << 20);
    server.set_open(false);
    let source = lazy(&server, Arc::new(NoCache));
    let mut buf = vec![0; 4096];
    // Reads, and never comes back.
    drop(source.read_at(&mut buf, 0).unwrap_err());
    // Waits before the server answers: a reader that came after the block had left would request it again.
    let other = source.read_at(&mut buf, 0).unwrap_err().completion().cloned().unwrap();
    server.set_open(true);
    other.wait();
    assert_reads(&source, &server, 0, 4096);
    assert_eq!(server.max_requests_per_block(), 1);
}

/// Guards D37.
#[test]
fn a_failure_reaches_all_waiting_readers_and_the_next_reader_requests_again() {
    for kind in [SourceErrorKind::Changed, SourceErrorKind::Denied, SourceErrorKind::Unreachable] {
        let server = Server::new(1 << 20, 1 << 20);
        server.set_open(false);
        *server.answer.lock() = Box::new(move |_, _| Some(kind));
        let source = Arc::new(lazy(&server, Arc::new(MemoryCache::default())));
        let readers: Vec<_> = (0..4)
            .map(|_| {
                let source = source.clone();
                thread::spawn(move || read(&source, 20_000, 10).unwrap_err().kind())
            })
            .collect();
        server.set_open(true);
        for reader in readers {
            assert_eq!(reader.join().unwrap(), kind);
        }
        *server.answer.lock() = Box::new(|_, _| None);
        // A reader that comes while another still holds the failed block gets the same error.
        while read(&source, 20_000, 10).is_err() {
            thread::yield_now();
        }
        assert_reads(&source, &server, 20_000, 10);
    }
}

/// Guards D37.
#[test]
fn a_transfer_that_ends_early_fails_the_read_and_hangs_no_reader() {
    // The read covers the whole object, so that no readahead follows.
    let server = Server::new(200_000, 1 << 20);
    server.cut.store(true, Ordering::Relaxed);
    let source = lazy(&server, Arc::new(NoCache));
    let error = read(&source, 0, 200_000).unwrap_err();
    assert_eq!(error.kind(), SourceErrorKind::Io, "{error}");
    server.cut.store(false, Ordering::Relaxed);
    // The thread of the request may still hold the failed blocks; a read that finds them gets the same error.
    let left = |block| source.shared.table.lock().transit.get(block).is_none();
    eventually("the failed blocks have left the table", || (0..13).all(left));
    assert_reads(&source, &server, 0, 200_000);
}

#[test]
fn a_reader_that_joined_a_failed_prefetch_gets_a_request_of_its_own() {
    let server = Server::new(1 << 20, 1 << 20);
    server.set_open(false);
    *server.answer.lock() =
        Box::new(|_, purpose| (purpose != Purpose::Demand).then_some(SourceErrorKind::Unreachable));
    let source = Arc::new(lazy(&server, Arc::new(MemoryCache::default())));
    let completion = source.prefetch(&[(0, 1 << 20)], Purpose::Prefetch).unwrap();
    let mut buf = vec![0; 4096];
    let joined = source.read_at(&mut buf, 500_000).unwrap_err().completion().cloned().unwrap();
    server.set_open(true);
    completion.wait();
    joined.wait();
    assert_reads(&source, &server, 500_000, 4096);
    assert!(server.requests.lock().iter().any(|(_, purpose)| *purpose == Purpose::Demand));
    // Blocks without a reader are not requested again.
    assert!(server.requests().iter().filter(|range| range.contains(&0)).count() == 1);
}

#[test]
fn blocks_that_the_cache_lost_are_fetched_again() {
    let server = Server::new(1 << 20, 1 << 20);
    let cache = Arc::new(MemoryCache::default());
    let source = lazy(&server, cache.clone());
    assert_reads(&source, &server, 0, 1 << 20);
    wait_until_cached(&source);
    cache.blocks.lock().remove(&7);
    assert_reads(&source, &server, 0, 1 << 20);
    // A truncated block counts as missing.
    wait_until_cached(&source);
    cache.blocks.lock().get_mut(&9).unwrap().truncate(5);
    assert_reads(&source, &server, 0, 1 << 20);
    assert_eq!(server.max_requests_per_block(), 2);
}

/// A cache whose inserts wait until it is opened.
#[derive(Default)]
struct SlowCache {
    cache: MemoryCache,
    open: Mutex<bool>,
    opened: Condvar,
}

impl FetchCache for SlowCache {
    fn read(&self, first: u64, buf: &mut [u8]) -> usize {
        self.cache.read(first, buf)
    }

    fn contains(&self, block: u64) -> bool {
        self.cache.contains(block)
    }

    fn insert(&self, first: u64, data: &[u8]) {
        let mut open = self.open.lock();
        while !*open {
            self.opened.wait(&mut open);
        }
        self.cache.insert(first, data);
    }
}

#[test]
fn a_prefetch_does_not_wait_for_the_cache_disk() {
    let server = Server::new(1 << 20, 1 << 16);
    let cache = Arc::new(SlowCache::default());
    let source = lazy(&server, cache.clone());
    source.prefetch(&[(0, 1 << 20)], Purpose::Prefetch).unwrap().wait();
    // The blocks have come. A player of a trace would count them as lost if it still had to wait, and give up.
    assert!(source.prefetch(&[(0, 1 << 20)], Purpose::Prefetch).is_none());
    *cache.open.lock() = true;
    cache.opened.notify_all();
    wait_until_cached(&source);
    assert_eq!(server.max_requests_per_block(), 1);
}

#[test]
fn a_prefetch_has_no_completion_when_all_blocks_are_present() {
    let server = Server::new((1 << 20) + 5, 1 << 16);
    let source = lazy(&server, Arc::new(MemoryCache::default()));
    while let Some(completion) = source.prefetch(&[(0, u64::MAX)], Purpose::Hydrate) {
        completion.wait();
    }
    wait_until_cached(&source);
    let before = server.requests().len();
    assert_reads(&source, &server, 0, (1 << 20) + 5);
    assert_eq!((server.requests().len(), server.max_requests_per_block()), (before, 1));
    assert!(read(&source, (1 << 20) + 5, 10).unwrap().is_empty());
}
