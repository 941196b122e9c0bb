//! Invariant 15, and the files of deltas in pools.

use super::*;
use crate::format::layout::data_path;
use crate::store::pools::make_identity;

/// A store with a disk `p` in a pool, of which block 1 is written.
fn with_pool() -> (TestStore, PathBuf) {
    let fixture = TestStore::new();
    let dir = fixture.tmp.path().join("pool");
    let uuid = Superblock::decode(&fs::read(fixture.path("plyfs.store")).unwrap()).unwrap().uuid;
    make_identity(&fixture.store(), &uuid, &dir).unwrap();
    fixture.open().add_pool("fast", dir.to_str().unwrap(), Path::new("/nowhere")).unwrap();
    let store = fixture.open();
    store.create_disks_in(Some("fast"), &[disk("p", None)], None).unwrap();
    write(&store, "p");
    store.close().unwrap();
    drop(store);
    fixture.assert_clean();
    (fixture, dir)
}

#[test]
fn a_pool_that_is_gone_is_found_and_its_disks_are_left_alone() {
    let (fixture, dir) = with_pool();
    let away = fixture.tmp.path().join("away");
    fs::rename(&dir, &away).unwrap();
    fixture.assert_lasting(15, "pool fast");
    fs::create_dir(&dir).unwrap();
    fixture.assert_lasting(15, "its drive is not mounted there");
    // Its record is all that knows which files are to be removed.
    fixture.change("p", |record| record.unlinked = true);
    fixture.assert_lasting(12, "pool fast is not available");
    fs::remove_dir(&dir).unwrap();
    fs::rename(&away, &dir).unwrap();
    fixture.assert_repaired(12, "was removed");
    assert_eq!(fs::read_dir(dir.join("deltas")).unwrap().count(), 0);
    fixture.assert_clean();
}

#[test]
fn a_damaged_list_of_pools_is_found() {
    let (fixture, _dir) = with_pool();
    flip(&fixture.path("pools"), 50);
    fixture.assert_lasting(15, "pools");
    let findings = fixture.check(Repair::Yes).findings;
    assert!(findings.len() == 2 && findings[1].object == "disk p", "{findings:?}");
    flip(&fixture.path("pools"), 50);
    fixture.assert_clean();
}

#[test]
fn the_maps_and_data_files_in_a_pool_are_checked() {
    let (fixture, dir) = with_pool();
    let data = dir.join(data_path(fixture.id("p")));
    let bytes = fs::read(&data).unwrap();
    fs::remove_file(&data).unwrap();
    fixture.assert_lasting(10, "disk p");
    fs::write(&data, bytes).unwrap();
    let stray = dir.join("deltas/77.data");
    fs::write(&stray, "x").unwrap();
    fixture.assert_lasting(11, "77.data");
    fs::remove_file(stray).unwrap();
    // The disk is stored in the pool, so a file of it in the store is none of its files.
    let misplaced = fixture.path(&data_path(fixture.id("p")));
    fs::write(&misplaced, "x").unwrap();
    let findings = fixture.check(Repair::No).findings;
    assert!(is_one(&findings, 11, "deltas/"), "{findings:?}");
}
