//! A worker as the supervisor sees it: a child process and a channel.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::channel::{Channel, FromSupervisor, FromWorker, START_ENV, Start};
use super::device::Device;
use super::handover::RESUME_ENV;
use super::heartbeat::Heartbeat;
use super::leftover;
use crate::config::LogConfig;
use crate::io::sys;

/// A killed worker usually ends within this time. It takes longer when it has much memory or a thread waits in the
/// kernel.
const PROMPT_EXIT: Duration = Duration::from_millis(300);

/// The phase of a worker's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// It does the work that needs no store.
    Preparing,
    /// It waits to be activated.
    Prepared,
    /// It was told to take over.
    Activated,
    /// It serves.
    Serving,
}

/// A running worker. Dropping it does not end it: the supervisor's death does (PDEATHSIG).
#[derive(Debug)]
pub struct Worker {
    /// Its process, a child that only this code reaps.
    pub pid: u32,
    /// The device that it reads requests from, when it has its own.
    pub device: Option<Device>,
    /// The supervisor's end of the channel.
    pub channel: Channel,
    /// Its phase.
    pub phase: Phase,
    /// When it was started, or told to take over.
    pub since: Instant,
    /// The failure that it reported.
    pub failure: Option<String>,
    /// Its version, once it has announced it.
    pub version: Option<String>,
    /// Newest format of a hand-over that its version reads.
    pub hand_over: u32,
    /// Whether its version answers pings.
    pub answers: bool,
    /// Whether it answers them.
    pub heartbeat: Heartbeat,
}

/// An event of a worker.
#[derive(Debug)]
pub enum WorkerEvent {
    /// The worker sent a message.
    Message(FromWorker),
    /// The worker ended with this status, and is reaped.
    Ended(ExitStatus),
}

impl Worker {
    /// Starts a worker of the open file `program`, even when that file was replaced since. `start` gets the number of
    /// the worker's end of the channel; `shared` are the descriptors that its result names.
    ///
    /// # Errors
    /// When the process cannot be created, or the file is not a program.
    pub fn start(
        program: &File,
        shared: &[BorrowedFd<'_>],
        log: &LogConfig,
        start: impl FnOnce(i32) -> Start,
    ) -> io::Result<Self> {
        let (ours, theirs) = sys::message_pair()?;
        let json = serde_json::to_string(&start(theirs.as_raw_fd()))?;
        let inherited = || shared.iter().copied().chain([theirs.as_fd()]);
        let set = |on| inherited().try_for_each(|fd| sys::set_cloexec(fd.as_raw_fd(), on));
        let child = set(false).and_then(|()| {
            Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()))
                .arg("worker")
                .envs(log.env())
                .env(START_ENV, json)
                .env_remove(RESUME_ENV)
                .stdin(Stdio::null())
                // The terminal's Ctrl-C is for the supervisor.
                .process_group(0)
                .spawn()
        });
        set(true)?;
        let pid = child?.id();
        Ok(Self {
            pid,
            device: None,
            channel: Channel(ours),
            phase: Phase::Preparing,
            since: Instant::now(),
            failure: None,
            version: None,
            hand_over: 0,
            answers: false,
            heartbeat: Heartbeat::default(),
        })
    }

    /// Sends a message. A worker that cannot receive it is killed; [`next_event`](Self::next_event) reports its end.
    pub fn send(&self, message: &FromSupervisor) {
        if let Err(error) = self.channel.send(message) {
            if error.raw_os_error() != Some(libc::EPIPE) {
                tracing::error!(%error, pid = self.pid, "the worker does not read its messages and is killed");
            }
            // It is not reaped yet, so the pid is still its own.
            let _ = sys::kill(self.pid, libc::SIGKILL);
        }
    }

    /// Waits for the next message or the end. A worker whose channel ends is killed and reaped (D22).
    ///
    /// # Errors
    /// When waiting for the child fails. Then the supervisor cannot continue.
    pub fn next_event(&mut self) -> io::Result<WorkerEvent> {
        match self.channel.receive::<FromWorker>() {
            Ok(Some(message)) => Ok(WorkerEvent::Message(message)),
            // The worker is ending, or it is a program that is not a worker: it closed the channel and lives on. The
            // kill does not change the status of a worker that is ending.
            Ok(None) => self.kill().map(WorkerEvent::Ended),
            Err(error) => {
                if error.kind() == io::ErrorKind::InvalidData {
                    self.failure = Some(format!("it sent a message that cannot be decoded: {error}"));
                }
                self.kill().map(WorkerEvent::Ended)
            }
        }
    }

    /// Kills the worker and waits until none of its threads runs, except threads that wait for the cache's disk. A
    /// worker with such threads is reaped as an orphan when that disk answers. Where the next worker does not get the
    /// requests that this one had read, they end (D64).
    ///
    /// # Errors
    /// As [`Worker::next_event`].
    pub fn kill(&self) -> io::Result<ExitStatus> {
        let status = self.kill_and_reap()?;
        let pid = self.pid;
        match self.device.as_ref().map(Device::fail_unanswered) {
            None | Some(Ok(0)) => {}
            Some(Ok(requests)) => tracing::error!(
                pid,
                requests,
                "requests that the worker had read end with EIO: this kernel cannot send them to the next worker"
            ),
            Some(Err(error)) => {
                tracing::error!(pid, %error, "the kernel ends the requests that the worker had read");
            }
        }
        Ok(status)
    }

    fn kill_and_reap(&self) -> io::Result<ExitStatus> {
        // It is not reaped yet, so the pid is still its own.
        let _ = sys::kill(self.pid, libc::SIGKILL);
        let began = Instant::now();
        loop {
            if let Some(status) = sys::wait_now(self.pid)? {
                return Ok(status);
            }
            if began.elapsed() < PROMPT_EXIT {
                std::thread::sleep(Duration::from_micros(500));
                continue;
            }
            if leftover::is_harmless(self.pid) {
                tracing::error!(
                    pid = self.pid,
                    "a killed worker does not end: it waits in the kernel for the cache's disk, or while it exits; the \
                     daemon continues without waiting for it"
                );
                return Ok(ExitStatus::from_raw(libc::SIGKILL));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether it was killed, and only the cache's disk keeps it from ending: any thread of it, the first one too.
    pub fn is_leftover(&self) -> bool {
        leftover::is_harmless(self.pid)
    }

    /// Its state as in proc(5).
    pub fn state(&self) -> Option<char> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        stat.rsplit(") ").next()?.chars().next()
    }

    /// Why it ended, as text.
    pub fn why(&self, status: ExitStatus) -> String {
        match &self.failure {
            Some(failure) => format!("{failure} ({status})"),
            None => status.to_string(),
        }
    }
}

/// Reaps children that are not workers. A supervisor that is the first process of a container inherits the openers of
/// workers that ended.
pub fn reap_orphans(workers: &[u32]) {
    let children = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    let children = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    for pid in children.filter(|pid| !workers.contains(pid)) {
        sys::reap(pid);
    }
}
