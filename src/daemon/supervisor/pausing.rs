//! A worker that ends by plan first answers what it has read, on a kernel that cannot send requests to the next worker.
//!
//! What must hold (D65): an upgrade, and a move of the live maps, cost no request. When requests do not end in time, as
//! those do not that wait for a server, the worker goes on, and the upgrade or the move is given up.

use std::time::{Duration, Instant};

use super::super::channel::FromSupervisor;
use super::Supervisor;

/// How long requests may take to end, while new ones wait.
pub(in crate::daemon) const PAUSE: Duration = Duration::from_secs(5);

impl Supervisor {
    /// Has the active worker pause before it ends by plan; false when that is not needed, as the next worker gets its
    /// requests, or of no use, as it does not listen.
    pub(in crate::daemon) fn pauses(&self) -> bool {
        let Some(active) = self.active.as_ref().filter(|_| !self.protocol.resend) else { return false };
        if active.pulse.is_lost() {
            return false;
        }
        active.tell(&FromSupervisor::Pause);
        true
    }

    /// The worker reads requests again.
    pub(in crate::daemon) fn go_on(&mut self) {
        self.pause_until = None;
        if let Some(active) = &self.active {
            active.tell(&FromSupervisor::GoOn);
        }
    }

    /// Has the active worker pause so that the live maps can move; false when it need not.
    pub(in crate::daemon) fn pauses_for_move(&mut self) -> bool {
        let pauses = self.pauses();
        self.pause_until = pauses.then(|| Instant::now() + PAUSE);
        pauses
    }

    /// What the worker had read is answered.
    pub(super) fn paused(&mut self) {
        if self.pause_until.take().is_some() && self.is_moving() {
            self.end_for_move();
        } else {
            self.upgrade_paused();
        }
    }

    /// Requests did not end in time.
    pub(super) fn move_is_late(&mut self) {
        self.go_on();
        self.put_off_move();
    }
}
