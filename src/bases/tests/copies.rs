//! Further copies of what the cache has of a base, in pools.

use std::path::Path;

use super::*;
use crate::bases::copies::{CopyView, dropping};
use crate::seal::{beside, seal};
use crate::store::pools::{HostPools, make_identity};

/// A house with these pools, which are directories beside the store.
fn with_pools(names: &[&str]) -> House {
    let house = House::new();
    let root = house.dir.path().join("store");
    for name in names {
        let dir = house.dir.path().join(name);
        let superblock = Store::superblock(&root).unwrap();
        make_identity(&root, &superblock.uuid, &dir).unwrap();
        house.store.add_pool(name, dir.to_str().unwrap(), Path::new("/nowhere")).unwrap();
    }
    reopened(house)
}

/// Closes a house, and waits until no thread of it is left.
fn closed(house: House) -> TempDir {
    let House { dir, store, bases } = house;
    store.close().unwrap();
    let sources = Arc::downgrade(bases.sources());
    drop((bases, store));
    until("the threads of the house", || sources.upgrade().is_none().then_some(()));
    dir
}

/// The next worker.
fn reopened(house: House) -> House {
    House::opened(closed(house), |_| {}, &HostPools::default())
}

fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = ask() {
            return found;
        }
        assert!(Instant::now() < end, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn copies(house: &House, name: &str) -> Vec<CopyView> {
    house.bases.copies(&house.store.base(name).unwrap())
}

fn wait_until_current(house: &House, name: &str, count: usize) -> Vec<CopyView> {
    until("current copies", || {
        let copies = copies(house, name);
        let are_current =
            copies.iter().all(|copy| copy.is_current && copy.bytes == SIZE as u64 && copy.trouble.is_none());
        (copies.len() == count && are_current).then_some(copies)
    })
}

/// Guards D101.
#[test]
fn blocks_that_the_cache_loses_are_read_from_a_copy_and_come_back() {
    let house = with_pools(&["one", "two"]);
    let image = house.image("a.img", 7);
    house.add(with_digest("b", &image)).unwrap();
    house.bases.pin("b", true, Some(2)).unwrap();
    let base = house.hydrated("b");
    wait_until_current(&house, "b", 1);
    fs::remove_file(&image).unwrap();
    // The files of the cache are gone at the next start.
    let cache = house.dir.path().join("store/cache");
    drop(base);
    let dir = closed(house);
    fs::remove_dir_all(&cache).unwrap();
    let house = House::opened(dir, |_| {}, &HostPools::default());
    let base = house.store.base("b").unwrap();
    let source = house.bases.sources().fetched(&base.current(), &base.record().image).unwrap();
    let mut bytes = vec![0; SIZE];
    until("the bytes", || source.read_kept(&mut bytes, 0).then_some(()));
    assert!(bytes.iter().all(|byte| *byte == 7));
    until("the cache has all of it again", || (house.kept(&base) == SIZE as u64).then_some(()));
}

/// Guards D102.
#[test]
fn an_eviction_ends_all_copies_before_it_returns() {
    let house = with_pools(&["one", "two", "three"]);
    let image = house.image("a.img", 7);
    house.add(with_digest("b", &image)).unwrap();
    house.bases.pin("b", true, Some(3)).unwrap();
    let base = house.hydrated("b");
    wait_until_current(&house, "b", 2);
    let before = base.options().copies.unwrap();
    house.bases.evict("b", LastCopy::Keep).unwrap();
    let after = base.options().copies.unwrap();
    assert_eq!(before.count, after.count);
    assert_ne!(before.number, after.number, "a copy of before is no copy any more");
    assert!(copies(&house, "b").iter().all(|copy| copy.bytes == 0));
    assert_eq!(house.kept(&base), 0);
    // The keepers look several times; nothing comes back.
    for name in ["one", "two", "three"] {
        let dir = house.dir.path().join(name).join("cache");
        until("the files of old copies go", || match fs::read_dir(&dir) {
            Ok(mut entries) => entries.next().is_none().then_some(()),
            Err(_) => Some(()),
        });
    }
    assert_eq!(house.kept(&base), 0);
}

#[test]
fn numbers_of_copies_that_do_not_fit_are_refused() {
    let house = with_pools(&["one"]);
    let image = house.image("a.img", 7);
    house.add(with_digest("b", &image)).unwrap();
    let refused = |pinned, count, why: &str| {
        let error = house.bases.pin("b", pinned, Some(count)).map(drop).unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
    };
    refused(true, 0, "from 1 to 8");
    refused(true, 9, "from 1 to 8");
    refused(false, 2, "only a pinned base");
    refused(true, 3, "3 copies need 2 pools");
    assert_eq!(house.store.base("b").unwrap().options().copies, None);
    house.bases.pin("b", true, Some(2)).unwrap();
    let number = house.store.base("b").unwrap().options().copies.unwrap().number;
    house.bases.pin("b", true, None).unwrap();
    assert_eq!(house.store.base("b").unwrap().options().copies.unwrap().number, number);
    house.bases.pin("b", true, Some(1)).unwrap();
    assert_eq!(house.store.base("b").unwrap().options().copies, None);
}

/// Guards D102.
#[test]
fn contents_that_differ_come_back_from_no_copy_of_another_base_that_shares_them() {
    let house = with_pools(&["one"]);
    let image = house.image("a.img", 7);
    seal(&image, &beside(&image), &mut |_| true).unwrap();
    let kept = house.add(raw("kept", &image)).unwrap();
    let other = house.add(raw("other", &image)).unwrap();
    // All of it is in the cache, with a block that a bug or a disk spoiled.
    let contents = house.bases.sources().contents(kept.record(), &kept.record().image);
    let mut bytes = vec![7; SIZE];
    bytes[0] = 8;
    contents.insert(0, &bytes);
    kept.set_options(|options| options.hydrate = true).unwrap();
    house.bases.pin("kept", true, Some(2)).unwrap();
    wait_until_current(&house, "kept", 1);
    let before = kept.options().copies.unwrap();
    house.bases.hydrate("other", None).unwrap();
    until("the hydration", || house.bases.progress(other.id()).filter(|progress| progress.has_ended()));
    let after = kept.options().copies.unwrap();
    assert_ne!(before.number, after.number, "a copy with the spoiled block is a copy of what is cached now");
    assert_eq!(house.bases.progress(other.id()).unwrap().state, State::Done);
}

/// A worker that is killed while blocks are dropped leaves no copy that brings some of them back.
///
/// Guards D102.
#[test]
fn copies_are_copies_of_nothing_before_the_first_block_is_dropped() {
    let house = with_pools(&["one"]);
    let image = house.image("a.img", 7);
    let base = house.add(with_digest("b", &image)).unwrap();
    house.bases.pin("b", true, Some(2)).unwrap();
    let before = base.options().copies.unwrap().number;
    let number = || base.options().copies.unwrap().number;
    let (during, noted) = dropping(&house.store, house.bases.sources(), std::slice::from_ref(&base), number);
    noted.unwrap();
    assert_ne!(during, before);
    assert_eq!(during, number());
}
