//! The transit table: cache blocks between the network and the cache, either requested or present and still held.
//!
//! What must hold:
//! - A block is fetched once, however many readers ask for it: a later reader finds it here and waits for the same bytes
//!   (D40).
//! - A block stays in the table while it has a holder: the fetch that brings it, the insert into the cache, or a
//!   reader's [`Completion`]. So a reader that runs again finds the block that it waited for, or the error.
//! - No callback runs under a lock.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::Mutex;

use super::Shared;
use crate::source::{Completer, Completion, SourceError};

/// One cache block in transit.
pub(super) struct Unit {
    state: Mutex<State>,
}

enum State {
    /// `waiters`: completions that wait for it. A completion is complete when the last of its blocks drops its
    /// completer. `read`: since when a reader is among them.
    Pending {
        waiters: Vec<Arc<Completer>>,
        read: Option<Instant>,
    },
    Present {
        bytes: Arc<[u8]>,
        awaited: bool,
    },
    Failed(SourceError),
    /// It did not come, and no reader waited for it: as if it had never been requested.
    Abandoned,
}

/// What a reader finds in the table.
pub(super) enum Found {
    Pending,
    /// `awaited`: a reader waited for it.
    Present {
        bytes: Arc<[u8]>,
        awaited: bool,
    },
    Failed(SourceError),
}

impl Unit {
    fn new() -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(State::Pending { waiters: Vec::new(), read: None }) })
    }

    pub fn find(&self) -> Found {
        match &*self.state.lock() {
            // [`Transit::get`] does not return an abandoned unit, and its earlier holders wait for nothing.
            State::Pending { .. } | State::Abandoned => Found::Pending,
            State::Present { bytes, awaited } => Found::Present { bytes: bytes.clone(), awaited: *awaited },
            State::Failed(error) => Found::Failed(error.clone()),
        }
    }

    /// Whether it is under way.
    pub fn is_pending(&self) -> bool {
        matches!(&*self.state.lock(), State::Pending { .. })
    }

    /// Holds `waiter` until the block has come or failed.
    fn wait(&self, waiter: Arc<Completer>, kind: WaiterKind) {
        let mut gone = Vec::new();
        if let State::Pending { waiters, read } = &mut *self.state.lock() {
            // Readers that went away are removed when the list is about to grow. So its length is at most twice the
            // number of waiting readers.
            if waiters.len() == waiters.capacity() {
                gone = waiters.extract_if(.., |waiter| !waiter.is_awaited()).collect();
            }
            waiters.push(waiter);
            if kind == WaiterKind::Reader {
                read.get_or_insert_with(Instant::now);
            }
        }
        // Without the lock: this may run callbacks.
        drop(gone);
    }

    fn settle(&self, state: impl FnOnce(bool) -> State) {
        let before = {
            let mut now = self.state.lock();
            let State::Pending { read, .. } = &*now else { return };
            let state = state(read.is_some());
            std::mem::replace(&mut *now, state)
        };
        // Without the lock: this may run the readers' next attempt.
        drop(before);
    }

    pub fn complete(&self, bytes: Arc<[u8]>) {
        self.settle(|awaited| State::Present { bytes, awaited });
    }

    pub fn fail(&self, error: SourceError) {
        self.settle(|_| State::Failed(error));
    }

    /// The block will not come. Call it when no reader waits for it any more.
    pub fn cancel(&self) {
        self.settle(|_| State::Abandoned);
    }

    /// The block will not come by this request. When a reader waits for it, the block stays pending, and the result is
    /// since when the reader waits.
    #[must_use]
    pub fn abandon_unless_read(&self) -> Option<Instant> {
        let before = {
            let mut now = self.state.lock();
            match &*now {
                State::Pending { read: Some(since), .. } => return Some(*since),
                State::Pending { .. } => std::mem::replace(&mut *now, State::Abandoned),
                _ => return None,
            }
        };
        drop(before);
        None
    }
}

/// Which kind of caller waits for a block.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum WaiterKind {
    /// A reader, which cannot go on without it.
    Reader,
    /// A prefetch or a hydration.
    Other,
}

/// The blocks that a completion holds.
struct Held {
    units: Vec<Arc<Unit>>,
    source: Weak<Shared>,
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.units.iter().any(|unit| matches!(&*unit.state.lock(), State::Pending { .. })) {
            // The reader went away before the blocks came.
            self.units.clear();
            if let Some(source) = self.source.upgrade() {
                source.reader_left();
            }
        }
    }
}

/// A completion that is complete when each of `units` has come or failed. It holds the units.
pub(super) fn completion_of(source: &Arc<Shared>, units: Vec<Arc<Unit>>, kind: WaiterKind) -> Completion {
    let (completer, completion) = Completion::new();
    let completer = Arc::new(completer);
    for unit in &units {
        unit.wait(completer.clone(), kind);
    }
    drop(completer);
    completion.keeping(Arc::new(Held { units, source: Arc::downgrade(source) }))
}

/// The blocks of one source that are in transit.
#[derive(Default)]
pub(super) struct Transit {
    units: HashMap<u64, Weak<Unit>>,
    /// The number of entries at which those without a holder are dropped.
    sweep_at: usize,
}

impl Transit {
    pub fn get(&self, block: u64) -> Option<Arc<Unit>> {
        let unit = self.units.get(&block)?.upgrade()?;
        let abandoned = matches!(&*unit.state.lock(), State::Abandoned);
        (!abandoned).then_some(unit)
    }

    /// The blocks of the table, with units that may have no holder any more.
    pub fn snapshot(&self) -> Vec<(u64, Weak<Unit>)> {
        self.units.iter().map(|(block, unit)| (*block, unit.clone())).collect()
    }

    /// A new unit for a block that has none.
    pub fn insert(&mut self, block: u64) -> Arc<Unit> {
        if self.units.len() >= self.sweep_at {
            self.units.retain(|_, unit| unit.strong_count() > 0);
            self.sweep_at = (self.units.len() * 2).max(256);
        }
        let unit = Unit::new();
        self.units.insert(block, Arc::downgrade(&unit));
        unit
    }
}
