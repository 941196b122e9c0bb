//! Requests that the kernel sends again, after another client has changed names.

use super::*;
use crate::format::record::{MountRequest, Token};
use crate::store::{DiskNode, NewBase};

fn request(unique: u64) -> MountRequest {
    MountRequest { mount_ns: 77, unique }
}

/// Does what the frontend does with a resent request.
fn again(store: &Store, unique: u64, change: impl FnOnce(&Store, MountRequest)) {
    if store.done_by(request(unique)).is_none() {
        change(store, request(unique));
    }
}

// A worker died between a durable unlink and its answer. A command took the name, and the resent unlink removed the new
// disk.
/// Guards D27.
#[test]
fn a_resent_unlink_leaves_the_disk_that_took_the_name() {
    let fixture = TestStore::new();
    let store = fixture.open();
    store.create_disks(&[blank("vm")]).unwrap();
    store.unlink_for("vm", Some(request(2))).unwrap();
    drop(store);
    let store = fixture.open();
    let new = store.create_disks(&[blank("vm")]).unwrap()[0].id();
    again(&store, 2, |store, request| drop(store.unlink_for("vm", Some(request)).unwrap()));
    assert_eq!(store.disk("vm").unwrap().id(), new);
    // Another mount numbers its requests from the start.
    assert!(store.done_by(MountRequest { mount_ns: 78, unique: 2 }).is_none());
    assert!(store.done_by(request(4)).is_none());
}

/// Guards D27.
#[test]
fn a_resent_rename_leaves_the_disks_that_took_the_names() {
    let fixture = TestStore::new();
    let store = fixture.open();
    let old = store.create_disks(&[blank("a")]).unwrap()[0].id();
    store.rename_for("a", "b", Replace::Yes, Some(request(2))).unwrap();
    drop(store);
    let store = fixture.open();
    let new = store.create_disks(&[blank("a")]).unwrap()[0].id();
    again(&store, 2, |store, request| drop(store.rename_for("a", "b", Replace::Yes, Some(request)).unwrap()));
    assert_eq!((store.disk("a").unwrap().id(), store.disk("b").unwrap().id()), (new, old));
    // Later changes of the disk by commands keep the note.
    store.rename("b", "c", Replace::No).unwrap();
    store.unlink("c").unwrap();
    assert_eq!(store.done_by(request(2)).unwrap().id(), old);
}

// creat(2) with O_EXCL took the disk of a command for the one that its first attempt had created.
/// Guards D27.
#[test]
fn a_resent_creation_finds_its_own_disk_only() {
    let fixture = TestStore::new();
    let store = fixture.open();
    store.create_disks_for(&[blank("mine")], Some(request(2))).unwrap();
    store.rename("mine", "renamed", Replace::No).unwrap();
    drop(store);
    let store = fixture.open();
    store.create_disks(&[blank("mine")]).unwrap();
    assert_eq!(store.done_by(request(2)).unwrap().name(), "renamed");
    let other = store.create_disks_for(&[blank("mine")], Some(request(4)));
    assert_refused(other.map(drop), Kind::Exists, "mine");
    assert!(store.done_by(request(4)).is_none());
}

// The note of a request needs a record of version 3, which an earlier plyfs cannot read.
#[test]
fn a_clean_close_leaves_no_requests_behind() {
    let fixture = TestStore::new();
    let store = fixture.open();
    let id = store.create_disks_for(&[blank("one")], Some(request(2))).unwrap()[0].id();
    let version = || fs::read(fixture.path(&format!("disks/{id}.disk"))).unwrap()[8];
    assert_eq!(version(), 3);
    store.close().unwrap();
    assert_eq!(version(), 1);
}

fn token(byte: u8) -> Token {
    Token::of_hash([byte; 16])
}

#[test]
fn a_creation_of_a_client_is_carried_out_once() {
    let fixture = TestStore::new();
    let store = fixture.open();
    let made = store.create_disks_once(&[blank("a"), blank("b")], token(1)).unwrap();
    drop(store);
    let store = fixture.open();
    let again = store.create_disks_once(&[blank("a"), blank("b")], token(1)).unwrap();
    let ids = |disks: &[Arc<DiskNode>]| disks.iter().map(|disk| disk.id()).collect::<Vec<_>>();
    assert_eq!(ids(&again), ids(&made));
    assert_eq!(store.disks_after(0).len(), 2);
    for other in [store.create_disks_once(&[blank("a")], token(2)), store.create_disks(&[blank("a")])] {
        assert_refused(other.map(drop), Kind::Exists, "disk a");
    }
    // After a resize it is the same disk, and a clean close does not change that.
    store.disk("a").unwrap().attach().unwrap().resize(1 << 30).unwrap();
    store.close().unwrap();
    drop(store);
    let store = fixture.open();
    assert_eq!(
        ids(&store.create_disks_once(&[blank("b"), blank("a")], token(1)).unwrap()),
        [made[1].id(), made[0].id()]
    );
    // An unlinked disk does not count.
    store.unlink("a").unwrap();
    let new = store.create_disks_once(&[blank("a")], token(1)).unwrap();
    assert_ne!(new[0].id(), made[0].id());
}

#[test]
fn an_interrupted_creation_of_a_client_is_completed() {
    let fixture = TestStore::new();
    let store = fixture.open();
    let first = store.create_disks_once(&[blank("b")], token(1)).unwrap()[0].id();
    let all = store.create_disks_once(&[blank("a"), blank("b"), blank("c")], token(1)).unwrap();
    let names: Vec<_> = all.iter().map(|disk| disk.name()).collect();
    assert_eq!((names, all[1].id()), (vec!["a".into(), "b".into(), "c".into()], first));
    // All or none: when another client has one of the names, nothing is created.
    store.create_disks(&[blank("theirs")]).unwrap();
    let refused = store.create_disks_once(&[blank("x"), blank("theirs")], token(1));
    assert_refused(refused.map(drop), Kind::Exists, "disk theirs");
    assert!(store.disk("x").is_err());
}

#[test]
fn of_clients_that_race_for_a_name_one_wins() {
    let fixture = TestStore::new();
    let store = fixture.open();
    for round in 0..20 {
        let name = format!("vm{round}");
        let create =
            |byte: u8| store.create_disks_once(&[blank(&name)], token(byte)).map(|made| made[0].id());
        let won: Vec<_> = std::thread::scope(|scope| {
            // Each client sends its request twice at a time.
            let threads: Vec<_> = [1, 1, 2, 2].map(|byte| scope.spawn(move || create(byte))).into();
            threads.into_iter().map(|thread| thread.join().unwrap().ok()).collect()
        });
        let winner = store.disk(&name).unwrap().id();
        assert!(won.iter().flatten().all(|id| *id == winner), "{won:?}");
        assert!(
            won[..2] == [Some(winner); 2] && won[2..] == [None; 2]
                || won[..2] == [None; 2] && won[2..] == [Some(winner); 2]
        );
    }
}

#[test]
fn a_base_is_registered_once_and_a_clean_close_forgets_the_token() {
    let fixture = TestStore::new();
    let store = fixture.open();
    let new = |byte| NewBase { token: Some(token(byte)), ..NewBase::raw("b", &fixture.source(), None) };
    let made = store.register(new(1)).unwrap().id();
    let version = || fs::read(fixture.path(&format!("bases/{made}.base"))).unwrap()[8];
    assert_eq!(version(), 4);
    drop(store);
    let store = fixture.open();
    assert_eq!(store.register(new(1)).unwrap().id(), made);
    assert_refused(store.register(new(2)).map(drop), Kind::Exists, "base b");
    store.close().unwrap();
    assert_eq!(version(), 1);
    drop(store);
    assert_refused(fixture.open().register(new(1)).map(drop), Kind::Exists, "base b");
}
