//! Reads of the cache of fetched blocks that may have to wait for its disk.
//!
//! Why: that disk is one for all bases, and it may hang while every server answers. What must hold:
//! - A reader waits for the disk for [`PATIENCE`] at most (D58). Then the bytes are missing, and its server is asked.
//! - While one read hangs, no other waits at all.
//! - What waits for the disk keeps threads of its own and no others.
//!
//! Locks: `state` is held for moments, and inside all others.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::Keep;
use crate::source::Spawn;

/// How long a reader waits for the cache's disk.
pub const PATIENCE: Duration = Duration::from_millis(250);

/// The disk has not answered in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Late;

/// One for all sources whose blocks one disk keeps.
pub struct Patience {
    /// Its `spawn_blocking` runs a bounded number of jobs at a time.
    spawn: Arc<dyn Spawn>,
    state: Mutex<State>,
    /// The cache was told that its disk hangs.
    told: AtomicBool,
}

#[derive(Default)]
struct State {
    /// When each read under way began; numbers ascend with time.
    under_way: BTreeMap<u64, Instant>,
    next: u64,
}

impl State {
    fn hangs(&self) -> bool {
        self.under_way.values().next().is_some_and(|began| began.elapsed() > PATIENCE)
    }
}

/// What a job found, and whether its reader has stopped waiting.
struct Slot<T> {
    state: Mutex<Found<T>>,
    found: Condvar,
}

enum Found<T> {
    NotYet,
    Here(T),
    Unwanted,
}

/// One read under way, until it is dropped.
struct UnderWay<'a> {
    patience: &'a Patience,
    keep: &'a dyn Keep,
    number: u64,
}

impl<'a> UnderWay<'a> {
    fn new(patience: &'a Patience, keep: &'a dyn Keep) -> Self {
        let mut state = patience.state.lock();
        let number = state.next;
        state.next += 1;
        state.under_way.insert(number, Instant::now());
        Self { patience, keep, number }
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let hangs = {
            let mut state = self.patience.state.lock();
            state.under_way.remove(&self.number);
            state.hangs()
        };
        if !hangs && self.patience.told.swap(false, Ordering::AcqRel) {
            self.keep.answers(true);
        }
    }
}

impl Patience {
    /// `spawn` runs what waits for the disk.
    pub fn new(spawn: Arc<dyn Spawn>) -> Arc<Self> {
        Arc::new(Self { spawn, state: Mutex::default(), told: AtomicBool::new(false) })
    }

    /// Runs a job that counts as a read, on this thread.
    pub(super) fn counted<T>(&self, keep: &dyn Keep, job: impl FnOnce(&dyn Keep) -> T) -> T {
        let _under_way = UnderWay::new(self, keep);
        job(keep)
    }

    /// Runs a job on a thread that may wait for the disk.
    pub(super) fn spawn(&self, job: impl FnOnce() + Send + 'static) {
        self.spawn.spawn_blocking(Box::new(job));
    }

    /// What a job finds in the cache, if that is in time.
    pub(super) fn wait_for<T: Send + 'static>(
        self: &Arc<Self>,
        keep: &Arc<dyn Keep>,
        job: impl FnOnce(&dyn Keep) -> T + Send + 'static,
    ) -> Result<T, Late> {
        if self.state.lock().hangs() {
            self.tell(&**keep);
            return Err(Late);
        }
        let slot = Arc::new(Slot { state: Mutex::new(Found::NotYet), found: Condvar::new() });
        let (this, kept, to) = (self.clone(), keep.clone(), slot.clone());
        self.spawn(move || {
            // Behind others that hung, nothing may wait for it any more.
            if matches!(&*to.state.lock(), Found::Unwanted) {
                return;
            }
            let found = this.counted(&*kept, job);
            *to.state.lock() = Found::Here(found);
            to.found.notify_one();
        });
        let until = Instant::now() + PATIENCE;
        let mut state = slot.state.lock();
        while matches!(&*state, Found::NotYet) {
            if slot.found.wait_until(&mut state, until).timed_out() {
                break;
            }
        }
        match std::mem::replace(&mut *state, Found::Unwanted) {
            Found::Here(found) => Ok(found),
            Found::NotYet | Found::Unwanted => {
                drop(state);
                self.tell(&**keep);
                Err(Late)
            }
        }
    }

    fn tell(&self, keep: &dyn Keep) {
        // Not when there were only more readers than threads.
        if self.state.lock().hangs() && !self.told.swap(true, Ordering::AcqRel) {
            keep.answers(false);
        }
    }
}
