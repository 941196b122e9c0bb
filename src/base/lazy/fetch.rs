//! Requests: blocks that follow each other become one, and what comes is given to readers, then to the cache.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::transit::{Transit, Unit};
use super::{CACHE_BLOCK, MAX_REQUEST, MAX_UNKEPT, Shared, gave_up, reason, short};
use crate::source::{Purpose, SourceError};

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
}

impl Run {
    fn end(&self) -> u64 {
        self.first + self.units.len() as u64
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
            _ => self.runs.push(Run { first: block, units: vec![unit.clone()], wanted: 1 }),
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
        for run in self.runs {
            request(&self.shared, self.purpose, run);
        }
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
    part: Vec<u8>,
    units: std::vec::IntoIter<Arc<Unit>>,
    /// Complete ones that the cache does not have yet, and the first one's number.
    complete: Vec<(Arc<Unit>, Arc<[u8]>)>,
    complete_from: u64,
    /// [`Shared::keeping`] when it was asked for.
    asked_at: u64,
}

impl Receiver {
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
        self.next += 1;
        unit.arrived(block.clone());
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
        if shared.in_transit.load(Ordering::Relaxed) > MAX_UNKEPT {
            let bytes: usize = blocks.iter().map(|(_, bytes)| bytes.len()).sum();
            shared.in_transit.fetch_sub(bytes as u64, Ordering::Relaxed);
            return;
        }
        self.shared.spawn.spawn_blocking(Box::new(move || {
            let mut data = Vec::with_capacity(blocks.len() * CACHE_BLOCK as usize);
            for (_, bytes) in &blocks {
                data.extend_from_slice(bytes);
            }
            let keeping = shared.keeping.read();
            if *keeping == asked_at {
                shared.keep.insert(first, &data);
            }
            drop(keeping);
            // Only now may they leave the table.
            drop(blocks);
            shared.in_transit.fetch_sub(data.len() as u64, Ordering::Relaxed);
        }));
    }
}

/// Bytes that count as being in transit until they are taken away.
fn bytes_of(shared: &Shared, blocks: Range<u64>) -> u64 {
    (blocks.end * CACHE_BLOCK).min(shared.size) - blocks.start * CACHE_BLOCK
}

fn request(shared: &Arc<Shared>, purpose: Purpose, run: Run) {
    let blocks = run.first..run.end();
    let bytes = bytes_of(shared, blocks.clone());
    let range = blocks.start * CACHE_BLOCK..blocks.start * CACHE_BLOCK + bytes;
    shared.in_transit.fetch_add(bytes, Ordering::Relaxed);
    let under_way = UnderWay::new(shared, purpose);
    let receiver = Arc::new(parking_lot::Mutex::new(Receiver {
        shared: shared.clone(),
        next: run.first,
        wanted_to: run.first + run.wanted as u64,
        purpose,
        part: Vec::with_capacity(CACHE_BLOCK as usize),
        units: run.units.into_iter(),
        complete: Vec::new(),
        complete_from: run.first,
        asked_at: *shared.keeping.read(),
    }));
    let deliver = {
        let receiver = receiver.clone();
        Box::new(move |bytes: &[u8]| receiver.lock().receive(bytes))
    };
    let fetch = shared.remote.clone().fetch(range, purpose, deliver);
    let shared = shared.clone();
    let spawn = shared.spawn.clone();
    spawn.spawn(Box::pin(async move {
        let done = fetch.await;
        drop(under_way);
        let mut receiver = receiver.lock();
        receiver.write();
        let left: Vec<Arc<Unit>> = receiver.units.by_ref().collect();
        let first = receiver.next;
        drop(receiver);
        if !left.is_empty() {
            let error = done.err().unwrap_or_else(|| short(&shared.remote.shown()));
            give_up(&shared, purpose, first, left, error);
        }
    }));
}

/// What did not come. A reader that joined a fetch of another purpose gets one of its own; everybody else is told.
fn give_up(shared: &Arc<Shared>, purpose: Purpose, first: u64, units: Vec<Arc<Unit>>, error: SourceError) {
    let blocks = first..first + units.len() as u64;
    shared.in_transit.fetch_sub(bytes_of(shared, blocks), Ordering::Relaxed);
    let again = purpose != Purpose::Demand && gave_up(&error);
    if !again {
        *shared.failure.lock() = Some(error.clone());
    }
    let mut runs: Vec<Run> = Vec::new();
    for (unit, block) in units.into_iter().zip(first..) {
        if !again {
            unit.failed(error.clone());
            continue;
        }
        if !unit.abandon() {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end() == block => {
                run.units.push(unit);
                run.wanted += 1;
            }
            _ => runs.push(Run { first: block, units: vec![unit], wanted: 1 }),
        }
    }
    for run in runs {
        request(shared, Purpose::Demand, run);
    }
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
