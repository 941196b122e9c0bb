//! Whether the cache takes new blocks. An unusable directory, a full filesystem, and a cache in which nothing may be
//! evicted have the same effect on readers: no new block is cached.
//!
//! What must hold: nothing is retried in a loop. After a failure the cache writes nothing for a number of ticks, twice
//! as many after each failure. One log line and one event report the failure, and one of each reports its end (D35).

use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The longest time between two attempts, ticks.
const LONGEST_WAIT: u64 = 64;

#[derive(Default)]
pub(super) struct Health {
    state: Mutex<State>,
    /// A write failed, and none worked since.
    degraded: AtomicBool,
    retry_at: AtomicU64,
    tick: AtomicU64,
}

#[derive(Default)]
struct State {
    why: Option<String>,
    wait: u64,
    failed_at: u64,
}

impl Health {
    pub fn ticks(&self) -> u64 {
        self.tick.load(Ordering::Relaxed)
    }

    pub fn tick(&self) -> u64 {
        self.tick.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Whether the cache may try to write.
    pub fn may_write(&self) -> bool {
        !self.degraded.load(Ordering::Relaxed) || self.ticks() >= self.retry_at.load(Ordering::Relaxed)
    }

    pub fn why(&self) -> Option<String> {
        self.state.lock().why.clone()
    }

    /// Notes a failure. Returns whether it is the first since the cache worked.
    pub fn failed(&self, why: &str) -> bool {
        let mut state = self.state.lock();
        // Concurrent failures of several callers count as one.
        if state.why.is_none() || self.ticks() >= self.retry_at.load(Ordering::Relaxed) {
            // Alternating failures and successes make the wait longer, too.
            let now = self.ticks();
            let calm = state.failed_at + 2 * LONGEST_WAIT < now;
            state.wait = if calm { 1 } else { (state.wait * 2).clamp(1, LONGEST_WAIT) };
            state.failed_at = now;
            self.retry_at.store(now + state.wait, Ordering::Relaxed);
        }
        let news = state.why.is_none();
        state.why = Some(why.to_owned());
        self.degraded.store(true, Ordering::Relaxed);
        news
    }

    /// Notes a successful write. Returns whether it is the first since a failure.
    pub fn worked(&self) -> bool {
        if !self.degraded.load(Ordering::Relaxed) {
            return false;
        }
        let mut state = self.state.lock();
        self.degraded.store(false, Ordering::Relaxed);
        state.why.take().is_some()
    }

    /// The cause of the failure may be gone: the next write is tried at once.
    pub fn retry_now(&self) {
        self.retry_at.store(0, Ordering::Relaxed);
    }
}
