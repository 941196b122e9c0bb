//! Reads of the persistent cache with a time limit.
//!
//! Why: all bases share the cache's disk, and it may hang while every server answers. What must hold:
//! - A reader waits for the disk for [`DISK_TIMEOUT`] at most (D58). Then it treats the bytes as missing, and the request
//!   goes to the server.
//! - While one read hangs, no other reader waits at all.
//! - Reads that wait for the disk occupy threads of their own and no others.
//!
//! Locks: `state` is held briefly, inside all other locks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::FetchCache;
use crate::source::Spawn;

/// How long a reader waits for the cache's disk.
pub const DISK_TIMEOUT: Duration = Duration::from_millis(250);

/// The disk did not answer in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TimedOut;

/// Runs the timed reads of one cache disk. All sources of the cache share it.
pub struct TimedReads {
    /// Its `spawn_blocking` runs a bounded number of jobs at a time.
    spawn: Arc<dyn Spawn>,
    state: Mutex<State>,
    /// The cache knows that its disk hangs.
    reported: AtomicBool,
}

#[derive(Default)]
struct State {
    /// When each read under way began, by its number. Numbers ascend with time.
    under_way: BTreeMap<u64, Instant>,
    next: u64,
}

impl State {
    fn hangs(&self) -> bool {
        self.under_way.values().next().is_some_and(|began| began.elapsed() > DISK_TIMEOUT)
    }
}

/// Passes the result of a job to its reader, unless the reader stopped waiting.
struct Slot<T> {
    state: Mutex<Outcome<T>>,
    ready: Condvar,
}

enum Outcome<T> {
    Pending,
    Ready(T),
    /// The reader stopped waiting.
    Unwanted,
}

/// Counts one read as under way until it is dropped.
struct UnderWay<'a> {
    timed_reads: &'a TimedReads,
    keep: &'a dyn FetchCache,
    number: u64,
}

impl<'a> UnderWay<'a> {
    fn new(timed_reads: &'a TimedReads, keep: &'a dyn FetchCache) -> Self {
        let mut state = timed_reads.state.lock();
        let number = state.next;
        state.next += 1;
        state.under_way.insert(number, Instant::now());
        Self { timed_reads, keep, number }
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let hangs = {
            let mut state = self.timed_reads.state.lock();
            state.under_way.remove(&self.number);
            state.hangs()
        };
        if !hangs && self.timed_reads.reported.swap(false, Ordering::AcqRel) {
            self.keep.answers(true);
        }
    }
}

impl TimedReads {
    /// `spawn` runs the jobs that wait for the disk.
    pub fn new(spawn: Arc<dyn Spawn>) -> Arc<Self> {
        Arc::new(Self { spawn, state: Mutex::default(), reported: AtomicBool::new(false) })
    }

    /// Runs a job that counts as a read, on this thread.
    pub(super) fn counted<T>(&self, keep: &dyn FetchCache, job: impl FnOnce(&dyn FetchCache) -> T) -> T {
        let _under_way = UnderWay::new(self, keep);
        job(keep)
    }

    /// Runs a job on a thread that may wait for the disk.
    pub(super) fn spawn(&self, job: impl FnOnce() + Send + 'static) {
        self.spawn.spawn_blocking(Box::new(job));
    }

    /// Runs a job on the cache, and returns its result if that comes in time.
    pub(super) fn wait_for<T: Send + 'static>(
        self: &Arc<Self>,
        keep: &Arc<dyn FetchCache>,
        job: impl FnOnce(&dyn FetchCache) -> T + Send + 'static,
    ) -> Result<T, TimedOut> {
        if self.state.lock().hangs() {
            self.report_hang(&**keep);
            return Err(TimedOut);
        }
        let slot = Arc::new(Slot { state: Mutex::new(Outcome::Pending), ready: Condvar::new() });
        let (this, kept, to) = (self.clone(), keep.clone(), slot.clone());
        self.spawn(move || {
            // It may have queued behind reads that hung, and its reader may have stopped waiting.
            if matches!(&*to.state.lock(), Outcome::Unwanted) {
                return;
            }
            let found = this.counted(&*kept, job);
            *to.state.lock() = Outcome::Ready(found);
            to.ready.notify_one();
        });
        let until = Instant::now() + DISK_TIMEOUT;
        let mut state = slot.state.lock();
        while matches!(&*state, Outcome::Pending) {
            if slot.ready.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        match std::mem::replace(&mut *state, Outcome::Unwanted) {
            Outcome::Ready(found) => Ok(found),
            Outcome::Pending | Outcome::Unwanted => {
                drop(state);
                self.report_hang(&**keep);
                Err(TimedOut)
            }
        }
    }

    fn report_hang(&self, keep: &dyn FetchCache) {
        // A timeout because there were more readers than threads is no hang.
        if self.state.lock().hangs() && !self.reported.swap(true, Ordering::AcqRel) {
            keep.answers(false);
        }
    }
}
