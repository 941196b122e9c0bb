//! The persistent cache: blocks of source files as they were fetched, on the host's own disk.
//!
//! The second VM on a host, and the same host after a reboot, asks the server for nothing that was read before. Of each
//! source there are two files in the store's `cache/`: its blocks, at the source's own offsets in a sparse file, and
//! their sums. What must hold:
//! - **A block that is found has the bytes that were inserted for it.** Every read is compared with a sum that covers
//!   whose block it is and which. Whatever a crash, a power cut or a bad disk left: what does not match was never here.
//!   So nothing has to be synced for correctness, and is, now and then, so that what was fetched stays useful.
//! - **A damaged block heals**: it is dropped, counted, and fetched again by whoever wants it.
//! - **Space is bounded** by bytes of cached blocks, by how much stays free on the filesystem, and by a number of
//!   sources; the least recently used blocks of all sources go first, and a scan does not throw out what is used again
//!   and again (`room`).
//! - **A cache that is full or failing is a cache that takes nothing new**: no call fails, nothing is tried in a loop
//!   (`health`).
//! - A read takes one short lock in memory and waits for no insert, eviction or sync (D31).
//! - **What is read for a base was fetched for it, or was compared with its digest** (`contents`): what another base has
//!   fetched is believed once all of it was compared, and never before (D42).
//! - **What cannot be read is not bad**: only a checksum's word drops anything (`trouble`) (D50).
//!
//! Locks, in this order: `sweep` (one eviction at a time), a source's `writer` (held while its files are changed),
//! a source's `index` (in memory, short; no file is touched under it). `verified`, then `table`, are held for lookups;
//! under `verified` an `index` is locked.

mod check;
mod contents;
mod files;
mod health;
mod index;
mod inherited;
mod insert;
mod load;
mod open;
mod room;
mod scan;
mod seal;
mod source;
mod sync;
#[cfg(test)]
mod tests;
mod ticker;
mod trouble;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

pub use self::check::{CacheFinding, Repair, Sums, check};
pub use self::contents::{Contents, FrozenContents, Of, Reach, Shares};
pub use self::seal::Frozen;
pub use self::source::CachedSource;
pub use self::ticker::Ticker;
pub use crate::format::cache::CACHE_BLOCK;

use self::health::Health;
use self::load::FirstLoad;
use self::open::OpenFiles;
use self::trouble::Troubles;
use crate::format::layout;
use crate::io::{Medium, Space};

/// The cache's directory in the store.
pub const DIR: &str = layout::CACHE;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Ticks between two syncs of what came in.
const SYNC_TICKS: u64 = 5;
/// Bytes that came in since the last sync, after which the next tick syncs.
const SYNC_BYTES: u64 = 256 * MIB;
/// A generation ends when this part of the cache came in or was used again.
const GENERATIONS: u64 = 64;

/// Which contents: derived from a source's identity or digest, so that two names of the same contents have one key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceKey(pub [u8; 32]);

impl SourceKey {
    /// The key of 64 hexadecimal digits as [`fmt::Display`] writes them.
    pub fn from_hex(hex: &str) -> Option<Self> {
        if hex.len() != 64 || !hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return None;
        }
        let mut key = [0; 32];
        for (at, byte) in key.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&hex[at * 2..at * 2 + 2], 16).ok()?;
        }
        Some(Self(key))
    }
}

impl fmt::Display for SourceKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(out, "{byte:02x}"))
    }
}

impl fmt::Debug for SourceKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "SourceKey({self})")
    }
}

/// What the cache may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of cached blocks; 0: nothing is cached. By default [`default_bytes`] of the filesystem.
    pub bytes: Option<u64>,
    /// Sources of which something is cached; by default any number.
    pub bases: Option<usize>,
    /// Bytes that stay free on the filesystem; see [`default_free_floor`].
    pub free_floor: u64,
}

/// How much is cached unless configured: a tenth of the filesystem, at most 64 GiB.
pub fn default_bytes(total: u64) -> u64 {
    (total / 10).min(64 * GIB)
}

/// How much stays free on a filesystem of `total` bytes unless configured: a twentieth, but 1 GiB at least, and never
/// more than a quarter of a filesystem that is small.
pub fn default_free_floor(total: u64) -> u64 {
    (total / 20).max(GIB).min(total / 4)
}

/// What becomes of files whose header is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damaged {
    /// They go.
    Drop,
    /// They stay until [`DiskCache::settle_damaged`] is told which of them are an only copy.
    Keep,
}

/// Why blocks went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EvictReason {
    /// The bound on bytes.
    Space,
    /// The filesystem has less free than is to stay free.
    Floor,
    /// The bound on the number of sources.
    Bases,
    /// The bytes did not match their sum.
    Corrupt,
    /// Somebody asked for it.
    Asked,
    /// The source is not what it was.
    Changed,
    /// The storage could not read them, or could not keep them.
    ReadError,
}

/// Is told what others should know of. Called from whichever thread it happens in; must not wait, and must not call
/// the cache.
pub trait Watch: Send + Sync {
    /// Blocks of `bytes` bytes went.
    fn evicted(&self, key: &SourceKey, bytes: u64, reason: EvictReason);
    /// From now on nothing new is kept, and why; or, with `None`, it is again.
    fn degraded(&self, why: Option<&str>);
}

/// Counters since the start, and what the cache holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskCacheStats {
    /// The bound on bytes of cached blocks.
    pub limit_bytes: u64,
    /// Bytes of cached blocks.
    pub used_bytes: u64,
    /// Sources of which something is cached, or that are pinned.
    pub bases: u64,
    /// Blocks that were asked for and found.
    pub hits: u64,
    /// Blocks that were asked for and not found.
    pub misses: u64,
    /// Blocks that came in.
    pub insertions: u64,
    /// Blocks that went, for whatever reason.
    pub evictions: u64,
    /// Blocks that did not match their sums; a crash of the machine leaves some.
    pub corrupt_blocks: u64,
    /// Reads that the storage could not do.
    pub read_errors: u64,
    /// Writes, syncs and punches that the storage could not do.
    pub write_errors: u64,
    /// Whether all that an earlier worker left is known. Until then `used_bytes` is an estimate, and nothing is evicted to
    /// make room.
    pub indexed: bool,
    /// Why nothing new is kept.
    pub degraded: Option<String>,
    /// Sources that cannot be read now, by their keys, and why. They are kept, and tried again.
    pub unreadable: Vec<String>,
}

#[derive(Default)]
struct Counters {
    hits: AtomicU64,
    misses: AtomicU64,
    insertions: AtomicU64,
    evictions: AtomicU64,
    corrupt_blocks: AtomicU64,
    read_errors: AtomicU64,
    write_errors: AtomicU64,
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// What the cache and its sources share.
struct Shared {
    medium: Arc<dyn Medium>,
    watch: Arc<dyn Watch>,
    health: Health,
    counters: Counters,
    limit: u64,
    bases: Option<usize>,
    free_floor: u64,
    /// Bytes of cached blocks, and of those that are coming in.
    used: AtomicU64,
    generation: AtomicU64,
    /// Bytes that came in or were used again in this generation.
    moved: AtomicU64,
    /// Bytes that came in since the last sync.
    unsynced: AtomicU64,
    /// Files were made or removed since the directory was synced.
    names: AtomicBool,
    /// The directory was read; until then nothing is written.
    loaded: AtomicBool,
    first_load: FirstLoad,
    /// What an earlier worker left is known; until then nothing is evicted to make room.
    indexed: AtomicBool,
    /// Goes up each time a source is used.
    uses: AtomicU64,
    /// One eviction at a time.
    sweep: Mutex<()>,
    open: Arc<OpenFiles>,
    troubles: Troubles,
    /// Goes up when a source begins or ceases to be of verified contents.
    lineups: AtomicU64,
}

impl Shared {
    /// A source began or ceased to be of verified contents.
    fn lineup(&self) {
        self.lineups.fetch_add(1, Ordering::Release);
    }

    fn looked_up(&self, wanted: u64, found: u64) {
        count(&self.counters.hits, found);
        count(&self.counters.misses, wanted - found);
    }

    /// Files of a source cannot be read now.
    fn trouble(&self, key: &SourceKey, error: &io::Error) {
        self.note_trouble(key, error, false);
    }

    /// Nothing is known of a source for now.
    fn unloaded(&self, key: &SourceKey, error: &io::Error) {
        self.note_trouble(key, error, true);
    }

    fn note_trouble(&self, key: &SourceKey, error: &io::Error, unloaded: bool) {
        let short = matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE));
        let advice = if short { "; raise the limit of open files (ulimit -n, LimitNOFILE)" } else { "" };
        let why = format!("its files cannot be read: {error}{advice}; they are kept and tried again");
        if self.troubles.note(*key, why.clone(), unloaded, self.health.ticks()) {
            tracing::warn!(%key, why, "a source of the cache");
        }
    }

    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    fn moved(&self, bytes: u64) {
        if bytes > 0 && self.moved.fetch_add(bytes, Ordering::Relaxed) + bytes > self.limit / GENERATIONS {
            self.moved.store(0, Ordering::Relaxed);
            self.generation.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The storage refused something.
    fn write_failed(&self, what: &str, error: &io::Error) {
        count(&self.counters.write_errors, 1);
        self.degrade(&format!("{what}: {error}"));
    }

    fn degrade(&self, why: &str) {
        if self.health.failed(why) {
            let dir = self.medium.root().join(DIR);
            tracing::warn!(cache = %dir.display(), why, "nothing new is cached until this is over; reads go to the source");
            self.watch.degraded(Some(why));
        } else {
            tracing::debug!(why, "the cache takes nothing new");
        }
    }

    fn worked(&self) {
        if self.health.worked() {
            tracing::info!("the cache takes new blocks again");
            self.watch.degraded(None);
        }
    }

    fn went(&self, key: &SourceKey, blocks: u64, bytes: u64, reason: EvictReason) {
        if blocks > 0 {
            count(&self.counters.evictions, blocks);
            self.watch.evicted(key, bytes, reason);
        }
    }
}

/// The persistent cache. All methods may be called from any thread, and wait for the local disk at most.
pub struct DiskCache {
    shared: Arc<Shared>,
    table: Mutex<HashMap<SourceKey, Arc<CachedSource>>>,
    verified: Mutex<contents::Verified>,
    damaged: Damaged,
    /// Sources of which not all is known.
    queue: Mutex<scan::Queue>,
    /// Sources with damaged headers that were not decided about.
    bad: Mutex<HashMap<SourceKey, String>>,
    me: Weak<Self>,
}

impl DiskCache {
    /// Uses the directory `cache` of a medium, which must not be one that gives the reserve of the store away. Never
    /// fails: a directory that cannot be used is tried again later, and nothing is cached until then. Somebody has to
    /// call [`DiskCache::tick`] about once a second; see [`DiskCache::start`].
    pub fn open(medium: Arc<dyn Medium>, limits: Limits, watch: Arc<dyn Watch>) -> Arc<Self> {
        let cache = Self::prepare(medium, limits, watch, Damaged::Drop);
        cache.load_first();
        while cache.scan_step() {}
        cache
    }

    /// As [`open`](Self::open), and touches no file: what is there is read by the thread of [`DiskCache::start`]. Reads
    /// wait until names and headers are known.
    pub fn prepare(
        medium: Arc<dyn Medium>,
        limits: Limits,
        watch: Arc<dyn Watch>,
        damaged: Damaged,
    ) -> Arc<Self> {
        let total = medium.space().unwrap_or(Space { total: 0, free: 0, available: 0 }).total;
        let shared = Shared {
            open: OpenFiles::new(medium.clone()),
            troubles: Troubles::default(),
            lineups: AtomicU64::new(1),
            medium,
            watch,
            health: Health::default(),
            counters: Counters::default(),
            limit: limits.bytes.unwrap_or_else(|| default_bytes(total)),
            bases: limits.bases,
            free_floor: limits.free_floor,
            used: AtomicU64::new(0),
            generation: AtomicU64::new(1),
            moved: AtomicU64::new(0),
            unsynced: AtomicU64::new(0),
            names: AtomicBool::new(false),
            loaded: AtomicBool::new(false),
            first_load: FirstLoad::default(),
            indexed: AtomicBool::new(false),
            uses: AtomicU64::new(0),
            sweep: Mutex::new(()),
        };
        Arc::new_cyclic(|me| Self {
            shared: Arc::new(shared),
            table: Mutex::default(),
            verified: Mutex::default(),
            damaged,
            queue: Mutex::default(),
            bad: Mutex::default(),
            me: me.clone(),
        })
    }

    /// The cached part of a source of `size` bytes. The same key gives the same contents.
    pub fn attach(self: &Arc<Self>, key: SourceKey, size: u64) -> Arc<CachedSource> {
        self.source(key, size)
    }

    fn source(&self, key: SourceKey, size: u64) -> Arc<CachedSource> {
        loop {
            let mut table = self.table.lock();
            let old = match table.get(&key) {
                Some(source) if source.size() == size => return source.clone(),
                Some(other) if !other.is_detached() => other.clone(),
                _ => {
                    let new = Arc::new(CachedSource::new(key, size, &self.shared, self.me.clone()));
                    table.insert(key, new.clone());
                    return new;
                }
            };
            drop(table);
            // A key stands for the contents, so this is a mistake of somebody's; the older contents are not used.
            let bytes = old.detach(EvictReason::Changed);
            tracing::warn!(%key, bytes, from = old.size(), to = size, "cached blocks of another size were dropped");
        }
    }

    /// Drops all that is cached of a source, and its files. It is not pinned any more. Whoever has it attached may go
    /// on, and begins anew.
    pub fn remove(&self, key: &SourceKey) {
        self.wait_for_load();
        let source = self.find(key);
        if let Some(source) = source {
            source.reset(EvictReason::Asked);
            self.shared.health.hope();
            // Nobody but the table and this call.
            let mut table = self.table.lock();
            if Arc::strong_count(&source) <= 2 && source.cached_bytes() == 0 {
                table.remove(key);
            }
        }
    }

    /// A source that is known, without making it known.
    pub fn find(&self, key: &SourceKey) -> Option<Arc<CachedSource>> {
        self.table.lock().get(key).cloned()
    }

    /// Why what is cached of a source cannot be read now.
    pub fn trouble(&self, key: &SourceKey) -> Option<String> {
        self.shared.troubles.why(key)
    }

    /// Sources of which something is cached, that are pinned, or that are attached.
    pub fn sources(&self) -> Vec<Arc<CachedSource>> {
        self.table.lock().values().cloned().collect()
    }

    /// How it is.
    pub fn stats(&self) -> DiskCacheStats {
        let shared = &self.shared;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &shared.counters;
        DiskCacheStats {
            limit_bytes: shared.limit,
            used_bytes: get(&shared.used),
            bases: self.sources().iter().filter(|source| source.has_files()).count() as u64,
            hits: get(&counters.hits),
            misses: get(&counters.misses),
            insertions: get(&counters.insertions),
            evictions: get(&counters.evictions),
            corrupt_blocks: get(&counters.corrupt_blocks),
            read_errors: get(&counters.read_errors),
            write_errors: get(&counters.write_errors),
            indexed: shared.indexed.load(Ordering::Acquire),
            degraded: shared.health.why(),
            unreadable: shared
                .troubles
                .list()
                .into_iter()
                .map(|(key, why)| format!("{key}: {why}"))
                .collect(),
        }
    }

    /// Makes all that is cached durable, so that a power cut afterwards costs no fetch.
    ///
    /// # Errors
    /// The first thing that the storage refused; the rest is done all the same.
    pub fn flush(&self) -> io::Result<()> {
        let mut result = Ok(());
        self.shared.unsynced.store(0, Ordering::Relaxed);
        for source in self.sources() {
            if let Err(e) = source.sync() {
                result = result.and(Err(e));
            }
        }
        let medium = &self.shared.medium;
        if self.shared.names.swap(false, Ordering::Relaxed)
            && let Err(e) = medium.sync_dir(DIR).and_then(|()| medium.sync_dir("."))
        {
            self.shared.names.store(true, Ordering::Relaxed);
            result = result.and(Err(e));
        }
        result
    }

    /// What has to be done now and then: syncs, the floor, what an earlier worker left, another attempt after a
    /// failure. To be called about once a second; its calls count the time.
    pub fn tick(&self) {
        while self.scan_step() {}
        self.tick_once(true);
    }

    /// A tick; `settle`: with what takes long when not all is known.
    fn tick_once(&self, settle: bool) {
        let shared = &self.shared;
        let now = shared.health.tick();
        if !shared.loaded.load(Ordering::Acquire) {
            if !shared.first_load.is_to_come() && shared.health.may_write() {
                self.load();
            }
            return;
        }
        self.load_due();
        if settle {
            self.settle();
        }
        self.keep_bounds();
        shared.open.tick();
        let due = now.is_multiple_of(SYNC_TICKS) || shared.unsynced.load(Ordering::Relaxed) >= SYNC_BYTES;
        if due
            && shared.health.may_write()
            && let Err(error) = self.flush()
        {
            shared.write_failed("syncing the cache", &error);
        }
    }
}
