//! The errors of commands. Each message is one line: the operation and its object, the cause, the remedy.

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Value, json};
use thiserror::Error;

use super::{holders, interrupt};
use crate::config::{ConfigError, host};
use crate::control::wire::ErrorKind;

#[derive(Debug, Error)]
pub(super) enum CliError {
    /// No process listens on the control socket. The advice never is to start a daemon: the operator may have one on
    /// another store.
    #[error(
        "no daemon is running on store {} (cannot connect to {}: {source}); {}",
        store.display(), socket.display(), other_store(store)
    )]
    NoDaemon { store: PathBuf, socket: PathBuf, source: io::Error },
    /// As `NoDaemon`, for a command that ends the daemon.
    #[error(
        "no daemon is running on store {} (cannot connect to {}: {source}), so there is nothing to stop; {}",
        store.display(), socket.display(), other_store(store)
    )]
    NothingToStop { store: PathBuf, socket: PathBuf, source: io::Error },
    /// The control socket exists, but this user may not connect.
    #[error(
        "cannot connect to {}: {source}; only root and the daemon's own user may connect: run the command as root, \
         such as with sudo, or name your own store with --store DIR",
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
    /// The arguments are wrong in a way that the parser does not know. The text is a complete message.
    #[error("{0}")]
    Usage(String),
    /// Work of this command failed. The text is a complete message.
    #[error("{0}")]
    Failed(String),
    /// A signal ended the wait for work. The text is a complete message.
    #[error("{message}")]
    Interrupted { message: String, signal: i32 },
    #[error("cannot set up logging: {0}; check the log level and format")]
    Logging(String),
    /// The daemon ended with an error. The text is a complete message.
    #[error("{0}")]
    Serve(String),
    /// The daemon whose events the command followed has ended.
    #[error("the daemon on store {} has ended; see its log", store.display())]
    Ended { store: PathBuf },
    /// The daemon was told to stop and ended with an error. The text is a complete message.
    #[error("the daemon on store {} has ended, but not cleanly: {why}", store.display())]
    EndedUncleanly { store: PathBuf, why: String },
    #[error("cannot check store {}: {message}", store.display())]
    Check { store: PathBuf, message: String },
    #[error("store {} has {unrepaired} finding(s) that are not repaired; {advice}", store.display())]
    Findings { store: PathBuf, unrepaired: usize, advice: &'static str },
    /// Processes have a file open that the command would destroy or take away.
    #[error("{object}: open in {holders}; {remedy}")]
    Open { object: String, holders: String, remedy: &'static str },
    #[error(
        "the daemon on store {} was told to stop, but after {waited} {state}; close the programs that use the mount, \
         and wait",
        store.display()
    )]
    StillRunning { store: PathBuf, waited: String, state: String },
}

/// The arguments are wrong; the parser's own errors have the same status.
const USAGE: u8 = 2;
/// The configuration is wrong: EX_CONFIG of sysexits.h. A service manager does not start the daemon again then.
const WRONG_CONFIG: u8 = 78;

/// Why a command may have looked for the daemon in the wrong place.
fn other_store(store: &Path) -> String {
    const NAME_IT: &str = "with --store DIR or PLYFS_STORE";
    if store.is_file() {
        return format!("{} is a file; give the directory of a store {NAME_IT}", store.display());
    }
    let mut mounts = holders::mounts();
    mounts.retain(|mount| !mount.point.starts_with(store));
    let user = host::user();
    let by = |owner| mounts.iter().find(|mount| mount.owner == owner);
    let own = if user == Some(0) { mounts.first() } else { by(user) };
    match own.or_else(|| by(Some(0))) {
        // Root's commands find the store that the configuration of the host names.
        Some(mount) if mount.owner == Some(0) && user != Some(0) => {
            format!(
                "plyfs is mounted on {} by root; run the command as root, such as with sudo",
                mount.point.display()
            )
        }
        Some(mount) => {
            format!("plyfs is mounted on {}; name the store of that daemon {NAME_IT}", mount.point.display())
        }
        None => format!("check its service and its log, or name the store of another daemon {NAME_IT}"),
    }
}

/// An error as an object, for `--json`.
#[derive(Debug, Serialize)]
pub(super) struct ErrorObject {
    /// For programs: a kind of the API, or one of this command.
    pub kind: Value,
    pub object: Option<String>,
    pub cause: String,
    pub remedy: Option<String>,
    /// The line that people get.
    pub message: String,
}

impl ErrorObject {
    /// Takes a message apart. A message is `object: cause; remedy`, or `cannot VERB object: cause; remedy`.
    pub(super) fn new(kind: impl Into<Value>, message: &str) -> Self {
        let (object, rest) = match message.split_once(": ") {
            Some((object, rest)) => (Some(object_of(object)), rest),
            None => (None, message),
        };
        let (cause, remedy) = match rest.rsplit_once("; ") {
            Some((cause, remedy)) => (cause, Some(remedy.to_owned())),
            None => (rest, None),
        };
        let (kind, message) = (kind.into(), message.to_owned());
        Self { kind, object, cause: cause.to_owned(), remedy, message }
    }

    /// Takes a message about the arguments apart. It is `cause; remedy`, and the remedy may have several parts.
    pub(super) fn of_usage(argument: Option<String>, message: &str) -> Self {
        let (cause, remedy) = match message.split_once("; ") {
            Some((cause, remedy)) => (cause.to_owned(), Some(remedy.to_owned())),
            None => (message.to_owned(), None),
        };
        Self { kind: "usage".into(), object: argument, cause, remedy, message: message.to_owned() }
    }

    fn about(mut self, object: String, cause: String) -> Self {
        (self.object, self.cause) = (Some(object), cause);
        self
    }
}

/// "cannot create disk vm1" is about "disk vm1".
fn object_of(text: &str) -> String {
    let Some(action) = text.strip_prefix("cannot ") else { return text.to_owned() };
    let noun = ["disk ", "base ", "store "].iter().filter_map(|noun| action.find(noun)).min();
    let verb = || action.find(' ').map_or(0, |end| end + 1);
    action[noun.unwrap_or_else(verb)..].to_owned()
}

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
            Self::Usage(_) => USAGE,
            Self::Interrupted { signal, .. } => interrupt::status(*signal),
            _ => 1,
        }
    }

    /// The error as an object.
    pub(super) fn object(&self) -> ErrorObject {
        let message = self.to_string();
        let object = ErrorObject::new(self.kind(), &message);
        let of = |store: &Path| format!("store {}", store.display());
        let unreached = |socket: &Path, source: &io::Error| {
            format!("no daemon is running (cannot connect to {}: {source})", socket.display())
        };
        match self {
            Self::NoDaemon { store, socket, source } | Self::NothingToStop { store, socket, source } => {
                object.about(of(store), unreached(socket, source))
            }
            Self::Ended { store } => object.about(of(store), "the daemon has ended".to_owned()),
            Self::StillRunning { store, state, .. } => object.about(of(store), state.clone()),
            Self::EndedUncleanly { store, why } => object.about(of(store), why.clone()),
            Self::Findings { store, unrepaired, .. } => {
                object.about(of(store), format!("{unrepaired} finding(s) that are not repaired"))
            }
            _ => object,
        }
    }

    fn kind(&self) -> Value {
        let kind = match self {
            Self::Refused { kind: Some(kind), .. } => return json!(kind),
            Self::Refused { kind: None, .. } => "refused",
            Self::NoDaemon { .. } | Self::NothingToStop { .. } | Self::Ended { .. } => "no_daemon",
            Self::Denied { .. } => "denied",
            Self::Connect { .. } | Self::Transport { .. } => "connection",
            Self::TimedOut { .. } | Self::StillRunning { .. } => "timed_out",
            Self::InvalidAnswer { .. } => "invalid_answer",
            Self::Config(_) => "config",
            Self::Usage(_) => "usage",
            Self::Interrupted { .. } => "interrupted",
            Self::Open { .. } => "in_use",
            Self::NotUtf8 { .. } | Self::Absolute { .. } => "invalid",
            Self::Findings { .. } => "damaged",
            _ => "io",
        };
        kind.into()
    }

    /// Whether the daemon refused with this kind.
    pub(super) fn is(&self, reason: ErrorKind) -> bool {
        match self {
            Self::Refused { kind, .. } => *kind == Some(reason),
            _ => false,
        }
    }
}
