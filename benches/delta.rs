//! The write layer alone, on tmpfs: lookup in the map, aligned write, copy-up.

use std::hint::black_box;
use std::io;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use plyfs::delta::{Delta, DeltaIo, DeltaSpec, Edges, RootStore};
use plyfs::format::record::MapRoot;
use plyfs::io::{HostMedium, LiveDir, Medium};

struct NoRoots;

impl RootStore for NoRoots {
    fn commit(&self, _root: MapRoot, _modified_ns: i64) -> io::Result<()> {
        Ok(())
    }
}

const SIZE: u64 = 1 << 30;
const BLOCKS: u64 = SIZE / 4096;

fn delta(dir: &std::path::Path, disk: u64) -> Delta {
    let medium = Arc::new(HostMedium::new(dir).expect("tmpfs"));
    medium.make_dir("deltas").expect("tmpfs");
    let live = Arc::new(LiveDir::new(&dir.join("live")).expect("tmpfs"));
    let spec =
        DeltaSpec { disk, size: SIZE, overlap: SIZE, modified_ns: 0, root: MapRoot::default(), rises: false };
    Delta::open(spec, DeltaIo { medium, live, roots: Arc::new(NoRoots) }).expect("a new delta opens")
}

/// A walk over all blocks that comes back to none before it has seen the others.
fn scattered(n: &mut u64) -> u64 {
    *n = (*n + 40_503) % BLOCKS;
    *n
}

fn benches(c: &mut Criterion) {
    let dir = tempfile::tempdir_in("/dev/shm").expect("tmpfs");
    let block = vec![7u8; 4096];
    let edges =
        || Edges { head: Some(vec![1; 4096].into()), tail: Some(vec![2; 4096].into()), ..Edges::default() };

    let delta_1 = delta(dir.path(), 1);
    let mut n = 0;
    c.bench_function("aligned write of 4 KiB, first touch then steady", |b| {
        b.iter(|| delta_1.write(scattered(&mut n) * 4096, &block, &Edges::default()));
    });
    let mut n = 0;
    c.bench_function("map lookup of 4 KiB", |b| {
        b.iter(|| {
            let at = scattered(&mut n) * 4096;
            black_box(delta_1.extent(at, at + 4096))
        });
    });
    c.bench_function("map lookup of 1 MiB", |b| {
        b.iter(|| {
            let at = scattered(&mut n) / 256 * (1 << 20);
            black_box(delta_1.extent(at, at + (1 << 20)))
        });
    });
    let delta_2 = delta(dir.path(), 2);
    let mut n = 0;
    c.bench_function("copy-up for a write of 512 bytes, base bytes at hand", |b| {
        b.iter(|| {
            let at = scattered(&mut n) * 4096;
            // Back to unwritten in effect: a zeroed block is filled up as well.
            delta_2.zero_blocks(at / 4096, at / 4096 + 1).expect("tmpfs has room");
            delta_2.write(at + 1024, &block[..512], &edges())
        });
    });
}

criterion_group!(all, benches);
criterion_main!(all);
