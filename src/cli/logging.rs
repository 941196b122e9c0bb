//! Logging of the daemon and its worker, to standard error. Client commands do not log.

use std::io::{IsTerminal, stderr};

use tracing_log::LogTracer;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt};

use super::error::CliError;
use crate::config::{LogConfig, LogFormat};

/// Sets up logging for the rest of the process.
///
/// Messages of libraries that use the `log` crate are forwarded from level warn on. The FUSE crate logs every request
/// at debug, and a guest can trigger that.
pub(super) fn init(config: &LogConfig) -> Result<(), CliError> {
    let failed = |error: &dyn std::error::Error| CliError::Logging(super::output::chain(error));
    let filter = EnvFilter::try_new(&config.level).map_err(|error| failed(&error))?;
    let terminal = stderr().is_terminal();
    let json = match config.format {
        LogFormat::Auto => !terminal,
        LogFormat::Human => false,
        LogFormat::Json => true,
    };
    let layer: Box<dyn Layer<Registry> + Send + Sync> = if json {
        fmt::layer().json().flatten_event(true).with_writer(stderr).boxed()
    } else {
        fmt::layer().with_ansi(terminal).with_writer(stderr).boxed()
    };
    tracing::subscriber::set_global_default(Registry::default().with(layer.with_filter(filter)))
        .map_err(|error| failed(&error))?;
    LogTracer::builder()
        .with_max_level(tracing_log::log::LevelFilter::Warn)
        .init()
        .map_err(|error| failed(&error))
}
