//! The end of the daemon: the mount goes first, then the worker closes the store and exits.
//!
//! What must hold: the end takes bounded time. A worker that does not answer is killed, and another one closes the
//! store. A worker that has closed the store and cannot exit, because a thread of it waits in the kernel for a
//! filesystem that hangs, is left behind: it has released the store's lock.

use std::os::fd::AsFd;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use super::super::channel::FromSupervisor;
use super::super::process::Worker;
use super::super::upgrade::Upgrading;
use super::super::{ServeError, handover, mount, page_socket};
use super::state::{Closing, MountEnd, ServingState, Shutdown};
use super::{CLOSING_TAKE_OVER, Supervisor};
use crate::control::report::UpgradeState;
use crate::format::layout::CONTROL_SOCKET;
use crate::fuse::kernel;
use crate::io::sys;

/// The number of workers that may die while they close the store. After that the next start has to recover the store.
const MAX_CLOSING_DEATHS: u32 = 3;
/// How long a worker that has closed the store may take to exit.
const EXIT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a killed worker may take to end.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);

impl Supervisor {
    /// Replaces a worker that was killed while it closed the store, because all data must be durable when the daemon
    /// has stopped. A worker that reported why it cannot close the store is not replaced.
    pub(super) fn closing_worker_ended(
        &mut self,
        worker: &Worker,
        status: ExitStatus,
    ) -> Result<(), ServeError> {
        let Shutdown::Closing(closing) = &mut self.shutdown else { return Ok(()) };
        closing.abandon_at = None;
        if closing.closed {
            // The store is closed, so it does not matter how the worker ended.
            self.outcome = Some(Ok(()));
            return Ok(());
        }
        closing.deaths += 1;
        let deaths = closing.deaths;
        if status.success() || worker.failure.is_some() || !self.announced || deaths > MAX_CLOSING_DEATHS {
            self.outcome = Some(self.worker_result(worker, status));
            return Ok(());
        }
        tracing::error!(
            why = worker.why(status),
            "the worker ended while it closed the store; another one closes it"
        );
        self.activate()?;
        if self.active.is_none() {
            self.outcome = Some(self.worker_result(worker, status));
        }
        Ok(())
    }

    pub(super) fn stop(&mut self) -> Result<(), ServeError> {
        if self.is_closing() {
            return Ok(());
        }
        if self.upgrading.as_ref().is_some_and(Upgrading::is_handing_over) {
            self.shutdown = Shutdown::Requested;
            return Ok(());
        }
        self.shutdown = Shutdown::None;
        if let Some(upgrade) = &mut self.report.upgrade
            && upgrade.state == UpgradeState::Running
        {
            upgrade.state = UpgradeState::Failed;
        }
        // Only a worker can close the store.
        if self.active.is_none() {
            self.activate()?;
        }
        // From here on the end has its own deadline.
        self.serving_state.set_deadline(None);
        self.end_others();
        self.cancel_relocation();
        if self.pause_until.is_some() {
            // A worker that reads no requests does not see that the mount is gone.
            self.continue_serving();
        }
        let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Stopping]);
        handover::forget(self.since_ns);
        let device = mount::device(&self.config.mount);
        let mount = match mount::end(&self.config.mount, sys::Detach::No) {
            Ok(()) if sys::fuse_ended(self.fuse.as_fd()) => MountEnd::Unmounted,
            // The kernel ends the connection with its last mount.
            Ok(()) => {
                tracing::warn!(
                    "another mount namespace, such as a container, has the mount too; its programs will see I/O errors"
                );
                MountEnd::Detached
            }
            Err(error) => {
                tracing::warn!(%error, "files on the mount are open; programs that use them will see I/O errors");
                // This fails when another process has detached the mount.
                if let Err(error) = mount::end(&self.config.mount, sys::Detach::Yes) {
                    tracing::warn!(%error, "cannot detach the mount");
                }
                MountEnd::Detached
            }
        };
        self.shutdown =
            Shutdown::Closing(Closing { mount, device, deaths: 0, closed: false, abandon_at: None });
        let Some(worker) = &self.active else {
            let last = self.report.ends.last().map_or_else(String::new, |end| format!(" ({})", end.why));
            self.outcome = Some(Err(ServeError::Worker {
                why: format!(
                    "no worker could close the store{last}; writes that were not flushed stay in memory until the next \
                     reboot; start again with: plyfs serve --store {}",
                    self.config.store.display()
                ),
            }));
            return Ok(());
        };
        if mount == MountEnd::Detached {
            worker.send(&FromSupervisor::Finish);
        }
        if self.serving_state != ServingState::Serving {
            self.serving_state.set_deadline(Some(Instant::now() + CLOSING_TAKE_OVER));
        }
        if worker.heartbeat.is_lost() {
            self.replace_lost();
        }
        Ok(())
    }

    /// The daemon's result when its last worker ends with `status`.
    pub(super) fn worker_result(&self, worker: &Worker, status: ExitStatus) -> Result<(), ServeError> {
        if status.success() {
            return Ok(());
        }
        let why = match &worker.failure {
            Some(failure) => failure.clone(),
            None => format!("the worker failed while it closed the store: {status}"),
        };
        let store = self.config.store.display();
        Err(ServeError::Worker { why: format!("{why}; start again with: plyfs serve --store {store}") })
    }

    /// The worker has closed the store and released its lock.
    pub(super) fn store_is_closed(&mut self) {
        if let Shutdown::Closing(closing) = &mut self.shutdown {
            closing.closed = true;
            closing.abandon_at = Some(Instant::now() + EXIT_TIMEOUT);
        }
    }

    /// Kills the active worker, which does not answer. Another one closes the store.
    pub(super) fn replace_lost(&mut self) {
        let Some(worker) = &mut self.active else { return };
        let why = "it did not answer the supervisor";
        tracing::error!(pid = worker.pid, why, "the worker is killed; another one closes the store");
        let _ = sys::kill(worker.pid, libc::SIGKILL);
        if let Shutdown::Closing(closing) = &mut self.shutdown {
            closing.abandon_at = Some(Instant::now() + KILL_TIMEOUT);
        }
    }

    /// When the supervisor stops waiting for a worker that should have ended.
    pub(super) fn abandon_at(&self) -> Option<Instant> {
        match &self.shutdown {
            Shutdown::Closing(closing) => closing.abandon_at,
            _ => None,
        }
    }

    /// Leaves a worker behind that should have ended and has not.
    pub(super) fn abandon_worker(&mut self) {
        let Shutdown::Closing(closing) = &mut self.shutdown else { return };
        closing.abandon_at = None;
        let Closing { device, closed, .. } = *closing;
        let Some(worker) = &self.active else { return };
        let pid = worker.pid;
        tracing::error!(
            pid,
            closed,
            "the worker does not end: a thread of it waits in the kernel for a disk or filesystem that hangs"
        );
        // The worker has the device open, so clients would wait as long as it lives.
        if let Some(Err(error)) = device.map(kernel::abort) {
            tracing::warn!(%error, "cannot abort requests on open files; their clients wait until the worker ends");
        }
        self.outcome = Some(match closed {
            true => Ok(()),
            false => Err(ServeError::Worker {
                why: format!(
                    "worker {pid} was killed and does not end: a thread of it waits in the kernel for a disk or \
                     filesystem that hangs. Writes that were not flushed stay in memory until the next reboot. When the \
                     worker has ended, flush them by a start: plyfs serve --store {}",
                    self.config.store.display()
                ),
            }),
        });
    }

    /// Removes the control socket, and the live maps unless a worker may still need them. Gives back the lock of a store
    /// that is closed, for all descriptors of it: a worker that was killed, of which a thread waits in the kernel for the
    /// cache's disk, keeps its own.
    pub(super) fn clean_up(&mut self, result: &Result<(), ServeError>) {
        let _ = std::fs::remove_file(self.config.store.join(CONTROL_SOCKET));
        page_socket::clean_up(&self.config, self.page.is_some());
        let is_unused = result.is_ok() || self.active.is_none();
        if let Some(live) = self.resources.live.take().filter(|_| is_unused) {
            live.remove(&self.resources.config);
        }
        if result.is_ok()
            && let Err(error) = sys::unlock(self.lock.as_fd())
        {
            tracing::warn!(%error, "the store's lock is not given back before this process ends");
        }
    }
}
