//! Many reads that wait for servers that do not answer: bounds, and room for others.

use super::*;

/// A server that answers when the test tells it to, and keeps no thread until then.
pub(super) struct Silent {
    size: u64,
    state: Mutex<SilentState>,
}

#[derive(Default)]
struct SilentState {
    answers: bool,
    /// The start of each request in the order in which they came; bytes of requests under way, and their maximum.
    requests: Vec<u64>,
    bytes: u64,
    most: u64,
    wakers: Vec<Waker>,
}

impl Silent {
    pub(super) fn new(size: u64) -> Arc<Self> {
        Arc::new(Self { size, state: Mutex::default() })
    }

    fn answer(&self) {
        let wakers = {
            let mut state = self.state.lock();
            state.answers = true;
            std::mem::take(&mut state.wakers)
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    pub(super) fn under_way(&self) -> u64 {
        self.state.lock().bytes
    }
}

/// A request to it; counts as under way until it is dropped.
struct SilentFetch {
    server: Arc<Silent>,
    bytes: u64,
    deliver: Deliver,
}

impl Future for SilentFetch {
    type Output = Result<(), SourceError>;
    fn poll(mut self: std::pin::Pin<&mut Self>, context: &mut Context<'_>) -> std::task::Poll<Self::Output> {
        {
            let mut state = self.server.state.lock();
            if !state.answers {
                state.wakers.push(context.waker().clone());
                return std::task::Poll::Pending;
            }
        }
        let block = vec![7; CACHE_BLOCK as usize];
        for _ in 0..self.bytes / CACHE_BLOCK {
            (self.deliver)(&block);
        }
        std::task::Poll::Ready(Ok(()))
    }
}

impl Drop for SilentFetch {
    fn drop(&mut self) {
        self.server.state.lock().bytes -= self.bytes;
    }
}

impl RemoteSource for Silent {
    fn size(&self) -> u64 {
        self.size
    }

    fn shown(&self) -> String {
        "http://silent/image".into()
    }

    fn fetch(self: Arc<Self>, range: Range<u64>, _: Purpose, _since: Instant, deliver: Deliver) -> Fetch {
        let bytes = range.end - range.start;
        {
            let mut state = self.state.lock();
            state.requests.push(range.start);
            state.bytes += bytes;
            state.most = state.most.max(state.bytes);
        }
        Box::pin(SilentFetch { server: self, bytes, deliver })
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

/// Runs futures on two threads, as the daemon does.
pub(super) struct Pool(tokio::runtime::Runtime);

impl Pool {
    pub(super) fn new() -> Arc<Self> {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        Arc::new(Self(builder.worker_threads(2).max_blocking_threads(2).build().unwrap()))
    }
}

impl Spawn for Pool {
    fn spawn(&self, future: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>) {
        drop(self.0.spawn(future));
    }

    fn spawn_blocking(&self, job: Box<dyn FnOnce() + Send>) {
        drop(self.0.spawn_blocking(job));
    }
}

fn silent(server: &Arc<Silent>, pool: &Arc<Pool>, number: u64, budget: &Arc<DemandBudget>) -> LazySource {
    let identity = Identity::Contents { size: server.size(), key: [number as u8; 32] };
    let traffic = Events::new().base(number, "debian");
    let timed_reads = TimedReads::new(Arc::new(Threads));
    let cache = Arc::new(NoCache);
    LazySource::new(server.clone(), cache, pool.clone(), identity, traffic, budget.clone(), timed_reads)
}

/// Starts reads that wait: 1 MiB each at every fourth MiB, so that no two become one request.
fn park(source: &LazySource, reads: Range<u64>) -> Vec<Completion> {
    reads
        .map(|number| {
            let error = source.read_at(&mut vec![0; 1 << 20], number << 22).unwrap_err();
            error.completion().cloned().expect("it waits")
        })
        .collect()
}

/// Regression: the second boot of a base fetched blocks that the first had not read.
#[test]
fn reads_that_miss_nothing_start_no_readahead() {
    let server = Server::new(9 << 20, 1 << 20);
    let cache = Arc::new(MemoryCache::default());
    let runs = (0..16u64).map(|run| (run * 4, 4));
    for (first, count) in runs.clone() {
        let range = (first * CACHE_BLOCK) as usize..((first + count) * CACHE_BLOCK) as usize;
        cache.insert(first, &server.bytes[range]);
    }
    let source = lazy(&server, cache);
    for (first, count) in runs {
        let mut buf = vec![0; (count * CACHE_BLOCK) as usize];
        assert_eq!(source.read_at(&mut buf, first * CACHE_BLOCK).unwrap(), buf.len());
    }
    assert_eq!(server.requests(), []);
    // From the first miss on, readahead works.
    let error = source.read_at(&mut [0; 4096], 500 * CACHE_BLOCK).unwrap_err();
    error.completion().expect("it waits").wait();
    assert!(!server.requests().is_empty());
}

/// Without the bound, 10,000 waiting reads of 1 MiB requested 10 GB at once.
/// Guards D44.
#[test]
fn ten_thousand_waiting_reads_have_a_bounded_number_of_bytes_under_way() {
    let (server, pool) = (Silent::new(10_000 << 22), Pool::new());
    let source = silent(&server, &pool, 1, &Arc::default());
    let reads = park(&source, 0..10_000);
    assert!(server.under_way() <= 64 << 20, "{}", server.under_way());
    assert!(server.under_way() >= 60 << 20, "{}", server.under_way());
    server.answer();
    // Each read completes, in the order of the reads.
    for (number, completion) in reads.into_iter().enumerate() {
        completion.wait();
        let mut buf = vec![0; 1 << 20];
        assert_eq!(source.read_at(&mut buf, (number as u64) << 22).unwrap(), 1 << 20);
        assert!(buf.iter().all(|byte| *byte == 7));
    }
    let state = server.state.lock();
    assert!(state.most <= 100 << 20, "{}", state.most);
    // Requests start in the order of the reads. Threads that start one each at the same time may swap, so a request may
    // move by as many places as requests are under way.
    for (place, start) in state.requests.iter().enumerate() {
        let number = start >> 22;
        assert!(number.abs_diff(place as u64) <= 64, "request {number} began at place {place}");
    }
}

/// Sources with endless readers whose servers hang leave room for the next request of each other source.
#[test]
fn hanging_sources_leave_room_for_other_sources() {
    let (pool, budget) = (Pool::new(), Arc::default());
    let servers: Vec<_> = (0..8).map(|_| Silent::new(1000 << 22)).collect();
    let sources: Vec<_> =
        servers.iter().zip(0..).map(|(server, number)| silent(server, &pool, number, &budget)).collect();
    let reads: Vec<_> = sources.iter().map(|source| park(source, 0..1000)).collect();
    let all: u64 = servers.iter().map(|server| server.under_way()).sum();
    assert!(all <= (256 << 20) + 8 * (4 << 20), "{all}");
    assert!(servers.iter().all(|server| server.under_way() > 0), "each has something under way");
    let (server, number) = (Silent::new(1000 << 22), 100);
    let other = silent(&server, &pool, number, &budget);
    server.answer();
    for number in 0..50 {
        park(&other, number..number + 1).into_iter().for_each(|completion| completion.wait());
    }
    // The bytes that they held go to the sources that wait for room.
    servers[0].answer();
    reads[0].iter().for_each(Completion::wait);
    servers.iter().for_each(|server| server.answer());
    reads.iter().flatten().for_each(Completion::wait);
}

/// A killed reader frees its place, even when its request hangs.
/// Guards D44.
#[test]
fn readers_that_went_away_free_their_places() {
    let (server, pool) = (Silent::new(10_000 << 22), Pool::new());
    let source = silent(&server, &pool, 1, &Arc::default());
    let mut reads = park(&source, 0..500);
    let asked = || server.state.lock().requests.len();
    let began = asked();
    // Drops the readers that had a place, and most of those that waited for one.
    let last = reads.split_off(495);
    while reads.pop().is_some() {}
    eventually("the last readers' requests start", || {
        let state = server.state.lock();
        state.requests.iter().filter(|start| **start >= 495 << 22).count() == 5
    });
    assert!(asked() <= began + 5 + 64, "{} requests for readers that are gone", asked() - began);
    server.answer();
    last.iter().for_each(Completion::wait);
}
