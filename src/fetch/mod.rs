//! A source behind a network: its bytes come block by block, when they are needed, and are kept.
//!
//! A read takes what is in transit, then what the cache of fetched blocks keeps, and starts fetching the rest; it never
//! waits for the network (see [`Arrival`]). What must hold:
//! - Bytes reach a reader and the cache only from a [`RemoteSource`] that vouches for them, or from the cache after it
//!   compared their sum.
//! - Readers come first: a block goes to those who wait for it before it goes to the cache, and reads of cached
//!   blocks take no lock that anybody holds while waiting (D41).
//! - The result never depends on what the cache keeps.
//! - A cache whose disk hangs costs a reader a moment and then nothing (`patience`). A block that only the cache has
//!   reaches its readers when the disk answers, though their server never does (`late`).
//!
//! Locks: `Shared::keeping` is shared while blocks are given to the cache, whose locks are inside; no reader takes it.
//! `Shared::table` is held for looking up and noting; a unit's own lock is inside it. The cache is asked what it has
//! under it, and its locks are inside as well. `Shared::late` is held for moments, with no other.

mod budget;
mod fetching;
mod health;
pub mod kept;
mod late;
mod patience;
pub mod readahead;
#[cfg(test)]
mod tests;
mod transit;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use crate::events::{Reason, Traffic};
use crate::source::{
    Arrival, Identity, Purpose, RemoteSource, Source, SourceError, SourceErrorKind, Spawn, Stall,
};
pub use budget::DemandBudget;
use fetching::{Demand, Fetching};
pub use health::Failing;
use health::Health;
use kept::{CachedSource, Contents, Reach};
use late::Looking;
use patience::Late;
pub use patience::{PATIENCE, Patience};
use readahead::Readahead;
use transit::{Found, Transit, Unit, Who, arrival_of};

/// Bytes of a cache block: the unit of fetching and keeping.
pub const CACHE_BLOCK: u64 = kept::CACHE_BLOCK;

/// The most that one request asks for, bytes.
const MAX_REQUEST: u64 = 4 << 20;
/// Bytes in transit above which nothing is fetched that no reader waits for.
const MAX_TRANSIT: u64 = 96 << 20;
/// Bytes in transit above which what came for readers is not kept: the cache's disk is slower than the network.
const MAX_UNKEPT: u64 = 128 << 20;

/// Where fetched blocks are kept. Best effort: what was put there may be gone.
pub trait Keep: Send + Sync {
    /// Fills `buf` from the start of block `first` on with whole blocks (the last of the object may be short) as far
    /// as they are there without a gap. Returns how many. May wait for a disk.
    fn read(&self, first: u64, buf: &mut [u8]) -> usize;
    /// As [`read`](Self::read), without waiting, and perhaps fewer of them; 0 when the first is not there. `None`: only
    /// `read` can say.
    fn read_now(&self, _first: u64, _buf: &mut [u8]) -> Option<usize> {
        None
    }
    /// Whether a block is there, as far as is known without reading it. May wait for a disk.
    fn contains(&self, block: u64) -> bool;
    /// As [`contains`](Self::contains), without waiting. `None`: only `contains` can say.
    fn contains_now(&self, _block: u64) -> Option<bool> {
        None
    }
    /// Keeps whole blocks.
    fn insert(&self, first: u64, data: &[u8]);
    /// Is told that the disk has not answered for a while, and that it does again. Must not wait.
    fn answers(&self, _answers: bool) {}
}

/// Keeps nothing.
pub struct KeepNothing;

impl Keep for KeepNothing {
    fn read(&self, _first: u64, _buf: &mut [u8]) -> usize {
        0
    }

    fn read_now(&self, _first: u64, _buf: &mut [u8]) -> Option<usize> {
        Some(0)
    }

    fn contains(&self, _block: u64) -> bool {
        false
    }

    fn contains_now(&self, _block: u64) -> Option<bool> {
        Some(false)
    }

    fn insert(&self, _first: u64, _data: &[u8]) {}
}

impl Keep for CachedSource {
    fn read(&self, first: u64, buf: &mut [u8]) -> usize {
        Self::read(self, first, buf)
    }

    fn contains(&self, block: u64) -> bool {
        Self::contains(self, block)
    }

    fn insert(&self, first: u64, data: &[u8]) {
        Self::insert(self, first, data);
    }
}

impl Keep for Contents {
    fn read(&self, first: u64, buf: &mut [u8]) -> usize {
        Self::read(self, first, buf, Reach::Proven)
    }

    fn read_now(&self, first: u64, buf: &mut [u8]) -> Option<usize> {
        Self::read_now(self, first, buf)
    }

    fn contains(&self, block: u64) -> bool {
        Self::contains(self, block)
    }

    fn contains_now(&self, block: u64) -> Option<bool> {
        Self::contains_now(self, block)
    }

    fn answers(&self, answers: bool) {
        self.disk_answers(answers);
    }

    fn insert(&self, first: u64, data: &[u8]) {
        Self::insert(self, first, data);
    }
}

/// Why bytes were fetched, for the counters.
fn reason(purpose: Purpose) -> Reason {
    match purpose {
        Purpose::Demand => Reason::Demand,
        Purpose::Readahead => Reason::Readahead,
        Purpose::Prefetch => Reason::Prefetch,
        Purpose::Hydrate => Reason::Hydrate,
    }
}

/// See the module.
pub struct LazySource {
    shared: Arc<Shared>,
}

struct Shared {
    remote: Arc<dyn RemoteSource>,
    keep: Arc<dyn Keep>,
    spawn: Arc<dyn Spawn>,
    identity: Identity,
    size: u64,
    table: Mutex<Table>,
    /// Whether a read ever lacked something.
    missed: AtomicBool,
    /// Goes up when what is under way is not to be kept any more.
    kept_since: AtomicU64,
    /// Shared while something is kept.
    keeping: RwLock<()>,
    /// Bytes that are under way or not yet given to the cache.
    in_transit: AtomicU64,
    /// Readers' requests under way.
    demand: AtomicU64,
    /// What readers asked for, and what of it has not begun.
    asked: Demand,
    budget: Arc<DemandBudget>,
    patience: Arc<Patience>,
    /// Blocks that the cache was too slow for.
    late: Mutex<Looking>,
    traffic: Arc<Traffic>,
    health: Health,
}

struct Table {
    transit: Transit,
    readahead: Readahead,
}

/// What of a read is not here, in ascending order.
#[derive(Default)]
struct Lookup {
    missing: Vec<u64>,
    /// Those of them that the cache may have: it was too slow to say.
    late: Vec<u64>,
}

impl LazySource {
    /// `identity` tells this object's blocks in the memory cache from all others'; `traffic` counts; `budget` and
    /// `patience` are one for all.
    pub fn new(
        remote: Arc<dyn RemoteSource>,
        keep: Arc<dyn Keep>,
        spawn: Arc<dyn Spawn>,
        identity: Identity,
        traffic: Arc<Traffic>,
        budget: Arc<DemandBudget>,
        patience: Arc<Patience>,
    ) -> Self {
        let size = remote.size();
        let table =
            Table { transit: Transit::default(), readahead: Readahead::new(size.div_ceil(CACHE_BLOCK)) };
        Self {
            shared: Arc::new(Shared {
                remote,
                keep,
                spawn,
                identity,
                size,
                table: Mutex::new(table),
                missed: AtomicBool::new(false),
                kept_since: AtomicU64::new(0),
                keeping: RwLock::new(()),
                in_transit: AtomicU64::new(0),
                demand: AtomicU64::new(0),
                asked: Demand::default(),
                budget,
                patience,
                late: Mutex::default(),
                traffic,
                health: Health::default(),
            }),
        }
    }

    /// Name of the base that it is read for.
    pub fn base(&self) -> &str {
        self.shared.traffic.base()
    }

    /// Since when reads wait for the server.
    pub fn stall(&self) -> Option<Stall> {
        self.shared.remote.stall()
    }

    /// Since when readers are told errors, unless one has got something since.
    pub fn failing(&self) -> Option<Failing> {
        self.shared.health.failing()
    }

    /// The last failure that readers were told, once.
    pub fn take_failure(&self) -> Option<SourceError> {
        self.shared.health.take_untold()
    }

    /// Fills `buf` from what is kept, asking no server. Whether all of it was there.
    pub fn read_kept(&self, buf: &mut [u8], offset: u64) -> bool {
        let end = offset.saturating_add(buf.len() as u64);
        end <= self.shared.size && self.shared.read(buf, offset).is_ok_and(|found| found.missing.is_empty())
    }

    /// What is under way is given to those who wait for it, and not kept. Nothing of it is kept after this.
    pub fn forget_in_transit(&self) {
        self.shared.kept_since.fetch_add(1, Ordering::AcqRel);
        // What is being kept at this moment is there afterwards, to be dropped.
        drop(self.shared.keeping.write());
        self.shared.table.lock().transit = Transit::default();
    }

    /// Whether nothing is under way, and all that came was given to the cache.
    pub fn is_settled(&self) -> bool {
        self.shared.in_transit.load(Ordering::Relaxed) == 0
    }

    /// Whether a reader's request is under way.
    pub fn is_busy(&self) -> bool {
        self.shared.demand.load(Ordering::Relaxed) > 0
    }
}

impl Shared {
    fn block_len(&self, block: u64) -> usize {
        (self.size - block * CACHE_BLOCK).min(CACHE_BLOCK) as usize
    }

    fn present(&self, transit: &Transit, block: u64) -> bool {
        transit.get(block).is_some() || self.is_kept(block)
    }

    /// Whether the cache has a block. While its disk hangs, yes: nothing is fetched on a guess.
    fn is_kept(&self, block: u64) -> bool {
        let wait = || self.patience.wait_for(&self.keep, move |keep| keep.contains(block)).unwrap_or(true);
        self.keep.contains_now(block).unwrap_or_else(wait)
    }

    /// Fills `buf` with blocks of the cache, as [`Keep::read`] does.
    fn read_keep(&self, first: u64, buf: &mut [u8]) -> Result<usize, Late> {
        if let Some(kept) = self.keep.read_now(first, buf) {
            return Ok(kept);
        }
        let len = buf.len();
        let (kept, bytes) = self.patience.wait_for(&self.keep, move |keep| {
            let mut bytes = vec![0; len];
            (keep.read(first, &mut bytes), bytes)
        })?;
        buf.copy_from_slice(&bytes);
        Ok(kept)
    }

    /// Copies the part of a block that `buf` (bytes of the object from `offset` on) covers. Returns bytes.
    fn copy_block(block: u64, bytes: &[u8], buf: &mut [u8], offset: u64) -> u64 {
        let start = block * CACHE_BLOCK;
        let from = start.max(offset);
        let to = (start + bytes.len() as u64).min(offset + buf.len() as u64);
        let part = &bytes[(from - start) as usize..(to - start) as usize];
        buf[(from - offset) as usize..(to - offset) as usize].copy_from_slice(part);
        to - from
    }

    /// Fills `buf` with the part of one block, if that is kept. Returns bytes.
    fn read_part(&self, block: u64, buf: &mut [u8], offset: u64) -> Result<Option<u64>, Late> {
        let mut bounce = vec![0; self.block_len(block)];
        let kept = self.read_keep(block, &mut bounce)? == 1;
        Ok(kept.then(|| Self::copy_block(block, &bounce, buf, offset)))
    }

    /// Fills `buf`, which lies inside the object, or says which blocks are missing.
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<Lookup, SourceError> {
        let stop = offset + buf.len() as u64;
        let (first, end) = (offset / CACHE_BLOCK, stop.div_ceil(CACHE_BLOCK));
        let is_whole = |block: u64| {
            block * CACHE_BLOCK >= offset && block * CACHE_BLOCK + self.block_len(block) as u64 <= stop
        };
        let Lookup { mut missing, mut late } = Lookup::default();
        let mut hit = 0;
        // What is in transit goes first: it gets into the cache before it leaves the table.
        let units: Vec<Option<Arc<Unit>>> = {
            let table = self.table.lock();
            (first..end).map(|block| table.transit.get(block)).collect()
        };
        let unit = |block: u64| units[(block - first) as usize].as_ref();
        let mut block = first;
        while block < end {
            match unit(block).map(|unit| unit.find()) {
                Some(Found::Here { bytes, awaited }) => {
                    let copied = Self::copy_block(block, &bytes, buf, offset);
                    // Who waited for it was counted when it was missed.
                    hit += if awaited { 0 } else { copied };
                }
                Some(Found::Failed(error)) => return Err(error),
                Some(Found::Coming) => missing.push(block),
                None if is_whole(block) => {
                    let run = (block..end).take_while(|b| unit(*b).is_none() && is_whole(*b)).count() as u64;
                    let from = block * CACHE_BLOCK;
                    let to = ((block + run) * CACHE_BLOCK).min(self.size);
                    let part = &mut buf[(from - offset) as usize..(to - offset) as usize];
                    match self.read_keep(block, part) {
                        Ok(kept) => {
                            let kept = kept as u64;
                            hit += (kept * CACHE_BLOCK).min(part.len() as u64);
                            block += kept;
                            if kept > 0 {
                                // What follows may be here as well, only not as fast.
                                continue;
                            }
                            missing.push(block);
                        }
                        Err(Late) => {
                            missing.extend(block..block + run);
                            late.extend(block..block + run);
                            block += run;
                            continue;
                        }
                    }
                }
                None => match self.read_part(block, buf, offset) {
                    Ok(Some(copied)) => hit += copied,
                    Ok(None) => missing.push(block),
                    Err(Late) => {
                        missing.push(block);
                        late.push(block);
                    }
                },
            }
            block += 1;
        }
        if hit > 0 {
            self.traffic.add(Reason::Disk, hit);
        }
        Ok(Lookup { missing, late })
    }

    /// Sees to it that everything of `ranges` that is missing is under way.
    fn start(self: &Arc<Self>, ranges: &[(u64, u64)], purpose: Purpose) -> Option<Arrival> {
        let mut fetching = Fetching::new(self, purpose);
        let mut waiting = Vec::new();
        let full = || purpose != Purpose::Demand && self.in_transit.load(Ordering::Relaxed) > MAX_TRANSIT;
        for (offset, length) in ranges {
            let end = offset.saturating_add(*length).min(self.size).div_ceil(CACHE_BLOCK);
            for block in offset / CACHE_BLOCK..end {
                let mut table = self.table.lock();
                if let Some(unit) = table.transit.get(block) {
                    // What has come and is on its way to the cache is here.
                    if matches!(unit.find(), Found::Coming) {
                        waiting.push(unit);
                    }
                } else if !full() && !self.is_kept(block) {
                    waiting.push(fetching.add(&mut table.transit, block));
                }
            }
        }
        fetching.go();
        (!waiting.is_empty()).then(|| arrival_of(self, waiting, Who::Other))
    }

    /// Fetches `missing` for a reader, and what the readahead expects next. Returns when they are here.
    fn demand(self: &Arc<Self>, missing: &[u64], first: u64, count: u64) -> Arrival {
        self.missed.store(true, Ordering::Relaxed);
        let mut fetching = Fetching::new(self, Purpose::Demand);
        let mut waiting = Vec::with_capacity(missing.len());
        let mut ahead = Vec::new();
        // A read that only waits for what is under way already is no reason to guess once more.
        let mut unknown = false;
        {
            let mut table = self.table.lock();
            for block in missing {
                let known = table.transit.get(*block);
                unknown |= known.is_none();
                waiting.push(match known {
                    Some(unit) => unit,
                    None => fetching.add(&mut table.transit, *block),
                });
            }
            let Table { transit, readahead } = &mut *table;
            let advice = readahead.read(first, count, unknown, &|block| self.present(transit, block));
            self.plan(transit, advice.ranges, &mut fetching, &mut ahead);
        }
        let arrival = arrival_of(self, waiting, Who::Reader);
        fetching.go();
        for fetching in ahead {
            fetching.go();
        }
        arrival
    }

    /// Tells the readahead of a read that found everything.
    fn hit(self: &Arc<Self>, first: u64, count: u64) {
        let mut ahead = Vec::new();
        {
            let mut table = self.table.lock();
            let Table { transit, readahead } = &mut *table;
            let advice = readahead.read(first, count, false, &|block| self.present(transit, block));
            // As long as all is found, the readers were here before, and a guess fetches what they never read.
            if advice.ranges.is_empty() || !self.missed.load(Ordering::Relaxed) {
                return;
            }
            let mut none = Fetching::new(self, Purpose::Demand);
            self.plan(transit, advice.ranges, &mut none, &mut ahead);
        }
        for fetching in ahead {
            fetching.go();
        }
    }

    /// What is read ahead goes behind the readers' own request where it follows on it, else into requests of its own.
    fn plan(
        self: &Arc<Self>,
        transit: &mut Transit,
        ranges: Vec<(u64, u64)>,
        demand: &mut Fetching,
        ahead: &mut Vec<Fetching>,
    ) {
        if self.in_transit.load(Ordering::Relaxed) > MAX_TRANSIT {
            return;
        }
        let blocks = self.size.div_ceil(CACHE_BLOCK);
        for (first, count) in ranges {
            let mut separate = Fetching::new(self, Purpose::Readahead);
            for block in first..first.saturating_add(count).min(blocks) {
                if self.present(transit, block) {
                    continue;
                }
                if demand.ends_at(block) {
                    demand.add_ahead(transit, block);
                } else {
                    separate.add(transit, block);
                }
            }
            ahead.push(separate);
        }
    }

    fn not_here(&self, arrival: Arrival) -> SourceError {
        SourceError::not_here(self.remote.shown(), arrival)
    }
}

impl Source for LazySource {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize, SourceError> {
        let shared = &self.shared;
        let length = usize::try_from(shared.size.saturating_sub(offset)).unwrap_or(usize::MAX).min(buf.len());
        if length == 0 {
            return Ok(0);
        }
        let buf = &mut buf[..length];
        let (first, end) = (offset / CACHE_BLOCK, (offset + length as u64).div_ceil(CACHE_BLOCK));
        let Lookup { missing, late } = shared.read(buf, offset)?;
        if missing.is_empty() {
            shared.hit(first, end - first);
            return Ok(length);
        }
        let arrival = shared.demand(&missing, first, end - first);
        shared.look_for(late);
        Err(shared.not_here(arrival))
    }

    fn size(&self) -> u64 {
        self.shared.size
    }

    fn identity(&self) -> &Identity {
        &self.shared.identity
    }

    fn next_data(&self, offset: u64) -> Result<Option<u64>, SourceError> {
        Ok((offset < self.shared.size).then_some(offset))
    }

    fn next_hole(&self, offset: u64) -> Result<u64, SourceError> {
        Ok(self.shared.size.max(offset))
    }

    fn check(&self) -> Result<(), SourceError> {
        Ok(())
    }

    fn announce(&self, ranges: &[(u64, u64)]) {
        drop(self.shared.start(ranges, Purpose::Demand));
    }

    fn prefetch(&self, ranges: &[(u64, u64)], purpose: Purpose) -> Option<Arrival> {
        self.shared.start(ranges, purpose)
    }

    fn is_remote(&self) -> bool {
        true
    }
}

/// A source that breaks its word.
fn short(object: &str) -> SourceError {
    let early = std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "fewer bytes came than were promised");
    SourceError::from_io("read", Path::new(object), early)
}

/// Whether asking again, for a reader, may help where a fetch of another purpose gave up.
fn gave_up(error: &SourceError) -> bool {
    use SourceErrorKind::{Changed, Denied, Protocol, Unreachable};
    matches!(error.kind(), Unreachable | Denied | Protocol | Changed)
}
