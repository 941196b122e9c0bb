//! The check whether the worker runs, and the answers to clients of the control socket while it does not.
//!
//! The worker's listener thread answers a ping each second. This proves that its process runs, not that disks are fast.
//! What must hold:
//! - A worker counts as not answering after [`MAX_MISSED`] pings in a row without an answer, not after one late answer.
//!   The count only grows while this process runs, so a busy or suspended host does not count.
//! - The log and the answers to clients name a worker that does not answer. Only the operator has it killed (`plyfs
//!   upgrade`, `plyfs stop`): until then it may answer again, and nothing is lost.
//!
//! [`MAX_MISSED`]: super::super::heartbeat::MAX_MISSED

use std::time::{Duration, Instant};

use super::super::channel::FromSupervisor;
use super::super::heartbeat::HeartbeatStep;
use super::super::process::Phase;
use super::super::unavailable::{self, SupervisorRequest, Unavailability};
use super::super::{ServeError, system};
use super::Supervisor;
use crate::control::wire::{SilentStatus, Standby, WorkerEnd, rfc3339};
use crate::io::sys;

/// After this time without a worker, the supervisor answers clients of the control socket with the reason.
pub(super) const UNAVAILABLE_AFTER: Duration = Duration::from_secs(1);

impl Supervisor {
    /// Whether the supervisor answers the control socket, because no worker does.
    pub(super) fn answers_clients(&self) -> bool {
        let is_down =
            self.serving_state.down_since().is_some_and(|since| since.elapsed() >= UNAVAILABLE_AFTER);
        is_down || self.active.as_ref().is_some_and(|worker| worker.heartbeat.is_lost())
    }

    /// Pings the worker when a ping is due, and acts on pings without an answer.
    pub(super) fn check_heartbeat(&mut self, now: Instant) -> Result<(), ServeError> {
        let Some(worker) = self.active.as_mut().filter(|worker| worker.phase == Phase::Serving) else {
            return Ok(());
        };
        let step = worker.heartbeat.poll(now);
        if matches!(step, HeartbeatStep::Pending | HeartbeatStep::Lost) && worker.is_leftover() {
            let status = worker.kill().map_err(system("waiting for the worker"))?;
            return self.active_ended(status);
        }
        match step {
            HeartbeatStep::NotDue | HeartbeatStep::Pending => {}
            HeartbeatStep::Ping => worker.send(&FromSupervisor::Ping),
            HeartbeatStep::Lost => {
                worker.heartbeat.lost_at_ns = sys::now_ns();
                tracing::error!(
                    pid = worker.pid,
                    "the worker does not answer; disks wait until it does; replace it with: plyfs upgrade"
                );
                if self.is_closing() {
                    self.replace_lost();
                }
            }
        }
        Ok(())
    }

    /// The worker has answered a ping.
    pub(super) fn is_alive(&mut self) {
        let Some(worker) = &mut self.active else { return };
        if worker.heartbeat.answered() {
            let silent_ms = (sys::now_ns() - worker.heartbeat.lost_at_ns) / 1_000_000;
            tracing::info!(pid = worker.pid, silent_ms, "the worker answers again");
            self.send_report();
        }
    }

    /// Answers one client in the worker's place.
    pub(super) fn answer_client(&mut self) -> Result<(), ServeError> {
        // Only one upgrade runs at a time.
        let next = self.report.upgrade.as_ref().map_or(0, |u| u.number) + 1;
        let upgrade = (self.upgrading.is_none() && !self.is_shutting_down()).then_some(next);
        let (message, status) = self.unavailability();
        let unavailability = Unavailability { message: &message, status: status.as_ref(), upgrade };
        match unavailable::answer(&self.listener, &unavailability) {
            Some(SupervisorRequest::Stop) => self.stop()?,
            Some(SupervisorRequest::Upgrade) => self.begin_upgrade(None),
            None => {}
        }
        Ok(())
    }

    /// Why no worker answers, and the status when a worker exists that does not answer.
    fn unavailability(&self) -> (String, Option<SilentStatus>) {
        let Some(worker) = self.active.as_ref().filter(|worker| worker.heartbeat.is_lost()) else {
            return (self.why_down(), None);
        };
        let (pid, since_ns) = (worker.pid, worker.heartbeat.lost_at_ns);
        let since = rfc3339(since_ns);
        let why = match worker.state() {
            Some('T' | 't') => "it is stopped by a signal or a debugger (SIGCONT lets it go on)",
            Some('D') => "it waits in the kernel",
            Some('Z') => "it was killed, and a thread of it waits in the kernel",
            _ => "it gets no processor time, or it hangs",
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
        let down = self.serving_state.down_since().map_or(0, |since| since.elapsed().as_secs());
        let last = match self.report.ends.last() {
            Some(end) => format!("the last one ended after {} ms: {}", end.served_ms, end.why),
            None => "the first one is being started".to_owned(),
        };
        let next = match (&self.active, self.serving_state.deadline()) {
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
