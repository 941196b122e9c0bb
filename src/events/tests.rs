use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::{Duration, Instant};

use super::{Delivery, Event, Events, Kind, LISTENERS, Listener, QUEUE, RECENT, Reason, Total};

#[derive(Default)]
struct WakeCount(AtomicUsize);

impl Wake for WakeCount {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// What a listener receives without waiting, and whether the bus has ended.
fn receive(listener: &mut Listener) -> (Vec<Delivery>, bool) {
    let mut out = Vec::new();
    loop {
        match listener.poll_next(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Some(delivery)) => out.push(delivery),
            Poll::Ready(None) => return (out, true),
            Poll::Pending => return (out, false),
        }
    }
}

fn numbers(deliveries: &[Delivery]) -> Vec<u64> {
    let number = |delivery: &Delivery| match delivery {
        Delivery::Event(record) => Some(record.number),
        Delivery::Lost(_) => None,
    };
    deliveries.iter().filter_map(number).collect()
}

fn error(text: &str) -> Event {
    Event::of_base(Kind::BaseError, "b").because(text.to_owned())
}

#[test]
fn a_listener_receives_later_events_in_order() {
    let events = Events::new();
    events.emit(error("before"));
    let mut one = events.listen(None).expect("room");
    events.emit(error("first"));
    let mut two = events.listen(Some(0)).expect("room");
    events.emit(error("second"));
    assert_eq!(numbers(&receive(&mut one).0), [2, 3]);
    assert_eq!(numbers(&receive(&mut two).0), [1, 2, 3]);
    assert_eq!(events.state().listeners, 2);
    drop(one);
    assert_eq!(events.state().listeners, 1);
    events.emit(error("third"));
    let (received, end) = receive(&mut two);
    assert_eq!((numbers(&received), end), (vec![4], false));
    let Delivery::Event(record) = &received[0] else { panic!("{received:?}") };
    assert_eq!(record.event.reason.as_deref(), Some("third"));
    assert!(record.at_ns > 1_700_000_000_000_000_000);
}

#[test]
fn a_listener_that_waits_is_woken_once_for_each_wait() {
    let events = Events::new();
    let mut listener = events.listen(None).expect("room");
    let wakes = Arc::new(WakeCount::default());
    let waker = Waker::from(wakes.clone());
    let mut context = Context::from_waker(&waker);
    assert!(listener.poll_next(&mut context).is_pending());
    events.emit(error("a"));
    events.emit(error("b"));
    assert_eq!(wakes.0.load(Ordering::SeqCst), 1);
    assert!(listener.poll_next(&mut context).is_ready());
    assert!(listener.poll_next(&mut context).is_ready());
    assert!(listener.poll_next(&mut context).is_pending());
    events.close();
    assert_eq!(wakes.0.load(Ordering::SeqCst), 2);
    assert_eq!(listener.poll_next(&mut context), Poll::Ready(None));
}

/// Guards D23.
#[test]
fn a_slow_listener_loses_the_oldest_events_and_learns_how_many() {
    let events = Events::new();
    let mut slow = events.listen(None).expect("room");
    let all = QUEUE as u64 + 7;
    for _ in 0..all {
        events.emit(error("x"));
    }
    let (received, _) = receive(&mut slow);
    assert_eq!(received[0], Delivery::Lost(7));
    assert_eq!(numbers(&received), (8..=all).collect::<Vec<_>>());
    assert_eq!(events.state().lost, 7);
    // The loss is reported once.
    events.emit(error("y"));
    assert_eq!(numbers(&receive(&mut slow).0), [all + 1]);
}

#[test]
fn traffic_does_not_displace_other_recent_events() {
    let events = Events::new();
    events.emit(Event::of_base(Kind::BaseChanged, "b"));
    for _ in 0..3 * RECENT {
        events.emit(Event::of_base(Kind::BaseHit, "b").bytes(1));
    }
    let recent = events.recent(0);
    assert_eq!(recent.len(), RECENT + 1);
    assert_eq!(recent[0].event.kind, Kind::BaseChanged);
    assert!(recent.is_sorted_by_key(|record| record.number));
    assert_eq!(events.recent(recent[RECENT - 1].number).len(), 1);
    // A listener's queue holds all recent events.
    const { assert!(QUEUE >= 2 * RECENT) };
}

#[test]
fn a_listener_receives_earlier_events_before_the_end() {
    let events = Events::new();
    let mut listener = events.listen(None).expect("room");
    events.emit(error("last"));
    events.close();
    let (received, end) = receive(&mut listener);
    assert_eq!((numbers(&received), end), (vec![1], true));
    let (received, end) = receive(&mut events.listen(Some(0)).expect("room"));
    assert_eq!((numbers(&received), end), (vec![1], true));
}

/// Regression: what was counted since the last tick was lost at the end.
#[test]
fn a_listener_receives_the_growth_since_the_last_tick_before_the_end() {
    let events = Events::new();
    let mut listener = events.listen(None).expect("room");
    events.base(1, "b").add(Reason::Demand, 16384);
    events.close();
    let (received, end) = receive(&mut listener);
    let [Delivery::Event(record)] = &received[..] else { panic!("{received:?}") };
    assert_eq!((record.event.kind, record.event.bytes, end), (Kind::BaseMiss, Some(16384), true));
}

#[test]
fn an_end_waits_for_its_listeners_and_no_longer_than_it_is_told() {
    let events = Events::new();
    events.wait_for_listeners(Instant::now() + Duration::from_secs(60));
    let listener = events.listen(None).expect("room");
    let begun = Instant::now();
    events.wait_for_listeners(begun + Duration::from_millis(20));
    assert!(begun.elapsed() >= Duration::from_millis(20));
    let (gone, wait) = (Arc::new(AtomicUsize::new(0)), events.clone());
    let seen = gone.clone();
    let waiting = thread::spawn(move || {
        wait.wait_for_listeners(Instant::now() + Duration::from_secs(60));
        seen.load(Ordering::SeqCst)
    });
    gone.store(1, Ordering::SeqCst);
    drop(listener);
    assert_eq!(waiting.join().expect("no panic"), 1);
}

#[test]
fn the_number_of_listeners_is_bounded() {
    let events = Events::new();
    let mut all: Vec<_> = (0..LISTENERS).map(|_| events.listen(None).expect("room")).collect();
    assert!(events.listen(None).is_none());
    all.pop();
    assert!(events.listen(None).is_some());
}

#[test]
fn long_reasons_are_cut_between_characters() {
    let event = Event::new(Kind::CacheDegraded).because("\u{e4}".repeat(1000) + "x");
    let reason = event.reason.expect("a reason");
    assert!(reason.len() <= 515 && reason.ends_with("\u{e4}..."), "{reason}");
    let short = Event::new(Kind::CacheDegraded).because("full").reason;
    assert_eq!(short.as_deref(), Some("full"));
}

#[test]
fn traffic_is_emitted_once_a_tick_and_adds_up() {
    let events = Events::new();
    let traffic = events.base(4, "debian");
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let traffic = traffic.clone();
            thread::spawn(move || (0..10_000).for_each(|_| traffic.add(Reason::Memory, 4096)))
        })
        .collect();
    let mut listener = events.listen(None).expect("room");
    traffic.add(Reason::Demand, 16384);
    for _ in 0..5 {
        events.tick();
    }
    threads.into_iter().for_each(|thread| thread.join().expect("counts"));
    events.tick();
    events.tick();
    let (received, _) = receive(&mut listener);
    assert!(received.len() <= 7, "{received:?}");
    let mut hits = Total::default();
    for delivery in &received {
        let Delivery::Event(record) = delivery else { panic!("{delivery:?}") };
        let event = &record.event;
        assert_eq!(event.base.as_deref(), Some("debian"));
        match (event.kind, event.reason.as_deref()) {
            (Kind::BaseHit, Some("memory")) => {
                hits.bytes += event.bytes.expect("bytes");
                hits.count += event.count.expect("a count");
            }
            (Kind::BaseMiss, Some("demand")) => assert_eq!(event.bytes, Some(16384)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(hits, Total { count: 40_000, bytes: 40_000 * 4096 });
    assert_eq!(traffic.total(Reason::Memory), hits);
    assert_eq!(traffic.total(Reason::Disk), Total::default());
    // The same base has the same counters.
    assert_eq!(events.base(4, "debian").total(Reason::Memory), hits);
}

#[test]
fn forgetting_a_base_emits_its_last_traffic() {
    let events = Events::new();
    let traffic = events.base(1, "a");
    traffic.add(Reason::Asked, 100);
    events.forget(1);
    let recent = events.recent(0);
    assert_eq!(recent.len(), 1);
    assert_eq!((recent[0].event.kind, recent[0].event.bytes), (Kind::BaseEvict, Some(100)));
    assert!(events.bases().is_empty());
}

/// Guards D68.
#[test]
fn the_sum_of_bases_keeps_what_a_removed_base_counted() {
    let events = Events::new();
    let (shown, summed) = (events.base(1, "a"), events.base(2, "b"));
    summed.sum_up();
    shown.add(Reason::Memory, 10);
    summed.add(Reason::Memory, 100);
    let hits = || events.summed_up()[Reason::Memory as usize];
    assert_eq!(hits(), Total { count: 1, bytes: 100 });
    events.forget(2);
    events.forget(1);
    assert_eq!(hits(), Total { count: 1, bytes: 100 });
    events.base(3, "c").sum_up();
    events.base(3, "c").add(Reason::Memory, 5);
    assert_eq!(hits(), Total { count: 2, bytes: 105 });
}

#[test]
fn events_count_by_kind() {
    let events = Events::new();
    for (at, kind) in Kind::ALL.into_iter().enumerate() {
        assert_eq!(kind as usize, at);
    }
    events.emit(error("a"));
    events.emit(error("b"));
    events.emit(Event::new(Kind::WorkerStarted));
    let of_kind = events.state().of_kind;
    assert_eq!((of_kind[Kind::BaseError as usize], of_kind[Kind::WorkerStarted as usize]), (2, 1));
    assert_eq!(of_kind.iter().sum::<u64>(), 3);
}

#[test]
fn every_reason_has_its_own_index_and_name() {
    let mut names: Vec<_> = Reason::ALL.iter().map(|reason| reason.name()).collect();
    for (at, reason) in Reason::ALL.into_iter().enumerate() {
        assert_eq!(reason as usize, at);
        assert!(reason.kind().is_traffic());
    }
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), Reason::ALL.len());
}

/// docs/semantics.md has a row for every kind, with its reasons.
#[test]
fn events_are_documented() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/semantics.md");
    let text = std::fs::read_to_string(path).expect("the documentation");
    for kind in Kind::ALL {
        let row = text.lines().find(|line| line.starts_with(&format!("| `{}`", kind.name())));
        let row = row.unwrap_or_else(|| panic!("{} has no row", kind.name()));
        for reason in Reason::ALL.iter().filter(|reason| reason.kind() == kind) {
            assert!(row.contains(&format!("`{}`", reason.name())), "{}: {}", kind.name(), reason.name());
        }
    }
}
