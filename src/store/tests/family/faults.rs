//! Snapshots, clones and rollback of a store whose storage fails, or whose worker dies, in the middle.

use parking_lot::Mutex;

use super::*;
use crate::disk::Disk;
use crate::format::layout::{data_path, disk_record, map_path};
use crate::format::lineage::{LayerEntry, Seal};
use crate::format::record::MapRoot;
use crate::io::sim::{Keep, Rng};
use crate::store::CopySource;
use crate::store::tests::unread::SimStore;

const NOW: Duration = Duration::ZERO;

fn fault(call: Call, name: impl Into<String>, skip: u64) -> Fault {
    Fault { call, name: name.into(), skip, times: 1, errno: libc::EIO }
}

fn write_block(store: &Store, name: &str, block: u64, byte: u8, epoch: u64) {
    let node = store.disk(name).unwrap();
    node.change(|disk| disk.write(block * 4096, &[byte; 4096], epoch)).unwrap().unwrap();
}

fn flush(store: &Store, name: &str) {
    store.disk(name).unwrap().change(|disk| disk.flush(0)).unwrap().unwrap();
}

/// Makes a snapshot fail between the first two steps of the sealing, and the attempt to undo the first step as well.
/// Returns the number of the disk.
fn sealing_that_is_not_undone(sim: &SimStore, store: &Store, epoch: u64) -> u64 {
    let node = store.disk("a").unwrap();
    node.change(|disk| disk.flush(epoch)).unwrap().unwrap();
    let next = store.create_disks(&[blank("last")]).unwrap()[0].id() + 1;
    // The snapshot has the next number, its new delta the one after.
    sim.medium.plan(fault(Call::Open, data_path(next + 1), 0));
    sim.medium.plan(fault(Call::Create, disk_record(node.id()), 1));
    assert!(store.snapshot("a", "fails", None).is_err());
    let pending = node.lineage().layers.iter().filter(|layer| layer.is_pending()).count();
    assert_eq!(pending, 1, "the record still has the first step");
    node.id()
}

/// Adds layers without contents to a disk, up to what its record can hold.
fn fill_with_layers(store: &Store, name: &str) -> u64 {
    let layer = |number, below| LayerEntry {
        number,
        below,
        seal: Seal::Sealed,
        size: 8192,
        overlap: 0,
        modified_ns: 0,
        map: MapRoot::default(),
    };
    let fill = |record: &mut DiskRecord, count: u64| {
        for number in 0..count {
            let below = record.lineage.layers.len().checked_sub(1);
            record.lineage.layers.push(layer(3000 + number, below));
        }
        record.lineage.below = record.lineage.layers.len().checked_sub(1);
    };
    let node = store.disk(name).unwrap();
    let fits = |count: &u64| node.update(|record| fill(record, *count)).is_ok();
    (0..1300).rev().find(fits).unwrap()
}

// The delta that was never used became a layer that no sealing completed, a snapshot stood on it, and the record could
// not be read again.
#[test]
fn a_snapshot_after_a_sealing_that_was_not_undone_leaves_a_sound_record() {
    let sim = SimStore::new();
    let store = sim.open();
    store.create_disks(&[blank("a")]).unwrap();
    put(&store, "a", 0, 1);
    sealing_that_is_not_undone(&sim, &store, 0);
    put(&store, "a", 1, 2);
    store.snapshot("a", "s", None).unwrap();
    put(&store, "a", 0, 3);
    clone(&store, "a", "c");
    drop(store);
    let store = sim.open();
    assert!(store.damaged().is_empty(), "{:?}", store.damaged());
    assert_eq!(blocks(&read_all(&store, "a")), [3, 2]);
    assert_eq!(blocks(&read_all(&store, "c")), [3, 2]);
    assert_eq!(blocks(&read_snapshot(&store, "a", "s")), [1, 2]);
}

// The layer of a removed disk was sealed first, and an error of the storage in that was told to none.
#[test]
fn the_detaching_of_idle_disks_does_not_seal_what_is_being_removed() {
    let sim = SimStore::new();
    let store = sim.open();
    store.create_disks(&[blank("a")]).unwrap();
    put(&store, "a", 0, 1);
    sealing_that_is_not_undone(&sim, &store, 0);
    drop(store);
    let store = sim.open();
    put(&store, "a", 1, 2);
    let node = store.unlink("a").unwrap();
    let pending =
        |node: &crate::store::DiskNode| node.lineage().layers.iter().filter(|l| l.is_pending()).count();
    assert_eq!(pending(&node), 1);
    store.detach_idle(NOW, NOW);
    assert_eq!(pending(&node), 1, "its files are about to go");
    assert!(node.peek().is_some(), "a client may have it open");
    store.purge(node.id()).unwrap();
}

// A client whose handle is newer than a failed flush got EIO for ever.
/// Guards D79.
#[test]
fn a_handle_stays_valid_when_the_worker_dies_in_a_sealing() {
    let sim = SimStore::new();
    let store = sim.open();
    store.create_disks(&[blank("a")]).unwrap();
    put(&store, "a", 0, 1);
    sim.medium.plan(fault(Call::SyncData, ".data", 0));
    let node = store.disk("a").unwrap();
    assert!(node.change(|disk| disk.flush(0)).unwrap().is_err());
    node.attach().unwrap().delta().opened();
    write_block(&store, "a", 0, 2, 1);
    sealing_that_is_not_undone(&sim, &store, 1);
    drop((node, store));
    let store = sim.open();
    write_block(&store, "a", 1, 3, 1);
    store.disk("a").unwrap().change(|disk| disk.flush(1)).unwrap().unwrap();
    assert_eq!(blocks(&read_all(&store, "a")), [2, 3]);
}

#[test]
fn a_handle_stays_valid_in_a_rollback() {
    let sim = SimStore::new();
    let store = sim.open();
    store.create_disks(&[blank("a")]).unwrap();
    store.snapshot("a", "s", None).unwrap();
    put(&store, "a", 0, 1);
    sim.medium.plan(fault(Call::SyncData, ".data", 0));
    let node = store.disk("a").unwrap();
    assert!(node.change(|disk| disk.flush(0)).unwrap().is_err());
    node.attach().unwrap().delta().opened();
    store.rollback("a", "s", None).unwrap();
    write_block(&store, "a", 1, 3, 1);
    assert_eq!(blocks(&read_all(&store, "a")), [0, 3]);
}

// The record was written without a look at its length, and the next start found it damaged.
#[test]
fn a_clone_whose_record_would_be_too_large_is_refused() {
    let fixture = TestStore::new();
    let store = fixture.open();
    store.create_disks(&[blank("a")]).unwrap();
    fill_with_layers(&store, "a");
    let long = new(&"x".repeat(128));
    let token = Some(Token::of_hash([1; 16]));
    let refused = store.clone_disks(&Origin::parse("a"), &[long], token);
    assert_refused(refused, Kind::Invalid, "as many layers as");
    assert_eq!(fixture.files("disks").len(), 1);
    // What does not add a layer has room.
    store.rename("a", &"y".repeat(128), Replace::No).unwrap();
    drop(store);
    assert!(fixture.open().damaged().is_empty());
}

// The index was made by recursion, which needed more stack than a thread has.
/// Guards D76.
#[test]
fn a_disk_with_many_layers_and_without_indexes_can_be_read() {
    let fixture = TestStore::new();
    let store = fixture.open();
    store.create_disks(&[blank("a")]).unwrap();
    assert!(fill_with_layers(&store, "a") > 1000);
    drop(store);
    let store = fixture.open();
    put(&store, "a", 1, 1);
    assert_eq!(blocks(&read_all(&store, "a")), [0, 1]);
    assert_eq!(fixture.files("deltas").iter().filter(|file| file.contains(".index")).count(), 1);
}

// The record named the snapshot, and what the disk had was dropped, before it was known that the snapshot cannot be read.
#[test]
fn a_rollback_to_a_snapshot_that_cannot_be_read_changes_nothing() {
    let (fixture, store) = TestStore::with_base();
    store.create_disks(&[on("b", "a", Some(3 * 4096))]).unwrap();
    store.snapshot("a", "zero", None).unwrap();
    put(&store, "a", 1, 1);
    store.snapshot("a", "one", None).unwrap();
    store.rollback("a", "zero", None).unwrap();
    put(&store, "a", 0, 9);
    store.close().unwrap();
    let map = store.disk("a").unwrap().lineage().layers[0].clone();
    drop(store);
    let map = fixture.path(&map_path(map.number, map.map.generation));
    let whole = fs::read(&map).unwrap();
    fs::write(&map, b"damaged").unwrap();
    for file in fixture.files("deltas").iter().filter(|file| file.ends_with(".index")) {
        fs::remove_file(fixture.path(&format!("deltas/{file}"))).unwrap();
    }
    let store = fixture.open();
    assert!(store.rollback("a", "one", None).is_err());
    store.tend_layers();
    assert_eq!(blocks(&read_all(&store, "a")), [9, 7, 0]);
    drop(store);
    let store = fixture.open();
    assert_eq!(blocks(&read_all(&store, "a")), [9, 7, 0]);
    fs::write(&map, whole).unwrap();
    store.rollback("a", "one", None).unwrap();
    assert_eq!(blocks(&read_all(&store, "a")), [7, 1, 0]);
}

// The record on the medium was that of the rollback, and a later flush did not write it again.
#[test]
fn a_flush_after_a_rollback_that_failed_survives_a_power_cut() {
    let sim = SimStore::new();
    let store = sim.open();
    store.create_disks(&[blank("a")]).unwrap();
    store.snapshot("a", "s", None).unwrap();
    put(&store, "a", 0, 1);
    flush(&store, "a");
    // The rename of the record happens, and it is unknown whether it is durable.
    sim.medium.plan(fault(Call::SyncDir, "disks", 0));
    assert!(store.rollback("a", "s", None).is_err());
    put(&store, "a", 1, 2);
    flush(&store, "a");
    let keep = Keep { sectors: 100, lengths: 100, entries: 100, stale: false };
    let mut after = SimStore::new();
    after.medium = sim.medium.crash(&mut Rng::new(1), keep);
    drop(store);
    let store = after.open();
    store.remove_all_dropped();
    assert_eq!(blocks(&read_all(&store, "a")), [1, 2]);
}

// The record in the store listed the layer as dropped, which the clone needs.
/// Guards D80.
#[test]
fn a_clone_of_a_snapshot_whose_removal_failed_keeps_its_layer() {
    let sim = SimStore::new();
    let store = sim.open();
    store.create_disks(&[blank("a")]).unwrap();
    store.snapshot("a", "zero", None).unwrap();
    put(&store, "a", 0, 1);
    store.snapshot("a", "one", None).unwrap();
    store.rollback("a", "zero", None).unwrap();
    sim.medium.plan(fault(Call::SyncDir, "disks", 0));
    assert!(store.remove_snapshot("a", "one").is_err());
    clone(&store, "a@one", "c");
    drop(store);
    let store = sim.open();
    store.remove_all_dropped();
    assert_eq!(blocks(&read_all(&store, "c")), [1, 0]);
    store.close().unwrap();
    drop(store);
    assert_eq!(blocks(&read_all(&sim.open(), "c")), [1, 0]);
}

// The files of layers and of deltas with other numbers than that of their disk counted as those of no record.
/// Guards D80.
#[test]
fn a_clean_stop_keeps_the_maps_of_a_disk_whose_record_is_damaged() {
    let (fixture, store) = TestStore::with_base();
    let node = store.create_disks(&[on("b", "a", Some(3 * 4096))]).unwrap().remove(0);
    // Neither delta has data: both are known by their maps only.
    let zero = |from: u64| node.change(|disk| disk.zero(from * 4096, 4096, 0)).unwrap().unwrap();
    zero(0);
    store.snapshot("a", "s", None).unwrap();
    zero(1);
    store.close().unwrap();
    let record = fixture.path(&format!("disks/{}.disk", node.id()));
    drop((node, store));
    let whole = fs::read(&record).unwrap();
    fs::write(&record, b"damaged").unwrap();
    fixture.open().close().unwrap();
    fs::write(&record, whole).unwrap();
    let store = fixture.open();
    assert_eq!(blocks(&read_all(&store, "a")), [0, 0, 0]);
    assert_eq!(blocks(&read_snapshot(&store, "a", "s")), [0, 7, 0]);
}

// The end of the data read as zeros.
#[test]
fn a_layer_whose_data_file_is_too_short_is_not_read_as_zeros() {
    let (fixture, store) = TestStore::with_base();
    store.create_disks(&[on("b", "a", Some(3 * 4096 + 100))]).unwrap();
    let node = store.disk("a").unwrap();
    node.change(|disk| disk.write(0, &[5; 3 * 4096 + 100], 0)).unwrap().unwrap();
    store.snapshot("a", "s", None).unwrap();
    let layer = node.lineage().layers[0].number;
    drop((node, store));
    for len in [3 * 4096, 4096, 0] {
        let data = fs::OpenOptions::new().write(true).open(fixture.path(&data_path(layer))).unwrap();
        data.set_len(len).unwrap();
        let store = fixture.open();
        let disk = store.disk("a").unwrap().attach().unwrap();
        let mut bytes = [0; 4096];
        if len >= 4096 {
            assert!(disk.read(0, &mut bytes).is_ok() && bytes == [5; 4096]);
        }
        let mut end = [0; 100];
        for _ in 0..2 {
            assert!(disk.read_now(3 * 4096, &mut end).is_none() && disk.read(3 * 4096, &mut end).is_err());
        }
        let error = disk.read(2 * 4096 + 1000, &mut bytes).unwrap_err().to_string();
        assert!(error.contains("layer"), "{error}");
    }
}

/// A request holds the disk that the sealing puts in the slot for a moment.
///
/// Guards D47.
#[test]
fn a_disk_in_use_is_not_detached_after_a_sealing() {
    let sim = SimStore::new();
    let store = sim.open();
    let node = store.create_disks(&[blank("a")]).unwrap().remove(0);
    put(&store, "a", 0, 1);
    let held: Arc<Mutex<Option<Arc<Disk>>>> = Arc::default();
    let (slot, seen, record) = (held.clone(), node.clone(), disk_record(node.id()));
    sim.medium.set_hook(Some(Arc::new(move |event: &Event<'_>| {
        let disk = seen.peek().filter(|disk| !disk.below().pending.is_empty());
        if event.call == Call::Rename && event.name.contains(&record) && disk.is_some() {
            *slot.lock() = disk;
        }
        Ok(())
    })));
    store.snapshot("a", "s", None).unwrap();
    sim.medium.set_hook(None);
    let disk = held.lock().take().unwrap();
    store.tend_layers();
    store.detach_idle(NOW, NOW);
    disk.write(4096, &[2; 4096], 0).unwrap();
    drop(disk);
    assert_eq!(blocks(&read_all(&store, "a")), [1, 2]);
    store.tend_layers();
    store.detach_idle(NOW, NOW);
    assert!(node.peek().is_none(), "it is detached when no request uses it");
    assert_eq!(blocks(&read_all(&store, "a")), [1, 2]);
}

// Only the last rollback was looked at.
#[test]
fn a_read_that_began_before_two_rollbacks_ends() {
    let fixture = TestStore::new();
    let store = fixture.open();
    store.create_disks(&[blank("a")]).unwrap();
    store.snapshot("a", "zero", None).unwrap();
    put(&store, "a", 0, 1);
    store.snapshot("a", "one", None).unwrap();
    store.remove_snapshot("a", "one").unwrap();
    drop(store);
    let store = fixture.open();
    // Its layer was not read yet.
    let first = store.disk("a").unwrap().attach().unwrap();
    store.rollback("a", "zero", None).unwrap();
    let second = store.disk("a").unwrap().attach().unwrap();
    store.rollback("a", "zero", None).unwrap();
    drop(second);
    store.tend_layers();
    let mut bytes = [0xee; 8192];
    first.read(0, &mut bytes).unwrap();
    assert_eq!(blocks(&bytes), [1, 0]);
    assert!(!data_files(&fixture).is_empty());
    drop(first);
    store.tend_layers();
    assert!(data_files(&fixture).is_empty());
}

#[test]
fn a_read_of_a_snapshot_that_is_removed_ends() {
    let fixture = TestStore::new();
    let store = fixture.open();
    store.create_disks(&[blank("a")]).unwrap();
    store.snapshot("a", "zero", None).unwrap();
    put(&store, "a", 0, 1);
    store.snapshot("a", "one", None).unwrap();
    store.rollback("a", "zero", None).unwrap();
    drop(store);
    let store = fixture.open();
    let frozen = store.open_snapshot("a", "one").unwrap();
    store.remove_snapshot("a", "one").unwrap();
    let mut bytes = [0xee; 8192];
    frozen.read(0, &mut bytes, 0).unwrap();
    assert_eq!(blocks(&bytes), [1, 0]);
    drop(frozen);
    store.tend_layers();
    assert!(data_files(&fixture).is_empty());
}

// `plyfs check` called a store unclean after a clean stop.
#[test]
fn a_clean_stop_removes_the_unfinished_index_of_a_killed_worker() {
    let fixture = TestStore::new();
    let store = fixture.open();
    store.create_disks(&[blank("a")]).unwrap();
    put(&store, "a", 0, 1);
    store.snapshot("a", "s", None).unwrap();
    let layer = store.disk("a").unwrap().lineage().layers[0].number;
    fs::write(fixture.path(&format!("deltas/{layer}.index.tmp")), "half").unwrap();
    store.close().unwrap();
    let left = fixture.files("deltas");
    assert!(left.iter().all(|file| !file.ends_with(".tmp")), "{left:?}");
}

// A flush that began before the sealing failed after it. Handles of the disk went on as if nothing was lost.
/// Guards D79.
#[test]
fn a_flush_of_the_delta_below_that_fails_late_refuses_the_handles_of_the_disk() {
    let sim = SimStore::new();
    let store = sim.open();
    let node = store.create_disks(&[blank("a")]).unwrap().remove(0);
    put(&store, "a", 0, 1);
    let before = node.attach().unwrap();
    before.flush(0).unwrap();
    // The last flush before the seal finds no space.
    let (disk, record, medium) = (before.clone(), disk_record(node.id()), sim.medium.clone());
    sim.medium.set_hook(Some(Arc::new(move |event: &Event<'_>| {
        let is_first =
            event.call == Call::Rename && event.stage == Stage::Before && event.name.contains(&record);
        if is_first && disk.write(4096, &[2; 4096], 0).is_ok() {
            medium.plan(Fault { errno: libc::ENOSPC, times: 99, ..fault(Call::Write, ".map", 0) });
        }
        Ok(())
    })));
    assert!(store.snapshot("a", "s", None).is_err());
    sim.medium.set_hook(None);
    sim.medium.forget_faults();
    sim.medium.plan(fault(Call::SyncData, ".data", 0));
    assert!(before.flush(0).is_err());
    sim.medium.forget_faults();
    store.tend_layers();
    assert!(node.change(|disk| disk.write(0, &[3; 4096], 0)).unwrap().is_err());
    node.attach().unwrap().delta().opened();
    write_block(&store, "a", 0, 3, 1);
    assert_eq!(blocks(&read_all(&store, "a")), [3, 2]);
}

// A removal waited for the writes of another disk that was rolled back.
#[test]
fn the_removal_of_a_disk_does_not_wait_for_the_rollback_of_another() {
    let sim = SimStore::new();
    let store = Arc::new(sim.open());
    let node = store.create_disks(&[blank("a")]).unwrap().remove(0);
    put(&store, "a", 0, 1);
    store.snapshot("a", "s", None).unwrap();
    let names: Vec<String> = (0..64).map(|n| format!("c{n}")).collect();
    names.iter().for_each(|name| clone(&store, "a@s", name));
    put(&store, "a", 0, 2);
    let data = data_path(node.lineage().delta);
    let ((started, starts), (end, ends)) = (mpsc::channel(), mpsc::channel::<()>());
    let (started, ends) = (Mutex::new(started), Mutex::new(ends));
    sim.medium.set_hook(Some(Arc::new(move |event: &Event<'_>| {
        if event.call == Call::Write && event.stage == Stage::Before && event.name == data {
            started.lock().send(()).unwrap();
            let _ = ends.lock().recv();
        }
        Ok(())
    })));
    std::thread::scope(|scope| {
        scope.spawn(|| put(&store, "a", 0, 3));
        starts.recv().unwrap();
        scope.spawn(|| store.rollback("a", "s", None).unwrap());
        let (done, is_done) = mpsc::channel();
        let removing = store.clone();
        std::thread::spawn(move || {
            for name in names {
                let node = removing.unlink(&name).unwrap();
                removing.purge(node.id()).unwrap();
            }
            done.send(()).unwrap();
        });
        // The timeout is for a failing test only.
        let removed = is_done.recv_timeout(Duration::from_secs(20));
        drop(end);
        removed.unwrap();
    });
    sim.medium.set_hook(None);
    assert_eq!(blocks(&read_all(&store, "a")), [1, 0]);
}

// A partial write read what lies below under the lock that a sealing waits for, and later writes wait for the sealing.
#[test]
fn a_snapshot_does_not_wait_for_a_write_that_reads_what_lies_below() {
    let sim = SimStore::new();
    let store = Arc::new(sim.open());
    let node = store.create_disks(&[blank("a")]).unwrap().remove(0);
    put(&store, "a", 0, 1);
    store.snapshot("a", "one", None).unwrap();
    put(&store, "a", 1, 2);
    let data = data_path(node.lineage().layers[0].number);
    let ((started, starts), (end, ends)) = (mpsc::channel(), mpsc::channel::<()>());
    let (started, ends) = (Mutex::new(started), Mutex::new(ends));
    sim.medium.set_hook(Some(Arc::new(move |event: &Event<'_>| {
        if event.call == Call::Read && event.stage == Stage::Before && event.name == data {
            let _ = started.lock().send(());
            let _ = ends.lock().recv();
        }
        Ok(())
    })));
    std::thread::scope(|scope| {
        scope.spawn(|| node.change(|disk| disk.write(100, &[9; 10], 0)).unwrap().unwrap());
        starts.recv().unwrap();
        let (done, is_done) = mpsc::channel();
        let taking = store.clone();
        std::thread::spawn(move || {
            taking.snapshot("a", "two", None).unwrap();
            done.send(()).unwrap();
        });
        // The timeout is for a failing test only.
        let taken = is_done.recv_timeout(Duration::from_secs(20));
        drop(end);
        taken.unwrap();
    });
    sim.medium.set_hook(None);
    let bytes = read_all(&store, "a");
    assert_eq!((bytes[99], bytes[100], bytes[109], bytes[110], bytes[4096]), (1, 9, 9, 1, 2));
    assert_eq!(blocks(&read_snapshot(&store, "a", "two")), [1, 2]);
    assert!(read_snapshot(&store, "a", "two")[..4096].iter().all(|byte| *byte == 1));
}

// The disk got the base of the source, and its snapshot was read over that one.
/// Guards D81.
#[test]
fn a_copy_to_a_disk_with_snapshots_does_not_change_the_base_of_the_snapshots() {
    let (fixture, store) = TestStore::with_base();
    fs::write(fixture.path("../c.raw"), [8; 8192]).unwrap();
    store.add_base("c", fixture.tmp.path().join("c.raw").to_str().unwrap(), None).unwrap();
    store.create_disks(&[on("b", "a", None), on("c", "d", None)]).unwrap();
    put(&store, "a", 0, 1);
    store.snapshot("a", "s", None).unwrap();
    let to = store.disk("a").unwrap();
    to.change(|disk| disk.resize(0)).unwrap().unwrap();
    let shared = store.share(&CopySource::Disk(store.disk("d").unwrap()), &to, None).unwrap();
    assert_eq!(blocks(&read_snapshot(&store, "a", "s")), [1, 7]);
    assert!(shared.is_none());
    // What has the same base is shared.
    store.create_disks(&[on("b", "e", None)]).unwrap();
    assert!(store.share(&CopySource::Disk(store.disk("e").unwrap()), &to, None).unwrap().is_some());
    assert_eq!(blocks(&read_snapshot(&store, "a", "s")), [1, 7]);
}
