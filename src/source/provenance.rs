//! Whether the bytes that a thread read from sources had been kept or came from their place, for counters.
//!
//! An image reader reads tables and data of a source, so the bytes that it returns are not those that the source
//! returned. The thread therefore remembers where the bytes of one piece of work came from.

use std::cell::Cell;

/// Where bytes of a source came from. The later one is the slower one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Provenance {
    /// The persistent cache, or a readahead that came before the reader.
    Kept,
    /// The place of the source: its file or its servers.
    Fetched,
}

thread_local! {
    static SLOWEST: Cell<Option<Provenance>> = const { Cell::new(None) };
}

/// A source calls it when it returns bytes.
pub fn note(provenance: Provenance) {
    SLOWEST.set(SLOWEST.get().max(Some(provenance)));
}

/// Runs `work`, and returns where the slowest of the bytes came from that it read of sources; `None` when it read none.
pub fn observe<T>(work: impl FnOnce() -> T) -> (T, Option<Provenance>) {
    let before = SLOWEST.replace(None);
    let done = work();
    let slowest = SLOWEST.replace(before);
    (done, slowest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slowest_source_of_a_piece_of_work_counts() {
        let kept = || note(Provenance::Kept);
        let fetched = || note(Provenance::Fetched);
        assert_eq!(observe(|| ()).1, None);
        assert_eq!(observe(kept).1, Some(Provenance::Kept));
        let both = || (fetched(), kept());
        assert_eq!(observe(both).1, Some(Provenance::Fetched));
        // Work inside of other work counts for itself only.
        let outer = || {
            kept();
            observe(fetched).1
        };
        assert_eq!(observe(outer), (Some(Provenance::Fetched), Some(Provenance::Kept)));
    }
}
