//! Cache blocks between the network and the cache: under way, or here and still held by somebody.
//!
//! What must hold:
//! - A block is fetched once, however many ask for it: who comes later finds it here and waits for the same bytes (D40).
//! - A block leaves the table only when nobody holds it: the fetch that brings it, the writer that puts it into the
//!   cache, or a reader's [`Arrival`]. So a reader that comes back for what it waited for finds it, or why it failed.
//! - Nobody is called back under a lock.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::Mutex;

use super::Shared;
use crate::source::{Arrival, Arrived, SourceError};

/// One cache block under way.
pub(super) struct Unit {
    state: Mutex<State>,
}

enum State {
    /// Those who wait for it: an arrival happens when the last of its blocks lets go of it. `read`: since when a reader
    /// is among them.
    Coming {
        waiters: Vec<Arc<Arrived>>,
        read: Option<Instant>,
    },
    Here {
        bytes: Arc<[u8]>,
        awaited: bool,
    },
    Failed(SourceError),
    /// It did not come, and no reader waited for it: as if it had never been asked for.
    Abandoned,
}

/// What a reader finds.
pub(super) enum Found {
    Coming,
    /// `awaited`: somebody waited for it.
    Here {
        bytes: Arc<[u8]>,
        awaited: bool,
    },
    Failed(SourceError),
}

impl Unit {
    fn new() -> Arc<Self> {
        Arc::new(Self { state: Mutex::new(State::Coming { waiters: Vec::new(), read: None }) })
    }

    pub fn find(&self) -> Found {
        match &*self.state.lock() {
            // Nobody gets hold of an abandoned one any more ([`Transit::get`]); who had it waits for nothing.
            State::Coming { .. } | State::Abandoned => Found::Coming,
            State::Here { bytes, awaited } => Found::Here { bytes: bytes.clone(), awaited: *awaited },
            State::Failed(error) => Found::Failed(error.clone()),
        }
    }

    /// Lets go of `waiter` when it is here.
    fn wait(&self, waiter: Arc<Arrived>, who: Who) {
        let mut gone = Vec::new();
        if let State::Coming { waiters, read } = &mut *self.state.lock() {
            // Readers that went away are forgotten when the list is about to grow: it is at most twice as long as
            // there are readers that wait.
            if waiters.len() == waiters.capacity() {
                gone = waiters.extract_if(.., |waiter| !waiter.is_awaited()).collect();
            }
            waiters.push(waiter);
            if who == Who::Reader {
                read.get_or_insert_with(Instant::now);
            }
        }
        // Without the lock: this may run what was to happen then.
        drop(gone);
    }

    fn settle(&self, state: impl FnOnce(bool) -> State) {
        let before = {
            let mut now = self.state.lock();
            let State::Coming { read, .. } = &*now else { return };
            let state = state(read.is_some());
            std::mem::replace(&mut *now, state)
        };
        // Without the lock: this may run the readers' next try.
        drop(before);
    }

    pub fn arrived(&self, bytes: Arc<[u8]>) {
        self.settle(|awaited| State::Here { bytes, awaited });
    }

    pub fn failed(&self, error: SourceError) {
        self.settle(|_| State::Failed(error));
    }

    /// It will not come, whether or not a reader waited for it once.
    pub fn drop_it(&self) {
        self.settle(|_| State::Abandoned);
    }

    /// It will not come, unless a reader waits for it. Returns since when one does.
    #[must_use]
    pub fn abandon(&self) -> Option<Instant> {
        let before = {
            let mut now = self.state.lock();
            match &*now {
                State::Coming { read: Some(since), .. } => return Some(*since),
                State::Coming { .. } => std::mem::replace(&mut *now, State::Abandoned),
                _ => return None,
            }
        };
        drop(before);
        None
    }
}

/// Who waits.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Who {
    /// Somebody who has to have it.
    Reader,
    /// Somebody who would like to have it here.
    Other,
}

/// Blocks that are held for a reader, or for others.
struct Held {
    units: Vec<Arc<Unit>>,
    source: Weak<Shared>,
}

impl Drop for Held {
    fn drop(&mut self) {
        if self.units.iter().any(|unit| matches!(&*unit.state.lock(), State::Coming { .. })) {
            // Its owner went away before they came.
            self.units.clear();
            if let Some(source) = self.source.upgrade() {
                source.reader_left();
            }
        }
    }
}

/// An arrival that has happened when each of `units` is here or will not come. It holds them.
pub(super) fn arrival_of(source: &Arc<Shared>, units: Vec<Arc<Unit>>, who: Who) -> Arrival {
    let (arrived, arrival) = Arrival::new();
    let arrived = Arc::new(arrived);
    for unit in &units {
        unit.wait(arrived.clone(), who);
    }
    drop(arrived);
    arrival.keeping(Arc::new(Held { units, source: Arc::downgrade(source) }))
}

/// The blocks of one source that are in transit.
#[derive(Default)]
pub(super) struct Transit {
    units: HashMap<u64, Weak<Unit>>,
    /// How many entries there may be before those that nobody holds are dropped.
    sweep_at: usize,
}

impl Transit {
    pub fn get(&self, block: u64) -> Option<Arc<Unit>> {
        let unit = self.units.get(&block)?.upgrade()?;
        let abandoned = matches!(&*unit.state.lock(), State::Abandoned);
        (!abandoned).then_some(unit)
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
