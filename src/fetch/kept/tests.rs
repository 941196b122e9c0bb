//! Tests of the persistent cache: a block has the bytes that were inserted, or is missing.

mod bounds;
mod contents;
mod damage;
mod faults;
mod model;
mod power;
mod scan;
mod threads;
mod unreadable;

use std::sync::Arc;

use parking_lot::Mutex;

use super::*;
use crate::io::sim::{Rng, SimMedium};

const BLOCK: usize = CACHE_BLOCK as usize;
const ROOM: Limits = Limits { bytes: Some(1 << 30), bases: None, free_floor: 0 };

/// An observer that records the events of the cache.
#[derive(Default)]
struct Observed {
    evicted: Mutex<Vec<(SourceKey, u64, EvictReason)>>,
    degraded: Mutex<Vec<Option<String>>>,
}

impl CacheObserver for Observed {
    fn evicted(&self, key: &SourceKey, bytes: u64, reason: EvictReason) {
        self.evicted.lock().push((*key, bytes, reason));
    }
    fn degraded(&self, why: Option<&str>) {
        self.degraded.lock().push(why.map(str::to_owned));
    }
}

impl Observed {
    /// Bytes that were evicted for a reason.
    fn evicted_bytes(&self, reason: EvictReason) -> u64 {
        self.evicted.lock().iter().filter(|(.., why)| *why == reason).map(|(_, bytes, _)| bytes).sum()
    }
    fn degradations(&self) -> Vec<Option<String>> {
        self.degraded.lock().clone()
    }
}

fn key(n: u8) -> SourceKey {
    SourceKey([n; 32])
}

/// The right bytes of `blocks` blocks, from block `first` on, of the source with a key.
fn contents(key: &SourceKey, size: u64, first: u64, blocks: u64) -> Vec<u8> {
    let mut out = Vec::new();
    for block in first..first + blocks {
        let len = CACHE_BLOCK.min(size - block * CACHE_BLOCK) as usize;
        let mut rng = Rng::new(u64::from(key.0[0]) << 32 | block);
        let end = out.len() + len;
        while out.len() < end {
            out.extend_from_slice(&rng.number().to_le_bytes());
        }
        out.truncate(end);
    }
    out
}

fn open_with(medium: impl Medium + 'static, limits: Limits) -> (Arc<DiskCache>, Arc<Observed>) {
    let observed = Arc::new(Observed::default());
    (DiskCache::open(Arc::new(medium), limits, observed.clone()), observed)
}

fn open(medium: &SimMedium) -> Arc<DiskCache> {
    open_with(medium.clone(), ROOM).0
}

/// Inserts the right bytes of some blocks.
fn put(source: &CachedSource, first: u64, blocks: u64) {
    source.insert(first, &contents(source.key(), source.size(), first, blocks));
}

/// Reads, and asserts that the bytes are right. Returns the number of blocks read.
fn get(source: &CachedSource, first: u64, blocks: u64) -> u64 {
    let right = contents(source.key(), source.size(), first, blocks);
    let mut buf = vec![0xee; right.len()];
    let got = source.read(first, &mut buf) as u64;
    assert!(got <= blocks);
    let len = right.len().min(got as usize * BLOCK);
    assert!(buf[..len] == right[..len], "wrong bytes in {got} blocks from {first} of {:?}", source.key());
    if let Some(now) = source.read_sound_now(first, source.blocks_in(first, buf.len()), &mut buf, None) {
        assert!(now <= blocks);
        let len = right.len().min(now as usize * BLOCK);
        assert!(buf[..len] == right[..len], "wrong bytes at once in {now} blocks from {first}");
    }
    got
}

/// The blocks that can be read, one by one.
fn readable(source: &CachedSource) -> Vec<u64> {
    (0..source.blocks()).filter(|block| get(source, *block, 1) == 1).collect()
}

#[test]
fn a_read_returns_inserted_blocks_and_no_others() {
    let medium = SimMedium::new(1);
    let cache = open(&medium);
    let source = cache.attach(key(1), 100 * CACHE_BLOCK + 5);
    assert_eq!((source.blocks(), get(&source, 0, 3), source.missing_run(0, 1000)), (101, 0, 101));
    put(&source, 10, 5);
    put(&source, 60, 10);
    put(&source, 100, 1);
    assert_eq!((get(&source, 9, 3), get(&source, 10, 8), get(&source, 12, 2)), (0, 5, 2));
    let mut buf = vec![0; 8 * BLOCK];
    let mut at_once = |first, blocks: u64| source.read_sound_now(first, blocks, &mut buf, None);
    assert_eq!((at_once(9, 3), at_once(10, 8), at_once(12, 2)), (Some(0), Some(5), Some(2)));
    assert_eq!((source.contains_now(9), source.contains_now(10)), (Some(false), Some(true)));
    assert_eq!(
        (get(&source, 60, 20), get(&source, 100, 1)),
        (10, 1),
        "across the end of a chunk, and the short last block"
    );
    assert_eq!(
        (source.missing_run(0, 1000), source.missing_run(15, 1000), source.missing_run(15, 7)),
        (10, 45, 7)
    );
    assert_eq!(
        (source.present_run(10, 1000), source.present_run(60, 1000), source.present_run(0, 9)),
        (5, 10, 0)
    );
    assert_eq!(
        (source.present_run(100, 9), source.missing_run(101, 9), source.missing_run(100, 9)),
        (1, 0, 0)
    );
    assert_eq!(
        (source.next_present(0), source.next_present(15), source.next_present(71)),
        (Some(10), Some(60), Some(100))
    );
    assert_eq!(
        (source.next_missing(0), source.next_missing(10), source.next_missing(100)),
        (Some(0), Some(15), None)
    );
    assert!(source.contains(64) && !source.contains(70) && !source.contains(1 << 40));
    assert_eq!(source.cached_bytes(), 15 * CACHE_BLOCK + 5);
    assert!(!source.is_complete());
    put(&source, 0, 101);
    assert!(source.is_complete());
    assert_eq!(get(&source, 0, 101), 101);
    let stats = cache.stats();
    assert_eq!((stats.used_bytes, stats.insertions, stats.bases), (source.size(), 101, 1));
    assert_eq!(stats.corrupt_blocks + stats.read_errors + stats.write_errors + stats.evictions, 0);
    assert!(stats.hits > 100 && stats.misses > 10);
    assert_eq!(stats.degraded, None);
}

#[test]
fn sources_of_one_key_share_blocks_and_keys_do_not_mix() {
    let medium = SimMedium::new(1);
    let cache = open(&medium);
    let (a, again, b) =
        (cache.attach(key(1), 1 << 20), cache.attach(key(1), 1 << 20), cache.attach(key(2), 1 << 20));
    put(&a, 0, 4);
    assert_eq!((get(&again, 0, 4), get(&b, 0, 4)), (4, 0));
    put(&b, 2, 4);
    assert_eq!((get(&a, 0, 9), get(&b, 2, 9)), (4, 4));
    cache.remove(&key(1));
    assert_eq!((get(&a, 0, 4), get(&b, 2, 9)), (0, 4));
    put(&again, 0, 1);
    assert_eq!(get(&a, 0, 4), 1, "a holder of the removed source goes on");
}

#[test]
fn the_next_worker_finds_the_blocks_of_this_one() {
    let medium = SimMedium::new(1);
    for sync in [true, false] {
        let cache = open(&medium);
        let source = cache.attach(key(1), 70 * CACHE_BLOCK - 1);
        put(&source, 0, 3);
        put(&source, 62, 8);
        source.pin(true);
        if sync {
            cache.flush().unwrap();
        }
        drop((source, cache));
        // As after a kill: nothing is synced or closed.
        let cache = open(&medium);
        assert_eq!(cache.stats().used_bytes, 11 * CACHE_BLOCK - 1);
        let source = cache.attach(key(1), 70 * CACHE_BLOCK - 1);
        assert!(source.is_pinned());
        assert_eq!((get(&source, 0, 9), get(&source, 62, 8)), (3, 8));
        let stats = cache.stats();
        assert_eq!((stats.corrupt_blocks, stats.insertions), (0, 0));
    }
}

#[test]
fn a_source_without_cached_blocks_has_no_files() {
    let medium = SimMedium::new(1);
    let cache = open(&medium);
    let source = cache.attach(key(1), 1 << 30);
    let files = || medium.list(DIR).unwrap().len();
    assert_eq!(files(), 0);
    put(&source, (1 << 16) - 1, 1);
    assert_eq!((get(&source, (1 << 16) - 1, 1), files()), (1, 2));
    assert_eq!(source.evict(EvictReason::Asked), CACHE_BLOCK);
    assert_eq!(files(), 0);
}

#[test]
fn a_verified_source_is_complete_and_loses_the_note_with_any_block() {
    let medium = SimMedium::new(1);
    let cache = open(&medium);
    let source = cache.attach(key(1), 5 * CACHE_BLOCK);
    put(&source, 0, 4);
    source.set_verified(true);
    assert!(!source.is_verified(), "the source is not complete");
    put(&source, 4, 1);
    assert!(!source.is_verified());
    source.set_verified(true);
    assert!(source.is_verified());
    let cut = medium
        .crash(&mut Rng::new(1), crate::io::sim::Keep { sectors: 0, lengths: 0, entries: 0, stale: false });
    drop((source, cache));
    assert!(!open(&cut).attach(key(1), 5 * CACHE_BLOCK).is_verified(), "the names were not synced");
    let cache = open(&medium);
    let source = cache.attach(key(1), 5 * CACHE_BLOCK);
    assert!(source.is_verified());
    source.set_verified(false);
    assert!(!source.is_verified());
    source.set_verified(true);
    source.evict(EvictReason::Asked);
    put(&source, 0, 5);
    assert!(source.is_complete() && !source.is_verified());
    drop((source, cache));
    assert!(!open(&medium).attach(key(1), 5 * CACHE_BLOCK).is_verified());
}

/// Guards D33.
#[test]
fn an_unsynced_clearing_of_verified_survives_a_kill_and_a_power_cut() {
    use crate::io::sim::{Call, Keep, Stage};
    let size = 5 * CACHE_BLOCK;
    let medium = SimMedium::new(1);
    let cache = open(&medium);
    let source = cache.attach(key(1), size);
    put(&source, 0, 5);
    cache.flush().unwrap();
    source.set_verified(true);
    let killed = Arc::new(Mutex::new(None));
    let (at_sync, now) = (killed.clone(), medium.clone());
    medium.set_hook(Some(Arc::new(move |event| {
        if (event.call, event.stage) == (Call::SyncData, Stage::Before) {
            at_sync.lock().get_or_insert_with(|| now.fork());
        }
        Ok(())
    })));
    source.evict(EvictReason::Asked);
    medium.set_hook(None);
    let medium = killed.lock().take().unwrap();
    let source = open(&medium).attach(key(1), size);
    assert!(source.is_complete() && !source.is_verified());
    let files = source.index.lock().files.clone().unwrap().get().unwrap();
    source.drop_blocks(&mut source.writer.lock(), &files, &[(3, None)]);
    for seed in 0..300 {
        let keep = Keep { sectors: 50, lengths: 100, entries: 100, stale: false };
        let source = open(&medium.crash(&mut Rng::new(seed), keep)).attach(key(1), size);
        assert!(!source.is_verified() || get(&source, 0, 5) == 5, "seed {seed}");
    }
}

#[test]
fn a_key_with_another_size_starts_empty() {
    let medium = SimMedium::new(1);
    let (cache, observed) = open_with(medium.clone(), ROOM);
    let old = cache.attach(key(1), 8 * CACHE_BLOCK);
    put(&old, 0, 8);
    let new = cache.attach(key(1), 9 * CACHE_BLOCK);
    assert_eq!(
        (get(&new, 0, 9), get(&old, 0, 8), observed.evicted_bytes(EvictReason::Changed)),
        (0, 0, 8 * CACHE_BLOCK)
    );
    put(&old, 0, 8);
    assert_eq!(get(&old, 0, 8), 0, "a replaced source takes no blocks");
    put(&new, 0, 9);
    assert_eq!(get(&new, 0, 9), 9);
}

#[test]
fn the_ticker_ticks_and_ends() {
    let cache = open(&SimMedium::new(1));
    let ticker = cache.start().unwrap();
    let begin = std::time::Instant::now();
    while cache.shared.health.ticks() == 0 {
        assert!(begin.elapsed().as_secs() < 60);
        std::thread::yield_now();
    }
    drop(ticker);
    let ticks = cache.shared.health.ticks();
    assert_eq!(Arc::strong_count(&cache), 1, "the thread has ended");
    assert_eq!(cache.shared.health.ticks(), ticks);
}
