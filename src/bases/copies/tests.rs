//! Power cuts of the whole host, and kills of the worker, while blocks are copied, copied back and dropped on two drives:
//! no read returns a wrong byte, and a block that was durable in both places survives the loss of either drive.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};

use super::keeper::copy_missing;
use super::*;
use crate::fetch::kept::{CACHE_BLOCK, SharedCopies};
use crate::io::sim::{Call, Event, Hook, Keep, Rng, SimMedium};

/// Few blocks, because the medium tracks each 64 bytes separately, around the end of a chunk and the end of the file.
const BLOCKS: [u64; 7] = [0, 1, 2, 63, 64, 65, 69];
const SIZE: u64 = 69 * CACHE_BLOCK + 100;
const OWN: SourceKey = SourceKey([7; 32]);
const LIMITS: Limits = Limits { bytes: Some(1 << 30), bases: None, free_floor: 0 };

struct Silent;

impl CacheObserver for Silent {
    fn evicted(&self, _: &SourceKey, _: u64, _: EvictReason) {}
    fn degraded(&self, _: Option<&str>) {}
}

/// The bytes of a block, which a drop of the base's blocks replaces.
fn bytes(version: u64, block: u64) -> Vec<u8> {
    let len = CACHE_BLOCK.min(SIZE - block * CACHE_BLOCK) as usize;
    let mut rng = Rng::new(version << 32 | block);
    let mut out: Vec<u8> =
        std::iter::repeat_with(|| rng.number().to_le_bytes()).take(len / 8 + 1).flatten().collect();
    out.truncate(len);
    out
}

/// What is true of the base at a moment.
#[derive(Clone, Default)]
struct Facts {
    /// Version of the contents, and number of the copies in the record.
    number: u64,
    /// Blocks that are durable in both places.
    in_both: BTreeSet<u64>,
}

#[derive(Default)]
struct Counts {
    cuts: AtomicU64,
    kills: AtomicU64,
    survived: AtomicU64,
    from_copy: AtomicU64,
}

/// The cache and the copy.
struct Places {
    caches: [Arc<DiskCache>; 2],
}

impl Places {
    fn open(media: &[SimMedium; 2]) -> Self {
        let open = |medium: &SimMedium| DiskCache::open(Arc::new(medium.clone()), LIMITS, Arc::new(Silent));
        Self { caches: [open(&media[0]), open(&media[1])] }
    }

    fn contents(&self, number: u64) -> [Arc<Contents>; 2] {
        let keys = |own| FileKeys { own, digest: None, size: SIZE };
        let copies = key_of_copies(&OWN, number);
        [self.caches[0].contents(keys(OWN)), self.caches[1].contents(keys(copies))]
    }

    fn flush(&self) {
        self.caches.iter().for_each(|cache| cache.flush().unwrap());
    }
}

fn copy(from: &Contents, to: &Contents) {
    copy_missing(from, to, &mut |first, bytes| {
        to.insert(first, bytes);
        true
    });
}

/// Reads a block from one place; checks its bytes.
fn has(place: &Contents, number: u64, block: u64) -> bool {
    let expected = bytes(number, block);
    let mut found = vec![0xEE; expected.len()];
    let is_here = place.read(block, &mut found, Reach::Proven) == 1;
    assert!(!is_here || found == expected, "block {block} has bytes of another version than {number}");
    is_here
}

/// The next worker after a cut or a kill; one of the drives may be lost for good.
fn survive(media: &[SimMedium; 2], facts: &Facts, lost: Option<usize>, counts: &Counts) {
    let places = Places::open(media);
    if let Some(lost) = lost {
        places.caches[lost].sources().iter().for_each(|source| places.caches[lost].remove(source.key()));
    }
    let [cache, copied] = places.contents(facts.number);
    for block in BLOCKS {
        let in_cache = has(&cache, facts.number, block);
        let in_copy = has(&copied, facts.number, block);
        let is_promised = facts.in_both.contains(&block);
        assert!(in_cache || in_copy || !is_promised, "block {block} was durable in both places");
        counts.survived.fetch_add(u64::from(is_promised), Ordering::Relaxed);
        counts.from_copy.fetch_add(u64::from(!in_cache && in_copy), Ordering::Relaxed);
    }
    copy(&copied, &cache);
    copy(&cache, &copied);
    for block in BLOCKS {
        let both = (has(&cache, facts.number, block), has(&copied, facts.number, block));
        assert_eq!(both.0, both.1, "block {block} after both places were compared");
    }
}

fn hook(media: &[SimMedium; 2], facts: &Arc<Mutex<Facts>>, counts: &Arc<Counts>, seed: u64) -> Hook {
    let (media, facts, counts) = (media.clone(), facts.clone(), counts.clone());
    let rng = Mutex::new(Rng::new(seed));
    Arc::new(move |event: &Event<'_>| {
        let mut rng = {
            let mut rng = rng.lock();
            if matches!(event.call, Call::Read | Call::Open) || !rng.chance(8) {
                return Ok(());
            }
            rng.fork()
        };
        let mut facts = facts.lock().clone();
        let after = if rng.chance(75) {
            counts.cuts.fetch_add(1, Ordering::Relaxed);
            let mut cut = |medium: &SimMedium| {
                let keep = Keep::any(&mut rng);
                medium.crash(&mut rng, keep)
            };
            [cut(&media[0]), cut(&media[1])]
        } else {
            counts.kills.fetch_add(1, Ordering::Relaxed);
            [media[0].fork(), media[1].fork()]
        };
        let lost = rng.chance(50).then(|| rng.below(2) as usize);
        if lost.is_none() && rng.chance(30) {
            // Nothing is promised of what was never synced.
            facts.in_both.clear();
        }
        survive(&after, &facts, lost, &counts);
        Ok(())
    })
}

fn life(seed: u64, counts: &Arc<Counts>) {
    let mut rng = Rng::new(seed);
    let media = [SimMedium::new(seed), SimMedium::new(seed + 1000)];
    let facts = Arc::new(Mutex::new(Facts { number: 1, ..Facts::default() }));
    let places = Places::open(&media);
    for (at, medium) in media.iter().enumerate() {
        medium.set_hook(Some(hook(&media, &facts, counts, seed * 2 + at as u64)));
    }
    let mut is_away = false;
    for _ in 0..60 {
        let number = facts.lock().number;
        let [cache, copied] = places.contents(number);
        match rng.below(100) {
            0..40 => {
                let block = *rng.pick(&BLOCKS);
                cache.insert(block, &bytes(number, block));
            }
            40..60 if !is_away => copy(&cache, &copied),
            60..65 if !is_away => copy(&copied, &cache),
            65..75 if !is_away => {
                copy(&cache, &copied);
                places.flush();
                let both =
                    BLOCKS.into_iter().filter(|block| cache.contains(*block) && copied.contains(*block));
                facts.lock().in_both = both.collect();
            }
            75..83 => {
                // The drive of the cache loses its files.
                facts.lock().in_both.clear();
                places.caches[0].remove(&OWN);
            }
            83..88 => {
                facts.lock().in_both.clear();
                cache.evict(EvictReason::Asked, SharedCopies::Drop);
                // The test's bytes differ before and after, so a block that comes back after a cut would show.
                places.caches[0].flush().unwrap();
                facts.lock().number += 1;
            }
            88..92 => {
                facts.lock().in_both.clear();
                is_away = !is_away;
            }
            92..95 if !is_away => {
                let key = key_of_copies(&OWN, number);
                let sources = places.caches[1].sources();
                let strays = sources.iter().filter(|source| *source.key() != key);
                strays.for_each(|source| places.caches[1].remove(source.key()));
            }
            _ => places.caches.iter().for_each(|cache| cache.tick()),
        }
    }
    media.iter().for_each(|medium| medium.set_hook(None));
    survive(&media, &facts.lock(), None, counts);
}

/// Guards D101, D102.
#[test]
fn power_cuts_and_lost_drives_leave_no_wrong_byte_and_no_loss_of_what_both_had() {
    let counts = Arc::new(Counts::default());
    (0..60).for_each(|seed| life(seed, &counts));
    let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
    let (cuts, kills) = (get(&counts.cuts), get(&counts.kills));
    let (survived, from_copy) = (get(&counts.survived), get(&counts.from_copy));
    eprintln!(
        "{cuts} cuts, {kills} kills; {survived} promised blocks, {from_copy} blocks that only the copy had"
    );
    assert!(cuts >= 500, "{cuts} cuts are too few");
    assert!(survived > 100 && from_copy > 100, "the cuts hit no moment at which a copy matters");
}

#[test]
fn files_are_spread_over_pools_and_stay_where_they_are_when_another_pool_comes() {
    let order = |own: u8, pools: &[u64]| -> Vec<u64> {
        let mut pools = pools.to_vec();
        pools.sort_by_cached_key(|pool| rank(&SourceKey([own; 32]), *pool));
        pools
    };
    let firsts: BTreeSet<u64> = (0..50).map(|own| order(own, &[3, 4, 5])[0]).collect();
    assert_eq!(firsts.len(), 3);
    for own in 0..50 {
        let before = order(own, &[3, 4, 5]);
        let mut after = order(own, &[3, 4, 5, 6]);
        after.retain(|pool| *pool != 6);
        assert_eq!(before, after);
    }
}
