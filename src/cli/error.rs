//! What can go wrong in a command. Each message is the one line of the contract: what failed, on which object, why,
//! and what to do.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::config::ConfigError;
use crate::control::wire::ErrorKind;

#[derive(Debug, Error)]
pub(super) enum CliError {
    /// Nobody listens on the control socket.
    #[error(
        "no daemon is running on store {} (cannot connect to {}: {source}); start it with: plyfs serve --store {}",
        store.display(), socket.display(), store.display()
    )]
    NoDaemon { store: PathBuf, socket: PathBuf, source: io::Error },
    /// The control socket is there, but not for this user.
    #[error(
        "cannot connect to {}: {source}; only root and the daemon's own user may connect: run as one of them, or name \
         your own store with --store DIR",
        socket.display()
    )]
    Denied { socket: PathBuf, source: io::Error },
    /// Any other failure to connect.
    #[error("cannot connect to the daemon at {}: {source}; check --store", socket.display())]
    Connect { socket: PathBuf, source: io::Error },
    /// The connection broke before the whole answer was there.
    #[error("{action}: the daemon at {} did not answer: {message}; look at the daemon's log", socket.display())]
    Transport { action: String, socket: PathBuf, message: String },
    /// There was no answer for long, and no end either.
    #[error(
        "{action}: the daemon at {} has not answered for {waited}: its worker hangs, or the host is overloaded; see the \
         daemon's log, replace the worker with `plyfs upgrade` or end the daemon with `plyfs stop`",
        socket.display()
    )]
    Late { action: String, socket: PathBuf, waited: String },
    /// The daemon refused. Its message is already in the form of the contract. A kind that is not known here, of a newer
    /// daemon, is none.
    #[error("{message}")]
    Refused { kind: Option<ErrorKind>, message: String },
    /// An answer that is not of this API.
    #[error("{action}: {problem}; check that the daemon and this command have the same version")]
    Answer { action: String, problem: String },
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A file of the user's that something is carried to or from.
    #[error("{action}: {}: {source}; check the path", path.display())]
    Carry { action: String, path: PathBuf, source: io::Error },
    /// The current directory is gone, or the path is empty.
    #[error("cannot make {path:?} absolute: {source}; give an absolute path")]
    Absolute { path: PathBuf, source: io::Error },
    /// JSON cannot carry it.
    #[error("cannot use the path {path:?}: it is not UTF-8; give the file another name")]
    NotUtf8 { path: PathBuf },
    /// A file that the command line names.
    #[error("cannot read {}: {source}; check the path", path.display())]
    File { path: PathBuf, source: io::Error },
    /// Standard output is gone. A closed pipe is no error, see `output`.
    #[error("cannot write to standard output: {0}; check where it goes")]
    Stdout(io::Error),
    #[error("cannot write man pages to {}: {source}; give a directory that can be written", dir.display())]
    Man { dir: PathBuf, source: io::Error },
    #[error("cannot start: {0}; try again")]
    Runtime(io::Error),
    #[error("cannot write logs: {0}")]
    Logging(String),
    /// The daemon ended with an error; its text is complete.
    #[error("{0}")]
    Serve(String),
    /// What was followed is over.
    #[error("the daemon on store {} has ended; nothing follows", store.display())]
    Ended { store: PathBuf },
    /// It was told to stop, and ended with an error: the text is complete.
    #[error("the daemon on store {} has ended, but not cleanly: {why}", store.display())]
    EndedBadly { store: PathBuf, why: String },
    #[error("cannot check store {}: {message}", store.display())]
    Check { store: PathBuf, message: String },
    #[error("store {} has {unrepaired} finding(s) that are not repaired; {advice}", store.display())]
    Findings { store: PathBuf, unrepaired: usize, advice: &'static str },
    #[error(
        "the daemon on store {} is told to stop, but after {waited} {state}; close what uses the mount and wait",
        store.display()
    )]
    StillRunning { store: PathBuf, waited: String, state: String },
}

/// The configuration is wrong: EX_CONFIG of sysexits.h. A service manager does not start the daemon again then.
const WRONG_CONFIG: u8 = 78;

impl CliError {
    /// The exit status of the command.
    ///
    /// When the service manager keeps a mount for the daemon (sd_listen_fds(3)), clients wait on it, and the manager has
    /// to start the daemon again however long the operator takes to correct the configuration: without the start it
    /// would drop the mount.
    pub(super) fn status(&self) -> u8 {
        match self {
            Self::Config(ConfigError::NoDefaultStore | ConfigError::Relative { .. }) => 1,
            Self::Config(_) if std::env::var_os("LISTEN_FDS").is_none() => WRONG_CONFIG,
            _ => 1,
        }
    }

    /// Whether the daemon refused for this kind of reason.
    pub(super) fn is(&self, reason: ErrorKind) -> bool {
        match self {
            Self::Refused { kind, .. } => *kind == Some(reason),
            _ => false,
        }
    }
}
