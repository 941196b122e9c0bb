//! An unreadable source does not count as damaged.

use super::*;
use crate::format::cache::{CacheHeader, HEADER_AREA};
use crate::io::sim::{Call, Fault};
use crate::io::{HostMedium, Open};

const SIZE: u64 = 66 * CACHE_BLOCK - 7;

fn filled(pinned: bool) -> SimMedium {
    let medium = SimMedium::new(1);
    let cache = open(&medium);
    let source = cache.attach(key(1), SIZE);
    put(&source, 0, 66);
    source.pin(pinned);
    cache.flush().unwrap();
    medium
}

fn fault(call: Call, name: &str, times: u64, errno: i32) -> Fault {
    Fault { call, name: name.into(), skip: 0, times, errno }
}

/// Guards D50.
#[test]
fn an_error_at_load_drops_nothing_and_the_load_is_retried() {
    for (call, name, errno) in [
        (Call::Open, ".sums", libc::EMFILE),
        (Call::Open, ".blocks", libc::EMFILE),
        (Call::Open, ".sums", libc::EACCES),
        (Call::Read, ".sums", libc::EIO),
        (Call::Read, ".sums", libc::ENOMEM),
    ] {
        for pinned in [true, false] {
            let medium = filled(pinned);
            let before = medium.files();
            medium.plan(fault(call, name, 2, errno));
            let (cache, _) = open_with(medium.clone(), ROOM);
            let source = cache.attach(key(1), SIZE);
            assert_eq!(medium.files(), before, "{call:?} {errno}");
            assert!(cache.stats().unreadable.len() == 1, "{call:?} {errno}: the status names it");
            // Until then, no call writes over its files.
            source.insert(0, &vec![0xee; SIZE as usize]);
            source.pin(true);
            cache.flush().unwrap();
            assert_eq!(get(&source, 0, 66), 0);
            for _ in 0..20 {
                cache.tick();
            }
            assert_eq!((get(&source, 0, 66), source.is_pinned()), (66, true), "{call:?} {errno}");
            assert_eq!(cache.stats().unreadable, [""; 0]);
        }
    }
}

/// Guards D50.
#[test]
fn an_unreadable_block_of_a_pinned_source_is_not_dropped() {
    let medium = filled(true);
    let cache = open(&medium);
    let source = cache.attach(key(1), SIZE);
    medium.plan(fault(Call::Read, ".blocks", 3, libc::EIO));
    assert_eq!(get(&source, 0, 1), 0);
    assert!(
        !source.contains(0) && !source.is_complete(),
        "the block counts as missing, so that it can be fetched"
    );
    assert_eq!(get(&source, 1, 65), 65);
    for _ in 0..8 {
        cache.tick();
        get(&source, 0, 1);
    }
    assert_eq!((get(&source, 0, 66), cache.stats().used_bytes), (66, SIZE), "the block is tried again");
    // A new copy replaces it at once.
    medium.plan(fault(Call::Read, ".blocks", 2, libc::EIO));
    assert_eq!(get(&source, 0, 1), 0);
    put(&source, 0, 1);
    assert_eq!((get(&source, 0, 66), cache.stats().used_bytes), (66, SIZE));
}

#[test]
fn a_damaged_header_of_a_needed_source_costs_no_block() {
    let medium = filled(true);
    let sums = medium.open(&format!("{DIR}/{}.sums", key(1)), Open::Existing).unwrap();
    sums.write_at(&[0xff; HEADER_AREA as usize], 0).unwrap();
    let observed = Arc::new(Observed::default());
    let open = || {
        let cache = DiskCache::prepare(Arc::new(medium.clone()), ROOM, observed.clone(), OnDamage::Keep);
        cache.load_first();
        cache
    };
    let cache = open();
    cache.tick();
    put(&cache.attach(key(1), SIZE), 0, 1);
    assert_eq!(medium.files().len(), 2, "both files stay until a decision");
    drop(cache);
    let cache = open();
    cache.settle_damaged(&[(key(1), SIZE)]);
    while cache.scan_step() {}
    let source = cache.attach(key(1), SIZE);
    assert_eq!((get(&source, 0, 66), source.is_verified(), source.is_pinned()), (66, false, true));
    drop((source, cache));
    // A source without a base is removed. (Its file was written anew, with its slots in order.)
    let sums = medium.open(&format!("{DIR}/{}.sums", key(1)), Open::Existing).unwrap();
    let header = CacheHeader {
        sequence: 2,
        key: [7; 32],
        size: 1,
        pinned: true,
        verified: false,
        contents: None,
        direct: false,
    };
    sums.write_at(&header.encode(), 0).unwrap();
    sums.write_at(&[0; 200], 2048).unwrap();
    open().settle_damaged(&[(key(2), SIZE)]);
    assert!(medium.files().is_empty());
}

/// Guards D51.
#[test]
fn the_number_of_descriptors_does_not_grow_with_the_number_of_sources() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (cache, _) = open_with(HostMedium::new(dir.path()).unwrap(), ROOM);
    let most = cache.shared.open.most();
    let number = |n: u64| {
        let mut key = SourceKey([3; 32]);
        key.0[..8].copy_from_slice(&n.to_le_bytes());
        key
    };
    let count = most as u64 * 2 + 3;
    for n in 0..count {
        cache.attach(number(n), SIZE).insert(0, &vec![n as u8; BLOCK]);
        assert!(cache.shared.open.count() <= most);
    }
    cache.flush().unwrap();
    drop(cache);
    let (cache, _) = open_with(HostMedium::new(dir.path()).unwrap(), ROOM);
    for n in (0..count).rev() {
        let mut buf = vec![0xee; BLOCK];
        assert_eq!((cache.attach(number(n), SIZE).read(0, &mut buf), buf[5]), (1, n as u8));
        assert!(cache.shared.open.count() <= most);
    }
    for _ in 0..130 {
        cache.tick();
    }
    assert_eq!(cache.shared.open.count(), 0, "files without a user are closed");
    let mut buf = vec![0xee; BLOCK];
    assert_eq!(cache.attach(number(0), SIZE).read(0, &mut buf), 1);
}
