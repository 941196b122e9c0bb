//! Whether a URL or a server works, and when a failing one is tried again. All requests to one URL of a base share one
//! gate, and so do all connections to one server.
//!
//! What must hold: while the URL or server fails, it gets one request at a time, however many readers wait, and the
//! pause between these requests grows. When one of them works, all others continue at once (H4).

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::answer::Failure;

/// Pause after the first failure; doubled with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(20);
/// Longer than any pause.
const LATER: Duration = Duration::from_secs(3600);

/// See the module.
pub(in crate::source) struct Gate {
    state: Mutex<State>,
    changed: Notify,
}

struct State {
    /// Failures in a row.
    failures: u32,
    /// Grows with each failure. When requests that were under way together fail, that counts as one failure.
    epoch: u64,
    not_before: Instant,
    /// Whether the one request that is allowed while the gate fails is under way.
    trying: bool,
    last: Failure,
}

/// Permission for one request. A pass that is dropped without a result changes nothing.
pub(in crate::source) struct Pass {
    gate: Arc<Gate>,
    epoch: u64,
    trial: bool,
}

/// Why no request is allowed now.
pub(in crate::source) struct Closed {
    gate: Arc<Gate>,
    until: Option<Instant>,
    pub why: Failure,
}

impl Gate {
    pub fn new() -> Arc<Self> {
        let (last, not_before) = (Failure::again("it got no request yet"), Instant::now());
        let state = State { failures: 0, epoch: 0, not_before, trying: false, last };
        Arc::new(Self { state: Mutex::new(state), changed: Notify::new() })
    }

    /// Permission to send a request now.
    pub fn enter(self: &Arc<Self>) -> Result<Pass, Closed> {
        let mut state = self.state.lock();
        let trial = state.failures > 0;
        if trial {
            if state.trying || Instant::now() < state.not_before {
                let until = (!state.trying).then_some(state.not_before);
                return Err(Closed { gate: self.clone(), until, why: state.last.clone() });
            }
            state.trying = true;
        }
        Ok(Pass { gate: self.clone(), epoch: state.epoch, trial })
    }

    /// Permission in any state, for a caller that sends one request.
    pub fn enter_anyway(self: &Arc<Self>) -> Pass {
        Pass { gate: self.clone(), epoch: self.state.lock().epoch, trial: false }
    }

    /// When the next request is allowed; none when the gate works. While another request tries whether it works, this
    /// is [`LATER`].
    pub fn ready(&self) -> Option<Instant> {
        let state = self.state.lock();
        let at = if state.trying { Instant::now() + LATER } else { state.not_before };
        (state.failures > 0).then_some(at)
    }

    /// The last failure, while the gate does not work.
    pub fn trouble(&self) -> Option<Failure> {
        let state = self.state.lock();
        (state.failures > 0).then(|| state.last.clone())
    }
}

impl Closed {
    /// Waits until another attempt makes sense; it may fail.
    pub async fn over(self) {
        let changed = self.gate.changed.notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        {
            // The state may have changed since.
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
    /// Whether the gate would give this pass now: nothing has failed since, or this is the one request that tries.
    pub fn is_current(&self) -> bool {
        self.trial || self.gate.state.lock().epoch == self.epoch
    }

    /// The URL or server works.
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

    /// The request failed.
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
            // Jittered, so that clients do not come back at the same time.
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

/// A random time between half of `pause` and all of it.
pub(in crate::source) fn jittered(pause: Duration) -> Duration {
    let random = getrandom::u32().unwrap_or(u32::MAX / 2);
    pause / 2 + (pause / 2).mul_f64(f64::from(random) / f64::from(u32::MAX))
}
