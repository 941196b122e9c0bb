//! The errors of commands. Each message is one line: the operation and its object, the cause, the remedy.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::config::ConfigError;
use crate::control::wire::ErrorKind;

#[derive(Debug, Error)]
pub(super) enum CliError {
    /// No process listens on the control socket.
    #[error(
        "no daemon is running on store {} (cannot connect to {}: {source}); start it with: plyfs serve --store {}",
        store.display(), socket.display(), store.display()
    )]
    NoDaemon { store: PathBuf, socket: PathBuf, source: io::Error },
    /// The control socket exists, but this user may not connect.
    #[error(
        "cannot connect to {}: {source}; only root and the daemon's own user may connect: run as one of them, or name \
         your own store with --store DIR",
        socket.display()
    )]
    Denied { socket: PathBuf, source: io::Error },
    /// Any other failure to connect.
    #[error("cannot connect to the daemon at {}: {source}; check --store", socket.display())]
    Connect { socket: PathBuf, source: io::Error },
    /// The connection broke before the answer was complete.
    #[error("{action}: the daemon at {} did not answer: {message}; see the daemon's log", socket.display())]
    Transport { action: String, socket: PathBuf, message: String },
    /// The connection stays open, and no answer arrives in time.
    #[error(
        "{action}: the daemon at {} has not answered for {waited}: its worker hangs, or the host is overloaded; see \
         the daemon's log, replace the worker with `plyfs upgrade` or end the daemon with `plyfs stop`",
        socket.display()
    )]
    TimedOut { action: String, socket: PathBuf, waited: String },
    /// The daemon refused. Its message already has object, cause and remedy. `kind` is `None` for a kind that only a
    /// newer daemon knows.
    #[error("{message}")]
    Refused { kind: Option<ErrorKind>, message: String },
    /// An answer that does not follow the API.
    #[error("{action}: {problem}; check that the daemon and this command have the same version")]
    InvalidAnswer { action: String, problem: String },
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The user's file that the command exports to or imports from.
    #[error("{action}: {}: {source}; check the path", path.display())]
    Transfer { action: String, path: PathBuf, source: io::Error },
    /// The current directory is gone, or the path is empty.
    #[error("cannot make {path:?} absolute: {source}; give an absolute path")]
    Absolute { path: PathBuf, source: io::Error },
    /// JSON cannot represent the path.
    #[error("cannot use the path {path:?}: it is not UTF-8; give the file another name")]
    NotUtf8 { path: PathBuf },
    /// A file that the command line names.
    #[error("cannot read {}: {source}; check the path", path.display())]
    File { path: PathBuf, source: io::Error },
    /// A closed pipe is no error, see `output`.
    #[error("cannot write to standard output: {0}; check its destination")]
    Stdout(io::Error),
    #[error("cannot write man pages to {}: {source}; give a writable directory", dir.display())]
    Man { dir: PathBuf, source: io::Error },
    #[error("cannot start: {0}; try again")]
    Runtime(io::Error),
    #[error("cannot set up logging: {0}; check the log level and format")]
    Logging(String),
    /// The daemon ended with an error. The text is a complete message.
    #[error("{0}")]
    Serve(String),
    /// The daemon whose events the command followed has ended.
    #[error(
        "the daemon on store {} has ended; start it with: plyfs serve --store {}",
        store.display(), store.display()
    )]
    Ended { store: PathBuf },
    /// The daemon was told to stop and ended with an error. The text is a complete message.
    #[error("the daemon on store {} has ended, but not cleanly: {why}", store.display())]
    EndedUncleanly { store: PathBuf, why: String },
    #[error("cannot check store {}: {message}", store.display())]
    Check { store: PathBuf, message: String },
    #[error("store {} has {unrepaired} finding(s) that are not repaired; {advice}", store.display())]
    Findings { store: PathBuf, unrepaired: usize, advice: &'static str },
    #[error(
        "the daemon on store {} was told to stop, but after {waited} {state}; close the programs that use the mount, \
         and wait",
        store.display()
    )]
    StillRunning { store: PathBuf, waited: String, state: String },
}

impl CliError {
    /// Whether the daemon refused with this kind.
    pub(super) fn is(&self, reason: ErrorKind) -> bool {
        match self {
            Self::Refused { kind, .. } => *kind == Some(reason),
            _ => false,
        }
    }
}
