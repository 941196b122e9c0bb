//! How many bytes of the store a disk may take.
//!
//! What counts: blocks with data in the deltas of the disk that are written (`held`), and the sealed layers that it alone
//! needs (`below`). What must hold: space is counted before it is taken, so requests that run together never take more
//! than the quota together (D84).

use std::sync::atomic::{AtomicU64, Ordering};

/// A disk without a quota.
const NONE: u64 = u64::MAX;

/// Requests of all disks that were refused.
static REFUSALS: AtomicU64 = AtomicU64::new(0);

/// Requests of all disks that were refused because of quotas since the worker began.
pub fn refusals() -> u64 {
    REFUSALS.load(Ordering::Relaxed)
}

/// See the module.
pub struct Quota {
    limit: AtomicU64,
    held: AtomicU64,
    below: AtomicU64,
    /// Bytes that the last refused request needed; 0: none was refused since the disk had room.
    refused: AtomicU64,
}

impl Default for Quota {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self { limit: AtomicU64::new(NONE), held: zero(), below: zero(), refused: zero() }
    }
}

impl Quota {
    /// Whether the disk has a quota.
    pub fn is_set(&self) -> bool {
        self.limit.load(Ordering::Relaxed) != NONE
    }

    /// Sets the quota. It may be below what the disk takes: it then gets no new space until it takes less.
    pub fn set_limit(&self, limit: Option<u64>) {
        self.limit.store(limit.unwrap_or(NONE), Ordering::Relaxed);
        if limit.is_none() {
            self.refused.store(0, Ordering::Relaxed);
        }
    }

    /// Counts new space, `beyond` bytes beyond the quota at most. Returns false, without a change, when there is no room.
    pub fn take(&self, bytes: u64, beyond: u64) -> bool {
        let below = self.below.load(Ordering::Acquire);
        let limit = self.limit.load(Ordering::Relaxed).saturating_add(beyond);
        let more = |held: u64| {
            let wanted = held.saturating_add(bytes);
            (wanted.saturating_add(below) <= limit).then_some(wanted)
        };
        let taken = self.held.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_ok();
        if !taken {
            self.refused.store(bytes, Ordering::Relaxed);
            REFUSALS.fetch_add(1, Ordering::Relaxed);
        }
        taken
    }

    /// Counts space that the disk has already.
    pub fn add(&self, bytes: u64) {
        self.held.fetch_add(bytes, Ordering::AcqRel);
    }

    /// Counts space that is free again.
    pub fn give(&self, bytes: u64) {
        let less = |held: u64| Some(held.saturating_sub(bytes));
        let _ = self.held.fetch_update(Ordering::AcqRel, Ordering::Acquire, less);
    }

    /// A delta of so many bytes, which are not counted as a delta any more, is a layer now.
    pub fn sealed(&self, bytes: u64) {
        self.below.fetch_add(bytes, Ordering::AcqRel);
    }

    /// Sets what the layers take that the disk alone needs.
    pub fn set_below(&self, bytes: u64) {
        self.below.store(bytes, Ordering::Release);
    }

    /// What the layers take.
    pub fn below(&self) -> u64 {
        self.below.load(Ordering::Acquire)
    }

    /// Bytes that count, while the disk's deltas are counted.
    pub fn used(&self) -> u64 {
        self.held.load(Ordering::Acquire).saturating_add(self.below())
    }

    /// Whether a request was refused and there is no room for it yet.
    pub fn is_reached(&self) -> bool {
        let refused = self.refused.load(Ordering::Relaxed);
        refused > 0 && self.used().saturating_add(refused) > self.limit.load(Ordering::Relaxed)
    }
}
