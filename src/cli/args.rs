//! Arguments that several commands share: names, sizes, digests and paths. A command checks them before it sends a
//! request.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::CliError;
use crate::config::size::parse_size;
use crate::source::Location;

/// Parses the name of a base or a disk.
///
/// The daemon enforces the same rule; here the rule keeps a name from having a meaning in a URL.
pub(super) fn name(text: &str) -> Result<String, String> {
    let first = text.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
    let rest = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    if first && rest && text.len() <= 128 {
        return Ok(text.to_owned());
    }
    // The path of a file in the mount.
    if let Some(stem) = text.rsplit_once('/').and_then(|(_, file)| file.strip_suffix(SUFFIX))
        && name(stem).is_ok()
    {
        return Err(format!("it is the path of a file; did you mean {stem}?"));
    }
    Err("a name is 1 to 128 letters, digits, '.', '_' or '-' of ASCII, and starts with a letter or digit"
        .into())
}

/// The end of the names of files in the mount.
const SUFFIX: &str = ".raw";

/// As [`name`], for an object that is to be created: its file gets the suffix by itself.
pub(super) fn new_name(text: &str) -> Result<String, String> {
    match text.strip_suffix(SUFFIX) {
        Some(stem) if name(stem).is_ok() => {
            Err(format!("its file would be {text}{SUFFIX}; did you mean {stem}?"))
        }
        _ => name(text),
    }
}

/// A disk, or a snapshot of one: `DISK` or `DISK@SNAPSHOT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DiskOrSnapshot {
    pub disk: String,
    pub snapshot: Option<String>,
}

impl std::fmt::Display for DiskOrSnapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.snapshot {
            Some(snapshot) => write!(f, "{}@{snapshot}", self.disk),
            None => f.write_str(&self.disk),
        }
    }
}

/// Parses `DISK` or `DISK@SNAPSHOT`.
pub(super) fn disk_or_snapshot(text: &str) -> Result<DiskOrSnapshot, String> {
    let (disk, snapshot) = match text.split_once('@') {
        Some((disk, snapshot)) => (disk, Some(name(snapshot)?)),
        None => (text, None),
    };
    Ok(DiskOrSnapshot { disk: name(disk)?, snapshot })
}

/// The least size of a disk that is given without a unit and is no whole number of sectors.
const SECTOR: u64 = 512;
const LEAST: u64 = 1 << 20;

/// Parses the size of a disk. A small number without a unit is more often a forgotten unit than a number of bytes.
pub(super) fn disk_size(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    let has_unit = text.ends_with(|last: char| last.is_ascii_alphabetic());
    if has_unit || bytes >= LEAST || bytes.is_multiple_of(SECTOR) {
        return Ok(bytes);
    }
    Err(format!("that is {bytes} bytes, less than 1M and no multiple of 512; add a unit, as in {bytes}G"))
}

/// Parses a size above 0.
pub(super) fn size(text: &str) -> Result<u64, String> {
    match parse_size(text) {
        Ok(0) => Err("the size is 0; give at least 1 byte".into()),
        Ok(bytes) => Ok(bytes),
        Err(error) => Err(error.to_string()),
    }
}

/// Parses a size that may be 0.
pub(super) fn size_or_zero(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|error| error.to_string())
}

/// Parses the longest time that a command waits.
pub(super) fn longest_wait(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| "it is not a time; write one such as 30s or 5m".into())
}

/// Parses a duration of at least a second.
pub(super) fn time(text: &str) -> Result<Duration, String> {
    match crate::config::parse_duration(text) {
        Some(time) if time >= Duration::from_secs(1) => Ok(time),
        Some(_) => Err("the time is out of range; give at least 1s".into()),
        None => Err("it is not a time; write one such as 30s, 10m, 2h or 7d".into()),
    }
}

/// Parses a duration that may be 0.
pub(super) fn time_or_zero(text: &str) -> Result<Duration, String> {
    match crate::config::parse_duration(text) {
        Some(Duration::ZERO) => Ok(Duration::ZERO),
        None if text == "0" => Ok(Duration::ZERO),
        _ => time(text),
    }
}

/// Parses a duration, in whole seconds.
pub(super) fn seconds(text: &str) -> Result<u32, String> {
    let time =
        crate::config::parse_duration(text).ok_or("it is not a time; write one such as 30s, 10m or 2h")?;
    match u32::try_from(time.as_secs()) {
        Ok(seconds) if seconds > 0 => Ok(seconds),
        _ => Err("the time is out of range; give at least 1s".into()),
    }
}

pub(super) fn sha256(text: &str) -> Result<String, String> {
    digest(text, 64)
}

pub(super) fn sha512(text: &str) -> Result<String, String> {
    digest(text, 128)
}

fn digest(text: &str, digits: usize) -> Result<String, String> {
    if text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Ok(text.to_ascii_lowercase());
    }
    Err(format!(
        "a digest of this kind has {digits} hexadecimal digits; this text has {} characters",
        text.chars().count()
    ))
}

/// Whether a source is a URL (`scheme://...`). Any other text is a path.
pub(super) fn is_url(source: &str) -> bool {
    Location::of(source).is_url()
}

/// Makes a path absolute against the current directory. Symbolic links and `..` stay as they are.
pub(super) fn absolute(path: &Path) -> Result<PathBuf, CliError> {
    std::path::absolute(path).map_err(|source| CliError::Absolute { path: path.to_path_buf(), source })
}
