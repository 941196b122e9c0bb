//! Live upgrade: another version of the program takes over, first as the worker, then as the supervisor.
//!
//! 1. The candidate is started from the new program and prepares itself; it reads the store's records without
//!    changing anything. A program that cannot start, does not speak the protocol or cannot read the store ends here,
//!    and the old worker has served all the time.
//! 2. Where the kernel cannot send them to the candidate, the old worker answers the requests that it has read and reads no
//!    more (`Pause`). It answers the control requests that have begun (`Drain`), then is killed and reaped: from here on
//!    it is a takeover like any other. When the candidate dies before it serves, the standby worker of the old version
//!    takes over.
//! 3. The supervisor goes on as the new program by exec, with its descriptors, after a child of that program has shown
//!    that it understands what is handed over. When that is not possible it stays and says so; only its own version
//!    is old then.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::channel::{FromSupervisor, FromWorker};
use super::handover::{self, HandOver};
use super::process::{Heard, Phase, Worker};
use super::supervisor::{Ending, PAUSE, Supervisor};
use super::{ServeError, system};
use crate::control::report::{Upgrade, UpgradeState, reason};
use crate::io::sys;

/// How long a candidate may prepare itself; nobody waits for it.
const PREPARE: Duration = Duration::from_secs(60);
/// How long control requests may take to end.
const DRAIN: Duration = Duration::from_secs(5);
/// How long a candidate may take to serve, while everybody waits.
const TAKE_OVER: Duration = Duration::from_secs(20);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The candidate prepares itself.
    Preparing,
    /// The old worker answers the kernel's requests that it has read, where the new one would not get them.
    Pausing,
    /// The old worker ends its control requests.
    Draining,
    /// The old worker was told to die.
    Ending,
    /// The candidate is the active worker and does not serve yet.
    TakingOver,
}

/// An upgrade under way.
pub(super) struct Upgrading {
    step: Step,
    /// When the step has taken too long.
    pub deadline: Instant,
    program: File,
    /// Until it becomes the active worker.
    pub candidate: Option<Worker>,
}

impl Upgrading {
    /// Whether the active worker's end is part of the plan.
    pub fn ended_the_worker(&self) -> bool {
        self.step == Step::Ending
    }

    /// Whether the old worker is on its way out.
    pub fn is_handing_over(&self) -> bool {
        self.step != Step::Preparing
    }
}

impl Supervisor {
    /// Starts the candidate.
    pub(super) fn begin_upgrade(&mut self, program: Option<PathBuf>) {
        if self.upgrading.is_some() || self.is_ending() {
            // Who asked was told of one that now is not.
            self.tell_report();
            return;
        }
        let path = program.unwrap_or_else(|| self.things.program.clone());
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
                let deadline = Instant::now() + PREPARE;
                self.upgrading =
                    Some(Upgrading { step: Step::Preparing, deadline, program, candidate: Some(candidate) });
                self.tell_report();
            }
            Err(error) => self.upgrade_failed(&format!("{} cannot be started: {error}", path.display())),
        }
    }

    /// The old version serves, or will in a moment.
    fn upgrade_failed(&mut self, why: &str) {
        tracing::error!(why, "the upgrade failed; the version before goes on");
        if let Some(candidate) = self.upgrading.take().and_then(|u| u.candidate) {
            let _ = candidate.kill();
        }
        if let Some(upgrade) = &mut self.report.upgrade {
            (upgrade.state, upgrade.why, upgrade.at_ns) =
                (UpgradeState::Failed, Some(reason(why)), sys::now_ns());
        }
        self.tell_report();
    }

    pub(super) fn hear_candidate(&mut self) -> Result<(), ServeError> {
        let needed = handover::format_of(self.things.protocol);
        let Some(upgrading) = &mut self.upgrading else { return Ok(()) };
        let Some(worker) = &mut upgrading.candidate else { return Ok(()) };
        match worker.listen().map_err(system("waiting for the new version"))? {
            // It would look for live maps by name, and not find what is not flushed.
            Heard::Said(FromWorker::Prepared { version, hand_over, .. }) if hand_over < 2 => {
                self.upgrade_failed(&format!(
                    "version {version} cannot take over the live maps of this one; stop the daemon and start that version"
                ));
            }
            Heard::Said(FromWorker::Prepared { version, hand_over, .. }) if hand_over < needed => {
                self.upgrade_failed(&format!(
                    "version {version} does not serve this kernel; stay with this version, or boot Linux 6.9 or newer"
                ));
            }
            Heard::Said(FromWorker::Prepared { version, hand_over, answers }) => {
                (worker.version, worker.hand_over, worker.answers) =
                    (Some(version.clone()), hand_over, answers);
                worker.phase = Phase::Prepared;
                (upgrading.step, upgrading.deadline) = (Step::Pausing, Instant::now() + PAUSE);
                tracing::info!(version, "the new version is prepared and the old one makes room");
                if let Some(upgrade) = &mut self.report.upgrade {
                    upgrade.to = Some(version);
                }
                if !self.is_serving() || !self.pauses() {
                    self.upgrade_paused();
                }
            }
            Heard::Said(FromWorker::Failed(why)) => worker.failure = Some(why),
            Heard::Said(other) => tracing::warn!(?other, "a new version has nothing to say but that"),
            Heard::Ended(status) => {
                let why = worker.why(status);
                upgrading.candidate = None;
                let step = upgrading.step;
                self.upgrade_failed(&format!("the new version could not prepare itself: {why}"));
                self.after_failed_step(step)?;
            }
        }
        Ok(())
    }

    /// A drained worker answers the control socket no more; it makes room for one that does.
    fn after_failed_step(&mut self, step: Step) -> Result<(), ServeError> {
        if step == Step::Pausing {
            self.go_on();
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
        self.active.as_ref().is_some_and(|active| active.phase == Phase::Serving && !active.pulse.is_lost())
    }

    /// The kernel's requests that the old worker has read are answered, or come again.
    pub(super) fn upgrade_paused(&mut self) {
        let is_serving = self.is_serving();
        let Some(upgrading) = self.upgrading.as_mut().filter(|u| u.step == Step::Pausing) else { return };
        (upgrading.step, upgrading.deadline) = (Step::Draining, Instant::now() + DRAIN);
        match &self.active {
            Some(active) if is_serving => active.tell(&FromSupervisor::Drain),
            // Nobody serves at the moment; the worker that is on its way is replaced like any other.
            _ => self.drained(),
        }
    }

    /// The old worker's control requests have ended.
    pub(super) fn drained(&mut self) {
        let Some(upgrading) = &mut self.upgrading else { return };
        if upgrading.step != Step::Draining {
            return;
        }
        (upgrading.step, upgrading.deadline) = (Step::Ending, Instant::now() + TAKE_OVER);
        match &self.active {
            // It is heard of when nothing of it runs any more.
            Some(active) => drop(sys::kill(active.pid, libc::SIGKILL)),
            None => self.give_to_candidate(),
        }
    }

    fn give_to_candidate(&mut self) {
        let Some(upgrading) = &mut self.upgrading else { return };
        let Some(candidate) = upgrading.candidate.take() else { return };
        (upgrading.step, upgrading.deadline) = (Step::TakingOver, Instant::now() + TAKE_OVER);
        self.hand_to(candidate);
    }

    /// The active worker has ended; true when the upgrade has seen to the next one.
    pub(super) fn upgrade_worker_ended(&mut self, why: &str) -> Result<bool, ServeError> {
        let Some(upgrading) = &self.upgrading else { return Ok(false) };
        match upgrading.step {
            Step::Preparing => Ok(false),
            // It may have died by itself while it drained: all the same.
            Step::Pausing | Step::Draining | Step::Ending => {
                self.give_to_candidate();
                Ok(true)
            }
            Step::TakingOver => {
                self.upgrade_failed(&format!("the new version could not take over: {why}"));
                Ok(false)
            }
        }
    }

    pub(super) fn upgrade_is_late(&mut self) -> Result<(), ServeError> {
        let Some(upgrading) = &mut self.upgrading else { return Ok(()) };
        match upgrading.step {
            Step::Preparing => self.upgrade_failed("the new version did not prepare itself within a minute"),
            Step::Pausing => {
                self.upgrade_failed(&format!(
                    "requests in flight did not end within {} s, as they wait for a disk or for the server of a base \
                     (plyfs status), and this kernel cannot hand them to the new version; try again when they have ended",
                    PAUSE.as_secs()
                ));
                self.go_on();
            }
            Step::Draining => {
                tracing::warn!("requests of the control socket did not end in time and are cut off");
                self.drained();
            }
            // A worker that was killed and does not end waits for a disk; so does everybody.
            Step::Ending => upgrading.deadline = Instant::now() + TAKE_OVER,
            Step::TakingOver => {
                if let Some(active) = &mut self.active {
                    active.failure = Some("it did not serve in time".into());
                    let _ = sys::kill(active.pid, libc::SIGKILL);
                }
                upgrading.deadline = Instant::now() + TAKE_OVER;
            }
        }
        Ok(())
    }

    /// A worker serves: when it is the candidate, the rest of the upgrade is done.
    pub(super) fn upgrade_serves(&mut self) {
        if !self.upgrading.as_ref().is_some_and(|u| u.step == Step::TakingOver) {
            return;
        }
        let Some(upgrading) = self.upgrading.take() else { return };
        self.things.worker_program = upgrading.program;
        if let Some(upgrade) = &mut self.report.upgrade {
            (upgrade.state, upgrade.at_ns) = (UpgradeState::Done, sys::now_ns());
            self.things.program.clone_from(&upgrade.program);
        }
        tracing::info!(program = %self.things.program.display(), "the new version serves");
        // The standby worker is of the old version.
        self.end_others();
        // When the end is wanted, this version is good enough for it; and the wish does not travel.
        if self.ending == Ending::Wanted {
            return;
        }
        if let Err(why) = self.become_new() {
            tracing::warn!(why, "the supervisor stays what it was");
            if let Some(upgrade) = &mut self.report.upgrade {
                upgrade.why = Some(reason(&format!(
                    "the supervisor stays version {}: {why}",
                    env!("CARGO_PKG_VERSION")
                )));
            }
        }
        self.standby_at = Some(Instant::now());
        self.tell_report();
    }

    /// Goes on as the new program; returns only when that is not possible.
    fn become_new(&mut self) -> Result<(), String> {
        let Some(active) = &self.active else { return Err("no worker serves".into()) };
        let format = handover::format_of(self.things.protocol);
        if active.hand_over < format {
            return Err("the new version cannot read what this one hands over".into());
        }
        let things = &self.things;
        let device = active.device.as_ref();
        let state = HandOver {
            format,
            config: things.config.clone(),
            program: things.program.clone(),
            fuse: things.fuse.as_raw_fd(),
            protocol: things.protocol,
            device: device.map(|device| (device.fd().as_raw_fd(), device.table().as_raw_fd())),
            lock: things.lock.as_raw_fd(),
            listener: things.listener.as_raw_fd(),
            cache: things.cache.as_raw_fd(),
            live: things.live.as_ref().map(|home| (home.file().as_raw_fd(), home.path().into())),
            worker_pid: active.pid,
            channel: active.channel.0.as_raw_fd(),
            worker_version: active.version.clone().unwrap_or_default(),
            worker_answers: active.answers,
            since_ns: things.since_ns,
            report: self.report.clone(),
        };
        let mut shared = vec![
            things.fuse.as_fd(),
            things.lock.as_fd(),
            things.listener.as_fd(),
            things.cache.as_fd(),
            active.channel.0.as_fd(),
        ];
        shared.extend(things.live.as_ref().map(|home| home.file().as_fd()));
        shared.extend(device.iter().flat_map(|device| [device.fd(), device.table()]));
        // The file that was opened, not what may have been put in its place since.
        let opened = PathBuf::from(format!("/proc/self/fd/{}", things.worker_program.as_raw_fd()));
        Err(handover::become_program(&opened, &state, &shared).to_string())
    }
}
