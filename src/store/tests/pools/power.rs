//! Power cuts at each change of a store with a disk in a pool: two media, of which each loses what was not synced.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::format::layout::{DELTAS, DIRS, POOLS};
use crate::format::pools::{PoolEntry, encode};
use crate::io::sim::{Keep, Rng};
use crate::io::{LiveStore, MediumFile, Open, Space, Stamp, replace};
use crate::store::pools::{OpenPools, Trouble};

const POOL: &str = "pool";

/// The directory of a pool on a simulated medium, whose changes are cut together with those of the store.
struct PoolMedium(SimMedium);

fn inside(name: &str) -> String {
    format!("{POOL}/{name}")
}

impl Medium for PoolMedium {
    fn open(&self, name: &str, how: Open) -> std::io::Result<Arc<dyn MediumFile>> {
        self.0.open(&inside(name), how)
    }
    fn rename(&self, from: &str, to: &str) -> std::io::Result<()> {
        self.0.rename(&inside(from), &inside(to))
    }
    fn remove(&self, name: &str) -> std::io::Result<()> {
        self.0.remove(&inside(name))
    }
    fn sync_dir(&self, dir: &str) -> std::io::Result<()> {
        self.0.sync_dir(&inside(dir))
    }
    fn stamp(&self, name: &str) -> std::io::Result<Option<Stamp>> {
        self.0.stamp(&inside(name))
    }
    fn list(&self, dir: &str) -> std::io::Result<Vec<String>> {
        self.0.list(&inside(dir))
    }
    fn make_dir(&self, dir: &str) -> std::io::Result<()> {
        self.0.make_dir(&inside(dir))
    }
    fn never_waits(&self) -> bool {
        true
    }
    fn space(&self) -> std::io::Result<Space> {
        self.0.space()
    }
    fn root(&self) -> PathBuf {
        "/pool".into()
    }
}

struct Opener(SimMedium);

impl OpenPools for Opener {
    fn open(&self, _: &PoolEntry, _: &[u8; 16]) -> Result<Arc<dyn Medium>, Trouble> {
        Ok(Arc::new(PoolMedium(self.0.clone())))
    }
    fn may_hang(&self) -> bool {
        false
    }
}

fn open(medium: &SimMedium) -> Result<Store, StoreError> {
    let cache = Arc::new(BlockCache::new(1 << 20).unwrap());
    let live: Arc<dyn LiveStore> = Arc::new(SimLive::default());
    let opener = Opener(medium.clone());
    Store::open_on_pools(Arc::new(medium.clone()), |_| Ok(live), cache, Some(0), Arc::new(OpenHere), &opener)
}

/// A medium with a store that has one pool.
fn store_with_a_pool(seed: u64) -> SimMedium {
    let medium = SimMedium::new(seed);
    for dir in DIRS.into_iter().chain([POOL]).map(str::to_owned).chain([inside(DELTAS)]) {
        medium.make_dir(&dir).unwrap();
    }
    let superblock = Superblock { uuid: [3; 16], created_ns: 1, next_id: 50 };
    medium.sync_dir(".").unwrap();
    replace(&medium, ".", crate::format::layout::SUPERBLOCK, &superblock.encode()).unwrap();
    let pool = PoolEntry { number: 1, name: "p".into(), dir: "/pool".into(), uuid: [4; 16], added_ns: 1 };
    replace(&medium, ".", POOLS, &encode(&[pool])).unwrap();
    medium
}

/// What a disk may show: the contents at its last flush, and what was written since.
type Shown = Vec<Vec<u8>>;

/// Runs a history with a disk in the pool and a clone of it in the store, and cuts the power at each change. `at`: the
/// number of the call to cut at. Returns whether there was such a call.
fn cut_at(seed: u64, at: u64) -> bool {
    let mut rng = Rng::new(seed);
    let medium = store_with_a_pool(seed);
    let store = open(&medium).unwrap();
    create(&store, "p", "a");
    // Each byte is that of one write, so it says when it was written.
    let flushed = Arc::new(AtomicU64::new(0));
    let calls = Arc::new(AtomicU64::new(0));
    let cut = Arc::new(Mutex::new(None));
    let (seen, counted, last, keep) = (cut.clone(), calls.clone(), flushed.clone(), Keep::any(&mut rng));
    let watched = medium.clone();
    let chance = Mutex::new(rng.fork());
    medium.set_hook(Some(Arc::new(move |event: &Event<'_>| {
        if event.stage == Stage::Before && counted.fetch_add(1, Ordering::SeqCst) == at {
            *seen.lock() = Some((watched.crash(&mut chance.lock(), keep), last.load(Ordering::SeqCst)));
        }
        Ok(())
    })));
    let mut step = 0;
    let mut write = |flushes: bool| {
        step += 1;
        (0..4).for_each(|block| put(&store, "a", block, step));
        if flushes {
            flush(&store, "a");
            flushed.store(step.into(), Ordering::SeqCst);
        }
        step
    };
    write(true);
    let taken = write(true);
    store.snapshot("a", "s", None).unwrap();
    write(false);
    let cloned = write(true);
    store
        .clone_disks_in(Some("default"), &Origin::parse("a"), &[NewDisk { size: None, ..blank("c") }], None)
        .unwrap();
    write(true);
    store.rollback("a", "s", None).unwrap();
    let back = write(false);
    flush(&store, "a");
    store.remove_snapshot("a", "s").unwrap();
    store.unlink("c").and_then(|disk| store.purge(disk.id())).unwrap();
    store.close().unwrap();
    medium.set_hook(None);
    let Some((after, durable)) = cut.lock().take() else { return false };
    let again = open(&after).unwrap();
    let shown = blocks(&again, "a");
    let allowed = |byte: &u8| u64::from(*byte) >= durable || *byte == taken;
    assert!(
        shown.iter().all(allowed) && shown.iter().all(|byte| *byte <= back),
        "cut {at} of {seed}: {shown:?}, flushed {durable}"
    );
    if let Some(snapshot) = again.disk("a").unwrap().lineage().snapshot("s") {
        let frozen = again.open_snapshot("a", &snapshot.name).unwrap();
        let mut bytes = vec![0; BLOCK];
        frozen.read(0, &mut bytes, 0).unwrap();
        assert_eq!(bytes[0], taken, "cut {at} of {seed}: the snapshot");
    }
    if again.disk("c").is_ok() {
        let clone: Shown = vec![blocks(&again, "c")];
        assert_eq!(clone, [vec![cloned; 4]], "cut {at} of {seed}: the clone");
    }
    // Nothing is in the wrong place, and what is left goes.
    for node in again.unlinked() {
        again.purge(node.id()).unwrap();
    }
    again.close().unwrap();
    let id = again.disk("a").unwrap().lineage();
    let known: Vec<u64> = id
        .deltas()
        .chain(again.disks_after(0).iter().flat_map(|d| d.lineage().deltas().collect::<Vec<_>>()))
        .collect();
    let numbers = |dir: &str| -> Vec<u64> {
        let names = after.list(dir).unwrap();
        names.iter().filter_map(|name| name.split('.').next()?.parse().ok()).collect()
    };
    for number in numbers(&inside(DELTAS)).into_iter().chain(numbers(DELTAS)) {
        assert!(known.contains(&number), "cut {at} of {seed}: files of delta {number} are left");
    }
    true
}

#[test]
fn a_power_cut_at_each_change_leaves_a_disk_in_a_pool_as_flushed() {
    for seed in 0..3 {
        let mut at = 0;
        while cut_at(seed, at) {
            at += 1;
        }
        assert!(at > 50, "{at} cuts");
    }
}

// A drive that hung in this read stopped all changes of layers, of all disks.
#[test]
fn a_move_reads_no_map_file_while_other_disks_wait_for_it() {
    let medium = store_with_a_pool(1);
    let store = Arc::new(open(&medium).unwrap());
    create(&store, "default", "a");
    for (byte, snapshot) in (1..).zip(["r", "s", "t"]) {
        put(&store, "a", 0, byte);
        store.snapshot("a", snapshot, None).unwrap();
    }
    let (held, reads) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let (watched, seen, all) = (store.clone(), held.clone(), reads.clone());
    medium.set_hook(Some(Arc::new(move |event: &Event<'_>| {
        if event.call == Call::Read && event.name.ends_with(".map") {
            all.fetch_add(1, Ordering::SeqCst);
            seen.fetch_add(u64::from(watched.dropping.try_lock().is_none()), Ordering::SeqCst);
        }
        Ok(())
    })));
    assert!(store.begin_rework("a", &Change::Move("p".into()), 0).unwrap());
    let mut made = 0;
    // One record has the end of a layer and the beginning of the next one.
    while store.disk("a").unwrap().rework().is_some() {
        reworks::make(&store, "a");
        made += 1;
    }
    assert!(made >= 3, "{made}");
    medium.set_hook(None);
    assert!(reads.load(Ordering::SeqCst) > 0);
    assert_eq!(held.load(Ordering::SeqCst), 0);
    assert_eq!(blocks(&store, "a")[0], 3);
}
