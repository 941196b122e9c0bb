//! Where power is cut, and what `plyfs check` says of what is left.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Counts;
use super::model::Survived;
use super::world::{Watch, World};
use crate::check::{Finding, Repair, Report, VerifyBases, run_through};
use crate::io::sim::{Call, Event, Keep, Rng, SimLive, SimMedium};
use crate::io::{HostMedium, Medium, MediumFile, Open, Space};

/// Cuts are cut again this often.
pub(super) const DEEPEST: u32 = 3;

/// Called for every call of the medium: power may go, or the worker may die.
pub(super) fn at(watch: &Watch, event: &Event<'_>) {
    if watch.depth >= DEEPEST || matches!(event.call, Call::Read | Call::Open) {
        return;
    }
    let sync_point = matches!(event.call, Call::SyncData | Call::SyncDir | Call::Rename);
    let percent = match (watch.depth, sync_point) {
        (0, true) => 100,
        (0, false) => 12,
        (1, true) => 12,
        (1, false) => 3,
        (_, true) => 8,
        _ => 1,
    };
    let mut rng = {
        let mut rng = watch.rng.lock();
        if !rng.chance(percent) {
            return;
        }
        rng.fork()
    };
    let counts = &watch.campaign.counts;
    // With several threads a worker's memory cannot be copied at one moment.
    let what = if watch.crowded || rng.chance(85) { Survived::Power } else { Survived::Worker };
    // Held while the medium is cut: what is acknowledged after that is not expected of it.
    let model = watch.model.lock();
    let (medium, live) = match what {
        Survived::Power => {
            Counts::add(if watch.depth == 0 { &counts.cuts } else { &counts.nested });
            let keep = Keep::any(&mut rng);
            (watch.medium.crash(&mut rng, keep), SimLive::default())
        }
        Survived::Worker => {
            Counts::add(&counts.workers);
            match watch.live.fork() {
                Ok(live) => (watch.medium.fork(), live),
                Err(e) => {
                    drop(model);
                    watch.violated(&format!("no memory for live maps: {e}"));
                    return;
                }
            }
        }
    };
    let note =
        format!("  {what:?} cut at depth {}: {:?} {:?} {}", watch.depth, event.stage, event.call, event.name);
    let mut later = model.clone();
    drop(model);
    later.log.push(note);
    World::later_life(watch, later, medium, live, what, rng);
}

/// A store's files in a directory of the host: what the check reads.
struct Mirror {
    root: PathBuf,
}

impl Mirror {
    fn new(watch: &Watch) -> io::Result<Self> {
        let name = format!("store-{:?}-{}", std::thread::current().id(), watch.depth);
        let root = watch.campaign.dir.join(name);
        if root.exists() {
            fs::remove_dir_all(&root)?;
        }
        fs::create_dir(&root)?;
        for dir in watch.medium.dirs() {
            fs::create_dir(root.join(dir))?;
        }
        for (name, len, bytes) in watch.medium.files() {
            match bytes {
                Some(bytes) => fs::write(root.join(&name), bytes)?,
                // The check asks whether it has data, not which.
                None => {
                    let mut file = fs::File::create(root.join(&name))?;
                    file.write_all(&[0])?;
                    file.set_len(len)?;
                }
            }
        }
        Ok(Self { root })
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

/// Changes go to the host, where the check reads, and to the simulation, where they are cut.
struct Both {
    host: HostMedium,
    simulated: SimMedium,
}

struct BothFiles(Arc<dyn MediumFile>, Arc<dyn MediumFile>);

impl Medium for Both {
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn MediumFile>> {
        Ok(Arc::new(BothFiles(self.host.open(name, how)?, self.simulated.open(name, how)?)))
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.host.rename(from, to)?;
        self.simulated.rename(from, to)
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.host.remove(name)?;
        self.simulated.remove(name)
    }
    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        self.simulated.sync_dir(dir)
    }
    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        self.host.list(dir)
    }
    fn make_dir(&self, dir: &str) -> io::Result<()> {
        self.host.make_dir(dir)?;
        self.simulated.make_dir(dir)
    }
    fn never_waits(&self) -> bool {
        true
    }
    fn space(&self) -> io::Result<Space> {
        self.host.space()
    }
    fn root(&self) -> PathBuf {
        self.host.root()
    }
}

impl MediumFile for BothFiles {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buf, offset)
    }
    fn read_now(&self, buf: &mut [u8], offset: u64) -> io::Result<Option<usize>> {
        self.0.read_now(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(buf, offset)?;
        self.1.write_at(buf, offset)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.1.sync_data()
    }
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)?;
        self.1.set_len(len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.punch(offset, len)?;
        self.1.punch(offset, len)
    }
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.allocate(offset, len)
    }
    fn allocated(&self) -> io::Result<u64> {
        self.0.allocated()
    }
    fn identity(&self) -> io::Result<(u64, u64)> {
        self.0.identity()
    }
}

fn run(watch: &Watch, mirror: &Mirror, repair: Repair) -> Result<Report, String> {
    let counts = &watch.campaign.counts;
    Counts::add(&counts.checks);
    let host = HostMedium::new(&mirror.root).map_err(|e| e.to_string())?;
    let both = Both { host, simulated: watch.medium.clone() };
    let report = run_through(&mirror.root, &no_live_maps(watch), repair, VerifyBases::No, &both);
    let report = report.map_err(|e| format!("the check failed: {e}"))?;
    for _ in report.findings.iter().filter(|f| f.repaired) {
        Counts::add(&counts.repairs);
    }
    Ok(report)
}

fn no_live_maps(watch: &Watch) -> PathBuf {
    let dir: &Path = &watch.campaign.dir;
    dir.join("no-live-maps")
}

/// After a clean end: there is a loser of a rename, a stray, an unlinked disk, and nothing else.
fn may_be(finding: &Finding) -> bool {
    matches!(finding.invariant, 5 | 11 | 12)
}

/// After a cut also what was being cached, of which nothing was promised.
fn may_be_cut(finding: &Finding) -> bool {
    may_be(finding) || finding.invariant == 14
}

fn say(findings: &[Finding]) -> String {
    findings
        .iter()
        .map(|f| format!("[{}] {}: {}", f.invariant, f.object, f.message))
        .collect::<Vec<_>>()
        .join("; ")
}

/// Checks what a power cut left, before a daemon starts; with repair, or without, or not at all.
pub(super) fn check(watch: &Watch, rng: &mut Rng) -> Result<(), String> {
    if watch.medium.files().iter().all(|(name, ..)| name != "plyfs.store") {
        return Ok(());
    }
    let rounds = match rng.below(4) {
        0 => return Ok(()),
        1 => 0,
        _ => 3,
    };
    let mirror = Mirror::new(watch).map_err(|e| format!("making a store for the check: {e}"))?;
    let report = run(watch, &mirror, Repair::No)?;
    if let Some(bad) = report.findings.iter().find(|f| !may_be_cut(f)) {
        return Err(format!("the check finds what a cut may not leave: {}", say(std::slice::from_ref(bad))));
    }
    if report.findings.is_empty() {
        return Ok(());
    }
    for round in 0..rounds {
        let report = run(watch, &mirror, Repair::Yes)?;
        if report.findings.is_empty() {
            return Ok(());
        }
        if report.findings.iter().any(|f| !f.repaired) || round == 2 {
            return Err(format!("the repair leaves findings: {}", say(&report.findings)));
        }
    }
    Ok(())
}

/// Checks a store that was stopped cleanly: only what `--repair` may remove is left.
pub(super) fn check_stopped(watch: &Watch, rng: &mut Rng) -> Result<(), String> {
    let _ = rng;
    let mirror = Mirror::new(watch).map_err(|e| format!("making a store for the check: {e}"))?;
    let report = run(watch, &mirror, Repair::No)?;
    match report.findings.iter().find(|f| !may_be(f)) {
        Some(bad) => Err(format!("the check of a stopped store finds: {}", say(std::slice::from_ref(bad)))),
        None => Ok(()),
    }
}
