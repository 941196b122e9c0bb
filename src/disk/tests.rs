//! Model tests: disks against a flat reference, without a mount.

use std::collections::HashMap;
use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use parking_lot::Mutex;
use proptest::prelude::*;

use super::*;
use crate::cache::BlockCache;
use crate::delta::{DeltaIo, DeltaSpec, RootStore};
use crate::format::record::MapRoot;
use crate::io::{HostMedium, LiveFile, LiveStore, Medium};
use crate::source::file::FileSource;

/// Live maps that survive a dropped disk, as tmpfs survives a worker.
#[derive(Default)]
struct Memory {
    complete: Mutex<HashMap<u64, LiveFile>>,
    fresh: Mutex<HashMap<u64, LiveFile>>,
}

impl LiveStore for Memory {
    fn existing(&self, disk: u64) -> io::Result<Option<LiveFile>> {
        self.complete.lock().get(&disk).map(LiveFile::reopen).transpose()
    }
    fn fresh(&self, disk: u64) -> io::Result<LiveFile> {
        let live = LiveFile::anonymous()?;
        let again = live.reopen()?;
        self.fresh.lock().insert(disk, live);
        Ok(again)
    }
    fn publish(&self, disk: u64) -> io::Result<()> {
        let live = self.fresh.lock().remove(&disk).unwrap();
        self.complete.lock().insert(disk, live);
        Ok(())
    }
    fn abandon(&self, disk: u64) -> io::Result<()> {
        self.fresh.lock().remove(&disk);
        Ok(())
    }
    fn disks(&self) -> io::Result<Vec<u64>> {
        Ok(self.complete.lock().keys().copied().collect())
    }
    fn remove(&self, disk: u64) -> io::Result<()> {
        self.complete.lock().remove(&disk);
        Ok(())
    }
}

#[derive(Default)]
struct Roots(Mutex<MapRoot>);

impl RootStore for Roots {
    fn commit(&self, root: MapRoot, _modified_ns: i64) -> io::Result<()> {
        *self.0.lock() = root;
        Ok(())
    }
}

struct Rig {
    _dir: tempfile::TempDir,
    medium: Arc<HostMedium>,
    live: Arc<Memory>,
    base: Option<Arc<Base>>,
    base_bytes: Vec<u8>,
    disks: Vec<(Arc<Roots>, Option<Arc<Disk>>, u64)>,
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i / 512) as u8 ^ (i as u8).wrapping_mul(31) ^ seed | 1).collect()
}

impl Rig {
    fn new(base_len: usize, sizes: &[u64]) -> Self {
        let dir = tempfile::tempdir_in(if cfg!(miri) { "/tmp" } else { "/dev/shm" }).unwrap();
        let base_bytes = pattern(base_len, 0xa5);
        let base = (base_len > 0).then(|| {
            let path = dir.path().join("base.raw");
            File::create(&path).unwrap().write_all(&base_bytes).unwrap();
            let source = Arc::new(FileSource::open(&path).unwrap());
            // Small, so that blocks are evicted.
            let cache = Arc::new(BlockCache::new(1 << 20).unwrap());
            Arc::new(Base::new(1, "base".into(), source, cache))
        });
        let medium = Arc::new(HostMedium::new(dir.path()).unwrap());
        medium.make_dir("deltas").unwrap();
        let disks = sizes.iter().map(|size| (Arc::new(Roots::default()), None, *size)).collect();
        Self { _dir: dir, medium, live: Arc::default(), base, base_bytes, disks }
    }

    fn disk(&mut self, n: usize) -> Arc<Disk> {
        let (roots, slot, size) = &mut self.disks[n];
        slot.get_or_insert_with(|| {
            let spec = DeltaSpec {
                rises: false,
                disk: n as u64,
                size: *size,
                overlap: (self.base_bytes.len() as u64).min(*size),
                modified_ns: 0,
                root: *roots.0.lock(),
            };
            let delta_io =
                DeltaIo { medium: self.medium.clone(), live: self.live.clone(), roots: roots.clone() };
            Arc::new(Disk::new(Delta::open(spec, delta_io).unwrap(), self.base.clone()))
        })
        .clone()
    }

    /// The contents of a new disk.
    fn fresh_contents(&self, n: usize) -> Vec<u8> {
        let mut flat = self.base_bytes.clone();
        flat.resize(self.disks[n].2 as usize, 0);
        flat
    }
}

fn read_all(disk: &Disk) -> Vec<u8> {
    let mut out = vec![0xee; disk.size() as usize + 100];
    let got = disk.read(0, &mut out).unwrap().bytes() as usize;
    out.truncate(got);
    out
}

#[derive(Debug, Clone)]
enum Op {
    Write {
        at: u64,
        len: usize,
        seed: u8,
    },
    Zero {
        at: u64,
        len: u64,
    },
    Resize {
        to: u64,
    },
    Allocate {
        at: u64,
        len: u64,
        grow: bool,
    },
    Read {
        at: u64,
        len: usize,
    },
    Flush,
    /// The worker dies: the live map stays.
    Crash,
    /// Clean close, then open.
    Reopen,
    /// Flush, then a power cut: the live map is gone.
    PowerCut,
}

const SPAN: u64 = 300_000;

fn position() -> impl Strategy<Value = u64> {
    prop_oneof![0..SPAN, (0..SPAN / 4096).prop_map(|b| b * 4096), (0..SPAN / 512).prop_map(|s| s * 512)]
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![
        1..9000u64,
        (1..20u64).prop_map(|b| b * 4096),
        (1..40u64).prop_map(|s| s * 512),
        1..100_000u64
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (position(), length(), any::<u8>()).prop_map(|(at, len, seed)| Op::Write { at, len: len as usize, seed }),
        3 => (position(), length()).prop_map(|(at, len)| Op::Zero { at, len }),
        2 => position().prop_map(|to| Op::Resize { to }),
        1 => (position(), length(), any::<bool>()).prop_map(|(at, len, grow)| Op::Allocate { at, len, grow }),
        3 => (position(), length()).prop_map(|(at, len)| Op::Read { at, len: len as usize }),
        1 => Just(Op::Flush),
        1 => Just(Op::Crash),
        1 => Just(Op::Reopen),
        1 => Just(Op::PowerCut),
    ]
}

fn apply(rig: &mut Rig, n: usize, flat: &mut Vec<u8>, op: &Op) {
    let disk = rig.disk(n);
    let epoch = disk.delta().error_epoch();
    match *op {
        Op::Write { at, len, seed } => {
            let bytes = pattern(len, seed);
            disk.write(at, &bytes, epoch).unwrap();
            if flat.len() < at as usize + len {
                flat.resize(at as usize + len, 0);
            }
            flat[at as usize..at as usize + len].copy_from_slice(&bytes);
        }
        Op::Zero { at, len } => {
            disk.zero(at, len, epoch).unwrap();
            let end = (at + len).min(flat.len() as u64) as usize;
            if (at as usize) < end {
                flat[at as usize..end].fill(0);
            }
        }
        Op::Resize { to } => {
            disk.resize(to).unwrap();
            flat.resize(to as usize, 0);
        }
        Op::Allocate { at, len, grow } => {
            disk.allocate(at, len, if grow { Grow::Yes } else { Grow::No }, epoch).unwrap();
            if grow && flat.len() < (at + len) as usize {
                flat.resize((at + len) as usize, 0);
            }
        }
        Op::Read { at, len } => {
            let mut buf = vec![0x77; len];
            let got = disk.read(at, &mut buf).unwrap().bytes() as usize;
            let from = (at as usize).min(flat.len());
            let want = &flat[from..(at as usize + len).min(flat.len()).max(from)];
            assert!(buf[..got] == *want, "read at {at}");
            let mut now = vec![0x77; len];
            if let Some(origins) = disk.read_now(at, &mut now) {
                assert!(now[..origins.bytes() as usize] == *want, "read_now at {at}");
            }
        }
        Op::Flush => disk.flush(epoch).unwrap(),
        Op::Crash => rig.disks[n].1 = None,
        Op::Reopen => {
            disk.delta().close().unwrap();
            rig.disks[n].1 = None;
        }
        Op::PowerCut => {
            disk.flush(epoch).unwrap();
            rig.disks[n].1 = None;
            rig.live.remove(n as u64).unwrap();
        }
    }
}

fn holes_read_as_zeros(disk: &Disk, flat: &[u8]) {
    let mut at = 0;
    while let Some(data) = disk.seek(at, Seek::Data).unwrap() {
        assert!(flat[at as usize..data as usize].iter().all(|b| *b == 0), "hole {at}..{data} has data");
        let hole = disk.seek(data, Seek::Hole).unwrap().unwrap();
        assert!(hole > data && hole <= flat.len() as u64);
        at = hole;
    }
    assert!(flat[(at as usize).min(flat.len())..].iter().all(|b| *b == 0), "hole {at}.. has data");
}

fn run(base_len: usize, sizes: &[u64], ops: &[(usize, Op)]) {
    let mut rig = Rig::new(base_len, sizes);
    let mut flats: Vec<Vec<u8>> = (0..sizes.len()).map(|n| rig.fresh_contents(n)).collect();
    for (step, (n, op)) in ops.iter().enumerate() {
        let n = n % sizes.len();
        apply(&mut rig, n, &mut flats[n], op);
        for (n, flat) in flats.iter().enumerate() {
            let disk = rig.disk(n);
            let all = read_all(&disk);
            assert_eq!(all.len(), flat.len(), "size of disk {n} after step {step} {op:?}");
            if all != *flat {
                let at = all.iter().zip(flat).position(|(a, b)| a != b).unwrap();
                panic!("disk {n}, byte {at} (block {}) wrong after step {step} {op:?}", at / 4096);
            }
            holes_read_as_zeros(&disk, flat);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn disks_behave_as_a_flat_file(
        base_len in prop_oneof![Just(0usize), 1usize..250_000, Just(4096 * 40)],
        grow in proptest::collection::vec(prop_oneof![Just(0u64), 0u64..60_000], 1..4),
        ops in proptest::collection::vec((0usize..3, op()), 1..40),
    ) {
        let sizes: Vec<u64> = grow.iter().map(|g| base_len as u64 + g).collect();
        run(base_len, &sizes, &ops);
    }
}

/// Guards D9.
#[test]
fn discard_then_reopen_never_shows_the_base() {
    let w = |at, len| (0, Op::Write { at, len, seed: 9 });
    let z = |at, len| (0, Op::Zero { at, len });
    let ops = [
        w(0, 8192),
        z(0, 16384),
        (0, Op::PowerCut),
        w(1000, 10),
        (0, Op::Reopen),
        z(512, 512),
        (0, Op::Crash),
    ];
    run(100_000, &[100_000], &ops);
}

#[test]
fn shrink_and_growth_read_zeros() {
    let ops: Vec<(usize, Op)> = [
        Op::Write { at: 0, len: 50_000, seed: 1 },
        Op::Resize { to: 10_000 },
        Op::Crash,
        Op::Resize { to: 90_000 },
        Op::PowerCut,
        Op::Resize { to: 5000 },
        Op::Write { at: 20_000, len: 5, seed: 3 },
        Op::Reopen,
    ]
    .into_iter()
    .map(|op| (0, op))
    .collect();
    run(70_001, &[80_000], &ops);
    run(0, &[80_000], &ops);
}

#[test]
fn overlapping_and_neighbouring_writes_from_many_threads() {
    let mut rig = Rig::new(1 << 20, &[1 << 20]);
    let disk = rig.disk(0);
    // Each thread owns the bytes n, n + 8, n + 16, ... in units of 700 bytes: neighbours share every block.
    const UNIT: usize = 700;
    std::thread::scope(|scope| {
        for n in 0..8usize {
            let disk = disk.clone();
            scope.spawn(move || {
                for round in 0..3u8 {
                    for unit in (n..(1 << 20) / UNIT).step_by(8) {
                        disk.write((unit * UNIT) as u64, &[n as u8 + 16 * round; UNIT], 0).unwrap();
                        if unit % 64 == n {
                            disk.flush(0).unwrap();
                        }
                    }
                }
            });
        }
    });
    let all = read_all(&disk);
    for unit in 0..(1 << 20) / UNIT {
        let want = (unit % 8) as u8 + 32;
        assert!(all[unit * UNIT..(unit + 1) * UNIT].iter().all(|b| *b == want), "unit {unit}");
    }
    drop(disk);
    apply(&mut rig, 0, &mut Vec::new(), &Op::PowerCut);
    assert_eq!(read_all(&rig.disk(0)), all);
}

#[test]
fn a_cut_data_file_and_a_damaged_map_are_refused() {
    let mut rig = Rig::new(0, &[100_000]);
    let disk = rig.disk(0);
    disk.write(0, &[7; 100_000], 0).unwrap();
    drop(disk);
    apply(&mut rig, 0, &mut Vec::new(), &Op::Reopen);
    let open = |rig: &Rig| {
        let root = *rig.disks[0].0.0.lock();
        let spec = DeltaSpec { disk: 0, size: 100_000, overlap: 0, rises: false, modified_ns: 0, root };
        let delta_io =
            DeltaIo { medium: rig.medium.clone(), live: rig.live.clone(), roots: rig.disks[0].0.clone() };
        Delta::open(spec, delta_io)
    };
    let data = rig.medium.root().join("deltas/0.data");
    let bytes = std::fs::read(&data).unwrap();
    std::fs::write(&data, &bytes[..50_000]).unwrap();
    assert!(matches!(open(&rig), Err(DeltaError::DataMissing { .. })));
    std::fs::write(&data, &bytes).unwrap();
    let map = rig.medium.root().join("deltas/0.1.map");
    let good = std::fs::read(&map).unwrap();
    for at in (0..good.len()).step_by(7) {
        let mut bad = good.clone();
        bad[at] ^= 4;
        std::fs::write(&map, &bad).unwrap();
        assert!(matches!(open(&rig), Err(DeltaError::Damaged { .. })), "byte {at}");
        std::fs::write(&map, &good[..at]).unwrap();
        assert!(matches!(open(&rig), Err(DeltaError::Damaged { .. })), "cut at {at}");
    }
    std::fs::write(&map, &good).unwrap();
    assert!(open(&rig).is_ok());
}
