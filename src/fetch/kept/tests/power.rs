//! A power cut or a kill at any call of the medium, and again while the next worker runs: no read returns a wrong byte.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;
use crate::io::sim::{Call, Event, Hook, Keep};
use crate::mutant::{Mutant, simulate};

const DEEPEST: u64 = 3;
/// The blocks that the test uses. They are few, because the medium tracks each 64 bytes separately, and lie around the
/// ends of chunks. The last source is small, so that it can be complete.
const BLOCKS: [&[u64]; 3] = [&[0, 1, 2, 62, 63, 64, 128], &[1, 2, 3, 64, 65, 66, 129], &[0, 1, 2, 3]];

fn size(n: u8) -> u64 {
    if n == 2 { 3 * CACHE_BLOCK + 100 } else { 129 * CACHE_BLOCK + 100 }
}

#[derive(Default)]
struct Counts {
    cuts: AtomicU64,
    kills: AtomicU64,
    kept: AtomicU64,
    torn: AtomicU64,
    wrong: AtomicU64,
}

/// The blocks that must be present after a power cut, because a flush succeeded.
type Promised = Arc<Mutex<BTreeSet<(u8, u64)>>>;

/// One worker between two cuts or kills.
struct Life {
    medium: SimMedium,
    promised: Promised,
    counts: Arc<Counts>,
    rng: Mutex<Rng>,
    depth: u64,
    /// The blocks that the power cut before this life tore have been found and dropped.
    surveyed: AtomicBool,
}

fn limits() -> Limits {
    Limits { bytes: Some(12 * CACHE_BLOCK), bases: Some(2), free_floor: 0 }
}

/// Reads all blocks. Returns those with the right bytes, and counts those with wrong bytes, which a mutant causes.
fn survey(cache: &Arc<DiskCache>, counts: &Counts) -> BTreeSet<(u8, u64)> {
    let mut right = BTreeSet::new();
    for n in 0..3 {
        let source = cache.attach(key(n), size(n));
        let verified = source.is_verified();
        for block in BLOCKS[n as usize].iter().copied() {
            let expected = contents(&key(n), size(n), block, 1);
            let mut buf = vec![0xee; expected.len()];
            if source.read(block, &mut buf) == 1 {
                if buf == expected {
                    right.insert((n, block));
                } else {
                    counts.wrong.fetch_add(1, Ordering::Relaxed);
                }
            } else {
                assert!(!verified, "block {block} of a verified source is missing");
            }
        }
    }
    right
}

impl Life {
    fn hook(self: &Arc<Self>) -> Hook {
        let life = Arc::downgrade(self);
        Arc::new(move |event: &Event<'_>| {
            if let Some(life) = life.upgrade() {
                life.at(event);
            }
            Ok(())
        })
    }

    fn at(&self, event: &Event<'_>) {
        if self.depth >= DEEPEST || matches!(event.call, Call::Read | Call::Open) {
            return;
        }
        let mut rng = {
            let mut rng = self.rng.lock();
            let percent = [30, 6, 3][self.depth as usize];
            if !rng.chance(percent) {
                return;
            }
            rng.fork()
        };
        let power = rng.chance(75);
        let (medium, promised) = if power {
            self.counts.cuts.fetch_add(1, Ordering::Relaxed);
            let keep = Keep::any(&mut rng);
            (self.medium.crash(&mut rng, keep), self.promised.lock().clone())
        } else {
            self.counts.kills.fetch_add(1, Ordering::Relaxed);
            (self.medium.fork(), BTreeSet::new())
        };
        let torn = power || !self.surveyed.load(Ordering::Relaxed);
        live(medium, promised, torn, &self.counts, rng, self.depth + 1);
    }
}

fn live(
    medium: SimMedium,
    promised: BTreeSet<(u8, u64)>,
    may_be_torn: bool,
    counts: &Arc<Counts>,
    mut rng: Rng,
    depth: u64,
) {
    if depth > 0 && rng.chance(20) {
        // The offline check first: its repair may be cut too, and must keep sound blocks.
        check(&medium, Checksums::Compare, Repair::Yes).unwrap();
        assert_eq!(check(&medium, Checksums::Compare, Repair::Yes).unwrap(), []);
    }
    let life = Arc::new(Life {
        medium: medium.clone(),
        promised: Promised::default(),
        counts: counts.clone(),
        rng: Mutex::new(rng.fork()),
        depth,
        surveyed: AtomicBool::new(depth == 0),
    });
    *life.promised.lock() = promised.clone();
    medium.set_hook(Some(life.hook()));
    let (cache, observed) = open_with(medium.clone(), limits());
    if depth > 0 {
        let right = survey(&cache, counts);
        counts.kept.fetch_add(right.len() as u64, Ordering::Relaxed);
        let torn = cache.stats().corrupt_blocks;
        counts.torn.fetch_add(torn, Ordering::Relaxed);
        let lost: Vec<_> = promised.difference(&right).collect();
        assert!(lost.is_empty(), "flushed blocks are missing after a power cut: {lost:?}");
        assert!(may_be_torn || torn == 0, "a kill leaves no block that seems damaged");
        life.surveyed.store(true, Ordering::Relaxed);
    }
    for _ in 0..if depth == 0 { 40 } else { 5 } {
        let n = rng.below(3) as u8;
        let source = cache.attach(key(n), size(n));
        let first = *rng.pick(BLOCKS[n as usize]);
        let some = (1 + rng.below(3)).min(source.blocks() - first);
        let what = rng.below(100);
        // An operation that may evict ends the promise before it begins.
        if what < 60 || (75..90).contains(&what) {
            life.promised.lock().clear();
        }
        match what {
            0..60 => put(&source, first, some),
            60..75 => {
                survey(&cache, counts);
            }
            75..78 => {
                source.evict(EvictReason::Asked);
            }
            78..80 => cache.remove(&key(n)),
            80..85 => source.pin(rng.chance(40)),
            85..90 => {
                let source = cache.attach(key(2), size(2));
                put(&source, 0, source.blocks());
                source.set_verified(true);
            }
            90..95 => cache.tick(),
            _ => {
                cache.flush().unwrap();
                let here = (0..3).flat_map(|n| {
                    let source = cache.attach(key(n), size(n));
                    let blocks = BLOCKS[n as usize].iter().copied();
                    blocks.filter(|b| source.contains(*b)).map(|b| (n, b)).collect::<Vec<_>>()
                });
                *life.promised.lock() = here.collect();
            }
        }
    }
    survey(&cache, counts);
    assert_eq!(cache.stats().write_errors, 0);
    assert_eq!(observed.evicted_bytes(EvictReason::ReadError), 0);
    medium.set_hook(None);
}

fn campaign(seeds: std::ops::Range<u64>) -> Arc<Counts> {
    let counts = Arc::new(Counts::default());
    for seed in seeds {
        let before = counts.wrong.load(Ordering::Relaxed);
        live(SimMedium::new(seed), BTreeSet::new(), false, &counts, Rng::new(seed), 0);
        if counts.wrong.load(Ordering::Relaxed) > before {
            break;
        }
    }
    counts
}

#[test]
fn power_cuts_and_kills_leave_no_wrong_byte() {
    let counts = campaign(0..12);
    let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
    eprintln!(
        "{} cuts, {} kills; {} blocks kept, {} torn ones dropped",
        get(&counts.cuts),
        get(&counts.kills),
        get(&counts.kept),
        get(&counts.torn)
    );
    assert_eq!(get(&counts.wrong), 0);
    assert!(get(&counts.cuts) >= 2000, "{} cuts are too few", get(&counts.cuts));
    assert!(get(&counts.torn) > 100, "the cuts tear no block, so the medium is not simulating them");
    assert!(get(&counts.kept) > 1000);
}

#[test]
fn the_campaign_detects_a_cache_that_ignores_checksums() {
    let _simulating = simulate(Some(Mutant::ChecksumIgnored));
    let counts = campaign(0..20);
    assert!(counts.wrong.load(Ordering::Relaxed) > 0);
}
