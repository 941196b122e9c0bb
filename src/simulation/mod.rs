//! The power-cut campaign: random histories on a simulated medium, cut at every sync point and at random ones.
//!
//! After each cut the store is opened again and compared with what the contract allows (`model`), checked and
//! repaired by `plyfs check` itself, used, and cut again. Only tests and fuzz targets have this module
//! (feature `simulation`); `scripts/power-campaign` runs it for as long as one likes.
//!
//! What must hold: a seed always gives the same history and the same cuts; nothing here is more lenient than
//! docs/product's case table; every [`crate::sabotage::Sabotage`] is caught.

mod bases;
mod copies;
mod cut;
mod model;
mod operation;
#[cfg(test)]
mod tests;
mod world;

use std::any::Any;
use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use self::world::World;
use crate::io::sim::Rng;
use crate::sabotage::Sabotage;

/// What a campaign did.
#[derive(Debug, Default)]
pub struct Counts {
    /// Histories run.
    pub histories: AtomicU64,
    /// Of these, with several threads on one disk.
    pub crowds: AtomicU64,
    /// Operations of histories.
    pub operations: AtomicU64,
    /// Power cuts in a first life of a store.
    pub cuts: AtomicU64,
    /// Power cuts while a store recovered, or soon after.
    pub nested: AtomicU64,
    /// Deaths of a worker.
    pub workers: AtomicU64,
    /// Runs of the check, with or without repair.
    pub checks: AtomicU64,
    /// What the check put right.
    pub repairs: AtomicU64,
    /// Calls that were made to fail.
    pub faults: AtomicU64,
}

impl Counts {
    fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// A source of a base: a real file, because a store opens its bases by path.
struct BaseFile {
    path: PathBuf,
    bytes: Vec<u8>,
}

/// Histories with their counts, and the first violation.
pub struct Campaign {
    /// What was done.
    pub counts: Counts,
    dir: PathBuf,
    bases: Vec<BaseFile>,
    violation: Mutex<Option<String>>,
    /// Whether a violation is told with every call of the medium (PLYFS_POWER_TRACE).
    trace: bool,
}

impl Campaign {
    /// Keeps its files in `dir`, which is empty and best on tmpfs.
    ///
    /// # Errors
    /// When the files cannot be made.
    pub fn new(dir: &Path) -> io::Result<Arc<Self>> {
        let mut bases = Vec::new();
        // One ends within a block, one with a block.
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
    /// A violation of the contract, with the seed and what was done. The campaign does nothing more then.
    pub fn history(self: &Arc<Self>, seed: u64) -> Result<(), String> {
        self.guarded(seed, || World::first_life(self, seed))
    }

    /// Runs one history in which several threads use one disk at once, each with the deliberate fault, if any.
    ///
    /// # Errors
    /// As [`Campaign::history`]. The order of threads is not the seed's: the same seed may find nothing.
    pub fn crowd(self: &Arc<Self>, seed: u64, fault: Option<Sabotage>) -> Result<(), String> {
        Counts::add(&self.counts.crowds);
        self.guarded(seed, || World::crowd(self, seed, fault))
    }

    fn guarded(&self, seed: u64, run: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
        Counts::add(&self.counts.histories);
        let failed = match catch_unwind(AssertUnwindSafe(run)) {
            Ok(result) => result.err(),
            Err(panic) => Some(format!("panicked: {}", panic_message(&*panic))),
        };
        // What is below may have panicked because of what was found above it.
        match self.violation.lock().take().or(failed) {
            Some(message) => Err(format!("seed {seed}: {message}")),
            None => Ok(()),
        }
    }

    fn stopped(&self) -> bool {
        self.violation.lock().is_some()
    }

    /// Notes a violation; the first counts.
    fn violated(&self, log: &[String], message: &str) {
        self.violation.lock().get_or_insert_with(|| format!("{message}\n  {}", log.join("\n  ")));
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "without a message".into())
}
