//! `plyfs serve`: the daemon in the foreground. It starts the hidden `plyfs worker`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};

use super::error::CliError;
use super::{Global, args, logging, output};
use crate::config::{
    Config, LOG_FORMAT_ENV, LOG_FORMATS, LOG_LEVEL_ENV, LOG_LEVELS, LogConfig, LogFormat, Overrides, place,
};

const EXAMPLES: &str = "\
Examples:
  plyfs serve                                        the default store, mounted on mnt in it
  plyfs --store /srv/vm serve --mount /mnt/vm        another store, another mount
  plyfs serve --config /etc/plyfs.toml --cache-memory 8G

When the mount is usable, the daemon prints one line, 'plyfs ready mount=DIR socket=PATH', and notifies systemd. \
On SIGTERM, SIGINT and 'plyfs stop' it flushes, unmounts and exits with status 0. Logs go to standard error. \
Flags override the configuration file, which overrides the defaults.";

/// Run the daemon in the foreground: mount the store and serve it until it is told to stop
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Serve {
    #[command(flatten)]
    flags: Flags,
}

// No comment for the user: it would become the description of the command.
#[derive(Debug, clap::Args)]
pub(super) struct Flags {
    /// Mount point; created when missing [default: mnt in the store]
    #[arg(long, value_name = "DIR")]
    mount: Option<PathBuf>,
    /// Memory for cached blocks of bases, at least 1M [default: 1/8 of the machine's, from 64M to 16G]
    #[arg(long, value_name = "SIZE", value_parser = args::size, allow_hyphen_values = true)]
    cache_memory: Option<u64>,
    /// Disk space for fetched blocks of bases, at least 1M, or 0 to keep none [default: 1/10 of the filesystem, at most
    /// 64G]
    #[arg(long, value_name = "SIZE", value_parser = args::size_or_zero, allow_hyphen_values = true)]
    cache_disk: Option<u64>,
    /// How long a removed disk can be restored with `plyfs trash restore`, such as 7d; 0 for no trash [default: 0]
    #[arg(long, value_name = "TIME", value_parser = args::time_or_zero)]
    trash_grace: Option<Duration>,
    /// Remove bases that nothing has needed for this long, such as 30d [default: never]
    #[arg(long, value_name = "TIME", value_parser = args::time)]
    base_unused_age: Option<Duration>,
    /// Disk space that bases which nothing needs may take; above it the least recently used are removed [default: no
    /// limit]
    #[arg(long, value_name = "SIZE", value_parser = args::size_or_zero, allow_hyphen_values = true)]
    base_unused_limit: Option<u64>,
    /// Let users other than the daemon's enter the mount [default: true as root, else false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    allow_other: Option<bool>,
    /// Serve cached blocks of bases that have a proof or a digest to other hosts here, such as 10.0.0.2:7070; they name
    /// it with --mirror plyfs://10.0.0.2:7070 [default: serve no other host]
    #[arg(long, value_name = "ADDRESS:PORT")]
    export_http: Option<String>,
    /// Log level [default: info]
    #[arg(long, value_name = "LEVEL", env = LOG_LEVEL_ENV, value_parser = PossibleValuesParser::new(LOG_LEVELS))]
    log_level: Option<String>,
    /// Log format; auto is human on a terminal and json elsewhere [default: auto]
    #[arg(long, value_name = "FORMAT", env = LOG_FORMAT_ENV, value_parser = log_format())]
    log_format: Option<LogFormat>,
}

fn log_format() -> impl TypedValueParser<Value = LogFormat> {
    PossibleValuesParser::new(LOG_FORMATS)
        .try_map(|name| LogFormat::from_name(&name).ok_or("it is auto, human or json"))
}

impl Flags {
    pub(super) fn overrides(self, global: &Global) -> Overrides {
        Overrides {
            store: global.store.clone(),
            mount: self.mount,
            cache_memory: self.cache_memory,
            cache_disk: self.cache_disk,
            allow_other: self.allow_other,
            trash_grace: self.trash_grace,
            base_unused_age: self.base_unused_age,
            base_unused_limit: self.base_unused_limit,
            export_http: self.export_http,
            log_level: self.log_level,
            log_format: self.log_format,
        }
    }
}

impl Serve {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        let file = place::file(global.config.as_deref(), global.store.as_deref())?;
        let config = Config::load(file.as_deref(), self.flags.overrides(global))?;
        config.check_files()?;
        logging::init(&config.log)?;
        crate::daemon::serve(config).map_err(|error| CliError::Serve(output::chain(&error)))
    }
}

/// Runs a worker. Its configuration comes from the supervisor. Its logging comes from the environment that
/// [`LogConfig::env`] describes, because it may log before it has read its configuration.
pub(super) fn worker() -> ExitCode {
    match logging::init(&LogConfig::from_env()) {
        Ok(()) => crate::daemon::worker_main(),
        Err(error) => output::failure(&error, false),
    }
}

/// Continues as the supervisor after an upgrade replaced its program by exec. The arguments are those of the old
/// program.
pub(super) fn resume() -> ExitCode {
    // The supervisor serves even when logging cannot be set up.
    let done = crate::daemon::resume(|config| drop(logging::init(&config.log)));
    match done.map_err(|error| CliError::Serve(output::chain(&error))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => output::failure(&error, false),
    }
}
