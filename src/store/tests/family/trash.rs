//! The trash of a store, and what stands on bases and layers.

mod usage;

use parking_lot::Mutex;

use super::*;
use crate::format::layout::data_path;
use crate::io::sim::{Keep, Rng};
use crate::store::tests::unread::SimStore;
use crate::store::{BaseChild, ChildKind, Removal};

const WEEK: Duration = Duration::from_secs(7 * 86_400);
const SNAPSHOTS: Removal = Removal { snapshots: true, now: false };

/// Waits until the clock has another time.
fn tick() {
    let before = sys::now_ns();
    while sys::now_ns() == before {
        std::thread::yield_now();
    }
}

/// A store with base `b` and a trash.
fn with_trash() -> (TestStore, Store) {
    let (fixture, store) = TestStore::with_base();
    store.keep_removed_for(WEEK);
    (fixture, store)
}

fn reopen(fixture: &TestStore) -> Store {
    let store = fixture.open();
    store.keep_removed_for(WEEK);
    store
}

fn byte(store: &Store, name: &str, block: u64) -> u8 {
    let disk = store.disk(name).unwrap().attach().unwrap();
    let mut byte = [0xee];
    disk.read(block * 4096, &mut byte).unwrap();
    byte[0]
}

fn in_trash(store: &Store) -> Vec<(String, u64)> {
    store.trashed().iter().map(|node| (node.name(), node.id())).collect()
}

/// Does what every start and every frontend does about removed disks.
fn purge_all(store: &Store) {
    for node in store.unlinked() {
        store.purge(node.id()).unwrap();
    }
    for disk in 0..100 {
        store.purge(disk).unwrap();
    }
}

/// Guards D82.
#[test]
fn a_trashed_disk_is_restored_with_its_data_and_snapshots_after_a_crash_and_a_stop() {
    let (fixture, store) = with_trash();
    store.create_disks(&[NewDisk { mode: 0o640, ..on("b", "a", Some(3 * 4096)) }]).unwrap();
    put(&store, "a", 1, 1);
    store.snapshot("a", "s", None).unwrap();
    put(&store, "a", 2, 2);
    let number = store.remove_disk("a", SNAPSHOTS).unwrap().id();
    assert_eq!((names(&store), in_trash(&store)), (vec![], vec![("a".to_owned(), number)]));
    assert!(store.snapshot_of("a", "s").is_none());
    purge_all(&store);
    // The worker dies; then the daemon stops.
    drop(store);
    let store = reopen(&fixture);
    purge_all(&store);
    store.close().unwrap();
    drop(store);
    let store = reopen(&fixture);
    purge_all(&store);
    let trashed = store.trashed().remove(0).trashed().unwrap();
    assert_eq!(trashed.purge_ns - trashed.removed_ns, WEEK.as_nanos() as i64);
    let node = store.restore(number, None).unwrap();
    assert_eq!((names(&store), in_trash(&store)), (vec!["a".to_owned()], vec![]));
    assert_eq!((node.attributes().mode, node.attributes().linked), (0o640, true));
    assert_eq!([0, 1, 2].map(|block| byte(&store, "a", block)), [7, 1, 2]);
    store.rollback("a", "s", None).unwrap();
    assert_eq!([0, 1, 2].map(|block| byte(&store, "a", block)), [7, 1, 0]);
    // It can be removed again.
    store.remove_disk("a", Removal { snapshots: true, now: true }).unwrap();
    purge_all(&store);
    assert_eq!(
        (in_trash(&store), fixture.files("disks").len(), fixture.files("deltas").len()),
        (vec![], 0, 0)
    );
}

#[test]
fn without_a_grace_time_nothing_is_kept() {
    let (fixture, store) = TestStore::with_base();
    store.create_disks(&[on("b", "a", None), blank("c"), blank("d")]).unwrap();
    store.unlink("a").unwrap();
    store.rename("c", "d", Replace::Yes).unwrap();
    assert_eq!(in_trash(&store), []);
    purge_all(&store);
    assert_eq!(fixture.files("disks").len(), 1);
    store.remove_base("b").unwrap();
}

/// Guards D82.
#[test]
fn a_trashed_disk_keeps_its_base_and_the_refusal_names_it() {
    let (_fixture, store) = with_trash();
    store.create_disks(&[on("b", "a", None)]).unwrap();
    let number = store.unlink("a").unwrap().id();
    assert_refused(
        store.remove_base("b"),
        Kind::InUse,
        &format!("trashed disk a (plyfs trash purge {number})"),
    );
    // The trash is turned off: what is in it keeps its time.
    store.keep_removed_for(Duration::ZERO);
    purge_all(&store);
    assert_refused(store.remove_base("b"), Kind::InUse, "trashed disk a");
    store.discard(number).unwrap();
    assert_refused(store.restore(number, None).map(drop), Kind::NotFound, "it is not in the trash");
    store.purge(number).unwrap();
    store.remove_base("b").unwrap();
}

#[test]
fn the_name_of_a_trashed_disk_is_free_and_a_taken_name_is_refused_with_the_remedy() {
    let (fixture, store) = with_trash();
    let make = |byte| {
        store.create_disks(&[blank("a")]).unwrap();
        put(&store, "a", 0, byte);
        store.unlink("a").unwrap().id()
    };
    let (first, second) = (make(1), make(2));
    store.create_disks(&[blank("a")]).unwrap();
    put(&store, "a", 0, 3);
    assert_eq!(in_trash(&store), [("a".to_owned(), first), ("a".to_owned(), second)]);
    let remedy = format!("plyfs trash restore {first} --as NAME");
    assert_refused(store.restore(first, None).map(drop), Kind::Exists, &remedy);
    assert_refused(store.restore(first, Some("a")).map(drop), Kind::Exists, &remedy);
    assert_refused(store.restore(first, Some("a/b")).map(drop), Kind::Invalid, "a name has");
    assert_refused(store.restore(9999, None).map(drop), Kind::NotFound, "plyfs trash ls");
    assert_refused(store.discard(9999).map(drop), Kind::NotFound, "plyfs trash ls");
    let linked = store.disk("a").unwrap().id();
    assert_refused(store.restore(linked, None).map(drop), Kind::NotFound, "it is not in the trash");
    assert_refused(store.discard(linked).map(drop), Kind::NotFound, "it is not in the trash");
    store.restore(first, Some("old")).unwrap();
    store.unlink("a").unwrap();
    store.restore(second, None).unwrap();
    drop(store);
    // The order of names holds after a crash.
    let store = reopen(&fixture);
    assert_eq!(names(&store), ["a", "old"]);
    assert_eq!((byte(&store, "a", 0), byte(&store, "old", 0)), (2, 1));
    assert_eq!(in_trash(&store), [("a".to_owned(), linked)]);
}

/// Guards D82.
#[test]
fn a_disk_that_a_rename_replaces_goes_to_the_trash() {
    let (fixture, store) = with_trash();
    let made = store.create_disks(&[blank("a"), blank("b2")]).unwrap();
    put(&store, "a", 0, 1);
    put(&store, "b2", 0, 2);
    store.rename("b2", "a", Replace::Yes).unwrap();
    purge_all(&store);
    drop(store);
    let store = reopen(&fixture);
    purge_all(&store);
    assert_eq!(in_trash(&store), [("a".to_owned(), made[0].id())]);
    store.restore(made[0].id(), Some("c")).unwrap();
    assert_eq!((byte(&store, "a", 0), byte(&store, "c", 0)), (2, 1));
}

/// A purge of what a clone shares: its layers stay.
#[test]
fn a_clone_keeps_the_layers_of_a_purged_disk() {
    let (fixture, store) = with_trash();
    store.create_disks(&[on("b", "a", Some(3 * 4096))]).unwrap();
    put(&store, "a", 1, 1);
    store.clone_disks(&Origin::parse("a"), &[NewDisk { size: None, ..blank("c") }], None).unwrap();
    put(&store, "a", 2, 2);
    let shared = store.disk("a").unwrap().lineage().layers[0].number;
    let number = store.unlink("a").unwrap().id();
    let trash = store.trash();
    let own = store.layer_bytes(trash[0].node.lineage().delta);
    assert!(trash[0].bytes >= own && trash[0].bytes < own + store.layer_bytes(shared), "only its own bytes");
    assert_eq!(store.trash_bytes(), trash[0].bytes);
    store.discard(number).unwrap();
    store.purge(number).unwrap();
    assert!(fixture.path(&data_path(shared)).exists());
    assert_eq!([0, 1, 2].map(|block| byte(&store, "c", block)), [7, 1, 0]);
}

#[test]
fn what_two_trashed_disks_share_is_free_once_both_are_purged() {
    let (fixture, store) = with_trash();
    store.create_disks(&[blank("a")]).unwrap();
    put(&store, "a", 1, 1);
    store.clone_disks(&Origin::parse("a"), &[NewDisk { size: None, ..blank("c") }], None).unwrap();
    let shared = store.disk("a").unwrap().lineage().layers[0].number;
    let numbers = ["a", "c"].map(|name| store.unlink(name).unwrap().id());
    let alone: u64 = store.trash().iter().map(|disk| disk.bytes).sum();
    assert!(store.trash_bytes() >= alone + store.layer_bytes(shared), "it counts once, and for neither");
    for number in numbers {
        store.discard(number).unwrap();
        store.purge(number).unwrap();
    }
    assert_eq!((store.trash().len(), store.trash_bytes(), fixture.files("deltas").len()), (0, 0, 0));
}

#[test]
fn disks_expire_in_the_order_of_their_removal_and_not_before_their_time() {
    let (_fixture, store) = with_trash();
    store.create_disks(&[blank("a"), blank("c"), blank("d")]).unwrap();
    let numbers = ["c", "a"].map(|name| {
        tick();
        store.unlink(name).unwrap().id()
    });
    tick();
    store.keep_removed_for(Duration::from_secs(1));
    let soon = store.unlink("d").unwrap().id();
    let now = sys::now_ns();
    let after = |time: Duration| now + time.as_nanos() as i64;
    assert!(store.expired(now).is_empty());
    assert_eq!(store.expired(after(Duration::from_secs(2))), [soon]);
    assert_eq!(store.expired(after(WEEK)), [numbers[0], numbers[1], soon]);
}

/// Guards D82.
#[test]
fn a_power_cut_at_each_write_leaves_a_disk_with_its_name_or_in_the_trash() {
    type Act = fn(&Store);
    let acts: [(&str, Act); 4] = [
        ("remove", |store| drop(store.unlink("a").unwrap())),
        ("rename over", |store| drop(store.rename("c", "a", Replace::Yes).unwrap())),
        ("restore", |store| drop(store.restore(store.trashed()[0].id(), Some("back")).unwrap())),
        ("stop", |store| store.close().unwrap()),
    ];
    for (what, act) in acts {
        let sim = SimStore::new();
        let store = sim.open();
        store.keep_removed_for(WEEK);
        store.create_disks(&[blank("gone"), blank("a"), blank("c")]).unwrap();
        for (name, byte) in [("gone", 1), ("a", 2), ("c", 3)] {
            put(&store, name, 0, byte);
            store.disk(name).unwrap().change(|disk| disk.flush(0)).unwrap().unwrap();
        }
        store.unlink("gone").unwrap();
        let seen: Arc<Mutex<Vec<SimMedium>>> = Arc::default();
        let (log, source) = (seen.clone(), sim.medium.clone());
        sim.medium.set_hook(Some(Arc::new(move |_: &Event<'_>| {
            log.lock().push(source.fork());
            Ok(())
        })));
        act(&store);
        sim.medium.set_hook(None);
        let forks = std::mem::take(&mut *seen.lock());
        assert!(!forks.is_empty(), "{what}");
        for (at, fork) in forks.iter().enumerate() {
            for seed in 0..8 {
                let keep = Keep { sectors: 50, lengths: 50, entries: 50, stale: false };
                let medium = fork.crash(&mut Rng::new(seed), keep);
                let cache = Arc::new(BlockCache::new(1 << 20).unwrap());
                let live: Arc<SimLive> = Arc::default();
                let store =
                    Store::open_on(Arc::new(medium), |_| Ok(live), cache, Some(0), Arc::new(OpenHere))
                        .unwrap();
                purge_all(&store);
                let mut found = Vec::new();
                for node in store.disks_after(0).into_iter().chain(store.trashed()) {
                    let mut byte = [0xee];
                    node.attach().unwrap().read(0, &mut byte).unwrap();
                    found.push(byte[0]);
                }
                found.sort_unstable();
                assert_eq!(found, [1, 2, 3], "{what}, call {at}, seed {seed}");
                assert!(
                    store.disk("a").is_ok() || what == "remove",
                    "{what}: the name is never without a disk"
                );
            }
        }
    }
}

#[test]
fn a_removal_and_a_restore_that_the_storage_refuses_change_nothing() {
    let sim = SimStore::new();
    let store = sim.open();
    store.keep_removed_for(WEEK);
    store.create_disks(&[blank("a")]).unwrap();
    let number = store.disk("a").unwrap().id();
    let fault =
        || Fault { call: Call::Create, name: format!("{number}.disk"), skip: 0, times: 1, errno: libc::EIO };
    sim.medium.plan(fault());
    assert_refused(store.unlink("a").map(drop), Kind::Io, "disk a: writing its record");
    assert_eq!((names(&store), in_trash(&store)), (vec!["a".to_owned()], vec![]));
    store.unlink("a").unwrap();
    sim.medium.plan(fault());
    assert_refused(store.restore(number, None).map(drop), Kind::Io, "disk a: writing its record");
    sim.medium.plan(fault());
    assert_refused(store.discard(number).map(drop), Kind::Io, "disk a: writing its record");
    assert_eq!((names(&store), in_trash(&store)), (vec![], vec![("a".to_owned(), number)]));
    store.restore(number, None).unwrap();
    assert_eq!(names(&store), ["a"]);
}

/// A client of the mount keeps a disk that was removed while it is open; restored, it is the same disk.
#[test]
fn an_open_disk_goes_on_in_the_trash() {
    let (_fixture, store) = with_trash();
    store.create_disks(&[blank("a")]).unwrap();
    let disk = store.disk("a").unwrap().attach().unwrap();
    let node = store.unlink("a").unwrap();
    disk.write(0, &[5; 4096], 0).unwrap();
    disk.flush(0).unwrap();
    drop(disk);
    // Idle, it takes no descriptor.
    store.detach_idle(Duration::ZERO, Duration::ZERO);
    assert!(node.peek().is_none());
    store.restore(node.id(), None).unwrap();
    assert_eq!(byte(&store, "a", 0), 5);
}

#[test]
fn two_restores_under_one_name_and_a_purge_at_once_leave_one_result() {
    let (_fixture, store) = with_trash();
    for round in 0..40 {
        let mut numbers = Vec::new();
        for _ in 0..2 {
            store.create_disks(&[blank("a")]).unwrap();
            numbers.push(store.unlink("a").unwrap().id());
        }
        let restore = |number: u64| store.restore(number, Some("r")).is_ok();
        let (both, discarded) = std::thread::scope(|scope| {
            let first = scope.spawn(|| restore(numbers[0]));
            let second = scope.spawn(|| restore(numbers[1]));
            let discarded = scope.spawn(|| store.discard(numbers[0]).is_ok());
            let both = usize::from(first.join().unwrap()) + usize::from(second.join().unwrap());
            (both, discarded.join().unwrap())
        });
        purge_all(&store);
        assert_eq!(both, 1, "round {round}: one has the name");
        let left = 2 - usize::from(discarded);
        assert_eq!(names(&store).len() + in_trash(&store).len(), left, "round {round}");
        store.remove_disk("r", Removal { snapshots: false, now: true }).unwrap();
        for (_, number) in in_trash(&store) {
            store.discard(number).unwrap();
        }
        purge_all(&store);
    }
}

#[test]
fn the_children_of_a_base_are_disks_snapshots_and_trashed_disks() {
    let (fixture, store) = with_trash();
    let made = store.create_disks(&[on("b", "a", None), on("b", "c", None), blank("d")]).unwrap();
    let snapshot = store.snapshot("a", "s", None).unwrap().number;
    store.snapshot("c", "s", None).unwrap();
    store.remove_disk("c", SNAPSHOTS).unwrap();
    let base = store.base("b").unwrap().id();
    let child = |name: &str, number, kind| BaseChild { name: name.into(), number, kind };
    let wanted = [
        child("a", made[0].id(), ChildKind::Disk),
        child("a@s", snapshot, ChildKind::Snapshot),
        child("c", made[1].id(), ChildKind::Trashed),
    ];
    assert_eq!(store.base_children(base), wanted);
    drop(store);
    let store = reopen(&fixture);
    assert_eq!(store.base_children(base), wanted, "derived from the records");
    // A removed disk that is still open.
    store.remove_disk("a", Removal { snapshots: true, now: true }).unwrap();
    assert_eq!(store.base_children(base)[0], child("a", made[0].id(), ChildKind::Removed));
}

#[test]
fn the_children_of_a_disk_are_those_that_share_a_layer_it_made() {
    let (_fixture, store) = with_trash();
    store.create_disks(&[on("b", "a", Some(4 * 4096)), blank("alone")]).unwrap();
    let clone = |origin: &str, name: &str| {
        let new = NewDisk { size: None, ..blank(name) };
        store.clone_disks(&Origin::parse(origin), &[new], None).unwrap();
    };
    put(&store, "a", 0, 1);
    store.snapshot("a", "monday", None).unwrap();
    clone("a@monday", "c");
    put(&store, "a", 1, 2);
    store.snapshot("a", "tuesday", None).unwrap();
    clone("a@tuesday", "d");
    put(&store, "c", 2, 3);
    clone("c", "e");
    store.unlink("d").unwrap();
    let children = |of: &str| -> Vec<(String, Vec<String>, usize)> {
        let list = store.disk_children(&Origin::parse(of)).unwrap();
        list.into_iter().map(|child| (child.name, child.on, child.layers.len())).collect()
    };
    let child = |name: &str, on: &[&str], layers| {
        (name.to_owned(), on.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>(), layers)
    };
    let (c, d, e) = (child("c", &["monday"], 1), child("d", &["tuesday"], 2), child("e", &["monday"], 1));
    assert_eq!(children("a"), [c.clone(), d.clone(), e.clone()]);
    assert_eq!(children("a@monday"), [c, e]);
    assert_eq!(children("a@tuesday"), [d]);
    // What a clone took over is not its own.
    assert_eq!(children("c"), [child("e", &[], 2)]);
    assert_eq!(children("e"), []);
    assert_eq!(children("alone"), []);
    let kinds: Vec<_> =
        store.disk_children(&Origin::parse("a")).unwrap().into_iter().map(|child| child.kind).collect();
    assert_eq!(kinds, [ChildKind::Disk, ChildKind::Trashed, ChildKind::Disk]);
    for (unknown, part) in
        [("d", "disk d: there is no disk"), ("a@friday", "snapshot a@friday: there is no snapshot")]
    {
        assert_refused(store.disk_children(&Origin::parse(unknown)).map(drop), Kind::NotFound, part);
    }
}
