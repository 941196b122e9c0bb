//! A source behind a network. plyfs fetches its bytes block by block, when a reader needs them, and caches them.
//!
//! A read takes blocks in transit first, then blocks of the persistent cache, and starts to fetch the rest. It never
//! waits for the network (see [`Completion`]). What must hold:
//! - Bytes reach a reader and the cache only from a [`RemoteSource`] that vouches for them, or from the cache after it
//!   compared their checksum.
//! - Readers come first: a block goes to its waiting readers before it goes to the cache. A read of cached blocks takes
//!   no lock that another thread holds while it waits (D41).
//! - The result of a read never depends on what the cache holds.
//! - A hanging cache disk delays the first reader for a moment and later readers not at all (`timed_reads`). A block
//!   that only the cache has reaches its readers when the disk answers, even if their server never does (`late`).
//!
//! Locks: `Shared::inserting` is held shared while blocks go to the cache; the cache's locks are inside it, and no
//! reader takes it. `Shared::table` is held for lookups and notes; a unit's own lock and the cache's locks (for the
//! question which blocks it has) are inside it. `Shared::late` is held briefly, with no other lock.

mod budget;
mod health;
mod holdings;
pub mod kept;
mod late;
mod lend;
mod place;
pub mod readahead;
mod requests;
#[cfg(test)]
mod tests;
mod timed_reads;
mod transit;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock};

use crate::events::{Reason, Traffic};
use crate::source::holdings::{HeldRow, Holdings, fetches_are_barred, not_fetched};
use crate::source::{
    Completion, Identity, Provenance, Purpose, RemoteSource, Source, SourceError, SourceErrorKind, Spawn,
    Stall, note,
};
pub use budget::DemandBudget;
pub use health::Failing;
use health::Health;
use holdings::LazyHoldings;
use kept::{CachedSource, Contents, Reach};
pub use lend::Arriving;
use place::LateRange;
pub use place::{FurtherCopies, Place};
use readahead::Readahead;
use requests::{Demand, RequestBuilder};
use timed_reads::TimedOut;
pub use timed_reads::{DISK_TIMEOUT, TimedReads};
use transit::{Found, Transit, Unit, WaiterKind, completion_of};

/// Bytes of a cache block: the unit of fetching and inserting.
pub const CACHE_BLOCK: u64 = kept::CACHE_BLOCK;

/// The most that one request asks for, bytes.
const MAX_REQUEST: u64 = 4 << 20;
/// Bytes in transit above which plyfs fetches only what a reader waits for.
const MAX_TRANSIT: u64 = 96 << 20;
/// Bytes in transit above which the cache does not get what was fetched for readers: its disk is slower than the
/// network.
const MAX_UNKEPT: u64 = 128 << 20;

/// A cache of fetched blocks. Best effort: a block that was inserted may be gone.
pub trait FetchCache: Send + Sync {
    /// Fills `buf` with whole blocks from block `first` on, up to the first block that is missing. The last block of the
    /// object may be short. Returns the number of blocks. May wait for a disk.
    fn read(&self, first: u64, buf: &mut [u8]) -> usize;
    /// As [`read`](Self::read), but never waits and may return fewer blocks; 0 when the first is missing. `None`: only
    /// `read` can tell.
    fn read_now(&self, _first: u64, _buf: &mut [u8]) -> Option<usize> {
        None
    }
    /// Whether the cache has a block, as far as it knows without reading the block. May wait for a disk.
    fn contains(&self, block: u64) -> bool;
    /// As [`contains`](Self::contains), but never waits. `None`: only `contains` can tell.
    fn contains_now(&self, _block: u64) -> Option<bool> {
        None
    }
    /// Stores whole blocks.
    fn insert(&self, first: u64, data: &[u8]);
    /// Tells the cache that its disk stopped answering (`false`), or answers again (`true`). Must not wait.
    fn answers(&self, _answers: bool) {}
    /// Notes in `rows`, from row `first` on, which blocks it has. Reads no block.
    fn hold(&self, _first: u64, _rows: &mut [HeldRow]) {}
    /// The first row at or after `row` that may have a block, if any has.
    fn next_held(&self, _row: u64) -> Option<u64> {
        None
    }
}

/// A cache that stores nothing.
pub struct NoCache;

impl FetchCache for NoCache {
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

impl FetchCache for CachedSource {
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

impl FetchCache for Contents {
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

    fn hold(&self, first: u64, rows: &mut [HeldRow]) {
        Self::hold(self, first, rows);
    }

    fn next_held(&self, row: u64) -> Option<u64> {
        Self::next_held(self, row)
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
    /// The cache.
    kept: Arc<Place>,
    /// Further copies on other drives.
    further: OnceLock<Arc<FurtherCopies>>,
    spawn: Arc<dyn Spawn>,
    identity: Identity,
    size: u64,
    table: Mutex<Table>,
    /// Whether any read ever missed a block.
    missed: AtomicBool,
    /// Incremented when the cache must not get what is in transit.
    forget_epoch: AtomicU64,
    /// Held shared while blocks go to the cache.
    inserting: RwLock<()>,
    /// Bytes that are in transit: requested, and not yet given to the cache.
    in_transit: AtomicU64,
    /// Readers' requests under way.
    demand: AtomicU64,
    /// Readers' requests: those under way and those that wait for the budget.
    asked: Demand,
    budget: Arc<DemandBudget>,
    traffic: Arc<Traffic>,
    health: Health,
}

struct Table {
    transit: Transit,
    readahead: Readahead,
}

/// Blocks that a read misses, in ascending order.
#[derive(Default)]
struct Lookup {
    missing: Vec<u64>,
    /// Those of `missing` that a place may have: it did not answer in time.
    late: Vec<LateRange>,
}

impl LazySource {
    /// `identity` distinguishes this object's blocks in the memory cache from all others. `traffic` has the counters.
    /// All sources share `budget` and `timed_reads`.
    pub fn new(
        remote: Arc<dyn RemoteSource>,
        keep: Arc<dyn FetchCache>,
        spawn: Arc<dyn Spawn>,
        identity: Identity,
        traffic: Arc<Traffic>,
        budget: Arc<DemandBudget>,
        timed_reads: Arc<TimedReads>,
    ) -> Self {
        let size = remote.size();
        let table =
            Table { transit: Transit::default(), readahead: Readahead::new(size.div_ceil(CACHE_BLOCK)) };
        Self {
            shared: Arc::new(Shared {
                remote,
                kept: Place::new(keep, timed_reads),
                further: OnceLock::new(),
                spawn,
                identity,
                size,
                table: Mutex::new(table),
                missed: AtomicBool::new(false),
                forget_epoch: AtomicU64::new(0),
                inserting: RwLock::new(()),
                in_transit: AtomicU64::new(0),
                demand: AtomicU64::new(0),
                asked: Demand::default(),
                budget,
                traffic,
                health: Health::default(),
            }),
        }
    }

    /// Reads blocks that the cache does not deliver from further copies, too. Called once, before the first read.
    pub fn read_also(&self, copies: Arc<FurtherCopies>) {
        let _ = self.shared.further.set(copies);
    }

    /// Name of the base that the source belongs to.
    pub fn base(&self) -> &str {
        self.shared.traffic.base()
    }

    /// Since when reads wait for the server, if they do.
    pub fn stall(&self) -> Option<Stall> {
        self.shared.remote.stall()
    }

    /// The last failure of the server that is asked first, while none of its URLs works.
    pub fn trouble(&self) -> Option<String> {
        let mut urls = self.shared.remote.urls();
        urls.retain(|url| !url.is_peer);
        let works = urls.iter().any(|url| url.trouble.is_none());
        if works { None } else { urls.into_iter().find_map(|url| url.trouble) }
    }

    /// Since when reads fail, unless a read succeeded since.
    pub fn failing(&self) -> Option<Failing> {
        self.shared.health.failing()
    }

    /// The last error that readers got. Each error is returned once.
    pub fn take_failure(&self) -> Option<SourceError> {
        self.shared.health.take_unreported()
    }

    /// Fills `buf` from the cache and from blocks in transit, without a request to a server. Returns whether all of it
    /// was there.
    pub fn read_kept(&self, buf: &mut [u8], offset: u64) -> bool {
        let end = offset.saturating_add(buf.len() as u64);
        end <= self.shared.size && self.shared.read(buf, offset).is_ok_and(|found| found.missing.is_empty())
    }

    /// Blocks in transit still go to the readers that wait for them, but not to the cache. When this returns, none of
    /// them can get into the cache any more.
    pub fn forget_in_transit(&self) {
        self.shared.forget_epoch.fetch_add(1, Ordering::AcqRel);
        // An insert under way ends first, so that the caller can drop its blocks.
        drop(self.shared.inserting.write());
        self.shared.table.lock().transit = Transit::default();
    }

    /// Whether nothing is in transit: no request is under way, and the cache has all that came.
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

    /// Whether the cache has a block, or a further copy.
    fn is_kept(&self, block: u64) -> bool {
        self.kept.contains(block)
            || self.further.get().is_some_and(|copies| copies.all().iter().any(|copy| copy.contains(block)))
    }

    /// Fills `buf` with blocks of the first place that has block `first`, as [`FetchCache::read`] does. When none
    /// delivers it, notes in `late` which places did not answer in time.
    fn read_keep(&self, first: u64, buf: &mut [u8], late: &mut Vec<LateRange>) -> usize {
        let noted = late.len();
        let blocks = (buf.len() as u64).div_ceil(CACHE_BLOCK);
        let mut read = |place: &Arc<Place>| match place.read(first, buf) {
            Ok(kept) => kept,
            Err(TimedOut) => {
                late.push(LateRange { place: place.clone(), first, blocks });
                0
            }
        };
        let mut kept = read(&self.kept);
        if kept == 0
            && let Some(copies) = self.further.get()
        {
            kept = copies.all().iter().map(&mut read).find(|kept| *kept > 0).unwrap_or(0);
        }
        if kept > 0 {
            late.truncate(noted);
        }
        kept
    }

    /// Copies the part of a block that `buf` covers; `buf` starts at `offset` of the object. Returns the bytes copied.
    fn copy_block(block: u64, bytes: &[u8], buf: &mut [u8], offset: u64) -> u64 {
        let start = block * CACHE_BLOCK;
        let from = start.max(offset);
        let to = (start + bytes.len() as u64).min(offset + buf.len() as u64);
        let part = &bytes[(from - start) as usize..(to - start) as usize];
        buf[(from - offset) as usize..(to - offset) as usize].copy_from_slice(part);
        to - from
    }

    /// Fills `buf` with the part of one block, if it is kept. Returns the bytes copied.
    fn read_part(&self, block: u64, buf: &mut [u8], offset: u64, late: &mut Vec<LateRange>) -> Option<u64> {
        let mut bounce = vec![0; self.block_len(block)];
        let kept = self.read_keep(block, &mut bounce, late) == 1;
        kept.then(|| Self::copy_block(block, &bounce, buf, offset))
    }

    /// Fills `buf`, which lies inside the object, or returns the blocks that are missing.
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<Lookup, SourceError> {
        let stop = offset + buf.len() as u64;
        let (first, end) = (offset / CACHE_BLOCK, stop.div_ceil(CACHE_BLOCK));
        let is_whole = |block: u64| {
            block * CACHE_BLOCK >= offset && block * CACHE_BLOCK + self.block_len(block) as u64 <= stop
        };
        let Lookup { mut missing, mut late } = Lookup::default();
        let (mut hit, mut awaited_bytes) = (0, 0);
        // Blocks in transit come first: a block gets into the cache before it leaves the table.
        let units: Vec<Option<Arc<Unit>>> = {
            let table = self.table.lock();
            (first..end).map(|block| table.transit.get(block)).collect()
        };
        let unit = |block: u64| units[(block - first) as usize].as_ref();
        let mut block = first;
        while block < end {
            match unit(block).map(|unit| unit.find()) {
                Some(Found::Present { bytes, awaited }) => {
                    let copied = Self::copy_block(block, &bytes, buf, offset);
                    // An awaited block was counted when it was missed.
                    *(if awaited { &mut awaited_bytes } else { &mut hit }) += copied;
                }
                Some(Found::Failed(error)) => return Err(error),
                Some(Found::Pending) => missing.push(block),
                None if is_whole(block) => {
                    let run = (block..end).take_while(|b| unit(*b).is_none() && is_whole(*b)).count() as u64;
                    let from = block * CACHE_BLOCK;
                    let to = ((block + run) * CACHE_BLOCK).min(self.size);
                    let part = &mut buf[(from - offset) as usize..(to - offset) as usize];
                    let noted = late.len();
                    let kept = self.read_keep(block, part, &mut late) as u64;
                    hit += (kept * CACHE_BLOCK).min(part.len() as u64);
                    if kept > 0 {
                        // The blocks behind it may be kept too, but take longer to read.
                        block += kept;
                        continue;
                    }
                    if late.len() > noted {
                        missing.extend(block..block + run);
                        block += run;
                        continue;
                    }
                    missing.push(block);
                }
                None => match self.read_part(block, buf, offset, &mut late) {
                    Some(copied) => hit += copied,
                    None => missing.push(block),
                },
            }
            block += 1;
        }
        if hit > 0 && !fetches_are_barred() {
            self.traffic.add(Reason::Disk, hit);
            note(Provenance::Kept);
        }
        if awaited_bytes > 0 {
            note(Provenance::Fetched);
        }
        Ok(Lookup { missing, late })
    }

    /// Starts to fetch every block of `ranges` that is missing and not in transit.
    fn start(self: &Arc<Self>, ranges: &[(u64, u64)], purpose: Purpose) -> Option<Completion> {
        let mut requests = RequestBuilder::new(self, purpose);
        let mut waiting = Vec::new();
        let full = || purpose != Purpose::Demand && self.in_transit.load(Ordering::Relaxed) > MAX_TRANSIT;
        for (offset, length) in ranges {
            let end = offset.saturating_add(*length).min(self.size).div_ceil(CACHE_BLOCK);
            for block in offset / CACHE_BLOCK..end {
                let mut table = self.table.lock();
                if let Some(unit) = table.transit.get(block) {
                    // A block that has come and is on its way to the cache is present.
                    if matches!(unit.find(), Found::Pending) {
                        waiting.push(unit);
                    }
                } else if !full() && !self.is_kept(block) {
                    waiting.push(requests.add(&mut table.transit, block));
                }
            }
        }
        requests.send();
        (!waiting.is_empty()).then(|| completion_of(self, waiting, WaiterKind::Other))
    }

    /// Starts to fetch `missing` for a reader, and the blocks that the readahead expects next. The completion is that of
    /// `missing`.
    fn demand(self: &Arc<Self>, missing: &[u64], first: u64, count: u64) -> Completion {
        self.missed.store(true, Ordering::Relaxed);
        let mut requests = RequestBuilder::new(self, Purpose::Demand);
        let mut waiting = Vec::with_capacity(missing.len());
        let mut ahead = Vec::new();
        // A read that only waits for blocks in transit is no reason for another readahead.
        let mut unknown = false;
        {
            let mut table = self.table.lock();
            for block in missing {
                let known = table.transit.get(*block);
                unknown |= known.is_none();
                waiting.push(match known {
                    Some(unit) => unit,
                    None => requests.add(&mut table.transit, *block),
                });
            }
            let Table { transit, readahead } = &mut *table;
            let advice = readahead.read(first, count, unknown, &|block| self.present(transit, block));
            self.plan(transit, advice.ranges, &mut requests, &mut ahead);
        }
        let completion = completion_of(self, waiting, WaiterKind::Reader);
        requests.send();
        for requests in ahead {
            requests.send();
        }
        completion
    }

    /// Tells the readahead about a read that missed nothing.
    fn hit(self: &Arc<Self>, first: u64, count: u64) {
        let mut ahead = Vec::new();
        {
            let mut table = self.table.lock();
            let Table { transit, readahead } = &mut *table;
            let advice = readahead.read(first, count, false, &|block| self.present(transit, block));
            // While no read misses, the cache already has all that these readers read. A readahead would fetch blocks
            // that they never read.
            if advice.ranges.is_empty() || !self.missed.load(Ordering::Relaxed) {
                return;
            }
            let mut none = RequestBuilder::new(self, Purpose::Demand);
            self.plan(transit, advice.ranges, &mut none, &mut ahead);
        }
        for requests in ahead {
            requests.send();
        }
    }

    /// Appends the blocks of the readahead to the readers' own request where they follow it, and puts the others into
    /// requests of their own.
    fn plan(
        self: &Arc<Self>,
        transit: &mut Transit,
        ranges: Vec<(u64, u64)>,
        demand: &mut RequestBuilder,
        ahead: &mut Vec<RequestBuilder>,
    ) {
        if self.in_transit.load(Ordering::Relaxed) > MAX_TRANSIT {
            return;
        }
        let blocks = self.size.div_ceil(CACHE_BLOCK);
        for (first, count) in ranges {
            let mut separate = RequestBuilder::new(self, Purpose::Readahead);
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

    fn not_here(&self, completion: Completion) -> SourceError {
        SourceError::not_here(self.remote.shown(), completion)
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
        if fetches_are_barred() {
            let here = missing.is_empty();
            return if here { Ok(length) } else { Err(not_fetched(shared.remote.shown())) };
        }
        if missing.is_empty() {
            shared.hit(first, end - first);
            return Ok(length);
        }
        let completion = shared.demand(&missing, first, end - first);
        shared.search_late(late);
        Err(shared.not_here(completion))
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
        if !fetches_are_barred() {
            drop(self.shared.start(ranges, Purpose::Demand));
        }
    }

    fn prefetch(&self, ranges: &[(u64, u64)], purpose: Purpose) -> Option<Completion> {
        self.shared.start(ranges, purpose)
    }

    fn is_remote(&self) -> bool {
        true
    }

    fn holdings(&self) -> Box<dyn Holdings + '_> {
        Box::new(LazyHoldings::of(&self.shared))
    }
}

/// The error for a source that delivers fewer bytes than it promised.
fn short(object: &str) -> SourceError {
    let early = std::io::Error::new(
        std::io::ErrorKind::UnexpectedEof,
        "the source delivered fewer bytes than it promised",
    );
    SourceError::from_io("read", Path::new(object), early)
}

/// Whether a request for a reader may succeed after a fetch of another purpose failed with this error.
fn reader_may_retry(error: &SourceError) -> bool {
    use SourceErrorKind::{Changed, Denied, Protocol, Unreachable};
    matches!(error.kind(), Unreachable | Denied | Protocol | Changed)
}
