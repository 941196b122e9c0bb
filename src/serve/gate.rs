//! Counts running changes. When the daemon stops with files open, refuses later changes and waits for the running ones.
//!
//! What must hold: a closed gate never makes a request wait. It refuses the request at once, on the thread that serves
//! all disks.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// See the module.
#[derive(Default)]
pub(super) struct Gate {
    running: AtomicUsize,
    closed: AtomicBool,
    waiting: Mutex<()>,
    left: Condvar,
}

/// A running change.
pub(super) struct RunningChange<'a>(&'a Gate);

impl Gate {
    /// Begins a change; `None` once the gate is closed.
    pub fn enter(&self) -> Option<RunningChange<'_>> {
        // First the count, then the check. Closing does the two in the other order, so at least one of the two threads
        // sees the other.
        self.running.fetch_add(1, Ordering::SeqCst);
        let running = RunningChange(self);
        (!self.closed.load(Ordering::SeqCst)).then_some(running)
    }

    /// Refuses all later changes, and waits for the running ones for `patience` at most. Returns how many still run.
    pub fn close(&self, patience: Duration) -> usize {
        self.closed.store(true, Ordering::SeqCst);
        let end = Instant::now() + patience;
        let mut waiting = self.waiting.lock();
        loop {
            let running = self.running.load(Ordering::SeqCst);
            if running == 0 || self.left.wait_until(&mut waiting, end).timed_out() {
                return self.running.load(Ordering::SeqCst);
            }
        }
    }
}

impl Drop for RunningChange<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::SeqCst);
        if self.0.closed.load(Ordering::SeqCst) {
            drop(self.0.waiting.lock());
            self.0.left.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_waits_for_running_changes_and_refuses_later_ones() {
        let gate = Gate::default();
        let running = gate.enter().expect("it is open");
        assert_eq!(gate.close(Duration::from_millis(1)), 1, "one is inside");
        assert!(gate.enter().is_none());
        std::thread::scope(|scope| {
            let closing = scope.spawn(|| gate.close(Duration::from_secs(60)));
            drop(running);
            assert_eq!(closing.join().expect("no panic"), 0);
        });
    }
}
