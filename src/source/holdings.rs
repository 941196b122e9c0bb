//! Where the bytes of a source are, for the maps that operators look at.
//!
//! What must hold: an answer starts no fetch and waits for no server. It holds a lock that a reader takes for a bounded
//! number of units only. It is a snapshot of a moment: bytes come and go meanwhile.

use super::{Completion, SourceError};

/// Bytes of a unit.
pub const UNIT: u64 = 16 << 10;
/// Bytes of a row: 64 units, one bit each.
pub const ROW: u64 = 64 * UNIT;

/// Where the units of a row are, a bit for each. A unit without a bit must be fetched before it can be read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HeldRow {
    /// The image says that they are zeros.
    pub zero: u64,
    /// In a file of this host.
    pub local: u64,
    /// In the persistent cache.
    pub cached: u64,
    /// Requested from a server.
    pub fetching: u64,
    /// It cannot be told without a fetch.
    pub unknown: u64,
}

/// The answer of one source, or of a whole base.
pub trait Holdings {
    /// Where the rows from `first` on are. The elements of `rows` are empty before the call.
    fn rows(&self, first: u64, rows: &mut [HeldRow]);

    /// The first row at or after `row` that may have a unit that need not be fetched. Past the end: any number.
    fn next(&self, row: u64) -> u64 {
        row
    }

    /// Whether all of it is in files of this host.
    fn is_local(&self) -> bool {
        false
    }
}

/// All bytes are in a file of this host.
pub struct AllLocal;

impl Holdings for AllLocal {
    fn rows(&self, _first: u64, rows: &mut [HeldRow]) {
        rows.iter_mut().for_each(|row| row.local = u64::MAX);
    }

    fn is_local(&self) -> bool {
        true
    }
}

thread_local! {
    static BARRED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Runs `work` without any fetch: a read of bytes that are not here fails with `NotHere` at once.
pub fn without_fetches<T>(work: impl FnOnce() -> T) -> T {
    /// Restores the state of before, also when `work` panics.
    struct Before(bool);
    impl Drop for Before {
        fn drop(&mut self) {
            BARRED.set(self.0);
        }
    }
    let _before = Before(BARRED.replace(true));
    work()
}

/// Whether this thread runs under [`without_fetches`].
pub fn fetches_are_barred() -> bool {
    BARRED.get()
}

/// The error for bytes that are not fetched, because [`without_fetches`] bars that.
pub fn not_fetched(object: String) -> SourceError {
    let (completer, completion) = Completion::new();
    drop(completer);
    SourceError::not_here(object, completion)
}
