//! What a command does when the connection broke before its answer was there.
//!
//! The supervisor keeps the control socket while a worker dies and the next one takes over, so connecting goes on to
//! work, and a broken connection means a worker that is gone: what it was told is done or is not. Clients of the mount
//! see a pause then and no error; so do users of the command line:
//! - what only asks is asked again, and so is what may be done twice (a resize to the same size);
//! - a creation is sent again with the same key, by which the daemon knows what the first try made;
//! - before a removal is sent again, the command looks whether the first try did it. The object is told by its number.

use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};

use super::client::Client;
use super::error::CliError;
use crate::control::wire::{ErrorKind, Removed};

/// How long after the first loss the last try begins. Longer than the supervisor's longest wait between workers.
const PATIENCE: Duration = Duration::from_secs(60);
const SHORTEST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// Paces the tries.
struct Tries {
    /// The first loss.
    lost: Option<(Instant, CliError)>,
    pause: Duration,
}

impl Tries {
    fn new() -> Self {
        Self { lost: None, pause: SHORTEST_PAUSE }
    }

    /// Waits before the next try; gives the error back when it is not a loss, or when it is time to give up.
    fn next(&mut self, error: CliError) -> Result<(), CliError> {
        // With "unavailable" the supervisor says that there is no worker at the moment: nothing was done.
        let passes = matches!(error, CliError::Transport { .. }) || error.is(ErrorKind::Unavailable);
        match self.lost.take() {
            None if passes => self.lost = Some((Instant::now(), error)),
            Some(first) if passes && first.0.elapsed() <= PATIENCE => self.lost = Some(first),
            // The daemon has ended, and not only its worker. That the answer was lost says more than that.
            Some((_, lost)) if matches!(error, CliError::NoDaemon { .. }) => return Err(lost),
            _ => return Err(error),
        }
        thread::sleep(self.pause);
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        Ok(())
    }
}

/// Does what may be done more than once until there is an answer.
pub(super) fn repeat<T>(once: impl Fn() -> Result<T, CliError>) -> Result<T, CliError> {
    let mut tries = Tries::new();
    loop {
        match once() {
            Err(error) => tries.next(error)?,
            done => return done,
        }
    }
}

/// As [`repeat`], but that no worker serves is an answer.
pub(super) fn until_answered(once: impl Fn() -> Result<Value, CliError>) -> Result<Value, CliError> {
    let mut tries = Tries::new();
    loop {
        match once() {
            Err(error) if error.is(ErrorKind::Unavailable) => return Err(error),
            Err(error) => tries.next(error)?,
            done => return done,
        }
    }
}

/// Follows something that goes on for as long as the daemon does: `once` does so until the worker ends, and says whether
/// it was connected. Workers come and go; it is the end when `once` says so (`Ok`), or when there is no daemon any more.
pub(super) fn follow(mut once: impl FnMut() -> (Heard, Result<(), CliError>)) -> Result<(), CliError> {
    let mut tries = Tries::new();
    loop {
        match once() {
            (_, Ok(())) => return Ok(()),
            // There is a daemon, and it looks for a worker.
            (_, Err(error)) if error.is(ErrorKind::Unavailable) => {
                tries = Tries::new();
                thread::sleep(LONGEST_PAUSE);
            }
            (heard, Err(error)) => {
                if heard == Heard::Something {
                    tries = Tries::new();
                }
                tries.next(error)?;
            }
        }
    }
}

/// What came of one try to follow.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Heard {
    Nothing,
    Something,
}

/// Creates something: however often it is sent, it is done once.
pub(super) fn create(
    client: &Client,
    path: &str,
    body: &impl Serialize,
    action: &str,
) -> Result<Value, CliError> {
    let key = Key::random()?;
    repeat(|| client.post_once(path, &key, body, action))
}

/// Tells the daemon that a creation is the one that it was asked for before.
pub(super) struct Key(String);

impl Key {
    fn random() -> Result<Self, CliError> {
        let mut bytes = [0; 16];
        getrandom::fill(&mut bytes)
            .map_err(|error| CliError::Runtime(std::io::Error::other(error.to_string())))?;
        Ok(Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// As it is sent.
    pub(super) fn text(&self) -> &str {
        &self.0
    }
}

/// Removes one disk or base: the one that has the name now, whoever takes it meanwhile.
pub(super) fn remove(client: &Client, noun: &str, name: &str) -> Result<Value, CliError> {
    let Some(object) = show(client, noun, name)? else {
        // To be refused in the daemon's words.
        return repeat(|| delete(client, noun, name));
    };
    let mut tries = Tries::new();
    loop {
        match delete(client, noun, name) {
            Err(error) if tries.lost.is_some() && error.is(ErrorKind::NotFound) => break,
            Err(error) => tries.next(error)?,
            Ok(_) => break,
        }
        if show(client, noun, name)?.is_none_or(|now| now["id"] != object["id"]) {
            break;
        }
    }
    done(&object);
    Ok(json!(Removed { removed: vec![name.to_owned()] }))
}

/// The kernel forgets a name that is gone when somebody looks it up, and the daemon gives the space back when the kernel
/// has forgotten.
fn done(object: &Value) {
    if let Some(path) = object["path"].as_str() {
        let _ = std::fs::symlink_metadata(path);
    }
}

fn delete(client: &Client, noun: &str, name: &str) -> Result<Value, CliError> {
    client.delete(&format!("/v1/{noun}s/{name}"), &format!("cannot remove {noun} {name}"))
}

fn show(client: &Client, noun: &str, name: &str) -> Result<Option<Value>, CliError> {
    match client.get(&format!("/v1/{noun}s/{name}"), &format!("cannot show {noun} {name}")) {
        Err(error) if error.is(ErrorKind::NotFound) => Ok(None),
        other => other.map(Some),
    }
}
