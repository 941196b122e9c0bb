//! The jobs of this worker: of each base the last one of each kind.
//!
//! What must hold: at most one job of a base is under way (D74). An entry goes with its base, so there are never more than two
//! for each base.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Job, What};

#[derive(Default)]
pub struct Table {
    /// The last job of each kind of a base, the latest job last.
    of_bases: HashMap<u64, Vec<Arc<Job>>>,
}

impl Table {
    /// The job that is under way.
    pub fn running(&self, base: u64) -> Option<&Arc<Job>> {
        self.last(base).filter(|job| !job.has_ended())
    }

    /// The latest job of a base.
    pub fn last(&self, base: u64) -> Option<&Arc<Job>> {
        self.of_bases.get(&base)?.last()
    }

    /// The last job of this kind.
    pub fn of(&self, base: u64, what: What) -> Option<&Arc<Job>> {
        self.of_bases.get(&base)?.iter().find(|job| job.what() == what)
    }

    /// The bases or disks that have jobs.
    pub fn numbers(&self) -> Vec<u64> {
        self.of_bases.keys().copied().collect()
    }

    /// Adds a job that begins. It replaces the one of the same kind.
    pub fn insert(&mut self, base: u64, job: Arc<Job>) {
        let jobs = self.of_bases.entry(base).or_default();
        jobs.retain(|other| other.what() != job.what());
        jobs.push(job);
    }

    /// Forgets the jobs of a base.
    pub fn remove(&mut self, base: u64) {
        self.of_bases.remove(&base);
    }
}
