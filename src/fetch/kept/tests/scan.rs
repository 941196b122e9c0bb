//! Blocks that an earlier worker left are used before they are indexed.

use std::thread;
use std::time::Instant;

use super::*;
use crate::format::cache::{
    Ages, CacheHeader, HEADER_AREA, SLOT, SLOT_BLOCKS, decode_slot, encode_slot, slot_place,
};
use crate::io::{HostMedium, MediumFile, Open};

const SIZE: u64 = 700 * CACHE_BLOCK - 7;

fn filled() -> SimMedium {
    let medium = SimMedium::new(1);
    let cache = open(&medium);
    let source = cache.attach(key(1), SIZE);
    put(&source, 0, 300);
    put(&source, 500, 200);
    cache.flush().unwrap();
    medium
}

/// A cache as a serving worker has it at first: no source is indexed.
fn prepare(medium: impl Medium + 'static, limits: Limits) -> (Arc<DiskCache>, Arc<Observed>) {
    let observed = Arc::new(Observed::default());
    let cache = DiskCache::prepare(Arc::new(medium), limits, observed.clone(), OnDamage::Drop);
    cache.load_first();
    (cache, observed)
}

fn scan(cache: &DiskCache) {
    while cache.scan_step() {}
    assert!(cache.stats().indexed);
}

fn sums(medium: &dyn Medium) -> Arc<dyn MediumFile> {
    medium.open(&format!("{DIR}/{}.sums", key(1)), Open::Existing).unwrap()
}

/// Guards D52.
/// Regression: a worker that took over while the cache's disk hung served no disk. Guards D62.
#[test]
fn until_names_and_headers_are_read_only_blocking_calls_wait_and_nothing_is_written() {
    let medium = filled();
    let before = medium.files();
    let observed = Arc::new(Observed::default());
    let cache = DiskCache::prepare(Arc::new(medium.clone()), ROOM, observed, OnDamage::Drop);
    let source = cache.attach(key(1), SIZE);
    let contents = cache.contents(FileKeys { own: key(1), digest: None, size: SIZE });
    assert_eq!((contents.is_complete_now(Reach::Any), contents.is_verified_now()), (None, None));
    let mut buf = vec![0; BLOCK];
    assert_eq!((source.contains_now(290), source.read_sound_now(290, 1, &mut buf, None)), (None, None));
    assert!(!source.is_known());
    put(&source, 400, 1);
    cache.tick_once(true);
    assert_eq!(medium.files(), before);
    let reader = {
        let source = source.clone();
        std::thread::spawn(move || get(&source, 290, 5))
    };
    cache.load_first();
    assert_eq!(reader.join().unwrap(), 5);
    assert_eq!(source.contains_now(290), Some(true));
    scan(&cache);
    assert_eq!(
        (contents.is_complete_now(Reach::Any), contents.is_verified_now()),
        (Some(false), Some(false))
    );
}

#[test]
fn cached_blocks_are_read_before_the_scan() {
    let medium = filled();
    let (cache, _) = prepare(medium.clone(), ROOM);
    let source = cache.attach(key(1), SIZE);
    assert!(!cache.stats().indexed && !source.is_known());
    assert_eq!((get(&source, 290, 20), get(&source, 699, 1), get(&source, 400, 5)), (10, 1, 0));
    assert!(source.contains(500) && !source.contains(499) && !source.is_complete());
    assert_eq!((source.missing_run(300, 1000), source.present_run(0, 1000)), (200, 300));
    // Blocks that are inserted before the scan are neither lost nor counted twice.
    put(&source, 300, 1);
    put(&source, 0, 700);
    assert_eq!(cache.stats().insertions, 200, "present blocks are not written again");
    scan(&cache);
    assert!(source.is_known() && source.is_complete());
    assert_eq!((get(&source, 0, 700), cache.stats().used_bytes), (700, SIZE));
    assert_eq!(cache.stats().corrupt_blocks, 0);
}

#[test]
fn an_eviction_before_the_scan_evicts_all_blocks() {
    let medium = filled();
    let (cache, observed) = prepare(medium.clone(), ROOM);
    let source = cache.attach(key(1), SIZE);
    assert!(source.evict(EvictReason::Asked) > 0);
    assert_eq!((get(&source, 0, 1), cache.stats().used_bytes), (0, 0));
    put(&source, 5, 1);
    scan(&cache);
    assert_eq!(
        (get(&source, 5, 1), source.cached_bytes(), cache.stats().used_bytes),
        (1, CACHE_BLOCK, CACHE_BLOCK)
    );
    assert!(observed.evicted_bytes(EvictReason::Space) == 0);
}

/// Guards D52.
#[test]
fn before_the_scan_the_bound_holds_and_nothing_is_evicted_to_make_room() {
    let medium = filled();
    let limits = Limits { bytes: Some(500 * CACHE_BLOCK), ..ROOM };
    let (cache, observed) = prepare(medium, limits);
    let (old, new) = (cache.attach(key(1), SIZE), cache.attach(key(2), SIZE));
    assert!(cache.stats().used_bytes <= 500 * CACHE_BLOCK);
    put(&new, 0, 100);
    let used = cache.stats().used_bytes;
    assert!(used <= 500 * CACHE_BLOCK, "{used}");
    assert_eq!(
        (observed.evicted_bytes(EvictReason::Space), observed.degradations().len()),
        (0, 0),
        "full, and no failure"
    );
    old.evict(EvictReason::Asked);
    put(&old, 0, 250);
    put(&new, 0, 100);
    scan(&cache);
    // Blocks that were inserted before the scan are not the oldest.
    put(&new, 100, 300);
    assert!(observed.evicted_bytes(EvictReason::Space) > 0 && cache.stats().used_bytes <= 500 * CACHE_BLOCK);
    assert!(get(&new, 350, 50) == 50);
}

/// Writes a sums file as version 0.1.0 did: slots in the order in which their chunks came.
fn as_of_0_1_0(medium: &dyn Medium) {
    let file = sums(medium);
    let slots = file.len().unwrap().saturating_sub(HEADER_AREA) / SLOT;
    let mut all = Vec::new();
    for slot in 0..slots as u32 {
        let mut bytes = vec![0; SLOT as usize];
        file.read_at(&mut bytes, slot_place(slot)).unwrap();
        let slot = decode_slot(&key(1).0, slot, &bytes).unwrap();
        all.extend(slot.chunk.map(|chunk| (chunk, slot.ages.unwrap(), slot.sums)));
    }
    file.set_len(HEADER_AREA).unwrap();
    for (slot, (chunk, ages, sums)) in (0..).zip(all.into_iter().rev()) {
        file.write_at(&encode_slot(&key(1).0, slot, chunk, &ages, &sums), slot_place(slot)).unwrap();
    }
    for sequence in [50, 51] {
        let header = CacheHeader {
            sequence,
            key: key(1).0,
            size: SIZE,
            pinned: false,
            verified: false,
            contents: None,
            direct: false,
        };
        file.write_at(&header.encode(), CacheHeader::place(sequence)).unwrap();
    }
    file.sync_data().unwrap();
}

#[test]
fn a_file_of_version_0_1_0_is_read_and_put_in_order() {
    let medium = filled();
    as_of_0_1_0(&medium);
    let (cache, _) = prepare(medium.clone(), ROOM);
    let source = cache.attach(key(1), SIZE);
    // A reader waits for the scan, and misses nothing.
    let reader = {
        let source = source.clone();
        thread::spawn(move || get(&source, 0, 300))
    };
    scan(&cache);
    assert_eq!(reader.join().unwrap(), 300);
    assert_eq!((get(&source, 500, 200), cache.stats().used_bytes), (200, 500 * CACHE_BLOCK - 7));
    put(&source, 300, 10);
    assert_eq!(get(&source, 0, 310), 310);
    cache.flush().unwrap();
    drop((source, cache));
    assert_eq!(check(&medium, Checksums::Compare, Repair::No).unwrap(), []);
    let (cache, _) = prepare(medium, ROOM);
    let source = cache.attach(key(1), SIZE);
    assert!(!source.is_known());
    assert_eq!(
        (get(&source, 0, 310), get(&source, 500, 200)),
        (310, 200),
        "the file is in order, so no read waits for a scan"
    );
}

#[test]
fn a_power_cut_while_slots_are_put_in_order_loses_nothing() {
    use crate::io::sim::{Call, Keep, Stage};
    let medium = filled();
    as_of_0_1_0(&medium);
    let cuts: Arc<Mutex<Vec<SimMedium>>> = Arc::default();
    let (now, into, rng) = (medium.clone(), cuts.clone(), Mutex::new(Rng::new(3)));
    medium.set_hook(Some(Arc::new(move |event| {
        let of_interest = matches!(event.call, Call::Write | Call::Rename | Call::SyncData | Call::SyncDir);
        if of_interest && event.name.contains("sums") | event.name.ends_with(DIR) {
            let mut rng = rng.lock();
            if event.stage == Stage::After || rng.chance(20) {
                let keep = Keep::any(&mut rng);
                into.lock().push(now.crash(&mut rng, keep));
            }
        }
        Ok(())
    })));
    let (cache, _) = prepare(medium.clone(), ROOM);
    scan(&cache);
    medium.set_hook(None);
    let cuts = std::mem::take(&mut *cuts.lock());
    assert!(cuts.len() > 10, "{}", cuts.len());
    for (n, medium) in cuts.into_iter().enumerate() {
        let cache = open(&medium);
        let source = cache.attach(key(1), SIZE);
        assert_eq!((get(&source, 0, 300), get(&source, 500, 200)), (300, 200), "cut {n}");
    }
}

#[test]
fn unreadable_sums_keep_no_reader_waiting() {
    use crate::io::sim::{Call, Fault};
    for older in [true, false] {
        let medium = filled();
        if older {
            as_of_0_1_0(&medium);
        }
        let (cache, _) = prepare(medium.clone(), ROOM);
        let source = cache.attach(key(1), SIZE);
        let fault = Fault { call: Call::Read, name: ".sums".into(), skip: 0, times: 3, errno: libc::EIO };
        medium.plan(fault);
        while cache.scan_step() {}
        assert_eq!(get(&source, 0, 1), 0, "the read misses and does not wait");
        put(&source, 0, 1);
        assert_eq!((cache.stats().insertions, cache.stats().unreadable.len()), (0, 1));
        for _ in 0..80 {
            cache.tick();
        }
        assert_eq!((get(&source, 0, 300), get(&source, 500, 200)), (300, 200));
        assert_eq!(cache.stats().unreadable, [""; 0]);
    }
}

/// A source with an index of 64 GiB. Only one of its chunks has bytes.
/// Guards D52.
#[test]
fn serving_does_not_wait_for_a_large_index() {
    let chunks = std::env::var("PLYFS_TEST_CHUNKS").map_or(65_536, |n| n.parse().unwrap());
    let size = chunks * SLOT_BLOCKS * CACHE_BLOCK;
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let host = || HostMedium::new(dir.path()).unwrap();
    let room = Limits { bytes: Some(u64::MAX / 4), ..ROOM };
    let last = chunks * SLOT_BLOCKS - 64;
    {
        let (cache, _) = open_with(host(), room);
        let source = cache.attach(key(1), size);
        source.insert(last, &vec![7; 64 * BLOCK]);
        cache.flush().unwrap();
    }
    let file = sums(&host());
    let ages = Ages { base: 1, ages: [3; SLOT_BLOCKS as usize] };
    for first in (0..chunks - 1).step_by(1024) {
        let to = (first + 1024).min(chunks - 1);
        let slots: Vec<u8> = (first..to)
            .flat_map(|chunk| encode_slot(&key(1).0, chunk as u32, chunk, &ages, &[5; SLOT_BLOCKS as usize]))
            .collect();
        file.write_at(&slots, slot_place(first as u32)).unwrap();
    }
    let began = Instant::now();
    let (cache, _) = prepare(host(), room);
    let source = cache.attach(key(1), size);
    let mut buf = vec![0; 64 * BLOCK];
    assert_eq!(source.read(last, &mut buf), 64);
    let served = began.elapsed();
    assert!(buf.iter().all(|byte| *byte == 7));
    let began = Instant::now();
    let mut steps = Vec::new();
    loop {
        let step = Instant::now();
        let more = cache.scan_step();
        steps.push(step.elapsed());
        if !more {
            break;
        }
    }
    let scanned = began.elapsed();
    eprintln!(
        "{chunks} chunks: served after {served:?}, indexed after {scanned:?}, longest step {:?}",
        steps.iter().max()
    );
    assert_eq!((source.is_known(), source.cached_bytes()), (true, size));
    assert!(served * 4 < scanned, "{served:?} of {scanned:?}");
}
