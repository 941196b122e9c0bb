//! Layers that take the place of others. docs/format.md, "A layer that is being made".

use super::family::{blocks, put, read_all, read_snapshot};
use super::*;
use crate::format::lineage::{LayerEntry, Seal};
use crate::format::record::MapRoot;
use crate::format::rework::{Purpose, Rework};
use crate::store::{Change, CopySource};

/// Makes the whole of the layer that is being made for a disk, and puts it in its place.
pub(super) fn make(store: &Store, disk: &str) {
    let node = store.disk(disk).unwrap();
    let making = store.open_rework(&node).unwrap();
    let mut at = 0;
    while at < making.size() {
        at = making.step(at).unwrap().next;
    }
    assert!(store.finish_rework(&node, making).unwrap());
}

/// A blank disk that became a copy of the base `b`: it shows what lies below.
pub(super) fn create_copy(store: &Store, name: &str) {
    store.create_disks(&[blank(name)]).unwrap();
    let (node, source) = (store.disk(name).unwrap(), CopySource::Base(store.base("b").unwrap()));
    let sharing = store.share(&source, &node, None).unwrap().expect("nothing needs to be copied");
    node.change(|disk| disk.show((0, 8192), &sharing.ground, disk.delta().error_epoch())).unwrap().unwrap();
    assert_eq!(read_all(store, name), [7; 8192]);
}

/// A disk on the base `b` that was cut in the middle of a block, and is as large as before again.
pub(super) fn create_cut(store: &Store, name: &str) {
    store.create_disks(&[on("b", name, None)]).unwrap();
    for size in [100, 8192] {
        store.disk(name).unwrap().change(|disk| disk.resize(size)).unwrap().unwrap();
    }
    assert_eq!(read_all(store, name), cut());
}

/// What it shows.
pub(super) fn cut() -> Vec<u8> {
    [vec![7; 100], vec![0; 8092]].concat()
}

/// Two layers of a disk between which nothing tells any more. The upper one has block 1.
fn two_layers(store: &Store, disk: &str) {
    store.snapshot(disk, "one", None).unwrap();
    put(store, disk, 1, 5);
    store.snapshot(disk, "two", None).unwrap();
    store.remove_snapshot(disk, "one").unwrap();
}

/// Merges them, and looks at the disk and its snapshot: also after the death of the worker, and after a clean stop.
fn assert_merged(fixture: &TestStore, store: Store, disk: &str, wanted: &[u8]) {
    assert!(store.begin_rework(disk, &Change::Compact, 0).unwrap());
    make(&store, disk);
    let look = |store: &Store| {
        assert_eq!(store.disk(disk).unwrap().lineage().layers.len(), 1);
        for bytes in [read_all(store, disk), read_snapshot(store, disk, "two")] {
            assert!(bytes == wanted, "{:?}, not {:?}", blocks(&bytes), blocks(wanted));
        }
    };
    look(&store);
    drop(store);
    let store = fixture.open();
    look(&store);
    store.close().unwrap();
    drop(store);
    look(&fixture.open());
}

/// Guards D94.
#[test]
fn merged_layers_show_what_a_copy_shows_of_the_base() {
    let (fixture, store) = TestStore::with_base();
    create_copy(&store, "c");
    two_layers(&store, "c");
    assert_merged(&fixture, store, "c", &[[7; 4096], [5; 4096]].concat());
}

/// Guards D94.
#[test]
fn merged_layers_show_zeros_behind_a_cut_in_the_middle_of_a_block() {
    let (fixture, store) = TestStore::with_base();
    create_cut(&store, "a");
    two_layers(&store, "a");
    assert_merged(&fixture, store, "a", &[&cut()[..4096], &[5; 4096]].concat());
}

/// Guards D94.
#[test]
fn a_layer_that_an_earlier_version_began_with_another_overlap_is_not_used() {
    let (fixture, store) = TestStore::with_base();
    create_copy(&store, "c");
    two_layers(&store, "c");
    let node = store.disk("c").unwrap();
    let lineage = node.lineage();
    let (first, last) = (lineage.layers[0].number, lineage.layers[1].number);
    assert_eq!(lineage.layers[0].overlap, 0, "when it was made");
    let layer = LayerEntry {
        number: store.new_id().unwrap(),
        below: None,
        seal: Seal::Pending,
        size: 8192,
        overlap: 0,
        modified_ns: 0,
        map: MapRoot::default(),
    };
    let purpose = Purpose::Merge { first, last };
    node.begin_rework(Rework { purpose, layer, done: 0, rate: 0 }).unwrap();
    drop((node, store));
    let store = fixture.open();
    let node = store.disk("c").unwrap();
    assert_refused(store.open_rework(&node).map(drop), Kind::Invalid, "begin the job again");
    store.drop_rework(&node).unwrap();
    assert_merged(&fixture, store, "c", &[[7; 4096], [5; 4096]].concat());
}
