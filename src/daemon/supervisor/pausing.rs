//! A pause before a planned end of the worker, on a kernel that cannot send requests to the next one.
//!
//! What must hold (D65): an upgrade, or a move of the live maps, costs no request. When requests do not end in time, for
//! example because they wait for a server, the worker goes on, and the upgrade or the move is given up.

use std::time::{Duration, Instant};

use super::super::channel::FromSupervisor;
use super::Supervisor;

/// The time that requests in flight have to end. New ones wait meanwhile.
pub(in crate::daemon) const PAUSE_TIMEOUT: Duration = Duration::from_secs(5);

impl Supervisor {
    /// Tells the active worker to pause. False when no pause is needed, because the next worker gets its requests, or
    /// when the worker does not answer.
    pub(in crate::daemon) fn begin_pause(&self) -> bool {
        let Some(active) = self.active.as_ref().filter(|_| !self.protocol.resend) else { return false };
        if active.heartbeat.is_lost() {
            return false;
        }
        active.send(&FromSupervisor::Pause);
        true
    }

    /// Ends a pause: the worker reads requests again.
    pub(in crate::daemon) fn continue_serving(&mut self) {
        self.pause_until = None;
        if let Some(active) = &self.active {
            active.send(&FromSupervisor::Continue);
        }
    }

    /// As [`begin_pause`](Self::begin_pause), for a move of the live maps.
    pub(in crate::daemon) fn begin_pause_to_relocate(&mut self) -> bool {
        let pauses = self.begin_pause();
        self.pause_until = pauses.then(|| Instant::now() + PAUSE_TIMEOUT);
        pauses
    }

    /// The worker has answered all requests that it had read.
    pub(super) fn paused(&mut self) {
        if self.pause_until.take().is_some() && self.is_relocating() {
            self.kill_paused_to_relocate();
        } else {
            self.upgrade_paused();
        }
    }

    /// Requests did not end in time before a move of the live maps.
    pub(super) fn pause_timed_out(&mut self) {
        self.continue_serving();
        self.postpone_relocation();
    }
}
