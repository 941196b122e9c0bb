//! The paths of the memory cache that every read takes: a hit of one block, a hit of a large read, and an
//! insert that has to make room.

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use plyfs::cache::{BLOCK, BlockCache, CacheId, Touch};

const MIB: u64 = 1024 * 1024;
/// Blocks of the set that is read, in all cases less than the cache holds.
const HOT_BLOCKS: u64 = 64 * MIB / BLOCK as u64;

fn cache_with_hot_set() -> (BlockCache, CacheId) {
    let cache = BlockCache::new(256 * MIB).expect("address space for a small cache");
    let id = cache.register();
    let data = vec![0x5a; BLOCK];
    for block in 0..HOT_BLOCKS {
        cache.insert(id, block, &data);
    }
    (cache, id)
}

/// Visits every block once before any twice, in an order that no prefetcher follows.
fn scattered(step: &mut u64, blocks: u64) -> u64 {
    *step = (*step * 5 + 12345) % blocks;
    *step
}

fn hits(criterion: &mut Criterion) {
    let (cache, id) = cache_with_hot_set();

    let mut group = criterion.benchmark_group("hit");
    let mut buf = vec![0; BLOCK];
    group.throughput(Throughput::Bytes(BLOCK as u64));
    group.bench_function("4KiB/one block", |bencher| {
        bencher.iter(|| assert_eq!(cache.read(id, black_box(7), &mut buf, Touch::Use), 1));
    });
    let mut step = 0;
    group.bench_function("4KiB/scattered over 64 MiB", |bencher| {
        bencher.iter(|| {
            let block = scattered(&mut step, HOT_BLOCKS);
            assert_eq!(cache.read(id, block, &mut buf, Touch::Use), 1);
        });
    });
    let mut few = [0; 16];
    group.throughput(Throughput::Elements(1));
    group.bench_function("16 bytes/one block", |bencher| {
        bencher.iter(|| assert!(cache.read_part(id, black_box(7), 512, &mut few, Touch::Use)));
    });

    let mut buf = vec![0; MIB as usize];
    let blocks = buf.len() / BLOCK;
    group.throughput(Throughput::Bytes(MIB));
    group.bench_function("1MiB", |bencher| {
        bencher.iter(|| {
            let first = scattered(&mut step, HOT_BLOCKS / blocks as u64) * blocks as u64;
            assert_eq!(cache.read(id, first, &mut buf, Touch::Use), blocks);
        });
    });
    group.finish();
}

fn inserts(criterion: &mut Criterion) {
    let cache = BlockCache::new(64 * MIB).expect("address space for a small cache");
    let id = cache.register();
    let data = vec![0x5a; 64 * BLOCK];
    let mut next = 0;
    while cache.stats().evictions < HOT_BLOCKS {
        cache.insert(id, next, &data);
        next += 64;
    }
    let mut group = criterion.benchmark_group("insert with eviction");
    group.throughput(Throughput::Bytes(BLOCK as u64));
    group.bench_function("4KiB", |bencher| {
        bencher.iter(|| {
            cache.insert(id, next, &data[..BLOCK]);
            next += 1;
        });
    });
    group.throughput(Throughput::Bytes(data.len() as u64));
    group.bench_function("256KiB", |bencher| {
        next = u64::next_multiple_of(next, 64);
        bencher.iter(|| {
            cache.insert(id, next, &data);
            next += 64;
        });
    });
    group.finish();
}

criterion_group!(benches, hits, inserts);
criterion_main!(benches);
