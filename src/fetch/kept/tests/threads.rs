//! Concurrent reads, inserts, evictions and syncs on the host's own filesystem: every byte returned is right, and no
//! block that is being changed counts as damaged.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use super::*;
use crate::io::HostMedium;

const SIZE: u64 = 300 * CACHE_BLOCK - 77;

/// Guards D30, D32.
#[test]
fn concurrent_reads_inserts_and_evictions_return_only_right_bytes() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let limits = Limits { bytes: Some(200 * CACHE_BLOCK), bases: None, free_floor: 0 };
    let (cache, observed) = open_with(HostMedium::new(dir.path()).unwrap(), limits);
    let (done, hits) = (AtomicBool::new(false), AtomicU64::new(0));
    let run = |what: &(dyn Fn(&mut Rng, &CachedSource) + Sync), seed: u64, rounds: u64| {
        let mut rng = Rng::new(seed);
        for round in 0.. {
            if (rounds > 0 && round == rounds) || (rounds == 0 && done.load(Ordering::Relaxed)) {
                return;
            }
            let source = cache.attach(key(rng.below(2) as u8), SIZE);
            what(&mut rng, &source);
        }
    };
    let range = |rng: &mut Rng| {
        let first = rng.below(300);
        (first, (1 + rng.below(40)).min(300 - first))
    };
    thread::scope(|scope| {
        for seed in 0..3 {
            let read = |rng: &mut Rng, source: &CachedSource| {
                let (first, some) = range(rng);
                hits.fetch_add(get(source, first, some), Ordering::Relaxed);
            };
            scope.spawn(move || run(&read, seed, 0));
        }
        scope.spawn(|| run(&|_, _| cache.tick(), 50, 0));
        let writers: Vec<_> = (10..12)
            .map(|seed| {
                let write = |rng: &mut Rng, source: &CachedSource| {
                    let (first, some) = range(rng);
                    if rng.chance(2) {
                        source.evict(EvictReason::Asked);
                    } else if rng.chance(1) {
                        cache.remove(source.key());
                    } else {
                        put(source, first, some);
                    }
                };
                scope.spawn(move || run(&write, seed, 2500))
            })
            .collect();
        writers.into_iter().for_each(|w| w.join().unwrap());
        done.store(true, Ordering::Relaxed);
    });
    let stats = cache.stats();
    assert_eq!((stats.corrupt_blocks, stats.read_errors, stats.write_errors), (0, 0, 0), "{stats:?}");
    assert!(hits.load(Ordering::Relaxed) > 1000 && stats.evictions > 1000, "{stats:?}");
    assert!(observed.evicted_bytes(EvictReason::Space) > 0 && observed.evicted_bytes(EvictReason::Asked) > 0);
    let sum: u64 = cache.sources().iter().map(|s| s.cached_bytes()).sum();
    assert_eq!(stats.used_bytes, sum);
    cache.flush().unwrap();
    drop(cache);
    assert_eq!(check(&HostMedium::new(dir.path()).unwrap(), Checksums::Compare, Repair::No).unwrap(), []);
}

/// Guards D31.
#[test]
fn a_read_of_cached_blocks_waits_for_no_insert_eviction_or_sync() {
    use crate::io::sim::{Call, Stage};
    let medium = SimMedium::new(1);
    let cache = open(&medium);
    let source = cache.attach(key(1), SIZE);
    put(&source, 0, 10);
    for call in [Call::Write, Call::Punch, Call::SyncData] {
        // During each call on the medium another thread reads. The call goes on only when that read is done.
        let (reader, seen) = (source.clone(), Arc::new(AtomicU64::new(0)));
        let count = seen.clone();
        medium.set_hook(Some(Arc::new(move |event| {
            if event.call == call && event.stage == Stage::Before {
                let reader = reader.clone();
                let got = thread::spawn(move || get(&reader, 0, 5)).join().unwrap();
                assert_eq!(got, 5);
                count.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        })));
        put(&source, 100, 70);
        cache.flush().unwrap();
        let victims: Vec<_> = (100..170).map(|block| (block, None)).collect();
        let files = source.index.lock().files.clone().unwrap();
        source.drop_blocks(&mut source.writer.lock(), &files.get().unwrap(), &victims);
        medium.set_hook(None);
        assert!(seen.load(Ordering::Relaxed) > 0, "{call:?}");
    }
}
