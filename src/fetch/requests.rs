//! Requests to a remote source. Adjacent blocks become one request; its bytes go to the readers, then to the cache.
//!
//! Readers' requests start in order, as soon as the budget has room (`budget`). A request that no reader waits for any
//! more is cancelled when others wait for its place.

use std::collections::VecDeque;
use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use parking_lot::Mutex;

use super::budget::BudgetWaiter;
use super::transit::{Found, Transit, Unit};
use super::{CACHE_BLOCK, MAX_REQUEST, MAX_UNKEPT, Shared, reader_may_retry, reason, short};
use crate::source::{Fetch, Purpose, SourceError};

/// Bytes that go to the cache in one insert.
const WRITE: u64 = 1 << 20;

/// Puts requests together. The caller must [`send`](Self::send) them: blocks that were added would never come otherwise.
pub(super) struct RequestBuilder {
    shared: Arc<Shared>,
    purpose: Purpose,
    runs: Vec<Run>,
}

/// Adjacent blocks. The first of them are wanted for the purpose; the rest is readahead.
struct Run {
    first: u64,
    units: Vec<Arc<Unit>>,
    /// How many blocks, from the first on, are wanted.
    wanted: usize,
    /// When the first of its waiters began to wait.
    since: Instant,
}

impl Run {
    fn end(&self) -> u64 {
        self.first + self.units.len() as u64
    }

    /// Whether a reader, or another holder of a completion, still waits for a wanted block.
    fn is_awaited(&self) -> bool {
        self.units[..self.wanted].iter().any(|unit| Arc::strong_count(unit) > 1)
    }

    fn has_room(&self) -> bool {
        (self.units.len() as u64) < MAX_REQUEST / CACHE_BLOCK
    }
}

impl RequestBuilder {
    pub fn new(shared: &Arc<Shared>, purpose: Purpose) -> Self {
        Self { shared: shared.clone(), purpose, runs: Vec::new() }
    }

    /// Adds a block that is not in transit. Returns its unit.
    pub fn add(&mut self, transit: &mut Transit, block: u64) -> Arc<Unit> {
        let unit = transit.insert(block);
        match self.runs.last_mut() {
            // Not behind readahead: the wanted block would wait for it.
            Some(run) if run.end() == block && run.has_room() && run.wanted == run.units.len() => {
                run.units.push(unit.clone());
                run.wanted += 1;
            }
            _ => {
                let since = Instant::now();
                self.runs.push(Run { first: block, units: vec![unit.clone()], wanted: 1, since });
            }
        }
        unit
    }

    /// Whether a readahead block can be appended to the last request.
    pub fn ends_at(&self, block: u64) -> bool {
        self.runs.last().is_some_and(|run| run.end() == block && run.has_room())
    }

    /// Appends a readahead block for which [`ends_at`](Self::ends_at) is true.
    pub fn add_ahead(&mut self, transit: &mut Transit, block: u64) {
        let unit = transit.insert(block);
        if let Some(run) = self.runs.last_mut() {
            run.units.push(unit);
        }
    }

    /// Sends the requests.
    pub fn send(self) {
        if self.purpose == Purpose::Demand {
            if !self.runs.is_empty() {
                self.shared.asked.state.lock().waiting.extend(self.runs);
                self.shared.begin_demand();
            }
            return;
        }
        for run in self.runs {
            request(&self.shared, self.purpose, run, None);
        }
    }
}

/// The readers' requests of one source.
#[derive(Default)]
pub(super) struct Demand {
    state: Mutex<DemandState>,
    /// Whether a search for requests without a waiting reader is scheduled.
    cleanup_scheduled: AtomicBool,
}

#[derive(Default)]
struct DemandState {
    /// Bytes under way.
    bytes: u64,
    /// When the last block came.
    last: Option<Instant>,
    /// Requests that have not started.
    waiting: VecDeque<Run>,
    /// Whether the source waits for room in the budget.
    registered: bool,
    under_way: Vec<Weak<Active>>,
}

/// A reader's request under way.
struct Active {
    receiver: Arc<Mutex<Receiver>>,
    cancel: Cancel,
}

/// The bytes of the budget that a request holds while they are under way (D44).
struct Lease {
    shared: Arc<Shared>,
    bytes: u64,
}

impl Lease {
    fn give(&mut self, bytes: u64) {
        let bytes = bytes.min(self.bytes);
        if bytes == 0 {
            return;
        }
        self.bytes -= bytes;
        self.shared.asked.state.lock().bytes -= bytes;
        self.shared.budget.give(bytes);
        self.shared.begin_demand();
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.give(self.bytes);
    }
}

impl BudgetWaiter for Shared {
    fn room(self: Arc<Self>) {
        self.asked.state.lock().registered = false;
        self.begin_demand();
    }
}

impl Shared {
    /// Starts the waiting requests for which the budget has room.
    fn begin_demand(self: &Arc<Self>) {
        loop {
            let (mut run, bytes) = {
                let mut asked = self.asked.state.lock();
                let DemandState { bytes: own, waiting, registered, .. } = &mut *asked;
                let Some(run) = waiting.front() else { return };
                let mut bytes = 0;
                if run.is_awaited() {
                    bytes = bytes_of(self, run.first..run.end());
                    let source = || {
                        let this: Arc<dyn BudgetWaiter> = self.clone();
                        (!std::mem::replace(registered, true)).then(|| Arc::downgrade(&this))
                    };
                    if !self.budget.take(bytes, *own, source) {
                        drop(asked);
                        // Requests of killed readers may hold bytes: cancel them.
                        self.reader_left();
                        return;
                    }
                    *own += bytes;
                }
                let Some(run) = waiting.pop_front() else { return };
                (run, bytes)
            };
            // The time that the request waited here while bytes came is not the server's delay.
            run.since = self.asked.state.lock().last.map_or(run.since, |last| last.max(run.since));
            let lease = Lease { shared: self.clone(), bytes };
            // Without the lock: this may run the readers' next attempt.
            if lease.bytes == 0 {
                run.units.iter().for_each(|unit| unit.cancel());
            } else {
                request(self, Purpose::Demand, run, Some(lease));
            }
        }
    }

    /// Schedules the cleanup of requests that no reader waits for any more. It runs on another thread, because this one
    /// may hold units of such a request.
    pub(super) fn reader_left(self: &Arc<Self>) {
        if self.asked.cleanup_scheduled.swap(true, Ordering::AcqRel) {
            return;
        }
        let this = self.clone();
        self.spawn.spawn(Box::pin(async move {
            this.asked.cleanup_scheduled.store(false, Ordering::Release);
            this.drop_unawaited();
        }));
    }

    fn drop_unawaited(self: &Arc<Self>) {
        let (gone, under_way) = {
            let mut asked = self.asked.state.lock();
            let (waiting, gone) = std::mem::take(&mut asked.waiting).into_iter().partition(Run::is_awaited);
            asked.waiting = waiting;
            asked.under_way.retain(|active| active.strong_count() > 0);
            let gone: VecDeque<Run> = gone;
            // While no request waits for their places, they go on: another reader may come.
            let under_way: Vec<_> = match asked.waiting.is_empty() {
                true => Vec::new(),
                false => asked.under_way.iter().filter_map(Weak::upgrade).collect(),
            };
            (gone, under_way)
        };
        for active in under_way {
            let unawaited = active.receiver.lock().is_unawaited();
            if unawaited {
                active.cancel.cancel();
            }
        }
        for unit in gone.iter().flat_map(|run| &run.units) {
            unit.cancel();
        }
    }

    /// Cancels requests whose wanted blocks have all come from elsewhere.
    pub(super) fn cancel_needless(&self) {
        let under_way: Vec<_> = self.asked.state.lock().under_way.iter().filter_map(Weak::upgrade).collect();
        for active in under_way {
            let needless = active.receiver.lock().is_needless();
            if needless {
                active.cancel.cancel();
            }
        }
    }
}

/// Cancels a future.
#[derive(Default)]
struct Cancel {
    /// Whether it is cancelled, and the waker of the future.
    state: Mutex<(bool, Option<Waker>)>,
}

impl Cancel {
    fn cancel(&self) {
        let waker = {
            let mut state = self.state.lock();
            state.0 = true;
            state.1.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

/// A fetch that can be cancelled; its output is `None` then.
struct Cancellable {
    fetch: Fetch,
    active: Option<Arc<Active>>,
}

impl Future for Cancellable {
    type Output = Option<Result<(), SourceError>>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Some(active) = &self.active {
            let mut state = active.cancel.state.lock();
            if state.0 {
                return Poll::Ready(None);
            }
            state.1 = Some(context.waker().clone());
        }
        self.fetch.as_mut().poll(context).map(Some)
    }
}

/// Receives the bytes of one request.
struct Receiver {
    shared: Arc<Shared>,
    /// The block that is being received; `part` has its bytes so far.
    next: u64,
    /// Where the wanted blocks end; readahead follows.
    wanted_to: u64,
    purpose: Purpose,
    lease: Option<Lease>,
    part: Vec<u8>,
    units: std::vec::IntoIter<Arc<Unit>>,
    /// Complete blocks that the cache does not have yet, and the number of the first.
    complete: Vec<(Arc<Unit>, Arc<[u8]>)>,
    complete_from: u64,
    /// [`Shared::forget_epoch`] when the request was made.
    epoch: u64,
}

impl Receiver {
    /// Whether wanted blocks are left, and no reader waits for any of them. Readahead alone goes on.
    fn is_unawaited(&self) -> bool {
        let wanted = self.wanted();
        !wanted.is_empty() && wanted.iter().all(|unit| Arc::strong_count(unit) == 1)
    }

    /// Whether wanted blocks are left, and all of them have come from elsewhere.
    fn is_needless(&self) -> bool {
        let wanted = self.wanted();
        !wanted.is_empty() && wanted.iter().all(|unit| matches!(unit.find(), Found::Present { .. }))
    }

    /// The wanted blocks that this request has not delivered yet.
    fn wanted(&self) -> &[Arc<Unit>] {
        let left = self.wanted_to.saturating_sub(self.next) as usize;
        let units = self.units.as_slice();
        &units[..left.min(units.len())]
    }

    fn receive(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && self.next * CACHE_BLOCK < self.shared.size {
            let length = self.shared.block_len(self.next);
            let take = bytes.len().min(length - self.part.len());
            self.part.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if self.part.len() == length {
                self.complete_one();
            }
        }
    }

    fn complete_one(&mut self) {
        let Some(unit) = self.units.next() else { return };
        let block: Arc<[u8]> = self.part.as_slice().into();
        self.part.clear();
        let purpose = if self.next < self.wanted_to { self.purpose } else { Purpose::Readahead };
        self.shared.traffic.add(reason(purpose), block.len() as u64);
        self.shared.health.worked();
        self.next += 1;
        unit.complete(block.clone());
        if let Some(lease) = &mut self.lease {
            self.shared.asked.state.lock().last = Some(Instant::now());
            // Only readahead is left, which no reader waits for: the whole lease goes back.
            lease.give(if self.next < self.wanted_to { block.len() as u64 } else { u64::MAX });
        }
        self.complete.push((unit, block));
        if self.complete.len() as u64 * CACHE_BLOCK >= WRITE {
            self.write();
        }
    }

    /// Gives the complete blocks to the cache, on a thread that may wait.
    fn write(&mut self) {
        let blocks = std::mem::take(&mut self.complete);
        let first = std::mem::replace(&mut self.complete_from, self.next);
        if blocks.is_empty() {
            return;
        }
        let (shared, epoch) = (self.shared.clone(), self.epoch);
        let bytes: u64 = blocks.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        if shared.in_transit.load(Ordering::Relaxed) > MAX_UNKEPT || !shared.budget.may_keep(bytes) {
            shared.in_transit.fetch_sub(bytes, Ordering::Relaxed);
            return;
        }
        self.shared.spawn.spawn_blocking(Box::new(move || {
            let mut data = Vec::with_capacity(blocks.len() * CACHE_BLOCK as usize);
            for (_, bytes) in &blocks {
                data.extend_from_slice(bytes);
            }
            let inserting = shared.inserting.read();
            if shared.forget_epoch.load(Ordering::Acquire) == epoch {
                shared.kept.keep.insert(first, &data);
            }
            drop(inserting);
            // The cache has them: now they may leave the table.
            drop(blocks);
            shared.in_transit.fetch_sub(data.len() as u64, Ordering::Relaxed);
            shared.budget.kept(bytes);
        }));
    }
}

/// Bytes of some blocks; the last block of the source may be short.
fn bytes_of(shared: &Shared, blocks: Range<u64>) -> u64 {
    (blocks.end * CACHE_BLOCK).min(shared.size) - blocks.start * CACHE_BLOCK
}

/// Sends one request.
fn request(shared: &Arc<Shared>, purpose: Purpose, run: Run, lease: Option<Lease>) {
    let blocks = run.first..run.end();
    let bytes = bytes_of(shared, blocks.clone());
    let range = blocks.start * CACHE_BLOCK..blocks.start * CACHE_BLOCK + bytes;
    shared.in_transit.fetch_add(bytes, Ordering::Relaxed);
    let under_way = UnderWay::new(shared, purpose);
    let is_demand = lease.is_some();
    let receiver = Arc::new(Mutex::new(Receiver {
        shared: shared.clone(),
        next: run.first,
        wanted_to: run.first + run.wanted as u64,
        purpose,
        lease,
        part: Vec::with_capacity(CACHE_BLOCK as usize),
        units: run.units.into_iter(),
        complete: Vec::new(),
        complete_from: run.first,
        epoch: shared.forget_epoch.load(Ordering::Acquire),
    }));
    let deliver = {
        let receiver = receiver.clone();
        Box::new(move |bytes: &[u8]| receiver.lock().receive(bytes))
    };
    let fetch = shared.remote.clone().fetch(range, purpose, run.since, deliver);
    let active = is_demand.then(|| {
        let active = Arc::new(Active { receiver: receiver.clone(), cancel: Cancel::default() });
        let mut asked = shared.asked.state.lock();
        if asked.under_way.len() == asked.under_way.capacity() {
            asked.under_way.retain(|active| active.strong_count() > 0);
        }
        asked.under_way.push(Arc::downgrade(&active));
        active
    });
    let shared = shared.clone();
    let spawn = shared.spawn.clone();
    spawn.spawn(Box::pin(async move {
        let done = Cancellable { fetch, active }.await;
        drop(under_way);
        let (left, first, lease) = {
            let mut receiver = receiver.lock();
            receiver.write();
            let left: Vec<Arc<Unit>> = receiver.units.by_ref().collect();
            (left, receiver.next, receiver.lease.take())
        };
        if !left.is_empty() {
            match done {
                None => {
                    let blocks = first..first + left.len() as u64;
                    shared.in_transit.fetch_sub(bytes_of(&shared, blocks), Ordering::Relaxed);
                    left.iter().for_each(|unit| unit.cancel());
                }
                Some(done) => {
                    let error = done.err().unwrap_or_else(|| short(&shared.remote.shown()));
                    give_up(&shared, purpose, first, left, error);
                }
            }
        }
        // Now other requests may start.
        drop(lease);
    }));
}

/// Fails the blocks that did not come. For readers that joined a fetch of another purpose, a new request starts; all
/// other waiters get the error.
fn give_up(shared: &Arc<Shared>, purpose: Purpose, first: u64, units: Vec<Arc<Unit>>, error: SourceError) {
    let blocks = first..first + units.len() as u64;
    shared.in_transit.fetch_sub(bytes_of(shared, blocks), Ordering::Relaxed);
    let again = purpose != Purpose::Demand && reader_may_retry(&error);
    if !again {
        shared.health.failed(&error);
    }
    let mut runs: Vec<Run> = Vec::new();
    for (unit, block) in units.into_iter().zip(first..) {
        if !again {
            unit.fail(error.clone());
            continue;
        }
        let Some(since) = unit.abandon_unless_read() else { continue };
        match runs.last_mut() {
            Some(run) if run.end() == block => {
                run.units.push(unit);
                run.wanted += 1;
                run.since = run.since.min(since);
            }
            _ => runs.push(Run { first: block, units: vec![unit], wanted: 1, since }),
        }
    }
    RequestBuilder { shared: shared.clone(), purpose: Purpose::Demand, runs }.send();
}

/// Counts a reader's request as under way until it is dropped.
struct UnderWay(Option<Arc<Shared>>);

impl UnderWay {
    fn new(shared: &Arc<Shared>, purpose: Purpose) -> Self {
        let counted = (purpose == Purpose::Demand).then(|| shared.clone());
        if let Some(shared) = &counted {
            shared.demand.fetch_add(1, Ordering::Relaxed);
        }
        Self(counted)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        if let Some(shared) = &self.0 {
            shared.demand.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
