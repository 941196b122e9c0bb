//! Records that a standby worker reads before it takes over.

use super::*;
use crate::io::HostMedium;
use crate::store::PreloadedRecords;

/// With this margin every file counts as old.
const HOUR_AHEAD: i64 = -3_600_000_000_000;

fn open_with(fixture: &TestStore, known: PreloadedRecords) -> Store {
    let cache = Arc::new(BlockCache::new(1 << 20).unwrap());
    let live = fixture.tmp.path().join("live");
    let live = |_: &Superblock| Ok(Arc::new(LiveDir::new(&live)?) as Arc<dyn crate::io::LiveStore>);
    Store::open_prepared(&fixture.path(""), live, cache, None, Arc::new(OpenHere), known).unwrap()
}

// Each worker read all records before it served.
#[test]
fn a_takeover_reads_the_records_that_changed_since_they_were_read_ahead() {
    let (fixture, store) = TestStore::with_base();
    let made: Vec<_> = ["same", "renamed", "removed", "grown"].map(|name| on("b", name, None)).into();
    let made: Vec<u64> = store.create_disks(&made).unwrap().iter().map(|disk| disk.id()).collect();
    let medium = HostMedium::new(&fixture.path("")).unwrap();
    let first = PreloadedRecords::read_from(&medium, PreloadedRecords::default(), HOUR_AHEAD).unwrap();
    assert_eq!(first.len(), 5);
    // Files that were changed a moment ago are read again.
    assert!(PreloadedRecords::read(&fixture.path(""), PreloadedRecords::default()).unwrap().is_empty());

    store.rename("renamed", "other", Replace::No).unwrap();
    store.purge(store.unlink("removed").unwrap().id()).unwrap();
    store.create_disks(&[blank("new")]).unwrap();
    write(&store, "grown");
    store.disk("grown").unwrap().attach().unwrap().resize(1 << 20).unwrap();
    store.close().unwrap();
    drop(store);
    let store = open_with(&fixture, first);
    assert_eq!(names(&store), ["grown", "new", "other", "same"]);
    assert_eq!(store.disk("grown").unwrap().attributes().size, 1 << 20);
    assert_eq!(store.disk("same").unwrap().base_name().as_deref(), Some("b"));
    drop(store);

    // An unchanged record is not read.
    let mut known = PreloadedRecords::read_from(&medium, PreloadedRecords::default(), HOUR_AHEAD).unwrap();
    known.disks.get_mut(&made[0]).unwrap().1.name = "not-read".into();
    let known = PreloadedRecords::read_from(&medium, known, HOUR_AHEAD).unwrap();
    assert_eq!(names(&open_with(&fixture, known)), ["grown", "new", "not-read", "other"]);
    // A record that was damaged since is read.
    let known = PreloadedRecords::read_from(&medium, PreloadedRecords::default(), HOUR_AHEAD).unwrap();
    fs::write(fixture.path(&format!("disks/{}.disk", made[0])), "damaged").unwrap();
    let store = open_with(&fixture, known);
    assert_eq!(names(&store), ["grown", "new", "other"]);
    assert_eq!(store.damaged().len(), 1);
}
