//! An image whose server sends it only as a whole. One job fetches all of it, once, into the cache of fetched blocks; all
//! reads are from there.
//!
//! What must hold:
//! - A read starts no request: a request for a part would transfer everything before that part. The read waits until the
//!   job has brought its bytes, or until its deadline.
//! - The job takes bytes from the network as fast as the cache takes them, and holds [`BACKLOG`] between both at most.
//! - Blocks come in order from the first one that is missing, so a job that was interrupted skips what is here.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::fetch::kept::{CACHE_BLOCK, Contents, Reach, SourceKey};
use crate::source::http::{Backlog, WholeSource};
use crate::source::{
    Deliver, Fetch, Purpose, RemoteSource, SourceError, SourceErrorKind, Spawn, Stall, StallKind, UrlState,
};

/// Most bytes between the network and the cache.
const BACKLOG: u64 = 16 << 20;
/// Bytes that a read takes from the cache at once.
const PIECE: u64 = 1 << 20;
/// How often a waiting read looks at the cache although it was told of nothing: another base may have brought its bytes.
const LOOK: Duration = Duration::from_secs(5);

/// See the module.
pub struct WholeImage {
    source: Arc<dyn WholeSource>,
    contents: Arc<Contents>,
    spawn: Arc<dyn Spawn>,
    deadline: Option<Duration>,
    changes: watch::Sender<State>,
    waiting: Arc<Mutex<Waiting>>,
}

#[derive(Clone, Default)]
struct State {
    given_up: bool,
    /// Why no bytes come now.
    trouble: Option<String>,
}

/// The reads that wait, by number.
#[derive(Default)]
struct Waiting {
    next: u64,
    since: BTreeMap<u64, SystemTime>,
}

/// One read that waits.
struct Waiter {
    number: u64,
    waiting: Arc<Mutex<Waiting>>,
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.waiting.lock().since.remove(&self.number);
    }
}

/// The transfer of a job.
pub struct Transfer {
    /// The bytes, in order.
    pub bytes: std::sync::mpsc::Receiver<Result<Vec<u8>, SourceError>>,
    backlog: Arc<Backlog>,
    task: tokio::task::JoinHandle<()>,
}

impl Transfer {
    /// Says that bytes were taken out of the channel.
    pub fn taken(&self, bytes: usize) {
        self.backlog.taken(bytes as u64);
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.task.abort();
        // The source keeps it until the next transfer.
        self.backlog.leave();
    }
}

impl WholeImage {
    /// Of a source whose data comes as a whole. `spawn` runs work that waits for the cache's disk.
    pub fn new(
        source: Arc<dyn WholeSource>,
        contents: Arc<Contents>,
        spawn: Arc<dyn Spawn>,
        deadline: Option<Duration>,
    ) -> Self {
        let changes = watch::Sender::new(State::default());
        Self { source, contents, spawn, deadline, changes, waiting: Arc::default() }
    }

    /// Transfers all bytes from `from` on.
    pub fn transfer(&self, runtime: &tokio::runtime::Handle, from: u64) -> Transfer {
        let (send, bytes) = std::sync::mpsc::channel();
        let backlog = Arc::new(Backlog::new(BACKLOG));
        self.source.set_backlog(&backlog);
        let (source, pieces, counts) = (self.source.clone(), send.clone(), backlog.clone());
        let deliver = move |piece: &[u8]| {
            counts.came(piece.len() as u64);
            // It fails when the job has ended, which also ends this transfer.
            let _ = pieces.send(Ok(piece.to_vec()));
        };
        let size = source.size();
        let fetch = source.fetch(from..size, Purpose::Hydrate, Instant::now(), Box::new(deliver));
        let task = runtime.spawn(async move {
            if let Err(error) = fetch.await {
                let _ = send.send(Err(error));
            }
        });
        Transfer { bytes, backlog, task }
    }

    /// Tells waiting reads that bytes have come.
    pub fn progressed(&self) {
        self.changes.send_modify(|state| state.trouble = None);
    }

    /// Says why no bytes come.
    pub fn troubled(&self, why: &str) {
        self.changes.send_modify(|state| state.trouble = Some(why.to_owned()));
    }

    fn failed(&self, kind: SourceErrorKind, why: &str, advice: &str) -> SourceError {
        SourceError::remote(kind, "read", self.source.shown(), why, advice)
    }

    /// What reads wait for.
    fn why(&self) -> String {
        let trouble = self.changes.borrow().trouble.clone();
        let (here, all) = (self.contents.cached_bytes(Reach::Any), self.contents.size());
        let why = format!("its image is fetched as a whole, {here} of {all} bytes are here");
        trouble.map_or(why.clone(), |trouble| format!("{why}: {trouble}"))
    }

    /// Delivers what the cache has of a range, from its start on. Returns where that ends.
    async fn take(&self, range: Range<u64>, deliver: &mut Deliver) -> u64 {
        let (contents, (send, taken)) = (self.contents.clone(), tokio::sync::oneshot::channel());
        let wanted = range.clone();
        self.spawn.spawn_blocking(Box::new(move || {
            let _ = send.send(read(&contents, wanted));
        }));
        let bytes = taken.await.unwrap_or_default();
        deliver(&bytes);
        range.start + bytes.len() as u64
    }

    async fn run(
        &self,
        range: Range<u64>,
        purpose: Purpose,
        deliver: &mut Deliver,
    ) -> Result<(), SourceError> {
        let mut changes = self.changes.subscribe();
        let (mut at, mut waiter) = (range.start, None);
        loop {
            // Before the look at the cache: a change after it is seen below.
            let given_up = changes.borrow_and_update().given_up;
            at = self.take(at..range.end, deliver).await;
            if at >= range.end {
                return Ok(());
            }
            if given_up {
                let advice =
                    "undo it with: plyfs base fail NAME --undo, or: plyfs base set NAME --source URL";
                return Err(self.failed(SourceErrorKind::GivenUp, "its operator gave it up", advice));
            }
            if purpose == Purpose::Demand && waiter.is_none() {
                waiter = Some(self.wait());
            }
            let _ = tokio::time::timeout(LOOK, changes.changed()).await;
        }
    }

    fn wait(&self) -> Waiter {
        let mut waiting = self.waiting.lock();
        waiting.next += 1;
        let number = waiting.next;
        waiting.since.insert(number, SystemTime::now());
        Waiter { number, waiting: self.waiting.clone() }
    }
}

/// The images of this kind that are in use, by base and contents. All readers of one, and its job, share it.
#[derive(Default)]
pub struct WholeImages(Mutex<HashMap<(u64, SourceKey), Weak<WholeImage>>>);

impl WholeImages {
    /// The image of these contents of a base; `make` makes it.
    pub fn get(&self, base: u64, key: SourceKey, make: impl FnOnce() -> WholeImage) -> Arc<WholeImage> {
        let mut all = self.0.lock();
        if let Some(image) = all.get(&(base, key)).and_then(Weak::upgrade) {
            return image;
        }
        all.retain(|_, image| image.strong_count() > 0);
        let image = Arc::new(make());
        all.insert((base, key), Arc::downgrade(&image));
        image
    }
}

/// The blocks that the cache has from the start of `range` on, cut to the range.
fn read(contents: &Contents, range: Range<u64>) -> Vec<u8> {
    let first = range.start / CACHE_BLOCK;
    let end = range.end.min(range.start + PIECE).min(contents.size());
    let stop = (end.div_ceil(CACHE_BLOCK) * CACHE_BLOCK).min(contents.size());
    let start = first * CACHE_BLOCK;
    let mut bytes = vec![0; (stop - start) as usize];
    let blocks = contents.read(first, &mut bytes, Reach::Proven) as u64;
    let here = (start + blocks * CACHE_BLOCK).min(end);
    if here <= range.start {
        return Vec::new();
    }
    bytes.truncate((here - start) as usize);
    bytes.drain(..(range.start - start) as usize);
    bytes
}

impl RemoteSource for WholeImage {
    fn size(&self) -> u64 {
        self.source.size()
    }

    fn shown(&self) -> String {
        self.source.shown()
    }

    fn fetch(
        self: Arc<Self>,
        range: Range<u64>,
        purpose: Purpose,
        since: Instant,
        mut deliver: Deliver,
    ) -> Fetch {
        Box::pin(async move {
            let run = self.run(range, purpose, &mut deliver);
            let Some(deadline) = self.deadline.filter(|_| purpose == Purpose::Demand) else {
                return run.await;
            };
            let Some(end) = since.checked_add(deadline) else { return run.await };
            match tokio::time::timeout_at(end.into(), run).await {
                Ok(done) => done,
                Err(_) => {
                    let why = format!("it has not come for {deadline:?} ({})", self.why());
                    let advice = "see plyfs job ls; start it with: plyfs base hydrate NAME";
                    Err(self.failed(SourceErrorKind::Unreachable, &why, advice))
                }
            }
        })
    }

    fn stall(&self) -> Option<Stall> {
        let since = *self.waiting.lock().since.values().min()?;
        Some(Stall { since, why: self.why(), kind: StallKind::Waiting })
    }

    fn set_urls(&self, urls: &[String]) -> Result<(), SourceError> {
        self.source.set_urls(urls)
    }

    fn give_up(&self, given_up: bool) {
        self.source.give_up(given_up);
        self.changes.send_modify(|state| state.given_up = given_up);
    }

    fn urls(&self) -> Vec<UrlState> {
        self.source.urls()
    }
}
