//! The supervisor: store lock, mount, FUSE_INIT, control socket; then it keeps one worker serving and one prepared to
//! take over, until it is told to stop.
//!
//! It keeps the descriptor of the mount, so that a worker's death is a pause for the disks' users. One thread, one
//! loop; it never waits for a worker that lives, nor for a disk. The states that it passes through are in [`state`]. How it
//! knows that the worker runs, and what it says to clients when it does not, is in [`watch`]; the end in [`ending`].

mod ending;
mod pausing;
mod state;
mod watch;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use super::channel::{Channel, FromSupervisor, FromWorker, PROTOCOL, Start};
use super::device::Device;
use super::handover::HandOver;
use super::home::{LiveHome, Tentative};
use super::outcome::Outcome;
use super::process::{Heard, Phase, Worker, reap_strangers};
use super::pulse::Pulse;
use super::upgrade::Upgrading;
use super::{ServeError, callers, handover, kernel as own_kernel, mount, start, system};
use crate::cache::BlockCache;
use crate::config::Config;
use crate::control::report::{self, End, Report, Standby, reason};
use crate::format::layout::CONTROL_SOCKET;
use crate::fuse::kernel::{self, answer_init};
use crate::fuse::promises::Protocol;
use crate::io::sys;
pub(super) use pausing::PAUSE;
pub(super) use state::Ending;
use state::{MountEnd, Seat};
use watch::SILENCE;

/// A worker that lived shorter than this counts as failing again; one that served and was then killed does not.
const SHORT_LIFE: Duration = Duration::from_millis(100);
/// The first wait before a standby worker is tried again; it doubles up to the longest.
const STANDBY_RETRY: Duration = Duration::from_millis(500);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);
/// How long a worker may take to serve when there is nothing left for it but to close the store.
const CLOSING_TAKE_OVER: Duration = Duration::from_secs(20);
/// A worker that has not taken over after so long is ended, and another one tried. It doubles each time up to the
/// longest: what it waits for may be a slow disk.
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
    // Before anything else looks at the mount point: nobody would answer.
    let (found, arenas) = handover::find(&config);
    let kept = found.is_some();
    let lock = start::open_store(&config)?;
    let of_live = config.clone();
    let (tentative, lost) = Tentative::find(&of_live, arenas).map_err(system("memory for live maps"))?;
    let (path, fuse, cache, since_ns) = match found {
        Some(found) => (found.mount, Some((found.fuse, found.protocol)), found.cache, found.since_ns),
        None => (mount::prepare(&config)?, None, None, sys::now_ns()),
    };
    let cache = match cache {
        Some(cache) => cache,
        None => BlockCache::memory_file().map_err(system("memory for the cache"))?,
    };
    let listener = start::listen(&config.store)?;
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
        widen(&path);
    }
    let live = tentative.keep();
    if let Some(live) = live.as_ref().filter(|_| kept) {
        handover::keep_live(since_ns, live.file().as_fd());
    }
    let config = Config { mount: path, ..config };
    let report = Report {
        supervisor_version: env!("CARGO_PKG_VERSION").into(),
        answers_callers: true,
        live: report::Live { path: live.as_ref().map(|home| home.path().into()), problem: lost, moves: 0 },
        ..Report::default()
    };
    let worker_program = this_program()?;
    let things = Things {
        config,
        program,
        worker_program,
        signals,
        lock: lock.into(),
        listener,
        fuse,
        protocol,
        cache,
        live,
        since_ns,
    };
    Outcome::begin(&things.config.store, since_ns);
    own_kernel::warn(protocol);
    let mut supervisor = Supervisor::new(things, report);
    supervisor.fresh_mount = !kept;
    let result = supervisor.activate().and_then(|()| supervisor.run());
    // A mount that was kept is kept on when it was not even taken over.
    if result.is_err() && (!kept || supervisor.announced) {
        handover::forget(since_ns);
        let _ = mount::end(&supervisor.config.mount, sys::Detach::Yes);
    }
    Outcome::end(&supervisor.config.store, since_ns, &result);
    supervisor.finished(&result);
    result
}

/// Goes on where another version of the program stopped, in the same process.
pub(super) fn resume(state: HandOver, fds: Vec<OwnedFd>) -> Result<(), ServeError> {
    let missing = || system("taking over from the program before")(std::io::ErrorKind::InvalidData.into());
    let mut fds = fds;
    let worker_answers = state.worker_answers;
    let HandOver { mut config, program, live, worker_pid, worker_version, since_ns, mut report, .. } = state;
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
        // The default of versions without an arena.
        config.runtime_dir = None;
    }
    let live = live.map(|(fd, path)| LiveHome::resumed(&config, fd.into(), path));
    let live = live.transpose().map_err(system("taking over the live maps"))?;
    report.supervisor_version = env!("CARGO_PKG_VERSION").into();
    report.answers_callers = true;
    let listener = UnixListener::from(listener);
    let worker_program = this_program()?;
    let signals = signals()?;
    let things = Things {
        config,
        program,
        worker_program,
        signals,
        lock,
        listener,
        fuse,
        protocol: state.protocol,
        cache,
        live,
        since_ns,
    };
    Outcome::begin(&things.config.store, since_ns);
    let mut supervisor = Supervisor::new(things, report);
    let mut pulse = Pulse::default();
    pulse.begin(worker_answers);
    let worker = Worker {
        pid: worker_pid,
        device: device.map(|(fd, table)| Device::resumed(fd, table)),
        answers: worker_answers,
        pulse,
        channel: Channel(channel),
        phase: Phase::Serving,
        since: Instant::now(),
        failure: None,
        version: Some(worker_version),
        hand_over: handover::FORMAT,
    };
    // Started by way of a descriptor, whose number would be the name.
    sys::set_process_name(c"plyfs");
    tracing::info!(version = env!("CARGO_PKG_VERSION"), worker = worker_pid, "the new supervisor goes on");
    widen(&supervisor.config.mount);
    supervisor.announced = true;
    (supervisor.active, supervisor.seat) = (Some(worker), Seat::Serving);
    supervisor.standby_at = Some(Instant::now());
    supervisor.tell_report();
    let result = supervisor.run();
    if result.is_err() {
        handover::forget(since_ns);
        let _ = mount::end(&supervisor.config.mount, sys::Detach::Yes);
    }
    Outcome::end(&supervisor.config.store, since_ns, &result);
    supervisor.finished(&result);
    result
}

fn signals() -> Result<OwnedFd, ServeError> {
    sys::signal_fd(&[libc::SIGTERM, libc::SIGINT, libc::SIGCHLD]).map_err(system("signals"))
}

/// A mount that another version made may have a smaller window of asynchronous requests.
fn widen(mount: &Path) {
    if let Some(Err(error)) = mount::device(mount).map(kernel::widen) {
        tracing::warn!(%error, "asynchronous requests of the mount are as bounded as the version before had them");
    }
}

/// The running program, also after its file was replaced.
fn this_program() -> Result<File, ServeError> {
    File::open("/proc/self/exe").map_err(system("opening this program"))
}

/// What lasts as long as the mount.
pub(super) struct Things {
    pub config: Config,
    /// The path that `plyfs upgrade` looks at.
    pub program: PathBuf,
    /// The program that workers are started from.
    pub worker_program: File,
    pub signals: OwnedFd,
    pub lock: OwnedFd,
    pub listener: UnixListener,
    pub fuse: OwnedFd,
    /// What the kernel offers.
    pub protocol: Protocol,
    pub cache: OwnedFd,
    /// The arena of live maps; `None` after an upgrade from a version without one, until a worker has it.
    pub live: Option<LiveHome>,
    pub since_ns: i64,
}

/// See the module.
pub(super) struct Supervisor {
    pub(super) things: Things,
    pub(super) report: Report,
    /// The worker that serves, or takes over: as `seat` says.
    pub(super) active: Option<Worker>,
    seat: Seat,
    pub(super) standby: Option<Worker>,
    pub(super) upgrading: Option<Upgrading>,
    /// The first worker has served.
    announced: bool,
    fresh_mount: bool,
    pub(super) ending: Ending,
    /// Workers in a row that were too late to take over.
    late: u32,
    /// Workers in a row that died young.
    short_lives: u32,
    standby_failures: u32,
    pub(super) standby_at: Option<Instant>,
    /// Where the live maps move to with the next worker.
    pub(super) moving: Option<LiveHome>,
    /// When the name of the live maps is looked at.
    pub(super) look_at: Option<Instant>,
    /// The worker pauses, so that the live maps can move; until when it may take to.
    pause_until: Option<Instant>,
    /// The highest number of a request that the last worker has read, where it lists them.
    last_read: u64,
    /// How it all ends.
    outcome: Option<Result<(), ServeError>>,
}

impl std::ops::Deref for Supervisor {
    type Target = Things;
    fn deref(&self) -> &Things {
        &self.things
    }
}

/// Whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    Signals,
    Active,
    Standby,
    Candidate,
    Client,
}

impl Supervisor {
    fn new(things: Things, report: Report) -> Self {
        Self {
            things,
            report,
            active: None,
            seat: Seat::Vacant { since: Instant::now(), next: None },
            standby: None,
            upgrading: None,
            announced: false,
            fresh_mount: false,
            ending: Ending::No,
            late: 0,
            short_lives: 0,
            standby_failures: 0,
            standby_at: None,
            moving: None,
            look_at: Some(Instant::now()),
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
            self.do_what_is_due()?;
            for who in self.wait()? {
                match who {
                    Who::Signals => {
                        if self.told_to_stop() {
                            self.stop()?;
                        }
                    }
                    Who::Active => self.hear_active()?,
                    Who::Standby => self.hear_standby()?,
                    Who::Candidate => self.hear_candidate()?,
                    Who::Client => self.answer_client()?,
                }
            }
        }
    }

    /// The end is wanted or has begun.
    pub(super) fn is_ending(&self) -> bool {
        self.ending != Ending::No
    }

    /// It has begun.
    fn is_closing(&self) -> bool {
        matches!(self.ending, Ending::Closing(_))
    }

    /// Waits until somebody says something, or until something is due.
    fn wait(&self) -> Result<Vec<Who>, ServeError> {
        let candidate = self.upgrading.as_ref().and_then(|u| u.candidate.as_ref());
        let mut watched: Vec<(Who, BorrowedFd<'_>)> = vec![(Who::Signals, self.signals.as_fd())];
        let workers = [
            (Who::Active, self.active.as_ref()),
            (Who::Standby, self.standby.as_ref()),
            (Who::Candidate, candidate),
        ];
        watched.extend(workers.into_iter().filter_map(|(who, w)| Some((who, w?.channel.0.as_fd()))));
        if self.answers_clients() {
            watched.push((Who::Client, self.listener.as_fd()));
        }
        let deadlines = [
            self.seat.deadline(),
            self.standby_at,
            self.look_at,
            self.pause_until,
            self.upgrading.as_ref().map(|u| u.deadline),
            self.seat.down_since().filter(|_| !self.answers_clients()).map(|since| since + SILENCE),
            self.active.as_ref().and_then(|worker| worker.pulse.due()),
            self.leave_at(),
        ];
        let timeout = deadlines.into_iter().flatten().min().map_or(-1, |at| {
            let left = at.saturating_duration_since(Instant::now()).as_micros().div_ceil(1000);
            i32::try_from(left).unwrap_or(i32::MAX)
        });
        let fds: Vec<BorrowedFd<'_>> = watched.iter().map(|(_, fd)| *fd).collect();
        let ready = sys::poll(&fds, timeout).map_err(system("poll"))?;
        Ok(watched.iter().zip(ready).filter(|(_, ready)| *ready).map(|((who, _), _)| *who).collect())
    }

    fn do_what_is_due(&mut self) -> Result<(), ServeError> {
        let now = Instant::now();
        if self.seat.deadline().is_some_and(|at| at <= now) {
            self.seat.set_deadline(None);
            match self.seat {
                Seat::Vacant { .. } => self.activate()?,
                Seat::TakingOver { .. } => self.is_late(),
                Seat::Serving => {}
            }
        }
        if self.standby_at.is_some_and(|at| at <= now) {
            self.standby_at = None;
            self.start_standby();
        }
        if self.look_at.is_some_and(|at| at <= now) {
            self.look_after_live_maps();
        }
        if self.pause_until.is_some_and(|at| at <= now) {
            self.move_is_late();
        }
        if self.upgrading.as_ref().is_some_and(|u| u.deadline <= now) {
            self.upgrade_is_late()?;
        }
        self.feel_the_pulse(now)?;
        if self.leave_at().is_some_and(|at| at <= now) {
            self.give_up_the_worker();
        }
        // However a hand-over ended, the end that waited for it is due.
        if self.ending == Ending::Wanted && !self.upgrading.as_ref().is_some_and(Upgrading::is_handing_over) {
            self.stop()?;
        }
        Ok(())
    }

    /// The worker that takes over has had its time.
    fn is_late(&mut self) {
        let is_closing = self.is_closing();
        self.late += u32::from(!is_closing);
        let Some(worker) = &mut self.active else { return };
        if is_closing {
            worker.failure = None;
            tracing::error!(pid = worker.pid, "a worker that is to close the store does not even take over");
        } else {
            let why = format!("it did not take over within {} s", worker.since.elapsed().as_secs());
            tracing::error!(pid = worker.pid, why, "another worker is tried");
            worker.failure = Some(why);
        }
        let _ = sys::kill(worker.pid, libc::SIGKILL);
    }

    pub(super) fn start_worker(&self, program: &File, probe: bool) -> std::io::Result<Worker> {
        let device = (!self.protocol.resend).then(|| Device::open(self.fuse.as_fd())).transpose()?;
        let fuse = device.as_ref().map_or(self.fuse.as_fd(), Device::fd);
        let unanswered = device.as_ref().map(Device::table);
        let mut shared = vec![fuse, self.listener.as_fd(), self.lock.as_fd(), self.cache.as_fd()];
        shared.extend(unanswered);
        let live = self.moving.as_ref().or(self.live.as_ref()).map(|home| home.file().as_fd());
        shared.extend(live);
        let mut worker = Worker::start(program, &shared, &self.config.log, |channel| Start {
            protocol: PROTOCOL,
            channel,
            config: self.config.clone(),
            fuse: fuse.as_raw_fd(),
            offers: self.protocol,
            unanswered: unanswered.map(|fd| fd.as_raw_fd()),
            listener: self.listener.as_raw_fd(),
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

    fn start_standby(&mut self) {
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

    fn standby_failed(&mut self, why: &str) {
        // Said once in a row; the status has the last reason.
        if self.standby_failures == 0 {
            tracing::error!(
                why,
                "the standby worker ended; until another is prepared a takeover takes longer"
            );
        }
        self.report.standby = Standby { pid: None, prepared: false, problem: Some(reason(why)) };
        self.standby_failures += 1;
        let wait = STANDBY_RETRY * (1 << self.standby_failures.min(6));
        self.standby_at = Some(Instant::now() + wait);
        self.tell_report();
    }

    /// Has the standby worker take over, or a new one when there is none.
    fn activate(&mut self) -> Result<(), ServeError> {
        let worker = match self.standby.take() {
            Some(worker) => Ok(worker),
            None => self.start_worker(&self.worker_program, false),
        };
        match worker {
            Ok(worker) => {
                self.hand_to(worker);
                Ok(())
            }
            Err(error) if self.announced => {
                // The mount outlives this: requests wait until a worker can be started.
                tracing::error!(%error, "a worker cannot be started; trying again");
                self.seat.vacate(Some(Instant::now() + STANDBY_RETRY));
                Ok(())
            }
            Err(error) => Err(system("starting a worker")(error)),
        }
    }

    /// Has a worker take over; the one before it is reaped (D1).
    pub(super) fn hand_to(&mut self, worker: Worker) {
        let Some(mut worker) = self.with_live_maps(worker) else {
            self.seat.vacate(Some(Instant::now() + STANDBY_RETRY));
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
        worker.tell(&message);
        let patience = match &self.ending {
            Ending::Closing(closing) => {
                // Where the mount is gone it notices by itself that there is nothing to serve.
                if closing.mount == MountEnd::Detached {
                    worker.tell(&FromSupervisor::Finish);
                }
                Some(CLOSING_TAKE_OVER)
            }
            // An upgrade has a deadline of its own, and a first start on a cold disk takes what it takes.
            _ if self.upgrading.is_some() || !self.announced => None,
            _ => Some(FIRST_TAKE_OVER.saturating_mul(1 << self.late.min(10)).min(LONGEST_TAKE_OVER)),
        };
        self.seat.take_over(patience.map(|patience| Instant::now() + patience));
        self.active = Some(worker);
    }

    pub(super) fn tell_report(&self) {
        // One that does not listen is told when it does again.
        if let Some(active) = &self.active
            && !active.pulse.is_lost()
        {
            active.tell(&FromSupervisor::Report(self.report.clone()));
        }
    }

    fn hear_active(&mut self) -> Result<(), ServeError> {
        let Some(worker) = &mut self.active else { return Ok(()) };
        match worker.listen().map_err(system("waiting for the worker"))? {
            Heard::Said(FromWorker::Prepared { version, hand_over, answers }) => {
                (worker.version, worker.hand_over, worker.answers) = (Some(version), hand_over, answers);
            }
            Heard::Said(FromWorker::Alive) => self.is_alive(),
            Heard::Said(FromWorker::Closed) => self.store_is_closed(),
            Heard::Said(FromWorker::Ready) => self.serving()?,
            Heard::Said(FromWorker::Stop) => self.stop()?,
            Heard::Said(FromWorker::Upgrade(program)) => self.begin_upgrade(program),
            Heard::Said(FromWorker::Drained) => self.drained(),
            Heard::Said(FromWorker::Paused) => self.paused(),
            Heard::Said(FromWorker::Callers(asked)) => {
                // One that does not take the answer asks again.
                let answer = callers::look(&asked).map(FromSupervisor::Callers);
                let _ = answer.map(|answer| worker.channel.send(&answer));
            }
            Heard::Said(FromWorker::Failed(why)) => worker.failure = Some(why),
            Heard::Ended(status) => self.active_ended(status)?,
        }
        Ok(())
    }

    fn serving(&mut self) -> Result<(), ServeError> {
        let Some(worker) = &mut self.active else { return Ok(()) };
        worker.phase = Phase::Serving;
        worker.pulse.begin(worker.answers);
        let (pid, took) = (worker.pid, worker.since.elapsed());
        // From here on, to close the store may take as long as it takes.
        (self.seat, self.late) = (Seat::Serving, 0);
        self.fresh_mount = false;
        self.standby_at = Some(Instant::now());
        if !self.announced {
            self.announced = true;
            self.announce();
        } else {
            tracing::info!(pid, starts = self.report.worker_starts, ?took, "a new worker serves");
        }
        self.upgrade_serves();
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
        self.seat.vacate(None);
        self.pause_until = None;
        self.last_read = worker.device.as_ref().map_or(0, Device::highest);
        let why = worker.why(status);
        let served = worker.since.elapsed();
        if self.is_closing() {
            return self.closing_worker_ended(&worker, status);
        }
        if !self.announced {
            self.outcome = Some(Err(ServeError::Worker { why }));
            return Ok(());
        }
        // A connection that has ended says ENODEV at once; poll(2) says POLLERR.
        if sys::fuse_ended(self.fuse.as_fd()) {
            tracing::warn!("the mount was ended from outside");
            self.end_others();
            self.outcome = Some(self.ended(&worker, status));
            return Ok(());
        }
        let planned = self.upgrading.as_ref().is_some_and(Upgrading::ended_the_worker) || self.is_moving();
        if !planned {
            let starts = self.report.worker_starts;
            tracing::error!(why, starts, ?served, "the worker ended; the next one takes over");
            let served_ms = served.as_millis() as u64;
            self.report.ended(End { at_ns: sys::now_ns(), pid: worker.pid, why: reason(&why), served_ms });
        }
        if self.upgrade_worker_ended(&why)? {
            return Ok(());
        }
        let wait = self.back_off(served);
        self.report.back_off_ms = wait.as_millis() as u64;
        if wait.is_zero() {
            return self.activate();
        }
        tracing::error!(?wait, "workers keep ending soon; the next one is put off");
        self.seat.set_deadline(Some(Instant::now() + wait));
        Ok(())
    }

    /// How long the next start is put off when workers die young.
    fn back_off(&mut self, lived: Duration) -> Duration {
        self.short_lives = if lived < SHORT_LIFE { self.short_lives + 1 } else { 0 };
        // The first deaths are answered at once.
        match self.short_lives.saturating_sub(5).min(8) {
            0 => Duration::ZERO,
            exponent => LONGEST_BACKOFF.min(Duration::from_millis(20 << exponent)),
        }
    }

    fn hear_standby(&mut self) -> Result<(), ServeError> {
        let Some(worker) = &mut self.standby else { return Ok(()) };
        match worker.listen().map_err(system("waiting for the standby worker"))? {
            Heard::Said(FromWorker::Prepared { version, hand_over, answers }) => {
                (worker.version, worker.hand_over, worker.answers) = (Some(version), hand_over, answers);
                worker.phase = Phase::Prepared;
                self.standby_failures = 0;
                self.report.standby = Standby { pid: Some(worker.pid), prepared: true, problem: None };
                self.tell_report();
                self.move_live_maps();
            }
            Heard::Said(FromWorker::Failed(why)) => worker.failure = Some(why),
            Heard::Said(other) => tracing::warn!(?other, "a standby worker has nothing to say but that"),
            Heard::Ended(status) => {
                let why = worker.why(status);
                self.standby = None;
                self.standby_failed(&why);
            }
        }
        Ok(())
    }

    fn told_to_stop(&self) -> bool {
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
            reap_strangers(&workers.into_iter().flatten().map(|w| w.pid).collect::<Vec<_>>());
        }
        stop
    }

    /// Ends the workers that do not serve.
    pub(super) fn end_others(&mut self) {
        self.standby_at = None;
        self.report.standby = Standby::default();
        let candidate = self.upgrading.take().and_then(|u| u.candidate);
        for worker in self.standby.take().into_iter().chain(candidate) {
            let _ = worker.kill();
        }
    }
}
