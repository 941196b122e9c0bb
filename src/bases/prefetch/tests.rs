use std::cell::RefCell;
use std::collections::HashMap;

use super::{Completion, GIVE_UP, Player, Range, TRIES, UNDER_WAY, drive};
use crate::format::trace::{Origin, Trace, TraceEntry};

const SIZE: u64 = 1 << 30;

fn player(ranges: u64) -> Player {
    let entries = (0..ranges).map(|n| TraceEntry { first: n * 1000, blocks: 200, at_ms: 0 }).collect();
    let trace = Trace { base: "b".into(), size: SIZE, origin: Origin::Unknown, recorded_ns: 0, entries };
    Player::new(&trace, SIZE)
}

/// A completion that is complete.
fn now() -> Completion {
    Completion::new().1
}

#[test]
fn every_range_is_fetched_until_it_is_complete() {
    let asked = RefCell::new(HashMap::new());
    let ask = |range: &Range<u64>| {
        let mut asked = asked.borrow_mut();
        let times = asked.entry(range.start).or_insert(0u32);
        *times += 1;
        // Every second range needs its table first; every third is complete already.
        let wanted = match range.start / 4096 / 1000 % 6 {
            0 | 3 => 0,
            n if n % 2 == 0 => 2,
            _ => 1,
        };
        Ok::<_, ()>((*times <= wanted).then(now))
    };
    assert_eq!(drive(player(60), ask), Ok(0));
    assert_eq!(asked.borrow().len(), 60);
    assert!(asked.borrow().values().all(|times| *times <= 3));
}

#[test]
fn a_dead_server_ends_the_playing() {
    let asked = RefCell::new(0);
    let ask = |_: &Range<u64>| {
        *asked.borrow_mut() += 1;
        Ok::<_, ()>(Some(now()))
    };
    assert_eq!(drive(player(200), ask), Ok(GIVE_UP));
    assert!(*asked.borrow() <= 32 + GIVE_UP * (TRIES + 1), "{}", asked.borrow());
    assert_eq!(drive(player(3), |_: &Range<u64>| Err("changed")), Err("changed"));
}

#[test]
fn the_bytes_under_way_are_bounded() {
    let open = RefCell::new(Vec::new());
    let most = RefCell::new(0);
    let ask = |range: &Range<u64>| {
        let mut open = open.borrow_mut();
        if let Some(at) = open.iter().position(|start| *start == range.start) {
            open.remove(at);
            return Ok::<_, ()>(None);
        }
        open.push(range.start);
        most.replace_with(|most| (*most).max(open.len() as u64));
        Ok(Some(now()))
    };
    assert_eq!(drive(player(100), ask), Ok(0));
    let bytes = *most.borrow() * 200 * 4096;
    assert!((UNDER_WAY..UNDER_WAY + (1 << 20)).contains(&bytes), "{bytes}");
}
