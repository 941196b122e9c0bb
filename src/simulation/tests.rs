//! The short campaign, and the proof that it catches what it is for.

use std::time::{Duration, Instant};

use super::*;
use crate::cache::BlockCache;
use crate::disk::Grow;
use crate::io::sim::{Event, Keep, SimLive, SimMedium};
use crate::sabotage::{ALL, Sabotage, simulate};
use crate::source::OpenHere;
use crate::store::{NewDisk, Replace, Store};

fn campaign() -> (tempfile::TempDir, Arc<Campaign>) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let campaign = Campaign::new(dir.path()).unwrap();
    (dir, campaign)
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}: {text:?}")))
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

/// Guards D9, D12, D14.
#[test]
fn power_loss_keeps_what_was_flushed() {
    let since = Instant::now();
    let (_dir, campaign) = campaign();
    let (cuts, seed) = (number("PLYFS_POWER_CUTS", 3000), number("PLYFS_POWER_SEED", 1));
    let seconds = Duration::from_secs(number("PLYFS_POWER_SECONDS", 3600));
    let _small = simulate(None);
    let done =
        || campaign.counts.cuts.load(Ordering::Relaxed) + campaign.counts.nested.load(Ordering::Relaxed);
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

/// A seed whose history is likely to meet the fault soon. Only saves time: later seeds follow.
fn likely(fault: Sabotage) -> u64 {
    match fault {
        Sabotage::ChecksumIgnored | Sabotage::WordsNotGivenBack | Sabotage::RecordPurgedFirst => 2,
        Sabotage::GrowthNotCut | Sabotage::NamesNotSettled => 4,
        Sabotage::LostNotRedone => 24,
        Sabotage::CopyNotRedone => 8,
        _ => 1,
    }
}

/// Histories with a deliberate fault, or none, until a violation: the message, or `None` after so many cuts.
fn catch(fault: Option<Sabotage>, limit: u64) -> Option<String> {
    let (_dir, campaign) = campaign();
    let _faulty = simulate(fault);
    let in_threads = matches!(
        fault,
        Some(Sabotage::NoteClearedFirst | Sabotage::SizeAfterWords | Sabotage::ShrinkNotAlone)
    );
    let seed = number("PLYFS_POWER_SEED", fault.map_or(1, likely));
    let cuts =
        || campaign.counts.cuts.load(Ordering::Relaxed) + campaign.counts.nested.load(Ordering::Relaxed);
    (seed..).take_while(|_| cuts() < limit).find_map(|seed| {
        let result = if in_threads { campaign.crowd(seed, fault) } else { campaign.history(seed) };
        let message = result.err()?;
        Some(format!("after {} cuts, {}", cuts(), message.lines().next().unwrap_or_default()))
    })
}

#[test]
fn every_deliberate_fault_is_caught() {
    // The same seeds find nothing without a fault, so that what is found below is the fault's.
    let (_dir, control) = campaign();
    let guard = simulate(None);
    for seed in [1, 2, 4, 8, 24] {
        assert_eq!(control.history(seed), Ok(()));
        assert_eq!(control.crowd(seed, None), Ok(()));
    }
    drop(guard);
    let mut missed = Vec::new();
    for fault in ALL {
        match catch(Some(fault), number("PLYFS_POWER_PROVE_CUTS", 60_000)) {
            Some(message) => println!("{fault:?}: caught {message}"),
            None => missed.push(fault),
        }
    }
    assert!(missed.is_empty(), "not caught: {missed:?}");
}

const NOTHING: Keep = Keep { sectors: 0, lengths: 0, entries: 0, stale: false };

fn open(medium: &SimMedium) -> Result<Store, crate::store::StoreError> {
    let live = Arc::new(SimLive::default());
    Store::open_on(
        Arc::new(medium.clone()),
        |_| Ok(live),
        Arc::new(BlockCache::new(1 << 20).unwrap()),
        Some(0),
        Arc::new(OpenHere),
    )
}

/// What is on the medium at each call while `act` runs.
fn forks(medium: &SimMedium, act: impl FnOnce()) -> Vec<SimMedium> {
    let seen: Arc<Mutex<Vec<SimMedium>>> = Arc::default();
    let (log, source) = (seen.clone(), medium.clone());
    medium.set_hook(Some(Arc::new(move |_: &Event<'_>| {
        log.lock().push(source.fork());
        Ok(())
    })));
    act();
    medium.set_hook(None);
    std::mem::take(&mut *seen.lock())
}

fn blank(name: &str) -> NewDisk {
    NewDisk { name: name.into(), base: None, size: Some(8192), mode: 0o600, uid: 0, gid: 0 }
}

#[test]
fn a_store_that_was_being_made_when_power_went_can_be_made() {
    let medium = SimMedium::new(1);
    let forks = forks(&medium, || drop(open(&medium).unwrap()));
    for (no, fork) in forks.iter().enumerate() {
        for seed in 0..40 {
            let mut rng = Rng::new(seed);
            let keep = Keep { sectors: 50, lengths: 50, entries: 50, stale: false };
            let result = open(&fork.crash(&mut rng, keep));
            assert!(result.is_ok(), "call {no}, seed {seed}: {:?}", result.err());
        }
    }
}

/// Guards D14.
#[test]
fn what_a_dead_worker_renamed_is_durable_before_anybody_is_told() {
    let medium = SimMedium::new(1);
    let store = open(&medium).unwrap();
    store.create_disks(&[blank("a")]).unwrap();
    for fork in forks(&medium, || drop(store.rename("a", "b", Replace::Yes).unwrap())) {
        // The next worker opens the store; a rename that is sent again is done when the new name is there.
        let store = open(&fork).unwrap();
        let told = store.disk("b").is_ok();
        let after = open(&fork.crash(&mut Rng::new(1), NOTHING)).unwrap();
        assert_eq!(after.disk("b").is_ok(), told);
        assert_eq!(after.disk("a").is_ok(), !told);
    }
}

#[test]
fn a_flush_of_the_next_worker_is_not_lost_with_the_record_of_the_dead_one() {
    let _small = simulate(None);
    let medium = SimMedium::new(1);
    let live = Arc::new(SimLive::default());
    let on = |medium: &SimMedium, live: Arc<SimLive>| {
        Store::open_on(
            Arc::new(medium.clone()),
            |_| Ok(live),
            Arc::new(BlockCache::new(1 << 20).unwrap()),
            Some(0),
            Arc::new(OpenHere),
        )
        .unwrap()
    };
    let store = on(&medium, live.clone());
    store.create_disks(&[blank("a")]).unwrap();
    let node = store.disk("a").unwrap();
    let disk = node.attach().unwrap();
    disk.write(0, &[1; 4096], 0).unwrap();
    // The flush writes the first map file: its root may be in place and not durable.
    for fork in forks(&medium, || disk.flush(0).unwrap()) {
        let store = on(&fork, Arc::new(live.fork().unwrap()));
        let node = store.disk("a").unwrap();
        let disk = node.attach().unwrap();
        disk.write(4096, &[2; 4096], 0).unwrap();
        disk.flush(0).unwrap();
        let after = on(&fork.crash(&mut Rng::new(1), NOTHING), Arc::default());
        let node = after.disk("a").unwrap();
        let mut bytes = [0; 8192];
        node.attach().unwrap().read(0, &mut bytes).unwrap();
        assert_eq!((bytes[0], bytes[4096]), (1, 2));
    }
}

// The stop looked whether the disk's map was sound before it removed the stray of a flush that power cut off. That wrote
// a map, under the stray's number, and the stop removed it: all that had been flushed was gone.
#[test]
fn a_stop_after_a_power_cut_keeps_the_map_that_it_writes_itself() {
    let _small = simulate(None);
    let all = Keep { sectors: 100, lengths: 100, entries: 100, stale: false };
    let medium = SimMedium::new(1);
    let store = open(&medium).unwrap();
    store.create_disks(&[blank("a")]).unwrap();
    let node = store.disk("a").unwrap();
    let disk = node.attach().unwrap();
    disk.grow(20_000, Grow::Yes).unwrap();
    disk.write(16_384, &[1; 3616], 0).unwrap();
    for fork in forks(&medium, || disk.flush(0).unwrap()) {
        // The disk is not used.
        let medium = fork.crash(&mut Rng::new(1), all);
        open(&medium).unwrap().close().unwrap();
        let store = open(&medium).unwrap();
        store.disk("a").unwrap().attach().unwrap();
    }
}
