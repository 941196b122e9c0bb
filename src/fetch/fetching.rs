//! Requests: blocks that follow each other become one, and what comes is given to readers, then to the cache.
//!
//! What readers ask for begins when there is room for it (`budget`), in its order. What no reader waits for any more
//! before it came is given up.

use std::collections::VecDeque;
use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use parking_lot::Mutex;

use super::budget::Begin;
use super::transit::{Found, Transit, Unit};
use super::{CACHE_BLOCK, MAX_REQUEST, MAX_UNKEPT, Shared, gave_up, reason, short};
use crate::source::{Fetch, Purpose, SourceError};

/// Blocks that are given to the cache at once, bytes.
const WRITE: u64 = 1 << 20;

/// Requests that are being put together. What was added and does not [`go`](Self::go) would never come.
pub(super) struct Fetching {
    shared: Arc<Shared>,
    purpose: Purpose,
    runs: Vec<Run>,
}

/// Blocks that follow each other, the first of them wanted for the purpose, the rest expected to be.
struct Run {
    first: u64,
    units: Vec<Arc<Unit>>,
    /// How many from the first on are wanted.
    wanted: usize,
    /// When the first of those that want it began to wait.
    since: Instant,
}

impl Run {
    fn end(&self) -> u64 {
        self.first + self.units.len() as u64
    }

    /// Whether a reader, or another holder of an arrival, still waits for what it is wanted for.
    fn is_awaited(&self) -> bool {
        self.units[..self.wanted].iter().any(|unit| Arc::strong_count(unit) > 1)
    }

    fn has_room(&self) -> bool {
        (self.units.len() as u64) < MAX_REQUEST / CACHE_BLOCK
    }
}

impl Fetching {
    pub fn new(shared: &Arc<Shared>, purpose: Purpose) -> Self {
        Self { shared: shared.clone(), purpose, runs: Vec::new() }
    }

    /// Adds a block that is not in transit. Returns it.
    pub fn add(&mut self, transit: &mut Transit, block: u64) -> Arc<Unit> {
        let unit = transit.insert(block);
        match self.runs.last_mut() {
            // Behind blocks that are only expected, a wanted one would wait for them.
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

    /// Whether a block that is expected to be wanted could go behind the last request.
    pub fn ends_at(&self, block: u64) -> bool {
        self.runs.last().is_some_and(|run| run.end() == block && run.has_room())
    }

    /// Adds a block of which [`ends_at`](Self::ends_at) is true.
    pub fn add_ahead(&mut self, transit: &mut Transit, block: u64) {
        let unit = transit.insert(block);
        if let Some(run) = self.runs.last_mut() {
            run.units.push(unit);
        }
    }

    /// Sends the requests.
    pub fn go(self) {
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

/// What the readers of one source asked for.
#[derive(Default)]
pub(super) struct Demand {
    state: Mutex<Asked>,
    /// Whether it will be looked for what no reader waits for any more.
    looking: AtomicBool,
}

#[derive(Default)]
struct Asked {
    /// Bytes under way.
    bytes: u64,
    /// When a block came last.
    last: Option<Instant>,
    /// What has not begun.
    waiting: VecDeque<Run>,
    /// Whether it is told when others give bytes back.
    registered: bool,
    under_way: Vec<Weak<Active>>,
}

/// A reader's request under way.
struct Active {
    receiver: Arc<Mutex<Receiver>>,
    cancel: Cancel,
}

/// Bytes of the budget that a request has while they are under way (D44).
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

impl Begin for Shared {
    fn begin(self: Arc<Self>) {
        self.asked.state.lock().registered = false;
        self.begin_demand();
    }
}

impl Shared {
    /// Begins what there is room for.
    fn begin_demand(self: &Arc<Self>) {
        loop {
            let (mut run, bytes) = {
                let mut asked = self.asked.state.lock();
                let Asked { bytes: own, waiting, registered, .. } = &mut *asked;
                let Some(run) = waiting.front() else { return };
                let mut bytes = 0;
                if run.is_awaited() {
                    bytes = bytes_of(self, run.first..run.end());
                    let source = || {
                        let this: Arc<dyn Begin> = self.clone();
                        (!std::mem::replace(registered, true)).then(|| Arc::downgrade(&this))
                    };
                    if !self.budget.take(bytes, *own, source) {
                        drop(asked);
                        // Places that killed readers left are there to be had.
                        self.reader_left();
                        return;
                    }
                    *own += bytes;
                }
                let Some(run) = waiting.pop_front() else { return };
                (run, bytes)
            };
            // That it waited here while bytes came is not the server's delay.
            run.since = self.asked.state.lock().last.map_or(run.since, |last| last.max(run.since));
            let lease = Lease { shared: self.clone(), bytes };
            // Without the lock: this may run readers' next tries.
            if lease.bytes == 0 {
                run.units.iter().for_each(|unit| unit.drop_it());
            } else {
                request(self, Purpose::Demand, run, Some(lease));
            }
        }
    }

    /// Looks for what no reader waits for any more. Not on this thread, which may hold what is looked at.
    pub(super) fn reader_left(self: &Arc<Self>) {
        if self.asked.looking.swap(true, Ordering::AcqRel) {
            return;
        }
        let this = self.clone();
        self.spawn.spawn(Box::pin(async move {
            this.asked.looking.store(false, Ordering::Release);
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
            // While nothing waits for their places, they may end: another reader may come.
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
            unit.drop_it();
        }
    }

    /// Cancels requests of which all that readers want has come from elsewhere.
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

/// Ends a future before its end.
#[derive(Default)]
struct Cancel {
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

/// A fetch that may be cancelled: none when it was.
struct Cancelled {
    fetch: Fetch,
    active: Option<Arc<Active>>,
}

impl Future for Cancelled {
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

/// What comes of one request.
struct Receiver {
    shared: Arc<Shared>,
    /// The next block that is not complete, and what there is of it.
    next: u64,
    /// Where the blocks end that are wanted for the purpose; behind them is what may be wanted next.
    wanted_to: u64,
    purpose: Purpose,
    lease: Option<Lease>,
    part: Vec<u8>,
    units: std::vec::IntoIter<Arc<Unit>>,
    /// Complete ones that the cache does not have yet, and the first one's number.
    complete: Vec<(Arc<Unit>, Arc<[u8]>)>,
    complete_from: u64,
    /// [`Shared::kept_since`] when it was asked for.
    asked_at: u64,
}

impl Receiver {
    /// Whether no reader waits for what is left of what readers wanted. What was only expected goes on.
    fn is_unawaited(&self) -> bool {
        let wanted = self.wanted();
        !wanted.is_empty() && wanted.iter().all(|unit| Arc::strong_count(unit) == 1)
    }

    /// Whether all that is left of what readers wanted is here.
    fn is_needless(&self) -> bool {
        let wanted = self.wanted();
        !wanted.is_empty() && wanted.iter().all(|unit| matches!(unit.find(), Found::Here { .. }))
    }

    /// What is left of what readers wanted.
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
        unit.arrived(block.clone());
        if let Some(lease) = &mut self.lease {
            self.shared.asked.state.lock().last = Some(Instant::now());
            // What is left is only expected: it is no reader's any more.
            lease.give(if self.next < self.wanted_to { block.len() as u64 } else { u64::MAX });
        }
        self.complete.push((unit, block));
        if self.complete.len() as u64 * CACHE_BLOCK >= WRITE {
            self.write();
        }
    }

    /// Gives to the cache what is complete, on a thread that may wait.
    fn write(&mut self) {
        let blocks = std::mem::take(&mut self.complete);
        let first = std::mem::replace(&mut self.complete_from, self.next);
        if blocks.is_empty() {
            return;
        }
        let (shared, asked_at) = (self.shared.clone(), self.asked_at);
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
            let keeping = shared.keeping.read();
            if shared.kept_since.load(Ordering::Acquire) == asked_at {
                shared.keep.insert(first, &data);
            }
            drop(keeping);
            // Only now may they leave the table.
            drop(blocks);
            shared.in_transit.fetch_sub(data.len() as u64, Ordering::Relaxed);
            shared.budget.kept(bytes);
        }));
    }
}

/// Bytes that count as being in transit until they are taken away.
fn bytes_of(shared: &Shared, blocks: Range<u64>) -> u64 {
    (blocks.end * CACHE_BLOCK).min(shared.size) - blocks.start * CACHE_BLOCK
}

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
        asked_at: shared.kept_since.load(Ordering::Acquire),
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
        let done = Cancelled { fetch, active }.await;
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
                    left.iter().for_each(|unit| unit.drop_it());
                }
                Some(done) => {
                    let error = done.err().unwrap_or_else(|| short(&shared.remote.shown()));
                    give_up(&shared, purpose, first, left, error);
                }
            }
        }
        // Now others may begin.
        drop(lease);
    }));
}

/// What did not come. A reader that joined a fetch of another purpose gets one of its own; everybody else is told.
fn give_up(shared: &Arc<Shared>, purpose: Purpose, first: u64, units: Vec<Arc<Unit>>, error: SourceError) {
    let blocks = first..first + units.len() as u64;
    shared.in_transit.fetch_sub(bytes_of(shared, blocks), Ordering::Relaxed);
    let again = purpose != Purpose::Demand && gave_up(&error);
    if !again {
        shared.health.failed(&error);
    }
    let mut runs: Vec<Run> = Vec::new();
    for (unit, block) in units.into_iter().zip(first..) {
        if !again {
            unit.failed(error.clone());
            continue;
        }
        let Some(since) = unit.abandon() else { continue };
        match runs.last_mut() {
            Some(run) if run.end() == block => {
                run.units.push(unit);
                run.wanted += 1;
                run.since = run.since.min(since);
            }
            _ => runs.push(Run { first: block, units: vec![unit], wanted: 1, since }),
        }
    }
    Fetching { shared: shared.clone(), purpose: Purpose::Demand, runs }.go();
}

/// Counts readers' requests.
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
