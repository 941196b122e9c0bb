//! `[trace]`: recording the reads of boots, and fetching their blocks ahead of later boots.

use serde::{Deserialize, Serialize};

use super::{ConfigError, invalid};

/// The settings of recording and prefetch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TraceConfig {
    /// `[trace] auto`: whether the first boot of a base that has no trace is recorded. Default: true.
    pub auto: bool,
    /// `[trace] prefetch`: whether the blocks of a base's trace are fetched as soon as a disk on it is read. Default:
    /// true.
    pub prefetch: bool,
    /// `[trace] idle_seconds`: a recording ends when the disk has read nothing new for this time. Default: 30. Bounds:
    /// 1 to 3600.
    pub idle_seconds: u64,
    /// `[trace] longest_seconds`: a recording ends this long after its first read. Default: 300. Bounds: 1 to 86400.
    pub longest_seconds: u64,
}

impl Default for TraceConfig {
    fn default() -> Self {
        Self { auto: true, prefetch: true, idle_seconds: 30, longest_seconds: 300 }
    }
}

impl TraceConfig {
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        for (key, seconds, most) in [
            ("trace.idle_seconds", self.idle_seconds, 3600),
            ("trace.longest_seconds", self.longest_seconds, 86_400),
        ] {
            if !(1..=most).contains(&seconds) {
                return Err(invalid(key, format!("{seconds} is out of bounds; give 1 to {most}")));
            }
        }
        Ok(())
    }
}
