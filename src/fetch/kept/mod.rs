//! The persistent cache: fetched blocks of source files on the host's own disk.
//!
//! Blocks that were read once are not fetched again, neither for the second VM on a host nor after a reboot. Each
//! source has two files in the store's `cache/`: a sparse file with its blocks at the source's own offsets, and a file
//! with their checksums (sums). What must hold:
//! - **A block that is found has the bytes that were inserted for it.** Every read is compared with a checksum that
//!   covers the source's key and the block's number. After a crash, a power cut or a disk error, a block that does not
//!   match counts as missing. So correctness needs no sync; the cache syncs now and then so that blocks survive.
//! - **A damaged block heals**: the cache drops and counts it, and its next reader fetches it again.
//! - **Space is bounded**: by the bytes of cached blocks, by the free space of the filesystem, and by the number of
//!   sources. The least recently used blocks of all sources go first. A scan does not evict blocks that are used again
//!   and again (`room`).
//! - **A full or failing cache takes nothing new**: no call fails, and nothing is retried in a loop (`health`).
//! - A read takes one short lock in memory and waits for no insert, eviction or sync (D31).
//! - **A block that a base reads was fetched for that base, or was compared with its digest** (`contents`). Blocks that
//!   another base fetched are trusted only after all of them were compared (D42).
//! - **An unreadable block is not a damaged block**: only a checksum that does not match drops anything (`unreadable`)
//!   (D50).
//!
//! Locks, in this order: `sweep` (one eviction at a time), a source's `writer` (held while its files are changed),
//! a source's `index` (in memory, short; no file I/O under it). `verified`, then `table`, are held for lookups; under
//! `verified` an `index` is locked.

mod check;
mod contents;
mod files;
mod health;
mod index;
mod inherited;
mod insert;
mod load;
mod open;
mod proofs;
mod read;
mod room;
mod scan;
mod seal;
mod source;
mod sync;
#[cfg(test)]
mod tests;
mod ticker;
mod unreadable;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

pub use self::check::{CacheFinding, Checksums, Repair, check, check_watched};
pub use self::contents::{Contents, FileKeys, FrozenContents, Reach, SharedCopies};
pub use self::seal::Frozen;
pub use self::source::CachedSource;
pub use self::ticker::Ticker;
pub use crate::format::cache::CACHE_BLOCK;

use self::health::Health;
use self::load::FirstLoad;
use self::open::OpenFiles;
use self::unreadable::UnreadableSources;
use crate::format::layout;
use crate::io::{Medium, Space};

/// The cache's directory in the store.
pub const DIR: &str = layout::CACHE;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
/// Ticks between two syncs.
const SYNC_TICKS: u64 = 5;
/// When this many bytes were inserted since the last sync, the next tick syncs.
const SYNC_BYTES: u64 = 256 * MIB;
/// A generation ends when this fraction of the cache was inserted or used again.
const GENERATIONS: u64 = 64;

/// Names the contents of a source. It is derived from the source's identity or digest, so that two names of the same
/// contents have one key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SourceKey(pub [u8; 32]);

impl SourceKey {
    /// The key of 64 hexadecimal digits as [`fmt::Display`] writes them.
    pub fn from_hex(hex: &str) -> Option<Self> {
        if hex.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return None;
        }
        let mut key = [0; 32];
        hex::decode_to_slice(hex, &mut key).ok()?;
        Some(Self(key))
    }
}

impl fmt::Display for SourceKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for SourceKey {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "SourceKey({self})")
    }
}

/// The bounds of the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of cached blocks; 0 switches the cache off. By default [`default_bytes`] of the filesystem.
    pub bytes: Option<u64>,
    /// Sources with cached blocks; by default any number.
    pub bases: Option<usize>,
    /// Bytes that stay free on the filesystem; see [`default_free_floor`].
    pub free_floor: u64,
}

/// The default bound on bytes: a tenth of the filesystem, at most 64 GiB.
pub fn default_bytes(total: u64) -> u64 {
    (total / 10).min(64 * GIB)
}

/// The default free space of a filesystem of `total` bytes: a twentieth, at least 1 GiB, and never more than a quarter.
pub fn default_free_floor(total: u64) -> u64 {
    (total / 20).max(GIB).min(total / 4)
}

/// How the cache treats files with a damaged header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnDamage {
    /// It removes them.
    Drop,
    /// It keeps them until [`DiskCache::settle_damaged`] learns which of them are an only copy.
    Keep,
}

/// Why blocks were evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EvictReason {
    /// The bound on bytes.
    Space,
    /// The filesystem has less free space than must stay free.
    Floor,
    /// The bound on the number of sources.
    Bases,
    /// The bytes did not match their checksum.
    Corrupt,
    /// The operator or the owner of the base asked for it.
    Asked,
    /// The contents of the source changed.
    Changed,
    /// The storage failed to read them, or to make them durable.
    ReadError,
}

/// Receives the events of the cache. Any thread may call it. It must not wait and must not call the cache.
pub trait CacheObserver: Send + Sync {
    /// Blocks of `bytes` bytes were evicted.
    fn evicted(&self, key: &SourceKey, bytes: u64, reason: EvictReason);
    /// The cache stops taking new blocks, for this reason; with `None`, it takes new blocks again.
    fn degraded(&self, why: Option<&str>);
}

/// Counters since the start, and what the cache holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskCacheStats {
    /// The bound on bytes of cached blocks.
    pub limit_bytes: u64,
    /// Bytes of cached blocks.
    pub used_bytes: u64,
    /// Sources with cached blocks, and pinned sources.
    pub bases: u64,
    /// Blocks that a reader looked up and found.
    pub hits: u64,
    /// Blocks that a reader looked up and did not find.
    pub misses: u64,
    /// Blocks that were inserted.
    pub insertions: u64,
    /// Blocks that were evicted, for any reason.
    pub evictions: u64,
    /// Blocks that did not match their checksums; a crash of the machine leaves some.
    pub corrupt_blocks: u64,
    /// Reads that the storage failed.
    pub read_errors: u64,
    /// Writes, syncs and punches that the storage failed.
    pub write_errors: u64,
    /// Whether all blocks that an earlier worker left are indexed. Until then `used_bytes` is an estimate, and the cache
    /// evicts nothing to make room.
    pub indexed: bool,
    /// Why the cache takes no new blocks.
    pub degraded: Option<String>,
    /// Sources that cannot be read now: key and reason. Their files stay, and the cache tries again.
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

/// The state that the cache and its sources share.
struct Shared {
    medium: Arc<dyn Medium>,
    watch: Arc<dyn CacheObserver>,
    health: Health,
    counters: Counters,
    limit: u64,
    bases: Option<usize>,
    free_floor: u64,
    /// Bytes of cached blocks, and of blocks that are being inserted.
    used: AtomicU64,
    generation: AtomicU64,
    /// Bytes that were inserted or used again in this generation.
    moved: AtomicU64,
    /// Bytes that were inserted since the last sync.
    unsynced: AtomicU64,
    /// Files were created or removed since the last sync of the directory.
    names: AtomicBool,
    /// The directory was read; until then the cache writes nothing.
    loaded: AtomicBool,
    first_load: FirstLoad,
    /// All blocks that an earlier worker left are indexed; until then nothing is evicted to make room.
    indexed: AtomicBool,
    /// A clock for uses of sources: incremented at each use.
    uses: AtomicU64,
    /// One eviction at a time.
    sweep: Mutex<()>,
    open: Arc<OpenFiles>,
    unreadable: UnreadableSources,
    /// Incremented when a source becomes or ceases to be one of verified contents.
    verified_epoch: AtomicU64,
}

impl Shared {
    /// A source became or ceased to be one of verified contents.
    fn verified_changed(&self) {
        self.verified_epoch.fetch_add(1, Ordering::Release);
    }

    fn looked_up(&self, wanted: u64, found: u64) {
        count(&self.counters.hits, found);
        count(&self.counters.misses, wanted - found);
    }

    /// Notes that files of a source cannot be read now.
    fn note_unreadable(&self, key: &SourceKey, error: &io::Error) {
        self.note_failed_read(key, error, false);
    }

    /// Notes that a source cannot be loaded now, so that nothing may be written over its files.
    fn note_unloaded(&self, key: &SourceKey, error: &io::Error) {
        self.note_failed_read(key, error, true);
    }

    fn note_failed_read(&self, key: &SourceKey, error: &io::Error, unloaded: bool) {
        let short = matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE));
        let advice = if short { "; raise the limit of open files (ulimit -n, LimitNOFILE)" } else { "" };
        let why = format!("its files cannot be read: {error}{advice}; plyfs keeps them and tries again");
        if self.unreadable.note(*key, why.clone(), unloaded, self.health.ticks()) {
            tracing::warn!(%key, why, "a source of the cache is unreadable");
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

    /// Counts a failed write of the storage, and stops inserts for a while.
    fn write_failed(&self, what: &str, error: &io::Error) {
        count(&self.counters.write_errors, 1);
        self.degrade(&format!("{what}: {error}"));
    }

    fn degrade(&self, why: &str) {
        if self.health.failed(why) {
            let dir = self.medium.root().join(DIR);
            tracing::warn!(cache = %dir.display(), why, "the cache takes no new blocks until this is over; reads of other blocks go to the source");
            self.watch.degraded(Some(why));
        } else {
            tracing::debug!(why, "the cache takes no new blocks");
        }
    }

    fn worked(&self) {
        if self.health.worked() {
            tracing::info!("the cache takes new blocks again");
            self.watch.degraded(None);
        }
    }

    fn report_evicted(&self, key: &SourceKey, blocks: u64, bytes: u64, reason: EvictReason) {
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
    damaged: OnDamage,
    /// Sources that are not fully indexed.
    queue: Mutex<scan::Queue>,
    /// Sources with damaged headers that wait for [`settle_damaged`](Self::settle_damaged), and the damage.
    bad: Mutex<HashMap<SourceKey, String>>,
    me: Weak<Self>,
}

impl DiskCache {
    /// Opens the directory `cache` of a medium. The medium must not be one that spends the store's reserve. Never fails:
    /// when the directory cannot be used, the cache tries again later and stores nothing until then. The caller must
    /// arrange for [`DiskCache::tick`] about once a second; see [`DiskCache::start`].
    pub fn open(medium: Arc<dyn Medium>, limits: Limits, watch: Arc<dyn CacheObserver>) -> Arc<Self> {
        let cache = Self::prepare(medium, limits, watch, OnDamage::Drop);
        cache.load_first();
        while cache.scan_step() {}
        cache
    }

    /// As [`open`](Self::open), but touches no file: the thread of [`DiskCache::start`] reads the files. Reads wait until
    /// it has read names and headers.
    pub fn prepare(
        medium: Arc<dyn Medium>,
        limits: Limits,
        watch: Arc<dyn CacheObserver>,
        damaged: OnDamage,
    ) -> Arc<Self> {
        let total = medium.space().unwrap_or(Space { total: 0, free: 0, available: 0 }).total;
        let shared = Shared {
            open: OpenFiles::new(medium.clone()),
            unreadable: UnreadableSources::default(),
            verified_epoch: AtomicU64::new(1),
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
            // One key stands for one contents, so one of the sizes is wrong. The older contents are dropped.
            let bytes = old.detach(EvictReason::Changed);
            tracing::warn!(%key, bytes, from = old.size(), to = size, "the cached blocks of a source whose size changed were dropped");
        }
    }

    /// Drops all cached blocks of a source, its files and its pin. A holder of the source may go on and starts empty.
    pub fn remove(&self, key: &SourceKey) {
        self.wait_for_load();
        let source = self.find(key);
        if let Some(source) = source {
            source.reset(EvictReason::Asked);
            self.shared.health.retry_now();
            // Only the table and this call hold it.
            let mut table = self.table.lock();
            if Arc::strong_count(&source) <= 2 && source.cached_bytes() == 0 {
                table.remove(key);
            }
        }
    }

    /// A source that is in the table. Does not add one.
    pub fn find(&self, key: &SourceKey) -> Option<Arc<CachedSource>> {
        self.table.lock().get(key).cloned()
    }

    /// Why the cached blocks of a source cannot be read now.
    pub fn trouble(&self, key: &SourceKey) -> Option<String> {
        self.shared.unreadable.why(key)
    }

    /// Sources that have cached blocks, are pinned or are attached.
    pub fn sources(&self) -> Vec<Arc<CachedSource>> {
        self.table.lock().values().cloned().collect()
    }

    /// The counters and the state.
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
                .unreadable
                .list()
                .into_iter()
                .map(|(key, why)| format!("{key}: {why}"))
                .collect(),
        }
    }

    /// Makes all cached blocks durable, so that a power cut afterwards costs no fetch.
    ///
    /// # Errors
    /// The first error of the storage; the other sources are synced all the same.
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

    /// Periodic work: syncs, the bounds, the index of blocks that an earlier worker left, another attempt after a
    /// failure. The caller must call it about once a second, because ticks measure time.
    pub fn tick(&self) {
        while self.scan_step() {}
        self.tick_once(true);
    }

    /// One tick; with `punch`, it also punches out stray bytes, which takes long while a source is not fully indexed.
    fn tick_once(&self, punch: bool) {
        let shared = &self.shared;
        let now = shared.health.tick();
        if !shared.loaded.load(Ordering::Acquire) {
            if !shared.first_load.is_pending() && shared.health.may_write() {
                self.load();
            }
            return;
        }
        self.load_due();
        if punch {
            self.punch_stray_bytes();
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
