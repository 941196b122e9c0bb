//! Whether the cache takes new blocks: a directory that cannot be used, a full filesystem, and a cache in which
//! nothing may be evicted are all the same to whoever reads, which is that nothing new is kept.
//!
//! What must hold: nothing is tried in a loop. After a failure nothing is written until a number of ticks has passed,
//! twice as many each time; one line in the log and one event say so, and one of each that it is over (D35).

use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Ticks between two attempts, at most.
const LONGEST: u64 = 64;

#[derive(Default)]
pub(super) struct Health {
    state: Mutex<State>,
    /// Something failed and has not worked since.
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

    /// Whether to try to write something.
    pub fn may_write(&self) -> bool {
        !self.degraded.load(Ordering::Relaxed) || self.ticks() >= self.retry_at.load(Ordering::Relaxed)
    }

    pub fn why(&self) -> Option<String> {
        self.state.lock().why.clone()
    }

    /// Something did not work. `true`: it is news.
    pub fn failed(&self, why: &str) -> bool {
        let mut state = self.state.lock();
        // Several callers may fail at once: that is one failure.
        if state.why.is_none() || self.ticks() >= self.retry_at.load(Ordering::Relaxed) {
            // What fails, works and fails again is put off longer each time too.
            let now = self.ticks();
            let calm = state.failed_at + 2 * LONGEST < now;
            state.wait = if calm { 1 } else { (state.wait * 2).clamp(1, LONGEST) };
            state.failed_at = now;
            self.retry_at.store(now + state.wait, Ordering::Relaxed);
        }
        let news = state.why.is_none();
        state.why = Some(why.to_owned());
        self.degraded.store(true, Ordering::Relaxed);
        news
    }

    /// Something was written. `true`: it is news.
    pub fn worked(&self) -> bool {
        if !self.degraded.load(Ordering::Relaxed) {
            return false;
        }
        let mut state = self.state.lock();
        self.degraded.store(false, Ordering::Relaxed);
        state.why.take().is_some()
    }

    /// What stood in the way may be gone: the next write is tried at once.
    pub fn hope(&self) {
        self.retry_at.store(0, Ordering::Relaxed);
    }
}
