//! Counters of one base: the bytes that were found, fetched and evicted, by reason.
//!
//! Several threads count at once, on the path of every read. The counters have shards, each on its own cache lines, and
//! a thread always adds to the same shard, so that few threads share a cache line. A sum includes everything that was
//! counted before it was read, and is exact once no thread counts any more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::{Event, Kind};

const SHARDS: usize = 8;
const REASONS: usize = Reason::ALL.len();

/// Where bytes were found, for whom they were fetched, or why they were evicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Hit: the memory cache had the bytes.
    Memory,
    /// Hit: the persistent cache had the bytes.
    Disk,
    /// Miss: a reader waits for the bytes.
    Demand,
    /// Miss: a sequential reader is expected to read the bytes.
    Readahead,
    /// Miss: a trace predicts that the bytes will be read.
    Prefetch,
    /// Miss: the whole base is fetched.
    Hydrate,
    /// Evict: the cache has reached its size limit.
    Space,
    /// Evict: the filesystem has too little free space.
    Floor,
    /// Evict: the cache has reached its limit of bases.
    Bases,
    /// Evict: an operator requested it.
    Asked,
    /// Evict: the checksum did not match.
    Corrupt,
    /// Evict: the source has changed.
    Stale,
}

impl Reason {
    /// All reasons.
    pub const ALL: [Self; 12] = [
        Self::Memory,
        Self::Disk,
        Self::Demand,
        Self::Readahead,
        Self::Prefetch,
        Self::Hydrate,
        Self::Space,
        Self::Floor,
        Self::Bases,
        Self::Asked,
        Self::Corrupt,
        Self::Stale,
    ];

    /// Its name for users.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Disk => "disk",
            Self::Demand => "demand",
            Self::Readahead => "readahead",
            Self::Prefetch => "prefetch",
            Self::Hydrate => "hydrate",
            Self::Space => "space",
            Self::Floor => "free_space",
            Self::Bases => "bases",
            Self::Asked => "asked",
            Self::Corrupt => "corrupt",
            Self::Stale => "stale",
        }
    }

    /// The kind of event that it is a reason of.
    pub fn kind(self) -> Kind {
        match self {
            Self::Memory | Self::Disk => Kind::BaseHit,
            Self::Demand | Self::Readahead | Self::Prefetch | Self::Hydrate => Kind::BaseMiss,
            Self::Space | Self::Floor | Self::Bases | Self::Asked | Self::Corrupt | Self::Stale => {
                Kind::BaseEvict
            }
        }
    }
}

/// The sum of a counter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Total {
    /// Pieces.
    pub count: u64,
    /// Bytes of all pieces.
    pub bytes: u64,
}

/// Sums by reason.
pub type Totals = [Total; REASONS];

#[derive(Default)]
struct Counter {
    count: AtomicU64,
    bytes: AtomicU64,
}

/// The counters of some threads, on cache lines of their own: 128 bytes, because processors fetch cache lines in pairs.
#[derive(Default)]
#[repr(align(128))]
struct Shard([Counter; REASONS]);

/// The counters of one base, since the worker started.
pub struct Traffic {
    base: Arc<str>,
    shards: [Shard; SHARDS],
    /// The totals at the last emitted events.
    emitted: Mutex<Totals>,
    summed_up: AtomicBool,
}

/// The shard of this thread.
fn shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static MINE: usize = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
    }
    MINE.with(|mine| *mine)
}

impl Traffic {
    pub(super) fn new(base: &str) -> Self {
        Self {
            base: base.into(),
            shards: Default::default(),
            emitted: Mutex::default(),
            summed_up: AtomicBool::new(false),
        }
    }

    /// The base's name.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Counts one piece of `bytes` bytes. It takes no lock.
    pub fn add(&self, reason: Reason, bytes: u64) {
        let counter = &self.shards[shard()].0[reason as usize];
        counter.bytes.fetch_add(bytes, Ordering::Relaxed);
        counter.count.fetch_add(1, Ordering::Relaxed);
    }

    /// The sum so far.
    pub fn total(&self, reason: Reason) -> Total {
        let mut total = Total::default();
        for shard in &self.shards {
            let counter = &shard.0[reason as usize];
            total.count += counter.count.load(Ordering::Relaxed);
            total.bytes += counter.bytes.load(Ordering::Relaxed);
        }
        total
    }

    /// From now on the base is a part of [`Events::summed_up`](super::Events::summed_up).
    pub fn sum_up(&self) {
        self.summed_up.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_summed_up(&self) -> bool {
        self.summed_up.load(Ordering::Relaxed)
    }

    pub(super) fn add_to(&self, sum: &mut Totals) {
        for (reason, sum) in Reason::ALL.into_iter().zip(sum) {
            let total = self.total(reason);
            sum.count += total.count;
            sum.bytes += total.bytes;
        }
    }

    /// Emits an event for each counter that grew since the last call.
    pub(super) fn emit_growth(&self, mut emit: impl FnMut(Event)) {
        let mut emitted = self.emitted.lock();
        for (reason, last) in Reason::ALL.into_iter().zip(emitted.iter_mut()) {
            let total = self.total(reason);
            if total == *last {
                continue;
            }
            emit(Event {
                base: Some(self.base.clone()),
                bytes: Some(total.bytes - last.bytes),
                count: Some(total.count - last.count),
                reason: Some(reason.name().into()),
                ..Event::new(reason.kind())
            });
            *last = total;
        }
    }
}
