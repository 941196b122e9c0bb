//! Orders writes, copy-ups and discards that touch the same block.
//!
//! Whoever changes blocks holds their range. A holder waits for local storage only: what comes from the base was
//! read before (docs/design.md, "Lock order").

use parking_lot::{Condvar, Mutex};

/// Ranges of blocks that are being changed.
#[derive(Debug, Default)]
pub struct RangeLock {
    held: Mutex<Vec<(u64, u64)>>,
    freed: Condvar,
}

/// Holds a range until dropped.
#[derive(Debug)]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    range: (u64, u64),
}

impl RangeLock {
    /// Waits until no held range overlaps blocks `first..end`, then holds them.
    pub fn lock(&self, first: u64, end: u64) -> RangeGuard<'_> {
        let mut held = self.held.lock();
        while held.iter().any(|(a, b)| first < *b && *a < end) {
            self.freed.wait(&mut held);
        }
        held.push((first, end));
        RangeGuard { lock: self, range: (first, end) }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut held = self.lock.held.lock();
        if let Some(at) = held.iter().position(|r| *r == self.range) {
            held.swap_remove(at);
        }
        drop(held);
        self.lock.freed.notify_all();
    }
}
