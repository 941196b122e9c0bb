//! The rights that the worker and its helpers give up before they touch any data of a guest, an image or a client.
//! docs/design.md, "Least privilege", has the threat model and the reason for each exception.
//!
//! What must hold:
//! - [`apply`] runs while the process has one thread: capabilities and landlock belong to threads, and later threads
//!   inherit them (D15).
//! - The log names once, and `status` always, which measures the kernel lacks. They never keep a worker from serving
//!   (D16).

#[cfg(test)]
mod tests;

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use caps::{CapSet, Capability, CapsHashSet};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use serde::Serialize;

use super::syscalls;
use crate::config::{SeccompMode, SecurityConfig};
use crate::format::layout;
use crate::io::{confine as process, sys};

/// The limits of a worker.
#[derive(Debug)]
pub struct Policy<'a> {
    /// The configured measures.
    pub security: &'a SecurityConfig,
    /// The directory of the store, which is already open.
    pub store: &'a Path,
    /// The directories of the pools that can be used now.
    pub pools: &'a [PathBuf],
    /// The existing directory of the live maps, when they are named files. The worker removes it when it ends.
    pub live_dir: Option<&'a Path>,
    /// Whether all memory is locked.
    pub memory_locked: bool,
    /// Whether this is the first worker of a daemon, which logs the measures that are not in force.
    pub first: bool,
    /// The bound socket of metrics, on which the worker listens once it serves.
    pub listens: Option<RawFd>,
}

/// The measures in force. The fields are keys of `status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ActiveMeasures {
    /// Capabilities that the worker keeps.
    pub capabilities: Vec<String>,
    /// `full`, `partial (...)`, `off (why)`.
    pub landlock: String,
    /// `on`, `log`, `off (why)`.
    pub seccomp: String,
    /// `off` or `on`.
    pub core_dumps: String,
    /// Whether all memory is locked.
    pub memory_locked: bool,
}

const SWITCHED_OFF: &str = "off (configuration)";

/// The paths outside of the store that a confined process reads, each with its reason.
const READ_ONLY: [(&str, &str); 4] = [
    ("/proc/self", "a backtrace reads maps"),
    ("/proc/self/exe", "a backtrace reads the names of functions"),
    ("/sys/devices/system/cpu/online", "the C library asks for the number of processors"),
    ("/proc/sys/kernel/random/boot_id", "whether live maps belong to this boot"),
];

/// The files that resolving a server's name reads too. Certificates are read before ([`Network::prepare`]).
///
/// [`Network::prepare`]: crate::source::http::Network::prepare
const RESOLVING: [(&str, &str); 5] = [
    ("/etc/resolv.conf", "the list of name servers"),
    ("/etc/hosts", "names that need no name server"),
    ("/etc/nsswitch.conf", "the order of these sources"),
    ("/etc/host.conf", "the same, for older C libraries"),
    ("/etc/gai.conf", "the order of a name's addresses"),
];

/// Gives up the rights that serving does not need, in this thread and its later children.
///
/// The caller has opened the store, has one thread, and has read no request yet.
pub fn apply(policy: &Policy<'_>) -> ActiveMeasures {
    let Policy { security, .. } = policy;
    // Reads the boot number from its file now, and keeps it.
    sys::boot_number();
    if process::threads().is_ok_and(|threads| threads > 1) {
        // A bug in this program, which no use of it can cause.
        tracing::error!(
            "threads were started before the worker was confined; these threads are not confined"
        );
    }
    let core_dumps = core_dumps(security);
    if security.core_dumps {
        // The kernel writes a core into the current directory when its name has no directory. Landlock allows only the
        // store.
        let _ = std::env::set_current_dir(policy.store);
    }
    let mut missing = Vec::new();
    let state_of = |missing: &mut Vec<String>, measure: &str, result: Result<String, String>| {
        result.unwrap_or_else(|why| {
            missing.push(format!("{measure}: {why}"));
            format!("off ({why})")
        })
    };
    let privileges = process::no_new_privileges().map_err(|e| format!("no_new_privs: {e}"));
    let landlock = match (security.landlock, &privileges) {
        (false, _) => SWITCHED_OFF.into(),
        (true, Ok(())) => state_of(&mut missing, "landlock", landlock_worker(policy)),
        (true, Err(why)) => state_of(&mut missing, "landlock", Err(why.clone())),
    };
    if security.capabilities {
        let keep = worker_capabilities(policy);
        if let Err(why) = keep_capabilities(&keep) {
            missing.push(format!("capabilities: {why}"));
        }
    }
    let capabilities = match caps::read(None, CapSet::Permitted) {
        Ok(left) => {
            let mut names: Vec<String> = left.into_iter().map(name).collect();
            names.sort();
            names
        }
        Err(error) => vec![format!("unknown ({error})")],
    };
    // The filter comes last, because it forbids the calls of the other measures.
    let seccomp = match (security.seccomp, &privileges) {
        (SeccompMode::Off, _) => SWITCHED_OFF.into(),
        (mode, Ok(())) => {
            let restricted = syscalls::restrict(worker_role(security), mode, policy.listens);
            state_of(&mut missing, "seccomp", restricted)
        }
        (_, Err(why)) => state_of(&mut missing, "seccomp", Err(why.clone())),
    };
    if policy.first {
        for measure in missing {
            tracing::warn!(missing = measure, "the worker runs with more rights than it needs");
        }
    }
    ActiveMeasures { capabilities, landlock, seccomp, core_dumps, memory_locked: policy.memory_locked }
}

fn worker_role(security: &SecurityConfig) -> syscalls::Role {
    if security.network { syscalls::Role::NetworkWorker } else { syscalls::Role::Worker }
}

/// Confines a helper that only reads files: all files, or those below `dirs`. With `nbd_socket_dirs` it also connects to
/// sockets.
pub(super) fn opener(security: &SecurityConfig, dirs: &[PathBuf]) {
    let role = match security.nbd_socket_dirs.is_empty() {
        true => syscalls::Role::Opener,
        false => syscalls::Role::ConnectingOpener,
    };
    reader(security, dirs, role);
}

/// Confines a helper that reads files below `dirs` and asks servers for tokens.
pub(super) fn token_helper(security: &SecurityConfig, dirs: &[PathBuf]) {
    reader(security, dirs, worker_role(security));
}

fn reader(security: &SecurityConfig, dirs: &[PathBuf], role: syscalls::Role) {
    let _ = core_dumps(security);
    let report = |measure: &str, why: String| {
        tracing::debug!(measure, why, "the helper is not confined by this measure")
    };
    if let Err(error) = process::no_new_privileges() {
        return report("no_new_privs", error.to_string());
    }
    if security.landlock
        && let Err(why) = landlock_opener(dirs, role)
    {
        report("landlock", why);
    }
    if security.capabilities {
        // With this capability root's daemon can use images of any owner. Another user does not have it.
        let keep = CapsHashSet::from([Capability::CAP_DAC_READ_SEARCH]);
        keep_capabilities(&keep).unwrap_or_else(|why| report("capabilities", why));
    }
    if security.seccomp != SeccompMode::Off
        && let Err(why) = syscalls::restrict(role, security.seccomp, None)
    {
        report("seccomp", why);
    }
}

/// Whether a core dump is possible: `on` or `off`.
fn core_dumps(security: &SecurityConfig) -> String {
    if security.core_dumps {
        return "on".into();
    }
    match process::forbid_core_dumps() {
        Ok(()) => "off".into(),
        Err(error) => {
            tracing::error!(%error, "cannot switch off core dumps, which may contain guests' data");
            "on".into()
        }
    }
}

fn name(capability: Capability) -> String {
    capability.to_string().trim_start_matches("CAP_").to_ascii_lowercase()
}

/// The capabilities that a worker keeps.
fn worker_capabilities(policy: &Policy<'_>) -> CapsHashSet {
    let mut keep = CapsHashSet::new();
    if policy.memory_locked {
        // All later memory is locked too. Without this capability mmap(2) fails once RLIMIT_MEMLOCK is reached.
        keep.insert(Capability::CAP_IPC_LOCK);
    }
    // Root without capabilities has the rights of an ordinary user. They suffice for a store that root created. A store
    // that belongs to another user, or lies below another user's directory, needs CAP_DAC_OVERRIDE; landlock limits
    // that to the store.
    let had = caps::read(None, CapSet::Effective).unwrap_or_default();
    if caps::set(None, CapSet::Effective, &CapsHashSet::new()).is_ok() {
        let parts = [""].iter().chain(&layout::DIRS).map(|part| policy.store.join(part));
        let of_pools = policy.pools.iter().flat_map(|pool| ["", layout::DELTAS].map(|part| pool.join(part)));
        let parts: Vec<_> = parts.chain(of_pools).collect();
        let usable = |dir: &Path| process::may_use_directory(dir);
        if !parts.iter().all(|dir| usable(dir)) || !policy.live_dir.is_none_or(usable) {
            keep.insert(Capability::CAP_DAC_OVERRIDE);
        }
        // Dropping capabilities below needs the former ones.
        let _ = caps::set(None, CapSet::Effective, &had);
    }
    keep
}

/// Drops every capability except `keep` from every set. It never adds one.
fn keep_capabilities(keep: &CapsHashSet) -> Result<(), String> {
    let text = |error: caps::errors::CapsError| error.to_string();
    let permitted = caps::read(None, CapSet::Permitted).map_err(text)?;
    let keep: CapsHashSet = keep.intersection(&permitted).copied().collect();
    if permitted.contains(&Capability::CAP_SETPCAP) {
        for capability in caps::runtime::thread_all_supported() {
            if !keep.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability).map_err(text)?;
            }
        }
    }
    if caps::runtime::ambient_set_supported().is_ok() {
        caps::clear(None, CapSet::Ambient).map_err(text)?;
    }
    caps::clear(None, CapSet::Inheritable).map_err(text)?;
    // Effective first, because it must be a subset of permitted.
    caps::set(None, CapSet::Effective, &keep).map_err(text)?;
    caps::set(None, CapSet::Permitted, &keep).map_err(text)
}

/// A ruleset that denies all access to files, the network and other processes that landlock knows. Rules then allow
/// paths.
///
/// With `network` it does not restrict connections: a base may be on any port, and the ports are not known yet.
fn ruleset(network: bool) -> Result<landlock::RulesetCreated, String> {
    let text = |error: landlock::RulesetError| error.to_string();
    let net = if network { AccessNet::BindTcp.into() } else { AccessNet::from_all(ABI::V4) };
    Ruleset::default()
        .handle_access(AccessFs::from_all(ABI::V5))
        .and_then(|ruleset| ruleset.handle_access(net))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(ABI::V6)))
        .and_then(Ruleset::create)
        .map_err(text)
}

fn enforce(ruleset: landlock::RulesetCreated) -> Result<String, String> {
    let status = ruleset.restrict_self().map_err(|error| error.to_string())?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => Ok("full".into()),
        RulesetStatus::PartiallyEnforced => Ok("partial (the kernel knows an older version)".into()),
        RulesetStatus::NotEnforced => Err("the kernel does not have it, or it is switched off".into()),
    }
}

/// The directory of resolv.conf's target. When resolv.conf is a link into /run, a new file may replace the target while
/// the process runs. So the rule is for the directory.
fn resolver_dir() -> Option<PathBuf> {
    let file = std::fs::canonicalize("/etc/resolv.conf").ok()?;
    file.parent().map(Path::to_owned).filter(|dir| dir.starts_with("/run"))
}

fn landlock_worker(policy: &Policy<'_>) -> Result<String, String> {
    use AccessFs::{MakeDir, MakeReg, ReadDir, ReadFile, Refer, RemoveDir, RemoveFile, Truncate, WriteFile};
    let files = ReadDir | ReadFile | WriteFile | Truncate | MakeReg | RemoveFile | Refer;
    let mut rules: Vec<(PathBuf, BitFlags<AccessFs>)> =
        vec![(policy.store.into(), files | MakeDir | RemoveDir)];
    rules.extend(policy.live_dir.map(|dir| (dir.into(), files)));
    if let Some(runtime_dir) = policy.live_dir.and_then(Path::parent) {
        // The worker removes the live maps' directory when it closes the store. This right covers other empty
        // directories there too, when root or the daemon's user created them.
        rules.push((runtime_dir.into(), RemoveDir.into()));
    }
    // A pool that went away since needs no rule: the worker cannot use it.
    // A pool gets a directory for further copies of fetched blocks when a base wants some.
    rules
        .extend(policy.pools.iter().filter(|pool| pool.is_dir()).map(|pool| (pool.clone(), files | MakeDir)));
    let network = policy.security.network;
    if network {
        rules.extend(resolver_dir().map(|dir| (dir, ReadFile.into())));
    }
    let mut ruleset = ruleset(network)?;
    for (path, access) in rules {
        let fd = PathFd::new(&path).map_err(|error| error.to_string())?;
        ruleset = ruleset.add_rule(PathBeneath::new(fd, access)).map_err(|error| error.to_string())?;
    }
    let resolving = RESOLVING.iter().filter(|_| network);
    for (path, _reason) in READ_ONLY.iter().chain(resolving) {
        // A file that does not exist needs no rule.
        let Ok(fd) = PathFd::new(path) else { continue };
        let access = if Path::new(path).is_dir() { ReadFile | ReadDir } else { ReadFile.into() };
        ruleset = ruleset.add_rule(PathBeneath::new(fd, access)).map_err(|error| error.to_string())?;
    }
    enforce(ruleset)
}

fn landlock_opener(dirs: &[PathBuf], role: syscalls::Role) -> Result<String, String> {
    let network = role == syscalls::Role::NetworkWorker;
    let mut ruleset = ruleset(network)?;
    if network {
        let files = READ_ONLY.iter().chain(&RESOLVING).map(|(path, _)| PathBuf::from(path));
        for path in files.chain(resolver_dir()) {
            // A file that does not exist needs no rule.
            let Ok(fd) = PathFd::new(&path) else { continue };
            let rule = PathBeneath::new(fd, AccessFs::ReadFile);
            ruleset = ruleset.add_rule(rule).map_err(|error| error.to_string())?;
        }
    }
    // What is known of block devices (`source::device`). Directories need a right of their own.
    let describing = [
        ("/sys/devices", AccessFs::ReadFile | AccessFs::ReadDir),
        ("/sys/class/block", AccessFs::ReadFile | AccessFs::ReadDir),
        ("/run/udev/data", AccessFs::ReadFile.into()),
        ("/proc/self/mountinfo", AccessFs::ReadFile.into()),
    ];
    for (path, access) in describing.into_iter().filter(|_| role.is_opener()) {
        let Ok(fd) = PathFd::new(path) else { continue };
        let rule = PathBeneath::new(fd, access);
        ruleset = ruleset.add_rule(rule).map_err(|error| error.to_string())?;
    }
    let all = [PathBuf::from("/")];
    for dir in if dirs.is_empty() { &all } else { dirs } {
        match PathFd::new(dir) {
            Ok(fd) => {
                let rule = PathBeneath::new(fd, AccessFs::ReadFile);
                ruleset = ruleset.add_rule(rule).map_err(|error| error.to_string())?;
            }
            Err(error) => tracing::error!(
                %error,
                dir = %dir.display(),
                "cannot open a directory that bases or credentials are read from; its files will be refused"
            ),
        }
    }
    enforce(ruleset)
}
