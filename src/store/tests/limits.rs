//! Quotas of disks with snapshots and clones, and limits in records.

use super::*;
use crate::format::limits::{Limits, Rates};
use crate::store::Origin;

const BLOCK: u64 = 4096;

fn with_quota(name: &str, blocks: u64) -> NewDisk {
    let limits = Limits { quota: Some(blocks * BLOCK), ..Limits::default() };
    NewDisk { size: Some(64 * BLOCK), limits, ..blank(name) }
}

/// The error number of a write of one block.
fn try_put(store: &Store, name: &str, block: u64) -> Result<(), i32> {
    let node = store.disk(name).unwrap();
    let done = node.change(|disk| disk.write(block * BLOCK, &[1; BLOCK as usize], 0)).unwrap();
    done.map_err(|error| error.errno())
}

/// Writes blocks until one is refused, and returns how many were written.
fn fill(store: &Store, name: &str, from: u64) -> u64 {
    let written = (from..64).take_while(|block| match try_put(store, name, *block) {
        Ok(()) => true,
        Err(errno) => {
            assert_eq!(errno, libc::ENOSPC);
            false
        }
    });
    written.count() as u64
}

fn used(store: &Store, name: &str) -> u64 {
    store.disk(name).unwrap().quota_used().unwrap() / BLOCK
}

#[test]
fn limits_are_durable_and_are_changed_one_by_one() {
    let fixture = TestStore::new();
    let store = fixture.open();
    store.create_disks(&[with_quota("one", 8), blank("two")]).unwrap();
    let node = store.disk("one").unwrap();
    let made = node.limits();
    assert_eq!(made.quota, Some(8 * BLOCK));
    let iops = Rates { all: Some(500), ..Rates::default() };
    assert_eq!(node.change_limits(|limits| limits.iops = iops).unwrap(), Limits { iops, ..made });
    assert!(node.limiter().pace.is_limited());
    let refused = node.change_limits(|limits| limits.bandwidth.all = Some(1));
    assert_refused(refused, Kind::Invalid, "give 65536 to");
    assert_eq!(node.limits(), Limits { iops, ..made }, "a refused change changes nothing");
    let bad = NewDisk { limits: Limits { quota: Some(1), ..Limits::default() }, ..blank("three") };
    assert_refused(store.create_disks(&[bad]), Kind::Invalid, "quota");
    drop((node, store));
    let store = fixture.open();
    let node = store.disk("one").unwrap();
    assert_eq!(node.limits(), Limits { iops, ..made });
    assert!(node.limiter().pace.is_limited() && node.limiter().quota_if_set().is_some());
    assert_eq!(store.disk("two").unwrap().limits(), Limits::default());
    node.change_limits(|limits| *limits = Limits::default()).unwrap();
    assert!(!node.limiter().pace.is_limited() && node.limiter().quota_if_set().is_none());
    let record = fs::read(fixture.path(&format!("disks/{}.disk", node.id()))).unwrap();
    assert!(record[8] < 5, "an older plyfs reads it again");
}

#[test]
fn a_failed_record_leaves_the_limits_as_they_were() {
    let medium = SimMedium::new(1);
    let live = Arc::<SimLive>::default();
    let cache = Arc::new(BlockCache::new(1 << 20).unwrap());
    let store =
        Store::open_on(Arc::new(medium.clone()), |_| Ok(live), cache, Some(0), Arc::new(OpenHere)).unwrap();
    store.create_disks(&[with_quota("one", 8)]).unwrap();
    let node = store.disk("one").unwrap();
    medium.plan(Fault { call: Call::Write, name: ".disk".into(), skip: 0, times: 2, errno: libc::EIO });
    assert!(node.change_limits(|limits| limits.quota = None).is_err());
    assert!(node.limiter().quota_if_set().is_some() && node.limits().quota == Some(8 * BLOCK));
}

/// Guards D84.
#[test]
fn a_snapshot_counts_and_its_removal_makes_room() {
    let fixture = TestStore::new();
    let store = fixture.open();
    store.create_disks(&[with_quota("a", 10)]).unwrap();
    (0..6).for_each(|block| try_put(&store, "a", block).unwrap());
    store.snapshot("a", "s", None).unwrap();
    assert_eq!(used(&store, "a"), 6);
    // What the snapshot holds is written anew, and takes new space.
    assert_eq!(fill(&store, "a", 0), 4);
    assert_eq!(used(&store, "a"), 10);
    assert_eq!(store.disks_at_quota().iter().map(|disk| disk.name()).collect::<Vec<_>>(), ["a"]);
    // The next worker and the next boot count the same.
    drop(store);
    let store = fixture.open();
    assert_eq!((used(&store, "a"), fill(&store, "a", 10)), (10, 0));
    store.close().unwrap();
    drop(store);
    let store = fixture.open();
    assert_eq!((used(&store, "a"), fill(&store, "a", 10)), (10, 0));
    store.remove_snapshot("a", "s").unwrap();
    // The disk shows two blocks of the layer, so the layer stays; only a rollback or a flatten frees it.
    assert_eq!(used(&store, "a"), 10);
    store.snapshot("a", "t", None).unwrap();
    store.rollback("a", "t", None).unwrap();
    assert_eq!(used(&store, "a"), 10);
}

/// Guards D84.
#[test]
fn a_rollback_frees_what_was_written_since() {
    let fixture = TestStore::new();
    let store = fixture.open();
    store.create_disks(&[with_quota("a", 10)]).unwrap();
    (0..4).for_each(|block| try_put(&store, "a", block).unwrap());
    store.snapshot("a", "s", None).unwrap();
    assert_eq!(fill(&store, "a", 20), 6);
    store.rollback("a", "s", None).unwrap();
    assert_eq!(used(&store, "a"), 4);
    assert_eq!(fill(&store, "a", 20), 6, "without a reopening of the disk");
}

/// Guards D84.
#[test]
fn layers_that_a_clone_needs_too_count_for_none_and_for_the_last_one_again() {
    let fixture = TestStore::new();
    let store = fixture.open();
    store.create_disks(&[with_quota("a", 10)]).unwrap();
    (0..8).for_each(|block| try_put(&store, "a", block).unwrap());
    let clone = NewDisk { size: None, ..blank("c") };
    store.clone_disks(&Origin::parse("a"), &[clone], None).unwrap();
    let clone = store.disk("c").unwrap();
    assert_eq!(clone.limits(), Limits::default(), "limits are not those of the origin");
    assert_eq!(clone.quota_used(), None);
    store.count_quotas();
    assert_eq!(used(&store, "a"), 0);
    assert_eq!(fill(&store, "a", 20), 10);
    let clone = store.unlink("c").unwrap();
    store.purge(clone.id()).unwrap();
    assert_eq!(used(&store, "a"), 18);
    assert_eq!(try_put(&store, "a", 40), Err(libc::ENOSPC));
    assert_eq!(try_put(&store, "a", 20), Ok(()), "a block that the delta has");
    let limited = with_quota("d", 3);
    store.clone_disks(&Origin::parse("a"), &[NewDisk { size: None, ..limited }], None).unwrap();
    assert_eq!((fill(&store, "d", 0), used(&store, "d")), (3, 3));
}

#[test]
fn a_quota_that_is_set_on_a_disk_in_use_counts_what_is_there() {
    let fixture = TestStore::new();
    let store = fixture.open();
    store.create_disks(&[NewDisk { size: Some(64 * BLOCK), ..blank("a") }]).unwrap();
    (0..3).for_each(|block| try_put(&store, "a", block).unwrap());
    store.snapshot("a", "s", None).unwrap();
    (0..2).for_each(|block| try_put(&store, "a", block).unwrap());
    let node = store.disk("a").unwrap();
    assert_eq!(node.quota_used(), None);
    node.change_limits(|limits| limits.quota = Some(6 * BLOCK)).unwrap();
    store.count_quotas();
    assert_eq!(used(&store, "a"), 5);
    assert_eq!(fill(&store, "a", 20), 1);
    node.change(|disk| disk.zero(0, 2 * BLOCK, 0)).unwrap().unwrap();
    assert_eq!(fill(&store, "a", 21), 2, "a discard makes room");
    // A sealing that begins before the disk was counted.
    store.snapshot("a", "t", None).unwrap();
    assert_eq!(used(&store, "a"), 6);
}
