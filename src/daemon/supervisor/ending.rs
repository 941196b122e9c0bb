//! The end: the mount goes first, then the worker closes the store and exits.
//!
//! What must hold: it comes in bounded time. A worker that does not answer is killed, and another one closes the store.
//! One that has closed it and cannot end, as a thread of it waits in the kernel for a filesystem that hangs, is left
//! alone: it has let go of the store's lock.

use std::process::ExitStatus;
use std::time::{Duration, Instant};

use super::super::channel::FromSupervisor;
use super::super::process::Worker;
use super::super::upgrade::Upgrading;
use super::super::{ServeError, handover, mount};
use super::state::{Closing, Ending, MountEnd, Seat};
use super::{CLOSING_TAKE_OVER, Supervisor};
use crate::control::report::UpgradeState;
use crate::format::layout::CONTROL_SOCKET;
use crate::fuse::kernel;
use crate::io::sys;

/// So many workers may die while the store is being closed before it is left to the next start.
const CLOSINGS: u32 = 3;
/// How long a worker that has closed the store may take to end.
const LAST_BREATH: Duration = Duration::from_secs(2);
/// How long one that was killed may take.
const AFTER_KILL: Duration = Duration::from_secs(20);

impl Supervisor {
    /// A worker that was killed while it closed the store is replaced like any other: what was written is to be
    /// durable when the daemon has stopped. One that says what it cannot do is not asked again.
    pub(super) fn closing_worker_ended(
        &mut self,
        worker: &Worker,
        status: ExitStatus,
    ) -> Result<(), ServeError> {
        let Ending::Closing(closing) = &mut self.ending else { return Ok(()) };
        closing.leave_at = None;
        if closing.closed {
            // However it ended then, or what of it is left.
            self.outcome = Some(Ok(()));
            return Ok(());
        }
        closing.deaths += 1;
        let deaths = closing.deaths;
        if status.success() || worker.failure.is_some() || !self.announced || deaths > CLOSINGS {
            self.outcome = Some(self.ended(worker, status));
            return Ok(());
        }
        tracing::error!(
            why = worker.why(status),
            "the worker ended while it closed the store; another one goes on"
        );
        self.activate()?;
        if self.active.is_none() {
            self.outcome = Some(self.ended(worker, status));
        }
        Ok(())
    }

    pub(super) fn stop(&mut self) -> Result<(), ServeError> {
        if self.is_closing() {
            return Ok(());
        }
        if self.upgrading.as_ref().is_some_and(Upgrading::is_handing_over) {
            self.ending = Ending::Wanted;
            return Ok(());
        }
        self.ending = Ending::No;
        if let Some(upgrade) = &mut self.report.upgrade
            && upgrade.state == UpgradeState::Running
        {
            upgrade.state = UpgradeState::Failed;
        }
        // A worker has to close the store.
        if self.active.is_none() {
            self.activate()?;
        }
        // From here on the end has its own deadline.
        self.seat.set_deadline(None);
        self.end_others();
        self.stay_with_live_maps();
        if self.pause_until.is_some() {
            // One that does not read does not see that the mount is gone.
            self.go_on();
        }
        let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Stopping]);
        handover::forget(self.since_ns);
        let device = mount::device(&self.config.mount);
        let mount = match mount::end(&self.config.mount, sys::Detach::No) {
            Ok(()) => MountEnd::Unmounted,
            Err(error) => {
                tracing::warn!(%error, "files on the mount are open; what uses them will see I/O errors");
                // Another process may have detached it.
                if let Err(error) = mount::end(&self.config.mount, sys::Detach::Yes) {
                    tracing::warn!(%error, "the mount cannot be detached");
                }
                MountEnd::Detached
            }
        };
        self.ending = Ending::Closing(Closing { mount, device, deaths: 0, closed: false, leave_at: None });
        let Some(worker) = &self.active else {
            let last = self.report.ends.last().map_or_else(String::new, |end| format!(" ({})", end.why));
            self.outcome = Some(Err(ServeError::Worker {
                why: format!(
                    "no worker could close the store{last}; what was written and not flushed is in memory until the \
                     next reboot; start again with: plyfs serve --store {}",
                    self.config.store.display()
                ),
            }));
            return Ok(());
        };
        if mount == MountEnd::Detached {
            worker.tell(&FromSupervisor::Finish);
        }
        if self.seat != Seat::Serving {
            self.seat.set_deadline(Some(Instant::now() + CLOSING_TAKE_OVER));
        }
        if worker.pulse.is_lost() {
            self.replace_lost();
        }
        Ok(())
    }

    pub(super) fn ended(&self, worker: &Worker, status: ExitStatus) -> Result<(), ServeError> {
        if status.success() {
            return Ok(());
        }
        let why = match &worker.failure {
            Some(failure) => failure.clone(),
            None => format!("the worker ended badly while stopping: {status}"),
        };
        let store = self.config.store.display();
        Err(ServeError::Worker { why: format!("{why}; start again with: plyfs serve --store {store}") })
    }
    /// The worker has closed the store and let go of its lock.
    pub(super) fn store_is_closed(&mut self) {
        if let Ending::Closing(closing) = &mut self.ending {
            closing.closed = true;
            closing.leave_at = Some(Instant::now() + LAST_BREATH);
        }
    }

    /// The active worker does not answer and is killed; at the end another one closes the store.
    pub(super) fn replace_lost(&mut self) {
        let Some(worker) = &mut self.active else { return };
        let why = "it did not answer the supervisor";
        tracing::error!(pid = worker.pid, why, "the worker is killed; another one closes the store");
        let _ = sys::kill(worker.pid, libc::SIGKILL);
        if let Ending::Closing(closing) = &mut self.ending {
            closing.leave_at = Some(Instant::now() + AFTER_KILL);
        }
    }

    /// When a worker that is to be gone is not waited for any more.
    pub(super) fn leave_at(&self) -> Option<Instant> {
        match &self.ending {
            Ending::Closing(closing) => closing.leave_at,
            _ => None,
        }
    }

    /// A worker that is to be gone is not.
    pub(super) fn give_up_the_worker(&mut self) {
        let Ending::Closing(closing) = &mut self.ending else { return };
        closing.leave_at = None;
        let Closing { device, closed, .. } = *closing;
        let Some(worker) = &self.active else { return };
        let pid = worker.pid;
        tracing::error!(
            pid,
            closed,
            "the worker does not end: a thread of it waits in the kernel for a disk or filesystem that hangs"
        );
        // It has the device open, and its clients would wait as long as it does.
        if let Some(Err(error)) = device.map(kernel::abort) {
            tracing::warn!(%error, "requests of files that are open cannot be ended");
        }
        self.outcome = Some(match closed {
            true => Ok(()),
            false => Err(ServeError::Worker {
                why: format!(
                    "worker {pid} was killed and does not end: a thread of it waits in the kernel for a disk or \
                     filesystem that hangs. What was written is in memory until the next reboot, and flushed by the \
                     next start, which comes when the worker has ended: plyfs serve --store {}",
                    self.config.store.display()
                ),
            }),
        });
    }

    /// The end: the socket goes, and after a clean end the live maps' place.
    pub(super) fn finished(&mut self, result: &Result<(), ServeError>) {
        let _ = std::fs::remove_file(self.config.store.join(CONTROL_SOCKET));
        // A worker that lives may still need it.
        let over = result.is_ok() || self.active.is_none();
        if let Some(live) = self.things.live.take().filter(|_| over) {
            live.remove(&self.things.config);
        }
    }
}
