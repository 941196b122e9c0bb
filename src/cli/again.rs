//! What a command does when the connection broke before its answer was there.
//!
//! The supervisor keeps the control socket while a worker dies and the next one takes over, so connecting goes on to
//! work, and a broken connection means a worker that is gone: what it was told is done or is not. Clients of the mount
//! see a pause then and no error; so do users of the command line:
//! - what only asks is asked again, and so is what may be done twice (a resize to the same size);
//! - before a creation or a removal is sent again, it is looked at what the first try did. What was asked for and came
//!   into being since then is taken for what that try made, as open(2) without O_EXCL would; what is removed is told
//!   by its number.

use std::thread;
use std::time::{Duration, Instant, SystemTime};

use serde_json::{Value, json};

use super::client::Client;
use super::error::CliError;

/// How long after the first loss the last try begins. Longer than the supervisor's longest wait between workers.
const PATIENCE: Duration = Duration::from_secs(60);
const SHORTEST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);
/// How far behind ours the daemon's clock may be: it reads the kernel's coarse one.
const CLOCK_SLACK: Duration = Duration::from_millis(20);

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
        let passes = matches!(error, CliError::Transport { .. }) || error.is("unavailable");
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
            Err(error) if error.is("unavailable") => return Err(error),
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
            (_, Err(error)) if error.is("unavailable") => {
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

/// Creates disks; an array of them in the order of `names`.
pub(super) fn create_disks(
    client: &Client,
    names: &[String],
    base: Option<&str>,
    size: Option<u64>,
    action: &str,
) -> Result<Value, CliError> {
    let since = Since::now();
    let mut tries = Tries::new();
    let mut made: Vec<Option<Value>> = vec![None; names.len()];
    loop {
        let missing: Vec<usize> = (0..names.len()).filter(|at| made[*at].is_none()).collect();
        let wanted: Vec<&String> = missing.iter().map(|at| &names[*at]).collect();
        let body = json!({ "names": wanted, "base": base, "size": size });
        match client.post("/v1/disks", Some(&body), action) {
            Ok(Value::Array(disks)) if missing.len() == names.len() => return Ok(Value::Array(disks)),
            Ok(disks) => {
                let disks = disks.as_array().cloned().unwrap_or_default();
                for (at, disk) in missing.into_iter().zip(disks) {
                    made[at] = Some(disk);
                }
                return Ok(made.into_iter().flatten().collect());
            }
            Err(error) if tries.lost.is_some() && error.is("exists") => {
                look(client, names, base, size, &since, &mut made)?;
                // None of them is what a try of ours made.
                if missing.iter().all(|at| made[*at].is_none()) {
                    return Err(error);
                }
            }
            Err(error) => {
                tries.next(error)?;
                look(client, names, base, size, &since, &mut made)?;
            }
        }
        if made.iter().all(Option::is_some) {
            return Ok(made.into_iter().flatten().collect());
        }
    }
}

/// Finds out which disks an earlier try made.
fn look(
    client: &Client,
    names: &[String],
    base: Option<&str>,
    size: Option<u64>,
    since: &Since,
    made: &mut [Option<Value>],
) -> Result<(), CliError> {
    for (name, made) in names.iter().zip(made) {
        if made.is_none()
            && let Some(disk) = show(client, "disk", name)?
            && since.made(&disk)
            && disk["base"].as_str() == base
            && size.is_none_or(|size| disk["size"].as_u64() == Some(size))
        {
            *made = Some(disk);
        }
    }
    Ok(())
}

/// Registers a base.
pub(super) fn add_base(client: &Client, name: &str, body: &Value, action: &str) -> Result<Value, CliError> {
    let since = Since::now();
    let mut tries = Tries::new();
    loop {
        match client.post("/v1/bases", Some(body), action) {
            Err(error) => tries.next(error)?,
            done => return done,
        }
        if let Some(base) = show(client, "base", name)?
            && since.made(&base)
            && base["source"] == shown(&body["source"])
            && (body["format"].is_null() || base["format"] == body["format"])
        {
            return Ok(base);
        }
    }
}

/// As the daemon shows it.
fn shown(source: &Value) -> Value {
    match source.as_str() {
        Some(url) if super::args::is_url(url) => crate::source::http::shown(url).into(),
        _ => source.clone(),
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
            Err(error) if tries.lost.is_some() && error.is("not_found") => break,
            Err(error) => tries.next(error)?,
            Ok(_) => break,
        }
        if show(client, noun, name)?.is_none_or(|now| now["id"] != object["id"]) {
            break;
        }
    }
    done(&object);
    Ok(json!({ "removed": [name] }))
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
        Err(error) if error.is("not_found") => Ok(None),
        other => other.map(Some),
    }
}

/// When the command began.
struct Since(SystemTime);

impl Since {
    fn now() -> Self {
        let now = SystemTime::now();
        Self(now.checked_sub(CLOCK_SLACK).unwrap_or(now))
    }

    /// Whether the object came into being since.
    fn made(&self, object: &Value) -> bool {
        let created = object["created"].as_str().and_then(|text| humantime::parse_rfc3339(text).ok());
        created.is_some_and(|created| created >= self.0)
    }
}
