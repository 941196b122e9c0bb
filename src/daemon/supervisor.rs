//! The supervisor takes the store's lock, mounts, answers FUSE_INIT and binds the control socket. Then it keeps one
//! worker serving and one prepared to take over, until it is told to stop.
//!
//! It keeps the descriptor of the mount, so clients of the disks see a worker's death as a pause. It runs one loop on
//! one thread, which never waits for a live worker or for a disk. [`state`] has its states, [`watch`] the check whether
//! the worker runs and the answers to clients while it does not, [`shutdown`] the end.

mod pausing;
mod shutdown;
mod starting;
mod state;
mod watch;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use super::channel::{Channel, FromSupervisor, FromWorker};
use super::device::Device;
use super::handover::HandOver;
use super::heartbeat::Heartbeat;
use super::home::{LiveHome, TentativeHome};
use super::outcome::Outcome;
use super::process::{Phase, Worker, WorkerEvent, reap_orphans};
use super::upgrade::Upgrading;
use super::{
    ServeError, callers, export_socket, handover, kernel as own_kernel, mount, page_socket, start, system,
};
use crate::cache::BlockCache;
use crate::config::Config;
use crate::control::report::{self, End, Report, Standby, reason};
use crate::format::layout::CONTROL_SOCKET;
use crate::fuse::kernel::{self, answer_init};
use crate::fuse::promises::Protocol;
use crate::io::sys;
pub(super) use pausing::PAUSE_TIMEOUT;
pub(super) use state::Shutdown;
use state::{MountEnd, ServingState};
use watch::UNAVAILABLE_AFTER;

/// A worker that lived shorter than this counts as failing again. A worker that served and was then killed does not.
const SHORT_LIFE: Duration = Duration::from_millis(100);
/// The first wait before another standby worker is started; it doubles up to [`LONGEST_BACKOFF`].
const STANDBY_RETRY: Duration = Duration::from_millis(500);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);
/// The limit of a takeover when the worker only has to close the store.
const CLOSING_TAKE_OVER: Duration = Duration::from_secs(20);
/// A worker that has not taken over after this time is killed, and another one started. The time doubles with each such
/// worker up to [`LONGEST_TAKE_OVER`], because the worker may wait for a slow disk.
const FIRST_TAKE_OVER: Duration = Duration::from_secs(10);
const LONGEST_TAKE_OVER: Duration = Duration::from_secs(600);

/// Serves in the foreground until SIGTERM, SIGINT or `plyfs stop`.
///
/// # Errors
/// When the store, the mount point or the first worker cannot be used; when the store could not be closed.
pub fn serve(config: Config) -> Result<(), ServeError> {
    own_kernel::check()?;
    let signals = signals()?;
    sys::raise_descriptor_limit();
    let program = std::env::current_exe().map_err(system("finding this program"))?;
    // Before any access to the mount point, which would wait: no worker serves a kept mount yet.
    let (found, arenas) = handover::find(&config);
    let kept = found.is_some();
    let lock = start::open_store(&config)?;
    let home_config = config.clone();
    let (tentative, lost) =
        TentativeHome::find(&home_config, arenas).map_err(system("memory for live maps"))?;
    let (path, fuse, cache, since_ns) = match found {
        Some(found) => (found.mount, Some((found.fuse, found.protocol)), found.cache, found.since_ns),
        None => (mount::prepare(&config)?, None, None, sys::now_ns()),
    };
    let cache = match cache {
        Some(cache) => cache,
        None => BlockCache::memory_file().map_err(system("memory for the cache"))?,
    };
    let listener = start::listen(&config.store)?;
    let page = page_socket::listen(&config);
    let export = export_socket::listen(&config);
    let (fuse, protocol) = match fuse {
        Some(fuse) => fuse,
        None => {
            let fuse = mount::begin(&config, &path)?;
            let protocol = answer_init(fuse.as_fd()).map_err(|error| {
                let _ = mount::end(&path, sys::Detach::Yes);
                system("answering FUSE_INIT")(error)
            })?;
            let live = tentative.get().map(|home| home.file().as_fd());
            handover::keep(&config, &path, since_ns, protocol, fuse.as_fd(), cache.as_fd(), live);
            (fuse, protocol)
        }
    };
    if kept {
        widen_request_window(&path);
    }
    let live = tentative.keep();
    if let Some(live) = live.as_ref().filter(|_| kept) {
        handover::keep_live(since_ns, live.file().as_fd());
    }
    let config = Config { mount: path, ..config };
    let report = Report {
        supervisor_version: env!("CARGO_PKG_VERSION").into(),
        answers_callers: true,
        live: report::LiveMaps {
            path: live.as_ref().map(|home| home.path().into()),
            problem: lost,
            moves: 0,
        },
        ..Report::default()
    };
    let worker_program = this_program()?;
    let resources = MountResources {
        config,
        program,
        worker_program,
        signals,
        lock: lock.into(),
        listener,
        page,
        export,
        fuse,
        protocol,
        cache,
        live,
        since_ns,
    };
    Outcome::begin(&resources.config.store, since_ns);
    own_kernel::warn(protocol);
    let mut supervisor = Supervisor::new(resources, report);
    supervisor.fresh_mount = !kept;
    let result = supervisor.activate().and_then(|()| supervisor.run());
    // A kept mount stays with the service manager when no worker took it over.
    if result.is_err() && (!kept || supervisor.announced) {
        handover::forget(since_ns);
        let _ = mount::end(&supervisor.config.mount, sys::Detach::Yes);
    }
    Outcome::end(&supervisor.config.store, since_ns, &result);
    supervisor.clean_up(&result);
    result
}

/// Continues where another version of the program stopped, in the same process.
pub(super) fn resume(state: HandOver, fds: Vec<OwnedFd>) -> Result<(), ServeError> {
    let missing = || system("taking over from the program before")(std::io::ErrorKind::InvalidData.into());
    let mut fds = fds;
    let worker_answers = state.worker_answers;
    let HandOver { mut config, program, live, worker_pid, worker_version, since_ns, mut report, .. } = state;
    let export = state.export.and_then(|_| fds.pop());
    let page = state.page.and_then(|_| fds.pop());
    let device = match state.device {
        Some(_) => {
            let (table, fd) = (fds.pop(), fds.pop());
            Some(fd.zip(table).ok_or_else(missing)?)
        }
        None => None,
    };
    let live = live.and_then(|(_, path)| Some((fds.pop()?, path)));
    let Ok([_, fuse, lock, listener, cache, channel]) = <[OwnedFd; 6]>::try_from(fds) else {
        return Err(missing());
    };
    if live.is_none() && config.runtime_dir.as_deref() == Some(std::path::Path::new("/dev/shm")) {
        // Versions without an arena have this default.
        config.runtime_dir = None;
    }
    let live = live.map(|(fd, path)| LiveHome::resumed(&config, fd.into(), path));
    let live = live.transpose().map_err(system("taking over the live maps"))?;
    report.supervisor_version = env!("CARGO_PKG_VERSION").into();
    report.answers_callers = true;
    let listener = UnixListener::from(listener);
    let worker_program = this_program()?;
    let signals = signals()?;
    let resources = MountResources {
        config,
        program,
        worker_program,
        signals,
        lock,
        listener,
        page,
        export,
        fuse,
        protocol: state.protocol,
        cache,
        live,
        since_ns,
    };
    Outcome::begin(&resources.config.store, since_ns);
    let mut supervisor = Supervisor::new(resources, report);
    let mut heartbeat = Heartbeat::default();
    heartbeat.begin(worker_answers);
    let worker = Worker {
        pid: worker_pid,
        device: device.map(|(fd, table)| Device::resumed(fd, table)),
        answers: worker_answers,
        heartbeat,
        channel: Channel(channel),
        phase: Phase::Serving,
        since: Instant::now(),
        failure: None,
        version: Some(worker_version),
        hand_over: handover::FORMAT,
    };
    // The program was executed through a descriptor, so the kernel named the process after the descriptor's number.
    sys::set_process_name(c"plyfs");
    tracing::info!(version = env!("CARGO_PKG_VERSION"), worker = worker_pid, "the new supervisor continues");
    widen_request_window(&supervisor.config.mount);
    supervisor.announced = true;
    (supervisor.active, supervisor.serving_state) = (Some(worker), ServingState::Serving);
    supervisor.standby_at = Some(Instant::now());
    supervisor.send_report();
    let result = supervisor.run();
    if result.is_err() {
        handover::forget(since_ns);
        let _ = mount::end(&supervisor.config.mount, sys::Detach::Yes);
    }
    Outcome::end(&supervisor.config.store, since_ns, &result);
    supervisor.clean_up(&result);
    result
}

fn signals() -> Result<OwnedFd, ServeError> {
    sys::signal_fd(&[libc::SIGTERM, libc::SIGINT, libc::SIGCHLD]).map_err(system("signals"))
}

/// Raises the kernel's limit of asynchronous requests of the mount. Another version may have made the mount with a
/// smaller limit.
fn widen_request_window(mount: &Path) {
    if let Some(Err(error)) = mount::device(mount).map(kernel::widen) {
        tracing::warn!(
            %error,
            "cannot raise the mount's limit of asynchronous requests; the limit of the earlier version stays"
        );
    }
}

/// The running program, even after its file was replaced.
fn this_program() -> Result<File, ServeError> {
    File::open("/proc/self/exe").map_err(system("opening this program"))
}

/// The resources that last as long as the mount.
pub(super) struct MountResources {
    pub config: Config,
    /// The path that `plyfs upgrade` uses by default.
    pub program: PathBuf,
    /// The program that workers are started from.
    pub worker_program: File,
    pub signals: OwnedFd,
    pub lock: OwnedFd,
    pub listener: UnixListener,
    /// The listening socket of the status page, when there is one.
    pub page: Option<OwnedFd>,
    /// The listening socket for other hosts, when there is one.
    pub export: Option<OwnedFd>,
    pub fuse: OwnedFd,
    /// What the kernel offers.
    pub protocol: Protocol,
    pub cache: OwnedFd,
    /// The arena of live maps; `None` after an upgrade from a version without one, until a worker has an arena.
    pub live: Option<LiveHome>,
    pub since_ns: i64,
}

/// The supervisor, see the module.
pub(super) struct Supervisor {
    pub(super) resources: MountResources,
    pub(super) report: Report,
    /// The worker that serves or takes over; `serving_state` says which.
    pub(super) active: Option<Worker>,
    serving_state: ServingState,
    pub(super) standby: Option<Worker>,
    pub(super) upgrading: Option<Upgrading>,
    /// Whether the first worker has served.
    announced: bool,
    fresh_mount: bool,
    pub(super) shutdown: Shutdown,
    /// Workers in a row that did not take over in time.
    late_takeovers: u32,
    /// Workers in a row that lived shorter than [`SHORT_LIFE`].
    short_lives: u32,
    standby_failures: u32,
    pub(super) standby_at: Option<Instant>,
    /// The home that the live maps move to with the next worker.
    pub(super) new_live_home: Option<LiveHome>,
    /// When the name of the live maps is checked.
    pub(super) check_live_maps_at: Option<Instant>,
    /// When a pause for a move of the live maps has taken too long.
    pause_until: Option<Instant>,
    /// The highest number of a request that the last worker noted, where it lists them.
    last_read: u64,
    /// The result of the daemon, once it is known. Then the loop ends.
    outcome: Option<Result<(), ServeError>>,
}

impl std::ops::Deref for Supervisor {
    type Target = MountResources;
    fn deref(&self) -> &MountResources {
        &self.resources
    }
}

/// A descriptor that the loop waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum EventSource {
    Signals,
    Active,
    Standby,
    Candidate,
    Client,
}

impl Supervisor {
    fn new(resources: MountResources, report: Report) -> Self {
        Self {
            resources,
            report,
            active: None,
            serving_state: ServingState::Vacant { since: Instant::now(), next: None },
            standby: None,
            upgrading: None,
            announced: false,
            fresh_mount: false,
            shutdown: Shutdown::None,
            late_takeovers: 0,
            short_lives: 0,
            standby_failures: 0,
            standby_at: None,
            new_live_home: None,
            check_live_maps_at: Some(Instant::now()),
            pause_until: None,
            last_read: 0,
            outcome: None,
        }
    }

    fn run(&mut self) -> Result<(), ServeError> {
        loop {
            if let Some(outcome) = self.outcome.take() {
                return outcome;
            }
            self.run_due_actions()?;
            for source in self.wait()? {
                match source {
                    EventSource::Signals => {
                        if self.is_stop_signalled() {
                            self.stop()?;
                        }
                    }
                    EventSource::Active => self.handle_active()?,
                    EventSource::Standby => self.handle_standby()?,
                    EventSource::Candidate => self.handle_candidate()?,
                    EventSource::Client => self.answer_client()?,
                }
            }
        }
    }

    /// Whether the end is requested or has begun.
    pub(super) fn is_shutting_down(&self) -> bool {
        self.shutdown != Shutdown::None
    }

    /// Whether the end has begun.
    fn is_closing(&self) -> bool {
        matches!(self.shutdown, Shutdown::Closing(_))
    }

    /// Waits until a descriptor is readable or an action is due.
    fn wait(&self) -> Result<Vec<EventSource>, ServeError> {
        let candidate = self.upgrading.as_ref().and_then(|u| u.candidate.as_ref());
        let mut watched: Vec<(EventSource, BorrowedFd<'_>)> =
            vec![(EventSource::Signals, self.signals.as_fd())];
        let workers = [
            (EventSource::Active, self.active.as_ref()),
            (EventSource::Standby, self.standby.as_ref()),
            (EventSource::Candidate, candidate),
        ];
        watched.extend(workers.into_iter().filter_map(|(source, w)| Some((source, w?.channel.0.as_fd()))));
        if self.answers_clients() {
            watched.push((EventSource::Client, self.listener.as_fd()));
        }
        let deadlines = [
            self.serving_state.deadline(),
            self.standby_at,
            self.check_live_maps_at,
            self.pause_until,
            self.upgrading.as_ref().map(|u| u.deadline),
            self.serving_state
                .down_since()
                .filter(|_| !self.answers_clients())
                .map(|since| since + UNAVAILABLE_AFTER),
            self.active.as_ref().and_then(|worker| worker.heartbeat.due()),
            self.abandon_at(),
        ];
        let timeout = deadlines.into_iter().flatten().min().map_or(-1, |at| {
            let left = at.saturating_duration_since(Instant::now()).as_micros().div_ceil(1000);
            i32::try_from(left).unwrap_or(i32::MAX)
        });
        let fds: Vec<BorrowedFd<'_>> = watched.iter().map(|(_, fd)| *fd).collect();
        let ready = sys::poll(&fds, timeout).map_err(system("poll"))?;
        Ok(watched.iter().zip(ready).filter(|(_, ready)| *ready).map(|((source, _), _)| *source).collect())
    }

    fn run_due_actions(&mut self) -> Result<(), ServeError> {
        let now = Instant::now();
        if self.serving_state.deadline().is_some_and(|at| at <= now) {
            self.serving_state.set_deadline(None);
            match self.serving_state {
                ServingState::Vacant { .. } => self.activate()?,
                ServingState::TakingOver { .. } => self.takeover_timed_out(),
                ServingState::Serving => {}
            }
        }
        if self.standby_at.is_some_and(|at| at <= now) {
            self.standby_at = None;
            self.start_standby();
        }
        if self.check_live_maps_at.is_some_and(|at| at <= now) {
            self.check_live_maps();
        }
        if self.pause_until.is_some_and(|at| at <= now) {
            self.pause_timed_out();
        }
        if self.upgrading.as_ref().is_some_and(|u| u.deadline <= now) {
            self.upgrade_timed_out()?;
        }
        self.check_heartbeat(now)?;
        if self.abandon_at().is_some_and(|at| at <= now) {
            self.abandon_worker();
        }
        // The requested end is due once the hand-over is over, whatever its result.
        if self.shutdown == Shutdown::Requested
            && !self.upgrading.as_ref().is_some_and(Upgrading::is_handing_over)
        {
            self.stop()?;
        }
        Ok(())
    }

    /// Kills the worker that has not taken over in time.
    fn takeover_timed_out(&mut self) {
        let is_closing = self.is_closing();
        self.late_takeovers += u32::from(!is_closing);
        let Some(worker) = &mut self.active else { return };
        if is_closing {
            worker.failure = None;
            tracing::error!(
                pid = worker.pid,
                "the worker that is to close the store does not take over in time and is killed"
            );
        } else {
            let why = format!("it did not take over within {} s", worker.since.elapsed().as_secs());
            tracing::error!(pid = worker.pid, why, "the worker is killed; another one takes over");
            worker.failure = Some(why);
        }
        let _ = sys::kill(worker.pid, libc::SIGKILL);
    }

    /// Makes the standby worker take over, or a new worker when there is no standby.
    fn activate(&mut self) -> Result<(), ServeError> {
        let worker = match self.standby.take() {
            Some(worker) => Ok(worker),
            None => self.start_worker(&self.worker_program, false),
        };
        match worker {
            Ok(worker) => {
                self.activate_worker(worker);
                Ok(())
            }
            Err(error) if self.announced => {
                // The mount survives: requests wait until a worker can be started.
                tracing::error!(%error, "cannot start a worker; trying again");
                self.serving_state.vacate(Some(Instant::now() + STANDBY_RETRY));
                Ok(())
            }
            Err(error) => Err(system("starting a worker")(error)),
        }
    }

    /// Makes a worker take over. The one before it is already reaped (D1).
    pub(super) fn activate_worker(&mut self, worker: Worker) {
        let Some(mut worker) = self.finish_relocation(worker) else {
            self.serving_state.vacate(Some(Instant::now() + STANDBY_RETRY));
            return;
        };
        self.report.worker_starts += 1;
        if self.report.standby.pid == Some(worker.pid) {
            self.report.standby = Standby::default();
        }
        worker.phase = Phase::Activated;
        worker.since = Instant::now();
        worker.device.iter().for_each(|device| device.begin_at(self.last_read));
        let message = FromSupervisor::Activate { report: self.report.clone(), fresh_mount: self.fresh_mount };
        worker.send(&message);
        let limit = match &self.shutdown {
            Shutdown::Closing(closing) => {
                // When the mount is gone, the worker sees by itself that there is nothing to serve.
                if closing.mount == MountEnd::Detached {
                    worker.send(&FromSupervisor::Finish);
                }
                Some(CLOSING_TAKE_OVER)
            }
            // An upgrade has a deadline of its own. A first start on a cold disk has no limit.
            _ if self.upgrading.is_some() || !self.announced => None,
            _ => {
                Some(FIRST_TAKE_OVER.saturating_mul(1 << self.late_takeovers.min(10)).min(LONGEST_TAKE_OVER))
            }
        };
        self.serving_state.take_over(limit.map(|limit| Instant::now() + limit));
        self.active = Some(worker);
    }

    pub(super) fn send_report(&self) {
        // A worker that does not answer gets the report once it answers again.
        if let Some(active) = &self.active
            && !active.heartbeat.is_lost()
        {
            active.send(&FromSupervisor::Report(self.report.clone()));
        }
    }

    fn handle_active(&mut self) -> Result<(), ServeError> {
        let Some(worker) = &mut self.active else { return Ok(()) };
        match worker.next_event().map_err(system("waiting for the worker"))? {
            WorkerEvent::Message(FromWorker::Prepared { version, hand_over, answers }) => {
                (worker.version, worker.hand_over, worker.answers) = (Some(version), hand_over, answers);
            }
            WorkerEvent::Message(FromWorker::Alive) => self.is_alive(),
            WorkerEvent::Message(FromWorker::Closed) => self.store_is_closed(),
            WorkerEvent::Message(FromWorker::Ready) => self.worker_serves()?,
            WorkerEvent::Message(FromWorker::Stop) => self.stop()?,
            WorkerEvent::Message(FromWorker::Upgrade(program)) => self.begin_upgrade(program),
            WorkerEvent::Message(FromWorker::Drained) => self.drained(),
            WorkerEvent::Message(FromWorker::Paused) => self.paused(),
            WorkerEvent::Message(FromWorker::Callers(query)) => {
                // A worker that does not receive the answer asks again.
                let answer = callers::inspect(&query).map(FromSupervisor::Callers);
                let _ = answer.map(|answer| worker.channel.send(&answer));
            }
            WorkerEvent::Message(FromWorker::Failed(why)) => worker.failure = Some(why),
            WorkerEvent::Ended(status) => self.active_ended(status)?,
        }
        Ok(())
    }

    fn worker_serves(&mut self) -> Result<(), ServeError> {
        let Some(worker) = &mut self.active else { return Ok(()) };
        worker.phase = Phase::Serving;
        worker.heartbeat.begin(worker.answers);
        let (pid, took) = (worker.pid, worker.since.elapsed());
        // From here on the worker has no deadline: it may take any time to close the store.
        (self.serving_state, self.late_takeovers) = (ServingState::Serving, 0);
        self.fresh_mount = false;
        self.standby_at = Some(Instant::now());
        if !self.announced {
            self.announced = true;
            self.announce();
        } else {
            tracing::info!(pid, starts = self.report.worker_starts, ?took, "a new worker serves");
        }
        self.finish_upgrade();
        Ok(())
    }

    fn announce(&self) {
        if self.is_closing() {
            return;
        }
        let socket = self.config.store.join(CONTROL_SOCKET);
        println!("plyfs ready mount={} socket={}", self.config.mount.display(), socket.display());
        let _ = std::io::stdout().flush();
        let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]);
    }

    fn active_ended(&mut self, status: ExitStatus) -> Result<(), ServeError> {
        let Some(worker) = self.active.take() else { return Ok(()) };
        self.serving_state.vacate(None);
        self.pause_until = None;
        self.last_read = worker.device.as_ref().map_or(0, Device::highest);
        let why = worker.why(status);
        let served = worker.since.elapsed();
        let upgrades = self.upgrading.as_ref().is_some_and(Upgrading::expects_worker_end);
        let relocates = self.is_relocating();
        self.report.cut_off = match (upgrades, relocates) {
            (true, _) => None,
            (_, true) => Some("the live maps move".into()),
            _ => Some(reason(&why)),
        };
        if self.is_closing() {
            return self.closing_worker_ended(&worker, status);
        }
        if !self.announced {
            self.outcome = Some(Err(ServeError::Worker { why }));
            return Ok(());
        }
        // Reads of an ended connection fail with ENODEV at once; poll(2) reports POLLERR.
        if sys::fuse_ended(self.fuse.as_fd()) {
            tracing::warn!("another process ended the mount; the daemon ends");
            self.end_others();
            self.outcome = Some(self.worker_result(&worker, status));
            return Ok(());
        }
        if !upgrades && !relocates {
            let starts = self.report.worker_starts;
            tracing::error!(why, starts, ?served, "the worker ended; the next one takes over");
            let served_ms = served.as_millis() as u64;
            self.report.record_end(End {
                at_ns: sys::now_ns(),
                pid: worker.pid,
                why: reason(&why),
                served_ms,
            });
        }
        if self.upgrade_worker_ended(&why)? {
            return Ok(());
        }
        let wait = self.back_off(served);
        self.report.back_off_ms = wait.as_millis() as u64;
        if wait.is_zero() {
            return self.activate();
        }
        tracing::error!(?wait, "workers keep ending soon; the next one starts after a wait");
        self.serving_state.set_deadline(Some(Instant::now() + wait));
        Ok(())
    }

    /// How long the next start is delayed when workers keep ending soon.
    fn back_off(&mut self, lived: Duration) -> Duration {
        self.short_lives = if lived < SHORT_LIFE { self.short_lives + 1 } else { 0 };
        // After the first deaths there is no delay.
        match self.short_lives.saturating_sub(5).min(8) {
            0 => Duration::ZERO,
            exponent => LONGEST_BACKOFF.min(Duration::from_millis(20 << exponent)),
        }
    }

    fn handle_standby(&mut self) -> Result<(), ServeError> {
        let Some(worker) = &mut self.standby else { return Ok(()) };
        match worker.next_event().map_err(system("waiting for the standby worker"))? {
            WorkerEvent::Message(FromWorker::Prepared { version, hand_over, answers }) => {
                (worker.version, worker.hand_over, worker.answers) = (Some(version), hand_over, answers);
                worker.phase = Phase::Prepared;
                self.standby_failures = 0;
                self.report.standby = Standby { pid: Some(worker.pid), prepared: true, problem: None };
                self.send_report();
                self.kill_active_to_relocate();
            }
            WorkerEvent::Message(FromWorker::Failed(why)) => worker.failure = Some(why),
            WorkerEvent::Message(other) => {
                tracing::warn!(?other, "the standby worker sent an unexpected message; it is ignored")
            }
            WorkerEvent::Ended(status) => {
                let why = worker.why(status);
                self.standby = None;
                self.standby_failed(&why);
            }
        }
        Ok(())
    }

    fn is_stop_signalled(&self) -> bool {
        let (mut stop, mut child) = (false, false);
        while let Some(signal) = sys::read_signal(self.signals.as_fd()) {
            match signal {
                libc::SIGCHLD => child = true,
                _ => stop = true,
            }
        }
        if child {
            let candidate = self.upgrading.as_ref().and_then(|u| u.candidate.as_ref());
            let workers = [self.active.as_ref(), self.standby.as_ref(), candidate];
            reap_orphans(&workers.into_iter().flatten().map(|w| w.pid).collect::<Vec<_>>());
        }
        stop
    }

    /// Kills the workers that do not serve.
    pub(super) fn end_others(&mut self) {
        self.standby_at = None;
        self.report.standby = Standby::default();
        let candidate = self.upgrading.take().and_then(|u| u.candidate);
        for worker in self.standby.take().into_iter().chain(candidate) {
            let _ = worker.kill();
        }
    }
}
