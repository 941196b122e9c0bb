//! Starting workers: the descriptors that they inherit, and the standby worker.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Instant;

use super::super::channel::{PROTOCOL, Start};
use super::super::device::Device;
use super::super::process::Worker;
use super::{STANDBY_RETRY, Supervisor};
use crate::control::report::{Standby, reason};
use crate::io::sys;

impl Supervisor {
    /// Starts a worker of `program`, with its own device where the kernel cannot send requests again (D64). `probe`: it
    /// reads the store's records before it reports that it is prepared.
    pub(in crate::daemon) fn start_worker(&self, program: &File, probe: bool) -> std::io::Result<Worker> {
        let device = (!self.protocol.resend).then(|| Device::open(self.fuse.as_fd())).transpose()?;
        let fuse = device.as_ref().map_or(self.fuse.as_fd(), Device::fd);
        let unanswered = device.as_ref().map(Device::table);
        let mut shared = vec![fuse, self.listener.as_fd(), self.lock.as_fd(), self.cache.as_fd()];
        shared.extend(unanswered);
        let live = self.new_live_home.as_ref().or(self.live.as_ref()).map(|home| home.file().as_fd());
        shared.extend(live);
        let page = self.page.as_ref().map(AsFd::as_fd);
        shared.extend(page);
        let export = self.export.as_ref().map(AsFd::as_fd);
        shared.extend(export);
        let mut worker = Worker::start(program, &shared, &self.config.log, |channel| Start {
            protocol: PROTOCOL,
            channel,
            config: self.config.clone(),
            fuse: fuse.as_raw_fd(),
            offers: self.protocol,
            unanswered: unanswered.map(|fd| fd.as_raw_fd()),
            listener: self.listener.as_raw_fd(),
            page: page.map(|fd| fd.as_raw_fd()),
            export: export.map(|fd| fd.as_raw_fd()),
            lock: self.lock.as_raw_fd(),
            cache: self.cache.as_raw_fd(),
            live: live.map(|fd| fd.as_raw_fd()),
            supervisor_pid: sys::pid(),
            since_ns: self.since_ns,
            probe,
            warn: !self.announced,
            hears_closed: true,
        })?;
        worker.device = device;
        Ok(worker)
    }

    pub(super) fn start_standby(&mut self) {
        if self.standby.is_some() || self.is_closing() {
            return;
        }
        match self.start_worker(&self.worker_program, false) {
            Ok(worker) => {
                self.report.standby = Standby { pid: Some(worker.pid), prepared: false, problem: None };
                self.standby = Some(worker);
            }
            Err(error) => self.standby_failed(&error.to_string()),
        }
    }

    pub(super) fn standby_failed(&mut self, why: &str) {
        // Logged for the first failure in a row only; `status` has the last reason.
        if self.standby_failures == 0 {
            tracing::error!(
                why,
                "the standby worker ended; takeovers take longer until another one is prepared"
            );
        }
        self.report.standby = Standby { pid: None, prepared: false, problem: Some(reason(why)) };
        self.standby_failures += 1;
        let wait = STANDBY_RETRY * (1 << self.standby_failures.min(6));
        self.standby_at = Some(Instant::now() + wait);
        self.send_report();
    }
}
