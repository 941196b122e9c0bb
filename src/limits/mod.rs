//! Limits of one disk: requests and bytes a second ([`Pace`]), and bytes in the store ([`Quota`]).
//!
//! What must hold: a disk without limits pays one relaxed load for each request. A limit delays a request or refuses
//! new space; it never fails a request with an I/O error.

mod bucket;
mod pace;
mod quota;
#[cfg(test)]
mod tests;

use std::sync::{Arc, LazyLock, OnceLock};
use std::time::Instant;

pub use pace::{Cost, Entered, Pace, Turn, exceeded};
pub use quota::{Quota, refusals};

use crate::format::limits::Limits;

/// Nanoseconds on a clock that never goes back; the time of this module.
pub fn now() -> i64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    i64::try_from(START.elapsed().as_nanos()).unwrap_or(i64::MAX)
}

/// The limits of one disk, in force.
#[derive(Default)]
pub struct Limiter {
    pub pace: Pace,
    /// Made at the first use: most disks of a large store have no quota and are not attached.
    quota: OnceLock<Arc<Quota>>,
}

impl Limiter {
    /// Limits in force from now on.
    pub fn of(limits: &Limits) -> Self {
        let limiter = Self::default();
        limiter.set(limits);
        limiter
    }

    /// Puts other limits in force. Requests that wait go by them after [`Pace::run_due`].
    pub fn set(&self, limits: &Limits) {
        self.pace.set(limits, now());
        if limits.quota.is_some() || self.quota.get().is_some() {
            self.quota().set_limit(limits.quota);
        }
    }

    /// The quota, which may be none.
    pub fn quota(&self) -> &Arc<Quota> {
        self.quota.get_or_init(Arc::default)
    }

    /// The quota, when the disk has one.
    pub fn quota_if_set(&self) -> Option<&Arc<Quota>> {
        self.quota.get().filter(|quota| quota.is_set())
    }
}
