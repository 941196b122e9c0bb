//! How a mount outlives its supervisor: handed over by exec to another version of the program, or kept by systemd's
//! descriptor store until the next start.
//!
//! Both carry a description as JSON in a file in memory. Its `format` is raised when an older program could not
//! understand it; a worker tells which one its version reads, so that no program is started that could not go on.
//!
//! Source of the protocol: sd_notify(3), FDSTORE=1 and FDNAME=; sd_listen_fds(3).

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use sd_notify::NotifyState;
use serde::{Deserialize, Serialize};

use super::report::Report;
use super::{ServeError, system};
use crate::config::Config;
use crate::io::sys;

/// Environment variable with the number of the descriptor of a [`HandOver`].
pub const RESUME_ENV: &str = "PLYFS_RESUME";
/// Newest format that is read and written here.
pub const FORMAT: u32 = 1;

/// Names in the descriptor store.
const FUSE: &str = "plyfs-fuse";
const CACHE: &str = "plyfs-cache";
const STATE: &str = "plyfs-state";

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
    /// The store's lock.
    pub lock: RawFd,
    /// The control socket.
    pub listener: RawFd,
    /// Memory of the block cache.
    pub cache: RawFd,
    /// The worker that serves.
    pub worker_pid: u32,
    /// The channel to it.
    pub channel: RawFd,
    /// Its version.
    pub worker_version: String,
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
}

fn in_memory(value: &impl Serialize) -> io::Result<File> {
    let mut file = sys::memory_file()?;
    file.write_all(&serde_json::to_vec(value)?)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

/// Goes on as another program, whose supervisor takes `state`; returns only when that is not possible, with the
/// reason, and nothing has changed.
pub fn become_program(program: &Path, state: &HandOver, shared: &[BorrowedFd<'_>]) -> io::Error {
    let file = match in_memory(state) {
        Ok(file) => file,
        Err(error) => return error,
    };
    let all = || shared.iter().copied().chain([file.as_fd()]);
    let set = |on| all().try_for_each(|fd| sys::set_cloexec(fd.as_raw_fd(), on));
    let environment: Vec<(OsString, OsString)> = std::env::vars_os()
        .filter(|(key, _)| key != RESUME_ENV)
        .chain([(RESUME_ENV.into(), file.as_raw_fd().to_string().into())])
        .collect();
    let arguments: Vec<OsString> = std::env::args_os().collect();
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
        let numbers = [number, state.fuse, state.lock, state.listener, state.cache, state.channel];
        Ok((state, sys::inherit_once(&numbers)?))
    };
    let (state, fds) = read().map_err(system("taking over from the program before"))?;
    logging(&state.config);
    super::supervisor::resume(state, fds)
}

/// Gives the descriptors of a mount to the service manager, if there is one that keeps them.
pub fn keep(config: &Config, mount: &Path, since_ns: i64, fuse: BorrowedFd<'_>, cache: BorrowedFd<'_>) {
    if std::env::var_os("NOTIFY_SOCKET").is_none() {
        return;
    }
    let kept = Kept {
        format: FORMAT,
        store: config.store.clone(),
        mounts: [config.mount.clone(), mount.to_path_buf()],
        since_ns,
    };
    fn send(name: &str, fd: BorrowedFd<'_>) -> io::Result<()> {
        sd_notify::notify_with_fds(false, &[NotifyState::FdStore, NotifyState::FdName(name)], &[fd])
    }
    let sent = in_memory(&kept).and_then(|state| {
        send(STATE, state.as_fd())?;
        send(CACHE, cache)?;
        // Last: without the others it is of no use.
        send(FUSE, fuse)
    });
    if let Err(error) = sent {
        tracing::warn!(%error, "the service manager does not keep the mount; it ends with this daemon");
    }
}

/// Has the service manager forget the mount: nobody is to wait for a daemon that does not come.
pub fn forget() {
    for name in [FUSE, CACHE, STATE] {
        let _ =
            sd_notify::notify(false, &[NotifyState::Custom("FDSTOREREMOVE=1"), NotifyState::FdName(name)]);
    }
}

/// The mount of this store that the service manager kept, if it is alive.
pub fn find(config: &Config) -> Option<Found> {
    let listed: Vec<(RawFd, String)> = sd_notify::listen_fds_with_names(true).ok()?.collect();
    let numbers: Vec<RawFd> = listed.iter().map(|(fd, _)| *fd).collect();
    if numbers.is_empty() {
        return None;
    }
    let fds = sys::inherit_once(&numbers).ok()?;
    // The newest of each name: older ones belong to mounts that have ended.
    let mut named: HashMap<String, OwnedFd> = listed.into_iter().map(|(_, name)| name).zip(fds).collect();
    let (fuse, state) = (named.remove(FUSE)?, named.remove(STATE)?);
    let mut json = Vec::new();
    let mut state = File::from(state);
    state.seek(SeekFrom::Start(0)).and_then(|_| state.read_to_end(&mut json)).ok()?;
    let kept: Kept = serde_json::from_slice(&json).ok()?;
    let [configured, mount] = kept.mounts;
    let why = if kept.format > FORMAT {
        "it was written by a newer plyfs"
    } else if kept.store != config.store || configured != config.mount {
        "the configuration names another store or mount now"
    } else if sys::fuse_ended(fuse.as_fd()) {
        "it has ended"
    } else {
        tracing::info!(mount = %mount.display(), "the mount was kept by the service manager");
        return Some(Found { fuse, cache: named.remove(CACHE), mount, since_ns: kept.since_ns });
    };
    tracing::warn!(mount = %mount.display(), why, "a mount that the service manager kept is not used");
    forget();
    None
}
