//! How a mount survives its supervisor: the supervisor hands it over to another version of the program by exec, or
//! systemd's descriptor store keeps it until the next start.
//!
//! Both pass a description as JSON in a memory file. A change that an older program could not understand raises its
//! `format`. A worker announces the format that its version reads, so the supervisor never executes a program that
//! could not continue.
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
/// Set for a child that only checks whether it could continue.
const REHEARSE_ENV: &str = "PLYFS_REHEARSE";
/// The time limit of a rehearsal. A worker serves meanwhile.
const REHEARSAL_TIMEOUT: Duration = Duration::from_secs(10);
/// The newest format that this version reads and writes. Format 2 has the arena of live maps; format 3 a device for each
/// worker, and pauses.
pub const FORMAT: u32 = 3;

/// The format that this version writes: the oldest that can express the hand-over, so that an older program can take it.
pub fn format_of(protocol: Protocol) -> u32 {
    if protocol.resend { 2 } else { FORMAT }
}

/// The kinds of descriptors in the descriptor store. Each is part of a descriptor's name.
const FUSE: &str = "fuse";
const CACHE: &str = "cache";
const LIVE: &str = "live";
const STATE: &str = "state";

/// What a supervisor passes to its successor in the same process. Descriptors are passed by number.
#[derive(Debug, Serialize, Deserialize)]
pub struct HandOver {
    /// The format of this description, see [`FORMAT`].
    pub format: u32,
    /// The daemon's configuration; its mount is the path without symbolic links.
    pub config: Config,
    /// The path that `plyfs upgrade` uses by default.
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
    /// The listening socket of the status page, when there is one.
    #[serde(default)]
    pub page: Option<RawFd>,
    /// The listening socket for other hosts, when there is one.
    #[serde(default)]
    pub export: Option<RawFd>,
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
    /// Whether it answers pings.
    #[serde(default)]
    pub worker_answers: bool,
    /// When the mount was made.
    pub since_ns: i64,
    /// The report for `status`.
    pub report: Report,
}

/// The description of a mount in the descriptor store.
#[derive(Debug, Serialize, Deserialize)]
struct KeptState {
    format: u32,
    store: PathBuf,
    /// The mount point as configured, and without symbolic links.
    mounts: [PathBuf; 2],
    since_ns: i64,
    #[serde(default)]
    protocol: Protocol,
}

/// A live mount that an earlier daemon of the service left.
pub struct KeptMount {
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

/// Checks in a child process that `program` runs and understands `state`, because exec cannot be undone.
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
                return Err(io::Error::other(format!("it cannot continue as the supervisor: {status}")));
            }
            None if begun.elapsed() > REHEARSAL_TIMEOUT => {
                let _ = child.kill();
                let _ = child.wait();
                let limit = REHEARSAL_TIMEOUT.as_secs();
                return Err(io::Error::other(format!(
                    "it did not show within {limit} s that it can continue as the supervisor"
                )));
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// Continues as another program, whose supervisor takes `state`. It returns only on failure, with the reason; then
/// nothing has changed.
pub fn exec_program(program: &Path, state: &HandOver, shared: &[BorrowedFd<'_>]) -> io::Error {
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
    // Otherwise every worker would inherit all these descriptors.
    let _ = set(true);
    error
}

/// Whether this process continues as a supervisor that has just changed its program by exec.
pub fn is_resuming() -> bool {
    std::env::var_os(RESUME_ENV).is_some()
}

/// Continues where the former program stopped.
///
/// # Errors
/// As [`super::serve`].
pub fn resume(logging: impl FnOnce(&Config)) -> Result<(), ServeError> {
    let read = || {
        let number: RawFd =
            std::env::var(RESUME_ENV).ok().and_then(|n| n.parse().ok()).ok_or(io::ErrorKind::InvalidInput)?;
        // The file is opened again. The descriptor itself is inherited below, together with those that the file names.
        let mut json = Vec::new();
        File::open(format!("/proc/self/fd/{number}"))?.read_to_end(&mut json)?;
        let state: HandOver = serde_json::from_slice(&json)?;
        if state.format > FORMAT {
            return Err(io::Error::other("a newer plyfs wrote it"));
        }
        if std::env::var_os(REHEARSE_ENV).is_some() {
            return Ok(None);
        }
        let mut numbers = vec![number, state.fuse, state.lock, state.listener, state.cache, state.channel];
        numbers.extend(state.live.as_ref().map(|(fd, _)| *fd));
        numbers.extend(state.device.iter().flat_map(|(fd, table)| [*fd, *table]));
        numbers.extend(state.page);
        numbers.extend(state.export);
        Ok(Some((state, sys::inherit_once(&numbers)?)))
    };
    let read = read().map_err(system("taking over from the program before"))?;
    let Some((state, fds)) = read else { return Ok(()) };
    logging(&state.config);
    super::supervisor::resume(state, fds)
}

/// The name of a descriptor in the descriptor store. The number of the mount in it says which descriptors belong
/// together. The order in which a service manager passes them says nothing.
fn stored_name(kind: &str, since_ns: i64) -> String {
    format!("plyfs-{kind}-{since_ns}")
}

/// Gives the descriptors of a mount to the service manager, when one runs that keeps them.
pub fn keep(
    config: &Config,
    mount: &Path,
    since_ns: i64,
    protocol: Protocol,
    fuse: BorrowedFd<'_>,
    cache: BorrowedFd<'_>,
    live: Option<BorrowedFd<'_>>,
) {
    if !has_service_manager() {
        return;
    }
    let kept = KeptState {
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
        // The last one, because it is useless without the others.
        send(FUSE, fuse)
    });
    if let Err(error) = sent {
        tracing::warn!(%error, "the service manager does not keep the mount; the mount ends with this daemon");
    }
}

fn has_service_manager() -> bool {
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

/// Replaces the arena of live maps in the service manager's descriptor store.
pub fn keep_live(since_ns: i64, live: BorrowedFd<'_>) {
    if !has_service_manager() {
        return;
    }
    forget_one(LIVE, since_ns);
    if let Err(error) = send(LIVE, since_ns, live) {
        tracing::warn!(
            %error,
            "the service manager does not keep the live maps; the next daemon finds them by name only"
        );
    }
}

/// Removes the mount of that number from the service manager's descriptor store, so that no client waits for a daemon
/// that does not start.
pub fn forget(since_ns: i64) {
    for kind in [FUSE, CACHE, LIVE, STATE] {
        forget_one(kind, since_ns);
    }
}

/// The live mount of this store that the service manager kept, if any, and all arenas of live maps that it kept. Other
/// mounts are given up.
pub fn find(config: &Config) -> (Option<KeptMount>, Vec<File>) {
    let mut arenas = Vec::new();
    let found = find_mount(config, &mut arenas);
    (found, arenas)
}

fn find_mount(config: &Config, arenas: &mut Vec<File>) -> Option<KeptMount> {
    let listed: Vec<(RawFd, String)> = match sd_notify::listen_fds_with_names(true) {
        Ok(listed) => listed.collect(),
        Err(error) => {
            tracing::warn!(%error, "cannot read the list of descriptors that the service manager passed");
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
            tracing::warn!(%error, "cannot inherit the descriptors that the service manager passed");
            return None;
        }
    };
    // Ordered by the number of the mount, the newest first.
    let mut mounts: BTreeMap<Reverse<i64>, HashMap<String, OwnedFd>> = BTreeMap::new();
    for ((_, name), fd) in listed.into_iter().zip(fds) {
        let words = name.strip_prefix("plyfs-").and_then(|rest| rest.split_once('-'));
        match words.and_then(|(kind, number)| Some((kind, number.parse().ok()?))) {
            Some((kind, number)) => {
                mounts.entry(Reverse(number)).or_default().insert(kind.to_owned(), fd);
            }
            None => tracing::warn!(name, "the service manager passed an unknown descriptor; it is ignored"),
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
    tracing::warn!(mount, why, "a mount that the service manager kept cannot be used and ends");
    forget(since_ns);
}

/// The mount of these descriptors, or its path and the reason why it cannot be used.
fn usable(config: &Config, mut fds: HashMap<String, OwnedFd>) -> Result<KeptMount, (String, String)> {
    let unknown_path = |why: String| ("-".to_owned(), why);
    let (Some(fuse), Some(state)) = (fds.remove(FUSE), fds.remove(STATE)) else {
        return Err(unknown_path("some of its descriptors are missing".to_owned()));
    };
    let mut json = Vec::new();
    let mut state = File::from(state);
    let read = state.seek(SeekFrom::Start(0)).and_then(|_| state.read_to_end(&mut json));
    let kept: KeptState = read
        .and_then(|_| Ok(serde_json::from_slice(&json)?))
        .map_err(|error| unknown_path(format!("its description cannot be read: {error}")))?;
    let [configured, mount] = kept.mounts;
    let why = if kept.format > FORMAT {
        "a newer plyfs wrote it"
    } else if kept.store != config.store || configured != config.mount {
        "the configuration names another store or mount now"
    } else if sys::fuse_ended(fuse.as_fd()) {
        "it has ended"
    } else {
        let (since_ns, protocol) = (kept.since_ns, kept.protocol);
        return Ok(KeptMount { fuse, cache: fds.remove(CACHE), mount, since_ns, protocol });
    };
    Err((mount.display().to_string(), why.to_owned()))
}
