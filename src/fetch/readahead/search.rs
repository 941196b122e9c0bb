//! The search for the parameters of the policy: simulated annealing over the recorded boots. The tests do not run it;
//! `scripts/search-readahead` does.

use super::link::Replay;
use super::tests::{BOOT, OTHER_BOOT, distinct_blocks, reads};
use super::{BLOCK, NUMBERS, Numbers};

const SMALL: &[u64] = &[0, 1, 2, 3, 4, 6, 8, 12, 16];
const GAP: &[u64] = &[0, 2, 4, 6, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 128, 192];

/// Each parameter, and the values that it may have.
fn dials(numbers: &mut Numbers) -> Vec<(&mut u64, &'static [u64])> {
    let mut dials: Vec<(&mut u64, &'static [u64])> = Vec::new();
    for rule in &mut numbers.rules {
        let super::Rule { longest: _, ahead, dense, density, join, join_now, head, head_gap, follow } = rule;
        dials.push((ahead, SMALL));
        dials.push((dense, &[0, 4, 8, 16, 32, 64]));
        dials.push((density, &[16, 24, 32, 40, 48, 64, 80, 96, 112]));
        dials.extend(join.iter_mut().map(|gap| (gap, GAP)));
        dials.extend(join_now.iter_mut().map(|gap| (gap, GAP)));
        dials.push((head, &[0, 4, 8, 12, 16, 24, 32]));
        dials.push((follow, &[0, 1, 2, 3, 4, 6, 8]));
        dials.push((head_gap, &[48, 64, 96, 128, 192]));
    }
    dials.push((&mut numbers.now, &[1, 2, 3, 4, 6, 8, 12, 16, 24]));
    dials.push((&mut numbers.bridge, SMALL));
    dials.push((&mut numbers.first, &[0, 16, 32, 64, 128]));
    dials.push((&mut numbers.thick, &[24, 28, 32, 36, 40, 45, 51, 58]));
    dials
}

/// Bytes fetched per byte needed, and seconds waited per 40 MiB needed.
fn measure(numbers: Numbers, trace: &[(u64, u64)], shift: u64) -> (f64, f64) {
    let mut replay = Replay::with((2 << 30) / BLOCK + 64, numbers);
    for (offset, length) in trace {
        replay.read_bytes(offset + shift, *length);
    }
    replay.finish();
    let needed = distinct_blocks(trace) as f64;
    (replay.fetched as f64 / needed, replay.waited * 2730.0 / needed)
}

/// The cost to minimise: waiting, and bytes above `budget` times the bytes needed.
fn cost(numbers: Numbers, traces: &[(Vec<(u64, u64)>, u64)], budget: f64) -> f64 {
    let costs = traces.iter().map(|(trace, shift)| {
        let (bytes, waited) = measure(numbers, trace, *shift);
        waited + (bytes - budget).max(0.0) * 50.0
    });
    costs.sum::<f64>() / traces.len() as f64
}

#[test]
#[ignore = "a search, not a test; takes minutes: run scripts/search-readahead"]
fn search_for_numbers() {
    let setting =
        |name: &str, default: f64| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let (steps, budget) = (setting("STEPS", 20_000.0) as u64, setting("BUDGET", 1.28));
    let mut random = (setting("SEED", 1.0) as u64 * 0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let (boot, other) = (reads(BOOT), reads(OTHER_BOOT));
    // One trace is shifted by a fraction of a block, so that the parameters do not depend on block alignment.
    let traces = [(boot.clone(), 0), (boot, 9 * 4096), (other, 0)];
    let mut now = NUMBERS;
    let mut now_cost = cost(now, &traces, budget);
    let (mut best, mut best_cost) = (now, now_cost);
    for step in 0..steps {
        let left = 1.0 - step as f64 / steps as f64;
        let temperature = 0.06 * left * left + 1e-4;
        let mut tried = now;
        for _ in 0..1 + next() % 3 {
            let mut dials = dials(&mut tried);
            let index = next() as usize % dials.len();
            let (dial, values) = &mut dials[index];
            let at = values.iter().position(|value| value == *dial).unwrap_or(0);
            let to = match next() % 4 {
                0 => at + 1,
                1 => at.wrapping_sub(1),
                _ => next() as usize % values.len(),
            };
            if let Some(value) = values.get(to) {
                **dial = *value;
            }
        }
        let tried_cost = cost(tried, &traces, budget);
        let chance = (next() >> 11) as f64 / (1u64 << 53) as f64;
        if tried_cost < now_cost || chance < ((now_cost - tried_cost) / temperature).exp() {
            (now, now_cost) = (tried, tried_cost);
            if now_cost < best_cost {
                (best, best_cost) = (now, now_cost);
            }
        }
    }
    println!("cost {best_cost:.3}\n{best:#?}");
    for (trace, shift) in &traces {
        let (bytes, waited) = measure(best, trace, *shift);
        println!("shift {shift}: {bytes:.3} of the bytes needed, {waited:.2} s waited per 40 MiB");
    }
}
