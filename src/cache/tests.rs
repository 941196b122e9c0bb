use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use proptest::prelude::{Strategy, any, prop, prop_oneof, proptest};

use super::{BLOCK, BlockCache, CacheId, Touch};

mod adoption;

const MIB: u64 = 1024 * 1024;

fn cache(limit: u64) -> BlockCache {
    BlockCache::new(limit).expect("address space for a test cache")
}

/// Bytes that are unique to this block of this base.
fn content(salt: u64, block: u64) -> Vec<u8> {
    let mut word = salt.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ block.wrapping_mul(0xd134_2543_de82_ef95);
    let mut bytes = Vec::with_capacity(BLOCK);
    while bytes.len() < BLOCK {
        word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn contents(salt: u64, first: u64, blocks: u64) -> Vec<u8> {
    (first..first + blocks).flat_map(|block| content(salt, block)).collect()
}

fn present(cache: &BlockCache, id: CacheId, blocks: impl Iterator<Item = u64>) -> usize {
    blocks.filter(|block| cache.contains(id, *block)).count()
}

/// Reads a block from the cache, and inserts it when it is missing, as a disk does.
fn use_block(cache: &BlockCache, id: CacheId, block: u64, buf: &mut [u8]) {
    if cache.read(id, block, buf, Touch::Use) == 0 {
        cache.insert(id, block, buf);
    }
}

#[test]
fn a_read_returns_inserted_blocks_up_to_the_first_miss() {
    let cache = cache(16 * MIB);
    let id = cache.register();
    cache.insert(id, 60, &contents(1, 60, 10));
    cache.insert(id, 71, &contents(1, 71, 1));

    let mut buf = vec![0xee; 13 * BLOCK];
    assert_eq!(cache.read(id, 60, &mut buf, Touch::Use), 10);
    assert_eq!(buf[..10 * BLOCK], contents(1, 60, 10));
    assert!(
        buf[10 * BLOCK..].iter().all(|byte| *byte == 0xee),
        "the part behind the first miss is unchanged"
    );
    assert_eq!(cache.read(id, 70, &mut buf, Touch::Use), 0);

    let mut part = [0; 100];
    assert!(cache.read_part(id, 71, 4000 - 4, &mut part, Touch::Use));
    assert_eq!(part[..], content(1, 71)[3996..4096]);
    assert!(!cache.read_part(id, 70, 0, &mut part, Touch::Use));

    assert_eq!(cache.missing_run(id, 60, 5), 0);
    assert_eq!(cache.missing_run(id, 70, 5), 1);
    assert_eq!(cache.missing_run(id, 0, 1000), 60);
    assert_eq!(cache.missing_run(id, 72, 300), 300);

    assert_eq!(cache.cached_bytes(id), 11 * BLOCK as u64);
    let stats = cache.stats();
    assert_eq!((stats.hits, stats.insertions, stats.evictions, stats.misses), (11, 11, 0, 0));
    cache.record_misses(3);
    assert_eq!(cache.stats().misses, 3);
}

#[test]
fn an_insert_of_a_present_block_overwrites_nothing() {
    let cache = cache(MIB);
    let id = cache.register();
    cache.insert(id, 5, &content(1, 5));
    cache.insert(id, 4, &contents(2, 4, 3));
    let mut buf = vec![0; 3 * BLOCK];
    assert_eq!(cache.read(id, 4, &mut buf, Touch::Use), 3);
    assert_eq!(buf, [content(2, 4), content(1, 5), content(2, 6)].concat());
}

#[test]
fn address_spaces_are_separate_and_forget_empties_one() {
    let cache = cache(16 * MIB);
    let (one, two) = (cache.register(), cache.register());
    assert_ne!(one, two);
    cache.insert(one, 0, &contents(1, 0, 500));
    cache.insert(two, 0, &contents(2, 0, 300));
    let mut buf = vec![0; 300 * BLOCK];
    assert_eq!(cache.read(two, 0, &mut buf, Touch::Use), 300);
    assert_eq!(buf, contents(2, 0, 300));

    cache.forget(one);
    cache.assert_consistent();
    assert_eq!(cache.cached_bytes(one), 0);
    assert_eq!(cache.cached_bytes(two), 300 * BLOCK as u64);
    assert_eq!(cache.read(one, 0, &mut buf, Touch::Use), 0);
    assert_eq!(cache.read(two, 0, &mut buf, Touch::Use), 300);
    assert_eq!(cache.stats().evictions, 0);

    // The space is free again.
    let three = cache.register();
    cache.insert(three, 0, &contents(3, 0, 500));
    assert_eq!(cache.cached_bytes(three), 500 * BLOCK as u64);
    cache.assert_consistent();
}

#[test]
fn a_scan_does_not_evict_the_working_set() {
    for limit in [8 * MIB, 64 * MIB] {
        let cache = cache(limit);
        let (hot, scanned) = (cache.register(), cache.register());
        let capacity = cache.capacity_blocks() as u64;
        let hot_blocks = capacity / 2;
        let mut buf = vec![0; BLOCK];
        for _ in 0..2 {
            for block in 0..hot_blocks {
                use_block(&cache, hot, block, &mut buf);
            }
        }
        // A scan with reads of half a block. The second half continues in a block that was used already.
        for block in 0..capacity * 10 {
            use_block(&cache, scanned, block, &mut buf);
            assert!(cache.read_part(scanned, block, 2048, &mut buf[2048..], Touch::Repeat));
        }
        let left = present(&cache, hot, 0..hot_blocks) as u64;
        assert!(left * 10 >= hot_blocks * 9, "{left} of {hot_blocks} hot blocks are left of {limit} bytes");
        cache.assert_consistent();
    }
}

#[test]
fn a_scan_with_readahead_does_not_evict_the_working_set() {
    let cache = cache(16 * MIB);
    let (hot, scanned) = (cache.register(), cache.register());
    let capacity = cache.capacity_blocks() as u64;
    let hot_blocks = capacity / 2;
    let mut buf = vec![0; 32 * BLOCK];
    for _ in 0..2 {
        for block in 0..hot_blocks {
            use_block(&cache, hot, block, &mut buf[..BLOCK]);
        }
    }
    for first in (0..capacity * 10).step_by(32) {
        cache.insert_ahead(scanned, first, &buf);
        assert_eq!(cache.read(scanned, first, &mut buf, Touch::Use), 32);
    }
    let left = present(&cache, hot, 0..hot_blocks) as u64;
    assert!(left * 10 >= hot_blocks * 9, "{left} of {hot_blocks} hot blocks are left");
}

#[test]
fn a_block_that_is_inserted_again_soon_after_its_eviction_stays() {
    let cache = cache(8 * MIB);
    let id = cache.register();
    let capacity = cache.capacity_blocks() as u64;
    let mut buf = vec![0; BLOCK];
    // Fill the cache with blocks that are used twice, so that both queues have blocks.
    for _ in 0..2 {
        for block in 0..capacity {
            use_block(&cache, id, block, &mut buf);
        }
    }
    let far = 1 << 30;
    for block in far..far + capacity / 2 {
        use_block(&cache, id, block, &mut buf);
    }
    let gone: Vec<u64> = (far..far + capacity / 2).filter(|block| !cache.contains(id, *block)).collect();
    assert!(!gone.is_empty());
    for block in &gone {
        use_block(&cache, id, *block, &mut buf);
    }
    for block in far * 2..far * 2 + capacity {
        use_block(&cache, id, block, &mut buf);
    }
    let left = present(&cache, id, gone.iter().copied());
    assert!(left * 10 >= gone.len() * 9, "{left} of {} returned blocks are left", gone.len());
}

#[test]
fn memory_is_bounded_and_mostly_used_for_blocks() {
    for limit in [MIB, 4 * MIB + 12345, 33 * MIB] {
        let cache = cache(limit);
        let id = cache.register();
        let data = vec![7; 256 * BLOCK];
        for first in (0..4 * limit / BLOCK as u64).step_by(256) {
            cache.insert(id, first, &data);
            let stats = cache.stats();
            assert!(stats.memory_used <= limit, "{} bytes used of {limit}", stats.memory_used);
        }
        cache.assert_consistent();
        let stats = cache.stats();
        assert!(stats.memory_used > limit / 10 * 9, "{} bytes used of {limit}", stats.memory_used);
        assert!(cache.cached_bytes(id) > limit / 10 * 9, "bookkeeping takes more than a tenth of {limit}");
        assert_eq!(stats.memory_limit, limit);
        assert_eq!((stats.insertions - stats.evictions) * BLOCK as u64, cache.cached_bytes(id));
    }
}

#[test]
fn tiny_caches_return_right_bytes() {
    for limit in (0..20).map(|blocks| blocks * BLOCK as u64) {
        let cache = cache(limit);
        let id = cache.register();
        for round in 0..3 {
            for block in 0..50 {
                let mut buf = vec![0; BLOCK];
                if cache.read(id, block, &mut buf, Touch::Use) == 1 {
                    assert_eq!(buf, content(9, block), "limit {limit}, round {round}");
                }
                cache.insert(id, block, &contents(9, block, 3));
            }
            cache.assert_consistent();
            assert!(cache.cached_bytes(id) <= limit);
        }
        cache.forget(id);
        assert_eq!(cache.cached_bytes(id), 0);
    }
}

#[test]
fn blocks_that_a_key_cannot_express_are_not_cached() {
    let cache = cache(MIB);
    let id = cache.register();
    let last = (1 << 44) - 1;
    cache.insert(id, last, &contents(1, last, 2));
    let mut buf = vec![0; 2 * BLOCK];
    assert_eq!(cache.read(id, last, &mut buf, Touch::Use), 1);
    assert!(!cache.contains(id, last + 1));
    assert!(!cache.contains(id, 0));
    assert_eq!(cache.missing_run(id, last, 4), 0);
    assert_eq!(cache.missing_run(id, last + 1, 4), 4);

    let valid = (0..(1 << 20) - 1).map(|_| cache.register()).last().expect("a million ids");
    cache.insert(valid, 0, &content(2, 0));
    assert!(cache.contains(valid, 0));
    for beyond in [cache.register(), cache.register()] {
        cache.insert(beyond, 0, &content(3, 0));
        assert!(!cache.contains(beyond, 0));
        assert_eq!(cache.cached_bytes(beyond), 0);
        cache.forget(beyond);
    }
    assert_eq!(cache.cached_bytes(valid), BLOCK as u64);
}

#[derive(Clone, Debug)]
enum Step {
    Insert { base: usize, first: u64, blocks: u64, ahead: bool },
    Read { base: usize, first: u64, blocks: u64, repeat: bool },
    Part { base: usize, block: u64, from: usize, to: usize },
    Forget { base: usize },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let base = 0..3usize;
    let first = prop_oneof![0..200u64, 0..3000u64];
    let step = prop_oneof![
        8 => (base.clone(), first.clone(), 1..80u64, any::<bool>())
            .prop_map(|(base, first, blocks, ahead)| Step::Insert { base, first, blocks, ahead }),
        8 => (base.clone(), first.clone(), 1..150u64, any::<bool>())
            .prop_map(|(base, first, blocks, repeat)| Step::Read { base, first, blocks, repeat }),
        4 => (base.clone(), first, 0..BLOCK, 0..=BLOCK)
            .prop_map(|(base, block, a, b)| Step::Part { base, block, from: a.min(b), to: a.max(b) }),
        1 => base.prop_map(|base| Step::Forget { base }),
    ];
    prop::collection::vec(step, 1..120)
}

proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(48))]

    /// A block that is found has the bytes that were inserted first since the last forget. A missing block may have been
    /// evicted.
    #[test]
    fn random_calls_agree_with_a_map(steps in steps(), limit in prop_oneof![0..MIB, 0..8 * MIB]) {
        let cache = cache(limit);
        let mut ids: Vec<CacheId> = (0..3).map(|_| cache.register()).collect();
        let mut salts = [10u64, 20, 30];
        let mut model: HashMap<(u64, u64), Vec<u8>> = HashMap::new();
        for step in steps {
            match step {
                Step::Insert { base, first, blocks, ahead } => {
                    let data = contents(salts[base], first, blocks);
                    for (block, bytes) in (first..).zip(data.chunks(BLOCK)) {
                        model.insert((salts[base], block), bytes.to_vec());
                    }
                    if ahead {
                        cache.insert_ahead(ids[base], first, &data);
                    } else {
                        cache.insert(ids[base], first, &data);
                    }
                }
                Step::Read { base, first, blocks, repeat } => {
                    let mut buf = vec![0xee; blocks as usize * BLOCK];
                    let touch = if repeat { Touch::Repeat } else { Touch::Use };
                    let missing = cache.missing_run(ids[base], first, blocks as usize);
                    let found = cache.read(ids[base], first, &mut buf, touch);
                    assert!(found == 0 || missing == 0);
                    for (index, bytes) in buf.chunks(BLOCK).enumerate() {
                        if index < found {
                            assert_eq!(bytes, &model[&(salts[base], first + index as u64)]);
                        } else {
                            assert!(bytes.iter().all(|byte| *byte == 0xee));
                        }
                    }
                }
                Step::Part { base, block, from, to } => {
                    let mut buf = vec![0; to - from];
                    if cache.read_part(ids[base], block, from, &mut buf, Touch::Use) {
                        assert_eq!(buf, model[&(salts[base], block)][from..to]);
                    }
                }
                Step::Forget { base } => {
                    cache.forget(ids[base]);
                    assert_eq!(cache.cached_bytes(ids[base]), 0);
                    ids[base] = cache.register();
                    salts[base] += 1;
                }
            }
        }
        cache.assert_consistent();
        let held: u64 = ids.iter().map(|id| cache.cached_bytes(*id)).sum();
        assert!(held <= limit);
    }
}

#[test]
fn concurrent_threads_never_read_a_wrong_byte() {
    let cache = cache(6 * MIB);
    let ids = [cache.register(), cache.register()];
    let blocks = 4000u64;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..4u64)
            .map(|worker| {
                let (cache, stop) = (&cache, &stop);
                scope.spawn(move || {
                    let mut random = worker + 1;
                    let mut buf = vec![0; 16 * BLOCK];
                    let mut found_in_all = 0;
                    for _ in 0..4000 {
                        random = random
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1_442_695_040_888_963_407);
                        let base = (random >> 20) as usize % 2;
                        let first = (random >> 33) % blocks;
                        let found = cache.read(ids[base], first, &mut buf, Touch::Use);
                        assert_eq!(buf[..found * BLOCK], contents(base as u64, first, found as u64));
                        found_in_all += found;
                        let length = 1 + (random >> 50) % 16;
                        cache.insert(ids[base], first, &contents(base as u64, first, length));
                    }
                    stop.store(true, Ordering::Relaxed);
                    found_in_all
                })
            })
            .collect();
        while !stop.load(Ordering::Relaxed) {
            let stats = cache.stats();
            assert!(stats.memory_used <= stats.memory_limit);
            cache.forget(ids[1]);
            thread::yield_now();
        }
        let found: usize = workers.into_iter().map(|worker| worker.join().expect("no worker fails")).sum();
        assert!(found > 0, "no read found a block, so the test tested nothing");
    });
    cache.assert_consistent();
    assert!(cache.stats().evictions > 0);
}

#[test]
fn each_block_of_a_base_is_named_once_and_no_block_of_another() {
    let cache = cache(4 * MIB);
    let (id, other) = (cache.register(), cache.register());
    // More than the cache holds, so that some were evicted.
    for block in 0..4000_u64 {
        cache.insert(id, block * 3, &content(1, block * 3));
        cache.insert(other, block, &content(2, block));
    }
    let mut named = Vec::new();
    cache.each_block(id, |block| named.push(block));
    named.sort_unstable();
    let held: Vec<u64> = (0..12_000).filter(|block| cache.contains(id, *block)).collect();
    assert!(!held.is_empty() && held.len() < 4000);
    assert_eq!(named, held);
    assert_eq!(cache.cached_bytes(id), (held.len() * BLOCK) as u64);
    cache.forget(id);
    cache.each_block(id, |block| panic!("block {block} was forgotten"));
}
