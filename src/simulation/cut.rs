//! Cuts power or kills the worker at a call of the medium, and runs `plyfs check` on the result.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Counts;
use super::hook::HookState;
use super::model::Interruption;
use super::sim_store::SimStore;
use crate::check::{Finding, Repair, Report, VerifyBases, run_through};
use crate::io::sim::{Call, Event, Keep, Rng, SimLive, SimMedium};
use crate::io::{HostMedium, Medium, MediumFile, Open, Space};

/// The most cuts in a row.
pub(super) const DEEPEST: u32 = 3;

/// Runs at every call of the medium: may cut power, or kill the worker.
pub(super) fn at(hook: &HookState, event: &Event<'_>) {
    if hook.depth >= DEEPEST || matches!(event.call, Call::Read | Call::Open) {
        return;
    }
    let sync_point = matches!(event.call, Call::SyncData | Call::SyncDir | Call::Rename);
    let percent = match (hook.depth, sync_point) {
        (0, true) => 100,
        (0, false) => 12,
        (1, true) => 12,
        (1, false) => 3,
        (_, true) => 8,
        _ => 1,
    };
    let mut rng = {
        let mut rng = hook.rng.lock();
        if !rng.chance(percent) {
            return;
        }
        rng.fork()
    };
    let counts = &hook.campaign.counts;
    // With several threads, a worker's memory cannot be copied at one moment.
    let what =
        if hook.concurrent || rng.chance(85) { Interruption::PowerCut } else { Interruption::WorkerDeath };
    // The model is locked while the medium is cut, so that it expects nothing that is acknowledged afterwards.
    let model = hook.model.lock();
    let (medium, live) = match what {
        Interruption::PowerCut => {
            Counts::add(if hook.depth == 0 { &counts.cuts } else { &counts.nested });
            let keep = Keep::any(&mut rng);
            (hook.medium.crash(&mut rng, keep), SimLive::default())
        }
        Interruption::WorkerDeath => {
            Counts::add(&counts.workers);
            match hook.live.fork() {
                Ok(live) => (hook.medium.fork(), live),
                Err(e) => {
                    drop(model);
                    hook.violated(&format!("no memory for live maps: {e}"));
                    return;
                }
            }
        }
    };
    let note =
        format!("  {what:?} cut at depth {}: {:?} {:?} {}", hook.depth, event.stage, event.call, event.name);
    let mut later = model.clone();
    drop(model);
    later.log.push(note);
    SimStore::later_life(hook, later, medium, live, what, rng);
}

/// A copy of the store in a directory of the host, which the check reads.
struct Mirror {
    root: PathBuf,
}

impl Mirror {
    fn new(hook: &HookState) -> io::Result<Self> {
        let name = format!("store-{:?}-{}", std::thread::current().id(), hook.depth);
        let root = hook.campaign.dir.join(name);
        if root.exists() {
            fs::remove_dir_all(&root)?;
        }
        fs::create_dir(&root)?;
        for dir in hook.medium.dirs() {
            fs::create_dir(root.join(dir))?;
        }
        for (name, len, bytes) in hook.medium.files() {
            match bytes {
                Some(bytes) => fs::write(root.join(&name), bytes)?,
                // The check needs to know only whether the file has data.
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

/// Applies changes to the copy on the host, which the check reads, and to the simulated medium, which is cut.
struct MirroredMedium {
    host: HostMedium,
    simulated: SimMedium,
}

struct MirroredFile(Arc<dyn MediumFile>, Arc<dyn MediumFile>);

impl Medium for MirroredMedium {
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn MediumFile>> {
        Ok(Arc::new(MirroredFile(self.host.open(name, how)?, self.simulated.open(name, how)?)))
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

impl MediumFile for MirroredFile {
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

fn run(hook: &HookState, mirror: &Mirror, repair: Repair) -> Result<Report, String> {
    let counts = &hook.campaign.counts;
    Counts::add(&counts.checks);
    let host = HostMedium::new(&mirror.root).map_err(|e| e.to_string())?;
    let both = MirroredMedium { host, simulated: hook.medium.clone() };
    let report = run_through(&mirror.root, &no_live_maps(hook), repair, VerifyBases::No, &both);
    let report = report.map_err(|e| format!("the check failed: {e}"))?;
    for _ in report.findings.iter().filter(|f| f.repaired) {
        Counts::add(&counts.repairs);
    }
    Ok(report)
}

fn no_live_maps(hook: &HookState) -> PathBuf {
    let dir: &Path = &hook.campaign.dir;
    dir.join("no-live-maps")
}

/// The findings that a clean stop may leave: the loser of a rename, a stray file, an unlinked disk.
fn is_allowed_after_stop(finding: &Finding) -> bool {
    matches!(finding.invariant, 5 | 11 | 12)
}

/// The findings that a cut may leave: also damage of cached blocks that were not promised.
fn is_allowed_after_cut(finding: &Finding) -> bool {
    is_allowed_after_stop(finding) || finding.invariant == 14
}

fn describe_findings(findings: &[Finding]) -> String {
    findings
        .iter()
        .map(|f| format!("[{}] {}: {}", f.invariant, f.object, f.message))
        .collect::<Vec<_>>()
        .join("; ")
}

/// After a power cut and before a start: runs the check with repair, without, or not at all.
pub(super) fn check(hook: &HookState, rng: &mut Rng) -> Result<(), String> {
    if hook.medium.files().iter().all(|(name, ..)| name != "plyfs.store") {
        return Ok(());
    }
    let rounds = match rng.below(4) {
        0 => return Ok(()),
        1 => 0,
        _ => 3,
    };
    let mirror = Mirror::new(hook).map_err(|e| format!("copying the store for the check: {e}"))?;
    let report = run(hook, &mirror, Repair::No)?;
    if let Some(bad) = report.findings.iter().find(|f| !is_allowed_after_cut(f)) {
        return Err(format!(
            "the check finds damage that a cut must not cause: {}",
            describe_findings(std::slice::from_ref(bad))
        ));
    }
    if report.findings.is_empty() {
        return Ok(());
    }
    for round in 0..rounds {
        let report = run(hook, &mirror, Repair::Yes)?;
        if report.findings.is_empty() {
            return Ok(());
        }
        if report.findings.iter().any(|f| !f.repaired) || round == 2 {
            return Err(format!("the repair leaves findings: {}", describe_findings(&report.findings)));
        }
    }
    Ok(())
}

/// Checks a store that was stopped cleanly: there may be only findings that `--repair` removes.
pub(super) fn check_stopped(hook: &HookState, rng: &mut Rng) -> Result<(), String> {
    let _ = rng;
    let mirror = Mirror::new(hook).map_err(|e| format!("copying the store for the check: {e}"))?;
    let report = run(hook, &mirror, Repair::No)?;
    match report.findings.iter().find(|f| !is_allowed_after_stop(f)) {
        Some(bad) => Err(format!(
            "the check of a stopped store finds: {}",
            describe_findings(std::slice::from_ref(bad))
        )),
        None => Ok(()),
    }
}
