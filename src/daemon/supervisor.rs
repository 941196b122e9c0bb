//! The supervisor: store lock, mount, FUSE_INIT, control socket; then it starts workers until it is told to stop.
//!
//! It keeps the descriptor of the mount, so that a worker's death is a pause for the disks' users.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::channel::{Channel, FromSupervisor, FromWorker, START_ENV, Start};
use super::{ServeError, mount};
use crate::config::Config;
use crate::fuse::kernel::answer_init;
use crate::io::{HostMedium, sys};
use crate::store::{open_superblock, with_reserve_of};

/// How long a start waits for a lock that a dying worker still has.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// A worker that lived shorter than this counts as failing again; one that served and was then killed does not.
const SHORT_LIFE: Duration = Duration::from_millis(100);
const START_RETRY: Duration = Duration::from_millis(500);
const LONGEST_BACKOFF: Duration = Duration::from_secs(5);

fn system(what: &'static str) -> impl FnOnce(std::io::Error) -> ServeError {
    move |source| ServeError::System { what, source }
}

fn store_error(config: &Config, why: impl Into<String>) -> ServeError {
    ServeError::Store { store: config.store.display().to_string(), why: why.into() }
}

/// Serves in the foreground until SIGTERM, SIGINT or `plyfs stop`.
///
/// # Errors
/// When the store, the mount point or the first worker cannot be used; when the store could not be closed.
pub fn serve(config: Config) -> Result<(), ServeError> {
    let signals = sys::signal_fd(&[libc::SIGTERM, libc::SIGINT, libc::SIGCHLD]).map_err(system("signals"))?;
    sys::raise_descriptor_limit();
    let lock = open_store(&config)?;
    let path = mount::prepare(&config)?;
    let listener = listen(&config.store)?;
    let fuse = mount::begin(&config, &path)?;
    let config = Config { mount: path.clone(), ..config };
    let mut supervisor = Supervisor {
        config,
        path,
        signals,
        lock,
        listener,
        fuse,
        starts: 0,
        short_lives: 0,
        since_ns: sys::now_ns(),
        failure: None,
    };
    let result = answer_init(supervisor.fuse.as_fd()).map_err(system("answering FUSE_INIT"));
    let result = result.and_then(|()| supervisor.run());
    if result.is_err() {
        let _ = mount::end(&supervisor.path, sys::Detach::Yes);
    }
    let _ = fs::remove_file(supervisor.config.store.join("control.sock"));
    result
}

/// Makes the directory when missing, takes the lock, and looks at the superblock.
fn open_store(config: &Config) -> Result<File, ServeError> {
    let store = &config.store;
    let said = |what: &str, e: std::io::Error| store_error(config, format!("{what}: {e}"));
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o711).create(store).map_err(|e| said("making the directory", e))?;
    if sys::is_fuse(store).map_err(|e| said("looking at the directory", e))? {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let ours = mounts.lines().any(|line| {
            let target = line.split(' ').nth(4).unwrap_or("/nowhere");
            line.contains(" fuse.plyfs ") && fs::canonicalize(store).is_ok_and(|s| s.starts_with(target))
        });
        if ours {
            return Err(store_error(
                config,
                "it lies on a mount of plyfs; choose a directory of a local filesystem",
            ));
        }
    }
    let lock = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(store.join("lock"))
        .map_err(|e| said("opening its lock", e))?;
    let begun = Instant::now();
    while !sys::try_lock(&lock).map_err(|e| said("taking its lock", e))? {
        let pid = fs::read_to_string(store.join("lock")).unwrap_or_default().trim().to_owned();
        let alive = !pid.is_empty() && Path::new("/proc").join(&pid).exists();
        if alive || begun.elapsed() > LOCK_PATIENCE {
            return Err(store_error(
                config,
                format!(
                    "another daemon (process {pid}) has it; stop that one first: plyfs stop --store {}",
                    store.display()
                ),
            ));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    // Not cut before: what it has of a full filesystem somebody else would take.
    let pid = sys::pid().to_string();
    let medium = HostMedium::new(store).map_err(|e| said("opening it", e))?;
    let write_pid = || lock.write_all_at(pid.as_bytes(), 0).and_then(|()| lock.set_len(pid.len() as u64));
    with_reserve_of(&medium, write_pid).map_err(|e| said("writing its lock", e))?;
    open_superblock(&medium).map_err(|e| store_error(config, e.to_string()))?;
    Ok(lock)
}

fn listen(store: &Path) -> Result<UnixListener, ServeError> {
    let path = store.join("control.sock");
    // A socket's path may have 107 bytes; through the directory's descriptor any store will do.
    let dir = File::open(store).map_err(system("opening the store"))?;
    let short = PathBuf::from(format!("/proc/self/fd/{}/control.sock", dir.as_raw_fd()));
    let medium = HostMedium::new(store).map_err(system("opening the store"))?;
    let bind = || {
        // The lock is ours, so whoever made it is gone.
        let _ = fs::remove_file(&path);
        UnixListener::bind(&short)
    };
    let listener = with_reserve_of(&medium, bind).map_err(system("making the control socket"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))
        .map_err(system("making the control socket"))?;
    Ok(listener)
}

struct Supervisor {
    config: Config,
    path: PathBuf,
    signals: OwnedFd,
    lock: File,
    listener: UnixListener,
    fuse: OwnedFd,
    starts: u64,
    short_lives: u32,
    since_ns: i64,
    failure: Option<String>,
}

/// Why the wait for a worker ended.
enum Event {
    Ready,
    Stop,
    Died(ExitStatus),
}

struct Running {
    child: Child,
    channel: Channel,
    begun: Instant,
    hung_up: bool,
}

impl Supervisor {
    fn run(&mut self) -> Result<(), ServeError> {
        let mut announced = false;
        loop {
            let mut worker = match self.start() {
                Ok(worker) => worker,
                Err(error) if announced => {
                    // The mount outlives this: requests wait until a worker can be started.
                    tracing::error!(%error, "a worker cannot be started; trying again");
                    std::thread::sleep(START_RETRY);
                    if self.told_to_stop() {
                        return mount::end(&self.path, sys::Detach::Yes).map_err(system("ending the mount"));
                    }
                    continue;
                }
                Err(error) => return Err(error),
            };
            loop {
                match self.wait(&mut worker)? {
                    Event::Ready if !announced => {
                        announced = true;
                        self.announce();
                    }
                    Event::Ready => {
                        tracing::info!(pid = worker.child.id(), starts = self.starts, "a new worker serves")
                    }
                    Event::Stop => return self.stop(worker),
                    Event::Died(status) => {
                        if !announced {
                            let why =
                                self.failure.take().unwrap_or(format!("the worker ended at start: {status}"));
                            return Err(ServeError::Worker { why });
                        }
                        if !self.is_mounted() {
                            tracing::warn!("the mount was ended from outside");
                            return self.ended(status);
                        }
                        tracing::error!(%status, starts = self.starts, "the worker died; the next one takes over");
                        self.pause(worker.begun.elapsed())?;
                        break;
                    }
                }
            }
        }
    }

    fn is_mounted(&self) -> bool {
        // A connection that has ended says ENODEV at once; poll(2) says POLLERR.
        !sys::fuse_ended(self.fuse.as_fd())
    }

    fn announce(&self) {
        let socket = self.config.store.join("control.sock");
        println!("plyfs ready mount={} socket={}", self.path.display(), socket.display());
        let _ = std::io::stdout().flush();
        let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Ready]);
    }

    fn start(&mut self) -> Result<Running, ServeError> {
        let (ours, theirs) = sys::message_pair().map_err(system("making the channel"))?;
        self.starts += 1;
        let start = Start {
            config: self.config.clone(),
            fuse: self.fuse.as_raw_fd(),
            channel: theirs.as_raw_fd(),
            listener: self.listener.as_raw_fd(),
            lock: self.lock.as_raw_fd(),
            supervisor_pid: sys::pid(),
            worker_starts: self.starts,
            since_ns: self.since_ns,
        };
        let json = serde_json::to_string(&start).map_err(|e| system("starting a worker")(e.into()))?;
        let shared: [BorrowedFd<'_>; 4] =
            [self.fuse.as_fd(), theirs.as_fd(), self.listener.as_fd(), self.lock.as_fd()];
        let set = |on| shared.iter().try_for_each(|fd| sys::set_cloexec(fd.as_raw_fd(), on));
        set(false).map_err(system("starting a worker"))?;
        // The running program, also after its file was replaced.
        let child = Command::new("/proc/self/exe")
            .arg("worker")
            .envs(self.config.log.env())
            .env(START_ENV, json)
            .stdin(Stdio::null())
            // The terminal's Ctrl-C is for the supervisor.
            .process_group(0)
            .spawn();
        set(true).map_err(system("starting a worker"))?;
        let child = child.map_err(system("starting a worker"))?;
        Ok(Running { child, channel: Channel(ours), begun: Instant::now(), hung_up: false })
    }

    /// Waits for the next thing that matters.
    fn wait(&mut self, worker: &mut Running) -> Result<Event, ServeError> {
        loop {
            if worker.hung_up {
                // Reaped before anything else starts: no write of its comes late.
                let status = worker.child.wait().map_err(system("waiting for the worker"))?;
                return Ok(Event::Died(status));
            }
            let ready =
                sys::poll(&[self.signals.as_fd(), worker.channel.0.as_fd()], -1).map_err(system("poll"))?;
            if ready[1] {
                match worker.channel.receive::<FromWorker>() {
                    Ok(Some(FromWorker::Ready)) => return Ok(Event::Ready),
                    Ok(Some(FromWorker::Stop)) => return Ok(Event::Stop),
                    Ok(Some(FromWorker::Failed(why))) => self.failure = Some(why),
                    Ok(None) | Err(_) => worker.hung_up = true,
                }
            } else if ready[0] && self.told_to_stop() {
                return Ok(Event::Stop);
            }
        }
    }

    fn told_to_stop(&self) -> bool {
        let mut stop = false;
        while let Some(signal) = sys::read_signal(self.signals.as_fd()) {
            stop |= signal != libc::SIGCHLD;
        }
        stop
    }

    /// Waits before the next start when workers die young.
    fn pause(&mut self, lived: Duration) -> Result<(), ServeError> {
        self.short_lives = if lived < SHORT_LIFE { self.short_lives + 1 } else { 0 };
        // The first deaths are answered at once.
        let exponent = self.short_lives.saturating_sub(5).min(8);
        let wait = if exponent == 0 {
            Duration::ZERO
        } else {
            LONGEST_BACKOFF.min(Duration::from_millis(20 << exponent))
        };
        std::thread::sleep(wait);
        Ok(())
    }

    fn stop(&mut self, mut worker: Running) -> Result<(), ServeError> {
        let _ = sd_notify::notify(false, &[sd_notify::NotifyState::Stopping]);
        match mount::end(&self.path, sys::Detach::No) {
            Ok(()) => {}
            Err(error) => {
                tracing::warn!(%error, "files on the mount are open; what uses them will see I/O errors");
                mount::end(&self.path, sys::Detach::Yes).map_err(system("ending the mount"))?;
                let _ = worker.channel.send(&FromSupervisor::Finish);
            }
        }
        loop {
            if let Event::Died(status) = self.wait(&mut worker)? {
                return self.ended(status);
            }
        }
    }

    fn ended(&mut self, status: ExitStatus) -> Result<(), ServeError> {
        if status.success() {
            return Ok(());
        }
        let why = self.failure.take().unwrap_or(format!("the worker ended badly while stopping: {status}"));
        Err(ServeError::Worker {
            why: format!("{why}; start again with: plyfs serve --store {}", self.config.store.display()),
        })
    }
}
