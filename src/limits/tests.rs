//! The buckets and queues with a clock that the tests set.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;
use crate::format::limits::Rates;

const MS: i64 = 1_000_000;
const SECOND: i64 = 1000 * MS;

/// A request that waits, and notes that its turn came.
#[derive(Default)]
struct Request {
    came: Arc<AtomicBool>,
    over: Arc<AtomicBool>,
}

impl Turn for Request {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    fn come(self: Arc<Self>) {
        self.came.store(true, Ordering::Relaxed);
    }
}

fn limits(iops: Rates, bandwidth: Rates, burst_ms: u32) -> Limits {
    Limits { quota: None, iops, bandwidth, burst_ms: Some(burst_ms) }
}

fn of_all(rate: u64) -> Rates {
    Rates { all: Some(rate), ..Rates::default() }
}

fn pace(limits: &Limits) -> Pace {
    let pace = Pace::default();
    pace.set(limits, 0);
    pace
}

/// Has a request wait or pass at a time. Returns whether it passed.
fn enter(pace: &Pace, cost: Cost, now: i64) -> bool {
    pace.enter(cost, || now, || Some(Arc::<Request>::default())) == Entered::Passes
}

/// Runs the pace as its thread does until a time, and counts the turns.
fn turns_until(pace: &Pace, mut at: Option<i64>, end: i64) -> usize {
    let mut turns = 0;
    while let Some(now) = at.filter(|at| *at <= end) {
        let (ready, next) = pace.run_due(at, now);
        turns += ready.len();
        at = next;
    }
    turns
}

#[test]
fn a_disk_without_limits_asks_no_clock() {
    let pace = Pace::default();
    assert!(!pace.is_limited());
    assert!(pace.passes(Cost::Read(1 << 40), || panic!("no clock is needed")));
    assert!(!Limiter::of(&Limits::default()).quota().is_set());
}

#[test]
fn the_burst_passes_at_once_and_the_rest_at_the_rate() {
    let pace = pace(&limits(of_all(100), Rates::default(), 500));
    let mut passed = 0;
    let mut due = None;
    for _ in 0..300 {
        let turn = || Some(Arc::<Request>::default() as Arc<dyn Turn>);
        match pace.enter(Cost::Read(4096), || 0, turn) {
            Entered::Passes => passed += 1,
            Entered::Waits(at) => due = due.or(at),
        }
    }
    // Half a second of 100 a second, and the one that puts the bucket in debt.
    assert_eq!(passed, 51);
    assert_eq!(pace.waiting(), 249);
    assert_eq!(turns_until(&pace, due, SECOND), 100);
    assert_eq!(pace.waiting(), 149);
}

#[test]
fn a_request_that_is_larger_than_the_burst_passes_and_later_ones_pay_for_it() {
    let pace = pace(&limits(Rates::default(), of_all(1 << 20), 1));
    assert!(pace.passes(Cost::Write(8 << 20), || 0));
    assert!(!pace.passes(Cost::Write(1), || 7 * SECOND));
    assert!(pace.passes(Cost::Write(1), || 8 * SECOND));
}

#[test]
fn a_limit_of_writes_delays_no_read_and_one_of_all_delays_both() {
    let write = Rates { write: Some(1), ..Rates::default() };
    let only_writes = pace(&limits(write, Rates::default(), 1));
    assert!(enter(&only_writes, Cost::Write(0), 0));
    assert!(!enter(&only_writes, Cost::Write(0), 0));
    assert!((0..100).all(|_| enter(&only_writes, Cost::Read(1 << 20), 0)));
    let all = pace(&limits(of_all(1), Rates::default(), 1));
    assert!(enter(&all, Cost::Write(0), 0));
    assert!(!enter(&all, Cost::Read(0), 0));
}

#[test]
fn each_limit_that_is_set_holds() {
    let iops = Rates { all: Some(10), read: Some(1000), ..Rates::default() };
    let pace = pace(&limits(iops, Rates { read: Some(1 << 20), ..Rates::default() }, 1));
    // By bytes one a second, by requests ten.
    assert!(pace.passes(Cost::Read(1 << 20), || 0));
    assert!(!pace.passes(Cost::Read(1 << 20), || SECOND / 2));
    assert!(pace.passes(Cost::Read(0), || SECOND / 2), "a request without bytes takes no bandwidth");
    assert!(pace.passes(Cost::Write(1 << 30), || SECOND), "the bandwidth of writes is not limited");
}

#[test]
fn no_request_overtakes_one_that_waits() {
    let pace = pace(&limits(Rates::default(), of_all(1000), 1));
    assert!(enter(&pace, Cost::Write(1000), 0));
    assert!(!enter(&pace, Cost::Write(1000), 0));
    assert!(!pace.passes(Cost::Write(0), || 0), "also one that takes nothing");
}

#[test]
fn a_reader_that_always_comes_first_does_not_starve_writes() {
    let pace = pace(&limits(of_all(10), Rates::default(), 1));
    assert!(enter(&pace, Cost::Read(0), 0));
    assert!(!enter(&pace, Cost::Write(0), 0));
    // The bucket is paid for, and the thread has not looked yet.
    assert!(!pace.passes(Cost::Read(0), || SECOND / 10));
    assert!(!enter(&pace, Cost::Read(0), SECOND / 10));
    let (ready, _) = pace.run_due(None, SECOND / 10);
    assert_eq!(ready.len(), 1);
    let left = pace.state().queues.each_ref().map(std::collections::VecDeque::len);
    assert!(left == [1, 0] || left == [0, 1], "{left:?}");
}

#[test]
fn reads_and_writes_that_wait_take_turns() {
    let pace = pace(&limits(of_all(10), Rates::default(), 1));
    assert!(enter(&pace, Cost::Write(0), 0));
    let mut due = None;
    for _ in 0..10 {
        for cost in [Cost::Write(0), Cost::Read(0)] {
            let turn = || Some(Arc::<Request>::default() as Arc<dyn Turn>);
            match pace.enter(cost, || 0, turn) {
                Entered::Waits(at) => due = due.or(at),
                Entered::Passes => panic!("the bucket is in debt"),
            }
        }
    }
    assert_eq!(turns_until(&pace, due, SECOND), 10);
    let state = pace.state();
    let left: Vec<usize> = state.queues.iter().map(std::collections::VecDeque::len).collect();
    assert_eq!(left, [5, 5]);
}

#[test]
fn a_request_that_was_given_up_takes_no_tokens() {
    let pace = pace(&limits(of_all(1), Rates::default(), 1));
    assert!(enter(&pace, Cost::Read(0), 0));
    let over = Arc::new(AtomicBool::new(false));
    let mut due = None;
    for _ in 0..100 {
        let request = Request { over: over.clone(), ..Request::default() };
        if let Entered::Waits(at) = pace.enter(Cost::Read(0), || 0, || Some(Arc::new(request))) {
            due = due.or(at);
        }
    }
    assert!(!enter(&pace, Cost::Read(0), 0));
    over.store(true, Ordering::Relaxed);
    assert_eq!(pace.waiting(), 1);
    assert_eq!(turns_until(&pace, due, SECOND), 1, "the last one is the first one now");
    assert_eq!(pace.waiting(), 0);
}

#[test]
fn a_request_without_a_place_to_wait_passes_in_debt() {
    let pace = pace(&limits(of_all(1), Rates::default(), 1));
    assert!(enter(&pace, Cost::Read(0), 0));
    for _ in 0..3 {
        assert_eq!(pace.enter(Cost::Read(0), || 0, || None), Entered::Passes);
    }
    assert_eq!(pace.surplus(), 3);
    assert!(!pace.passes(Cost::Read(0), || 3 * SECOND));
    assert!(pace.passes(Cost::Read(0), || 4 * SECOND));
}

#[test]
fn requests_that_wait_go_by_new_limits_at_once() {
    let slow = limits(of_all(1), Rates::default(), 1);
    let pace = pace(&slow);
    let passed = (0..100).filter(|_| enter(&pace, Cost::Write(1 << 20), 0)).count();
    assert_eq!((passed, pace.waiting()), (1, 99));
    pace.set(&limits(of_all(10), Rates::default(), 1), 0);
    let (ready, due) = pace.run_due(None, 0);
    assert!(ready.is_empty(), "the debt of one request stays");
    assert_eq!(turns_until(&pace, due, SECOND), 10);
    pace.set(&Limits::default(), SECOND);
    assert!(!pace.is_limited());
    let (ready, due) = pace.run_due(None, SECOND);
    assert_eq!((ready.len(), due), (89, None));
    ready.into_iter().for_each(|turn| turn.come());
}

#[test]
fn a_plan_that_another_one_replaced_does_nothing() {
    let pace = pace(&limits(of_all(1), Rates::default(), 1));
    assert!(enter(&pace, Cost::Write(0), 0) && !enter(&pace, Cost::Write(0), 0));
    let due = pace.state().due;
    assert!(pace.run_due(Some(5), 5).1.is_none());
    assert_eq!(pace.run_due(due, 2 * SECOND).0.len(), 1);
}

/// Guards D84.
#[test]
fn requests_that_run_together_never_take_more_than_the_quota() {
    let quota = Quota::default();
    quota.set_limit(Some(1000));
    quota.set_below(100);
    let taken = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let count = (0..1000).filter(|_| quota.take(7, 0)).count() as u64;
                taken.fetch_add(7 * count, Ordering::Relaxed);
            });
        }
    });
    assert_eq!(taken.load(Ordering::Relaxed), 900 / 7 * 7);
    assert_eq!(quota.used(), 100 + 900 / 7 * 7);
    assert!(quota.is_reached() && refusals() > 0);
    assert!(quota.take(7, 10), "what is beyond was asked for");
    quota.give(20);
    assert!(!quota.is_reached(), "there is room for what was refused");
}

#[test]
fn a_quota_below_the_use_refuses_until_the_use_is_below_it() {
    let quota = Quota::default();
    quota.add(500);
    quota.set_limit(Some(100));
    assert!(!quota.take(1, 0));
    quota.give(450);
    assert!(quota.take(50, 0) && !quota.take(1, 0));
    quota.set_limit(None);
    assert!(quota.take(1 << 60, 0) && !quota.is_reached());
}
