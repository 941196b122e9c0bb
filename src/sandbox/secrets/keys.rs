//! Secrets of encrypted disks: a file in one of the configured directories, or the output of the configured command.
//!
//! What must hold: a worker chooses the file or the last argument, and nothing else. No file outside of the directories
//! is read, whatever links there are.

use std::path::{Path, PathBuf};

use super::{COMMAND_TIME, execute, read};
use crate::config::EncryptionConfig;
use crate::source::http::Secret;

/// What a worker asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyRequest<'a> {
    /// The contents of the file at this path.
    File(&'a str),
    /// The output of the configured command with this last argument.
    Command(&'a str),
}

/// The first bytes of a message, where a request for a credential has its number.
const MARK: [u8; 4] = u32::MAX.to_le_bytes();

impl<'a> KeyRequest<'a> {
    pub(super) fn encode(self) -> Vec<u8> {
        let (kind, text) = match self {
            Self::File(path) => (0, path),
            Self::Command(name) => (1, name),
        };
        [&MARK[..], &[kind], text.as_bytes()].concat()
    }

    pub(super) fn decode(message: &'a [u8]) -> Option<Self> {
        let (kind, text) = message.strip_prefix(&MARK)?.split_first()?;
        let text = std::str::from_utf8(text).ok()?;
        match kind {
            0 => Some(Self::File(text)),
            1 => Some(Self::Command(text)),
            _ => None,
        }
    }

    pub(super) fn obtain(self, config: &EncryptionConfig) -> Result<Secret, String> {
        match self {
            Self::File(path) => file(Path::new(path), &config.key_dirs),
            Self::Command(name) => {
                let command = config.key_command.as_deref().unwrap_or_default();
                let Some((program, arguments)) = command.split_first() else {
                    return Err("the configuration has no command; set [encryption] key_command".into());
                };
                let arguments: Vec<String> = arguments.iter().cloned().chain([name.to_owned()]).collect();
                execute(program, &arguments, ("PLYFS_KEY", name), COMMAND_TIME)
                    .map_err(|why| format!("{program}: {why}"))
            }
        }
    }
}

fn file(path: &Path, dirs: &[PathBuf]) -> Result<Secret, String> {
    if dirs.is_empty() {
        return Err("the configuration has no directories of secrets; set [encryption] key_dirs".into());
    }
    let real = std::fs::canonicalize(path).map_err(|error| error.to_string())?;
    let is_in = |dir: &PathBuf| std::fs::canonicalize(dir).is_ok_and(|dir| real.starts_with(dir));
    if !dirs.iter().any(is_in) {
        return Err("it is in none of the directories of [encryption] key_dirs; put it there".into());
    }
    read(&real)
}
