//! All counters of one kind: those of the disks, or those of the bases.
//!
//! A time series for each disk would have no bound, so only the first disks that are used have series of their own; the
//! others are summed. A disk never changes between the two, because a sum that loses a disk decreases.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::counters::{Cells, Counters, Sums};

/// Whether a disk or base has time series of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Series {
    /// Its own.
    Own,
    /// The sum of all that have none of their own.
    Other,
}

/// See the module.
#[derive(Clone)]
pub struct Registry(Arc<Shared>);

/// The counters of one disk or base.
#[derive(Clone, Debug)]
pub struct Counted {
    /// Number of the disk or base.
    pub id: u64,
    pub series: Series,
    pub sums: Sums,
}

/// The counters of one disk or base, to be read.
struct Live {
    id: u64,
    series: Series,
    cells: Arc<Cells>,
}

impl Live {
    fn counted(self) -> Counted {
        Counted { id: self.id, series: self.series, sums: self.cells.sums() }
    }
}

/// A moment of a registry.
struct Snapshot {
    live: Vec<Live>,
    removed: Sums,
    removed_others: Sums,
}

pub(super) struct Shared(Mutex<State>);

struct State {
    /// Most that have series of their own.
    limit: usize,
    own: usize,
    live: BTreeMap<u64, (Arc<Cells>, Series)>,
    /// All that were removed.
    removed: Sums,
    /// Those that were removed and had no series of their own.
    removed_others: Sums,
}

impl Default for Registry {
    fn default() -> Self {
        let (removed, removed_others) = (Sums::default(), Sums::default());
        let state = State { limit: usize::MAX, own: 0, live: BTreeMap::new(), removed, removed_others };
        Self(Arc::new(Shared(Mutex::new(state))))
    }
}

impl Registry {
    /// Sets how many have time series of their own. Those that have some keep them.
    pub fn limit_series(&self, limit: usize) {
        self.0.0.lock().limit = limit;
    }

    /// New counters for the disk or base with this number, which has none.
    pub fn add(&self, id: u64) -> Counters {
        let cells = Arc::new(Cells::default());
        let mut state = self.0.0.lock();
        let series = if state.own < state.limit { Series::Own } else { Series::Other };
        state.own += usize::from(series == Series::Own);
        state.live.insert(id, (cells.clone(), series));
        Counters::new(cells, id, series, self.0.clone())
    }

    /// The counters of all that were used and not removed, by number.
    pub fn all(&self) -> Vec<Counted> {
        self.snapshot().live.into_iter().map(Live::counted).collect()
    }

    /// The counters of those that have series of their own, by number.
    pub fn own(&self) -> Vec<Counted> {
        let live = self.snapshot().live.into_iter();
        live.filter(|live| live.series == Series::Own).map(Live::counted).collect()
    }

    /// The sums of all, and of those that have no series of their own. Both include what was removed.
    pub fn totals(&self) -> (Sums, Sums) {
        let Snapshot { live, removed: mut all, removed_others: mut others } = self.snapshot();
        for Live { cells, series, .. } in live {
            let sums = cells.sums();
            all.join(&sums);
            if series == Series::Other {
                others.join(&sums);
            }
        }
        (all, others)
    }

    /// The cells of all. They are read outside of the lock, for which the first request of each disk waits. One that is
    /// removed meanwhile is not in the sums of the removed ones yet, so each counts once.
    fn snapshot(&self) -> Snapshot {
        let state = self.0.0.lock();
        let live = state.live.iter().map(|(id, (cells, series))| Live {
            id: *id,
            series: *series,
            cells: cells.clone(),
        });
        let (removed, removed_others) = (state.removed.clone(), state.removed_others.clone());
        Snapshot { live: live.collect(), removed, removed_others }
    }
}

impl Shared {
    pub fn remove(&self, id: u64, cells: &Arc<Cells>, series: Series) {
        let mut state = self.0.lock();
        // No thread counts any more: the caller is the last holder.
        let sums = cells.sums();
        state.removed.join(&sums);
        match series {
            Series::Own => state.own -= 1,
            Series::Other => state.removed_others.join(&sums),
        }
        if state.live.get(&id).is_some_and(|(live, _)| Arc::ptr_eq(live, cells)) {
            state.live.remove(&id);
        }
    }
}
