//! Counters of one base: how many bytes were found, fetched and evicted, and why.
//!
//! Counted on the path of every read, by several threads at once. Each thread adds to one of a few shards on cache
//! lines of its own, so that no two of them wait for the same one; a sum is exact once nobody counts any more, and
//! never less than what was counted before it was asked for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::{Event, Kind};

const SHARDS: usize = 8;
const REASONS: usize = Reason::ALL.len();

/// Where bytes were found, for whom they were fetched, or why they were evicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Hit: in memory.
    Memory,
    /// Hit: in the persistent cache.
    Disk,
    /// Miss: a reader waits.
    Demand,
    /// Miss: sequential reads are expected to go on.
    Readahead,
    /// Miss: a trace says that they will be read.
    Prefetch,
    /// Miss: all of the base is fetched.
    Hydrate,
    /// Evict: the cache is as large as it may be.
    Space,
    /// Evict: the filesystem has too little free space.
    Floor,
    /// Evict: there are as many bases in the cache as there may be.
    Bases,
    /// Evict: somebody asked for it.
    Asked,
    /// Evict: the checksum was wrong.
    Corrupt,
    /// Evict: the source is not what it was.
    Stale,
}

impl Reason {
    /// All of them.
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

    /// As users see it.
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

    /// The event that it is a reason of.
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

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Total {
    /// Calls.
    pub count: u64,
    /// Bytes of them all.
    pub bytes: u64,
}

#[derive(Default)]
struct Counter {
    count: AtomicU64,
    bytes: AtomicU64,
}

/// On cache lines of its own; two, because processors fetch them in pairs.
#[derive(Default)]
#[repr(align(128))]
struct Shard([Counter; REASONS]);

/// The counters of one base, since the worker started.
pub struct Traffic {
    base: Arc<str>,
    shards: [Shard; SHARDS],
    /// What events have told.
    told: Mutex<[Total; REASONS]>,
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
        Self { base: base.into(), shards: Default::default(), told: Mutex::default() }
    }

    /// The base's name.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Counts one piece of `bytes` bytes. Takes no lock.
    pub fn add(&self, reason: Reason, bytes: u64) {
        let counter = &self.shards[shard()].0[reason as usize];
        counter.bytes.fetch_add(bytes, Ordering::Relaxed);
        counter.count.fetch_add(1, Ordering::Relaxed);
    }

    /// What was counted so far.
    pub fn total(&self, reason: Reason) -> Total {
        let mut total = Total::default();
        for shard in &self.shards {
            let counter = &shard.0[reason as usize];
            total.count += counter.count.load(Ordering::Relaxed);
            total.bytes += counter.bytes.load(Ordering::Relaxed);
        }
        total
    }

    /// Makes an event of each counter that grew since the last time.
    pub(super) fn take(&self, mut emit: impl FnMut(Event)) {
        let mut told = self.told.lock();
        for (reason, told) in Reason::ALL.into_iter().zip(told.iter_mut()) {
            let total = self.total(reason);
            if total == *told {
                continue;
            }
            emit(Event {
                base: Some(self.base.clone()),
                bytes: Some(total.bytes - told.bytes),
                count: Some(total.count - told.count),
                reason: Some(reason.name().into()),
                ..Event::new(reason.kind())
            });
            *told = total;
        }
    }
}
