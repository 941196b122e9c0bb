//! The paths of the memory cache that every read takes: a hit of one block, a hit of a large read, and an
//! insert that has to make room; each in memory of the process and in a memory file that outlives it. Then what a
//! new worker pays for what it takes over: once for all of it, and at the first use of a block.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use plyfs::cache::{BLOCK, BlockCache, CacheId, Owner, Touch};
use plyfs::fetch::kept::{CACHE_BLOCK, CacheObserver, DiskCache, EvictReason, Limits, SourceKey};
use plyfs::io::HostMedium;

const MIB: u64 = 1024 * 1024;
/// Blocks of the set that is read, in all cases less than the cache holds.
const HOT_BLOCKS: u64 = 64 * MIB / BLOCK as u64;

#[derive(Clone, Copy)]
enum Memory {
    Own,
    File,
}

impl Memory {
    fn name(self) -> &'static str {
        match self {
            Self::Own => "own memory",
            Self::File => "memory file",
        }
    }

    fn cache(self, bytes: u64) -> (BlockCache, CacheId) {
        let cache = match self {
            Self::Own => BlockCache::new(bytes),
            Self::File => BlockCache::memory_file().and_then(|file| BlockCache::prepare(file, bytes)),
        };
        let cache = cache.expect("address space for a small cache");
        cache.adopt();
        let id = cache.register_as(Owner::new(1, b"a base"));
        (cache, id)
    }

    fn with_hot_set(self) -> (BlockCache, CacheId) {
        let (cache, id) = self.cache(256 * MIB);
        let data = vec![0x5a; BLOCK];
        for block in 0..HOT_BLOCKS {
            cache.insert(id, block, &data);
        }
        (cache, id)
    }
}

/// Visits every block once before any twice, in an order that no prefetcher follows.
fn scattered(step: &mut u64, blocks: u64) -> u64 {
    *step = (*step * 5 + 12345) % blocks;
    *step
}

fn hits(criterion: &mut Criterion) {
    for memory in [Memory::Own, Memory::File] {
        hits_in(criterion, memory);
    }
}

fn hits_in(criterion: &mut Criterion, memory: Memory) {
    let (cache, id) = memory.with_hot_set();

    let mut group = criterion.benchmark_group(format!("hit, {}", memory.name()));
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
    for memory in [Memory::Own, Memory::File] {
        inserts_in(criterion, memory);
    }
}

fn inserts_in(criterion: &mut Criterion, memory: Memory) {
    let (cache, id) = memory.cache(64 * MIB);
    let data = vec![0x5a; 64 * BLOCK];
    let mut next = 0;
    while cache.stats().evictions < HOT_BLOCKS {
        cache.insert(id, next, &data);
        next += 64;
    }
    let mut group = criterion.benchmark_group(format!("insert with eviction, {}", memory.name()));
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

fn adoption(criterion: &mut Criterion) {
    let file = BlockCache::memory_file().expect("memfd");
    let next = || {
        let file = file.try_clone().expect("descriptors");
        let cache = BlockCache::prepare(file, 256 * MIB).expect("address space for a small cache");
        let id = cache.register_as(Owner::new(1, b"a base"));
        (cache, id)
    };
    let (cache, id) = next();
    cache.adopt();
    cache.insert(id, 0, &vec![0x5a; 64 * MIB as usize]);
    drop(cache);

    let mut group = criterion.benchmark_group("adoption");
    group.throughput(Throughput::Elements(HOT_BLOCKS));
    group.bench_function("64 MiB, all shards", |bencher| {
        bencher.iter_batched(
            next,
            |(cache, id)| {
                cache.adopt();
                assert_eq!(cache.cached_bytes(id), 64 * MIB);
                cache
            },
            BatchSize::PerIteration,
        );
    });
    let mut buf = vec![0; 64 * BLOCK];
    group.throughput(Throughput::Bytes(buf.len() as u64));
    group.bench_function("256KiB, first use", |bencher| {
        bencher.iter_batched_ref(
            || {
                let (cache, id) = next();
                cache.adopt();
                assert!(cache.contains(id, 0));
                (cache, id)
            },
            |(cache, id)| assert_eq!(cache.read(*id, 0, &mut buf, Touch::Use), 64),
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

struct NoObserver;

impl CacheObserver for NoObserver {
    fn evicted(&self, _: &SourceKey, _: u64, _: EvictReason) {}
    fn degraded(&self, _: Option<&str>) {}
}

/// The persistent cache on a filesystem in memory: what it costs beside the two reads of files.
fn disk(criterion: &mut Criterion) {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory in memory");
    let medium = Arc::new(HostMedium::new(dir.path()).expect("it was just made"));
    let limits = Limits { bytes: Some(256 * MIB), bases: None, free_floor: 0 };
    let cache = DiskCache::open(medium, limits, Arc::new(NoObserver));
    let blocks = 64 * MIB / CACHE_BLOCK;
    let source = cache.attach(SourceKey([1; 32]), 64 * MIB);
    let mut buf: Vec<u8> = (0..64 * MIB).map(|n| (n * 7 / 3) as u8).collect();
    source.insert(0, &buf);

    let mut group = criterion.benchmark_group("disk cache");
    let mut step = 0;
    for count in [1, 16, 64] {
        let buf = &mut buf[..(count * CACHE_BLOCK) as usize];
        group.throughput(Throughput::Bytes(buf.len() as u64));
        group.bench_function(format!("{} KiB, hit", count * CACHE_BLOCK / 1024), |bencher| {
            bencher.iter(|| {
                let block = scattered(&mut step, blocks - count);
                assert_eq!(source.read(block, buf), count as usize);
            });
        });
    }
    let other = cache.attach(SourceKey([2; 32]), 1 << 40);
    let buf = &buf[..(16 * CACHE_BLOCK) as usize];
    group.throughput(Throughput::Bytes(buf.len() as u64));
    let mut block = 0;
    group.bench_function("256 KiB, insert with eviction", |bencher| {
        bencher.iter(|| {
            other.insert(block, buf);
            block += 16;
        });
    });
    group.finish();
}

criterion_group!(benches, hits, inserts, adoption, disk);
criterion_main!(benches);
