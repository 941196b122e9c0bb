use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::histogram::bucket_of;
use super::{BUCKETS, Operation, Origin, Origins, Registry, Series, Total, bound_us};

const TOOK: Duration = Duration::from_micros(3);

#[test]
fn a_latency_is_in_the_bucket_whose_bound_is_the_next_power_of_two() {
    let bound = |ns| bound_us(bucket_of(ns));
    assert_eq!(bound(0), Some(1));
    assert_eq!(bound(1000), Some(1), "the bound is inclusive");
    assert_eq!(bound(1001), Some(2));
    assert_eq!(bound(2000), Some(2));
    assert_eq!(bound(2001), Some(4));
    assert_eq!(bound(1_000_000), Some(1024));
    assert_eq!(bound(60_000_000_000), Some(1 << 26));
    assert_eq!(bound(u64::MAX), None);
    for bucket in 0..BUCKETS - 1 {
        let us = bound_us(bucket).expect("a bound");
        assert_eq!(bucket_of(us * 1000), bucket);
        assert_eq!(bucket_of(us * 1000 + 1), bucket + 1);
    }
}

#[test]
fn every_operation_and_origin_has_its_own_index_and_name() {
    let operations = Operation::ALL.into_iter().enumerate();
    operations.for_each(|(at, operation)| assert_eq!(operation as usize, at));
    Origin::ALL.into_iter().enumerate().for_each(|(at, origin)| assert_eq!(origin as usize, at));
    let names = Operation::ALL.map(Operation::name).into_iter().chain(Origin::ALL.map(Origin::name));
    let mut names: Vec<_> = names.collect();
    let count = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), count);
}

#[test]
fn requests_of_several_threads_add_up() {
    let registry = Registry::default();
    let counters = Arc::new(registry.add(7));
    let count = |counters: Arc<super::Counters>| {
        move || {
            let mut origins = Origins::default();
            origins.add(Origin::Delta, 1000);
            origins.add(Origin::Memory, 3096);
            for _ in 0..10_000 {
                counters.succeeded(Operation::Read, origins.bytes(), TOOK);
                counters.read_from(&origins);
            }
        }
    };
    let threads: Vec<_> = (0..4).map(|_| thread::spawn(count(counters.clone()))).collect();
    threads.into_iter().for_each(|thread| thread.join().expect("counts"));
    counters.failed(Operation::Read, TOOK);
    counters.interrupted(Operation::Read, Duration::from_secs(1));
    counters.waited(TOOK);
    counters.refused();
    let sums = counters.sums();
    let read = sums.operation(Operation::Read);
    assert_eq!((read.count(), read.bytes, read.errors, read.interrupted), (40_002, 40_000 * 4096, 1, 1));
    assert_eq!(read.latency_ns, 40_001 * 3000 + 1_000_000_000);
    assert_eq!(read.latency[2], 40_001, "at most 4 us");
    assert_eq!(sums.origin(Origin::Delta), Total { count: 40_000, bytes: 40_000_000 });
    assert_eq!(sums.origin(Origin::Memory).bytes, 40_000 * 3096);
    assert_eq!(sums.origin(Origin::Zero), Total::default());
    assert_eq!((sums.waits, sums.waited_ns, sums.refused), (1, 3000, 1));
    assert_eq!(sums.operation(Operation::Write).count(), 0);
    assert_eq!(registry.all()[0].sums, sums);
}

/// Guards D68.
#[test]
fn a_removed_disk_leaves_its_part_of_the_sums_and_nothing_else() {
    let registry = Registry::default();
    registry.limit_series(1);
    let own = registry.add(1);
    let (second, third) = (registry.add(2), registry.add(3));
    for counters in [&own, &second, &third] {
        counters.succeeded(Operation::Write, 10, TOOK);
    }
    let series = || registry.all().iter().map(|counted| (counted.id, counted.series)).collect::<Vec<_>>();
    assert_eq!(series(), [(1, Series::Own), (2, Series::Other), (3, Series::Other)]);
    let writes = || {
        let (all, others) = registry.totals();
        (all.operation(Operation::Write).bytes, others.operation(Operation::Write).bytes)
    };
    assert_eq!(writes(), (30, 20));
    drop(second);
    assert_eq!(writes(), (30, 20));
    drop(own);
    // The sum of the others does not grow by what was shown by itself.
    assert_eq!(writes(), (30, 20));
    assert_eq!(series(), [(3, Series::Other)], "it does not get series of its own");
    let fourth = registry.add(4);
    assert_eq!(series(), [(3, Series::Other), (4, Series::Own)]);
    drop((third, fourth));
    assert!(registry.all().is_empty());
    assert_eq!(writes(), (30, 20));
}

#[test]
fn counters_of_a_number_that_is_used_again_stay() {
    let registry = Registry::default();
    let first = registry.add(1);
    let again = registry.add(1);
    again.succeeded(Operation::Flush, 0, TOOK);
    drop(first);
    assert_eq!(registry.all().len(), 1);
    drop(again);
    assert!(registry.all().is_empty());
}
