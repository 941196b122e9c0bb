//! The counters of one disk or base, and their sums.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::histogram::{BUCKETS, bucket_of};
use super::registry::{Series, Shared};
use super::{Operation, Origin, Origins};

const OPERATIONS: usize = Operation::ALL.len();
const ORIGINS: usize = Origin::ALL.len();

/// The counters of one operation, on cache lines of their own: readers and writers of a disk do not share them. 128
/// bytes, because processors fetch cache lines in pairs.
#[derive(Default)]
#[repr(align(128))]
struct Tally {
    latency: [AtomicU64; BUCKETS],
    latency_ns: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    interrupted: AtomicU64,
}

#[derive(Default)]
struct Piece {
    count: AtomicU64,
    bytes: AtomicU64,
}

/// Where reads came from, on cache lines of their own.
#[derive(Default)]
#[repr(align(128))]
struct Pieces([Piece; ORIGINS]);

/// What the registry and the users of the counters share.
#[derive(Default)]
pub(super) struct Cells {
    /// Allocated at the first request of each kind: a store has many disks of which clients only ask for attributes.
    operations: [OnceLock<Box<Tally>>; OPERATIONS],
    origins: OnceLock<Box<Pieces>>,
    waits: AtomicU64,
    waited_ns: AtomicU64,
    refused: AtomicU64,
    throttled: AtomicU64,
    throttled_ns: AtomicU64,
}

fn add(counter: &AtomicU64, value: u64) {
    counter.fetch_add(value, Ordering::Relaxed);
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl Cells {
    pub fn sums(&self) -> Sums {
        let operation = |tally: &OnceLock<Box<Tally>>| {
            tally.get().map_or_else(OperationSums::default, |tally| OperationSums {
                latency: tally.latency.each_ref().map(get),
                latency_ns: get(&tally.latency_ns),
                bytes: get(&tally.bytes),
                errors: get(&tally.errors),
                interrupted: get(&tally.interrupted),
            })
        };
        let origin = |piece: &Piece| Total { count: get(&piece.count), bytes: get(&piece.bytes) };
        let origins = self.origins.get().map(|pieces| pieces.0.each_ref().map(origin));
        Sums {
            operations: self.operations.each_ref().map(operation),
            origins: origins.unwrap_or_default(),
            waits: get(&self.waits),
            waited_ns: get(&self.waited_ns),
            refused: get(&self.refused),
            throttled: get(&self.throttled),
            throttled_ns: get(&self.throttled_ns),
        }
    }
}

/// The counters of one disk or base, since this worker began to serve. When the last holder drops them, they leave
/// their registry.
pub struct Counters {
    cells: Arc<Cells>,
    id: u64,
    series: Series,
    registry: Arc<Shared>,
}

impl Drop for Counters {
    fn drop(&mut self) {
        self.registry.remove(self.id, &self.cells, self.series);
    }
}

impl Counters {
    pub(super) fn new(cells: Arc<Cells>, id: u64, series: Series, registry: Arc<Shared>) -> Self {
        Self { cells, id, series, registry }
    }

    /// Counts a request that succeeded and moved `bytes` bytes.
    pub fn succeeded(&self, operation: Operation, bytes: u64, took: Duration) {
        add(&self.answered(operation, took).bytes, bytes);
    }

    /// Counts a request that failed.
    pub fn failed(&self, operation: Operation, took: Duration) {
        add(&self.answered(operation, took).errors, 1);
    }

    /// Counts a request whose caller gave it up.
    pub fn interrupted(&self, operation: Operation, took: Duration) {
        add(&self.answered(operation, took).interrupted, 1);
    }

    fn answered(&self, operation: Operation, took: Duration) -> &Tally {
        let tally = self.cells.operations[operation as usize].get_or_init(Box::default);
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        add(&tally.latency[bucket_of(ns)], 1);
        add(&tally.latency_ns, ns);
        tally
    }

    /// Counts the origins of a read that succeeded.
    pub fn read_from(&self, origins: &Origins) {
        let pieces = self.cells.origins.get_or_init(Box::default);
        for (origin, piece) in Origin::ALL.into_iter().zip(&pieces.0) {
            let bytes = origins.of(origin);
            if bytes > 0 {
                add(&piece.count, 1);
                add(&piece.bytes, bytes);
            }
        }
    }

    /// Counts a request that waited for bytes of a base.
    pub fn waited(&self, time: Duration) {
        add(&self.cells.waits, 1);
        add(&self.cells.waited_ns, u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Counts a request that waited for its turn under a limit.
    pub fn throttled(&self, time: Duration) {
        add(&self.cells.throttled, 1);
        add(&self.cells.throttled_ns, u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }

    /// Counts a request that was refused because too many waited.
    pub fn refused(&self) {
        add(&self.cells.refused, 1);
    }

    /// The present sums.
    pub fn sums(&self) -> Sums {
        self.cells.sums()
    }
}

/// A count with bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Total {
    pub count: u64,
    pub bytes: u64,
}

impl Total {
    fn join(&mut self, other: Self) {
        self.count = self.count.wrapping_add(other.count);
        self.bytes = self.bytes.wrapping_add(other.bytes);
    }
}

/// The sums of one operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OperationSums {
    /// Requests by latency, see [`bound_us`](super::bound_us).
    pub latency: [u64; BUCKETS],
    /// Nanoseconds of all requests.
    pub latency_ns: u64,
    /// Bytes of the requests that succeeded.
    pub bytes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// Requests whose caller gave them up.
    pub interrupted: u64,
}

impl OperationSums {
    /// Answered requests, also those that failed.
    pub fn count(&self) -> u64 {
        self.latency.iter().sum()
    }

    fn join(&mut self, other: &Self) {
        for (mine, others) in self.latency.iter_mut().zip(other.latency) {
            *mine = mine.wrapping_add(others);
        }
        for (mine, others) in [
            (&mut self.latency_ns, other.latency_ns),
            (&mut self.bytes, other.bytes),
            (&mut self.errors, other.errors),
            (&mut self.interrupted, other.interrupted),
        ] {
            *mine = mine.wrapping_add(others);
        }
    }
}

/// Sums of one disk or base, or of several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    operations: [OperationSums; OPERATIONS],
    origins: [Total; ORIGINS],
    /// Requests that waited for bytes of a base.
    pub waits: u64,
    /// Nanoseconds that they waited.
    pub waited_ns: u64,
    /// Requests that were refused because too many waited.
    pub refused: u64,
    /// Requests that waited for their turn under a limit.
    pub throttled: u64,
    /// Nanoseconds that they waited.
    pub throttled_ns: u64,
}

impl Sums {
    /// The sums of one operation.
    pub fn operation(&self, operation: Operation) -> &OperationSums {
        &self.operations[operation as usize]
    }

    /// Reads with bytes of this origin, and the bytes.
    pub fn origin(&self, origin: Origin) -> Total {
        self.origins[origin as usize]
    }

    /// Adds other sums.
    pub fn join(&mut self, other: &Self) {
        for (mine, others) in self.operations.iter_mut().zip(&other.operations) {
            mine.join(others);
        }
        for (mine, others) in self.origins.iter_mut().zip(other.origins) {
            mine.join(others);
        }
        for (mine, others) in [
            (&mut self.waits, other.waits),
            (&mut self.waited_ns, other.waited_ns),
            (&mut self.refused, other.refused),
            (&mut self.throttled, other.throttled),
            (&mut self.throttled_ns, other.throttled_ns),
        ] {
            *mine = mine.wrapping_add(others);
        }
    }
}
