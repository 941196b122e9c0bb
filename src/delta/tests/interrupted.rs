//! Results that a caller or a worker must not lose when it is suspended or killed.

use super::super::gate::FlushRounds;
use super::*;

#[test]
fn a_caller_of_a_flush_learns_its_failure_however_late_it_asks() {
    let mut rounds = FlushRounds::default();
    let first = rounds.register();
    assert_eq!(rounds.outcome(first), None);
    // Two callers come while the first flush runs. One of them runs again only after three more flushes have failed.
    let (leader, late) = (rounds.register(), rounds.register());
    assert_eq!(leader, late);
    rounds.finish(first, None);
    assert_eq!(rounds.outcome(leader), None);
    rounds.finish(leader, Some(libc::ENOSPC));
    for _ in 0..3 {
        let next = rounds.register();
        assert_eq!(rounds.outcome(next), None);
        rounds.finish(next, Some(libc::EIO));
    }
    assert_eq!(rounds.outcome(late), Some(Err(libc::ENOSPC)));
    let last = rounds.register();
    assert_eq!(rounds.outcome(last), None);
    rounds.finish(last, None);
}

#[test]
fn map_files_of_flushes_that_failed_are_removed_by_the_one_that_succeeds() {
    let rig = Rig::new();
    let delta = rig.open();
    put(&delta, 3, 7);
    for call in [Call::SyncData, Call::SyncDir, Call::SyncData] {
        rig.fail(call, if call == Call::SyncDir { "deltas" } else { ".map" }, libc::EIO);
        delta.flush().unwrap_err();
    }
    delta.flush().unwrap();
    let files = rig.medium.list("deltas").unwrap();
    let maps: Vec<_> = files.iter().filter(|name| name.ends_with(".map")).collect();
    assert_eq!(maps.len(), 1, "{maps:?}");
    let (_after, delta) = rig.cut(NOTHING);
    assert_eq!(byte(&delta, 3), 7);
}

#[test]
fn a_panic_in_a_growth_leaves_the_size_as_it_was() {
    let rig = Rig::new();
    let delta = rig.open();
    rig.once(Call::SyncData, ".map", Stage::Before, || panic!("the medium panics"));
    let panicked = catch_unwind(AssertUnwindSafe(|| delta.resize(1 << 20, Durability::Now)));
    assert!(panicked.is_err());
    rig.medium.set_hook(None);
    assert_eq!(delta.size(), 65_536);
    delta.flush().unwrap();
    let (_after, delta) = rig.cut(NOTHING);
    assert_eq!(delta.size(), 65_536);
}

/// What the next worker finds when a worker is killed during a sync that fails. The kernel has reported the failure, to a
/// process that is gone.
fn killed_in_a_failing_sync(rig: &Rig, delta: &Delta, name: &'static str) -> Rig {
    let left: Arc<Mutex<Option<SimLive>>> = Arc::default();
    let (live, slot) = (rig.live.clone(), left.clone());
    let hook: Hook = Arc::new(move |event: &Event<'_>| {
        let here = event.call == Call::SyncData && event.name.ends_with(name);
        if here && event.stage == Stage::Before && slot.lock().is_none() {
            *slot.lock() = Some(live.fork()?);
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    });
    let roots = *rig.roots.0.lock();
    rig.medium.set_hook(Some(hook));
    delta.flush().unwrap_err();
    rig.medium.set_hook(None);
    let live = Arc::new(left.lock().take().unwrap());
    let roots = Arc::new(Roots(Mutex::new(roots)));
    Rig { medium: rig.medium.fork(), live, roots, overlap: 0, rises: false }
}

/// What the next worker acknowledges after a worker was killed during a failing sync must be durable.
fn next_flush_after_a_failing_sync(name: &'static str, flushed_before: bool) {
    let rig = Rig::new();
    let delta = rig.open();
    if flushed_before {
        put(&delta, 1, 1);
        delta.flush().unwrap();
    }
    put(&delta, 3, 7);
    let next = killed_in_a_failing_sync(&rig, &delta, name);
    let delta = next.open();
    assert_eq!(byte(&delta, 3), 7);
    delta.flush().unwrap();
    for keep in [NOTHING, ALL] {
        let (_after, delta) = next.cut(keep);
        assert_eq!(byte(&delta, 3), 7, "{name}, flushed before: {flushed_before}");
    }
}

/// Guards D21.
#[test]
fn data_is_written_again_when_a_worker_died_before_it_saw_a_failed_sync() {
    next_flush_after_a_failing_sync(".data", false);
    next_flush_after_a_failing_sync(".data", true);
}

/// Guards D21.
#[test]
fn the_map_file_is_made_durable_when_a_worker_died_before_it_saw_a_failed_sync() {
    next_flush_after_a_failing_sync(".map", true);
    next_flush_after_a_failing_sync(".map", false);
}

/// Guards D21.
#[test]
fn a_kill_during_a_sync_of_the_map_file_costs_its_last_record_and_not_the_whole_map() {
    let rig = Rig::new();
    let delta = rig.open();
    delta.resize(1 << 30, Durability::Flush).unwrap();
    let block = |n: u64| n * 97;
    (0..2000).for_each(|n| put(&delta, block(n), 1));
    delta.flush().unwrap();
    let generation = rig.roots.0.lock().generation;
    // Each worker is killed in its sync, and the sync fails; the flushes of the last one are complete.
    put(&delta, 3, 7);
    let second = killed_in_a_failing_sync(&rig, &delta, ".map");
    let delta = second.open();
    put(&delta, 5, 8);
    let third = killed_in_a_failing_sync(&second, &delta, ".map");
    let delta = third.open();
    let written = Arc::new(AtomicU64::new(0));
    let count = written.clone();
    third.medium.set_hook(Some(Arc::new(move |event: &Event<'_>| {
        if event.call == Call::Write && event.name.ends_with(".map") && event.stage == Stage::After {
            count.fetch_add(1, Ordering::AcqRel);
        }
        Ok(())
    })));
    delta.flush().unwrap();
    put(&delta, 9, 9);
    delta.flush().unwrap();
    third.medium.set_hook(None);
    assert_eq!(third.roots.0.lock().generation, generation, "the map file was written anew");
    let writes = written.load(Ordering::Acquire);
    assert!((2..=5).contains(&writes), "{writes} writes to the map file");
    for keep in [NOTHING, ALL] {
        let (_after, cut) = third.cut(keep);
        assert_eq!([3, 5, 9].map(|block| byte(&cut, block)), [7, 8, 9]);
        (1..2000).for_each(|n| assert_eq!(byte(&cut, block(n)), 1, "block {n}"));
    }
}

/// A kill between a record and its sync leaves a record that is not durable. When the next record is written before the
/// first one is synced, a power cut may leave only the later one, which reads as damage. Guards D98.
#[test]
fn a_record_that_a_killed_worker_did_not_sync_is_durable_before_the_next_one_is_written() {
    let rig = Rig::new();
    let delta = rig.open();
    put(&delta, 1, 1);
    delta.flush().unwrap();
    put(&delta, 3, 7);
    let left: Arc<Mutex<Option<(SimLive, SimMedium)>>> = Arc::default();
    let (live, medium, slot) = (rig.live.clone(), rig.medium.clone(), left.clone());
    let writes = AtomicU64::new(0);
    rig.medium.set_hook(Some(Arc::new(move |event: &Event<'_>| {
        let is_write = event.call == Call::Write && event.name.ends_with(".map");
        // The first write is that of the zeros ahead.
        if is_write && event.stage == Stage::After && writes.fetch_add(1, Ordering::AcqRel) == 1 {
            *slot.lock() = Some((live.fork()?, medium.fork()));
        }
        Ok(())
    })));
    let roots = Arc::new(Roots(Mutex::new(*rig.roots.0.lock())));
    delta.flush().unwrap();
    rig.medium.set_hook(None);
    let (live, medium) = left.lock().take().unwrap();
    let next = Rig { medium, live: Arc::new(live), roots, overlap: 0, rises: false };
    let delta = next.open();
    put(&delta, 5, 8);
    let cuts: Arc<Mutex<Vec<SimMedium>>> = Arc::default();
    let (medium, taken) = (next.medium.clone(), cuts.clone());
    next.medium.set_hook(Some(Arc::new(move |event: &Event<'_>| {
        if event.name.ends_with(".map") && event.stage == Stage::Before {
            let keep = Keep { sectors: 50, lengths: 100, entries: 100, stale: false };
            let cut = |seed| medium.crash(&mut Rng::new(seed), keep);
            taken.lock().extend((0..200).map(cut));
        }
        Ok(())
    })));
    delta.flush().unwrap();
    next.medium.set_hook(None);
    let cuts = std::mem::take(&mut *cuts.lock());
    assert!(cuts.len() >= 400, "{} cuts", cuts.len());
    for medium in cuts {
        let roots = Arc::new(Roots(Mutex::new(*next.roots.0.lock())));
        let after = Rig { medium, live: Arc::default(), roots, overlap: 0, rises: false };
        assert_eq!(byte(&after.open(), 1), 1);
    }
}

#[test]
fn a_lock_of_the_whole_disk_is_granted_under_a_load_of_small_writes() {
    const WRITERS: u64 = 8;
    const ROUNDS: u64 = 200;
    let lock = Arc::new(RangeLock::default());
    let (rounds, had_it) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let write = |n: u64| {
        let (lock, rounds, had_it) = (lock.clone(), rounds.clone(), had_it.clone());
        std::thread::spawn(move || {
            while rounds.fetch_add(1, Ordering::AcqRel) < WRITERS * ROUNDS && !had_it.load(Ordering::Acquire)
            {
                let _range = lock.lock(n, n + 1);
                // As long as a write takes: at each moment some write has not ended.
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        })
    };
    let writers: Vec<_> = (0..WRITERS).map(write).collect();
    while rounds.load(Ordering::Acquire) < 2 * WRITERS {
        std::thread::yield_now();
    }
    let whole = lock.lock(0, u64::MAX);
    let seen = rounds.load(Ordering::Acquire);
    had_it.store(true, Ordering::Release);
    drop(whole);
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    assert!(seen < WRITERS * ROUNDS, "it had to wait until all writers ended");
}

#[test]
fn a_shrink_that_the_next_worker_cannot_complete_at_once_is_completed_later() {
    let rig = Rig { overlap: 65_536, ..Rig::new() };
    let delta = rig.open();
    put(&delta, 2, 2);
    put(&delta, 9, 9);
    delta.flush().unwrap();
    // The state after a worker that died between the overlap and the size.
    delta.set_word(LiveHeader::PendingShrink, 4 * BLOCK + 1);
    delta.set_word(LiveHeader::Overlap, 4 * BLOCK);
    drop(delta);
    // For the zeros ahead, and for the record.
    rig.fail(Call::Write, ".map", libc::ENOSPC);
    rig.fail(Call::Write, ".map", libc::ENOSPC);
    assert!(rig.try_open().is_err());
    let delta = rig.open();
    assert_eq!((delta.size(), delta.overlap()), (4 * BLOCK, 4 * BLOCK));
    delta.resize(65_536, Durability::Now).unwrap();
    assert_eq!([1, 2, 5, 9].map(|block| byte(&delta, block)), [0xba, 2, 0, 0]);
}

#[test]
fn a_record_that_a_dead_worker_did_not_sync_is_durable_before_the_next_one_is_appended() {
    let rig = Rig::new();
    let delta = rig.open();
    delta.resize(64 << 20, Durability::Flush).unwrap();
    put(&delta, 1, 1);
    delta.flush().unwrap();
    // Records that are longer than a sector.
    (0..40).for_each(|n| put(&delta, n * 128, 2));
    // The worker dies between the write of the record and its sync.
    let left: Arc<Mutex<Option<Rig>>> = Arc::default();
    let (medium, live, roots, slot) = (rig.medium.clone(), rig.live.clone(), rig.roots.clone(), left.clone());
    let rises = rig.rises;
    let hook: Hook = Arc::new(move |event: &Event<'_>| {
        if event.call == Call::SyncData && event.name.ends_with(".map") && event.stage == Stage::Before {
            let (medium, live) = (medium.fork(), Arc::new(live.fork().unwrap()));
            // Not noted yet: as if it died one step before.
            let file = live.existing(1).unwrap().unwrap();
            file.header(LiveHeader::Syncing).store(0, Ordering::Release);
            let roots = Arc::new(Roots(Mutex::new(*roots.0.lock())));
            *slot.lock() = Some(Rig { medium, live, roots, overlap: 0, rises });
        }
        Ok(())
    });
    rig.medium.set_hook(Some(hook));
    delta.flush().unwrap();
    rig.medium.set_hook(None);
    let next = left.lock().take().unwrap();
    next.medium.set_hook(None);
    let delta = next.open();
    (0..40).for_each(|n| put(&delta, n * 128 + 64, 3));
    // A power cut in the flush of the next worker: of two records in flight, the later one alone may stay.
    let cuts: Arc<Mutex<Vec<SimMedium>>> = Arc::default();
    let (medium, all) = (next.medium.clone(), cuts.clone());
    let hook: Hook = Arc::new(move |event: &Event<'_>| {
        if event.call == Call::SyncData && event.stage == Stage::Before {
            all.lock().push(medium.fork());
        }
        Ok(())
    });
    next.medium.set_hook(Some(hook));
    delta.flush().unwrap();
    next.medium.set_hook(None);
    for medium in cuts.lock().iter() {
        for seed in 0..200 {
            let keep = Keep { sectors: 50, lengths: 100, entries: 100, stale: false };
            let after = Rig {
                medium: medium.crash(&mut Rng::new(seed), keep),
                live: Arc::default(),
                roots: Arc::new(Roots(Mutex::new(*next.roots.0.lock()))),
                overlap: 0,
                rises: false,
            };
            assert_eq!(byte(&after.open(), 1), 1, "seed {seed}");
        }
    }
}

/// What the next start finds when all processes are killed before the map file is synced, and the live maps are gone.
fn killed_with_its_live_map(rig: &Rig, delta: &Delta) -> Rig {
    let left: Arc<Mutex<Option<SimMedium>>> = Arc::default();
    let (medium, slot) = (rig.medium.clone(), left.clone());
    let roots = *rig.roots.0.lock();
    rig.once(Call::SyncData, ".map", Stage::Before, move || *slot.lock() = Some(medium.fork()));
    delta.flush().unwrap();
    rig.medium.set_hook(None);
    let medium = left.lock().take().unwrap();
    Rig { medium, live: Arc::default(), roots: Arc::new(Roots(Mutex::new(roots))), overlap: 0, rises: false }
}

/// Guards D98.
#[test]
fn a_record_that_only_the_page_cache_has_is_synced_before_a_flush_is_answered() {
    let rig = Rig::new();
    let delta = rig.open();
    put(&delta, 3, 1);
    delta.flush().unwrap();
    put(&delta, 4, 2);
    let rig = killed_with_its_live_map(&rig, &delta);
    let next = rig.open();
    assert_eq!(byte(&next, 4), 2, "a client reads it");
    next.flush().unwrap();
    let (_after, after) = rig.cut(NOTHING);
    assert_eq!(byte(&after, 4), 2);
}

/// Guards D98.
#[test]
fn no_record_is_appended_to_one_that_only_the_page_cache_has() {
    let rig = Rig::new();
    let delta = rig.open();
    put(&delta, 3, 1);
    delta.flush().unwrap();
    put(&delta, 4, 2);
    let rig = killed_with_its_live_map(&rig, &delta);
    let next = rig.open();
    put(&next, 5, 3);
    let cuts: Arc<Mutex<Vec<SimMedium>>> = Arc::default();
    let (medium, log) = (rig.medium.clone(), cuts.clone());
    let hook: Hook = Arc::new(move |event: &Event<'_>| {
        if event.call == Call::SyncData && event.name.ends_with(".map") && event.stage == Stage::Before {
            let part = Keep { sectors: 50, lengths: 50, entries: 0, stale: false };
            log.lock().extend((0..100).map(|seed| medium.crash(&mut Rng::new(seed), part)));
        }
        Ok(())
    });
    rig.medium.set_hook(Some(hook));
    next.flush().unwrap();
    rig.medium.set_hook(None);
    let cuts = std::mem::take(&mut *cuts.lock());
    assert!(!cuts.is_empty());
    for medium in cuts {
        let after = Rig { medium, live: Arc::default(), roots: rig.roots.clone(), overlap: 0, rises: false };
        assert_eq!(byte(&after.try_open().unwrap(), 3), 1);
    }
}
