//! `[trash]` and `[bases]`: how long removed disks and unused bases are kept.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::http::{duration, optional_duration, size};
use super::size::{MAX_SIZE, format_size};
use super::{ConfigError, invalid};

/// The upper bound of each time: ten years.
const LONGEST: Duration = Duration::from_secs(3650 * 86_400);
const SHORTEST: Duration = Duration::from_secs(1);

/// The settings of the trash.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TrashConfig {
    /// `[trash] grace`, `--trash-grace`: how long a removed disk can be restored. Default: 0, a removed disk is gone at
    /// once. Bounds: 0, or 1 s to 3650 days.
    #[serde(deserialize_with = "duration")]
    pub grace: Duration,
}

/// The settings of bases that nothing needs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct UnusedBasesConfig {
    /// `[bases] unused_age`, `--base-unused-age`: a base that nothing needed for this long is removed. Default: never.
    /// Bounds: 1 s to 3650 days.
    #[serde(deserialize_with = "optional_duration")]
    pub unused_age: Option<Duration>,
    /// `[bases] unused_limit`, `--base-unused-limit`: bytes that the bases which nothing needs may take in the store;
    /// above it the least recently used ones are removed. Default: no limit. Bounds: below 8 EiB.
    #[serde(deserialize_with = "size")]
    pub unused_limit: Option<u64>,
}

fn check(key: &'static str, time: Duration, zero: &str) -> Result<(), ConfigError> {
    if (SHORTEST..=LONGEST).contains(&time) {
        return Ok(());
    }
    Err(invalid(key, format!("{} ms is out of bounds; give {zero}1s to 3650d", time.as_millis())))
}

impl TrashConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        if self.grace.is_zero() { Ok(()) } else { check("trash.grace", self.grace, "0s (no trash), or ") }
    }
}

impl UnusedBasesConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        self.unused_age.map_or(Ok(()), |age| check("bases.unused_age", age, ""))?;
        match self.unused_limit {
            Some(limit) if limit > MAX_SIZE => Err(invalid(
                "bases.unused_limit",
                format!("{} is out of bounds; give less than 8E", format_size(limit)),
            )),
            _ => Ok(()),
        }
    }
}
