//! Pauses between attempts of periodic work that fails.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::mutant::limit;

const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(60);

/// When work that failed may be tried again: after a second, then after ever twice the time, up to a minute.
#[derive(Default)]
pub(in crate::store) struct Backoff {
    state: Mutex<Option<(Instant, Duration)>>,
}

impl Backoff {
    /// Whether the work may be tried at `now`.
    pub fn is_due(&self, now: Instant) -> bool {
        self.state.lock().is_none_or(|(due, _)| due <= now)
    }

    /// It failed at `now`. Returns how long the next attempt waits.
    pub fn failed(&self, now: Instant) -> Duration {
        let mut state = self.state.lock();
        let pause = state.map_or(SHORTEST, |(_, last)| (last * 2).min(LONGEST));
        // A simulation has no clock: each attempt is due.
        *state = Some((now + pause * limit(1, 0) as u32, pause));
        pause
    }

    /// It was done, or there is nothing to do.
    pub fn succeeded(&self) {
        *self.state.lock() = None;
    }
}
