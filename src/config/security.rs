//! `[security]`: the rights that a worker gives up before it serves.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, invalid};

/// The security measures. All are on by default. The switches are for a host on which a measure does harm.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SecurityConfig {
    /// `[security] capabilities`: whether the worker drops capabilities that serving does not need. Default: true.
    pub capabilities: bool,
    /// `[security] landlock`: whether landlock denies the worker access to files outside of the store. Default: true.
    pub landlock: bool,
    /// `[security] seccomp`: the treatment of system calls that serving does not need. Default: `on`.
    pub seccomp: SeccompMode,
    /// `[security] core_dumps`: whether a worker that crashes may leave a core dump, which contains guests' data.
    /// Default: false.
    pub core_dumps: bool,
    /// `[security] base_dirs`: directories in which the files of bases must be, after symbolic links are resolved, and
    /// block devices that may be bases.
    /// The images that `disk commit` makes in the store need none. Default: none, which allows any directory. Needs `landlock`. Bounds: absolute paths, UTF-8.
    pub base_dirs: Vec<PathBuf>,
    /// `[security] nbd_socket_dirs`: directories with sockets of NBD servers, of which bases may be (`nbd+unix`). Default:
    /// none, which allows no socket. Bounds: absolute paths, UTF-8.
    pub nbd_socket_dirs: Vec<PathBuf>,
    /// `[security] network`: whether the worker may connect to servers, for bases on the network. Default: true.
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
            nbd_socket_dirs: Vec::new(),
            network: true,
        }
    }
}

/// The treatment of system calls that are not on the worker's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SeccompMode {
    /// They fail; dangerous ones kill the worker.
    On,
    /// They succeed, and the kernel's audit log names them; dangerous ones kill the worker. This mode finds calls that
    /// a list lacks.
    Log,
    /// The worker has no filter.
    Off,
}

impl SecurityConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        const KEY: &str = "security.base_dirs";
        let sockets = self.nbd_socket_dirs.iter().map(|dir| ("security.nbd_socket_dirs", dir));
        for (key, dir) in self.base_dirs.iter().map(|dir| (KEY, dir)).chain(sockets) {
            if !dir.is_absolute() || dir.to_str().is_none_or(|text| text.contains('\0')) {
                return Err(invalid(key, format!("{dir:?} is not an absolute path in UTF-8; give one")));
            }
        }
        if !self.base_dirs.is_empty() && !self.landlock {
            return Err(invalid(
                KEY,
                "landlock enforces them, and it is off; set security.landlock = true".into(),
            ));
        }
        Ok(())
    }
}
