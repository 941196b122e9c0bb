//! Requests that the kernel sends again, after another client has changed names.

use super::*;
use crate::format::record::MountRequest;

fn request(unique: u64) -> MountRequest {
    MountRequest { mount_ns: 77, unique }
}

/// What the frontend does with a request that is sent again.
fn again(store: &Store, unique: u64, change: impl FnOnce(&Store, MountRequest)) {
    if store.done_by(request(unique)).is_none() {
        change(store, request(unique));
    }
}

// A worker died between a durable unlink and its answer, a command took the name, and the unlink that was sent again
// removed the new disk.
/// Guards D27.
#[test]
fn a_resent_unlink_leaves_the_disk_that_took_the_name() {
    let house = House::new();
    let store = house.open();
    store.create_disks(&[blank("vm")]).unwrap();
    store.unlink_for("vm", Some(request(2))).unwrap();
    drop(store);
    let store = house.open();
    let new = store.create_disks(&[blank("vm")]).unwrap()[0].id();
    again(&store, 2, |store, request| drop(store.unlink_for("vm", Some(request)).unwrap()));
    assert_eq!(store.disk("vm").unwrap().id(), new);
    // Another mount counts its requests anew.
    assert!(store.done_by(MountRequest { mount_ns: 78, unique: 2 }).is_none());
    assert!(store.done_by(request(4)).is_none());
}

/// Guards D27.
#[test]
fn a_resent_rename_leaves_the_disks_that_took_the_names() {
    let house = House::new();
    let store = house.open();
    let old = store.create_disks(&[blank("a")]).unwrap()[0].id();
    store.rename_for("a", "b", Replace::Yes, Some(request(2))).unwrap();
    drop(store);
    let store = house.open();
    let new = store.create_disks(&[blank("a")]).unwrap()[0].id();
    again(&store, 2, |store, request| drop(store.rename_for("a", "b", Replace::Yes, Some(request)).unwrap()));
    assert_eq!((store.disk("a").unwrap().id(), store.disk("b").unwrap().id()), (new, old));
    // What a command changes of the disk since keeps the note.
    store.rename("b", "c", Replace::No).unwrap();
    store.unlink("c").unwrap();
    assert_eq!(store.done_by(request(2)).unwrap().id(), old);
}

// creat(2) with O_EXCL once took the disk of a command for the one that its first try had made.
/// Guards D27.
#[test]
fn a_resent_creation_finds_its_own_disk_only() {
    let house = House::new();
    let store = house.open();
    store.create_disks_for(&[blank("mine")], Some(request(2))).unwrap();
    store.rename("mine", "renamed", Replace::No).unwrap();
    drop(store);
    let store = house.open();
    store.create_disks(&[blank("mine")]).unwrap();
    assert_eq!(store.done_by(request(2)).unwrap().name(), "renamed");
    let other = store.create_disks_for(&[blank("mine")], Some(request(4)));
    assert_refused(other.map(drop), "exists", "mine");
    assert!(store.done_by(request(4)).is_none());
}

// The mark of a request makes the record one of version 3, which a plyfs of before does not read.
#[test]
fn a_clean_close_leaves_no_requests_behind() {
    let house = House::new();
    let store = house.open();
    let id = store.create_disks_for(&[blank("one")], Some(request(2))).unwrap()[0].id();
    let version = || fs::read(house.path(&format!("disks/{id}.disk"))).unwrap()[8];
    assert_eq!(version(), 3);
    store.close().unwrap();
    assert_eq!(version(), 1);
}
