//! Whether the last fetch for a reader of a source worked.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use parking_lot::Mutex;

use crate::source::SourceError;

/// Reads failed, and none succeeded since.
#[derive(Clone, Debug)]
pub struct Failing {
    /// The first of these errors.
    pub since: SystemTime,
    /// The last of them.
    pub error: SourceError,
}

/// See the module.
#[derive(Default)]
pub(super) struct Health {
    state: Mutex<State>,
    /// Whether `state.failing` is set; can be read without the lock.
    failing: AtomicBool,
}

#[derive(Default)]
struct State {
    failing: Option<Failing>,
    /// An error that was not reported yet.
    unreported: Option<SourceError>,
}

impl Health {
    pub fn failed(&self, error: &SourceError) {
        let mut state = self.state.lock();
        let since = state.failing.as_ref().map_or_else(SystemTime::now, |failing| failing.since);
        state.failing = Some(Failing { since, error: error.clone() });
        state.unreported = Some(error.clone());
        self.failing.store(true, Ordering::Release);
    }

    /// Bytes have come.
    pub fn worked(&self) {
        if self.failing.load(Ordering::Acquire) {
            self.state.lock().failing = None;
            self.failing.store(false, Ordering::Release);
        }
    }

    pub fn failing(&self) -> Option<Failing> {
        self.state.lock().failing.clone()
    }

    /// The last error that was not reported yet. Each error is returned once.
    pub fn take_unreported(&self) -> Option<SourceError> {
        self.state.lock().unreported.take()
    }
}
