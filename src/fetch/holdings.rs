//! Where the blocks of a source behind a network are: cached, under way, or neither.

use super::{CACHE_BLOCK, FetchCache, Shared};
use crate::source::holdings::{HeldRow, Holdings, ROW, UNIT};

const _: () = assert!(UNIT == CACHE_BLOCK && ROW == 64 * CACHE_BLOCK, "a unit is a cache block");

/// The answer of one source. The blocks under way are those of its beginning.
pub(super) struct LazyHoldings<'a> {
    keep: &'a dyn FetchCache,
    /// Ascending.
    fetching: Vec<u64>,
    /// What is not here is in a file of this host.
    copies: bool,
}

impl<'a> LazyHoldings<'a> {
    pub fn of(shared: &'a Shared) -> Self {
        // Only the list is copied under the lock that readers take. Its length is bounded by the bytes in transit.
        let units = shared.table.lock().transit.snapshot();
        let pending =
            units.into_iter().filter(|(_, unit)| unit.upgrade().is_some_and(|unit| unit.is_pending()));
        let mut fetching: Vec<u64> = pending.map(|(block, _)| block).collect();
        fetching.sort_unstable();
        Self { keep: &*shared.kept.keep, fetching, copies: shared.remote.is_local() }
    }

    /// The place in `fetching` of the first block at or after `block`.
    fn place(&self, block: u64) -> usize {
        self.fetching.partition_point(|fetching| *fetching < block)
    }
}

impl Holdings for LazyHoldings<'_> {
    fn rows(&self, first: u64, rows: &mut [HeldRow]) {
        self.keep.hold(first, rows);
        let end = (first + rows.len() as u64) * 64;
        for block in &self.fetching[self.place(first * 64)..self.place(end)] {
            rows[(block / 64 - first) as usize].fetching |= 1 << (block % 64);
        }
        for row in rows {
            row.fetching &= !row.cached;
            if self.copies {
                row.local = !(row.cached | row.fetching | row.unknown);
            }
        }
    }

    fn next(&self, row: u64) -> u64 {
        if self.copies {
            return row;
        }
        let fetching = self.fetching.get(self.place(row * 64)).map(|block| block / 64);
        self.keep.next_held(row).into_iter().chain(fetching).min().unwrap_or(u64::MAX)
    }
}
