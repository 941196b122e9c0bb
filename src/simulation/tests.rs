//! The short campaign, and the proof that it catches what it is for.

use std::time::{Duration, Instant};

use super::*;
use crate::sabotage::{ALL, Sabotage, simulate};

fn campaign() -> (tempfile::TempDir, Arc<Campaign>) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let campaign = Campaign::new(dir.path()).unwrap();
    (dir, campaign)
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}: {text:?}")))
}

fn show(campaign: &Campaign, since: Instant) {
    let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let c = &campaign.counts;
    println!(
        "histories {} with-threads {} operations {} cuts {} nested {} worker-deaths {} faults {} checks {} repairs {} seconds {:.0}",
        get(&c.histories),
        get(&c.crowds),
        get(&c.operations),
        get(&c.cuts),
        get(&c.nested),
        get(&c.workers),
        get(&c.faults),
        get(&c.checks),
        get(&c.repairs),
        since.elapsed().as_secs_f64()
    );
}

#[test]
fn flushed_data_survives_a_power_cut_at_any_point() {
    let since = Instant::now();
    let (_dir, campaign) = campaign();
    let (cuts, seed) = (number("PLYFS_POWER_CUTS", 3000), number("PLYFS_POWER_SEED", 1));
    let seconds = Duration::from_secs(number("PLYFS_POWER_SECONDS", 3600));
    let _small = simulate(None);
    let done = || campaign.counts.cuts.load(Ordering::Relaxed) + campaign.counts.nested.load(Ordering::Relaxed);
    let mut last = Instant::now();
    for seed in seed.. {
        if done() >= cuts || since.elapsed() > seconds {
            break;
        }
        let result = if seed % 8 == 7 { campaign.crowd(seed, None) } else { campaign.history(seed) };
        if let Err(violation) = result {
            show(&campaign, since);
            panic!("violation with {violation}");
        }
        if last.elapsed() > Duration::from_secs(10) {
            show(&campaign, since);
            last = Instant::now();
        }
    }
    show(&campaign, since);
}

/// Histories with a deliberate fault until one is caught: the message, or `None` after so many cuts.
fn catch(fault: Sabotage, limit: u64) -> Option<String> {
    let (_dir, campaign) = campaign();
    let _faulty = simulate(Some(fault));
    let seed = number("PLYFS_POWER_SEED", 1);
    let cuts = || campaign.counts.cuts.load(Ordering::Relaxed) + campaign.counts.nested.load(Ordering::Relaxed);
    (seed..).take_while(|_| cuts() < limit).find_map(|seed| {
        let message = campaign.crowd(seed, Some(fault)).and_then(|()| campaign.history(seed)).err()?;
        Some(format!("after {} cuts, {}", cuts(), message.lines().next().unwrap_or_default()))
    })
}

#[test]
fn every_deliberate_fault_is_caught() {
    let mut missed = Vec::new();
    for fault in ALL {
        match catch(fault, number("PLYFS_POWER_PROVE_CUTS", 60_000)) {
            Some(message) => println!("{fault:?}: caught {message}"),
            None => missed.push(fault),
        }
    }
    assert!(missed.is_empty(), "not caught: {missed:?}");
}
