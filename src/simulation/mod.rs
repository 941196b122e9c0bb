//! The power-cut campaign: random histories of a store on a simulated medium, with power cuts at every sync point and at
//! random calls.
//!
//! After each cut the campaign opens the store again, compares it with the contract (`model`), runs `plyfs check` and its
//! repair, uses the store and cuts it again. Only tests and fuzz targets have this module (feature `simulation`);
//! `scripts/power-campaign` runs it for any length of time.
//!
//! What must hold: a seed always gives the same history and the same cuts. Nothing here is more lenient than the
//! guarantees of docs/semantics.md and docs/format.md. The campaign catches every [`crate::mutant::Mutant`].

mod bases;
mod concurrent;
mod copies;
mod copying;
mod cut;
mod encryption;
mod flushing;
mod hook;
mod limits;
mod model;
mod operation;
mod reworking;
mod sim_store;
#[cfg(test)]
mod tests;
mod trashing;

use std::any::Any;
use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use self::sim_store::SimStore;
use crate::io::sim::Rng;
use crate::mutant::Mutant;

/// The counters of a campaign.
#[derive(Debug, Default)]
pub struct Counts {
    /// Histories run.
    pub histories: AtomicU64,
    /// Histories with several threads on one disk, which count as histories as well.
    pub concurrent: AtomicU64,
    /// Operations of histories.
    pub operations: AtomicU64,
    /// Power cuts of a store that was never cut before.
    pub cuts: AtomicU64,
    /// Power cuts while a store recovered from an earlier one, or soon after.
    pub nested: AtomicU64,
    /// Deaths of a worker.
    pub workers: AtomicU64,
    /// Runs of the check, with or without repair.
    pub checks: AtomicU64,
    /// Findings that the check repaired.
    pub repairs: AtomicU64,
    /// Calls that were made to fail.
    pub faults: AtomicU64,
}

impl Counts {
    fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// The source of a base: a real file, because a store opens its bases by path.
struct BaseFile {
    path: PathBuf,
    bytes: Vec<u8>,
}

/// Runs histories, counts them, and records the first violation.
pub struct Campaign {
    /// The counters.
    pub counts: Counts,
    dir: PathBuf,
    bases: Vec<BaseFile>,
    violation: Mutex<Option<String>>,
    /// Whether a violation is reported with every call of the medium (PLYFS_POWER_TRACE).
    trace: bool,
}

impl Campaign {
    /// A campaign with its files in `dir`, which must be empty and is best on tmpfs.
    ///
    /// # Errors
    /// When the files cannot be created.
    pub fn new(dir: &Path) -> io::Result<Arc<Self>> {
        let mut bases = Vec::new();
        // One ends within a block, the other at the end of a block.
        for (no, len) in [100_001usize, 65_536].into_iter().enumerate() {
            let mut rng = Rng::new(no as u64);
            let mut bytes: Vec<u8> = (0..len).map(|_| rng.number() as u8).collect();
            bytes[8192..16384].fill(0);
            let path = dir.join(format!("base{no}.raw"));
            fs::write(&path, &bytes)?;
            bases.push(BaseFile { path, bytes });
        }
        fs::create_dir(dir.join("no-live-maps"))?;
        let violation = Mutex::default();
        let trace = std::env::var_os("PLYFS_POWER_TRACE").is_some();
        Ok(Arc::new(Self { counts: Counts::default(), dir: dir.to_owned(), bases, violation, trace }))
    }

    /// Runs one history.
    ///
    /// # Errors
    /// A violation of the contract, with the seed and the operations. The campaign stops then.
    pub fn history(self: &Arc<Self>, seed: u64) -> Result<(), String> {
        self.guarded(seed, || SimStore::first_life(self, seed))
    }

    /// Runs one history in which several threads use one disk at once, each with the mutant, if any.
    ///
    /// # Errors
    /// As [`Campaign::history`]. The seed does not determine the order of threads, so the same seed may find nothing.
    pub fn concurrent_history(self: &Arc<Self>, seed: u64, fault: Option<Mutant>) -> Result<(), String> {
        Counts::add(&self.counts.concurrent);
        self.guarded(seed, || SimStore::concurrent_history(self, seed, fault))
    }

    fn guarded(&self, seed: u64, run: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
        Counts::add(&self.counts.histories);
        let failed = match catch_unwind(AssertUnwindSafe(run)) {
            Ok(result) => result.err(),
            Err(panic) => Some(format!("panicked: {}", panic_message(&*panic))),
        };
        // The first violation may have caused the panic, so it goes first.
        match self.violation.lock().take().or(failed) {
            Some(message) => Err(format!("seed {seed}: {message}")),
            None => Ok(()),
        }
    }

    fn stopped(&self) -> bool {
        self.violation.lock().is_some()
    }

    /// Records a violation, if it is the first.
    fn violated(&self, log: &[String], message: &str) {
        self.violation.lock().get_or_insert_with(|| format!("{message}\n  {}", log.join("\n  ")));
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "without a message".into())
}
