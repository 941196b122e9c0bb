//! Log lines that a guest can trigger.
//!
//! What must hold: the rate of lines is bounded for each disk and base, so one that fails all the time neither fills
//! the log nor hides the lines of another.

use std::collections::BTreeMap;
use std::fmt::Display;

use parking_lot::Mutex;

use super::{Target, Waiters};
use crate::io::sys;

/// Shortest time between two lines about one disk or base.
const INTERVAL_NS: i64 = 100_000_000;
/// Disks and bases whose lines are counted separately.
const APART: usize = 1024;

/// Whether a line may be logged now. `None` stands for lines about neither a disk nor a base.
fn may_log(target: Option<Target>) -> bool {
    static LAST: Mutex<BTreeMap<Option<Target>, i64>> = Mutex::new(BTreeMap::new());
    let now = sys::now_ns();
    let mut last = LAST.lock();
    if last.get(&target).is_some_and(|last| now - last <= INTERVAL_NS) {
        return false;
    }
    if last.len() >= APART {
        last.retain(|_, last| now - *last <= INTERVAL_NS);
    }
    // When more fail at a time, the surplus logs nothing.
    last.len() < APART && last.insert(target, now).is_none_or(|last| now - last > INTERVAL_NS)
}

/// Logs why a request ended in an I/O error.
pub(super) fn failed(target: Option<Target>, error: &dyn Display) {
    if may_log(target) {
        tracing::error!(%error, "a request failed");
    }
}

/// Logs why a request on a disk ended in an I/O error.
pub(super) fn failed_on_disk(id: u64, disk: &str, operation: &str, error: &dyn Display) {
    if may_log(Some(Target::Disk(id))) {
        tracing::error!(disk, operation, %error, "a request failed");
    }
}

/// Logs that a request was refused because too many wait.
pub(super) fn refused(target: Target, waiters: Waiters) {
    if may_log(Some(target)) {
        let (kind, number) = match target {
            Target::Disk(id) => ("disk", id),
            Target::Base(id) => ("base", id),
            Target::Snapshot(number) => ("snapshot", number),
        };
        let Waiters { requests, bytes, refused, .. } = waiters;
        tracing::error!(
            kind,
            number,
            waiting = requests,
            bytes,
            refused,
            "a request ends with EIO: too many requests of its disk wait for the base; see the base's state in `plyfs status`"
        );
    }
}
