//! Carried blocks that the data file loses: the medium refuses what the kernel writes by itself, and memory drops it.

use super::carried::{carrying, carrying_on};
use super::*;

const DATA: &str = "deltas/1.data";

/// A delta of which block 9 was carried with `byte`, and is nowhere else but in memory.
fn carried(byte: u8) -> (Rig, Arc<Delta>) {
    let (rig, delta) = carrying();
    put(&delta, 9, byte);
    delta.flush().unwrap();
    assert!(delta.commit.lock().carry.blocks.contains(&9));
    (rig, delta)
}

/// The next flush learns of the failure, the one after it puts back what was lost.
fn flush_after_loss(delta: &Delta) {
    let epoch = delta.error_epoch();
    delta.flush().unwrap_err();
    assert_eq!(delta.error_epoch(), epoch + 1, "handles refuse writes");
    delta.flush().unwrap();
}

/// What block 9 has now and after a power cut.
fn shown(rig: &Rig, delta: &Delta) -> (u8, u8) {
    let (_rig, after) = rig.cut(NOTHING);
    (byte(delta, 9), byte(&after, 9))
}

/// Guards D122.
#[test]
fn a_flush_carries_no_older_bytes_of_a_block_that_the_medium_refused() {
    let (rig, delta) = carried(1);
    put(&delta, 9, 2);
    rig.medium.refuse_write_back(DATA);
    // It shows what was there before the block was carried.
    assert_eq!(byte(&delta, 9), 0);
    flush_after_loss(&delta);
    assert_eq!(shown(&rig, &delta), (1, 1), "no flush had the newer bytes");
}

/// Guards D122.
#[test]
fn what_was_carried_is_put_back_when_the_data_file_has_lost_it() {
    let (rig, delta) = carried(2);
    rig.medium.refuse_write_back(DATA);
    assert_eq!(byte(&delta, 9), 0);
    // Noticed at once, and not only when it is old.
    delta.settle_old().unwrap();
    assert_eq!((shown(&rig, &delta), delta.error_epoch()), ((2, 2), 1));
    // By the sync itself.
    let (rig, delta) = carried(2);
    rig.medium.refuse_write_back(DATA);
    delta.written.note_any();
    flush_after_loss(&delta);
    assert_eq!(shown(&rig, &delta), (2, 2));
}

/// Guards D122.
#[test]
fn what_was_carried_is_put_back_when_memory_drops_it_after_a_failed_sync() {
    for seed in 0..20 {
        let (rig, delta) = carrying_on(SimMedium::new(seed));
        put(&delta, 9, 2);
        delta.flush().unwrap();
        put(&delta, 10, 3);
        delta.written.note_any();
        rig.fail(Call::SyncData, ".data", libc::EIO);
        delta.flush().unwrap_err();
        rig.medium.evict(DATA);
        delta.flush().unwrap();
        assert_eq!(shown(&rig, &delta), (2, 2), "seed {seed}");
    }
}

#[test]
fn what_a_failed_sync_lost_is_written_again_soon_also_when_no_client_flushes() {
    let rig = Rig::new();
    let delta = rig.open();
    put(&delta, 9, 7);
    rig.fail(Call::SyncData, ".data", libc::EIO);
    delta.flush().unwrap_err();
    delta.settle_old().unwrap();
    rig.medium.evict(DATA);
    assert_eq!(shown(&rig, &delta), (7, 7));
    assert!(delta.refuses_writes().is_some(), "until it is opened again");
    assert_eq!(delta.error_epoch(), 1);
}

#[test]
fn newer_bytes_that_memory_still_has_are_not_replaced_by_those_that_were_carried() {
    let (rig, delta) = carried(2);
    put(&delta, 9, 3);
    delta.written.note_any();
    rig.fail(Call::SyncData, ".data", libc::EIO);
    delta.flush().unwrap_err();
    delta.flush().unwrap();
    assert_eq!(shown(&rig, &delta), (3, 3));
    // Also those that are written while the record is.
    let (rig, delta) = carried(2);
    put(&delta, 9, 3);
    let writer = delta.clone();
    rig.once(Call::SyncData, ".map", Stage::Before, move || put(&writer, 9, 4));
    delta.flush().unwrap();
    rig.medium.set_hook(None);
    delta.written.note_any();
    rig.fail(Call::SyncData, ".data", libc::EIO);
    delta.flush().unwrap_err();
    assert_eq!(byte(&delta, 9), 4);
    delta.flush().unwrap();
    assert_eq!(shown(&rig, &delta), (4, 4));
}

#[test]
fn a_block_that_was_discarded_since_is_not_put_back() {
    for written in [false, true] {
        let (rig, delta) = carried(2);
        delta.zero_blocks(9, 10).unwrap();
        if written {
            put(&delta, 9, 4);
        }
        delta.written.note_any();
        rig.medium.refuse_write_back(DATA);
        flush_after_loss(&delta);
        assert_eq!(shown(&rig, &delta), (0, 0), "written: {written}");
    }
    // Discarded while the record that carries it is written.
    let (rig, delta) = carried(2);
    put(&delta, 9, 3);
    let other = delta.clone();
    rig.once(Call::SyncData, ".map", Stage::Before, move || other.zero_blocks(9, 10).unwrap());
    delta.flush().unwrap();
    rig.medium.set_hook(None);
    delta.flush().unwrap();
    put(&delta, 9, 4);
    delta.written.note_any();
    rig.medium.refuse_write_back(DATA);
    flush_after_loss(&delta);
    assert_eq!(shown(&rig, &delta), (0, 0));
}

#[test]
fn what_was_carried_twice_is_put_back_with_its_last_bytes() {
    let (rig, delta) = carried(2);
    put(&delta, 9, 3);
    delta.flush().unwrap();
    rig.medium.refuse_write_back(DATA);
    delta.age_carried();
    flush_after_loss(&delta);
    assert_eq!(shown(&rig, &delta), (3, 3));
    // Nothing is put back once the data file has it.
    put(&delta, 9, 4);
    delta.written.note_any();
    delta.flush().unwrap();
    put(&delta, 9, 5);
    rig.fail(Call::SyncData, ".data", libc::EIO);
    delta.flush().unwrap_err();
    delta.flush().unwrap();
    assert_eq!(byte(&delta, 9), 5);
}

/// Guards D122.
#[test]
fn what_a_start_put_into_the_data_file_is_put_back_too() {
    let (rig, _delta) = carried(2);
    let (rig, delta) = rig.cut(NOTHING);
    rig.medium.refuse_write_back(DATA);
    assert_eq!(byte(&delta, 9), 0, "it was in memory only");
    flush_after_loss(&delta);
    assert_eq!(shown(&rig, &delta), (2, 2));
}

/// Guards D122.
#[test]
fn a_worker_that_takes_over_puts_back_what_the_data_file_has_lost() {
    // With and without a failure that a sync has noticed.
    for noticed in [false, true] {
        let (rig, delta) = carrying();
        delta.resize(64 * BLOCK, Durability::Now).unwrap();
        for (block, byte) in [(9, 2), (40, 3)] {
            put(&delta, block, byte);
            delta.flush().unwrap();
            assert!(delta.commit.lock().carry.blocks.contains(&block));
        }
        // Written since: memory alone has it, and it is acknowledged.
        put(&delta, 40, 4);
        if noticed {
            delta.written.note_any();
            rig.fail(Call::SyncData, ".data", libc::EIO);
            delta.flush().unwrap_err();
        }
        drop(delta);
        let delta = rig.open();
        assert_eq!((byte(&delta, 9), byte(&delta, 40)), (2, 4));
        drop(delta);
        // All processes end, and the filesystem is unmounted, which fails to write.
        rig.medium.refuse_write_back(DATA);
        rig.medium.evict(DATA);
        let delta = rig.open();
        assert_eq!(byte(&delta, 9), 2);
        let _failed = delta.flush();
        delta.flush().unwrap();
        assert_eq!(shown(&rig, &delta), (2, 2), "noticed: {noticed}");
    }
}

#[test]
fn a_start_without_space_for_what_was_carried_fails_and_a_later_one_has_it() {
    let (rig, delta) = carried(2);
    put(&delta, 10, 3);
    delta.flush().unwrap();
    let medium = rig.medium.crash(&mut Rng::new(7), NOTHING);
    let next = Rig { medium, live: Arc::default(), roots: rig.roots.clone(), overlap: 0, rises: false };
    for placed in [0, 1, 0] {
        // The space ends after so many blocks.
        let name = ".data".to_owned();
        next.medium.plan(Fault { call: Call::Write, name, skip: placed, times: 1, errno: libc::ENOSPC });
        let error = next.try_open().err().unwrap();
        assert!(error.is_full(), "{error}");
        assert!(next.live.existing(1).unwrap().is_none(), "no live map claims what is not there");
        // The power fails again, with any of the blocks in the data file.
        for keep in [NOTHING, ALL] {
            let (_rig, after) = next.cut(keep);
            assert_eq!((byte(&after, 9), byte(&after, 10)), (2, 3));
        }
    }
    let delta = next.open();
    assert_eq!((byte(&delta, 9), byte(&delta, 10)), (2, 3));
    put(&delta, 9, 5);
    delta.flush().unwrap();
    for keep in [NOTHING, ALL] {
        let (_rig, after) = next.cut(keep);
        assert_eq!((byte(&after, 9), byte(&after, 10)), (5, 3));
    }
}
