//! Further copies of the cached blocks of bases, in pools, which lie on other drives than the cache.
//!
//! Each pool has a cache of its own, of the same form as that of the store; a file of a base is in the pools that come
//! first for it (`ranked`). The cache of the store is what readers fill; a thread for each pool (`keeper`) copies its
//! blocks there, and back when the cache has lost some. What must hold:
//! - A block that a copy delivers was in the cache under the same number of the base's copies (D101). The number is a
//!   part of the key. It changes when the base's blocks are dropped, so what a drive that was away still has is never
//!   read again.
//! - Copying is suspended while the blocks of a base are dropped: no copy brings them back (D102).
//! - A pool that hangs or fails delays no reader that another place can serve, no other pool, and no command.
//!
//! Locks: a pool's `looking`, then `suspended`, then `files`, then a file's `state`. A file's `healing` is held while
//! blocks are written to the cache; `state` is inside it.

mod keeper;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use sha2::{Digest as _, Sha256};

use super::lane::Lane;
use super::sources::{FileKey, HostSources};
use crate::config::Config;
use crate::fetch::kept::{
    CacheObserver, Contents, DiskCache, DiskCacheStats, EvictReason, FileKeys, Limits, OnDamage, Reach,
    SourceKey, Ticker, default_free_floor,
};
use crate::fetch::{FurtherCopies, Place, TimedReads};
use crate::format::record::KeptCopies;
use crate::source::Spawn;
use crate::store::pools::PoolDir;
use crate::store::{BaseNode, Store, StoreError};

pub use keeper::Keeper;

/// Threads that read from one pool.
const READERS: usize = 4;

/// The bounds of the copies in each pool: those of the cache in the store.
#[derive(Debug, Clone, Copy, Default)]
pub struct CopyLimits {
    /// See [`Limits::bytes`].
    pub bytes: Option<u64>,
    /// See [`Limits::free_floor`].
    pub free_floor: Option<u64>,
    /// Bytes per second that are copied; `None`: without a bound.
    pub rate: Option<u64>,
}

impl CopyLimits {
    /// Those of the configuration.
    pub fn of(config: &Config) -> Self {
        Self { bytes: config.cache_disk, free_floor: config.cache_disk_free, rate: config.hydrate.rate }
    }
}

/// The copies in one pool.
pub(super) struct CopyPool {
    pub number: u64,
    pub name: String,
    pub cache: Arc<DiskCache>,
    timed_reads: Arc<TimedReads>,
    /// Held by its keeper while that looks at the bases.
    looking: Mutex<()>,
    /// Drives the cache until it is dropped.
    _ticker: Ticker,
}

/// What a pool has of a base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyView {
    /// Name of the pool.
    pub pool: String,
    /// Bytes of the base that are there.
    pub bytes: u64,
    /// Whether it has all that the cache has.
    pub is_current: bool,
    /// Why it takes no blocks, or cannot be read.
    pub trouble: Option<String>,
}

/// The copies of one file of a base.
#[derive(Default)]
pub(super) struct FileCopies {
    /// What its readers ask.
    pub further: Arc<FurtherCopies>,
    state: Mutex<FileState>,
    /// Held while blocks of a copy are written to the cache.
    healing: Mutex<()>,
}

#[derive(Default)]
struct FileState {
    /// The key of the copies; `None`: there are none now.
    key: Option<SourceKey>,
    /// By number of the pool.
    places: Vec<(u64, Arc<Contents>)>,
    /// Pools that had all that the cache has when they were compared last.
    current: HashSet<u64>,
}

/// See the module.
pub struct Copies {
    limits: CopyLimits,
    spawn: Arc<dyn SpawnIn>,
    pools: RwLock<Vec<Arc<CopyPool>>>,
    files: Mutex<HashMap<FileKey, Arc<FileCopies>>>,
    /// Bases whose blocks are being dropped, and how many calls do so.
    suspended: Mutex<HashMap<u64, usize>>,
}

/// Makes what runs the reads of a lane.
pub(super) trait SpawnIn: Send + Sync {
    fn of(&self, lane: Arc<Lane>) -> Arc<dyn Spawn>;
}

/// The copies of a base are not used while this is held.
pub(super) struct Suspended<'a> {
    copies: &'a Copies,
    base: u64,
}

impl Drop for Suspended<'_> {
    fn drop(&mut self) {
        let mut suspended = self.copies.suspended.lock();
        if let Some(calls) = suspended.get_mut(&self.base) {
            *calls -= 1;
            if *calls == 0 {
                suspended.remove(&self.base);
            }
        }
    }
}

/// Reports what happens to a pool's copies. Their evictions count for no base: the blocks are in the cache.
struct Watcher {
    pool: String,
}

impl CacheObserver for Watcher {
    fn evicted(&self, _: &SourceKey, _: u64, _: EvictReason) {}
    fn degraded(&self, why: Option<&str>) {
        let pool = &self.pool;
        match why {
            Some(why) => {
                tracing::error!(pool, why, "a pool takes no copies of fetched blocks until this is over")
            }
            None => tracing::info!(pool, "a pool takes copies of fetched blocks again"),
        }
    }
}

/// The key of the copies of a file whose blocks the cache has under `own` (D101).
fn key_of_copies(own: &SourceKey, number: u64) -> SourceKey {
    let sum = Sha256::new().chain_update(b"copies").chain_update(own.0).chain_update(number.to_le_bytes());
    SourceKey(sum.finalize().into())
}

/// The place of a pool among the pools of a file: the smallest come first. Another pool moves no other one.
fn rank(own: &SourceKey, pool: u64) -> [u8; 32] {
    Sha256::new().chain_update(own.0).chain_update(pool.to_le_bytes()).finalize().into()
}

/// These pools in the order in which a file is put in them.
fn ranked(own: &SourceKey, pools: &[Arc<CopyPool>]) -> Vec<Arc<CopyPool>> {
    let mut pools = pools.to_vec();
    pools.sort_by_cached_key(|pool| rank(own, pool.number));
    pools
}

impl Copies {
    pub(super) fn new(limits: CopyLimits, spawn: Arc<dyn SpawnIn>) -> Self {
        Self { limits, spawn, pools: RwLock::default(), files: Mutex::default(), suspended: Mutex::default() }
    }

    /// Whether this daemon caches anything.
    pub(super) fn is_on(&self) -> bool {
        self.limits.bytes != Some(0)
    }

    /// Opens the copies in a pool. Reads no file: a thread does.
    ///
    /// # Errors
    /// When no thread can be started.
    fn open(&self, dir: PoolDir) -> io::Result<Arc<CopyPool>> {
        let PoolDir { number, name, medium } = dir;
        let total = medium.space().map_or(0, |space| space.total);
        let limits = Limits {
            bytes: self.limits.bytes,
            bases: None,
            free_floor: self.limits.free_floor.unwrap_or_else(|| default_free_floor(total)),
        };
        let watch = Arc::new(Watcher { pool: name.clone() });
        let cache = DiskCache::prepare(medium, limits, watch, OnDamage::Drop);
        let ticker = cache.start()?;
        let timed_reads = TimedReads::new(self.spawn.of(Lane::new("copy-read", READERS)));
        let looking = Mutex::new(());
        let pool = Arc::new(CopyPool { number, name, cache, timed_reads, looking, _ticker: ticker });
        self.pools.write().push(pool.clone());
        Ok(pool)
    }

    fn pool(&self, number: u64) -> Option<Arc<CopyPool>> {
        self.pools.read().iter().find(|pool| pool.number == number).cloned()
    }

    /// Stops using a pool that is in the list no more.
    fn close(&self, number: u64) {
        self.pools.write().retain(|pool| pool.number != number);
        for file in self.files.lock().values() {
            let mut state = file.state.lock();
            state.places.retain(|(pool, _)| *pool != number);
            state.current.remove(&number);
            file.publish(&state, self);
        }
    }

    /// What readers of a file ask. The list follows what [`refresh`](Self::refresh) learns.
    pub(super) fn of(&self, base: u64, own: SourceKey) -> Arc<FileCopies> {
        self.files.lock().entry((base, own)).or_default().clone()
    }

    /// Lets readers of a file use the copies that its base is to have.
    pub(super) fn refresh(&self, base: u64, keys: &FileKeys, wanted: Option<KeptCopies>) -> Arc<FileCopies> {
        let file = self.of(base, keys.own);
        let suspended = self.suspended.lock();
        let wanted = wanted.filter(|_| !suspended.contains_key(&base));
        let key = wanted.map(|wanted| key_of_copies(&keys.own, wanted.number));
        let mut state = file.state.lock();
        let pools = self.pools.read().clone();
        let is_known = |pool: &Arc<CopyPool>| state.places.iter().any(|(number, _)| *number == pool.number);
        if state.key == key && (key.is_none() || pools.iter().all(is_known)) {
            drop(state);
            return file;
        }
        if state.key != key {
            *state = FileState { key, ..FileState::default() };
        }
        if let Some(key) = key {
            for pool in ranked(&keys.own, &pools) {
                if !state.places.iter().any(|(number, _)| *number == pool.number) {
                    let keys = FileKeys { own: key, digest: None, size: keys.size };
                    state.places.push((pool.number, pool.cache.contents(keys)));
                }
            }
        }
        file.publish(&state, self);
        drop(state);
        file
    }

    /// Uses no copy of a base until the result is dropped, and waits for blocks that are being copied back. The caller
    /// drops the base's blocks meanwhile and gives its copies another number (D102).
    pub(super) fn suspend(&self, base: u64) -> Suspended<'_> {
        *self.suspended.lock().entry(base).or_default() += 1;
        for file in self.files_of(base) {
            let mut state = file.state.lock();
            *state = FileState::default();
            file.publish(&state, self);
            drop(state);
            drop(file.healing.lock());
        }
        Suspended { copies: self, base }
    }

    fn files_of(&self, base: u64) -> Vec<Arc<FileCopies>> {
        let files = self.files.lock();
        files.iter().filter(|((id, _), _)| *id == base).map(|(_, file)| file.clone()).collect()
    }

    /// Forgets a removed base. Its copies go when the keepers look next.
    pub(super) fn forget(&self, base: u64) {
        drop(self.suspend(base));
        self.files.lock().retain(|(id, _), _| *id != base);
    }

    /// Whether a file may have a copy.
    pub(super) fn may_have(&self, base: u64, own: SourceKey) -> bool {
        self.of(base, own).state.lock().key.is_some()
    }

    /// What the pools have of a base with these files.
    pub(super) fn view(&self, base: u64, files: &[FileKeys], wanted: KeptCopies) -> Vec<CopyView> {
        let mut views: Vec<CopyView> = Vec::new();
        let pools = self.pools.read().clone();
        let first = usize::from(wanted.count) - 1;
        for keys in files {
            let file = self.of(base, keys.own);
            let state = file.state.lock();
            for (place, pool) in ranked(&keys.own, &pools).iter().enumerate() {
                let Some((_, contents)) = state.places.iter().find(|(number, _)| *number == pool.number)
                else {
                    continue;
                };
                let bytes = contents.cached_bytes(Reach::Proven);
                if place >= first && bytes == 0 {
                    continue;
                }
                let is_current = state.current.contains(&pool.number);
                let trouble = pool.cache.stats().degraded.or_else(|| contents.trouble());
                match views.iter_mut().find(|view| view.pool == pool.name) {
                    Some(view) => {
                        view.bytes += bytes;
                        view.is_current &= is_current;
                        view.trouble = view.trouble.take().or(trouble);
                    }
                    None => views.push(CopyView { pool: pool.name.clone(), bytes, is_current, trouble }),
                }
            }
        }
        views
    }

    /// The state of the copies in each pool, by its name.
    pub fn stats(&self) -> Vec<(String, DiskCacheStats)> {
        self.pools.read().iter().map(|pool| (pool.name.clone(), pool.cache.stats())).collect()
    }
}

/// Drops blocks that these bases read. Their copies are not used meanwhile, and count as copies of nothing afterwards.
/// Returns also whether that was noted durably; when it was not, this worker uses no copy of those bases any more.
pub(super) fn dropping<T>(
    store: &Store,
    sources: &HostSources,
    bases: &[Arc<BaseNode>],
    drop_blocks: impl FnOnce() -> T,
) -> (T, Result<(), StoreError>) {
    let copied: Vec<_> = bases.iter().filter(|base| base.options().copies.is_some()).collect();
    let suspended: Vec<_> = copied.iter().map(|base| sources.copies().suspend(base.id())).collect();
    let mut all_noted = Ok(());
    let mut held = Vec::new();
    // Before a block goes: a worker that is killed in between has dropped nothing that a copy could bring back.
    for (base, suspended) in copied.into_iter().zip(suspended) {
        match another_number(store, base) {
            Ok(()) => held.push(suspended),
            Err(error) => {
                std::mem::forget(suspended);
                all_noted = Err(error);
            }
        }
    }
    let dropped = drop_blocks();
    drop(held);
    (dropped, all_noted)
}

/// Makes copies of nothing of all copies that a base has.
fn another_number(store: &Store, base: &BaseNode) -> Result<(), StoreError> {
    let number = store.new_number()?;
    base.set_options(|options| {
        if let Some(copies) = &mut options.copies {
            copies.number = number;
        }
    })
    .map(drop)
}

impl FileCopies {
    /// Tells readers where the copies are.
    fn publish(&self, state: &FileState, copies: &Copies) {
        let place = |(number, contents): &(u64, Arc<Contents>)| {
            Some(Place::new(contents.clone(), copies.pool(*number)?.timed_reads.clone()))
        };
        self.further.set(state.places.iter().filter_map(place).collect());
    }
}
