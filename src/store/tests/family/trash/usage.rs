//! When bases were needed last.

use super::*;
use crate::format::layout::{USED, base_path};
use crate::format::record::BaseRecord;
use crate::store::BaseNode;

const CLOSED: &dyn Fn(&BaseNode) -> bool = &|_| false;

/// Guards D83.
#[test]
fn the_last_use_of_a_base_survives_a_stop_and_a_crash() {
    let (fixture, store) = TestStore::with_base();
    store.create_disks(&[on("b", "a", None)]).unwrap();
    tick();
    store.note_uses(CLOSED);
    let base = store.base("b").unwrap();
    let used = store.last_used(&base);
    assert!(used > base.record().created_ns, "a disk needs it");
    store.unlink("a").unwrap();
    let disk = store.unlinked()[0].id();
    store.note_uses(CLOSED);
    let used = store.last_used(&base);
    store.purge(disk).unwrap();
    tick();
    store.note_uses(CLOSED);
    assert_eq!(store.last_used(&base), used, "nothing needs it any more");
    store.note_uses(&|_| true);
    let used = store.last_used(&base);
    store.close().unwrap();
    drop(store);
    let store = fixture.open();
    assert_eq!(store.last_used(&store.base("b").unwrap()), used);
    // A crash: the list is as it was written.
    tick();
    store.note_uses(&|_| true);
    drop(store);
    let store = fixture.open();
    assert_eq!(store.last_used(&store.base("b").unwrap()), used);
    // A base that the list does not have was needed when the store was opened, unless it is new. A damaged list has none.
    drop((store, base));
    fs::write(fixture.path(USED), "damaged").unwrap();
    let store = fixture.open();
    let base = store.base("b").unwrap();
    let created = base.record().created_ns;
    assert_eq!(store.last_used(&base), created);
    let path = fixture.path(&base_path(base.id()));
    drop((store, base));
    let record = BaseRecord::decode(&fs::read(&path).unwrap()).unwrap();
    let hour = Duration::from_secs(3600).as_nanos() as i64;
    fs::write(&path, BaseRecord { created_ns: created - hour, ..record }.encode()).unwrap();
    let before = sys::now_ns();
    let store = fixture.open();
    assert!(store.last_used(&store.base("b").unwrap()) >= before);
}

#[test]
fn a_store_that_is_only_looked_at_has_no_list_of_uses() {
    let (fixture, store) = TestStore::with_base();
    store.close().unwrap();
    assert!(!fixture.path(USED).exists());
}

/// Guards D83.
#[test]
fn a_time_that_a_client_sets_is_a_use_and_survives_a_crash() {
    let (fixture, store) = TestStore::with_base();
    let base = store.base("b").unwrap();
    let record = base.record();
    assert_eq!(store.times_of_base(&base), (record.modified_ns(), record.created_ns));
    let before = store.last_used(&base);
    tick();
    store.set_time_of_base(&base, i64::MAX);
    let used = store.last_used(&base);
    assert!(used > before && used <= sys::now_ns(), "a use is not in the future");
    let (modified, changed) = store.times_of_base(&base);
    assert!(modified == i64::MAX && changed >= before);
    store.set_time_of_base(&base, -5);
    assert_eq!(
        (store.times_of_base(&base).0, store.last_used(&base)),
        (-5, used),
        "no time takes a use back"
    );
    let times = store.times_of_base(&base);
    drop((store, base));
    // A crash.
    let store = fixture.open();
    let base = store.base("b").unwrap();
    assert_eq!((store.times_of_base(&base), store.last_used(&base)), (times, used));
    // A removed base leaves none.
    drop(base);
    store.remove_base("b").unwrap();
    store.note_uses(CLOSED);
    store.close().unwrap();
    let list = crate::format::used::decode(&fs::read(fixture.path(USED)).unwrap()).unwrap();
    assert_eq!(list, crate::format::used::UseList::default());
}
