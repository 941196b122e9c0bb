//! Live upgrade: another version of the program takes over, first as the worker, then as the supervisor.
//!
//! 1. The supervisor starts the candidate from the new program. The candidate prepares itself, and reads the store's
//!    records without changing anything. When the program cannot start, does not speak the protocol or cannot read the
//!    store, the upgrade ends here; the old worker has served all the time.
//! 2. Where the kernel cannot send them to the candidate, the old worker answers the requests that it has read and reads
//!    no more (`Pause`). It answers the control requests that have begun (`Drain`). Then it is killed and reaped. From
//!    here on this is a takeover like any other. When the candidate dies before it serves, the standby worker of the old
//!    version takes over.
//! 3. A child of the new program shows that it understands the hand-over. Then the supervisor continues as the new
//!    program by exec, with its descriptors. When that is not possible, the supervisor stays at its version and reports
//!    that; the worker is of the new version.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::channel::{FromSupervisor, FromWorker};
use super::handover::{self, HandOver};
use super::process::{Phase, Worker, WorkerEvent};
use super::supervisor::{PAUSE_TIMEOUT, Shutdown, Supervisor};
use super::{ServeError, system};
use crate::control::report::{Upgrade, UpgradeState, reason};
use crate::io::sys;

/// How long a candidate may prepare itself. No client waits meanwhile.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(60);
/// How long control requests may take to end.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a candidate may take to serve. All clients wait meanwhile.
const TAKE_OVER_TIMEOUT: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The candidate prepares itself.
    Preparing,
    /// The old worker answers the kernel's requests that it has read, where the new one would not get them.
    Pausing,
    /// The old worker ends its control requests.
    Draining,
    /// The old worker was killed and has not ended yet.
    Ending,
    /// The candidate is the active worker and does not serve yet.
    TakingOver,
}

/// An upgrade in progress.
pub(super) struct Upgrading {
    step: Step,
    /// The time limit of the step.
    pub deadline: Instant,
    program: File,
    /// The candidate, until it becomes the active worker.
    pub candidate: Option<Worker>,
}

impl Upgrading {
    /// Whether the upgrade expects the active worker to end.
    pub fn expects_worker_end(&self) -> bool {
        self.step == Step::Ending
    }

    /// Whether the hand-over from the old worker has begun.
    pub fn is_handing_over(&self) -> bool {
        self.step != Step::Preparing
    }
}

impl Supervisor {
    /// Starts the candidate.
    pub(super) fn begin_upgrade(&mut self, program: Option<PathBuf>) {
        if self.upgrading.is_some() || self.is_shutting_down() {
            // The client was told that an upgrade begins. The report corrects that.
            self.send_report();
            return;
        }
        let path = program.unwrap_or_else(|| self.resources.program.clone());
        let number = self.report.upgrade.as_ref().map_or(0, |u| u.number) + 1;
        let from = self.active.as_ref().and_then(|w| w.version.clone()).unwrap_or_default();
        let at_ns = sys::now_ns();
        self.report.upgrade = Some(Upgrade {
            number,
            state: UpgradeState::Running,
            program: path.clone(),
            from,
            to: None,
            why: None,
            at_ns,
        });
        let started = File::open(&path).and_then(|file| Ok((self.start_worker(&file, true)?, file)));
        match started {
            Ok((candidate, program)) => {
                tracing::info!(program = %path.display(), pid = candidate.pid, "an upgrade begins");
                let deadline = Instant::now() + PREPARE_TIMEOUT;
                self.upgrading =
                    Some(Upgrading { step: Step::Preparing, deadline, program, candidate: Some(candidate) });
                self.send_report();
            }
            Err(error) => self.upgrade_failed(&format!("cannot start {}: {error}", path.display())),
        }
    }

    /// Ends a failed upgrade. The old version serves, or takes over next.
    fn upgrade_failed(&mut self, why: &str) {
        tracing::error!(why, "the upgrade failed; the old version continues to serve");
        if let Some(candidate) = self.upgrading.take().and_then(|u| u.candidate) {
            let _ = candidate.kill();
        }
        if let Some(upgrade) = &mut self.report.upgrade {
            (upgrade.state, upgrade.why, upgrade.at_ns) =
                (UpgradeState::Failed, Some(reason(why)), sys::now_ns());
        }
        self.send_report();
    }

    pub(super) fn handle_candidate(&mut self) -> Result<(), ServeError> {
        let needed = handover::format_of(self.resources.protocol);
        let Some(upgrading) = &mut self.upgrading else { return Ok(()) };
        let Some(worker) = &mut upgrading.candidate else { return Ok(()) };
        match worker.next_event().map_err(system("waiting for the new version"))? {
            WorkerEvent::Message(FromWorker::Prepared { version, hand_over, .. }) if hand_over < 2 => {
                // That version looks for live maps by name, and would not find writes that are not flushed.
                self.upgrade_failed(&format!(
                    "version {version} cannot take over the live maps of this one; stop the daemon and start that \
                     version"
                ));
            }
            WorkerEvent::Message(FromWorker::Prepared { version, hand_over, .. }) if hand_over < needed => {
                self.upgrade_failed(&format!(
                    "version {version} does not serve this kernel; stay with this version, or boot Linux 6.9 or newer"
                ));
            }
            WorkerEvent::Message(FromWorker::Prepared { version, hand_over, answers }) => {
                (worker.version, worker.hand_over, worker.answers) =
                    (Some(version.clone()), hand_over, answers);
                worker.phase = Phase::Prepared;
                (upgrading.step, upgrading.deadline) = (Step::Pausing, Instant::now() + PAUSE_TIMEOUT);
                tracing::info!(version, "the new version is prepared; the old one makes room for it");
                if let Some(upgrade) = &mut self.report.upgrade {
                    upgrade.to = Some(version);
                }
                if !self.is_serving() || !self.begin_pause() {
                    self.upgrade_paused();
                }
            }
            WorkerEvent::Message(FromWorker::Failed(why)) => worker.failure = Some(why),
            WorkerEvent::Message(other) => {
                tracing::warn!(?other, "the new version sent an unexpected message; it is ignored")
            }
            WorkerEvent::Ended(status) => {
                // A worker that ends by itself sends the reason. Another program exits without one.
                let is_plyfs =
                    worker.version.is_some() || worker.failure.is_some() || status.code().is_none();
                let foreign = if is_plyfs { "" } else { "the program is no plyfs: it ended at once, " };
                let why =
                    format!("the new version could not prepare itself: {foreign}{}", worker.why(status));
                upgrading.candidate = None;
                let step = upgrading.step;
                self.upgrade_failed(&why);
                self.after_failed_step(step)?;
            }
        }
        Ok(())
    }

    /// Kills a drained worker, which no longer answers the control socket. The next worker does.
    fn after_failed_step(&mut self, step: Step) -> Result<(), ServeError> {
        if step == Step::Pausing {
            self.continue_serving();
        }
        if step == Step::Draining
            && let Some(active) = &self.active
        {
            let _ = sys::kill(active.pid, libc::SIGKILL);
        }
        Ok(())
    }

    /// Whether a worker serves and answers.
    fn is_serving(&self) -> bool {
        self.active
            .as_ref()
            .is_some_and(|active| active.phase == Phase::Serving && !active.heartbeat.is_lost())
    }

    /// The old worker has answered the kernel's requests that it had read, or the new one gets them.
    pub(super) fn upgrade_paused(&mut self) {
        let is_serving = self.is_serving();
        let Some(upgrading) = self.upgrading.as_mut().filter(|u| u.step == Step::Pausing) else { return };
        (upgrading.step, upgrading.deadline) = (Step::Draining, Instant::now() + DRAIN_TIMEOUT);
        match &self.active {
            Some(active) if is_serving => active.send(&FromSupervisor::Drain),
            // No worker serves at the moment. A worker that is taking over is replaced like any other.
            _ => self.drained(),
        }
    }

    /// The old worker's control requests have ended.
    pub(super) fn drained(&mut self) {
        let Some(upgrading) = &mut self.upgrading else { return };
        if upgrading.step != Step::Draining {
            return;
        }
        (upgrading.step, upgrading.deadline) = (Step::Ending, Instant::now() + TAKE_OVER_TIMEOUT);
        match &self.active {
            // The supervisor handles its end once none of its threads runs.
            Some(active) => drop(sys::kill(active.pid, libc::SIGKILL)),
            None => self.activate_candidate(),
        }
    }

    fn activate_candidate(&mut self) {
        let Some(upgrading) = &mut self.upgrading else { return };
        let Some(candidate) = upgrading.candidate.take() else { return };
        (upgrading.step, upgrading.deadline) = (Step::TakingOver, Instant::now() + TAKE_OVER_TIMEOUT);
        self.activate_worker(candidate);
    }

    /// Handles the end of the active worker. Returns whether the upgrade has activated the next one.
    pub(super) fn upgrade_worker_ended(&mut self, why: &str) -> Result<bool, ServeError> {
        let Some(upgrading) = &self.upgrading else { return Ok(false) };
        match upgrading.step {
            Step::Preparing => Ok(false),
            // A worker that died by itself while it drained is treated in the same way.
            Step::Pausing | Step::Draining | Step::Ending => {
                self.activate_candidate();
                Ok(true)
            }
            Step::TakingOver => {
                self.upgrade_failed(&format!("the new version could not take over: {why}"));
                Ok(false)
            }
        }
    }

    pub(super) fn upgrade_timed_out(&mut self) -> Result<(), ServeError> {
        let Some(upgrading) = &mut self.upgrading else { return Ok(()) };
        match upgrading.step {
            Step::Preparing => self.upgrade_failed("the new version did not prepare itself within a minute"),
            Step::Pausing => {
                self.upgrade_failed(&format!(
                    "requests in flight did not end within {} s, as they wait for a disk or for the server of a base \
                     (plyfs status), and this kernel cannot hand them to the new version; try again when they have ended",
                    PAUSE_TIMEOUT.as_secs()
                ));
                self.continue_serving();
            }
            Step::Draining => {
                tracing::warn!(
                    "requests on the control socket did not end in time and are cut off; commands repeat them"
                );
                self.drained();
            }
            // A killed worker that does not end waits for a disk. Until it ends, the daemon cannot continue (D1).
            Step::Ending => upgrading.deadline = Instant::now() + TAKE_OVER_TIMEOUT,
            Step::TakingOver => {
                if let Some(active) = &mut self.active {
                    active.failure = Some("it did not serve in time".into());
                    let _ = sys::kill(active.pid, libc::SIGKILL);
                }
                upgrading.deadline = Instant::now() + TAKE_OVER_TIMEOUT;
            }
        }
        Ok(())
    }

    /// Completes the upgrade when the worker that serves now is the candidate.
    pub(super) fn finish_upgrade(&mut self) {
        if !self.upgrading.as_ref().is_some_and(|u| u.step == Step::TakingOver) {
            return;
        }
        let Some(upgrading) = self.upgrading.take() else { return };
        self.resources.worker_program = upgrading.program;
        if let Some(upgrade) = &mut self.report.upgrade {
            (upgrade.state, upgrade.at_ns) = (UpgradeState::Done, sys::now_ns());
            self.resources.program.clone_from(&upgrade.program);
        }
        tracing::info!(program = %self.resources.program.display(), "the new version serves");
        // The standby worker is of the old version.
        self.end_others();
        // When the end is requested, this version of the supervisor can carry it out. The request is not part of a
        // hand-over.
        if self.shutdown == Shutdown::Requested {
            return;
        }
        if let Err(why) = self.exec_new_program() {
            tracing::warn!(why, "the supervisor stays at its old version; the worker is of the new one");
            if let Some(upgrade) = &mut self.report.upgrade {
                upgrade.why = Some(reason(&format!(
                    "the supervisor stays version {}: {why}",
                    env!("CARGO_PKG_VERSION")
                )));
            }
        }
        self.standby_at = Some(Instant::now());
        self.send_report();
    }

    /// Continues as the new program by exec. It returns only when that fails, with the reason.
    fn exec_new_program(&mut self) -> Result<(), String> {
        let Some(active) = &self.active else { return Err("no worker serves".into()) };
        let format = handover::format_of(self.resources.protocol);
        if active.hand_over < format {
            return Err("the new version cannot read the hand-over of this one".into());
        }
        let resources = &self.resources;
        let device = active.device.as_ref();
        let state = HandOver {
            format,
            config: resources.config.clone(),
            program: resources.program.clone(),
            fuse: resources.fuse.as_raw_fd(),
            protocol: resources.protocol,
            device: device.map(|device| (device.fd().as_raw_fd(), device.table().as_raw_fd())),
            lock: resources.lock.as_raw_fd(),
            listener: resources.listener.as_raw_fd(),
            page: resources.page.as_ref().map(AsRawFd::as_raw_fd),
            export: resources.export.as_ref().map(AsRawFd::as_raw_fd),
            cache: resources.cache.as_raw_fd(),
            live: resources.live.as_ref().map(|home| (home.file().as_raw_fd(), home.path().into())),
            worker_pid: active.pid,
            channel: active.channel.0.as_raw_fd(),
            worker_version: active.version.clone().unwrap_or_default(),
            worker_answers: active.answers,
            since_ns: resources.since_ns,
            report: self.report.clone(),
        };
        let mut shared = vec![
            resources.fuse.as_fd(),
            resources.lock.as_fd(),
            resources.listener.as_fd(),
            resources.cache.as_fd(),
            active.channel.0.as_fd(),
        ];
        shared.extend(resources.live.as_ref().map(|home| home.file().as_fd()));
        shared.extend(device.iter().flat_map(|device| [device.fd(), device.table()]));
        shared.extend(resources.page.as_ref().map(AsFd::as_fd));
        shared.extend(resources.export.as_ref().map(AsFd::as_fd));
        // The file that was opened, not a file that has replaced it since.
        let opened = PathBuf::from(format!("/proc/self/fd/{}", resources.worker_program.as_raw_fd()));
        Err(handover::exec_program(&opened, &state, &shared).to_string())
    }
}
