//! Orders writes, copy-ups and discards of the same block.
//!
//! A thread that changes blocks holds their range, and no other range. It waits for local storage only: bytes of the
//! base are read before (D11; docs/design.md, "Lock order"). Overlapping ranges are granted in the order of the
//! requests, so a resize, which needs all blocks, gets its turn under any load.

use parking_lot::{Condvar, Mutex};

/// Ranges of blocks that are being changed.
#[derive(Debug, Default)]
pub struct RangeLock {
    queue: Mutex<Queue>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    next: u64,
    /// The held and the requested ranges, in the order of the requests: number, first block, end.
    entries: Vec<(u64, u64, u64)>,
}

/// Holds a range until dropped.
#[derive(Debug)]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    number: u64,
}

impl RangeLock {
    /// Waits for all earlier requests that overlap blocks `first..end`, then holds these blocks.
    pub fn lock(&self, first: u64, end: u64) -> RangeGuard<'_> {
        let mut queue = self.queue.lock();
        let number = queue.next;
        queue.next += 1;
        queue.entries.push((number, first, end));
        let is_mine = |queue: &Queue| {
            let mut before = queue.entries.iter().take_while(|(n, _, _)| *n < number);
            before.all(|(_, a, b)| first >= *b || *a >= end)
        };
        while !is_mine(&queue) {
            self.freed.wait(&mut queue);
        }
        RangeGuard { lock: self, number }
    }
}

impl RangeLock {
    /// Holds blocks `first..end`, unless a request for one of them is before this one.
    pub fn try_lock(&self, first: u64, end: u64) -> Option<RangeGuard<'_>> {
        let mut queue = self.queue.lock();
        if queue.entries.iter().any(|(_, a, b)| first < *b && *a < end) {
            return None;
        }
        let number = queue.next;
        queue.next += 1;
        queue.entries.push((number, first, end));
        Some(RangeGuard { lock: self, number })
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut queue = self.lock.queue.lock();
        // Numbers ascend.
        if let Ok(at) = queue.entries.binary_search_by_key(&self.number, |(n, _, _)| *n) {
            queue.entries.remove(at);
        }
        drop(queue);
        self.lock.freed.notify_all();
    }
}
