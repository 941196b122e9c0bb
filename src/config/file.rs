//! The TOML file: sections of optional keys. Unknown keys are refused.
//!
//! These types are separate from [`Config`](super::Config), so that an absent key differs from a key with the default
//! value: flags override the file, the file overrides defaults.

use std::fmt;
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::{Deserializer, Error, Visitor};

use super::size::parse_size;

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct File {
    pub store: Store,
    pub mount: Mount,
    pub cache: Cache,
    pub fuse: Threads,
    pub io: Threads,
    pub runtime: Runtime,
    pub log: Log,
    pub hydrate: Hydrate,
    pub security: super::SecurityConfig,
    pub trace: super::TraceConfig,
    pub http: super::HttpConfig,
    pub metrics: super::MetricsConfig,
    pub notify: super::NotifyConfig,
    pub encryption: super::EncryptionConfig,
    pub page: super::PageConfig,
    pub export: super::ExportConfig,
    pub trash: super::TrashConfig,
    pub bases: super::UnusedBasesConfig,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Store {
    pub path: Option<PathBuf>,
    pub reserve: Option<Size>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Mount {
    pub path: Option<PathBuf>,
    pub allow_other: Option<bool>,
    pub base_mode: Option<Mode>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Cache {
    pub memory: Option<Size>,
    pub disk: Option<Size>,
    pub disk_bases: Option<usize>,
    pub disk_free: Option<Size>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Hydrate {
    pub auto: Option<bool>,
    pub rate: Option<Size>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Threads {
    pub threads: Option<usize>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Runtime {
    pub dir: Option<PathBuf>,
    pub map_memory: Option<Size>,
    pub map_memory_per_disk: Option<Size>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Log {
    pub level: Option<String>,
    pub format: Option<super::LogFormat>,
}

/// A size in bytes: a TOML integer, or a string as on the command line (`"20G"`).
#[derive(Clone, Copy, Debug)]
pub(super) struct Size(pub u64);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;
        impl Visitor<'_> for SizeVisitor {
            type Value = Size;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size: a number of bytes, or a string such as \"64M\" or \"20G\"")
            }
            fn visit_i64<E: Error>(self, value: i64) -> Result<Size, E> {
                self.visit_str(&value.to_string())
            }
            fn visit_u64<E: Error>(self, value: u64) -> Result<Size, E> {
                self.visit_str(&value.to_string())
            }
            fn visit_str<E: Error>(self, value: &str) -> Result<Size, E> {
                parse_size(value)
                    .map(Size)
                    .map_err(|why| E::custom(format!("{value:?} is not a size: {why}")))
            }
        }
        deserializer.deserialize_any(SizeVisitor)
    }
}

/// Permission bits, an octal string such as `"0400"`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mode(pub u32);

impl<'de> Deserialize<'de> for Mode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ModeVisitor;
        impl Visitor<'_> for ModeVisitor {
            type Value = Mode;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an octal mode in a string, such as \"0400\"")
            }
            fn visit_str<E: Error>(self, value: &str) -> Result<Mode, E> {
                let octal = !value.is_empty() && value.bytes().all(|byte| (b'0'..=b'7').contains(&byte));
                octal.then(|| u32::from_str_radix(value, 8).ok()).flatten().map(Mode).ok_or_else(|| {
                    E::custom(format!("{value:?} is not an octal mode; give a string such as \"0400\""))
                })
            }
        }
        deserializer.deserialize_str(ModeVisitor)
    }
}
