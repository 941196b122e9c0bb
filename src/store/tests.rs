//! Tests of the catalogue.

mod attached;
mod claims;
mod closing;
mod encryption;
mod family;
mod limits;
mod many;
mod pools;
mod preload;
mod replays;
mod reworks;
mod unread;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tempfile::TempDir;

use super::{NewDisk, Replace, Store, StoreError, StoreErrorKind as Kind};
use crate::cache::BlockCache;
use crate::delta::Edges;
use crate::format::record::{DiskRecord, Superblock, Token};
use crate::io::sim::{Call, Event, Fault, SimLive, SimMedium, Stage};
use crate::io::{LiveDir, Medium, sys};
use crate::source::OpenHere;

struct TestStore {
    tmp: TempDir,
}

impl TestStore {
    fn new() -> Self {
        let tmp = tempfile::tempdir_in("/dev/shm").unwrap();
        fs::create_dir(tmp.path().join("store")).unwrap();
        fs::write(tmp.path().join("b.raw"), [7; 8192]).unwrap();
        Self { tmp }
    }
    /// A store with base `b` of 8 KiB.
    fn with_base() -> (Self, Store) {
        let fixture = Self::new();
        let store = fixture.open();
        store.add_base("b", &fixture.source(), None).unwrap();
        (fixture, store)
    }
    fn source(&self) -> String {
        self.tmp.path().join("b.raw").to_str().unwrap().into()
    }
    fn path(&self, name: &str) -> PathBuf {
        self.tmp.path().join("store").join(name)
    }
    fn try_open(&self) -> Result<Store, StoreError> {
        let live = self.tmp.path().join("live");
        let cache = Arc::new(BlockCache::new(1 << 20).unwrap());
        Store::open(&self.path(""), |_| Ok(Arc::new(LiveDir::new(&live)?)), cache, None)
    }
    fn open(&self) -> Store {
        self.try_open().unwrap()
    }
    fn files(&self, dir: &str) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.path(dir))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn blank(name: &str) -> NewDisk {
    NewDisk { name: name.into(), size: Some(8192), mode: 0o600, uid: 1, gid: 2, ..NewDisk::default() }
}

fn on(base: &str, name: &str, size: Option<u64>) -> NewDisk {
    NewDisk { base: Some(base.into()), size, ..blank(name) }
}

fn names(store: &Store) -> Vec<String> {
    let mut names: Vec<_> = store.disks_after(0).iter().map(|d| d.name()).collect();
    names.sort();
    names
}

fn write(store: &Store, name: &str) {
    let node = store.disk(name).unwrap();
    let disk = node.attach().unwrap();
    let delta = disk.delta();
    delta.write(0, &[1; 4096], &Edges::default()).unwrap();
    delta.flush().unwrap();
}

#[track_caller]
fn assert_refused<T>(result: Result<T, StoreError>, kind: Kind, part: &str) {
    let error = result.err().expect("it is refused");
    let message = error.to_string();
    assert_eq!(error.kind(), kind, "{message}");
    assert!(message.contains(part), "{message:?} has no {part:?}");
    assert!(!message.contains('\n'), "{message:?}");
}

#[test]
fn created_objects_exist_after_a_reopen() {
    let (fixture, store) = TestStore::with_base();
    assert!(names(&store).is_empty());
    store.create_disks(&[on("b", "one", None), on("b", "two", Some(1 << 30)), blank("three")]).unwrap();
    let look = |store: &Store| {
        let mut all: Vec<_> = store
            .disks_after(0)
            .iter()
            .map(|d| {
                let a = d.attributes();
                (d.id(), d.name(), d.base_name(), a.size, a.mode, a.uid, a.gid, a.created_ns, a.linked)
            })
            .collect();
        all.sort();
        all
    };
    let before = look(&store);
    assert_eq!(before.len(), 3);
    assert_eq!(before[0].3, 8192);
    assert_eq!(before[1].3, 1 << 30);
    assert_eq!(before[2].2, None);
    let base = store.base("b").unwrap().record().clone();
    store.close().unwrap();
    drop(store);
    let store = fixture.open();
    assert_eq!(look(&store), before);
    assert_eq!(store.base("b").unwrap().record(), &base);
    assert!(store.damaged().is_empty());
    assert!(fixture.files("disks").iter().all(|f| f.ends_with(".disk")));
    let after = store.disks_after(before[0].0);
    assert_eq!(after.iter().map(|d| d.id()).collect::<Vec<_>>(), [before[1].0, before[2].0]);
}

#[test]
fn invalid_names_are_refused() {
    let (fixture, store) = TestStore::with_base();
    store.create_disks(&[blank("fine")]).unwrap();
    let long = "x".repeat(200);
    for bad in ["", "..", ".", ".a", "a/b", "/", "a\nb", "a b", "-a", "ä", "a\0", &long] {
        assert_refused(store.create_disks(&[blank(bad)]), Kind::Invalid, "1 to 128 letters");
        assert_refused(store.add_base(bad, &fixture.source(), None), Kind::Invalid, "1 to 128 letters");
        assert_refused(store.rename("fine", bad, Replace::Yes), Kind::Invalid, "1 to 128 letters");
    }
    store.create_disks(&[blank(&"x".repeat(128))]).unwrap();
    assert_eq!(fixture.files("disks").len(), 2);
}

#[test]
fn names_that_are_taken_are_refused() {
    let (fixture, store) = TestStore::with_base();
    store.create_disks(&[blank("one")]).unwrap();
    assert_refused(store.create_disks(&[blank("one")]), Kind::Exists, "disk one");
    assert_refused(store.add_base("b", &fixture.source(), None), Kind::Exists, "base b");
    // Bases and disks have separate namespaces.
    store.create_disks(&[blank("b")]).unwrap();
}

#[test]
fn missing_objects_are_not_found() {
    let (_house, store) = TestStore::with_base();
    assert_refused(store.disk("x"), Kind::NotFound, "plyfs disk ls");
    assert_refused(store.base("x"), Kind::NotFound, "plyfs base ls");
    assert_refused(store.unlink("x"), Kind::NotFound, "disk x");
    assert_refused(store.rename("x", "y", Replace::Yes), Kind::NotFound, "disk x");
    assert_refused(store.remove_base("x"), Kind::NotFound, "base x");
    assert_refused(store.create_disks(&[on("x", "one", None)]), Kind::NotFound, "base x");
    store.purge(99).unwrap();
}

#[test]
fn sizes() {
    let (fixture, store) = TestStore::with_base();
    assert_refused(store.create_disks(&[NewDisk { size: None, ..blank("one") }]), Kind::Invalid, "--size");
    assert_refused(store.create_disks(&[on("b", "one", Some(8191))]), Kind::Invalid, "8192");
    for size in [1 << 63, u64::MAX, (1 << 46) + 1] {
        assert_refused(store.create_disks(&[on("b", "one", Some(size))]), Kind::Invalid, "64 TiB");
        assert_refused(
            store.create_disks(&[NewDisk { size: Some(size), ..blank("one") }]),
            Kind::Invalid,
            "64 TiB",
        );
    }
    assert_eq!(fixture.files("disks").len(), 0);
    store
        .create_disks(&[NewDisk { size: Some(1 << 46), ..blank("largest") }, on("b", "odd", Some(8193))])
        .unwrap();
    assert_eq!(fixture.open().disk("largest").unwrap().attributes().size, 1 << 46);
}

#[test]
fn unusable_sources_are_refused_as_bases() {
    let fixture = TestStore::new();
    let store = fixture.open();
    let at = |name: &str| fixture.tmp.path().join(name).to_str().unwrap().to_owned();
    assert_refused(store.add_base("b", &at("missing"), None), Kind::Invalid, "no such file");
    assert_refused(store.add_base("b", &at("b.raw/x"), None), Kind::Invalid, "no such file");
    assert_refused(store.add_base("b", &at(""), None), Kind::Invalid, "not a regular file");
    fs::write(at("empty"), "").unwrap();
    assert_refused(store.add_base("b", &at("empty"), None), Kind::Invalid, "empty");
    let fifo = std::process::Command::new("mkfifo").arg(at("fifo")).status().unwrap();
    assert!(fifo.success());
    assert_refused(store.add_base("b", &at("fifo"), None), Kind::Invalid, "not a regular file");
    assert_refused(store.add_base("b", "b.raw", None), Kind::Invalid, "not absolute");
    assert_refused(store.add_base("b", &format!("/{}", "x/".repeat(3000)), None), Kind::Invalid, "4096");
    if sys::effective_ids().0 != 0 {
        use std::os::unix::fs::PermissionsExt;
        fs::write(at("closed"), "x").unwrap();
        fs::set_permissions(at("closed"), fs::Permissions::from_mode(0o0)).unwrap();
        assert_refused(store.add_base("b", &at("closed"), None), Kind::Invalid, "permission");
    }
    assert!(store.bases().is_empty());
    assert_eq!(fixture.files("bases").len(), 0);
}

#[test]
fn a_base_in_use_names_its_disks() {
    let (fixture, store) = TestStore::with_base();
    store.create_disks(&[on("b", "one", None), on("b", "two", None)]).unwrap();
    assert_refused(store.remove_base("b"), Kind::InUse, "disk one, disk two");
    let one = store.unlink("one").unwrap();
    assert_refused(store.remove_base("b"), Kind::InUse, "disk two");
    store.purge(one.id()).unwrap();
    let two = store.unlink("two").unwrap();
    store.purge(two.id()).unwrap();
    store.remove_base("b").unwrap();
    assert_eq!(fixture.files("bases").len(), 0);
    assert!(Path::new(&fixture.source()).exists());
    assert_refused(store.base("b"), Kind::NotFound, "base b");
    let many: Vec<_> = (0..15).map(|n| on("b", &format!("n{n}"), None)).collect();
    store.add_base("b", &fixture.source(), None).unwrap();
    store.create_disks(&many).unwrap();
    assert_refused(store.remove_base("b"), Kind::InUse, "and 5 more");
}

#[test]
fn a_rename_over_a_disk_leaves_one_disk_of_that_name() {
    let (fixture, store) = TestStore::with_base();
    let made = store.create_disks(&[blank("a"), blank("b")]).unwrap();
    assert_refused(store.rename("a", "b", Replace::No), Kind::Exists, "disk b");
    assert_eq!(names(&store), ["a", "b"]);
    assert!(store.rename("a", "a", Replace::Yes).unwrap().is_none());
    let loser = store.rename("a", "b", Replace::Yes).unwrap().unwrap();
    assert_eq!(loser.id(), made[1].id());
    for store in [&store, &fixture.open()] {
        assert_eq!(names(store), ["b"]);
        assert_eq!(store.disk("b").unwrap().id(), made[0].id());
        assert_eq!(store.unlinked().len(), 1);
    }
    store.purge(loser.id()).unwrap();
    assert!(store.unlinked().is_empty());
    assert_eq!(fixture.files("disks").len(), 1);
}

/// Renames `a` over `b`, with a crash before the record of the loser was written. Returns the numbers of `a` and `b`.
fn crash_between_the_two_records(fixture: &TestStore) -> (u64, u64) {
    let store = fixture.open();
    let made = store.create_disks(&[blank("a"), blank("b")]).unwrap();
    let (a, b) = (made[0].id(), made[1].id());
    let file = fixture.path(&format!("disks/{b}.disk"));
    let old = fs::read(&file).unwrap();
    store.rename("a", "b", Replace::Yes).unwrap();
    fs::write(&file, old).unwrap();
    (a, b)
}

/// Guards D14.
#[test]
fn a_crash_between_the_two_records_of_a_rename_leaves_one_disk_of_that_name() {
    let fixture = TestStore::new();
    let (a, b) = crash_between_the_two_records(&fixture);
    let store = fixture.open();
    assert_eq!(names(&store), ["b"]);
    assert_eq!(store.disk("b").unwrap().id(), a);
    assert_eq!(store.unlinked().iter().map(|d| d.id()).collect::<Vec<_>>(), [b]);
    store.purge(b).unwrap();
    assert_eq!(fixture.files("disks"), [format!("{a}.disk")]);
    assert_eq!(names(&fixture.open()), ["b"]);
}

// A mark in memory only let the loser come back without a purge.
#[test]
fn the_loser_of_a_cut_off_rename_does_not_come_back_when_the_winner_is_renamed() {
    let fixture = TestStore::new();
    crash_between_the_two_records(&fixture);
    fixture.open().rename("b", "c", Replace::Yes).unwrap();
    assert_eq!(names(&fixture.open()), ["c"]);
}

// As above. Of two records with one name the higher `name_seq` decides, also when that disk is unlinked.
#[test]
fn the_loser_of_a_cut_off_rename_does_not_come_back_when_the_winner_is_removed() {
    let fixture = TestStore::new();
    crash_between_the_two_records(&fixture);
    fixture.open().unlink("b").unwrap();
    assert!(names(&fixture.open()).is_empty());
}

#[test]
fn a_removed_disk_is_gone_with_its_files_after_purge() {
    let (fixture, store) = TestStore::with_base();
    let made = store.create_disks(&[blank("one"), blank("two")]).unwrap();
    let id = made[0].id();
    write(&store, "one");
    write(&store, "two");
    store.unlink("one").unwrap();
    assert_refused(store.disk("one"), Kind::NotFound, "disk one");
    // Its contents exist until the last close.
    let mut buf = [0; 4096];
    store.disk_by_id(id).unwrap().attach().unwrap().delta().read(&mut buf, 0).unwrap();
    assert_eq!(buf, [1; 4096]);
    store.purge(made[1].id()).unwrap();
    assert_eq!(names(&store), ["two"], "what has a name is not purged");
    // As after a crash, because a close would remove it.
    drop((store, made));
    let store = fixture.open();
    assert_eq!(names(&store), ["two"]);
    assert_eq!(store.unlinked().iter().map(|d| d.id()).collect::<Vec<_>>(), [id]);
    store.purge(id).unwrap();
    store.purge(id).unwrap();
    let own = |f: &String| f.starts_with(&format!("{id}."));
    assert!(!fixture.files("disks").iter().chain(&fixture.files("deltas")).any(own));
    assert!(!fixture.files("deltas").is_empty());
    // The name is free again.
    store.create_disks(&[blank("one")]).unwrap();
    let fresh = store.disk("one").unwrap();
    assert_eq!(fresh.attributes().allocated, 0);
}

#[test]
fn numbers_are_never_reused() {
    let (fixture, mut store) = TestStore::with_base();
    let mut last = store.base("b").unwrap().id();
    for _ in 0..5 {
        let id = store.create_disks(&[blank("one")]).unwrap()[0].id();
        assert!(id > last);
        last = id;
        store.unlink("one").unwrap();
        store.purge(id).unwrap();
        drop(store);
        store = fixture.open();
    }
    let base = store.add_base("c", &fixture.source(), None).unwrap().id();
    assert!(base > last);
}

#[test]
fn a_batch_is_created_wholly_or_not_at_all() {
    let (fixture, store) = TestStore::with_base();
    store.create_disks(&[blank("taken")]).unwrap();
    let before = fixture.files("disks");
    assert_refused(store.create_disks(&[blank("a"), blank("a/b")]), Kind::Invalid, "a/b");
    assert_refused(store.create_disks(&[blank("a"), blank("taken")]), Kind::Exists, "taken");
    assert_refused(store.create_disks(&[blank("a"), blank("a")]), Kind::Exists, "disk a");
    assert_refused(store.create_disks(&[blank("a"), on("none", "c", None)]), Kind::NotFound, "none");
    assert_refused(store.create_disks(&[blank("a"), on("b", "c", Some(1))]), Kind::Invalid, "smaller");
    assert_eq!(fixture.files("disks"), before);
    assert_eq!(names(&store), ["taken"]);
    assert_eq!(names(&fixture.open()), ["taken"]);
    // The storage fails at the second record: a directory has the name of its staged file.
    let next = store.create_disks(&[blank("probe")]).unwrap()[0].id() + 1;
    fs::create_dir(fixture.path(&format!("disks/{}.disk.tmp", next + 1))).unwrap();
    assert_refused(store.create_disks(&[blank("a"), blank("c")]), Kind::Io, "disk c");
    fs::remove_dir(fixture.path(&format!("disks/{}.disk.tmp", next + 1))).unwrap();
    assert_eq!(names(&store), ["probe", "taken"]);
    assert_eq!(names(&fixture.open()), ["probe", "taken"]);
    store.create_disks(&[blank("a"), blank("c")]).unwrap();
    store.create_disks(&[]).unwrap();
}

#[test]
fn a_damaged_record_takes_only_its_own_disk_away() {
    let (fixture, store) = TestStore::with_base();
    let made = store.create_disks(&[on("b", "one", None), blank("two")]).unwrap();
    drop(store);
    let file = fixture.path(&format!("disks/{}.disk", made[0].id()));
    let whole = fs::read(&file).unwrap();
    let check = |what: String| {
        let store = fixture.open();
        assert_eq!(names(&store), ["two"], "{what}");
        assert_eq!(store.damaged().len(), 1, "{what}");
        assert_eq!(store.damaged()[0].0, format!("disks/{}.disk", made[0].id()));
        assert!(store.unlinked().is_empty());
        assert_eq!(store.disk("two").unwrap().problem(), None);
    };
    for at in 0..whole.len() {
        let mut bad = whole.clone();
        bad[at] ^= 1 << (at % 8);
        fs::write(&file, bad).unwrap();
        check(format!("byte {at}"));
    }
    for len in [0, 1, whole.len() - 1] {
        fs::write(&file, &whole[..len]).unwrap();
        check(format!("{len} bytes"));
    }
    fs::write(&file, vec![0; 1 << 20]).unwrap();
    check("too long".into());
    fs::write(&file, &whole).unwrap();
    assert_eq!(names(&fixture.open()), ["one", "two"]);
}

// A new disk took the name of a damaged record. With that record restored, one of the two lost its name, and the next
// start removed its files. A base could be removed under a disk whose record was damaged.
#[test]
fn a_damaged_record_keeps_its_name_and_every_base_until_it_is_back() {
    let (fixture, store) = TestStore::with_base();
    let one = store.create_disks(&[on("b", "one", None)]).unwrap()[0].id();
    store.create_disks(&[blank("two")]).unwrap();
    store.rename("one", "first", Replace::No).unwrap();
    let b = store.base("b").unwrap().id();
    drop(store);
    let file = format!("disks/{one}.disk");
    let whole = fs::read(fixture.path(&file)).unwrap();
    let mut bad = whole.clone();
    let last = bad.len() - 1;
    bad[last] ^= 1;
    fs::write(fixture.path(&file), bad).unwrap();
    let store = fixture.open();
    assert_refused(store.create_disks(&[blank("first")]).map(drop), Kind::Invalid, &file);
    assert_refused(store.rename("two", "first", Replace::Yes).map(drop), Kind::Invalid, &file);
    assert_refused(store.remove_base("b"), Kind::Invalid, &file);
    // The order of names continues above the damaged record's: that record is later than what is created now.
    store.create_disks(&[blank("three")]).unwrap();
    store.close().unwrap();
    drop(store);
    fs::write(fixture.path(&file), whole).unwrap();
    let store = fixture.open();
    assert_eq!(names(&store), ["first", "three", "two"]);
    store.rename("three", "first", Replace::Yes).unwrap();
    drop(store);
    let store = fixture.open();
    assert_eq!(names(&store), ["first", "two"]);
    drop(store);

    let file = format!("bases/{b}.base");
    let mut bad = fs::read(fixture.path(&file)).unwrap();
    let last = bad.len() - 1;
    bad[last] ^= 1;
    fs::write(fixture.path(&file), bad).unwrap();
    let store = fixture.open();
    assert_refused(store.add_base("b", &fixture.source(), None).map(drop), Kind::Invalid, &file);
    store.add_base("c", &fixture.source(), None).unwrap();
}

// A worker that died between the last close and the removal left the files to the next start, even across a clean stop.
#[test]
fn a_close_of_the_store_removes_disks_that_lost_their_name() {
    let (fixture, store) = TestStore::with_base();
    store.create_disks(&[on("b", "one", None), blank("two")]).unwrap();
    write(&store, "one");
    store.unlink("one").unwrap();
    store.close().unwrap();
    assert_eq!(fixture.files("disks").len(), 1);
    assert_eq!(fixture.files("deltas"), [""; 0]);
}

// An error of open(2) failed the whole store, unlike an error of read(2).
#[test]
fn a_record_that_cannot_be_opened_takes_only_its_own_disk_away() {
    let (fixture, store) = TestStore::with_base();
    let made = store.create_disks(&[blank("one"), blank("two")]).unwrap();
    drop(store);
    let file = fixture.path(&format!("disks/{}.disk", made[0].id()));
    fs::remove_file(&file).unwrap();
    fs::create_dir(&file).unwrap();
    let store = fixture.try_open().unwrap_or_else(|e| panic!("the store is served: {e}"));
    assert_eq!(names(&store), ["two"]);
    assert_eq!(store.damaged().len(), 1);
}

// The record of another number was served in place of the right one, or beside it.
#[test]
fn a_record_under_another_number_is_damaged() {
    let fixture = TestStore::new();
    let store = fixture.open();
    let id = store.create_disks(&[blank("one")]).unwrap()[0].id();
    drop(store);
    fs::copy(fixture.path(&format!("disks/{id}.disk")), fixture.path("disks/77.disk")).unwrap();
    let store = fixture.open();
    assert_eq!(names(&store), ["one"]);
    assert_eq!(store.damaged().len(), 1);
    assert_eq!(store.damaged()[0].0, "disks/77.disk");
}

#[test]
fn a_damaged_base_record_is_named_by_its_disks() {
    let (fixture, store) = TestStore::with_base();
    store.create_disks(&[on("b", "one", None), blank("two")]).unwrap();
    let id = store.base("b").unwrap().id();
    drop(store);
    let file = fixture.path(&format!("bases/{id}.base"));
    let whole = fs::read(&file).unwrap();
    for at in 0..whole.len() {
        let mut bad = whole.clone();
        bad[at] ^= 1 << (at % 8);
        fs::write(&file, bad).unwrap();
        let store = fixture.open();
        assert_eq!(store.damaged().len(), 1, "byte {at}");
        assert!(store.bases().is_empty());
        assert_refused(store.disk("one").unwrap().attach(), Kind::Changed, &format!("bases/{id}.base"));
        store.disk("two").unwrap().attach().unwrap();
    }
}

fn reseal(bytes: &mut [u8]) {
    let end = bytes.len() - 4;
    let sum = crc32c::crc32c(&bytes[..end]).to_le_bytes();
    bytes[end..].copy_from_slice(&sum);
}

#[test]
fn a_newer_or_damaged_superblock_is_refused() {
    let fixture = TestStore::new();
    drop(fixture.open());
    let file = fixture.path("plyfs.store");
    let whole = fs::read(&file).unwrap();
    for at in [8, 16] {
        let mut newer = whole.clone();
        newer[at] = 2;
        reseal(&mut newer);
        fs::write(&file, &newer).unwrap();
        assert_refused(fixture.try_open(), Kind::Damaged, "newer");
        assert_eq!(fs::read(&file).unwrap(), newer);
    }
    for at in 0..whole.len() {
        let mut bad = whole.clone();
        bad[at] ^= 1;
        fs::write(&file, bad).unwrap();
        assert_refused(fixture.try_open(), Kind::Damaged, "plyfs.store");
    }
    fs::write(&file, &whole).unwrap();
    // A store without its superblock is not created again over its files.
    fixture.open().create_disks(&[blank("one")]).unwrap();
    fs::remove_file(&file).unwrap();
    assert_refused(fixture.try_open(), Kind::Invalid, "plyfs.store");
    assert_eq!(fixture.files("disks").len(), 1);
    assert!(Superblock::decode(&whole).is_ok());
}

#[test]
fn a_base_that_changed_is_not_attached() {
    let (fixture, store) = TestStore::with_base();
    store.create_disks(&[on("b", "one", None)]).unwrap();
    store.disk("one").unwrap().attach().unwrap();
    drop(store);
    let source = fixture.source();
    let kept = format!("{source}.kept");
    fs::copy(&source, &kept).unwrap();
    let time = |path: &str| fs::metadata(path).unwrap().modified().unwrap();
    let original = time(&source);
    let file = fs::OpenOptions::new().write(true).open(&source).unwrap();
    let refused = |why: &str| {
        let store = fixture.open();
        assert_refused(store.disk("one").unwrap().attach(), Kind::Changed, why);
        assert_refused(store.disk("one").unwrap().attach(), Kind::Changed, &source);
        assert_refused(store.create_disks(&[on("b", "two", None)]), Kind::Changed, &source);
        assert!(store.base("b").unwrap().problem().is_some());
        assert_eq!(names(&store), ["one"], "it is still listed");
        assert_eq!(store.disk("one").unwrap().attributes().size, 8192);
    };
    file.set_modified(SystemTime::now() + Duration::from_secs(5)).unwrap();
    refused("modified");
    file.set_len(4096).unwrap();
    refused("4096 bytes");
    file.set_len(8192).unwrap();
    file.set_modified(original).unwrap();
    fixture.open().disk("one").unwrap().attach().unwrap();
    // Replaced by an equal copy with the same time: still a different file.
    fs::OpenOptions::new().write(true).open(&kept).unwrap().set_modified(original).unwrap();
    let inode = fs::metadata(&source).unwrap().ino();
    fs::rename(&source, format!("{source}.old")).unwrap();
    fs::rename(&kept, &source).unwrap();
    assert_ne!(fs::metadata(&source).unwrap().ino(), inode);
    refused("another file");
    fs::remove_file(&source).unwrap();
    let store = fixture.open();
    assert_refused(store.disk("one").unwrap().attach(), Kind::Invalid, &source);
}

#[test]
fn a_disk_made_on_another_version_of_its_base_is_not_attached() {
    let (fixture, store) = TestStore::with_base();
    let id = store.create_disks(&[on("b", "one", None)]).unwrap()[0].id();
    drop(store);
    let file = fixture.path(&format!("disks/{id}.disk"));
    let mut record = DiskRecord::decode(&fs::read(&file).unwrap()).unwrap();
    std::sync::Arc::make_mut(&mut record.backing.as_mut().unwrap().identity).size += 1;
    fs::write(&file, record.encode()).unwrap();
    assert_refused(fixture.open().disk("one").unwrap().attach(), Kind::Changed, "another version of base b");
}

#[test]
fn attributes_are_kept() {
    let (fixture, store) = TestStore::with_base();
    store.create_disks(&[blank("one")]).unwrap();
    store
        .disk("one")
        .unwrap()
        .update(|r| {
            r.mode = 0o640;
            r.uid = 77;
        })
        .unwrap();
    write(&store, "one");
    store.close().unwrap();
    drop(store);
    let store = fixture.open();
    let got = store.disk("one").unwrap().attributes();
    assert_eq!((got.mode, got.uid, got.gid), (0o640, 77, 2));
    assert_eq!(store.disk("one").unwrap().problem(), None);
}

#[test]
fn unfinished_records_of_a_killed_worker_are_removed_by_the_next() {
    let (fixture, store) = TestStore::with_base();
    store.create_disks(&[blank("one"), blank("two")]).unwrap();
    let (one, two) = (store.disk("one").unwrap().id(), store.disk("two").unwrap().id());
    drop(store);
    let record = |id: u64| format!("disks/{id}.disk");
    let left = [
        "plyfs.store.tmp".to_owned(),
        "bases/1.base.tmp".to_owned(),
        "bases/77.base.tmp".to_owned(),
        format!("{}.tmp", record(one)),
        format!("{}.tmp", record(900)),
        // May be the last copy, as below.
        format!("{}.tmp", record(two)),
        // Not a file of plyfs.
        "disks/notes.tmp".to_owned(),
    ];
    for file in &left {
        fs::copy(fixture.path(&record(two)), fixture.path(file)).unwrap();
    }
    fs::write(fixture.path(&record(two)), "damaged").unwrap();
    let store = fixture.open();
    assert_eq!(store.damaged().len(), 1);
    assert_eq!(names(&store), ["one"]);
    for file in &left[..5] {
        assert!(!fixture.path(file).exists(), "{file} is still there");
    }
    for file in &left[5..] {
        assert!(fixture.path(file).exists(), "{file} is gone");
    }
}

#[test]
fn a_removed_disk_leaves_no_files_although_a_request_still_holds_it() {
    for attached in [false, true] {
        let fixture = TestStore::new();
        let store = fixture.open();
        store.create_disks(&[blank("a")]).unwrap();
        if attached {
            write(&store, "a");
        }
        // As a request of the control socket does that found the disk before its removal.
        let node = store.disk("a").unwrap();
        store.unlink("a").unwrap();
        store.purge(node.id()).unwrap();
        let resized = node.attach().map(|disk| disk.resize(1 << 20));
        assert!(!matches!(resized, Ok(Ok(()))), "attached: {attached}");
        assert!(node.update(|record| record.mode = 0o644).is_err());
        store.close().unwrap();
        for dir in ["disks", "deltas", "../live"] {
            assert!(
                fixture.files(dir).is_empty(),
                "{dir} has {:?}, attached: {attached}",
                fixture.files(dir)
            );
        }
    }
}
