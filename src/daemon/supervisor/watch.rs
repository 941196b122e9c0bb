//! Whether the worker runs, and what clients of the control socket hear when it does not.
//!
//! The worker's ear answers a ping each second: proof that its process runs, not that disks are fast. What must hold:
//! - A worker is not judged by one late answer but by [`LOST`] questions in a row without one, counted while this process
//!   runs: a busy or suspended host looks like nothing at all.
//! - A worker that does not answer is named, in the log and to clients. It is killed when the operator says so (`plyfs
//!   upgrade`, `plyfs stop`): until then it may come back, and nothing of it is lost.
//!
//! [`LOST`]: super::super::pulse::LOST

use std::time::{Duration, Instant};

use super::super::channel::FromSupervisor;
use super::super::process::Phase;
use super::super::pulse::Felt;
use super::super::unavailable::{self, Situation, Wish};
use super::super::{ServeError, system};
use super::Supervisor;
use crate::control::wire::{SilentStatus, Standby, WorkerEnd, rfc3339};
use crate::io::sys;

/// After so long without a worker, clients of the control socket are told why.
pub(super) const SILENCE: Duration = Duration::from_secs(1);

impl Supervisor {
    /// No worker answers the control socket, and clients are to hear why.
    pub(super) fn answers_clients(&self) -> bool {
        let is_down = self.seat.down_since().is_some_and(|since| since.elapsed() >= SILENCE);
        is_down || self.active.as_ref().is_some_and(|worker| worker.pulse.is_lost())
    }

    /// Asks the worker whether it runs, when it is time to.
    pub(super) fn feel_the_pulse(&mut self, now: Instant) -> Result<(), ServeError> {
        let Some(worker) = self.active.as_mut().filter(|worker| worker.phase == Phase::Serving) else {
            return Ok(());
        };
        let felt = worker.pulse.feel(now);
        if matches!(felt, Felt::Waits | Felt::Lost) && worker.is_leftover() {
            let status = worker.kill().map_err(system("waiting for the worker"))?;
            return self.active_ended(status);
        }
        match felt {
            Felt::NotDue | Felt::Waits => {}
            Felt::Ask => worker.tell(&FromSupervisor::Ping),
            Felt::Lost => {
                worker.pulse.lost_at_ns = sys::now_ns();
                tracing::error!(
                    pid = worker.pid,
                    "the worker does not answer; disks wait until it does, or until it is replaced: plyfs upgrade"
                );
                if self.is_closing() {
                    self.replace_lost();
                }
            }
        }
        Ok(())
    }

    /// The worker has answered.
    pub(super) fn is_alive(&mut self) {
        let Some(worker) = &mut self.active else { return };
        if worker.pulse.answered() {
            let silent_ms = (sys::now_ns() - worker.pulse.lost_at_ns) / 1_000_000;
            tracing::info!(pid = worker.pid, silent_ms, "the worker answers again");
            self.tell_report();
        }
    }

    /// Answers one client in the worker's place.
    pub(super) fn answer_client(&mut self) -> Result<(), ServeError> {
        // While one is under way there is no other.
        let next = self.report.upgrade.as_ref().map_or(0, |u| u.number) + 1;
        let upgrade = (self.upgrading.is_none() && !self.is_ending()).then_some(next);
        let (message, status) = self.situation();
        let situation = Situation { message: &message, status: status.as_ref(), upgrade };
        match unavailable::answer(&self.listener, &situation) {
            Some(Wish::Stop) => self.stop()?,
            Some(Wish::Upgrade) => self.begin_upgrade(None),
            None => {}
        }
        Ok(())
    }

    /// Why no worker answers; and what `status` says of one that is there and does not.
    fn situation(&self) -> (String, Option<SilentStatus>) {
        let Some(worker) = self.active.as_ref().filter(|worker| worker.pulse.is_lost()) else {
            return (self.why_down(), None);
        };
        let (pid, since_ns) = (worker.pid, worker.pulse.lost_at_ns);
        let since = rfc3339(since_ns);
        let why = match worker.state() {
            Some('T' | 't') => "it is stopped by a signal or a debugger (SIGCONT lets it go on)",
            Some('D') => "it waits in the kernel",
            Some('Z') => "it was killed, and a thread of it waits in the kernel",
            _ => "it gets no processor time, or hangs",
        };
        let message = format!(
            "worker {pid} has not answered since {since}: {why}; disks wait until it does. Replace it with: plyfs \
             upgrade, or end the daemon with: plyfs stop"
        );
        let report = &self.report;
        let status = SilentStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            mount: self.config.mount.display().to_string(),
            store: self.config.store.display().to_string(),
            supervisor_pid: sys::pid(),
            supervisor_version: report.supervisor_version.clone(),
            worker_pid: pid,
            worker_starts: report.worker_starts,
            worker_not_answering_since: since,
            worker_not_answering_why: why.to_owned(),
            worker_ends: report.ends.iter().map(WorkerEnd::from).collect(),
            standby: Standby::from(&report.standby),
            uptime_seconds: (sys::now_ns() - self.since_ns) / 1_000_000_000,
            bases: None,
            disks: None,
            cache: None,
        };
        (message, Some(status))
    }

    fn why_down(&self) -> String {
        let down = self.seat.down_since().map_or(0, |since| since.elapsed().as_secs());
        let last = match self.report.ends.last() {
            Some(end) => format!("the last one ended after {} ms: {}", end.served_ms, end.why),
            None => "it is being started".to_owned(),
        };
        let next = match (&self.active, self.seat.deadline()) {
            (Some(worker), _) => format!("worker {} is taking over", worker.pid),
            (None, Some(at)) => {
                format!(
                    "the next one is tried in {} ms",
                    at.saturating_duration_since(Instant::now()).as_millis()
                )
            }
            (None, None) => "none is being started".to_owned(),
        };
        format!(
            "no worker has served for {down} s; {last}; {next}; disks wait until then, see the daemon's log"
        )
    }
}
