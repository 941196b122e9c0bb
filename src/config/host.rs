//! The facts about the host that defaults depend on: the user, the memory of the machine, the data directory.
//!
//! They are read from `/proc` and the environment, so that the configuration needs no `unsafe`.

use std::ffi::OsString;
use std::path::PathBuf;

use super::ConfigError;

/// Whether the effective user is root. An unreadable `/proc` counts as "not root".
pub fn is_root() -> bool {
    user() == Some(0)
}

/// The number of the effective user; `None` when `/proc` cannot be read.
pub fn user() -> Option<u32> {
    effective_uid(&std::fs::read_to_string("/proc/self/status").ok()?)
}

pub(super) fn effective_uid(status: &str) -> Option<u32> {
    let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    uids.split_whitespace().nth(1)?.parse().ok()
}

/// The machine's memory in bytes, if the kernel reports it.
pub fn total_memory() -> Option<u64> {
    total_memory_in(&std::fs::read_to_string("/proc/meminfo").ok()?)
}

pub(super) fn total_memory_in(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The store when none is named: `/var/lib/plyfs` for root, else `plyfs` in the XDG data directory.
///
/// # Errors
/// [`ConfigError::NoDefaultStore`] when neither `XDG_DATA_HOME` nor `HOME` is an absolute path.
pub fn default_store() -> Result<PathBuf, ConfigError> {
    default_store_for(is_root(), std::env::var_os("XDG_DATA_HOME"), std::env::var_os("HOME"))
}

pub(super) fn default_store_for(
    root: bool,
    data_home: Option<OsString>,
    home: Option<OsString>,
) -> Result<PathBuf, ConfigError> {
    if root {
        return Ok(PathBuf::from("/var/lib/plyfs"));
    }
    // The XDG specification says that a relative path in the variable is ignored.
    let absolute = |value: Option<OsString>| value.map(PathBuf::from).filter(|path| path.is_absolute());
    absolute(data_home)
        .or_else(|| absolute(home).map(|home| home.join(".local/share")))
        .map(|data| data.join("plyfs"))
        .ok_or(ConfigError::NoDefaultStore)
}
