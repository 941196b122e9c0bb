//! Work on layers while the storage keeps failing.

use std::sync::atomic::AtomicUsize;
use std::time::Instant;

use super::*;
use crate::format::layout::disk_record;
use crate::store::tests::unread::SimStore;

/// Makes calls for files with this name fail, and counts them.
fn failing(sim: &SimStore, call: Call, name: String) -> Arc<AtomicUsize> {
    let calls = Arc::new(AtomicUsize::new(0));
    let count = calls.clone();
    sim.medium.set_hook(Some(Arc::new(move |event: &Event<'_>| {
        if event.call != call || event.stage != Stage::Before || !event.name.contains(&name) {
            return Ok(());
        }
        count.fetch_add(1, Ordering::Relaxed);
        Err(std::io::Error::from_raw_os_error(libc::EIO))
    })));
    calls
}

/// Ticks twice a second for five minutes. Returns the seconds at which calls were made.
fn seconds_of_calls(store: &Store, calls: &AtomicUsize) -> Vec<u64> {
    let (begun, mut seconds) = (Instant::now(), Vec::new());
    for half in 0..600 {
        let before = calls.load(Ordering::Relaxed);
        store.tend_layers_at(begun + Duration::from_millis(500) * half);
        if calls.load(Ordering::Relaxed) > before {
            seconds.push(u64::from(half) / 2);
        }
    }
    seconds
}

const ATTEMPTS: [u64; 10] = [0, 1, 3, 7, 15, 31, 63, 123, 183, 243];

// It was tried, and logged, twice a second.
#[test]
fn a_sealing_that_keeps_failing_is_tried_ever_less_often_up_to_once_a_minute() {
    let sim = SimStore::new();
    let store = sim.open();
    let node = store.create_disks(&[blank("a")]).unwrap().remove(0);
    put(&store, "a", 0, 1);
    let record = disk_record(node.id());
    // The record cannot be written once calls go to the new delta.
    let (seen, name) = (node.clone(), record.clone());
    sim.medium.set_hook(Some(Arc::new(move |event: &Event<'_>| {
        let is_record =
            event.call == Call::Rename && event.stage == Stage::Before && event.name.contains(&name);
        let is_later = is_record && seen.peek().is_some_and(|disk| !disk.below().pending.is_empty());
        if is_later { Err(std::io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    })));
    assert!(store.snapshot("a", "s", None).is_err());
    assert!(!node.peek().unwrap().below().pending.is_empty(), "it is pending");
    let calls = failing(&sim, Call::Rename, record);
    assert_eq!(seconds_of_calls(&store, &calls), ATTEMPTS);
    // A request does not wait for that, and neither does a later failure.
    sim.medium.set_hook(None);
    store.snapshot("a", "s", None).unwrap();
    store.tend_layers();
    assert!(node.peek().unwrap().below().pending.is_empty());
    assert_eq!(blocks(&read_all(&store, "a"))[0], 1);
}

#[test]
fn a_removal_that_keeps_failing_is_tried_ever_less_often_up_to_once_a_minute() {
    let sim = SimStore::new();
    let store = sim.open();
    store.create_disks(&[blank("a")]).unwrap();
    store.snapshot("a", "zero", None).unwrap();
    put(&store, "a", 0, 1);
    let disk = store.disk("a").unwrap().attach().unwrap();
    store.rollback("a", "zero", None).unwrap();
    drop(disk);
    assert!(store.disk("a").unwrap().has_dropped());
    let calls = failing(&sim, Call::Remove, "deltas/".into());
    assert_eq!(seconds_of_calls(&store, &calls), ATTEMPTS);
    sim.medium.set_hook(None);
    store.tend_layers_at(Instant::now() + Duration::from_secs(400));
    assert!(!store.disk("a").unwrap().has_dropped());
}

// What a request dropped while a removal was under way left the list with what that one removed, and its files stayed.
#[test]
fn what_is_dropped_while_a_removal_runs_stays_on_the_list() {
    let sim = SimStore::new();
    let store = sim.open();
    let node = store.create_disks(&[blank("a")]).unwrap().remove(0);
    store.snapshot("a", "zero", None).unwrap();
    put(&store, "a", 0, 1);
    let disk = node.attach().unwrap();
    store.rollback("a", "zero", None).unwrap();
    drop(disk);
    assert!(node.has_dropped());
    let second = store.new_number().unwrap();
    let (dropping, seen) = (node.clone(), AtomicUsize::new(0));
    sim.medium.set_hook(Some(Arc::new(move |event: &Event<'_>| {
        if event.call == Call::Remove && seen.fetch_add(1, Ordering::Relaxed) == 0 {
            dropping.update(|record| record.lineage.dropped.push(second)).unwrap();
        }
        Ok(())
    })));
    store.remove_all_dropped();
    assert_eq!(node.lineage().dropped, [second]);
    store.remove_all_dropped();
    assert!(!node.has_dropped());
}

/// Guards D93.
#[test]
fn a_snapshot_is_refused_while_indexes_that_cannot_be_written_take_too_much_memory() {
    let sim = SimStore::new();
    let store = sim.open();
    store.create_disks(&[blank("a")]).unwrap();
    put(&store, "a", 0, 1);
    let calls = failing(&sim, Call::Create, ".index".into());
    // The index cannot be written, and the snapshot is taken all the same.
    store.snapshot("a", "one", None).unwrap();
    assert!(calls.load(Ordering::Relaxed) > 0 && store.index_memory().unwritten > 0);
    assert_eq!(blocks(&read_all(&store, "a")), [1, 0]);
    store.layers.bound_unwritten(0);
    put(&store, "a", 1, 2);
    let refused = store.snapshot("a", "two", None);
    assert_refused(refused, Kind::Invalid, "free space in the store");
    assert!(store.disk("a").unwrap().peek().unwrap().below().pending.is_empty());
    put(&store, "a", 1, 3);
    assert_eq!(blocks(&read_all(&store, "a")), [1, 3]);
    // A disk that needs an index is served all the same.
    drop(store);
    let store = sim.open();
    store.layers.bound_unwritten(0);
    assert_eq!(blocks(&read_all(&store, "a")), [1, 3]);
    assert!(store.index_memory().unwritten > 0);
    // When the storage works again the indexes are written, and snapshots are taken.
    sim.medium.set_hook(None);
    store.snapshot("a", "two", None).unwrap();
    assert_eq!(store.index_memory().unwritten, 0);
}
