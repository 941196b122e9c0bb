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
use super::leftover;
use super::pulse::Pulse;
use crate::config::LogConfig;
use crate::io::sys;

/// A killed worker ends within this time, unless it has much memory or a thread waits in the kernel.
const AT_ONCE: Duration = Duration::from_millis(300);

/// How far a worker is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// It does what needs no store.
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
    /// Its process; a child that nobody else waits for.
    pub pid: u32,
    /// What it reads requests from, when that is not the descriptor of all.
    pub device: Option<Device>,
    /// The supervisor's end.
    pub channel: Channel,
    /// How far it is.
    pub phase: Phase,
    /// When it was started, or told to take over.
    pub since: Instant,
    /// What it said it could not do.
    pub failure: Option<String>,
    /// Its version, once it has said so.
    pub version: Option<String>,
    /// Newest hand-over that its version reads.
    pub hand_over: u32,
    /// Whether its version answers when it is asked whether it runs.
    pub answers: bool,
    /// Whether it does.
    pub pulse: Pulse,
}

/// What came from a worker.
#[derive(Debug)]
pub enum Heard {
    /// A message.
    Said(FromWorker),
    /// The end, and how; it is reaped.
    Ended(ExitStatus),
}

impl Worker {
    /// Starts the worker of `program` (also after its file was replaced); `start` is given its end of the channel,
    /// `shared` are the descriptors that it names.
    ///
    /// # Errors
    /// When the process cannot be made, or the program is none.
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
            pulse: Pulse::default(),
        })
    }

    /// Sends a message; one that does not take it is ended, which is noticed when it is listened to.
    pub fn tell(&self, message: &FromSupervisor) {
        if let Err(error) = self.channel.send(message) {
            if error.raw_os_error() != Some(libc::EPIPE) {
                tracing::error!(%error, pid = self.pid, "the worker does not listen and is ended");
            }
            // It is not reaped yet, so the number is its own.
            let _ = sys::kill(self.pid, libc::SIGKILL);
        }
    }

    /// The next message or the end; waits for it. One whose channel ends is killed and reaped (D22).
    ///
    /// # Errors
    /// When the child cannot be waited for, which is no state to go on in.
    pub fn listen(&mut self) -> io::Result<Heard> {
        match self.channel.receive::<FromWorker>() {
            Ok(Some(message)) => Ok(Heard::Said(message)),
            // It is ending, or it closed the channel and lives on, as programs do that are no workers. The status of
            // one that is ending stays what it is.
            Ok(None) => self.kill().map(Heard::Ended),
            Err(error) => {
                if error.kind() == io::ErrorKind::InvalidData {
                    self.failure = Some(format!("a message of it was not understood: {error}"));
                }
                self.kill().map(Heard::Ended)
            }
        }
    }

    /// Ends it and waits until nothing of it runs any more, but for threads that wait for the cache's disk: what is left
    /// then is reaped as a stranger when that disk answers. Requests that it had read end, where the next worker does not
    /// get them (D64).
    ///
    /// # Errors
    /// As [`Worker::listen`].
    pub fn kill(&self) -> io::Result<ExitStatus> {
        let status = self.kill_and_reap()?;
        match self.device.as_ref().map(Device::fail_unanswered) {
            None | Some(Ok(0)) => {}
            Some(Ok(requests)) => tracing::error!(
                pid = self.pid,
                requests,
                "requests that the worker had read end with EIO: this kernel cannot send them to the next worker"
            ),
            Some(Err(error)) => tracing::error!(
                pid = self.pid,
                %error,
                "the kernel ends the requests that the worker had read"
            ),
        }
        Ok(status)
    }

    fn kill_and_reap(&self) -> io::Result<ExitStatus> {
        // It is not reaped yet, so the number is its own.
        let _ = sys::kill(self.pid, libc::SIGKILL);
        let began = Instant::now();
        loop {
            if let Some(status) = sys::wait_now(self.pid)? {
                return Ok(status);
            }
            if began.elapsed() < AT_ONCE {
                std::thread::sleep(Duration::from_micros(500));
                continue;
            }
            if leftover::is_harmless(self.pid) {
                tracing::error!(
                    pid = self.pid,
                    "a killed worker does not end: it waits in the kernel, for the cache's disk or as it exits"
                );
                return Ok(ExitStatus::from_raw(libc::SIGKILL));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Whether it was killed, and only the cache's disk keeps it from ending.
    pub fn is_leftover(&self) -> bool {
        self.state() == Some('Z') && leftover::is_harmless(self.pid)
    }

    /// Its state as in proc(5).
    pub fn state(&self) -> Option<char> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        stat.rsplit(") ").next()?.chars().next()
    }

    /// Why it ended, in words.
    pub fn why(&self, status: ExitStatus) -> String {
        match &self.failure {
            Some(failure) => format!("{failure} ({status})"),
            None => status.to_string(),
        }
    }
}

/// Reaps children that are not workers: as the first process of a container, a supervisor inherits the openers of
/// workers that ended.
pub fn reap_strangers(workers: &[u32]) {
    let children = std::fs::read_to_string("/proc/thread-self/children").unwrap_or_default();
    let children = children.split_whitespace().filter_map(|pid| pid.parse().ok());
    for pid in children.filter(|pid| !workers.contains(pid)) {
        sys::reap(pid);
    }
}
