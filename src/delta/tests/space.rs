//! The space of a delta within a quota (D84).

use super::*;
use crate::limits::Quota;

fn quota_of(limit: Option<u64>) -> Arc<Quota> {
    let quota = Arc::<Quota>::default();
    quota.set_limit(limit);
    quota
}

fn errno(result: Result<(), DeltaError>) -> Option<i32> {
    match result {
        Ok(()) => None,
        Err(DeltaError::Io { source, .. }) => source.raw_os_error(),
        Err(error) => panic!("{error}"),
    }
}

fn try_put(delta: &Delta, block: u64, blocks: usize) -> Option<i32> {
    errno(delta.write(block * BLOCK, &vec![9; blocks * BLOCK as usize], &Edges::default()))
}

/// Guards D84.
#[test]
fn a_write_beyond_the_quota_changes_nothing_and_what_is_there_can_be_overwritten() {
    let rig = Rig::new();
    let (delta, quota) = (rig.open(), quota_of(Some(4 * BLOCK)));
    delta.charge_to(&quota);
    (0..3).for_each(|block| put(&delta, block, 1));
    assert_eq!(try_put(&delta, 2, 3), Some(libc::ENOSPC), "one block too many");
    assert_eq!((0..6).map(|block| byte(&delta, block)).collect::<Vec<_>>(), [1, 1, 1, 0, 0, 0]);
    assert_eq!(quota.used(), 3 * BLOCK, "what a refused write asked for is not counted");
    assert_eq!(try_put(&delta, 1, 3), None, "two of them are there");
    assert_eq!(try_put(&delta, 0, 4), None);
    assert_eq!(try_put(&delta, 4, 1), Some(libc::ENOSPC));
    delta.zero_blocks(1, 3).unwrap();
    assert_eq!(quota.used(), 2 * BLOCK);
    assert_eq!(try_put(&delta, 7, 2), None, "after a discard there is room");
    assert_eq!(try_put(&delta, 10, 1), Some(libc::ENOSPC));
    quota.set_limit(Some(5 * BLOCK));
    assert_eq!(try_put(&delta, 10, 1), None, "after the quota was raised, too");
    quota.set_limit(Some(BLOCK));
    assert_eq!(try_put(&delta, 10, 1), None, "a quota below the use refuses new blocks only");
    assert_eq!(try_put(&delta, 11, 1), Some(libc::ENOSPC));
    delta.resize(2 * BLOCK, Durability::Now).unwrap();
    assert_eq!(quota.used(), BLOCK);
    delta.resize(16 * BLOCK, Durability::Now).unwrap();
    quota.set_limit(None);
    assert_eq!(try_put(&delta, 0, 16), None);
}

#[test]
fn a_delta_is_counted_when_its_disk_gets_a_quota() {
    let rig = Rig::new();
    let (delta, quota) = (rig.open(), quota_of(None));
    delta.charge_to(&quota);
    (0..5).for_each(|block| put(&delta, block * 3, 1));
    assert_eq!(quota.used(), 0, "without a quota nothing is counted");
    quota.set_limit(Some(6 * BLOCK));
    assert_eq!(try_put(&delta, 1, 1), None);
    assert_eq!(try_put(&delta, 2, 1), Some(libc::ENOSPC));
    assert_eq!(quota.used(), 6 * BLOCK);
    // The next worker counts what this one left.
    let again = quota_of(Some(6 * BLOCK));
    let next = rig.open();
    next.charge_to(&again);
    assert_eq!(again.used(), 6 * BLOCK);
    drop(delta);
    assert_eq!(quota.used(), 0, "a delta that is closed is not counted any more");
}

#[test]
fn a_write_that_fails_gives_its_room_back() {
    let rig = Rig::new();
    let (delta, quota) = (rig.open(), quota_of(Some(8 * BLOCK)));
    delta.charge_to(&quota);
    for errno in [libc::EIO, libc::ENOSPC] {
        rig.fail(Call::Write, ".data", errno);
        assert_eq!(try_put(&delta, 0, 8), Some(errno));
        assert_eq!(quota.used(), 0);
    }
    assert_eq!(try_put(&delta, 0, 8), None);
}

#[test]
fn the_zeros_of_a_discard_may_take_a_little_beyond_the_quota() {
    let rig = Rig { overlap: 65_536, ..Rig::new() };
    let (delta, quota) = (rig.open(), quota_of(Some(BLOCK)));
    delta.charge_to(&quota);
    put(&delta, 0, 1);
    let edges = |space| Edges { head: Some(vec![0xba; BLOCK as usize].into()), tail: None, space };
    let partial = |space| errno(delta.write(4 * BLOCK + 5, &[0; 10], &edges(space)));
    assert_eq!(partial(WriteSpace::Free), Some(libc::ENOSPC));
    assert_eq!(partial(WriteSpace::Reserved), None);
    assert_eq!(quota.used(), 2 * BLOCK);
}

#[test]
fn a_reservation_must_fit_into_the_quota() {
    let rig = Rig::new();
    let (delta, quota) = (rig.open(), quota_of(Some(4 * BLOCK)));
    delta.charge_to(&quota);
    put(&delta, 0, 1);
    assert_eq!(errno(delta.allocate(0, 5 * BLOCK)), Some(libc::ENOSPC));
    assert_eq!(errno(delta.allocate(0, 4 * BLOCK)), None);
    assert_eq!(errno(delta.allocate(8 * BLOCK, 4 * BLOCK)), Some(libc::ENOSPC), "what is reserved counts");
    assert_eq!(quota.used(), BLOCK);
}

#[test]
fn blocks_with_data_are_counted_in_any_range() {
    let rig = Rig::new();
    let delta = rig.open();
    delta.resize(1 << 40, Durability::Now).unwrap();
    let mut random = Rng::new(5);
    let far = 20_000_000;
    let mut blocks = std::collections::BTreeSet::new();
    for _ in 0..60 {
        let block = random.below(200) + if random.below(2) == 0 { 0 } else { far };
        put(&delta, block, 1);
        blocks.insert(block);
    }
    for _ in 0..200 {
        let first = random.below(250) + if random.below(2) == 0 { 0 } else { far };
        let end = first + random.below(120) + if random.below(4) == 0 { far } else { 0 };
        let wanted = blocks.range(first..end.max(first)).count() as u64;
        assert_eq!(delta.map.count_data(first, end), wanted, "{first}..{end}");
    }
    assert_eq!(delta.map.count_data(0, u64::MAX), blocks.len() as u64);
}
