//! Examines the files of bases on this host, for answers that must not wait for a file.
//!
//! What must hold: an answer about bases waits [`PATIENCE`] for a file that hangs, and [`LONGEST`] in all (D75). Then it
//! has what the last examination found, and when that was. A base has one examination at a time. The threads are few:
//! while more bases hang than there are threads, the others keep their last finding, and each answer shows its age.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::{Condvar, Mutex};

use super::lane::Lane;
use crate::store::BaseNode;

/// Examinations at a time.
const THREADS: usize = 64;
/// A caller waits no longer than this while no examination ends. One that takes longer hangs.
const PATIENCE: Duration = Duration::from_millis(300);
/// A caller waits no longer than this.
const LONGEST: Duration = Duration::from_secs(2);

/// What is known of the files of a base.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Finding {
    /// Why the base could not be used at the last examination that ended.
    pub problem: Option<String>,
    /// When that examination ended, if it is an earlier one than the caller asked for; `None` when none has ended yet.
    pub earlier: Option<SystemTime>,
    /// Since when its files do not answer.
    pub hangs_since: Option<SystemTime>,
}

/// See the module.
pub(super) struct Examiner {
    lane: Arc<Lane>,
    bases: Mutex<HashMap<u64, Entry>>,
    /// An examination has ended.
    ended: Condvar,
}

#[derive(Default)]
struct Entry {
    /// Examinations that began, and the number of the last that ended.
    begun: u64,
    ended: u64,
    /// Whether a job of the lane examines the base, or is going to.
    has_job: bool,
    /// Whether a caller needs an examination that begins after the one under way.
    again: bool,
    /// When the one under way began.
    under_way: Option<(Instant, SystemTime)>,
    problem: Option<String>,
    at: Option<SystemTime>,
}

impl Entry {
    fn hangs_since(&self) -> Option<SystemTime> {
        self.under_way.filter(|(begun, _)| begun.elapsed() >= PATIENCE).map(|(_, since)| since)
    }

    /// For a caller that asked for this examination.
    fn finding(&self, number: u64) -> Finding {
        let earlier = self.at.filter(|_| self.ended < number);
        Finding { problem: self.problem.clone(), earlier, hangs_since: self.hangs_since() }
    }
}

impl Examiner {
    pub fn new() -> Arc<Self> {
        let lane = Lane::new("examine", THREADS);
        Arc::new(Self { lane, bases: Mutex::default(), ended: Condvar::new() })
    }

    /// Examines the bases now, and returns what is known of each.
    pub fn examine(self: &Arc<Self>, nodes: &[Arc<BaseNode>]) -> Vec<Finding> {
        let wanted: Vec<(u64, u64)> = nodes.iter().map(|node| (node.id(), self.ask(node))).collect();
        self.wait(&wanted);
        let bases = self.bases.lock();
        let finding = |(base, number): &(u64, u64)| bases.get(base).map(|entry| entry.finding(*number));
        wanted.iter().map(|wanted| finding(wanted).unwrap_or_default()).collect()
    }

    /// Since when the files of a base do not answer. Examines nothing.
    pub fn hangs_since(&self, base: u64) -> Option<SystemTime> {
        self.bases.lock().get(&base).and_then(Entry::hangs_since)
    }

    /// Forgets a base that was removed.
    pub fn forget(&self, base: u64) {
        self.bases.lock().remove(&base);
    }

    /// Starts an examination. Returns its number.
    fn ask(self: &Arc<Self>, node: &Arc<BaseNode>) -> u64 {
        let mut bases = self.bases.lock();
        let entry = bases.entry(node.id()).or_default();
        // What an examination that has begun finds may be older than what the caller has just changed.
        let wanted = entry.begun + 1;
        if entry.has_job {
            entry.again = entry.under_way.is_some();
            return wanted;
        }
        entry.has_job = true;
        drop(bases);
        let (this, node) = (self.clone(), node.clone());
        self.lane.run(Box::new(move || while this.examine_once(&node) {}));
        wanted
    }

    /// Returns whether the base must be examined again.
    fn examine_once(&self, node: &BaseNode) -> bool {
        {
            let mut bases = self.bases.lock();
            let Some(entry) = bases.get_mut(&node.id()) else { return false };
            entry.begun += 1;
            entry.again = false;
            entry.under_way = Some((Instant::now(), SystemTime::now()));
        }
        let problem = node.problem();
        let mut bases = self.bases.lock();
        let Some(entry) = bases.get_mut(&node.id()) else { return false };
        entry.ended = entry.begun;
        entry.under_way = None;
        (entry.problem, entry.at) = (problem, Some(SystemTime::now()));
        entry.has_job = entry.again;
        let again = entry.again;
        drop(bases);
        self.ended.notify_all();
        again
    }

    fn wait(&self, wanted: &[(u64, u64)]) {
        let begun = Instant::now();
        let mut quiet = begun + PATIENCE;
        let mut bases = self.bases.lock();
        for (base, number) in wanted {
            // One that hangs already is not waited for.
            let is_awaited = |entry: &Entry| entry.ended < *number && entry.hangs_since().is_none();
            while bases.get(base).is_some_and(is_awaited) {
                let until = quiet.min(begun + LONGEST);
                if Instant::now() >= until {
                    return;
                }
                if !self.ended.wait_until(&mut bases, until).timed_out() {
                    quiet = Instant::now() + PATIENCE;
                }
            }
        }
    }
}
