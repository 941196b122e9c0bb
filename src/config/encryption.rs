//! `[encryption]`: where the secrets of encrypted disks may come from.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, invalid};

/// A disk names its secret, and the configuration says what may be read or run for that. The secrets themselves are never
/// in the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EncryptionConfig {
    /// `[encryption] key_dirs`: directories in which the secrets' files of `--key-file` must be, after symbolic links are
    /// resolved. Default: none, which allows no file. Bounds: absolute paths, UTF-8.
    pub key_dirs: Vec<PathBuf>,
    /// `[encryption] key_command`: a program (absolute path) and its arguments, which prints the secret that
    /// `--key-command` names. Default: none.
    pub key_command: Option<Vec<String>>,
}

impl EncryptionConfig {
    /// Whether secrets can be read at all.
    pub fn reads_secrets(&self) -> bool {
        !self.key_dirs.is_empty() || self.key_command.is_some()
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        for dir in &self.key_dirs {
            if !dir.is_absolute() || dir.to_str().is_none_or(|text| text.contains('\0')) {
                let why = format!("{dir:?} is not an absolute path in UTF-8; give one");
                return Err(invalid("encryption.key_dirs", why));
            }
        }
        if let Some(command) = &self.key_command {
            const KEY: &str = "encryption.key_command";
            if !command.first().is_some_and(|program| program.starts_with('/')) {
                let message = "it does not begin with the absolute path of a program; give one";
                return Err(invalid(KEY, message.into()));
            }
            if command.iter().any(|word| word.contains('\0')) {
                return Err(invalid(KEY, "it contains a NUL; remove it".into()));
            }
        }
        Ok(())
    }
}
