//! How a command retries when its connection breaks before the answer arrives.
//!
//! The supervisor keeps the control socket while a worker dies and the next one takes over, so a command can still
//! connect. A broken connection means that the worker is gone; the request may or may not have been carried out.
//! Clients of the mount see a pause and no error, and so do users of the command line:
//! - a query is sent again, and so is a request that may run twice (a resize to the same size);
//! - a creation is sent again with the same key, by which the daemon recognises what the first attempt created;
//! - before a removal is sent again, the command checks what the first attempt did. It identifies the object by its
//!   number.

use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};

use super::client::Client;
use super::error::CliError;
use crate::control::wire::{ErrorKind, Removed};

/// No attempt begins later than this after the first broken connection. It exceeds the supervisor's longest wait
/// between workers.
const RETRY_LIMIT: Duration = Duration::from_secs(60);
const SHORTEST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// Paces the attempts.
struct Attempts {
    /// When the first attempt failed, and how.
    first_failure: Option<(Instant, CliError)>,
    pause: Duration,
}

impl Attempts {
    fn new() -> Self {
        Self { first_failure: None, pause: SHORTEST_PAUSE }
    }

    /// Waits before the next attempt. Returns the error when it is not transient, or when [`RETRY_LIMIT`] is over.
    fn next(&mut self, error: CliError) -> Result<(), CliError> {
        // With "unavailable" the supervisor says that no worker serves at the moment: nothing was done.
        let is_transient = matches!(error, CliError::Transport { .. }) || error.is(ErrorKind::Unavailable);
        match self.first_failure.take() {
            None if is_transient => self.first_failure = Some((Instant::now(), error)),
            Some(first) if is_transient && first.0.elapsed() <= RETRY_LIMIT => {
                self.first_failure = Some(first);
            }
            // The daemon has ended, not only its worker. The lost answer says more than the failure to connect.
            Some((_, first)) if matches!(error, CliError::NoDaemon { .. }) => return Err(first),
            _ => return Err(error),
        }
        thread::sleep(self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        Ok(())
    }
}

/// Runs an operation that may be repeated until it has an answer.
pub(super) fn repeat<T>(once: impl Fn() -> Result<T, CliError>) -> Result<T, CliError> {
    let mut attempts = Attempts::new();
    loop {
        match once() {
            Err(error) => attempts.next(error)?,
            done => return done,
        }
    }
}

/// As [`repeat`], but accepts "no worker serves" as an answer.
pub(super) fn until_answered(once: impl Fn() -> Result<Value, CliError>) -> Result<Value, CliError> {
    let mut attempts = Attempts::new();
    loop {
        match once() {
            Err(error) if error.is(ErrorKind::Unavailable) => return Err(error),
            Err(error) => attempts.next(error)?,
            done => return done,
        }
    }
}

/// Follows a stream that lasts as long as the daemon. `once` follows it until the worker ends, and says whether it
/// received anything. Workers come and go; the stream ends when `once` returns `Ok`, or when no daemon runs any more.
pub(super) fn follow(mut once: impl FnMut() -> (Delivery, Result<(), CliError>)) -> Result<(), CliError> {
    let mut attempts = Attempts::new();
    loop {
        match once() {
            (_, Ok(())) => return Ok(()),
            // A daemon runs, and starts a worker.
            (_, Err(error)) if error.is(ErrorKind::Unavailable) => {
                attempts = Attempts::new();
                thread::sleep(LONGEST_PAUSE);
            }
            (delivery, Err(error)) => {
                if delivery == Delivery::Some {
                    attempts = Attempts::new();
                }
                attempts.next(error)?;
            }
        }
    }
}

/// Whether one attempt to follow a stream received anything.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Delivery {
    None,
    Some,
}

/// Creates an object. The daemon creates it once, however often the request is sent.
pub(super) fn create(
    client: &Client,
    path: &str,
    body: &impl Serialize,
    action: &str,
) -> Result<Value, CliError> {
    let key = Key::random()?;
    repeat(|| client.post_once(path, &key, body, action))
}

/// The idempotency key of a creation: the daemon recognises a repeated request by it.
pub(super) struct Key(String);

impl Key {
    fn random() -> Result<Self, CliError> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)
            .map_err(|error| CliError::Runtime(std::io::Error::other(error.to_string())))?;
        Ok(Self(hex::encode(bytes)))
    }

    /// The value of the header.
    pub(super) fn text(&self) -> &str {
        &self.0
    }
}

/// What a removal may destroy besides the object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Removal {
    /// Data that a client uses.
    pub force: bool,
    /// The snapshots of a disk.
    pub snapshots: bool,
    /// What the trash would keep.
    pub now: bool,
}

impl Removal {
    fn query(self) -> String {
        let given = [("force", self.force), ("snapshots", self.snapshots), ("now", self.now)];
        let given: Vec<_> = given.iter().filter(|(_, is_given)| *is_given).collect();
        let mut query = String::new();
        for (at, (name, _)) in given.into_iter().enumerate() {
            query += &format!("{}{name}=true", if at == 0 { '?' } else { '&' });
        }
        query
    }
}

/// Removes one disk or base: the one that has the name now, even if a new object takes the name meanwhile.
pub(super) fn remove(client: &Client, noun: &str, name: &str, options: Removal) -> Result<Value, CliError> {
    let Some(object) = show(client, noun, name)? else {
        // The daemon refuses this, and its message is the one to show.
        return repeat(|| delete(client, noun, name, options));
    };
    let mut attempts = Attempts::new();
    loop {
        match delete(client, noun, name, options) {
            Err(error) if attempts.first_failure.is_some() && error.is(ErrorKind::NotFound) => break,
            Err(error) => attempts.next(error)?,
            Ok(_) => break,
        }
        if show(client, noun, name)?.is_none_or(|now| now["id"] != object["id"]) {
            break;
        }
    }
    make_kernel_forget(&object);
    Ok(json!(Removed { removed: vec![name.to_owned()] }))
}

/// The kernel forgets a removed name at the next lookup of it. The daemon frees the space once the kernel has forgotten
/// the name.
fn make_kernel_forget(object: &Value) {
    if let Some(path) = object["path"].as_str() {
        let _ = std::fs::symlink_metadata(path);
    }
}

fn delete(client: &Client, noun: &str, name: &str, options: Removal) -> Result<Value, CliError> {
    let query = options.query();
    client.delete(&format!("/v1/{noun}s/{name}{query}"), &format!("cannot remove {noun} {name}"))
}

fn show(client: &Client, noun: &str, name: &str) -> Result<Option<Value>, CliError> {
    match client.get(&format!("/v1/{noun}s/{name}"), &format!("cannot show {noun} {name}")) {
        Err(error) if error.is(ErrorKind::NotFound) => Ok(None),
        other => other.map(Some),
    }
}
