//! Flushes that carry blocks in the map file.

use super::*;
use crate::format::layout::map_path;

/// A delta whose map file may carry blocks: it was flushed a few times.
pub(super) fn carrying() -> (Rig, Arc<Delta>) {
    carrying_on(SimMedium::new(1))
}

pub(super) fn carrying_on(medium: SimMedium) -> (Rig, Arc<Delta>) {
    let rig = Rig::on(medium);
    let delta = rig.open();
    for n in 0..6 {
        put(&delta, n, 1);
        delta.flush().unwrap();
    }
    assert!(delta.commit.lock().carry.allowed);
    // Settled: what follows is carried by itself.
    delta.written.note_any();
    delta.flush().unwrap();
    (rig, delta)
}

/// The files that `act` syncs, by the ends of their names.
fn synced(rig: &Rig, act: impl FnOnce()) -> Vec<String> {
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let noted = seen.clone();
    let hook: Hook = Arc::new(move |event: &Event<'_>| {
        if matches!(event.call, Call::SyncData | Call::SyncDir) && event.stage == Stage::After {
            noted.lock().push(event.name.rsplit('.').next().unwrap_or_default().to_owned());
        }
        Ok(())
    });
    rig.medium.set_hook(Some(hook));
    act();
    rig.medium.set_hook(None);
    let seen = seen.lock();
    seen.clone()
}

/// Guards D97.
#[test]
fn a_flush_of_a_few_blocks_waits_for_one_sync_and_survives_a_power_cut() {
    let (rig, delta) = carrying();
    put(&delta, 9, 2);
    put(&delta, 3, 3);
    assert_eq!(synced(&rig, || delta.flush().unwrap()), ["map"]);
    for keep in [NOTHING, ALL] {
        let (_rig, after) = rig.cut(keep);
        assert_eq!((byte(&after, 9), byte(&after, 3), byte(&after, 0)), (2, 3, 1));
    }
    // The next one as well, and one of nothing syncs nothing.
    put(&delta, 10, 4);
    assert_eq!(synced(&rig, || delta.flush().unwrap()), ["map"]);
    assert_eq!(synced(&rig, || delta.flush().unwrap()), [""; 0]);
    let (_rig, after) = rig.cut(NOTHING);
    assert_eq!((byte(&after, 9), byte(&after, 10)), (2, 4));
}

/// Guards D96.
#[test]
fn bytes_that_a_sync_made_durable_are_not_replaced_by_older_ones_that_were_carried() {
    let (rig, delta) = carrying();
    put(&delta, 9, 2);
    delta.flush().unwrap();
    // More than a record carries, among them the block that was carried.
    delta.write(8 * BLOCK, &[3; 8 * BLOCK as usize], &Edges::default()).unwrap();
    delta.write(0, &[3; 8 * BLOCK as usize], &Edges::default()).unwrap();
    delta.written.note_any();
    assert_eq!(synced(&rig, || delta.flush().unwrap()), ["data", "map"]);
    let (_rig, after) = rig.cut(NOTHING);
    assert_eq!((byte(&after, 9), byte(&after, 0), byte(&after, 15)), (3, 3, 3));
    // Without changed words as well.
    put(&delta, 9, 4);
    put(&delta, 9, 5);
    let commits = delta.commit.lock().carry.blocks.len();
    assert_eq!(commits, 0, "settled");
    assert_eq!(synced(&rig, || delta.flush().unwrap()), ["data"], "each block is written once");
    let (_rig, after) = rig.cut(NOTHING);
    assert_eq!(byte(&after, 9), 5);
}

#[test]
fn blocks_that_are_overwritten_again_and_again_are_soon_synced_in_place() {
    let (rig, delta) = carrying();
    put(&delta, 9, 1);
    delta.flush().unwrap();
    let mut syncs = Vec::new();
    for n in 2..20 {
        put(&delta, 9, n);
        syncs.push(synced(&rig, || delta.flush().unwrap()));
        let (_rig, after) = rig.cut(NOTHING);
        assert_eq!(byte(&after, 9), n);
    }
    assert_eq!(syncs.iter().filter(|files| files.len() == 2).count(), 1, "{syncs:?}");
    assert_eq!(syncs.last().unwrap(), &["data"]);
}

#[test]
fn a_carried_block_that_was_discarded_stays_zeros_after_a_power_cut() {
    let (rig, delta) = carrying();
    put(&delta, 9, 2);
    delta.flush().unwrap();
    delta.zero_blocks(9, 10).unwrap();
    delta.flush().unwrap();
    for keep in [NOTHING, ALL] {
        let (_rig, after) = rig.cut(keep);
        assert_eq!(byte(&after, 9), 0);
    }
}

#[test]
fn what_was_carried_is_written_again_after_a_failed_sync_of_the_data_file() {
    let (rig, delta) = carrying();
    put(&delta, 9, 2);
    delta.flush().unwrap();
    put(&delta, 10, 3);
    delta.written.note_any();
    rig.fail(Call::SyncData, ".data", libc::EIO);
    delta.flush().unwrap_err();
    // Its bytes may be in no file but the map file, until this.
    delta.flush().unwrap();
    assert!(delta.commit.lock().carry.blocks.is_empty());
    let (_rig, after) = rig.cut(NOTHING);
    assert_eq!((byte(&after, 9), byte(&after, 10)), (2, 3));
}

#[test]
fn a_closed_delta_and_a_layer_carry_nothing_and_an_earlier_version_can_read_them() {
    for close in [true, false] {
        let (rig, delta) = carrying();
        put(&delta, 9, 2);
        delta.flush().unwrap();
        put(&delta, 10, 2);
        if close {
            delta.close().unwrap();
        } else {
            delta.seal().unwrap();
        }
        let root = delta.commit.lock().root;
        let map = rig.medium.open(&map_path(1, root.generation), Open::Existing).unwrap();
        let mut features = [0xff; 8];
        map.read_at(&mut features, 12).unwrap();
        assert_eq!(features, [0; 8], "incompatible features, close: {close}");
        let (_rig, after) = rig.cut(NOTHING);
        assert_eq!((byte(&after, 9), byte(&after, 10)), (2, 2));
    }
}

#[test]
fn a_worker_that_takes_over_does_not_know_what_was_written_and_syncs_the_data_file() {
    let (rig, delta) = carrying();
    put(&delta, 9, 2);
    delta.flush().unwrap();
    put(&delta, 9, 3);
    drop(delta);
    let next = rig.open();
    assert_eq!(byte(&next, 9), 3);
    assert_eq!(
        synced(&rig, || next.flush().unwrap()),
        ["data", "deltas", "map", "map"],
        "its last record, then a new one"
    );
    let (_rig, after) = rig.cut(NOTHING);
    assert_eq!(byte(&after, 9), 3);
}

#[test]
fn a_flush_that_could_carry_only_a_part_syncs_the_data_file() {
    // A block that is written meanwhile.
    let (rig, delta) = carrying();
    put(&delta, 9, 2);
    let held = delta.ranges.lock(9, 10);
    assert_eq!(synced(&rig, || delta.flush().unwrap()), ["data", "map"]);
    drop(held);
    // A block that looks like a record.
    let (rig, delta) = carrying();
    let mut block = [7; BLOCK as usize];
    block[8..12].copy_from_slice(b"PLYJ");
    delta.write(9 * BLOCK, &block, &Edges::default()).unwrap();
    assert_eq!(synced(&rig, || delta.flush().unwrap()), ["data", "map"]);
    // The last block of the disk, of which only a part is on the disk.
    let (rig, delta) = carrying();
    delta.resize(15 * BLOCK + 100, Durability::Now).unwrap();
    delta.write(15 * BLOCK, &[5; 100], &Edges::default()).unwrap();
    let files = synced(&rig, || delta.flush().unwrap());
    assert!(files.contains(&"data".to_owned()), "{files:?}");
    let (_rig, after) = rig.cut(NOTHING);
    let mut end = [0; 100];
    after.read(&mut end, 15 * BLOCK).unwrap();
    assert_eq!(end, [5; 100]);
}

#[test]
fn a_flush_that_fails_to_append_what_it_carries_loses_nothing() {
    for (call, errno) in [(Call::Write, libc::ENOSPC), (Call::Write, libc::EIO), (Call::SyncData, libc::EIO)]
    {
        let (rig, delta) = carrying();
        put(&delta, 9, 2);
        rig.fail(call, ".map", errno);
        let failed = delta.flush();
        // Without space the data file is synced instead, or the flush fails and can be sent again.
        if failed.is_err() {
            delta.flush().unwrap();
        }
        let (_rig, after) = rig.cut(NOTHING);
        assert_eq!(byte(&after, 9), 2, "{call:?} {errno}");
    }
}

#[test]
fn a_map_file_full_of_carried_blocks_is_replaced() {
    let (rig, delta) = carrying();
    let before = delta.commit.lock().root.generation;
    let mut largest = 0;
    for n in 0..2000u64 {
        let blocks = n % 8;
        for block in 0..=blocks {
            put(&delta, block, n as u8);
        }
        // A changed word makes it a flush that carries.
        delta.zero_blocks(15, 16).unwrap();
        put(&delta, 15, n as u8);
        delta.zero_blocks(14, 14 + n % 2).unwrap();
        put(&delta, 14, n as u8);
        delta.flush().unwrap();
        largest = largest.max(delta.commit.lock().allocated());
    }
    assert!(delta.commit.lock().root.generation > before);
    assert!(largest < 6 << 20, "{largest}");
    let (_rig, after) = rig.cut(NOTHING);
    assert_eq!(byte(&after, 0), 1999u64 as u8);
}

/// Guards D97. No flush is in the middle of this: a writer that found the notes overflowed, and did not note its blocks,
/// was synced by the flush that emptied them.
#[test]
fn a_writer_that_notes_nothing_is_synced_by_the_flush_that_runs_at_the_same_moment() {
    const ROUNDS: u64 = 2_000_000;
    let (written, turn) = (WrittenBlocks::unknown(), AtomicU64::new(0));
    // In another line of the processor's cache.
    let unsynced = Box::new(AtomicBool::new(false));
    let (written, unsynced, turn) = (&written, &*unsynced, &turn);
    let until = |value: u64| {
        while turn.load(Ordering::Acquire) < value {
            std::hint::spin_loop();
        }
    };
    let lost = std::thread::scope(|scope| {
        let stop = ROUNDS * 3;
        scope.spawn(move || {
            for round in 0.. {
                until(round * 3 + 1);
                if turn.load(Ordering::Acquire) >= stop {
                    return;
                }
                (0..round % 16).for_each(|_| std::hint::spin_loop());
                // As a write does between its bytes and its words.
                unsynced.store(true, Ordering::Release);
                written.note(1, 2);
                turn.fetch_add(1, Ordering::AcqRel);
            }
        });
        let begun = std::time::Instant::now();
        for round in 0..ROUNDS {
            written.note_any();
            unsynced.store(false, Ordering::Release);
            turn.fetch_add(1, Ordering::AcqRel);
            (0..round / 16 % 16).for_each(|_| std::hint::spin_loop());
            // As a flush does after it took the words.
            assert_eq!(written.take(), None);
            let syncs = unsynced.swap(false, Ordering::AcqRel);
            until(round * 3 + 2);
            if !syncs && written.take() == Some(Vec::new()) {
                turn.store(stop + 1, Ordering::Release);
                return Some(round);
            }
            turn.fetch_add(1, Ordering::AcqRel);
            if begun.elapsed().as_secs() >= 20 {
                break;
            }
        }
        turn.store(stop + 1, Ordering::Release);
        None
    });
    assert_eq!(lost, None, "the next flush would carry the word, and its bytes are not synced");
}

#[test]
fn a_medium_without_space_for_another_map_file_keeps_no_delta_from_being_closed_or_sealed() {
    for close in [true, false] {
        let (rig, delta) = carrying();
        put(&delta, 9, 2);
        delta.flush().unwrap();
        put(&delta, 10, 3);
        let next = format!("1.{}.map", delta.commit.lock().last_started + 1);
        rig.medium.plan(Fault {
            call: Call::Write,
            name: next,
            skip: 0,
            times: u64::MAX,
            errno: libc::ENOSPC,
        });
        if close {
            delta.close().unwrap();
        } else {
            delta.seal().unwrap();
        }
        // Nothing is carried any more: what reads a layer looks at its data file alone.
        let commit = delta.commit.lock();
        assert!(commit.carry.blocks.is_empty() && commit.root.generation + 1 == commit.last_started);
        drop(commit);
        let (_rig, after) = rig.cut(NOTHING);
        assert!(after.commit.lock().carry.blocks.is_empty());
        assert_eq!((byte(&after, 9), byte(&after, 10)), (2, 3));
    }
}

#[test]
fn a_flush_that_carries_words_alone_does_not_keep_later_ones_from_carrying() {
    let (rig, delta) = carrying();
    delta.zero_blocks(5, 6).unwrap();
    delta.flush().unwrap();
    assert!(delta.commit.lock().carry.blocks.is_empty());
    delta.age_carried();
    put(&delta, 9, 2);
    assert_eq!(synced(&rig, || delta.flush().unwrap()), ["map"]);
    // What was carried is old at last.
    delta.age_carried();
    assert_eq!(synced(&rig, || delta.settle_old().unwrap()), ["data", "map"]);
    assert_eq!(synced(&rig, || delta.settle_old().unwrap()), [""; 0]);
}

#[test]
fn a_delta_whose_flushes_could_carry_nothing_keeps_its_map_file() {
    let rig = Rig::new();
    let delta = rig.open();
    delta.resize(32 * BLOCK, Durability::Now).unwrap();
    for n in 1..10 {
        delta.write(0, &[n; 17 * BLOCK as usize], &Edges::default()).unwrap();
        delta.flush().unwrap();
        delta.flush().unwrap();
    }
    let commit = delta.commit.lock();
    assert!(!commit.carry.allowed && commit.root.generation == 1, "generation {}", commit.root.generation);
}

#[test]
fn a_large_map_is_not_written_anew_for_a_few_blocks_that_were_carried() {
    const WORDS: u64 = 700;
    const FLUSHES: u64 = 60;
    let _small = crate::mutant::simulate(None);
    let rig = Rig::new();
    let delta = rig.open();
    delta.resize(WORDS * 32 * BLOCK, Durability::Now).unwrap();
    (0..WORDS).for_each(|word| put(&delta, word * 32, 1));
    for _ in 0..4 {
        put(&delta, 1, 1);
        delta.flush().unwrap();
    }
    let (base_len, before) = {
        let commit = delta.commit.lock();
        assert!(commit.carry.allowed && commit.base_len > 32 << 10, "{}", commit.base_len);
        (commit.base_len, commit.root.generation)
    };
    for n in 0..FLUSHES {
        delta.zero_blocks(2, 3).unwrap();
        put(&delta, 2, n as u8 | 1);
        delta.flush().unwrap();
    }
    let written = (delta.commit.lock().root.generation - before) * base_len;
    assert!(written <= FLUSHES * BLOCK, "{written} bytes of maps for {FLUSHES} blocks");
    let (_rig, after) = rig.cut(NOTHING);
    assert_eq!(byte(&after, 2), (FLUSHES - 1) as u8 | 1);
}
