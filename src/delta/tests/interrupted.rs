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

/// A worker is killed during a sync that fails. The kernel has reported the failure, to a process that is gone. What
/// the next worker acknowledges must be durable.
fn killed_in_a_failing_sync(name: &'static str, flushed_before: bool) {
    let rig = Rig::new();
    let delta = rig.open();
    if flushed_before {
        put(&delta, 1, 1);
        delta.flush().unwrap();
    }
    put(&delta, 3, 7);
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
    let next = Rig {
        medium: rig.medium.fork(),
        live,
        roots: Arc::new(Roots(Mutex::new(roots))),
        overlap: 0,
        rises: false,
    };
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
    killed_in_a_failing_sync(".data", false);
    killed_in_a_failing_sync(".data", true);
}

/// Guards D21.
#[test]
fn the_map_file_is_rewritten_when_a_worker_died_before_it_saw_a_failed_sync() {
    killed_in_a_failing_sync(".map", true);
    killed_in_a_failing_sync(".map", false);
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
