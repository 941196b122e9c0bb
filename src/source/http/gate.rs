//! Whether something works, and when it is asked again when it does not: one state for all requests to one URL of a
//! base, and one for all connections to one server.
//!
//! What must hold: while it fails it gets one request at a time, however many readers wait, and those further and
//! further apart; when that one works, all others go on at once (H4).

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::answer::Failure;

/// Pause after the first failure; doubled with each one.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(20);
/// Later than any pause ends.
const LATER: Duration = Duration::from_secs(3600);

/// See the module.
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Notify,
}

struct State {
    /// In a row.
    failures: u32,
    /// Grows with each failure. Requests that were under way together fail together, and that is one failure.
    epoch: u64,
    not_before: Instant,
    /// Whether the one request that may run while it fails is under way.
    trying: bool,
    last: Failure,
}

/// Leave for one request. Dropped without a word about how it went, it has not been.
pub(super) struct Pass {
    gate: Arc<Gate>,
    epoch: u64,
    trial: bool,
}

/// Why there is no leave now.
pub(super) struct Down {
    gate: Arc<Gate>,
    until: Option<Instant>,
    pub why: Failure,
}

impl Gate {
    pub fn new() -> Arc<Self> {
        let (last, not_before) = (Failure::again("it was not asked"), Instant::now());
        let state = State { failures: 0, epoch: 0, not_before, trying: false, last };
        Arc::new(Self { state: Mutex::new(state), changed: Notify::new() })
    }

    /// Leave to ask now.
    pub fn enter(self: &Arc<Self>) -> Result<Pass, Down> {
        let mut state = self.state.lock();
        let trial = state.failures > 0;
        if trial {
            if state.trying || Instant::now() < state.not_before {
                let until = (!state.trying).then_some(state.not_before);
                return Err(Down { gate: self.clone(), until, why: state.last.clone() });
            }
            state.trying = true;
        }
        Ok(Pass { gate: self.clone(), epoch: state.epoch, trial })
    }

    /// Leave whatever its state is, for a caller that asks once.
    pub fn enter_anyway(self: &Arc<Self>) -> Pass {
        Pass { gate: self.clone(), epoch: self.state.lock().epoch, trial: false }
    }

    /// None when it works; else when it may be asked again. While another request finds out whether it works, that is
    /// far away.
    pub fn ready(&self) -> Option<Instant> {
        let state = self.state.lock();
        let at = if state.trying { Instant::now() + LATER } else { state.not_before };
        (state.failures > 0).then_some(at)
    }

    /// How it failed last, when it does not work.
    pub fn trouble(&self) -> Option<Failure> {
        let state = self.state.lock();
        (state.failures > 0).then(|| state.last.clone())
    }
}

impl Down {
    /// Until it is worth trying again, not necessarily with success.
    pub async fn over(self) {
        let changed = self.gate.changed.notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        {
            // It may have changed since.
            let state = self.gate.state.lock();
            if state.failures == 0 || (self.until.is_none() && !state.trying) {
                return;
            }
        }
        match self.until {
            None => changed.await,
            Some(until) => tokio::select! {
                () = changed => {}
                () = tokio::time::sleep_until(until) => {}
            },
        }
    }
}

impl Pass {
    /// Whether it would be given now as well: nothing has failed since, or this is the one request that finds out.
    pub fn is_current(&self) -> bool {
        self.trial || self.gate.state.lock().epoch == self.epoch
    }

    /// It sent what was asked for, or anything that shows that it works.
    pub fn worked(&mut self) {
        let mut state = self.gate.state.lock();
        if state.failures == 0 && !self.trial {
            return;
        }
        state.failures = 0;
        state.trying = false;
        self.trial = false;
        drop(state);
        self.gate.changed.notify_waiters();
    }

    /// It did not.
    pub fn failed(mut self, failure: &Failure) {
        let mut state = self.gate.state.lock();
        let now = Instant::now();
        if self.epoch == state.epoch || self.trial {
            state.failures = state.failures.saturating_add(1);
            state.epoch += 1;
            let pause = FIRST_PAUSE.saturating_mul(1 << (state.failures - 1).min(10)).min(LONGEST_PAUSE);
            state.not_before = state.not_before.max(now + jittered(pause));
        }
        if let Some(after) = failure.after() {
            // Not all at once then either.
            state.not_before = state.not_before.max(now + after + jittered(FIRST_PAUSE));
        }
        state.last.clone_from(failure);
        if std::mem::take(&mut self.trial) {
            state.trying = false;
        }
        drop(state);
        self.gate.changed.notify_waiters();
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        if self.trial {
            self.gate.state.lock().trying = false;
            self.gate.changed.notify_waiters();
        }
    }
}

/// Between half of it and all of it.
pub(super) fn jittered(pause: Duration) -> Duration {
    let random = getrandom::u32().unwrap_or(u32::MAX / 2);
    pause / 2 + (pause / 2).mul_f64(f64::from(random) / f64::from(u32::MAX))
}
