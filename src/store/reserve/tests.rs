//! Tests of the reserve, and of a delta on a full or failing medium.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use super::*;
use crate::delta::{
    Delta, DeltaError, DeltaIo, DeltaSpec, Durability, Edges, Mapping, RootStore, WriteSpace,
};
use crate::disk::DiskError;
use crate::format::BLOCK;
use crate::format::record::MapRoot;
use crate::io::{LiveDir, replace};
use crate::layers::{Layers, Part};

/// A filesystem in memory, with a size that the test sets and calls that fail when the test says so.
#[derive(Clone)]
struct SmallMedium(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    files: HashMap<String, Contents>,
    total: u64,
    /// The error number of a lack of space.
    full: i32,
    /// Operation, part of the name, error number: the next such call fails.
    faults: Vec<(&'static str, &'static str, i32)>,
}

#[derive(Default, Clone)]
struct Contents {
    bytes: Vec<u8>,
    blocks: BTreeSet<u64>,
}

impl State {
    fn free(&self) -> u64 {
        self.total - self.files.values().map(|f| f.blocks.len() as u64 * BLOCK).sum::<u64>()
    }

    fn fault(&mut self, operation: &str, name: &str) -> io::Result<()> {
        match self.faults.iter().position(|(o, n, _)| *o == operation && name.contains(n)) {
            Some(at) => Err(io::Error::from_raw_os_error(self.faults.remove(at).2)),
            None => Ok(()),
        }
    }

    /// Allocates a range block by block, until there is no space, as a filesystem does.
    fn take(&mut self, name: &str, offset: u64, len: u64) -> io::Result<()> {
        for block in offset / BLOCK..(offset + len).div_ceil(BLOCK) {
            if self.files[name].blocks.contains(&block) {
                continue;
            }
            if self.free() < BLOCK {
                return Err(io::Error::from_raw_os_error(self.full));
            }
            self.files.get_mut(name).unwrap().blocks.insert(block);
        }
        Ok(())
    }
}

impl SmallMedium {
    fn new(total: u64) -> Self {
        Self(Arc::new(Mutex::new(State { total, full: libc::ENOSPC, ..State::default() })))
    }
    fn fail(&self, operation: &'static str, name: &'static str, errno: i32) {
        self.0.lock().faults.push((operation, name, errno));
    }
    fn no_faults_left(&self) {
        assert_eq!(self.0.lock().faults, [], "faults that no call met");
    }
    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = self.0.lock().files.keys().cloned().collect();
        names.sort();
        names
    }
    fn free(&self) -> u64 {
        self.0.lock().free()
    }
    fn grow(&self, bytes: u64) {
        self.0.lock().total += bytes;
    }
    /// Allocates all free space.
    fn fill(&self) {
        let mut state = self.0.lock();
        let first = state.files.entry("filler".into()).or_default().blocks.len() as u64;
        let free = state.free();
        state.take("filler", first * BLOCK, free).unwrap();
    }
    fn reserve(&self, wanted: u64) -> Arc<Reserve> {
        Arc::new(Reserve::over(Arc::new(self.clone()), Some(wanted)).unwrap())
    }
}

impl Medium for SmallMedium {
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn MediumFile>> {
        let mut state = self.0.lock();
        state.fault("open", name)?;
        if !state.files.contains_key(name) {
            if how != Open::Create {
                return Err(io::ErrorKind::NotFound.into());
            }
            state.files.insert(name.into(), Contents::default());
        }
        Ok(Arc::new(SmallFile { small: self.clone(), name: name.into() }))
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.0.lock();
        state.fault("rename", from)?;
        let contents = state.files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        state.files.insert(to.into(), contents);
        Ok(())
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.0.lock().files.remove(name).map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        self.0.lock().fault("sync_dir", dir)
    }
    fn list(&self, _: &str) -> io::Result<Vec<String>> {
        Ok(self.names())
    }
    fn make_dir(&self, _: &str) -> io::Result<()> {
        Ok(())
    }
    fn never_waits(&self) -> bool {
        false
    }
    fn space(&self) -> io::Result<Space> {
        let (total, free) = {
            let state = self.0.lock();
            (state.total, state.free())
        };
        Ok(Space { total, free, available: free })
    }
    fn root(&self) -> PathBuf {
        "/small".into()
    }
}

struct SmallFile {
    small: SmallMedium,
    name: String,
}

impl SmallFile {
    fn with<T>(
        &self,
        operation: &'static str,
        run: impl FnOnce(&mut State, &str) -> io::Result<T>,
    ) -> io::Result<T> {
        let mut state = self.small.0.lock();
        state.fault(operation, &self.name)?;
        run(&mut state, &self.name)
    }
}

impl MediumFile for SmallFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.with("read", |state, name| {
            let from = state.files[name].bytes.get(offset as usize..).unwrap_or_default();
            let len = from.len().min(buf.len());
            buf[..len].copy_from_slice(&from[..len]);
            Ok(len)
        })
    }
    fn read_now(&self, _: &mut [u8], _: u64) -> io::Result<Option<usize>> {
        Ok(None)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.with("write", |state, name| {
            state.take(name, offset, buf.len() as u64)?;
            let bytes = &mut state.files.get_mut(name).unwrap().bytes;
            let end = offset as usize + buf.len();
            bytes.resize(bytes.len().max(end), 0);
            bytes[offset as usize..end].copy_from_slice(buf);
            Ok(())
        })
    }
    fn sync_data(&self) -> io::Result<()> {
        self.with("sync", |_, _| Ok(()))
    }
    fn len(&self) -> io::Result<u64> {
        self.with("len", |state, name| Ok(state.files[name].bytes.len() as u64))
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.with("set_len", |state, name| {
            let file = state.files.get_mut(name).unwrap();
            file.bytes.resize(len as usize, 0);
            file.blocks.retain(|block| *block < len.div_ceil(BLOCK));
            Ok(())
        })
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.with("punch", |state, name| {
            let file = state.files.get_mut(name).unwrap();
            let end = ((offset + len) as usize).min(file.bytes.len());
            file.bytes[(offset as usize).min(end)..end].fill(0);
            file.blocks.retain(|b| *b < offset / BLOCK || *b >= (offset + len) / BLOCK);
            Ok(())
        })
    }
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.with("allocate", |state, name| state.take(name, offset, len))
    }
    fn allocated(&self) -> io::Result<u64> {
        self.with("allocated", |state, name| Ok(state.files[name].blocks.len() as u64 * BLOCK))
    }
    fn has_space(&self, offset: u64, len: u64) -> io::Result<bool> {
        self.with("has_space", |state, name| {
            let mut blocks = offset / BLOCK..(offset + len).div_ceil(BLOCK);
            Ok(blocks.all(|b| state.files[name].blocks.contains(&b)))
        })
    }
    fn identity(&self) -> io::Result<(u64, u64)> {
        Ok((1, self.name.bytes().map(u64::from).sum()))
    }
}

fn is_no_space<T>(result: io::Result<T>) -> bool {
    result.is_err_and(|e| is_full(&e))
}

const WANTED: u64 = 4 * MIB;

#[test]
fn sizes() {
    const GIB: u64 = 1 << 30;
    assert_eq!(size_for(64 * MIB, false, None), 4 * MIB);
    assert_eq!(size_for(4 * GIB, false, None), 16 * MIB);
    assert_eq!(size_for(1 << 50, false, None), 64 * MIB);
    assert_eq!(size_for(16 * MIB, false, None), MIB);
    assert_eq!(size_for(64 * GIB, true, None), MIB);
    assert_eq!(size_for(64 * MIB, false, Some(GIB)), 4 * MIB);
    assert_eq!(size_for(64 * MIB, false, Some(0)), 0);
}

/// Guards D19.
#[test]
fn metadata_gets_the_reserve_and_data_does_not() {
    for errno in [libc::ENOSPC, libc::EDQUOT] {
        let small = SmallMedium::new(64 * MIB);
        small.0.lock().full = errno;
        let reserve = small.reserve(WANTED);
        assert_eq!(
            reserve.state(),
            ReserveState { wanted: WANTED, held: WANTED, in_use: false, full: false }
        );
        let data = reserve.open("deltas/1.data", Open::Create).unwrap();
        data.write_at(&[1; 8192], 0).unwrap();
        data.allocate(1 << 20, 8192).unwrap();
        small.fill();
        assert!(is_no_space(data.write_at(&[1; 4096], 8192)));
        assert!(reserve.state().full && !reserve.state().in_use);
        replace(&*reserve, "disks", "1.disk", &[2; 4096]).unwrap();
        let state = reserve.state();
        assert!(state.in_use && state.held < WANTED, "{state:?}");
        // There is free space now, but not for data. Data that has its space is written.
        assert!(small.free() > 0);
        assert!(is_no_space(data.write_at(&[1; 4096], 8192)));
        assert!(is_no_space(data.write_at(&[1; 8192], 4096)));
        assert!(is_no_space(data.allocate(8192, 4096)));
        data.write_at(&[3; 8192], 0).unwrap();
        data.write_at(&[3; 8192], 1 << 20).unwrap();
        data.allocate(0, 8192).unwrap();
        // The first write to a disk: its file is created, and stays empty.
        let other = reserve.open("deltas/2.data", Open::Create).unwrap();
        assert!(is_no_space(other.write_at(&[1; 4096], 0)));
        assert_eq!(other.allocated().unwrap(), 0);
        // The reserve is filled up first, then data gets space.
        small.grow(WANTED - 8192);
        assert!(is_no_space(data.write_at(&[1; 4096], 8192)) || !reserve.state().in_use);
        small.grow(8 * MIB);
        data.write_at(&[1; 4096], 8192).unwrap();
        assert_eq!(
            reserve.state(),
            ReserveState { wanted: WANTED, held: WANTED, in_use: false, full: false }
        );
    }
}

#[test]
fn a_trace_takes_no_space_of_the_reserve() {
    let small = SmallMedium::new(64 * MIB);
    let reserve = small.reserve(WANTED);
    replace(&*reserve, "traces", "1.trace", &[1; 8192]).unwrap();
    small.fill();
    assert!(is_no_space(replace(&*reserve, "traces", "2.trace", &[1; 8192])));
    assert_eq!(reserve.state(), ReserveState { wanted: WANTED, held: WANTED, in_use: false, full: true });
    assert!(!small.names().iter().any(|name| name.ends_with(".tmp")), "{:?}", small.names());
}

#[test]
fn metadata_uses_the_whole_reserve_and_fails_after_it() {
    let small = SmallMedium::new(64 * MIB);
    let reserve = small.reserve(WANTED);
    small.fill();
    let map = reserve.open("deltas/1.1.map", Open::Create).unwrap();
    map.write_at(&vec![1; WANTED as usize], 0).unwrap();
    assert_eq!(reserve.state().held, 0);
    assert!(is_no_space(map.write_at(&[1; 4096], WANTED)));
    map.set_len(0).unwrap();
    reserve.sync_dir("deltas").unwrap();
    assert_eq!(reserve.state(), ReserveState { wanted: WANTED, held: WANTED, in_use: false, full: false });
}

#[test]
fn discards_of_partial_blocks_may_use_half_of_the_reserve() {
    let small = SmallMedium::new(64 * MIB);
    let reserve = small.reserve(WANTED);
    let data = reserve.open("deltas/1.data", Open::Create).unwrap();
    small.fill();
    let mut written = 0;
    while data.write_reserved(&[0; 4096], written * 2 * BLOCK).is_ok() {
        written += 1;
    }
    assert_eq!(written, WANTED / 2 / BLOCK);
    replace(&*reserve, "disks", "1.disk", &[2; 4096]).unwrap();
}

#[test]
fn a_reserve_is_found_again_and_filled_up_at_the_next_start() {
    let small = SmallMedium::new(64 * MIB);
    let reserve = small.reserve(WANTED);
    small.fill();
    replace(&*reserve, "disks", "1.disk", &[2; 4096]).unwrap();
    let held = reserve.state().held;
    drop(reserve);
    let reserve = small.reserve(WANTED);
    assert_eq!(reserve.state(), ReserveState { wanted: WANTED, held, in_use: true, full: true });
    // Before the store is open, for the lock and the control socket.
    let mut tries = 0;
    small.fill();
    with_reserve_of(&small, || {
        tries += 1;
        if small.free() == 0 { Err(no_space()) } else { Ok(()) }
    })
    .unwrap();
    assert_eq!(tries, 2);
    small.grow(WANTED);
    drop(reserve);
    assert!(!small.reserve(WANTED).state().in_use);
    assert_eq!(
        small.reserve(2 * MIB).state(),
        ReserveState { wanted: 2 * MIB, held: 2 * MIB, in_use: false, full: false }
    );
    small.reserve(0);
    assert!(!small.names().contains(&RESERVE.into()));
}

#[test]
fn a_reserve_that_was_copied_as_a_hole_is_filled() {
    let small = SmallMedium::new(64 * MIB);
    small.open(RESERVE, Open::Create).unwrap().set_len(WANTED).unwrap();
    small.reserve(WANTED);
    assert_eq!(small.free(), 60 * MIB);
}

/// Guards D20.
#[test]
fn data_never_takes_what_was_freed_for_metadata() {
    let small = SmallMedium::new(64 * MIB);
    let reserve = small.reserve(WANTED);
    small.fill();
    small.grow(2 * MIB);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for n in 0..4 {
            let (reserve, stop) = (reserve.clone(), &stop);
            scope.spawn(move || {
                let data = reserve.open(&format!("deltas/{n}.data"), Open::Create).unwrap();
                let mut at = 0;
                while !stop.load(Ordering::Relaxed) {
                    let _ = data.write_at(&[1; 65536], at);
                    at = (at + 65536) % (32 << 20);
                }
            });
        }
        let map = reserve.open("deltas/1.1.map", Open::Create).unwrap();
        // Takes more and more of the reserve, while data tries to allocate all the time.
        let done =
            (0..WANTED / BLOCK - 2).map(|block| map.write_at(&[1; 4096], block * BLOCK)).find(Result::is_err);
        stop.store(true, Ordering::Relaxed);
        assert!(done.is_none(), "{done:?}");
    });
}

#[test]
fn files_that_were_not_written_in_full_are_removed() {
    let small = SmallMedium::new(64 * MIB);
    replace(&small, "disks", "1.disk", b"old").unwrap();
    for operation in ["write", "sync", "rename"] {
        small.fail(operation, "1.disk.tmp", libc::EIO);
        assert!(replace(&small, "disks", "1.disk", b"new").is_err());
        assert_eq!(small.names(), ["disks/1.disk"], "{operation}");
    }
    small.no_faults_left();
}

/// Keeps the root as a disk's record does, by replacing a file.
struct Roots(Arc<dyn Medium>);

impl RootStore for Roots {
    fn commit(&self, root: MapRoot, _modified_ns: i64) -> io::Result<()> {
        let bytes = [root.generation.to_le_bytes(), root.floor.to_le_bytes()].concat();
        replace(&*self.0, "disks", "1.disk", &bytes)
    }
}

struct Rig {
    small: SmallMedium,
    reserve: Arc<Reserve>,
    live: tempfile::TempDir,
}

const SIZE: u64 = 1 << 30;

impl Rig {
    fn new(reserve: u64) -> Self {
        let small = SmallMedium::new(256 * MIB);
        let reserve = small.reserve(reserve);
        Self { small, reserve, live: tempfile::tempdir_in("/dev/shm").unwrap() }
    }

    fn try_open(&self) -> Result<Delta, DeltaError> {
        let root = match self.small.0.lock().files.get("disks/1.disk") {
            Some(record) => {
                let word = |at: usize| u64::from_le_bytes(record.bytes[at..at + 8].try_into().unwrap());
                MapRoot { generation: word(0), floor: word(8) }
            }
            None => MapRoot::default(),
        };
        let live = Arc::new(LiveDir::new(&self.live.path().join("live")).unwrap());
        let spec = DeltaSpec { disk: 1, size: SIZE, overlap: SIZE, rises: false, modified_ns: 0, root };
        let medium: Arc<dyn Medium> = self.reserve.clone();
        Delta::open(spec, DeltaIo { medium: medium.clone(), live, roots: Arc::new(Roots(medium)) })
    }

    fn open(&self) -> Delta {
        self.try_open().unwrap()
    }

    /// As after a reboot: without a live map.
    fn reboot(&self, delta: Delta) -> Delta {
        drop(delta);
        std::fs::remove_dir_all(Path::new(self.live.path()).join("live")).unwrap();
        self.open()
    }
}

fn write(delta: &Delta, block: u64) -> Result<(), DeltaError> {
    delta.write(block * BLOCK, &[block as u8 | 1; 4096], &Edges::default())
}

fn is_data(delta: &Delta, block: u64) -> bool {
    delta.extent(block * BLOCK, (block + 1) * BLOCK).0 == Mapping::Data
}

#[test]
fn a_flush_on_a_full_medium_is_durable() {
    let rig = Rig::new(WANTED);
    let delta = rig.open();
    (0..100).for_each(|n| write(&delta, n * 64).unwrap());
    rig.small.fill();
    let refused = write(&delta, 1).unwrap_err();
    assert!(refused.is_full());
    assert_eq!(DiskError::from(refused).errno(), libc::ENOSPC);
    assert!(!is_data(&delta, 1));
    delta.flush().unwrap();
    assert_eq!(delta.error_epoch(), 0);
    // Overwrites and discards are flushed too, and a shrink is durable.
    write(&delta, 64).unwrap();
    delta.zero_blocks(0, 10).unwrap();
    delta.flush().unwrap();
    delta.resize(SIZE / 2, Durability::Now).unwrap();
    let delta = rig.reboot(delta);
    assert_eq!(delta.size(), SIZE / 2);
    assert_eq!(delta.extent(0, 4096).0, Mapping::Zero);
    assert!((1..100).all(|n| is_data(&delta, n * 64)));
    delta.close().unwrap();
}

/// Guards D19.
#[test]
fn the_index_of_a_layer_takes_no_space_of_the_reserve() {
    let rig = Rig::new(WANTED);
    let delta = rig.open();
    (0..100).for_each(|n| write(&delta, n * 64).unwrap());
    let layer = delta.seal().unwrap();
    rig.small.fill();
    let chain = Layers::default().chain(vec![layer], rig.reserve.clone()).unwrap().unwrap();
    let state = rig.reserve.state();
    assert!(!state.in_use && state.held == WANTED, "{state:?}");
    assert!(!rig.small.names().iter().any(|name| name.contains(".index")), "{:?}", rig.small.names());
    // The index is in memory.
    let (part, end) = chain.extent(64 * BLOCK, SIZE).unwrap();
    assert!(matches!(part, Part::Layer(_)) && end == 65 * BLOCK);
}

#[test]
fn a_discard_of_a_part_of_a_block_works_on_a_full_medium() {
    let rig = Rig::new(WANTED);
    let delta = rig.open();
    rig.small.fill();
    let edges = Edges { head: Some(vec![7; 4096].into()), space: WriteSpace::Reserved, ..Edges::default() };
    delta.write(512, &[0; 512], &edges).unwrap();
    let mut found = [1; 4096];
    delta.read(&mut found, 0).unwrap();
    assert_eq!((found[511], found[512], found[1023], found[1024]), (7, 0, 0, 7));
}

/// Changes scattered blocks until the next flush replaces the map file.
fn fill_map_file(delta: &Delta) {
    write(delta, 0).unwrap();
    delta.flush().unwrap();
    for round in 0..3 {
        for block in (0..3000).map(|n| n * 64) {
            match round {
                1 => delta.zero_blocks(block, block + 1).unwrap(),
                _ => write(delta, block).unwrap(),
            }
        }
        delta.flush().unwrap();
    }
}

#[test]
fn a_map_file_that_cannot_be_replaced_goes_on_growing() {
    let rig = Rig::new(0);
    let delta = rig.open();
    fill_map_file(&delta);
    // Space for an append but not for a copy, which has 96 KiB.
    delta.zero_blocks(0, 1).unwrap();
    rig.small.fill();
    rig.small.grow(64 << 10);
    let before = rig.small.names();
    delta.flush().unwrap();
    assert_eq!(rig.small.names(), before, "a failed copy was left, or the map file replaced");
    let delta = rig.reboot(delta);
    assert_eq!(delta.extent(0, 4096).0, Mapping::Zero);
    assert!((1..3000).all(|n| is_data(&delta, n * 64)));
    // Once there is space, a later flush replaces it.
    rig.small.grow(64 * MIB);
    for _ in 0..3 {
        fill_map_file(&delta);
    }
    assert_ne!(rig.small.names(), before);
}

#[test]
fn a_flush_that_finds_no_space_loses_nothing() {
    let rig = Rig::new(0);
    let delta = rig.open();
    (0..40_000).for_each(|n| write(&delta, n).unwrap());
    rig.small.fill();
    let error = delta.flush().unwrap_err();
    assert!(error.is_full(), "{error}");
    assert_eq!((delta.error_epoch(), delta.refuses_writes()), (0, None));
    assert!(!rig.small.names().iter().any(|n| n.ends_with(".map")), "{:?}", rig.small.names());
    rig.small.grow(MIB);
    delta.flush().unwrap();
    let delta = rig.reboot(delta);
    assert!((0..40_000).all(|n| is_data(&delta, n)));
}

#[test]
fn a_sync_that_finds_no_space_is_a_failed_flush_and_an_io_error() {
    for (errno, file) in [
        (libc::ENOSPC, "1.data"),
        (libc::EDQUOT, "1.data"),
        (libc::EIO, "1.data"),
        (libc::ENOSPC, ".map"),
        (libc::EIO, ".map"),
    ] {
        let rig = Rig::new(WANTED);
        let delta = rig.open();
        write(&delta, 1).unwrap();
        delta.flush().unwrap();
        write(&delta, 2).unwrap();
        rig.small.fail("sync", file, errno);
        let error = delta.flush().unwrap_err();
        assert_eq!(DiskError::from(error).errno(), libc::EIO, "{errno} of {file}");
        assert_eq!(delta.error_epoch(), 1, "{errno} of {file}");
        let why = delta.refuses_writes().expect("a reason");
        assert!(why.contains("syncing"), "{why}");
        rig.small.no_faults_left();
        // A client opens the disk again.
        delta.opened();
        assert_eq!(delta.refuses_writes(), None);
        delta.flush().unwrap();
        let delta = rig.reboot(delta);
        assert!(is_data(&delta, 1) && is_data(&delta, 2));
    }
}

/// Guards D3.
#[test]
fn a_disk_refuses_writes_under_the_next_worker_too() {
    let rig = Rig::new(WANTED);
    let delta = rig.open();
    write(&delta, 1).unwrap();
    rig.small.fail("sync", "1.data", libc::EIO);
    delta.flush().unwrap_err();
    drop(delta);
    let delta = rig.open();
    assert!(delta.refuses_writes().is_some());
    assert_eq!(delta.error_epoch(), 1);
}

#[test]
fn the_old_map_file_gets_no_append_when_the_new_record_may_be_durable() {
    let rig = Rig::new(WANTED);
    let delta = rig.open();
    fill_map_file(&delta);
    delta.zero_blocks(0, 1).unwrap();
    // The record is renamed, and the sync of its directory finds no space.
    rig.small.fail("sync_dir", "disks", libc::ENOSPC);
    assert!(delta.flush().unwrap_err().is_full());
    rig.small.no_faults_left();
    delta.zero_blocks(1, 2).unwrap();
    delta.flush().unwrap();
    let delta = rig.reboot(delta);
    assert_eq!(delta.extent(4096, 8192).0, Mapping::Zero);
    assert_eq!(delta.extent(0, 4096).0, Mapping::Zero);
}

/// Guards D10.
#[test]
fn a_read_or_write_that_fails_is_an_error_of_that_range_alone() {
    let rig = Rig::new(WANTED);
    let delta = rig.open();
    (0..4).for_each(|n| write(&delta, n).unwrap());
    rig.small.fail("read", "1.data", libc::EIO);
    let mut found = [0; 4096];
    assert_eq!(DiskError::from(delta.read(&mut found, 0).unwrap_err()).errno(), libc::EIO);
    delta.read(&mut found, 4096).unwrap();
    assert_eq!(found, [1; 4096]);
    rig.small.fail("write", "1.data", libc::EIO);
    assert_eq!(DiskError::from(write(&delta, 9).unwrap_err()).errno(), libc::EIO);
    assert!(!is_data(&delta, 9));
    write(&delta, 9).unwrap();
    rig.small.fail("punch", "1.data", libc::EIO);
    delta.zero_blocks(2, 3).unwrap();
    delta.flush().unwrap();
    assert_eq!(delta.error_epoch(), 0);
    let delta = rig.reboot(delta);
    assert_eq!(delta.extent(8192, 12288).0, Mapping::Zero);
    assert!(is_data(&delta, 9));
}

#[test]
fn a_map_file_that_cannot_be_read_is_an_error_at_open() {
    let rig = Rig::new(WANTED);
    let delta = rig.open();
    write(&delta, 1).unwrap();
    delta.close().unwrap();
    drop(delta);
    rig.small.fail("read", ".map", libc::EIO);
    assert_eq!(DiskError::from(rig.try_open().unwrap_err()).errno(), libc::EIO);
    assert!(is_data(&rig.open(), 1));
}
