//! Snapshots, clones and rollback of a store.

mod backoff;
mod faults;
mod trash;

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::store::Origin;

pub(super) fn read_all(store: &Store, name: &str) -> Vec<u8> {
    let disk = store.disk(name).unwrap().attach().unwrap();
    let mut bytes = vec![0xee; disk.size() as usize];
    assert_eq!(disk.read(0, &mut bytes).unwrap().bytes(), disk.size());
    bytes
}

pub(super) fn read_snapshot(store: &Store, disk: &str, name: &str) -> Vec<u8> {
    let frozen = store.open_snapshot(disk, name).unwrap();
    let mut bytes = vec![0xee; frozen.size() as usize];
    frozen.read(0, &mut bytes, 0).unwrap();
    bytes
}

pub(super) fn put(store: &Store, name: &str, block: u64, byte: u8) {
    let node = store.disk(name).unwrap();
    node.change(|disk| disk.write(block * 4096, &[byte; 4096], 0)).unwrap().unwrap();
}

fn new(name: &str) -> NewDisk {
    NewDisk { size: None, ..blank(name) }
}

fn clone(store: &Store, origin: &str, name: &str) {
    store.clone_disks(&Origin::parse(origin), &[new(name)], None).unwrap();
}

pub(super) fn blocks(bytes: &[u8]) -> Vec<u8> {
    bytes.chunks(4096).map(|block| block[0]).collect()
}

/// Numbers of the deltas that have a data file.
fn data_files(fixture: &TestStore) -> Vec<String> {
    fixture.files("deltas").into_iter().filter(|name| name.ends_with(".data")).collect()
}

#[test]
fn a_clone_shows_what_its_origin_showed_and_neither_changes_the_other() {
    let (fixture, store) = TestStore::with_base();
    store.create_disks(&[on("b", "a", Some(5 * 4096))]).unwrap();
    put(&store, "a", 1, 1);
    clone(&store, "a", "c");
    put(&store, "a", 0, 2);
    put(&store, "c", 3, 3);
    clone(&store, "c", "d");
    put(&store, "c", 1, 4);
    let look = |store: &Store| ["a", "c", "d"].map(|name| blocks(&read_all(store, name)));
    let wanted = [vec![2, 1, 0, 0, 0], vec![7, 4, 0, 3, 0], vec![7, 1, 0, 3, 0]];
    assert_eq!(look(&store), wanted);
    // After the death of the worker, and after a clean stop.
    drop(store);
    let store = fixture.open();
    assert_eq!(look(&store), wanted);
    store.close().unwrap();
    drop(store);
    let store = fixture.open();
    assert_eq!(look(&store), wanted);
    assert_eq!(store.users().values().next().unwrap().len(), 3, "all need the base");
}

#[test]
fn a_clone_of_a_disk_that_was_not_written_makes_no_layer() {
    let (fixture, store) = TestStore::with_base();
    store.create_disks(&[on("b", "a", None)]).unwrap();
    clone(&store, "a", "c");
    store.snapshot("a", "s", None).unwrap();
    clone(&store, "a@s", "d");
    assert!(store.disk("c").unwrap().lineage().is_default(store.disk("c").unwrap().id()));
    for disk in ["a", "d"] {
        assert!(store.disk(disk).unwrap().lineage().layers.is_empty());
        assert_eq!(blocks(&read_all(&store, disk)), [7, 7]);
    }
    assert!(fixture.files("deltas").is_empty());
}

#[test]
fn a_rollback_shows_the_snapshot_and_keeps_all_snapshots() {
    let (fixture, store) = TestStore::with_base();
    store.create_disks(&[on("b", "a", Some(3 * 4096))]).unwrap();
    for (byte, name) in [(1, "one"), (2, "two"), (3, "three")] {
        put(&store, "a", 1, byte);
        put(&store, "a", u64::from(byte) % 3, byte);
        store.snapshot("a", name, None).unwrap();
    }
    put(&store, "a", 0, 9);
    let wanted = [("one", [7, 1, 0]), ("two", [7, 2, 2]), ("three", [3, 3, 2])];
    for (name, bytes) in wanted.iter().chain(wanted.iter().rev()) {
        store.rollback("a", name, None).unwrap();
        assert_eq!(blocks(&read_all(&store, "a")), bytes);
        put(&store, "a", 2, 8);
        for (other, bytes) in &wanted {
            assert_eq!(blocks(&read_snapshot(&store, "a", other)), bytes, "{other} after {name}");
        }
    }
    store.disk("a").unwrap().change(|disk| disk.resize(4096)).unwrap().unwrap();
    store.rollback("a", "two", None).unwrap();
    assert_eq!(blocks(&read_all(&store, "a")), [7, 2, 2]);
    // What was rolled away is gone: three layers, and the new delta was not written yet.
    store.close().unwrap();
    drop(store);
    assert_eq!(data_files(&fixture).len(), 3);
    let store = fixture.open();
    assert_eq!(blocks(&read_all(&store, "a")), [7, 2, 2]);
}

#[test]
fn a_rollback_is_carried_out_once_for_each_request() {
    let (_fixture, store) = TestStore::with_base();
    store.create_disks(&[on("b", "a", None)]).unwrap();
    let token = Some(Token::of_hash([1; 16]));
    store.snapshot("a", "s", token).unwrap();
    store.snapshot("a", "s", token).unwrap();
    assert_refused(store.snapshot("a", "s", Some(Token::of_hash([2; 16]))), Kind::Exists, "exists already");
    store.rollback("a", "s", token).unwrap();
    put(&store, "a", 0, 5);
    // The client sends it again, because its answer was lost.
    store.rollback("a", "s", token).unwrap();
    assert_eq!(blocks(&read_all(&store, "a")), [5, 7]);
    store.rollback("a", "s", None).unwrap();
    assert_eq!(blocks(&read_all(&store, "a")), [7, 7]);
}

/// Guards D80.
#[test]
fn the_space_of_a_layer_is_free_when_nothing_needs_it() {
    let (fixture, store) = TestStore::with_base();
    store.create_disks(&[on("b", "a", None)]).unwrap();
    put(&store, "a", 0, 1);
    store.snapshot("a", "s", None).unwrap();
    clone(&store, "a@s", "c");
    clone(&store, "a@s", "d");
    let only = |name: &str| store.bytes_of_snapshot_only(&store.disk("a").unwrap(), name);
    assert_eq!(only("s"), 0, "the disk itself stands on it");
    let remove = |name: &str| {
        let node = store.unlink(name).unwrap();
        store.purge(node.id()).unwrap();
    };
    assert_refused(store.unlink("a"), Kind::InUse, "snapshot s");
    assert_refused(store.rename("c", "a", Replace::Yes), Kind::InUse, "snapshot s");
    store.remove_snapshot("a", "s").unwrap();
    remove("a");
    assert_eq!(blocks(&read_all(&store, "c")), [1, 7]);
    remove("c");
    assert_eq!(data_files(&fixture).len(), 1);
    assert_eq!(blocks(&read_all(&store, "d")), [1, 7]);
    remove("d");
    assert!(fixture.files("deltas").is_empty() && fixture.files("disks").is_empty());
    store.create_disks(&[on("b", "e", None)]).unwrap();
    for byte in 1..4 {
        put(&store, "e", 0, byte);
        store.snapshot("e", &format!("s{byte}"), None).unwrap();
    }
    store.rollback("e", "s1", None).unwrap();
    let only = |name: &str| store.bytes_of_snapshot_only(&store.disk("e").unwrap(), name);
    assert_eq!((only("s1"), only("s2"), only("s3")), (0, 0, 4096));
    store.remove_snapshot("e", "s3").unwrap();
    assert_eq!(only("s2"), 4096);
    store.remove_snapshot("e", "s2").unwrap();
    assert_eq!(data_files(&fixture).len(), 1);
    let node = store.unlink_with_snapshots("e").unwrap();
    store.purge(node.id()).unwrap();
    assert!(fixture.files("deltas").is_empty());
}

#[test]
fn requests_about_what_does_not_exist_are_refused() {
    let (_fixture, store) = TestStore::with_base();
    store.create_disks(&[on("b", "a", None)]).unwrap();
    store.snapshot("a", "s", None).unwrap();
    assert_refused(store.snapshot("x", "s", None), Kind::NotFound, "disk x");
    assert_refused(store.snapshot("a", "../s", None), Kind::Invalid, "1 to 128 letters");
    assert_refused(store.remove_snapshot("a", "t"), Kind::NotFound, "snapshot a@t");
    assert_refused(store.rollback("a", "t", None), Kind::NotFound, "snapshot a@t");
    assert_refused(store.open_snapshot("a", "t"), Kind::NotFound, "snapshot a@t");
    let clone = |origin: &str, new: NewDisk| store.clone_disks(&Origin::parse(origin), &[new], None);
    assert_refused(clone("x", new("c")), Kind::NotFound, "disk x");
    assert_refused(clone("a@t", new("c")), Kind::NotFound, "snapshot a@t");
    assert_refused(clone("a", new("a")), Kind::Exists, "disk a");
    let small = NewDisk { size: Some(4096), ..new("c") };
    assert_refused(clone("a@s", small), Kind::Invalid, "smaller than its origin a@s");
    let large = NewDisk { size: Some(3 * 4096), ..new("c") };
    clone("a@s", large).unwrap();
    assert_eq!(blocks(&read_all(&store, "c")), [7, 7, 0]);
}

#[test]
fn a_hundred_snapshots_and_a_record_that_is_full() {
    let (_fixture, store) = TestStore::with_base();
    store.create_disks(&[on("b", "a", Some(64 * 4096))]).unwrap();
    for n in 0..100u64 {
        put(&store, "a", n % 64, n as u8 + 1);
        store.snapshot("a", &format!("s{n}"), None).unwrap();
    }
    assert_eq!(blocks(&read_snapshot(&store, "a", "s99"))[..2], [65, 66]);
    assert_eq!(blocks(&read_snapshot(&store, "a", "s3"))[..5], [1, 2, 3, 4, 0]);
    assert_eq!(blocks(&read_snapshot(&store, "a", "s0"))[..2], [1, 7]);
    let long = |n: u32| format!("{n}-{}", "x".repeat(120));
    let refused = (0..1000).find_map(|n| store.snapshot("a", &long(n), None).err()).unwrap();
    assert!(refused.to_string().contains("remove snapshots first"), "{refused}");
    assert_eq!(blocks(&read_all(&store, "a"))[..2], [65, 66]);
    store.remove_snapshot("a", "s50").unwrap();
    store.snapshot("a", "again", None).unwrap();
}

/// The writer writes a number to one block, then to another: a snapshot of one moment has the same number in both, or
/// the first is one ahead.
#[test]
fn snapshots_and_clones_of_a_disk_in_use_are_of_one_moment() {
    let (_fixture, store) = TestStore::with_base();
    store.create_disks(&[on("b", "a", Some(1 << 20))]).unwrap();
    let (is_over, store) = (AtomicBool::new(false), &store);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let node = store.disk("a").unwrap();
            let mut last = 0u64;
            while !is_over.load(Ordering::Relaxed) {
                last += 1;
                for at in [40 * 4096, 3 * 4096] {
                    node.change(|disk| disk.write(at, &last.to_le_bytes(), 0)).unwrap().unwrap();
                }
                if last.is_multiple_of(16) {
                    node.change(|disk| disk.flush(0)).unwrap().unwrap();
                }
            }
            let number = |at: usize| {
                let bytes = read_all(store, "a");
                u64::from_le_bytes(std::array::from_fn(|n| bytes[at + n]))
            };
            assert_eq!((number(40 * 4096), number(3 * 4096)), (last, last), "no write was lost");
        });
        let pair = |bytes: &[u8]| {
            let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|n| bytes[at + n]));
            (number(40 * 4096), number(3 * 4096))
        };
        for n in 0..40 {
            let name = format!("s{n}");
            store.snapshot("a", &name, None).unwrap();
            let (first, second) = pair(&read_snapshot(store, "a", &name));
            assert!(first == second || first == second + 1, "{first} and {second}");
            clone(store, "a", &format!("c{n}"));
            let (first, second) = pair(&read_all(store, &format!("c{n}")));
            assert!(first == second || first == second + 1, "{first} and {second}");
            store.tend_layers();
        }
        is_over.store(true, Ordering::Relaxed);
    });
}

/// What differs, as text: first block, blocks, and the first letter of the content.
fn changed(store: &Store, disk: &str, since: Option<&str>, until: Option<&str>) -> Vec<String> {
    let (mut all, mut start) = (Vec::<crate::disk::changes::Change>::new(), Some(0));
    let node = store.disk(disk).unwrap();
    while let Some(at) = start {
        // Small parts, so that runs continue in the next part.
        let part = node.changes(since, until, at, 2).unwrap();
        assert!(part.next.is_none_or(|next| next > at));
        for change in part.list {
            match all.last_mut() {
                Some(last) if last.content == change.content && last.offset + last.len == change.offset => {
                    last.len += change.len;
                }
                _ => all.push(change),
            }
        }
        start = part.next;
    }
    let text = |change: &crate::disk::changes::Change| {
        let content = format!("{:?}", change.content).to_lowercase();
        format!("{}+{}{}", change.offset / 4096, change.len.div_ceil(4096), &content[..1])
    };
    all.iter().map(text).collect()
}

/// Guards D90.
#[test]
fn what_differs_between_two_moments_is_found_in_the_maps() {
    let (fixture, store) = TestStore::with_base();
    // The base has two blocks.
    store.create_disks(&[on("b", "a", Some(8 * 4096))]).unwrap();
    assert!(changed(&store, "a", None, None).is_empty());
    put(&store, "a", 1, 1);
    put(&store, "a", 4, 1);
    store.snapshot("a", "one", None).unwrap();
    let zero = |from: u64, blocks: u64| {
        let node = store.disk("a").unwrap();
        node.change(|disk| disk.zero(from * 4096, blocks * 4096, 0)).unwrap().unwrap();
    };
    zero(0, 2);
    zero(6, 1);
    put(&store, "a", 5, 2);
    store.snapshot("a", "two", None).unwrap();
    put(&store, "a", 4, 3);
    let look = |store: &Store| {
        let of = |since, until| changed(store, "a", since, until);
        assert_eq!(of(None, None), ["0+2z", "4+2d"]);
        assert_eq!(of(None, Some("one")), ["1+1d", "4+1d"]);
        assert_eq!(of(None, Some("two")), ["0+2z", "4+2d"]);
        assert_eq!(of(Some("one"), Some("two")), ["0+2z", "5+1d"]);
        assert_eq!(of(Some("two"), None), ["4+1d"]);
        assert_eq!(of(Some("one"), None), ["0+2z", "4+2d"]);
        assert!(of(Some("one"), Some("one")).is_empty());
    };
    look(&store);
    drop(store);
    let store = fixture.open();
    look(&store);
    store.close().unwrap();
    drop(store);
    let store = fixture.open();
    look(&store);
}

#[test]
fn a_new_end_and_an_old_one_differ() {
    let (_fixture, store) = TestStore::with_base();
    store.create_disks(&[on("b", "a", Some(4 * 4096))]).unwrap();
    put(&store, "a", 3, 1);
    store.snapshot("a", "long", None).unwrap();
    let resize = |blocks: u64| {
        store.disk("a").unwrap().change(|disk| disk.resize(blocks * 4096)).unwrap().unwrap();
    };
    resize(1);
    store.snapshot("a", "short", None).unwrap();
    resize(6);
    let of = |since, until| changed(&store, "a", since, until);
    assert!(of(Some("long"), Some("short")).is_empty());
    assert_eq!(of(Some("short"), None), ["1+5z"]);
    // Of the second block of the base only zeros are left; the third block has had zeros before.
    assert_eq!(of(Some("long"), None), ["1+1z", "3+3z"]);
    assert_eq!(of(None, None), ["1+1z"]);
}

#[test]
fn a_moment_that_was_rolled_away_is_refused() {
    let (_fixture, store) = TestStore::with_base();
    store.create_disks(&[on("b", "a", None)]).unwrap();
    for (block, name) in [(0, "one"), (1, "two")] {
        put(&store, "a", block, 1);
        store.snapshot("a", name, None).unwrap();
    }
    let of = |since, until| store.disk("a").unwrap().changes(since, until, 0, 10);
    assert_refused(of(Some("two"), Some("one")), Kind::Invalid, "later one");
    assert_refused(of(Some("three"), None), Kind::NotFound, "a@three");
    store.rollback("a", "one", None).unwrap();
    assert_refused(of(Some("two"), None), Kind::Invalid, "rolled back");
    put(&store, "a", 1, 2);
    store.snapshot("a", "other", None).unwrap();
    assert_refused(of(Some("two"), Some("other")), Kind::Invalid, "rolled back");
    assert_eq!(changed(&store, "a", Some("one"), Some("other")), ["1+1d"]);
    assert_eq!(changed(&store, "a", Some("one"), Some("two")), ["1+1d"]);
}

#[test]
fn random_histories_differ_where_their_bytes_do() {
    for seed in 0..20 {
        let (_fixture, store) = TestStore::with_base();
        store.create_disks(&[on("b", "a", Some(8 * 4096))]).unwrap();
        let mut random = seed * 0x9e37_79b9 + 1;
        let mut next = |below: u64| {
            random = (random ^ random << 13) & 0xffff_ffff_ffff;
            random ^= random >> 7;
            random ^= random << 17;
            random % below
        };
        let node = store.disk("a").unwrap();
        for number in 0..5 {
            for _ in 0..next(4) {
                let (block, blocks) = (next(8), 1 + next(3));
                match next(3) {
                    0 => put(&store, "a", block, (seed % 200 + 20) as u8),
                    1 => node.change(|disk| disk.zero(block * 4096, blocks * 4096, 0)).unwrap().unwrap(),
                    _ => node.change(|disk| disk.resize((1 + block) * 4096)).unwrap().unwrap(),
                }
            }
            store.snapshot("a", &format!("s{number}"), None).unwrap();
        }
        for (since, until) in (0..5).flat_map(|until| (0..until).map(move |since| (since, until))) {
            let [since, until] = [since, until].map(|number| format!("s{number}"));
            let [then, now] = [&since, &until].map(|name| read_snapshot(&store, "a", name));
            let part = node.changes(Some(&since), Some(&until), 0, 100).unwrap();
            let mut made = then.clone();
            made.resize(now.len(), 0xee);
            let mut at = 0;
            for change in part.list {
                assert!(change.offset >= at && change.len > 0, "seed {seed}, {since} to {until}");
                let range = change.offset as usize..(change.offset + change.len) as usize;
                if change.content == crate::disk::changes::Content::Zero {
                    made[range].fill(0);
                } else {
                    made[range.clone()].copy_from_slice(&now[range]);
                }
                at = change.offset + change.len;
            }
            let same = made.iter().zip(&now).position(|(a, b)| a != b);
            assert_eq!(same, None, "seed {seed}, {since} to {until}");
        }
    }
}

// Each part looked at all disks, and copied all snapshots behind it.
#[test]
fn a_listing_of_snapshots_in_parts_looks_at_all_disks_once() {
    let fixture = TestStore::new();
    let store = fixture.open();
    store.create_disks(&[blank("a"), blank("b")]).unwrap();
    for round in 0..6 {
        store.snapshot(["a", "b"][round % 2], &format!("s{round}"), None).unwrap();
    }
    let part = |after: u64, most: usize| {
        let mut found: Vec<(u64, String)> = Vec::new();
        store.each_snapshot_after(after, |disk, snapshot| {
            found.push((snapshot.number, format!("{disk}@{}", snapshot.name)));
            found.len() < most
        });
        found
    };
    let first = part(0, 2);
    // What changes meanwhile: one goes, one comes, a disk gets another name.
    store.remove_snapshot("b", "s3").unwrap();
    store.snapshot("a", "new", None).unwrap();
    store.rename("b", "c", Replace::No).unwrap();
    let rest = part(first[1].0, 100);
    let names = |found: &[(u64, String)]| found.iter().map(|(_, name)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&first), ["a@s0", "b@s1"]);
    assert_eq!(names(&rest), ["a@s2", "a@s4", "c@s5"]);
    assert_eq!(names(&part(0, 100)), ["a@s0", "c@s1", "a@s2", "a@s4", "c@s5", "a@new"]);
    // A new worker goes on with a listing that an earlier one began.
    drop(store);
    let store = fixture.open();
    let mut found = Vec::new();
    store.each_snapshot_after(first[1].0, |disk, snapshot| {
        found.push(format!("{disk}@{}", snapshot.name));
        true
    });
    assert_eq!(found, ["a@s2", "a@s4", "c@s5", "a@new"]);
}
