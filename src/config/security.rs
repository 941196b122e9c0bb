//! `[security]`: what a worker gives up before it serves.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, invalid};

/// Everything is on by default; the switches are for a host where one of them does harm.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SecurityConfig {
    /// `[security] capabilities`: whether capabilities that serving does not need are dropped. Default: true.
    pub capabilities: bool,
    /// `[security] landlock`: whether files outside the store are put out of reach. Default: true.
    pub landlock: bool,
    /// `[security] seccomp`: what happens to system calls that serving does not need. Default: `on`.
    pub seccomp: SeccompMode,
    /// `[security] core_dumps`: whether a worker that crashes may leave a core dump, which holds guests' data.
    /// Default: false.
    pub core_dumps: bool,
    /// `[security] base_dirs`: directories that the files of bases have to be in, symbolic links resolved. Default:
    /// none, which means anywhere. Needs `landlock`. Bounds: absolute paths, UTF-8.
    pub base_dirs: Vec<PathBuf>,
    /// `[security] network`: whether the worker may make connections, for bases on the network. Default: true.
    pub network: bool,
}

impl Default for SecurityConfig {
    fn default() -> Self {
        Self {
            capabilities: true,
            landlock: true,
            seccomp: SeccompMode::On,
            core_dumps: false,
            base_dirs: Vec::new(),
            network: true,
        }
    }
}

/// What happens to system calls that are not on the worker's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SeccompMode {
    /// They fail; the dangerous ones end the worker.
    On,
    /// They work, and the kernel's audit log names them; the dangerous ones end the worker. To find out what a list
    /// lacks.
    Log,
    /// There is no filter.
    Off,
}

impl SecurityConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        const KEY: &str = "security.base_dirs";
        for dir in &self.base_dirs {
            if !dir.is_absolute() || dir.to_str().is_none_or(|text| text.contains('\0')) {
                return Err(invalid(KEY, format!("{dir:?} is not an absolute path in UTF-8; write one")));
            }
        }
        if !self.base_dirs.is_empty() && !self.landlock {
            return Err(invalid(KEY, "they are held by landlock; do not switch it off".into()));
        }
        Ok(())
    }
}
