//! Live maps whose name is gone move to a new home between two workers; so do those of a version without an arena after
//! an upgrade.
//!
//! 1. The new arena is made, empty, and the standby worker is started with it.
//! 2. When that one is prepared, the active worker is killed: from here on it is a takeover like any other.
//! 3. With no worker alive, the maps are copied and the store's record names the new arena. The worker takes over.
//!
//! A crash before the record is replaced leaves the old arena as it was.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::handover;
use super::home::LiveHome;
use super::process::{Phase, Worker};
use super::supervisor::{PAUSE, Supervisor};
use crate::control::report::reason;
use crate::io::sys;

/// How often the name is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How soon a move that failed is tried again.
const AGAIN: Duration = Duration::from_secs(10);

impl Supervisor {
    /// Whether the active worker ends because the live maps move.
    pub(super) fn is_moving(&self) -> bool {
        self.moving.is_some() && self.standby.as_ref().is_some_and(|worker| worker.phase == Phase::Prepared)
    }

    /// Looks whether the live maps would be found when all of this is killed; begins to move them when not.
    pub(super) fn look_after_live_maps(&mut self) {
        self.look_at = (!self.is_ending()).then(|| Instant::now() + LOOK);
        if self.is_ending()
            || self.moving.is_some()
            || self.things.live.as_ref().is_some_and(LiveHome::is_named)
        {
            return;
        }
        let serves = self.active.as_ref().is_some_and(|worker| worker.phase == Phase::Serving);
        if !serves || self.upgrading.is_some() {
            return;
        }
        if let Some(live) = &self.things.live {
            let why = format!("the name {} of the live maps is gone", live.path().display());
            if self.report.live.problem.as_deref() != Some(&why) {
                tracing::error!(
                    why,
                    "writes are safe while the supervisor lives; the maps move to a new file"
                );
                self.report.live.problem = Some(why);
                self.tell_report();
            }
        }
        match LiveHome::make(&self.config) {
            Ok(home) => {
                self.moving = Some(home);
                // Workers that do not serve yet have the arena before.
                self.end_others();
                self.standby_at = Some(Instant::now());
            }
            Err(error) => self.move_failed(&error),
        }
    }

    fn move_failed(&mut self, error: &std::io::Error) {
        let why = format!("live maps have no name by which the next daemon finds them: {error}");
        tracing::error!(why, "writes are safe while the supervisor lives; trying again");
        self.report.live.problem = Some(reason(&why));
        self.look_at = Some(Instant::now() + AGAIN);
        self.tell_report();
    }

    /// A standby worker that knows the new arena is prepared: the active one makes room.
    pub(super) fn move_live_maps(&mut self) {
        if self.moving.is_some() && self.upgrading.is_none() && !self.pauses_for_move() {
            self.end_for_move();
        }
    }

    /// The active worker makes room.
    pub(super) fn end_for_move(&mut self) {
        if let Some(active) = &self.active {
            // It is heard of when nothing of it runs any more.
            let _ = sys::kill(active.pid, libc::SIGKILL);
        }
    }

    /// Requests that wait would be lost with the worker: the move is tried again later.
    pub(super) fn put_off_move(&mut self) {
        let Some(new) = self.moving.take() else { return };
        new.discard(sys::Detach::No);
        // It knows the new arena only.
        self.end_others();
        self.standby_at = Some(Instant::now());
        let seconds = PAUSE.as_secs();
        self.move_failed(&std::io::Error::other(format!(
            "requests in flight did not end within {seconds} s, and this kernel cannot send them to the next worker"
        )));
    }

    /// The worker that is to take over, with the live maps where it looks for them. No other one runs.
    pub(super) fn with_live_maps(&mut self, worker: Worker) -> Option<Worker> {
        let Some(new) = self.moving.take() else { return Some(worker) };
        match new.fill(&self.config, self.things.live.as_ref()) {
            Ok(()) => {
                tracing::info!(path = %new.path().display(), "the live maps have moved");
                handover::keep_live(self.since_ns, new.file().as_fd());
                self.report.live.path = Some(new.path().into());
                self.report.live.problem = None;
                self.report.live.moves += u64::from(self.things.live.is_some());
                self.things.live = Some(new);
                Some(worker)
            }
            Err(error) => {
                new.discard(sys::Detach::No);
                self.move_failed(&error);
                // It knows the new arena only.
                let _ = worker.kill();
                let program = &self.things.worker_program;
                self.start_worker(program, false)
                    .inspect_err(|error| tracing::error!(%error, "a worker"))
                    .ok()
            }
        }
    }

    /// The end is wanted: the live maps stay where they are.
    pub(super) fn stay_with_live_maps(&mut self) {
        if let Some(new) = self.moving.take() {
            new.discard(sys::Detach::No);
        }
    }
}
