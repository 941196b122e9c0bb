//! Configuration of the daemon. The defaults, the TOML file and the flags become one validated [`Config`]; flags take
//! precedence over the file, and the file over the defaults.
//!
//! Components below `daemon` read no configuration from files, flags or environment variables: this struct has all
//! their settings. The supervisor passes the whole of it to its worker as JSON, so that both use the same values.

mod allow;
mod encryption;
mod export;
mod file;
mod files;
pub mod host;
mod http;
pub mod keys;
mod metrics;
mod notify;
mod openstack;
mod page;
pub mod place;
mod retention;
mod s3;
mod security;
pub mod size;
#[cfg(test)]
mod tests;
mod trace;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use self::trace::TraceConfig;
pub use allow::AllowEntry;
pub use encryption::EncryptionConfig;
pub use export::ExportConfig;
pub use http::{CredentialConfig, CredentialSource, HttpConfig, parse_duration};
pub use metrics::MetricsConfig;
pub use notify::NotifyConfig;
pub use openstack::{CloudConfig, LocationKind};
pub use page::{PageAddress, PageConfig};
pub use retention::{TrashConfig, UnusedBasesConfig};
pub use s3::{S3Config, S3Keys, S3Style, is_of_bucket, is_region};
pub use security::{SeccompMode, SecurityConfig};
use size::format_size;

use crate::format::layout;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// The environment variable with a worker's log level. The worker logs before it has read its configuration.
pub const LOG_LEVEL_ENV: &str = "PLYFS_LOG_LEVEL";
/// The environment variable with a worker's log format, see [`LOG_LEVEL_ENV`].
pub const LOG_FORMAT_ENV: &str = "PLYFS_LOG_FORMAT";

/// Levels of logging, quietest first.
pub const LOG_LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
/// Names of [`LogFormat`], in the order of its variants.
pub const LOG_FORMATS: [&str; 3] = ["auto", "human", "json"];

/// All settings of the daemon. Paths are absolute and UTF-8.
///
/// An upgrade passes it as JSON from one version to another: a field that is added later has a `serde` default, and a
/// reader ignores fields that it does not know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// `[store] path`, `--store`: directory of bases' records, deltas, the lock and the control socket.
    /// Default: `/var/lib/plyfs` for root, else `plyfs` in the XDG data directory.
    pub store: PathBuf,
    /// `[store] reserve`: bytes of the store's filesystem that are reserved, so that discards, flushes and removals
    /// work when the filesystem is full. Default: 1/256 of the filesystem, from 4 MiB to 64 MiB; 1 MiB in memory.
    /// Bounds: 0 (none), or 1 MiB to 64 GiB; at most 1/16 of the filesystem is reserved.
    pub reserve: Option<u64>,
    /// `[mount] path`, `--mount`: the mount point. Default: `mnt` in the store. Bounds: neither the store nor a
    /// directory above it.
    pub mount: PathBuf,
    /// `[mount] allow_other`, `--allow-other`: whether users other than the daemon's may enter the mount.
    /// Default: true as root, else false.
    pub allow_other: bool,
    /// `[mount] base_mode`: permission bits of the files in `bases/`, an octal string in TOML. Default: 0400.
    /// Bounds: no bits beyond 0777 and no write bit, because a base is never written.
    pub base_mode: u32,
    /// `[cache] memory`, `--cache-memory`: bytes of memory for cached blocks of bases.
    /// Default: 1/8 of the machine's memory, from 64 MiB to 16 GiB. Bounds: at least 1 MiB.
    pub cache_memory: u64,
    /// `[cache] disk`, `--cache-disk`: bytes on disk for fetched blocks. Default: a tenth of the store's filesystem, at
    /// most 64 GiB. Bounds: 0 (no block is kept), or at least 1 MiB.
    pub cache_disk: Option<u64>,
    /// `[cache] disk_bases`: the number of images that the cache on disk holds. Default: no limit. Bounds: at least 1.
    #[serde(default)]
    pub cache_disk_bases: Option<usize>,
    /// `[cache] disk_free`: bytes of the filesystem that the cache on disk leaves free. Default: a twentieth of the
    /// filesystem, at least 1 GiB, at most a quarter. Bounds: below 8E.
    #[serde(default)]
    pub cache_disk_free: Option<u64>,
    /// `[fuse] threads`: threads that read requests of the kernel. Default: 4. Bounds: 1 to 64.
    pub fuse_threads: usize,
    /// `[io] threads`: threads for work that may block on the store or a source. Default: 32. Bounds: 1 to 1024.
    pub io_threads: usize,
    /// `[runtime] dir`: directory on tmpfs for the live maps, which survive the worker but not a reboot. Default: a
    /// tmpfs that the daemon mounts below `/run/plyfs`; without the right to mount, `XDG_RUNTIME_DIR` or `/dev/shm`.
    #[serde(default)]
    pub runtime_dir: Option<PathBuf>,
    /// `[runtime] map_memory`: bytes of memory for the live maps of all disks. Default: a quarter of the machine's
    /// memory, at least 64 MiB. Bounds: at least 1 MiB.
    #[serde(default)]
    pub map_memory: Option<u64>,
    /// `[runtime] map_memory_per_disk`: bytes of memory for the live map of one disk. Default: half of `map_memory`.
    /// Bounds: at least 64 KiB.
    #[serde(default)]
    pub map_memory_per_disk: Option<u64>,
    /// `[log]`: see [`LogConfig`].
    pub log: LogConfig,
    /// `[hydrate]`: see [`HydrateConfig`].
    #[serde(default)]
    pub hydrate: HydrateConfig,
    /// `[security]`: see [`SecurityConfig`].
    #[serde(default)]
    pub security: SecurityConfig,
    /// `[trace]`: see [`TraceConfig`].
    #[serde(default)]
    pub trace: TraceConfig,
    /// `[http]`: see [`HttpConfig`].
    #[serde(default)]
    pub http: HttpConfig,
    /// `[metrics]`: see [`MetricsConfig`].
    #[serde(default)]
    pub metrics: MetricsConfig,
    /// `[notify]`: see [`NotifyConfig`].
    #[serde(default)]
    pub notify: NotifyConfig,
    /// `[encryption]`: see [`EncryptionConfig`].
    #[serde(default)]
    pub encryption: EncryptionConfig,
    /// `[page]`: see [`PageConfig`].
    #[serde(default)]
    pub page: PageConfig,
    /// `[export]`: see [`ExportConfig`].
    #[serde(default)]
    pub export: ExportConfig,
    /// `[trash]`: see [`TrashConfig`].
    #[serde(default)]
    pub trash: TrashConfig,
    /// `[bases]`: see [`UnusedBasesConfig`].
    #[serde(default)]
    pub bases: UnusedBasesConfig,
}

/// When whole bases are fetched.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HydrateConfig {
    /// `[hydrate] auto`: whether each new base is hydrated without a request. Default: false.
    pub auto: bool,
    /// `[hydrate] rate`: most bytes per second, unless a request has another rate. Default: no limit. Bounds: at least
    /// 64 KiB.
    pub rate: Option<u64>,
}

impl HydrateConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        match self.rate {
            Some(rate) if !(64 << 10..=size::MAX_SIZE).contains(&rate) => Err(invalid(
                "hydrate.rate",
                format!("{} is out of bounds; give at least 64K", format_size(rate)),
            )),
            _ => Ok(()),
        }
    }
}

/// Logging of the daemon, to standard error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogConfig {
    /// `[log] level`, `--log-level`. Default: `info`. Bounds: one of [`LOG_LEVELS`].
    pub level: String,
    /// `[log] format`, `--log-format`. Default: `auto`.
    pub format: LogFormat,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Auto }
    }
}

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogFormat {
    /// Human on a terminal, JSON otherwise.
    Auto,
    /// One line of text, with colours on a terminal.
    Human,
    /// One JSON object per line.
    Json,
}

impl LogFormat {
    /// The name used in the file, on the command line and in the environment.
    pub fn name(self) -> &'static str {
        LOG_FORMATS[self as usize]
    }

    /// The format of that name; `None` for any other text.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Auto, Self::Human, Self::Json].into_iter().find(|format| format.name() == name)
    }
}

impl LogConfig {
    /// The environment variables that make a child process log as this one does.
    pub fn env(&self) -> [(&'static str, &str); 2] {
        [(LOG_LEVEL_ENV, &self.level), (LOG_FORMAT_ENV, self.format.name())]
    }

    /// The inverse of [`env`](Self::env). A variable that is absent or not valid leaves the default.
    pub fn from_env() -> Self {
        let mut log = Self::default();
        if let Ok(level) = std::env::var(LOG_LEVEL_ENV)
            && LOG_LEVELS.contains(&level.as_str())
        {
            log.level = level;
        }
        if let Some(format) = std::env::var(LOG_FORMAT_ENV).ok().and_then(|name| LogFormat::from_name(&name))
        {
            log.format = format;
        }
        log
    }

    fn validate(&self) -> Result<(), ConfigError> {
        if LOG_LEVELS.contains(&self.level.as_str()) {
            return Ok(());
        }
        Err(invalid(
            "log.level",
            format!("{:?} is no level; give one of {}", self.level, LOG_LEVELS.join(", ")),
        ))
    }
}

/// The settings of the command line. `None` leaves the file's value or the default. Relative paths are relative to the
/// current directory.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `--store` or its environment variable.
    pub store: Option<PathBuf>,
    /// `--mount`.
    pub mount: Option<PathBuf>,
    /// `--cache-memory`, in bytes.
    pub cache_memory: Option<u64>,
    /// `--cache-disk`, in bytes.
    pub cache_disk: Option<u64>,
    /// `--allow-other`.
    pub allow_other: Option<bool>,
    /// `--trash-grace`.
    pub trash_grace: Option<Duration>,
    /// `--base-unused-age`.
    pub base_unused_age: Option<Duration>,
    /// `--base-unused-limit`, in bytes.
    pub base_unused_limit: Option<u64>,
    /// `--export-http`.
    pub export_http: Option<String>,
    /// `--log-level`.
    pub log_level: Option<String>,
    /// `--log-format`.
    pub log_format: Option<LogFormat>,
}

/// Why the configuration cannot be used. Every message is one line.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read configuration file {}: {source}; check --config", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },
    /// The file is not TOML, or has a key or a value that is not allowed.
    #[error("configuration file {}, line {line}: {message}; correct the file", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// The line of the error, from 1.
        line: usize,
        /// The error.
        message: String,
    },
    /// A value of the file or of the command line is out of bounds.
    #[error("configuration: {key}: {message}")]
    Invalid {
        /// Section and key as in the file.
        key: &'static str,
        /// The error and the allowed values.
        message: String,
    },
    /// The user has no home directory for a store.
    #[error(
        "cannot find the default store: neither XDG_DATA_HOME nor HOME is an absolute path; give --store DIR"
    )]
    NoDefaultStore,
    /// The path is relative, and there is no current directory.
    #[error("cannot make {} absolute: {source}; give an absolute path", path.display())]
    Relative {
        /// The path as given.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },
}

fn invalid(key: &'static str, message: String) -> ConfigError {
    ConfigError::Invalid { key, message }
}

impl Config {
    /// The validated configuration: `overrides` before `file` before the defaults.
    ///
    /// # Errors
    /// The first error, as [`ConfigError`].
    pub fn load(file: Option<&Path>, overrides: Overrides) -> Result<Self, ConfigError> {
        let Some(path) = file else {
            return Self::merge(file::File::default(), overrides);
        };
        let text = place::read(path)?;
        let file = toml::from_str(&text).map_err(|error| parse_error(path, &text, &error))?;
        Self::merge(file, overrides)
    }

    fn merge(file: file::File, flags: Overrides) -> Result<Self, ConfigError> {
        let store = match choose("store.path", file.store.path, flags.store)? {
            Some(store) => store,
            None => host::default_store()?,
        };
        let mount =
            choose("mount.path", file.mount.path, flags.mount)?.unwrap_or_else(|| store.join(layout::MOUNT));
        let runtime_dir = choose("runtime.dir", file.runtime.dir, None)?;
        let default_log = LogConfig::default();
        let config = Self {
            store,
            reserve: file.store.reserve.map(|size| size.0),
            mount,
            allow_other: flags.allow_other.or(file.mount.allow_other).unwrap_or_else(host::is_root),
            base_mode: file.mount.base_mode.map_or(0o400, |mode| mode.0),
            cache_memory: flags
                .cache_memory
                .or(file.cache.memory.map(|size| size.0))
                .unwrap_or_else(|| default_cache_memory(host::total_memory())),
            cache_disk: flags.cache_disk.or(file.cache.disk.map(|size| size.0)),
            cache_disk_bases: file.cache.disk_bases,
            cache_disk_free: file.cache.disk_free.map(|size| size.0),
            fuse_threads: file.fuse.threads.unwrap_or(4),
            io_threads: file.io.threads.unwrap_or(32),
            runtime_dir,
            map_memory: file.runtime.map_memory.map(|size| size.0),
            map_memory_per_disk: file.runtime.map_memory_per_disk.map(|size| size.0),
            log: LogConfig {
                level: flags.log_level.or(file.log.level).unwrap_or(default_log.level),
                format: flags.log_format.or(file.log.format).unwrap_or(default_log.format),
            },
            hydrate: HydrateConfig {
                auto: file.hydrate.auto.unwrap_or(false),
                rate: file.hydrate.rate.map(|s| s.0),
            },
            security: file.security,
            trace: file.trace,
            http: file.http,
            metrics: file.metrics,
            notify: file.notify,
            encryption: file.encryption,
            page: file.page,
            export: ExportConfig { http: flags.export_http.or(file.export.http), ..file.export },
            trash: TrashConfig { grace: flags.trash_grace.unwrap_or(file.trash.grace) },
            bases: UnusedBasesConfig {
                unused_age: flags.base_unused_age.or(file.bases.unused_age),
                unused_limit: flags.base_unused_limit.or(file.bases.unused_limit),
            },
        };
        config.validate()?;
        Ok(config)
    }

    /// Checks that every value is within the bounds in its documentation.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with the key of the first value that is out of bounds.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.validate_paths()?;
        self.validate_reserve()?;
        self.validate_cache()?;
        self.validate_map_memory()?;
        self.validate_threads()?;
        self.hydrate.validate()?;
        self.security.validate()?;
        self.trace.validate()?;
        self.http.validate()?;
        self.metrics.validate()?;
        self.notify.validate(self.security.network)?;
        self.encryption.validate()?;
        self.page.validate()?;
        self.export.validate()?;
        self.trash.validate()?;
        self.bases.validate()?;
        self.log.validate()
    }

    fn validate_map_memory(&self) -> Result<(), ConfigError> {
        for (key, value, least) in [
            ("runtime.map_memory", self.map_memory, MIB),
            ("runtime.map_memory_per_disk", self.map_memory_per_disk, 64 << 10),
        ] {
            if let Some(value) = value.filter(|value| !(least..=size::MAX_SIZE).contains(value)) {
                let (value, least) = (format_size(value), format_size(least));
                return Err(invalid(key, format!("{value} is out of bounds; give at least {least}")));
            }
        }
        Ok(())
    }

    fn validate_paths(&self) -> Result<(), ConfigError> {
        let runtime = self.runtime_dir.iter().map(|dir| ("runtime.dir", dir));
        for (key, path) in
            [("store.path", &self.store), ("mount.path", &self.mount)].into_iter().chain(runtime)
        {
            if path.to_str().is_none_or(|text| text.contains('\0')) {
                return Err(invalid(key, format!("{path:?} is not UTF-8; choose another directory")));
            }
            if !path.is_absolute() {
                return Err(invalid(key, format!("{path:?} is relative; give an absolute path")));
            }
        }
        if self.store.starts_with(&self.mount) {
            let (mount, store) = (&self.mount, &self.store);
            return Err(invalid(
                "mount.path",
                format!("{mount:?} would hide the store {store:?}; mount elsewhere"),
            ));
        }
        if self.base_mode & !0o555 != 0 {
            let mode = self.base_mode;
            return Err(invalid(
                "mount.base_mode",
                format!(
                    "{mode:04o} has bits that a base cannot have; give read and execute bits (0555) only"
                ),
            ));
        }
        Ok(())
    }

    fn validate_reserve(&self) -> Result<(), ConfigError> {
        match self.reserve {
            Some(bytes) if bytes != 0 && !(MIB..=64 * GIB).contains(&bytes) => Err(invalid(
                "store.reserve",
                format!("{} is out of bounds; give 0 (none), or 1M to 64G", format_size(bytes)),
            )),
            _ => Ok(()),
        }
    }

    fn validate_cache(&self) -> Result<(), ConfigError> {
        if self.cache_disk_bases == Some(0) {
            return Err(invalid("cache.disk_bases", "0 is out of bounds; give at least 1".into()));
        }
        let disk = self.cache_disk.filter(|bytes| *bytes != 0);
        for (key, bytes) in [("cache.memory", Some(self.cache_memory)), ("cache.disk", disk)] {
            if let Some(bytes) = bytes
                && !(MIB..=size::MAX_SIZE).contains(&bytes)
            {
                return Err(invalid(
                    key,
                    format!("{} is out of bounds; give at least 1M and less than 8E", format_size(bytes)),
                ));
            }
        }
        Ok(())
    }

    fn validate_threads(&self) -> Result<(), ConfigError> {
        for (key, threads, limit) in
            [("fuse.threads", self.fuse_threads, 64), ("io.threads", self.io_threads, 1024)]
        {
            if !(1..=limit).contains(&threads) {
                return Err(invalid(key, format!("{threads} is out of bounds; give 1 to {limit}")));
            }
        }
        Ok(())
    }
}

/// The path of the flag, otherwise that of the file. A flag is relative to the current directory. A path in the file
/// must be absolute, because a file has no current directory.
fn choose(
    key: &'static str,
    file: Option<PathBuf>,
    flag: Option<PathBuf>,
) -> Result<Option<PathBuf>, ConfigError> {
    match (flag, file) {
        (Some(path), _) => match std::path::absolute(&path) {
            Ok(absolute) => Ok(Some(absolute)),
            Err(source) => Err(ConfigError::Relative { path, source }),
        },
        (None, Some(path)) if !path.is_absolute() => {
            Err(invalid(key, format!("{path:?} is relative; give an absolute path")))
        }
        (None, file) => Ok(file),
    }
}

fn default_cache_memory(total: Option<u64>) -> u64 {
    total.map_or(64 * MIB, |total| (total / 8).clamp(64 * MIB, 16 * GIB))
}

fn parse_error(path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    ConfigError::Parse {
        path: path.to_path_buf(),
        line: line_of(text, error.span()),
        message: error.message().lines().collect::<Vec<_>>().join(" "),
    }
}

fn line_of(text: &str, span: Option<std::ops::Range<usize>>) -> usize {
    let end = span.map_or(0, |span| span.start).min(text.len());
    text.as_bytes()[..end].iter().filter(|&&byte| byte == b'\n').count() + 1
}
