//! Failing storage: any call fails at any time. The cache never fails a caller, never returns wrong bytes, reports the
//! failure once, and recovers.

use super::*;
use crate::io::Open;
use crate::io::sim::{Call, Fault, Keep};

const SIZE: u64 = 200 * CACHE_BLOCK - 9;
const ALL: [Call; 9] = [
    Call::Open,
    Call::Create,
    Call::Read,
    Call::Write,
    Call::SyncData,
    Call::SetLen,
    Call::Punch,
    Call::Remove,
    Call::SyncDir,
];

fn fault(call: Call, name: &str, skip: u64, times: u64, errno: i32) -> Fault {
    Fault { call, name: name.into(), skip, times, errno }
}

/// Makes random calls of all kinds on a cache that has blocks.
fn work(cache: &Arc<DiskCache>, rng: &mut Rng) {
    for _ in 0..25 {
        let n = rng.below(3) as u8;
        let source = cache.attach(key(n), SIZE);
        let first = rng.below(source.blocks());
        let some = (1 + rng.below(20)).min(source.blocks() - first);
        match rng.below(20) {
            0..9 => put(&source, first, some),
            9..14 => {
                get(&source, first, some);
            }
            14 => {
                source.evict(EvictReason::Asked);
            }
            15 => cache.remove(&key(n)),
            16 => source.pin(rng.chance(30)),
            17 => source.set_verified(true),
            18 => cache.tick(),
            _ => {
                let _ = cache.flush();
            }
        }
    }
}

#[test]
fn any_call_may_fail_at_any_time() {
    let limits = Limits { bytes: Some(70 * CACHE_BLOCK), bases: Some(2), free_floor: 0 };
    let mut hit = 0;
    for call in ALL {
        for errno in [libc::EIO, libc::ENOSPC] {
            for skip in 0..6 {
                let mut rng = Rng::new(skip * 100 + errno as u64);
                let medium = SimMedium::new(skip);
                let (cache, observed) = open_with(medium.clone(), limits);
                put(&cache.attach(key(0), SIZE), 0, 50);
                medium.plan(fault(call, DIR, skip * skip, 1 + rng.below(4), errno));
                work(&cache, &mut rng);
                let again = open_with(medium.clone(), limits).0;
                work(&again, &mut rng);
                for stats in [cache.stats(), again.stats()] {
                    hit += stats.write_errors + stats.read_errors;
                }
                let reports = observed.degradations();
                assert!(
                    reports.windows(2).all(|w| w[0].is_some() != w[1].is_some()),
                    "each failure and each recovery is reported once: {reports:?}"
                );
                // Without faults everything works again, and every block found is right.
                medium.forget_faults();
                for _ in 0..140 {
                    again.tick();
                }
                (0..3).for_each(|n| again.remove(&key(n)));
                let source = again.attach(key(1), SIZE);
                put(&source, 0, 70);
                assert_eq!(get(&source, 0, 70), 70, "{call:?} {errno} {skip}: {:?}", again.stats());
                assert_eq!(again.stats().degraded, None);
                assert_eq!(again.stats().used_bytes, 70 * CACHE_BLOCK, "{call:?} {errno} {skip}");
                again.flush().unwrap();
                drop((source, again));
                let last = open_with(medium, limits).0;
                assert_eq!(get(&last.attach(key(1), SIZE), 0, 70), 70, "{call:?} {errno} {skip}");
            }
        }
    }
    assert!(hit > 30, "{hit} faults are too few");
}

/// Guards D35.
#[test]
fn a_full_filesystem_is_reported_once_and_partial_writes_are_punched_out() {
    let medium = SimMedium::new(1);
    let (cache, observed) = open_with(medium.clone(), ROOM);
    let source = cache.attach(key(1), SIZE);
    put(&source, 0, 10);
    medium.plan(fault(Call::Write, ".blocks", 0, u64::MAX, libc::ENOSPC));
    for block in 10..200 {
        put(&source, block, 1);
        if block % 10 == 0 {
            cache.tick();
        }
    }
    let errors = cache.stats().write_errors;
    assert!((2..8).contains(&errors), "{errors}: the cache retries, but rarely");
    assert_eq!(observed.degradations().len(), 1);
    assert!(observed.degradations()[0].as_ref().unwrap().contains("No space left"));
    assert_eq!((get(&source, 0, 11), cache.stats().used_bytes), (10, 10 * CACHE_BLOCK));
    let file = medium.open(&format!("{DIR}/{}.blocks", key(1)), Open::Existing).unwrap();
    assert_eq!(file.allocated().unwrap(), 10 * CACHE_BLOCK);
    medium.forget_faults();
    for _ in 0..70 {
        cache.tick();
    }
    put(&source, 10, 1);
    assert_eq!((get(&source, 0, 11), observed.degradations().len(), cache.stats().degraded), (11, 2, None));
}

#[test]
fn one_bad_sector_costs_one_block() {
    let medium = SimMedium::new(1);
    let (cache, observed) = open_with(medium.clone(), ROOM);
    let source = cache.attach(key(1), SIZE);
    put(&source, 0, 8);
    // The read of all fails, and then those of blocks 0 to 2 succeed.
    medium.plan(fault(Call::Read, ".blocks", 0, 1, libc::EIO));
    medium.plan(fault(Call::Read, ".blocks", 3, 1, libc::EIO));
    assert_eq!(get(&source, 0, 8), 3);
    assert_eq!((cache.stats().read_errors, cache.stats().corrupt_blocks), (1, 0));
    assert_eq!(observed.evicted_bytes(EvictReason::ReadError), CACHE_BLOCK);
    assert_eq!(get(&source, 4, 4), 4);
    put(&source, 3, 1);
    assert_eq!(get(&source, 0, 8), 8);
    medium.plan(fault(Call::Read, ".sums", 0, 1, libc::EIO));
    assert_eq!(get(&source, 0, 8), 8, "tried again");
}

#[test]
fn while_the_directory_is_unusable_nothing_is_cached() {
    let medium = SimMedium::new(1);
    put(&open(&medium).attach(key(1), SIZE), 0, 5);
    medium.plan(fault(Call::MakeDir, DIR, 0, 3, libc::EACCES));
    let (cache, observed) = open_with(medium.clone(), ROOM);
    let source = cache.attach(key(1), SIZE);
    put(&source, 5, 5);
    source.pin(true);
    assert_eq!((get(&source, 0, 5), observed.degradations().len()), (0, 1));
    assert!(observed.degradations()[0].as_ref().unwrap().contains("Permission denied"));
    for _ in 0..20 {
        cache.tick();
    }
    assert_eq!((get(&source, 0, 10), observed.degradations().len()), (5, 2), "the earlier blocks are found");
    put(&source, 5, 5);
    assert_eq!(get(&source, 0, 10), 10);
}

#[test]
fn a_file_in_place_of_the_directory_is_reported_and_does_no_harm() {
    let medium = SimMedium::new(1);
    medium.open(DIR, Open::Create).unwrap();
    let (cache, observed) = open_with(medium.clone(), ROOM);
    let source = cache.attach(key(1), SIZE);
    put(&source, 0, 5);
    cache.tick();
    assert_eq!((get(&source, 0, 5), observed.degradations().len()), (0, 1));
    cache.flush().unwrap();
}

/// Guards D35.
#[test]
fn storage_that_fails_and_works_in_turn_is_retried_ever_more_rarely() {
    let medium = SimMedium::new(1);
    let (cache, observed) = open_with(medium.clone(), ROOM);
    let source = cache.attach(key(1), SIZE);
    // Writes work, but syncs never do.
    medium.plan(fault(Call::SyncData, DIR, 0, u64::MAX, libc::EIO));
    for tick in 0..1000 {
        put(&source, tick % 190, 1);
        if tick % 190 == 189 {
            source.evict(EvictReason::Asked);
        }
        cache.tick();
    }
    let reports = observed.degradations().len();
    assert!((4..60).contains(&reports), "{reports} reports in 1000 ticks");
}

#[test]
fn a_source_whose_header_cannot_be_written_takes_no_blocks() {
    let medium = SimMedium::new(1);
    let size = 4 * CACHE_BLOCK;
    let cache = open(&medium);
    let source = cache.attach(key(1), size);
    put(&source, 0, 4);
    source.set_verified(true);
    medium.plan(fault(Call::Write, ".sums", 0, 3, libc::EIO));
    // The note "verified" cannot be cleared on disk.
    source.evict(EvictReason::Asked);
    drop((source, cache));
    medium.forget_faults();
    let source = open(&medium).attach(key(1), size);
    assert!(!source.is_verified());
    put(&source, 0, 4);
    assert!(!source.is_verified());
}

/// A power cut that keeps only synced data.
fn cut(medium: &SimMedium) -> SimMedium {
    medium.crash(&mut Rng::new(1), Keep { sectors: 0, lengths: 0, entries: 0, stale: false })
}

/// After a failed fsync(2) the page cache still shows data that may not be on disk, to the next worker too, and the next
/// fsync succeeds. Regression: a base whose hydration succeeded at the second attempt lost blocks at a power cut.
/// Guards D53.
#[test]
fn blocks_that_a_failed_sync_may_have_lost_are_written_again_before_the_next_sync() {
    for (suffix, skip) in [("blocks", 0), ("sums", 0), ("sums", 1), ("sums", 2)] {
        for (restarts_before, restarts_after) in [(false, false), (false, true), (true, false), (true, true)]
        {
            let what = format!("{suffix} {skip} {restarts_before} {restarts_after}");
            let medium = SimMedium::new(1);
            let mut cache = open(&medium);
            let mut source = cache.attach(key(1), 130 * CACHE_BLOCK);
            source.pin(true);
            put(&source, 0, 130);
            if restarts_before {
                // As after a kill: nothing was synced.
                drop((source, cache));
                cache = open(&medium);
                source = cache.attach(key(1), 130 * CACHE_BLOCK);
                source.pin(true);
            }
            medium.plan(fault(Call::SyncData, suffix, skip, 1, libc::EIO));
            let failed = cache.flush().is_err();
            medium.forget_faults();
            // The file may have fewer syncs than `skip`.
            assert!(failed || skip > 0, "{what}");
            if restarts_after {
                drop((source, cache));
                cache = open(&medium);
                source = cache.attach(key(1), 130 * CACHE_BLOCK);
            }
            cache.flush().unwrap();
            let before = readable(&source);
            assert_eq!(before.len(), 130, "{what}");
            let after = open(&cut(&medium));
            assert_eq!(readable(&after.attach(key(1), 130 * CACHE_BLOCK)), before, "{what}");
            assert!(after.attach(key(1), 130 * CACHE_BLOCK).is_pinned(), "{what}");
            assert_eq!(check(&medium, Checksums::Compare, Repair::No).unwrap(), [], "{what}");
        }
    }
}

/// Regression: a header whose second copy could not be written stayed, and the check of a stopped store found damage.
#[test]
fn files_that_cannot_be_created_whole_do_not_stay() {
    for call in [Call::Create, Call::SetLen, Call::Write] {
        for skip in 0..3 {
            let medium = SimMedium::new(skip);
            let cache = open(&medium);
            medium.plan(fault(call, DIR, skip, 1, libc::ENOSPC));
            put(&cache.attach(key(1), SIZE), 0, 5);
            medium.forget_faults();
            cache.tick();
            cache.flush().unwrap();
            drop(cache);
            let found = check(&medium, Checksums::Compare, Repair::No).unwrap();
            assert_eq!(found, [], "{call:?} {skip}");
        }
    }
}
