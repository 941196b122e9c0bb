//! Live maps move to a new home between two workers when their name is removed, and after an upgrade from a version
//! without an arena.
//!
//! 1. The supervisor creates the new arena, empty, and starts a standby worker with it.
//! 2. When that worker is prepared, the supervisor kills the active one. From here on this is a takeover like any
//!    other.
//! 3. While no worker is alive, the supervisor copies the maps and lets the store's record name the new arena. Then the
//!    prepared worker takes over.
//!
//! A crash before the record is replaced leaves the old arena as it was.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::handover;
use super::home::LiveHome;
use super::process::{Phase, Worker};
use super::supervisor::{PAUSE_TIMEOUT, Supervisor};
use crate::control::report::reason;
use crate::io::sys;

/// How often the name is checked.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// The wait after a failed move.
const RETRY_INTERVAL: Duration = Duration::from_secs(10);

impl Supervisor {
    /// Whether the active worker ends because the live maps move.
    pub(super) fn is_relocating(&self) -> bool {
        self.new_live_home.is_some()
            && self.standby.as_ref().is_some_and(|worker| worker.phase == Phase::Prepared)
    }

    /// Checks whether the next daemon would find the live maps if this one were killed. Begins to move them when it
    /// would not.
    pub(super) fn check_live_maps(&mut self) {
        self.check_live_maps_at = (!self.is_shutting_down()).then(|| Instant::now() + CHECK_INTERVAL);
        if self.is_shutting_down()
            || self.new_live_home.is_some()
            || self.resources.live.as_ref().is_some_and(LiveHome::is_named)
        {
            return;
        }
        let serves = self.active.as_ref().is_some_and(|worker| worker.phase == Phase::Serving);
        if !serves || self.upgrading.is_some() {
            return;
        }
        if let Some(live) = &self.resources.live {
            let why = format!("the name {} of the live maps is gone", live.path().display());
            if self.report.live.problem.as_deref() != Some(&why) {
                tracing::error!(
                    why,
                    "writes are safe while the supervisor lives; the maps move to a new file"
                );
                self.report.live.problem = Some(why);
                self.send_report();
            }
        }
        match LiveHome::create(&self.config) {
            Ok(home) => {
                self.new_live_home = Some(home);
                // Workers that do not serve yet have the old arena.
                self.end_others();
                self.standby_at = Some(Instant::now());
            }
            Err(error) => self.relocation_failed(&error),
        }
    }

    fn relocation_failed(&mut self, error: &std::io::Error) {
        let why = format!("the live maps have no name by which the next daemon finds them: {error}");
        tracing::error!(why, "writes are safe while the supervisor lives; trying again");
        self.report.live.problem = Some(reason(&why));
        self.check_live_maps_at = Some(Instant::now() + RETRY_INTERVAL);
        self.send_report();
    }

    /// Kills the active worker once a standby worker with the new arena is prepared.
    pub(super) fn kill_active_to_relocate(&mut self) {
        if self.new_live_home.is_some() && self.upgrading.is_none() && !self.begin_pause_to_relocate() {
            self.kill_paused_to_relocate();
        }
    }

    /// Kills the active worker, which has no requests that would be lost.
    pub(super) fn kill_paused_to_relocate(&mut self) {
        if let Some(active) = &self.active {
            // The supervisor handles its end once none of its threads runs.
            let _ = sys::kill(active.pid, libc::SIGKILL);
        }
    }

    /// Gives a move up that would cost requests. It is tried again later.
    pub(super) fn postpone_relocation(&mut self) {
        let Some(new) = self.new_live_home.take() else { return };
        new.discard(sys::Detach::No);
        // The standby worker has only the new arena.
        self.end_others();
        self.standby_at = Some(Instant::now());
        let seconds = PAUSE_TIMEOUT.as_secs();
        self.relocation_failed(&std::io::Error::other(format!(
            "requests in flight did not end within {seconds} s, and this kernel cannot send them to the next worker"
        )));
    }

    /// Completes a move that has begun, and returns the worker that takes over: one that has the arena with the live
    /// maps. No other worker runs.
    pub(super) fn finish_relocation(&mut self, worker: Worker) -> Option<Worker> {
        let Some(new) = self.new_live_home.take() else { return Some(worker) };
        match new.fill(&self.config, self.resources.live.as_ref()) {
            Ok(()) => {
                tracing::info!(path = %new.path().display(), "the live maps have moved");
                handover::keep_live(self.since_ns, new.file().as_fd());
                self.report.live.path = Some(new.path().into());
                self.report.live.problem = None;
                self.report.live.moves += u64::from(self.resources.live.is_some());
                self.resources.live = Some(new);
                Some(worker)
            }
            Err(error) => {
                new.discard(sys::Detach::No);
                self.relocation_failed(&error);
                // This worker has only the new arena.
                let _ = worker.kill();
                let program = &self.resources.worker_program;
                self.start_worker(program, false)
                    .inspect_err(|error| tracing::error!(%error, "cannot start a worker; trying again"))
                    .ok()
            }
        }
    }

    /// Cancels a move, because the daemon ends. The live maps stay where they are.
    pub(super) fn cancel_relocation(&mut self) {
        if let Some(new) = self.new_live_home.take() {
            new.discard(sys::Detach::No);
        }
    }
}
