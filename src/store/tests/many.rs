//! What a disk costs that is listed and not in use, and work that must not grow with their number.

use std::sync::atomic::Ordering;
use std::time::Instant;

use super::*;
use crate::format::limits::Limits;
use crate::io::HostMedium;
use crate::io::prefault::counted::left_by;
use crate::stats::Operation;
use crate::store::PreloadedRecords;

const NO_TIME: Duration = Duration::ZERO;
const FEW: usize = 100;
const MANY: usize = 1100;

fn store_of(disks: usize) -> TestStore {
    let (fixture, store) = TestStore::with_base();
    let new: Vec<_> = (0..disks).map(|n| on("b", &format!("instance-{n:08x}"), None)).collect();
    store.create_disks(&new).unwrap();
    store.close().unwrap();
    fixture
}

/// Bytes for each disk of a store that is kept by what `make` makes of it.
fn for_each<T>(make: impl Fn(&TestStore) -> T) -> usize {
    let of = |disks| {
        let fixture = store_of(disks);
        let (made, bytes) = left_by(|| make(&fixture));
        drop(made);
        bytes
    };
    (of(MANY) - of(FEW)) / (MANY - FEW)
}

// 100,000 disks took 421 MiB.
#[test]
fn a_listed_disk_takes_little_memory() {
    let bytes = for_each(TestStore::open);
    println!("{bytes} bytes for each disk");
    assert!(bytes <= 900, "{bytes} bytes for each disk");
}

#[test]
fn a_record_that_was_read_ahead_takes_little_memory() {
    let bytes = for_each(|fixture| {
        let medium = HostMedium::new(&fixture.path("")).unwrap();
        PreloadedRecords::read_from(&medium, PreloadedRecords::default(), -3_600_000_000_000).unwrap()
    });
    println!("{bytes} bytes for each record");
    assert!(bytes <= 550, "{bytes} bytes for each record");
}

#[test]
fn an_entry_of_the_list_of_names_takes_little_memory() {
    let with_list = |fixture: &TestStore| {
        let store = fixture.open();
        store.write_names(i64::MAX);
        store
    };
    let bytes = for_each(with_list) - for_each(TestStore::open);
    println!("{bytes} bytes for each entry");
    assert!(bytes <= 200, "{bytes} bytes for each entry");
}

// In this process; the live map comes on top.
#[test]
fn an_attached_disk_takes_little_memory() {
    let used = |fixture: &TestStore| {
        let store = fixture.open();
        for node in store.disks_after(0) {
            let disk = node.attach().unwrap();
            disk.write(0, &[1; 4096], 0).unwrap();
            disk.read(4096, &mut [0; 4096]).unwrap();
            node.counters().succeeded(Operation::Read, 4096, NO_TIME);
            node.counters().succeeded(Operation::Write, 4096, NO_TIME);
        }
        store
    };
    let bytes = for_each(used) - for_each(TestStore::open);
    println!("{bytes} bytes for each attached disk");
    assert!(bytes <= 4096, "{bytes} bytes for each attached disk");
}

fn visited(store: &Store) -> u64 {
    store.context.index.visited.load(Ordering::Relaxed)
}

/// Runs `work`, and returns how many disks it looked at.
fn visits<T>(store: &Store, work: impl FnOnce() -> T) -> u64 {
    let before = visited(store);
    work();
    visited(store) - before
}

fn upkeep(store: &Store) {
    store.tend_layers();
    store.detach_idle(Duration::from_secs(600), Duration::from_secs(600));
}

// Each tick of the upkeep looked at all disks several times, and so did each status.
#[test]
fn upkeep_looks_at_what_changed_only() {
    let (_fixture, store) = TestStore::with_base();
    let quota = Limits { quota: Some(1 << 20), ..Limits::default() };
    let new = |n: usize| {
        let limits = if n < 20 { quota } else { Limits::default() };
        NewDisk { limits, ..blank(&format!("m{n}")) }
    };
    store.create_disks(&(0..200).map(new).collect::<Vec<_>>()).unwrap();
    upkeep(&store);
    assert_eq!(visits(&store, || upkeep(&store)), 0, "nothing changed");
    // A snapshot of a disk with a quota: the disk itself, and those that may share layers with it.
    write(&store, "m0");
    store.snapshot("m0", "s", None).unwrap();
    assert!((1..=4).contains(&visits(&store, || upkeep(&store))));
    assert_eq!(visits(&store, || upkeep(&store)), 0, "it is counted");
    assert_eq!(store.disk("m0").unwrap().quota_used(), Some(4096));
    // What a change drops is removed at once, and is not looked for again.
    store.remove_snapshot("m0", "s").unwrap();
    upkeep(&store);
    assert_eq!(visits(&store, || upkeep(&store)), 0, "nothing is left to remove");
    // Another pass looks for what could not be removed, and for nothing else.
    let node = store.disk("m100").unwrap();
    let number = store.new_number().unwrap();
    node.update(|record| record.lineage.dropped.push(number)).unwrap();
    assert!((1..=3).contains(&visits(&store, || store.remove_dropped_at(Instant::now()))));
    assert!(!node.has_dropped());
    assert_eq!(visits(&store, || store.remove_dropped_at(Instant::now())), 0);
}

#[test]
fn status_looks_at_disks_without_a_name_or_with_a_quota_only() {
    let fixture = store_of(50);
    let store = fixture.open();
    let status =
        || (store.disk_count(), store.unlinked().len(), store.trashed().len(), store.disks_at_quota().len());
    assert_eq!(status(), (50, 0, 0, 0));
    assert_eq!(visits(&store, status), 0);
    store.keep_removed_for(Duration::from_secs(600));
    let number = store.unlink("instance-00000001").unwrap().id();
    assert_eq!(status(), (49, 0, 1, 0));
    assert_eq!(visits(&store, status), 2, "the disk in the trash, twice");
    store.restore(number, None).unwrap();
    assert_eq!((status(), visits(&store, status)), ((50, 0, 0, 0), 0));
    // A disk that another one replaces has no name.
    store.rename("instance-00000002", "instance-00000003", Replace::Yes).unwrap();
    assert_eq!(status(), (49, 0, 1, 0));
    store.discard(store.trashed()[0].id()).unwrap();
    assert_eq!(status(), (49, 1, 0, 0));
    store.purge(store.unlinked()[0].id()).unwrap();
    assert_eq!((status(), visits(&store, status)), ((49, 0, 0, 0), 0));
    // The next worker finds the same.
    store.unlink("instance-00000004").unwrap();
    drop(store);
    let store = fixture.open();
    assert_eq!((store.disk_count(), store.trashed().len()), (48, 1));
}
