//! Orders writes, copy-ups and discards that touch the same block.
//!
//! Whoever changes blocks holds their range, and no other one. A holder waits for local storage only: what comes from
//! the base was read before (D11; docs/design.md, "Lock order"). Ranges that overlap are had in the order in which they
//! were asked for, so that a resize, which needs all blocks, has its turn under any load.

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
    /// Who holds a range or waits for one, in the order of arrival: number, first block, end.
    entries: Vec<(u64, u64, u64)>,
}

/// Holds a range until dropped.
#[derive(Debug)]
pub struct RangeGuard<'a> {
    lock: &'a RangeLock,
    number: u64,
}

impl RangeLock {
    /// Waits until whoever asked before for some of blocks `first..end` is done with them, then holds them.
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
