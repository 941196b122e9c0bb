//! Least privilege: what the worker and its opener give up before they touch anything that a guest, an image or a
//! client made. docs/design.md, "Least privilege", says against whom and why each exception is there.
//!
//! What must hold:
//! - [`apply`] runs while there is one thread: capabilities and landlock belong to threads, and those made later
//!   inherit them (D15).
//! - What the kernel lacks is said once in the log and always in `status`; it never keeps a worker from serving (D16).

#[cfg(test)]
mod tests;

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

/// What a worker is confined to.
#[derive(Debug)]
pub struct Policy<'a> {
    /// Which measures are wanted.
    pub security: &'a SecurityConfig,
    /// The store, open already.
    pub store: &'a Path,
    /// The directory of the live maps, which exists, when they are files by name; the worker removes it when it ends.
    pub live_dir: Option<&'a Path>,
    /// Whether all memory is locked.
    pub memory_locked: bool,
    /// Whether shortcomings are to be logged: by the first worker of a daemon.
    pub first: bool,
}

/// What is in force. Its fields are keys of `status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InForce {
    /// Capabilities that are left.
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

/// What a process reads outside of the store once it is confined, each with its reason.
const READ_ONLY: [(&str, &str); 4] = [
    ("/proc/self", "a backtrace reads maps"),
    ("/proc/self/exe", "a backtrace reads the names of functions"),
    ("/sys/devices/system/cpu/online", "the C library asks for the number of processors"),
    ("/proc/sys/kernel/random/boot_id", "whether live maps are of this boot"),
];

/// What finding the addresses of a server needs besides. Certificates are read before ([`Network::prepare`]).
///
/// [`Network::prepare`]: crate::source::http::Network::prepare
const RESOLVING: [(&str, &str); 5] = [
    ("/etc/resolv.conf", "which name servers there are"),
    ("/etc/hosts", "names without a name server"),
    ("/etc/nsswitch.conf", "which of them is asked first"),
    ("/etc/host.conf", "the same, in an older place"),
    ("/etc/gai.conf", "which of several addresses is tried first"),
];

/// Gives up, in this thread and those it will make, what serving does not need.
///
/// Call it once the store is open, before there is another thread and before the first request is read.
pub fn apply(policy: &Policy<'_>) -> InForce {
    let Policy { security, .. } = policy;
    // For the last time that it is read from a file.
    sys::boot_number();
    if process::threads().is_ok_and(|threads| threads > 1) {
        // A mistake in this program, never in its use; tests see it in `status`.
        tracing::error!("threads were started before the worker was confined; they are not");
    }
    let core_dumps = core_dumps(security);
    if security.core_dumps {
        // Where a core is written by a name without a directory; landlock refuses it anywhere else.
        let _ = std::env::set_current_dir(policy.store);
    }
    let mut complaints = Vec::new();
    let settle = |complaints: &mut Vec<String>, what: &str, result: Result<String, String>| {
        result.unwrap_or_else(|why| {
            complaints.push(format!("{what}: {why}"));
            format!("off ({why})")
        })
    };
    let privileges = process::no_new_privileges().map_err(|e| format!("no_new_privs: {e}"));
    let landlock = match (security.landlock, &privileges) {
        (false, _) => SWITCHED_OFF.into(),
        (true, Ok(())) => settle(&mut complaints, "landlock", landlock_worker(policy)),
        (true, Err(why)) => settle(&mut complaints, "landlock", Err(why.clone())),
    };
    if security.capabilities {
        let keep = worker_capabilities(policy);
        if let Err(why) = keep_capabilities(&keep) {
            complaints.push(format!("capabilities: {why}"));
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
    // The last, because it forbids what the others do.
    let seccomp = match (security.seccomp, &privileges) {
        (SeccompMode::Off, _) => SWITCHED_OFF.into(),
        (mode, Ok(())) => settle(&mut complaints, "seccomp", syscalls::restrict(worker_role(security), mode)),
        (_, Err(why)) => settle(&mut complaints, "seccomp", Err(why.clone())),
    };
    if policy.first {
        for complaint in complaints {
            tracing::warn!(complaint, "the worker runs with more rights than it needs");
        }
    }
    InForce { capabilities, landlock, seccomp, core_dumps, memory_locked: policy.memory_locked }
}

fn worker_role(security: &SecurityConfig) -> syscalls::Role {
    if security.network { syscalls::Role::NetworkWorker } else { syscalls::Role::Worker }
}

/// The same for the opener, which may read files and nothing else: all files, or those below `dirs`.
pub(super) fn opener(security: &SecurityConfig, dirs: &[PathBuf]) {
    let _ = core_dumps(security);
    let say = |what: &str, why: String| tracing::debug!(what, why, "the opener is not confined by it");
    if let Err(error) = process::no_new_privileges() {
        return say("no_new_privs", error.to_string());
    }
    if security.landlock
        && let Err(why) = landlock_opener(dirs)
    {
        say("landlock", why);
    }
    if security.capabilities {
        // A worker as root adds bases of any owner; without it, those of its user.
        let keep = CapsHashSet::from([Capability::CAP_DAC_READ_SEARCH]);
        keep_capabilities(&keep).unwrap_or_else(|why| say("capabilities", why));
    }
    if security.seccomp != SeccompMode::Off
        && let Err(why) = syscalls::restrict(syscalls::Role::Opener, security.seccomp)
    {
        say("seccomp", why);
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
            tracing::error!(%error, "core dumps cannot be switched off; they hold guests' data");
            "on".into()
        }
    }
}

fn name(capability: Capability) -> String {
    capability.to_string().trim_start_matches("CAP_").to_ascii_lowercase()
}

/// What of its capabilities a worker keeps.
fn worker_capabilities(policy: &Policy<'_>) -> CapsHashSet {
    let mut keep = CapsHashSet::new();
    if policy.memory_locked {
        // All memory to come is locked too: without it mmap(2) fails once RLIMIT_MEMLOCK is reached.
        keep.insert(Capability::CAP_IPC_LOCK);
    }
    // Root without capabilities is a user like any other. That is enough for a store that root made; one that belongs
    // to somebody else, or lies behind somebody else's directory, needs this one, which landlock holds to the store.
    let had = caps::read(None, CapSet::Effective).unwrap_or_default();
    if caps::set(None, CapSet::Effective, &CapsHashSet::new()).is_ok() {
        let parts: Vec<_> = [""].iter().chain(&layout::DIRS).map(|part| policy.store.join(part)).collect();
        let usable = |dir: &Path| process::may_use_directory(dir);
        if !parts.iter().all(|dir| usable(dir)) || !policy.live_dir.is_none_or(usable) {
            keep.insert(Capability::CAP_DAC_OVERRIDE);
        }
        // What keeps others needs this one.
        let _ = caps::set(None, CapSet::Effective, &had);
    }
    keep
}

/// Drops every capability but `keep` from every set; never gains one.
fn keep_capabilities(keep: &CapsHashSet) -> Result<(), String> {
    let said = |error: caps::errors::CapsError| error.to_string();
    let permitted = caps::read(None, CapSet::Permitted).map_err(said)?;
    let keep: CapsHashSet = keep.intersection(&permitted).copied().collect();
    if permitted.contains(&Capability::CAP_SETPCAP) {
        for capability in caps::runtime::thread_all_supported() {
            if !keep.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability).map_err(said)?;
            }
        }
    }
    if caps::runtime::ambient_set_supported().is_ok() {
        caps::clear(None, CapSet::Ambient).map_err(said)?;
    }
    caps::clear(None, CapSet::Inheritable).map_err(said)?;
    // Effective first: it may never have what permitted has not.
    caps::set(None, CapSet::Effective, &keep).map_err(said)?;
    caps::set(None, CapSet::Permitted, &keep).map_err(said)
}

/// Everything of files, the network and other processes that landlock knows is out of reach, but for what a rule
/// gives back.
///
/// With `network` connections are not its business: a base may be on any port, and which ones is not known yet.
fn ruleset(network: bool) -> Result<landlock::RulesetCreated, String> {
    let said = |error: landlock::RulesetError| error.to_string();
    let net = if network { AccessNet::BindTcp.into() } else { AccessNet::from_all(ABI::V4) };
    Ruleset::default()
        .handle_access(AccessFs::from_all(ABI::V5))
        .and_then(|ruleset| ruleset.handle_access(net))
        .and_then(|ruleset| ruleset.scope(Scope::from_all(ABI::V6)))
        .and_then(Ruleset::create)
        .map_err(said)
}

fn enforce(ruleset: landlock::RulesetCreated) -> Result<String, String> {
    let status = ruleset.restrict_self().map_err(|error| error.to_string())?;
    match status.ruleset {
        RulesetStatus::FullyEnforced => Ok("full".into()),
        RulesetStatus::PartiallyEnforced => Ok("partial (the kernel knows an older version)".into()),
        RulesetStatus::NotEnforced => Err("the kernel does not have it, or it is not switched on".into()),
    }
}

fn landlock_worker(policy: &Policy<'_>) -> Result<String, String> {
    use AccessFs::{MakeDir, MakeReg, ReadDir, ReadFile, Refer, RemoveDir, RemoveFile, Truncate, WriteFile};
    let files = ReadDir | ReadFile | WriteFile | Truncate | MakeReg | RemoveFile | Refer;
    let mut rules: Vec<(PathBuf, BitFlags<AccessFs>)> =
        vec![(policy.store.into(), files | MakeDir | RemoveDir)];
    rules.extend(policy.live_dir.map(|dir| (dir.into(), files)));
    if let Some(runtime_dir) = policy.live_dir.and_then(Path::parent) {
        // The live maps' own directory goes when the store is closed. Only empty directories can, and of those that
        // root or the daemon's user made.
        rules.push((runtime_dir.into(), RemoveDir.into()));
    }
    let network = policy.security.network;
    if network {
        // Where the name servers are written down anew by putting another file in its place, that one is read, too.
        let dir =
            std::fs::canonicalize("/etc/resolv.conf").ok().and_then(|file| Some(file.parent()?.to_owned()));
        rules.extend(dir.filter(|dir| dir.starts_with("/run")).map(|dir| (dir, ReadFile.into())));
    }
    let mut ruleset = ruleset(network)?;
    for (path, access) in rules {
        let fd = PathFd::new(&path).map_err(|error| error.to_string())?;
        ruleset = ruleset.add_rule(PathBeneath::new(fd, access)).map_err(|error| error.to_string())?;
    }
    let resolving = RESOLVING.iter().filter(|_| network);
    for (path, _reason) in READ_ONLY.iter().chain(resolving) {
        // Where it is missing nobody reads it.
        let Ok(fd) = PathFd::new(path) else { continue };
        let access = if Path::new(path).is_dir() { ReadFile | ReadDir } else { ReadFile.into() };
        ruleset = ruleset.add_rule(PathBeneath::new(fd, access)).map_err(|error| error.to_string())?;
    }
    enforce(ruleset)
}

fn landlock_opener(dirs: &[PathBuf]) -> Result<String, String> {
    let mut ruleset = ruleset(false)?;
    let all = [PathBuf::from("/")];
    for dir in if dirs.is_empty() { &all } else { dirs } {
        match PathFd::new(dir) {
            Ok(fd) => {
                let rule = PathBeneath::new(fd, AccessFs::ReadFile);
                ruleset = ruleset.add_rule(rule).map_err(|error| error.to_string())?;
            }
            Err(error) => tracing::error!(%error, "a directory of [security] base_dirs cannot be used"),
        }
    }
    enforce(ruleset)
}
