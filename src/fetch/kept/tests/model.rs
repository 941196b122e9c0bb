//! A model test: random calls on the cache, compared with a set of blocks.

use std::collections::{BTreeSet, HashMap};

use super::*;

#[derive(Default)]
struct Model {
    present: BTreeSet<u64>,
    pinned: bool,
    verified: bool,
}

fn round(seed: u64) {
    let mut rng = Rng::new(seed);
    let medium = SimMedium::new(seed);
    let mut cache = open(&medium);
    let sizes: Vec<u64> = (0..3)
        .map(|_| {
            let blocks = *rng.fork().pick(&[1, 2, 63, 64, 65, 130, 200]);
            blocks * CACHE_BLOCK - *rng.fork().pick(&[0, 1, 511, CACHE_BLOCK - 1])
        })
        .collect();
    let mut models: HashMap<u8, Model> = HashMap::new();
    for step in 0..300 {
        let which = rng.below(3) as u8;
        let source = cache.attach(key(which), sizes[which as usize]);
        let model = models.entry(which).or_default();
        let blocks = source.blocks();
        let first = rng.below(blocks);
        let some = (1 + rng.below(80)).min(blocks - first);
        match rng.below(100) {
            0..40 => {
                put(&source, first, some);
                model.present.extend(first..first + some);
            }
            40..75 => {
                let run = (first..first + some).take_while(|b| model.present.contains(b)).count() as u64;
                assert_eq!(get(&source, first, some), run, "seed {seed} step {step}");
            }
            75..79 => {
                source.evict(EvictReason::Asked);
                (model.present.clear(), model.verified = false).0
            }
            79..81 => {
                cache.remove(&key(which));
                *model = Model::default();
            }
            81..84 => {
                model.pinned = rng.chance(50);
                source.pin(model.pinned);
            }
            84..88 => {
                source.set_verified(true);
                model.verified = model.present.len() as u64 == blocks;
            }
            88..91 => cache.flush().unwrap(),
            91..94 => cache.tick(),
            _ => {
                // As after a kill.
                drop((source, cache));
                cache = open(&medium);
                continue;
            }
        }
        let model = &models[&which];
        assert_eq!(source.contains(first), model.present.contains(&first), "seed {seed} step {step}");
        assert_eq!(source.next_present(first), model.present.range(first..).next().copied());
        let missing = (first..blocks).find(|b| !model.present.contains(b));
        assert_eq!(source.next_missing(first), missing);
        let end = model.present.range(first..).next().copied().unwrap_or(blocks);
        assert_eq!(source.missing_run(first, some), (end - first).min(some), "seed {seed} step {step}");
        assert_eq!(source.present_run(first, some), (missing.unwrap_or(blocks) - first).min(some));
        assert_eq!((source.is_pinned(), source.is_verified()), (model.pinned, model.verified), "seed {seed}");
        let total: u64 = models
            .iter()
            .map(|(which, model)| {
                let size = sizes[*which as usize];
                model.present.iter().map(|b| CACHE_BLOCK.min(size - b * CACHE_BLOCK)).sum::<u64>()
            })
            .sum();
        assert_eq!(cache.stats().used_bytes, total, "seed {seed} step {step}");
    }
    let stats = cache.stats();
    assert_eq!((stats.corrupt_blocks, stats.write_errors, stats.read_errors), (0, 0, 0), "seed {seed}");
    assert_eq!(check(&medium, Checksums::Compare, Repair::No).unwrap(), []);
}

#[test]
fn the_cache_behaves_like_a_set_of_blocks_under_random_calls() {
    for seed in 0..15 {
        round(seed);
    }
}
