//! The bounds on bytes, free space and the number of sources: what is evicted, what stays, and when eviction gives up.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::io::{MediumFile, Open, Space};

/// A small filesystem that other programs write to as well.
#[derive(Clone)]
struct Tight {
    inner: SimMedium,
    total: u64,
    others: Arc<AtomicU64>,
}

impl Tight {
    fn new(blocks: u64) -> Self {
        Self { inner: SimMedium::new(1), total: blocks * CACHE_BLOCK, others: Arc::default() }
    }
    /// Bytes of cached blocks.
    fn used(&self) -> u64 {
        let names = self.inner.list(DIR).unwrap_or_default();
        let blocks = names.iter().filter(|name| name.ends_with(".blocks"));
        blocks
            .map(|n| self.inner.open(&format!("{DIR}/{n}"), Open::Existing).unwrap().allocated().unwrap())
            .sum()
    }
}

impl Medium for Tight {
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn MediumFile>> {
        self.inner.open(name, how)
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.inner.rename(from, to)
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.inner.remove(name)
    }
    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        self.inner.sync_dir(dir)
    }
    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        self.inner.list(dir)
    }
    fn make_dir(&self, dir: &str) -> io::Result<()> {
        self.inner.make_dir(dir)
    }
    fn never_waits(&self) -> bool {
        true
    }
    fn space(&self) -> io::Result<Space> {
        let used = self.used() + self.others.load(Ordering::Relaxed) * CACHE_BLOCK;
        let free = self.total.saturating_sub(used);
        Ok(Space { total: self.total, free, available: free })
    }
    fn root(&self) -> PathBuf {
        self.inner.root()
    }
}

fn limit(blocks: u64) -> Limits {
    Limits { bytes: Some(blocks * CACHE_BLOCK), bases: None, free_floor: 0 }
}

fn floor(blocks: u64) -> Limits {
    Limits { bytes: Some(1 << 30), bases: None, free_floor: blocks * CACHE_BLOCK }
}

const SIZE: u64 = 4096 * CACHE_BLOCK;

#[test]
fn the_least_recently_used_blocks_of_all_sources_go_first() {
    let medium = SimMedium::new(1);
    let (cache, observed) = open_with(medium, limit(10));
    let (a, b) = (cache.attach(key(1), SIZE), cache.attach(key(2), SIZE));
    for block in 0..5 {
        put(&a, block * 100, 1);
        put(&b, block * 100, 1);
    }
    assert_eq!(cache.stats().used_bytes, 10 * CACHE_BLOCK);
    // All blocks but two are used again.
    for block in [0, 1, 3, 4] {
        assert_eq!((get(&a, block * 100, 1), get(&b, block * 100, 1)), (1, 1));
    }
    put(&a, 1000, 1);
    put(&a, 1100, 1);
    assert_eq!(cache.stats().used_bytes, 10 * CACHE_BLOCK);
    assert!(!a.contains(200) && !b.contains(200));
    assert_eq!((a.cached_bytes(), b.cached_bytes()), (6 * CACHE_BLOCK, 4 * CACHE_BLOCK));
    assert_eq!((observed.evicted_bytes(EvictReason::Space), cache.stats().evictions), (2 * CACHE_BLOCK, 2));
}

#[test]
fn a_scan_does_not_evict_blocks_that_are_used_again_and_again() {
    let (cache, _) = open_with(SimMedium::new(1), limit(100));
    let (boot, scan) = (cache.attach(key(1), SIZE), cache.attach(key(2), SIZE));
    put(&boot, 0, 40);
    put(&scan, 3000, 40);
    assert_eq!(get(&boot, 0, 40), 40);
    for block in 0..1000 {
        put(&scan, block, 1);
    }
    assert_eq!(boot.cached_bytes(), 40 * CACHE_BLOCK);
    assert_eq!(cache.stats().used_bytes, 100 * CACHE_BLOCK);
    // But not for ever: other blocks that are used again replace them.
    for set in 0..6 {
        put(&scan, 2000 + set * 20, 20);
        assert_eq!(get(&scan, 2000 + set * 20, 20), 20);
    }
    assert!(boot.cached_bytes() < 10 * CACHE_BLOCK, "{}", boot.cached_bytes() / CACHE_BLOCK);
}

#[test]
fn the_ages_of_blocks_survive_a_restart() {
    let medium = SimMedium::new(1);
    let (cache, _) = open_with(medium.clone(), limit(20));
    let source = cache.attach(key(1), SIZE);
    for block in 0..20 {
        put(&source, block * 64, 1);
    }
    for block in 5..20 {
        assert_eq!(get(&source, block * 64, 1), 1);
    }
    cache.flush().unwrap();
    drop((source, cache));
    let (cache, _) = open_with(medium, limit(20));
    let source = cache.attach(key(1), SIZE);
    put(&source, 2000, 5);
    let left = (0..20).filter(|block| source.contains(block * 64)).collect::<Vec<_>>();
    assert_eq!(left, (5..20).collect::<Vec<_>>());
}

#[test]
fn ages_far_apart_keep_their_order() {
    let (cache, _) = open_with(SimMedium::new(1), limit(500));
    let source = cache.attach(key(1), SIZE);
    for block in 0..500 {
        put(&source, block, 1);
    }
    for _ in 0..400 {
        assert_eq!(get(&source, 7, 1), 1);
        cache.shared.moved(100 * CACHE_BLOCK);
    }
    put(&source, 1000, 1);
    assert_eq!(get(&source, 7, 1), 1);
    for block in 1001..1400 {
        put(&source, block, 1);
    }
    assert!(
        source.contains(7) && source.contains(1399),
        "blocks that were used all the time or just now stay"
    );
    assert_eq!(source.missing_run(8, 300), 300, "the others have the oldest age and are evicted");
}

/// Guards D34.
#[test]
fn random_use_never_exceeds_the_bound() {
    for seed in 0..10 {
        let mut rng = Rng::new(seed);
        let most = 1 + rng.below(150);
        let medium = Tight::new(1 << 20);
        let (mut cache, _) = open_with(medium.clone(), limit(most));
        for _ in 0..300 {
            let n = rng.below(4) as u8;
            let source = cache.attach(key(n), 300 * CACHE_BLOCK - u64::from(n));
            let first = rng.below(300);
            let some = (1 + rng.below(100)).min(300 - first);
            match rng.below(12) {
                0..7 => put(&source, first, some),
                7..10 => {
                    get(&source, first, some);
                }
                10 => cache.tick(),
                _ => {
                    drop((source, cache));
                    cache = open_with(medium.clone(), limit(most)).0;
                    continue;
                }
            }
            assert!(cache.stats().used_bytes <= most * CACHE_BLOCK, "seed {seed}");
            // The medium counts whole sectors, also for short last blocks.
            let (used, cached) = (medium.used(), cache.stats().used_bytes);
            assert!(
                used <= cached + 4 * 64,
                "seed {seed}: evicted blocks still take space: {used}, {cached}"
            );
            let sum: u64 = cache.sources().iter().map(|s| s.cached_bytes()).sum();
            assert_eq!(cache.stats().used_bytes, sum, "seed {seed}");
        }
        assert!(
            cache.stats().used_bytes * 2 > most * CACHE_BLOCK,
            "seed {seed}: the cache stays at least half full"
        );
        assert_eq!(cache.stats().corrupt_blocks, 0);
    }
}

#[test]
fn pinned_blocks_stay_and_an_eviction_that_finds_nothing_gives_up() {
    let (cache, observed) = open_with(SimMedium::new(1), limit(10));
    let (a, b) = (cache.attach(key(1), SIZE), cache.attach(key(2), SIZE));
    a.pin(true);
    put(&a, 0, 10);
    put(&b, 0, 1);
    assert_eq!((get(&a, 0, 10), get(&b, 0, 1)), (10, 0));
    let writes = cache.stats().write_errors;
    for block in 0..1000 {
        put(&b, block, 1);
    }
    assert_eq!(observed.degradations().len(), 1, "the failure is reported once");
    assert!(observed.degradations()[0].as_ref().unwrap().contains("no block may be evicted"));
    assert_eq!(cache.stats().degraded, observed.degradations()[0]);
    assert_eq!((cache.stats().write_errors, writes), (0, 0));
    a.pin(false);
    put(&b, 0, 3);
    assert_eq!((get(&b, 0, 3), a.cached_bytes()), (3, 7 * CACHE_BLOCK));
    assert_eq!((observed.degradations().len(), cache.stats().degraded), (2, None));
}

#[test]
fn a_bound_smaller_than_a_block_caches_nothing_and_is_no_failure() {
    for bytes in [0, CACHE_BLOCK - 1] {
        let (cache, observed) = open_with(SimMedium::new(1), Limits { bytes: Some(bytes), ..ROOM });
        let source = cache.attach(key(1), SIZE);
        put(&source, 0, 3);
        assert_eq!((get(&source, 0, 3), cache.stats().degraded), (0, None));
        assert_eq!(observed.degradations(), []);
    }
    let (cache, _) = open_with(SimMedium::new(1), limit(3));
    let source = cache.attach(key(1), SIZE);
    put(&source, 0, 64);
    assert!(cache.stats().used_bytes <= 3 * CACHE_BLOCK, "one insert is larger than the bound");
}

#[test]
fn a_lowered_bound_holds_after_a_tick() {
    let medium = SimMedium::new(1);
    let (cache, _) = open_with(medium.clone(), limit(100));
    put(&cache.attach(key(1), SIZE), 0, 100);
    drop(cache);
    let (cache, _) = open_with(medium, limit(30));
    cache.tick();
    assert_eq!(cache.stats().used_bytes, 30 * CACHE_BLOCK);
    assert_eq!(readable(&cache.attach(key(1), SIZE)).len(), 30);
}

/// Guards D34.
#[test]
fn an_unbounded_cache_leaves_the_floor_free() {
    let medium = Tight::new(100);
    let (cache, observed) = open_with(medium.clone(), floor(20));
    let source = cache.attach(key(1), SIZE);
    put(&source, 0, 200);
    assert!(
        medium.used() <= 80 * CACHE_BLOCK && medium.used() >= 16 * CACHE_BLOCK,
        "{}",
        medium.used() / CACHE_BLOCK
    );
    assert!(medium.space().unwrap().free >= 20 * CACHE_BLOCK);
    assert!(observed.evicted_bytes(EvictReason::Floor) > 0);
    // Other programs write.
    for block in 1000..1080 {
        put(&source, block, 1);
    }
    medium.others.store(50, Ordering::Relaxed);
    // The shortage exceeds the cache, and each tick sees only a part of it.
    (0..5).for_each(|_| cache.tick());
    assert!(medium.space().unwrap().free >= 20 * CACHE_BLOCK);
    assert!(medium.used() > 0);
    // Other programs take all space. Nothing is left to evict, which is reported once, until there is space again.
    medium.others.store(100, Ordering::Relaxed);
    (0..5).for_each(|_| cache.tick());
    assert_eq!(medium.used(), 0);
    for block in 0..100 {
        put(&source, block, 1);
        cache.tick();
    }
    assert_eq!((medium.used(), observed.degradations().len()), (0, 1));
    assert!(cache.stats().degraded.unwrap().contains("stay free"));
    medium.others.store(0, Ordering::Relaxed);
    for _ in 0..130 {
        cache.tick();
    }
    put(&source, 0, 1);
    assert_eq!((get(&source, 0, 1), cache.stats().degraded, observed.degradations().len()), (1, None, 2));
}

/// Guards D35.
#[test]
fn a_filesystem_that_frees_no_space_does_not_cost_the_whole_cache() {
    let medium = Tight::new(100);
    let (cache, _) = open_with(medium.clone(), floor(20));
    let source = cache.attach(key(1), SIZE);
    for block in 0..70 {
        put(&source, block, 1);
    }
    // Evictions free no space on this filesystem.
    let keep = Arc::new(AtomicU64::new(0));
    let (others, used) = (medium.others.clone(), keep.clone());
    medium.inner.set_hook(Some(Arc::new(move |event| {
        if event.call == crate::io::sim::Call::Punch && event.stage == crate::io::sim::Stage::After {
            others.fetch_add(1, Ordering::Relaxed);
            used.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    })));
    for block in 100..140 {
        put(&source, block, 1);
    }
    assert!(keep.load(Ordering::Relaxed) > 0, "the cache evicts some blocks");
    assert!(source.cached_bytes() > 60 * CACHE_BLOCK, "and gives up");
}

#[test]
fn the_number_of_sources_is_bounded() {
    let medium = SimMedium::new(1);
    let limits = Limits { bases: Some(2), ..ROOM };
    let (cache, observed) = open_with(medium.clone(), limits);
    let sources: Vec<_> = (1..=4).map(|n| cache.attach(key(n), SIZE)).collect();
    put(&sources[0], 0, 3);
    put(&sources[1], 0, 3);
    assert_eq!(get(&sources[0], 0, 3), 3);
    put(&sources[2], 0, 3);
    let here =
        |cache: &Arc<DiskCache>| (1..=4).map(|n| get(&cache.attach(key(n), SIZE), 0, 3)).collect::<Vec<_>>();
    assert_eq!((here(&cache), cache.stats().bases), (vec![3, 0, 3, 0], 2));
    assert_eq!(observed.evicted_bytes(EvictReason::Bases), 3 * CACHE_BLOCK);
    assert_eq!(medium.files().len(), 4);
    sources[0].pin(true);
    sources[2].pin(true);
    put(&sources[3], 0, 3);
    assert_eq!(here(&cache), [3, 0, 3, 0]);
    assert!(cache.stats().degraded.unwrap().contains("pinned"));
    sources[0].pin(false);
    put(&sources[3], 0, 3);
    assert_eq!((here(&cache), cache.stats().degraded), (vec![0, 0, 3, 3], None));
    let (cache, _) = open_with(SimMedium::new(1), Limits { bases: Some(0), ..ROOM });
    put(&cache.attach(key(1), SIZE), 0, 3);
    assert_eq!(cache.stats().used_bytes, 0);
}

#[test]
fn the_defaults_are_sane_on_any_filesystem() {
    let gib = |n: u64| n << 30;
    assert_eq!((default_bytes(gib(100)), default_free_floor(gib(100))), (gib(10), gib(5)));
    assert_eq!((default_bytes(gib(4000)), default_free_floor(gib(4000))), (gib(64), gib(200)));
    assert_eq!((default_bytes(gib(10)), default_free_floor(gib(10))), (gib(1), gib(1)));
    assert_eq!((default_bytes(64 << 20), default_free_floor(64 << 20)), ((64 << 20) / 10, 16 << 20));
    assert_eq!((default_bytes(0), default_free_floor(0)), (0, 0));
    let (cache, _) = open_with(Tight::new(1000), Limits { bytes: None, ..ROOM });
    assert_eq!(cache.stats().limit_bytes, 100 * CACHE_BLOCK);
}
