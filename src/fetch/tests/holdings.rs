//! Maps of sources that are fetched.

use super::*;
use crate::source::holdings::{ROW, not_fetched, without_fetches};

/// Cached and requested blocks of the whole source.
fn bits(source: &LazySource) -> (Vec<u64>, Vec<u64>) {
    let mut rows = vec![HeldRow::default(); source.size().div_ceil(ROW) as usize];
    source.holdings().rows(0, &mut rows);
    let list = |of: fn(&HeldRow) -> u64| {
        let blocks =
            (0..).zip(&rows).flat_map(|(no, row)| (0..64).map(move |at| (no * 64 + at, of(row) & 1 << at)));
        blocks.filter(|(_, bit)| *bit != 0).map(|(block, _)| block).collect()
    };
    (list(|row| row.cached), list(|row| row.fetching))
}

/// Guards D71.
#[test]
fn a_map_shows_what_is_cached_and_what_is_under_way_and_requests_nothing() {
    let server = Server::new(4 << 20, 16 << 10);
    let cache = Arc::new(MemoryCache::default());
    cache.insert(70, &vec![0; 2 * CACHE_BLOCK as usize]);
    let source = lazy(&server, cache);
    assert_eq!(bits(&source), (vec![70, 71], vec![]));
    server.set_open(false);
    let completion =
        source.prefetch(&[(3 * CACHE_BLOCK, 2 * CACHE_BLOCK)], Purpose::Prefetch).expect("under way");
    assert_eq!(bits(&source), (vec![70, 71], vec![3, 4]));
    let asked = server.requests();
    let mut buf = vec![0; CACHE_BLOCK as usize];
    let read = without_fetches(|| source.read_at(&mut buf, 128 * CACHE_BLOCK));
    assert_eq!(read.expect_err("it is not here").kind(), SourceErrorKind::NotHere);
    without_fetches(|| source.announce(&[(128 * CACHE_BLOCK, CACHE_BLOCK)]));
    without_fetches(|| source.read_at(&mut buf, 70 * CACHE_BLOCK)).expect("it is cached");
    let held = source.holdings();
    assert_eq!((held.next(0), held.next(1), held.next(2)), (0, 1, u64::MAX));
    assert_eq!(server.requests(), asked, "a map has requested something");
    drop((held, completion));
    server.set_open(true);
}

#[test]
fn what_is_barred_can_be_read_again_at_once() {
    let error = not_fetched("http://server/image".into());
    assert!(error.completion().expect("it waits for nothing").is_complete());
}
