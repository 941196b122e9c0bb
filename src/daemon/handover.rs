//! How a mount outlives its supervisor: handed over by exec to another version of the program, or kept by systemd's
//! descriptor store until the next start.
//!
//! Both carry a description as JSON in a file in memory. Its `format` is raised when an older program could not
//! understand it; a worker tells which one its version reads, so that no program is started that could not go on.
//!
//! Source of the protocol: sd_notify(3), FDSTORE=1 and FDNAME=; sd_listen_fds(3).

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use serde::{Deserialize, Serialize};

use super::{ServeError, system};
use crate::config::Config;
use crate::control::report::Report;
use crate::fuse::promises::Protocol;
use crate::io::sys;

/// Environment variable with the number of the descriptor of a [`HandOver`].
pub const RESUME_ENV: &str = "PLYFS_RESUME";
/// Set for a child that only finds out whether it could go on.
const REHEARSE_ENV: &str = "PLYFS_REHEARSE";
/// How long a rehearsal may take; a worker serves meanwhile.
const REHEARSAL: Duration = Duration::from_secs(10);
/// Newest format that is read and written here. 2: the arena of live maps. 3: a device for each worker, and pauses.
pub const FORMAT: u32 = 3;

/// The oldest format that can express what there is to hand over: an older program goes on as long as it can.
pub fn format_of(protocol: Protocol) -> u32 {
    if protocol.resend { 2 } else { FORMAT }
}

/// What is in the descriptor store, as part of its name.
const FUSE: &str = "fuse";
const CACHE: &str = "cache";
const LIVE: &str = "live";
const STATE: &str = "state";

/// What a supervisor tells its successor in the same process. Descriptors are numbers.
#[derive(Debug, Serialize, Deserialize)]
pub struct HandOver {
    /// See the module.
    pub format: u32,
    /// The daemon's configuration; its mount is the path without symbolic links.
    pub config: Config,
    /// The program that upgrades look at.
    pub program: PathBuf,
    /// /dev/fuse.
    pub fuse: RawFd,
    /// What the kernel offers.
    #[serde(default)]
    pub protocol: Protocol,
    /// The device and the table of the worker that serves, when it has its own.
    #[serde(default)]
    pub device: Option<(RawFd, RawFd)>,
    /// The store's lock.
    pub lock: RawFd,
    /// The control socket.
    pub listener: RawFd,
    /// Memory of the block cache.
    pub cache: RawFd,
    /// The arena of live maps, and its name.
    #[serde(default)]
    pub live: Option<(RawFd, PathBuf)>,
    /// The worker that serves.
    pub worker_pid: u32,
    /// The channel to it.
    pub channel: RawFd,
    /// Its version.
    pub worker_version: String,
    /// Whether it answers when it is asked whether it runs.
    #[serde(default)]
    pub worker_answers: bool,
    /// When the mount was made.
    pub since_ns: i64,
    /// For `status`.
    pub report: Report,
}

/// What the descriptor store keeps beside the descriptors.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    format: u32,
    store: PathBuf,
    /// As configured, and without symbolic links.
    mounts: [PathBuf; 2],
    since_ns: i64,
    #[serde(default)]
    protocol: Protocol,
}

/// A mount that an earlier daemon of the service left behind, alive.
pub struct Found {
    /// /dev/fuse, past FUSE_INIT.
    pub fuse: OwnedFd,
    /// Memory of the block cache.
    pub cache: Option<OwnedFd>,
    /// The mount point without symbolic links.
    pub mount: PathBuf,
    /// When the mount was made.
    pub since_ns: i64,
    /// What the kernel offers.
    pub protocol: Protocol,
}

fn in_memory(value: &impl Serialize) -> io::Result<File> {
    let mut file = sys::memory_file()?;
    file.write_all(&serde_json::to_vec(value)?)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

/// Has the program try, in a child, whether it is one and understands `state`: after exec there is no way back.
fn rehearse(program: &Path, state: &File, arguments: &[OsString]) -> io::Result<()> {
    sys::set_cloexec(state.as_raw_fd(), false)?;
    let child = Command::new(program)
        .args(arguments.iter().skip(1))
        .env(RESUME_ENV, state.as_raw_fd().to_string())
        .env(REHEARSE_ENV, "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn();
    sys::set_cloexec(state.as_raw_fd(), true)?;
    let (mut child, begun) = (child?, Instant::now());
    loop {
        match child.try_wait()? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => {
                return Err(io::Error::other(format!("it cannot go on as the supervisor: {status}")));
            }
            None if begun.elapsed() > REHEARSAL => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(io::Error::other("it does not say whether it can go on as the supervisor"));
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// Goes on as another program, whose supervisor takes `state`; returns only when that is not possible, with the
/// reason, and nothing has changed.
pub fn become_program(program: &Path, state: &HandOver, shared: &[BorrowedFd<'_>]) -> io::Error {
    let file = match in_memory(state) {
        Ok(file) => file,
        Err(error) => return error,
    };
    let arguments: Vec<OsString> = std::env::args_os().collect();
    if let Err(error) = rehearse(program, &file, &arguments) {
        return error;
    }
    let all = || shared.iter().copied().chain([file.as_fd()]);
    let set = |on| all().try_for_each(|fd| sys::set_cloexec(fd.as_raw_fd(), on));
    let environment: Vec<(OsString, OsString)> = std::env::vars_os()
        .filter(|(key, _)| key != RESUME_ENV)
        .chain([(RESUME_ENV.into(), file.as_raw_fd().to_string().into())])
        .collect();
    let error = match set(false) {
        Ok(()) => sys::exec(program, &arguments, &environment),
        Err(error) => error,
    };
    // Without this every worker would inherit all of them.
    let _ = set(true);
    error
}

/// Whether this process is to go on as a supervisor that was another program a moment ago.
pub fn resumes() -> bool {
    std::env::var_os(RESUME_ENV).is_some()
}

/// Goes on where the former program stopped.
///
/// # Errors
/// As [`super::serve`].
pub fn resume(logging: impl FnOnce(&Config)) -> Result<(), ServeError> {
    let read = || {
        let number: RawFd =
            std::env::var(RESUME_ENV).ok().and_then(|n| n.parse().ok()).ok_or(io::ErrorKind::InvalidInput)?;
        // Opened anew: the descriptor itself is taken below, together with those that it names.
        let mut json = Vec::new();
        File::open(format!("/proc/self/fd/{number}"))?.read_to_end(&mut json)?;
        let state: HandOver = serde_json::from_slice(&json)?;
        if state.format > FORMAT {
            return Err(io::Error::other("it was written by a newer plyfs"));
        }
        if std::env::var_os(REHEARSE_ENV).is_some() {
            return Ok(None);
        }
        let mut numbers = vec![number, state.fuse, state.lock, state.listener, state.cache, state.channel];
        numbers.extend(state.live.as_ref().map(|(fd, _)| *fd));
        numbers.extend(state.device.iter().flat_map(|(fd, table)| [*fd, *table]));
        Ok(Some((state, sys::inherit_once(&numbers)?)))
    };
    let read = read().map_err(system("taking over from the program before"))?;
    let Some((state, fds)) = read else { return Ok(()) };
    logging(&state.config);
    super::supervisor::resume(state, fds)
}

/// Name of a descriptor in the store. The mount's number is in it: what belongs together is found by it, and the
/// order in which a service manager passes what it keeps says nothing.
fn stored_name(kind: &str, since_ns: i64) -> String {
    format!("plyfs-{kind}-{since_ns}")
}

/// Gives the descriptors of a mount to the service manager, if there is one that keeps them.
pub fn keep(
    config: &Config,
    mount: &Path,
    since_ns: i64,
    protocol: Protocol,
    fuse: BorrowedFd<'_>,
    cache: BorrowedFd<'_>,
    live: Option<BorrowedFd<'_>>,
) {
    if !is_kept() {
        return;
    }
    let kept = Kept {
        format: format_of(protocol),
        store: config.store.clone(),
        mounts: [config.mount.clone(), mount.to_path_buf()],
        since_ns,
        protocol,
    };
    let send = |kind: &str, fd: BorrowedFd<'_>| send(kind, since_ns, fd);
    let sent = in_memory(&kept).and_then(|state| {
        send(STATE, state.as_fd())?;
        send(CACHE, cache)?;
        live.map_or(Ok(()), |live| send(LIVE, live))?;
        // Last: without the others it is of no use.
        send(FUSE, fuse)
    });
    if let Err(error) = sent {
        tracing::warn!(%error, "the service manager does not keep the mount; it ends with this daemon");
    }
}

fn is_kept() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

fn send(kind: &str, since_ns: i64, fd: BorrowedFd<'_>) -> io::Result<()> {
    let name = stored_name(kind, since_ns);
    sd_notify::notify_with_fds(false, &[NotifyState::FdStore, NotifyState::FdName(&name)], &[fd])
}

fn forget_one(kind: &str, since_ns: i64) {
    let name = stored_name(kind, since_ns);
    let _ = sd_notify::notify(false, &[NotifyState::Custom("FDSTOREREMOVE=1"), NotifyState::FdName(&name)]);
}

/// Gives the service manager another arena of live maps in place of the one before.
pub fn keep_live(since_ns: i64, live: BorrowedFd<'_>) {
    if !is_kept() {
        return;
    }
    forget_one(LIVE, since_ns);
    if let Err(error) = send(LIVE, since_ns, live) {
        tracing::warn!(%error, "the service manager does not keep the live maps; they are found by name only");
    }
}

/// Has the service manager forget the mount of that number: nobody is to wait for a daemon that does not come.
pub fn forget(since_ns: i64) {
    for kind in [FUSE, CACHE, LIVE, STATE] {
        forget_one(kind, since_ns);
    }
}

/// The mount of this store that the service manager kept, if it is alive, and all arenas of live maps that it kept. What
/// cannot be used is given up.
pub fn find(config: &Config) -> (Option<Found>, Vec<File>) {
    let mut arenas = Vec::new();
    let found = find_mount(config, &mut arenas);
    (found, arenas)
}

fn find_mount(config: &Config, arenas: &mut Vec<File>) -> Option<Found> {
    let listed: Vec<(RawFd, String)> = match sd_notify::listen_fds_with_names(true) {
        Ok(listed) => listed.collect(),
        Err(error) => {
            tracing::warn!(%error, "what the service manager passed is not understood");
            return None;
        }
    };
    let numbers: Vec<RawFd> = listed.iter().map(|(fd, _)| *fd).collect();
    if numbers.is_empty() {
        return None;
    }
    let fds = match sys::inherit_once(&numbers) {
        Ok(fds) => fds,
        Err(error) => {
            tracing::warn!(%error, "the descriptors that the service manager passed cannot be taken");
            return None;
        }
    };
    // By number of the mount, the newest first.
    let mut mounts: BTreeMap<Reverse<i64>, HashMap<String, OwnedFd>> = BTreeMap::new();
    for ((_, name), fd) in listed.into_iter().zip(fds) {
        let words = name.strip_prefix("plyfs-").and_then(|rest| rest.split_once('-'));
        match words.and_then(|(kind, number)| Some((kind, number.parse().ok()?))) {
            Some((kind, number)) => {
                mounts.entry(Reverse(number)).or_default().insert(kind.to_owned(), fd);
            }
            None => tracing::warn!(name, "a descriptor of the service manager's is not known and not used"),
        }
    }
    let mut found = None;
    for (Reverse(since_ns), mut fds) in mounts {
        arenas.extend(fds.remove(LIVE).map(File::from));
        match usable(config, fds) {
            Ok(this) if found.is_none() => {
                tracing::info!(mount = %this.mount.display(), "the mount was kept by the service manager");
                found = Some(this);
            }
            Ok(this) => give_up(since_ns, &this.mount.display().to_string(), "there is a newer one"),
            Err((mount, why)) => give_up(since_ns, &mount, &why),
        }
    }
    found
}

fn give_up(since_ns: i64, mount: &str, why: &str) {
    tracing::warn!(mount, why, "a mount that the service manager kept is not used and ends");
    forget(since_ns);
}

/// The mount of which these are the descriptors, or where it is and why it is of no use.
fn usable(config: &Config, mut fds: HashMap<String, OwnedFd>) -> Result<Found, (String, String)> {
    let nowhere = |why: String| ("-".to_owned(), why);
    let (Some(fuse), Some(state)) = (fds.remove(FUSE), fds.remove(STATE)) else {
        return Err(nowhere("descriptors that belong to it are missing".to_owned()));
    };
    let mut json = Vec::new();
    let mut state = File::from(state);
    let read = state.seek(SeekFrom::Start(0)).and_then(|_| state.read_to_end(&mut json));
    let kept: Kept = read
        .and_then(|_| Ok(serde_json::from_slice(&json)?))
        .map_err(|error| nowhere(format!("its description is not understood: {error}")))?;
    let [configured, mount] = kept.mounts;
    let why = if kept.format > FORMAT {
        "it was written by a newer plyfs"
    } else if kept.store != config.store || configured != config.mount {
        "the configuration names another store or mount now"
    } else if sys::fuse_ended(fuse.as_fd()) {
        "it has ended"
    } else {
        let (since_ns, protocol) = (kept.since_ns, kept.protocol);
        return Ok(Found { fuse, cache: fds.remove(CACHE), mount, since_ns, protocol });
    };
    Err((mount.display().to_string(), why.to_owned()))
}
