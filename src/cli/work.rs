//! Begins a job on a whole base or on a disk, and waits for it.
//!
//! What must hold:
//! - The job is the daemon's. It goes on when the command ends, and a command that is called again waits for the same
//!   job.
//! - A job that ended with its worker is begun again (a verification); a job that the next worker continues is waited for
//!   (a hydration).
//! - The first SIGINT or SIGTERM ends the wait: of a job that goes on, and that `plyfs job cancel` cancels; of a
//!   verification together with the job, as nothing but this command asked for it.

use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use super::Global;
use super::client::{Client, read};
use super::error::CliError;
use super::interrupt::Interrupts;
use super::progress::{Progress, Update, duration};
use super::retry;
use crate::config::size::format_size as size;
use crate::control::wire::{Base, Disk, ErrorKind, Job, WorkKind, WorkState};

/// The pause between two requests for the progress.
const INTERVAL: Duration = Duration::from_millis(200);
/// How long a request for the progress may take.
const PATIENCE: Duration = Duration::from_secs(4);

/// Whether a command waits for the end of the job.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    UntilEnd,
    No,
}

/// What a job works on.
#[derive(Clone, Copy)]
pub(super) enum Object<'a> {
    /// The base of this name.
    Base(&'a str),
    /// The disk of this name.
    Disk(&'a str),
}

impl Object<'_> {
    fn path(&self) -> String {
        match self {
            Self::Base(name) => format!("/v1/bases/{name}"),
            Self::Disk(name) => format!("/v1/disks/{name}"),
        }
    }
}

impl std::fmt::Display for Object<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Base(name) => write!(f, "base {name}"),
            Self::Disk(name) => write!(f, "disk {name}"),
        }
    }
}

/// What a command begins.
pub(super) struct Work<'a, B> {
    /// What it works on.
    pub object: Object<'a>,
    /// The kind of the job.
    pub kind: WorkKind,
    /// The body of the request.
    pub body: B,
}

impl<B: Serialize> Work<'_, B> {
    /// Begins the job, and waits for its end if `wait` says so.
    pub(super) fn run(&self, global: &Global, wait: Wait) -> Result<(), CliError> {
        let client = global.client()?;
        if wait == Wait::No {
            let begun = self.begin(&client)?;
            let now = self.now(&client)?;
            let text = begun.map_or_else(|| self.nothing(), |(_, job)| self.in_background(&job));
            return global.output().line(&now, |_| text);
        }
        // Before the job begins, so that no signal leaves a verification without the command that asked for it.
        let interrupts = Interrupts::catch();
        let Some((mut answer, mut job)) = self.begin(&client)? else {
            return global.output().line(&self.now(&client)?, |_| self.nothing());
        };
        let output = global.output();
        let mut progress =
            if global.json { Progress::of_short_work(&output) } else { Progress::new(&output) };
        while !job.state.has_ended() {
            progress.show(&update(&job), || answer.clone())?;
            if let Some(signal) = interrupts.pause(INTERVAL) {
                progress.end();
                return Err(self.interrupted(&client, &job, signal)?);
            }
            let began = job.began.clone();
            match self.poll(&client, &job.id) {
                Ok(Some(polled)) => (answer, job) = polled,
                Ok(None) => continue,
                // Its worker ended, and the next one does not continue it.
                Err(error) if error.is(ErrorKind::NotFound) => match self.begin(&client)? {
                    Some(begun) => (answer, job) = begun,
                    // It was done before its worker ended.
                    None => break,
                },
                Err(error) => {
                    progress.end();
                    return Err(error);
                }
            }
            if job.began != began && !job.state.has_ended() {
                // The next worker does not know what this command demanded, such as a rate.
                match self.begin(&client)? {
                    Some(begun) => (answer, job) = begun,
                    None => break,
                }
            }
        }
        if !global.json {
            progress.show(&update(&job), || Value::Null)?;
        }
        progress.end();
        if matches!(job.state, WorkState::Failed | WorkState::Cancelled) {
            return Err(self.failed(&job));
        }
        let now = self.now(&client)?;
        let text = match self.object {
            Object::Base(_) => summary(&job, &read(&now, &self.action())?),
            Object::Disk(_) => self.disk_summary(&read(&now, &self.action())?),
        };
        output.line(&now, |_| text)
    }

    /// The object as it is now.
    fn now(&self, client: &Client) -> Result<Value, CliError> {
        retry::repeat(|| client.get(&self.object.path(), &self.action()))
    }

    fn action(&self) -> String {
        format!("cannot {} {}", self.kind.name(), self.object)
    }

    /// `None` when there is nothing to do.
    fn begin(&self, client: &Client) -> Result<Option<(Value, Job)>, CliError> {
        let (path, action) = (format!("{}/{}", self.object.path(), self.kind.name()), self.action());
        loop {
            let answer = retry::repeat(|| client.post(&path, &self.body, &action))?;
            let id = match self.object {
                Object::Base(_) => {
                    let base: Base = read(&answer, &action)?;
                    base.work.map(|work| work.job).filter(|id| !id.is_empty())
                }
                Object::Disk(_) => {
                    let disk: Disk = read(&answer, &action)?;
                    let Some(id) = disk.job else { return Ok(None) };
                    Some(id)
                }
            };
            let Some(id) = id else {
                let message = format!(
                    "{action}: the daemon is of an earlier version, which has no jobs; give it this one with `plyfs \
                     upgrade`"
                );
                return Err(CliError::Refused { kind: None, message });
            };
            let answer = match client.get(&format!("/v1/jobs/{id}"), &action) {
                // Its worker ended between both requests.
                Err(error) if error.is(ErrorKind::NotFound) => continue,
                answer => answer?,
            };
            let job = read(&answer, &action)?;
            return Ok(Some((answer, job)));
        }
    }

    /// The job as it is now. `None` when the daemon does not answer in time.
    fn poll(&self, client: &Client, id: &str) -> Result<Option<(Value, Job)>, CliError> {
        let action = self.action();
        let get = || client.get_within(PATIENCE, &format!("/v1/jobs/{id}"), &action);
        match retry::repeat(get) {
            Err(CliError::TimedOut { .. }) => Ok(None),
            Err(error) => Err(error),
            Ok(answer) => {
                let job = read(&answer, &action)?;
                Ok(Some((answer, job)))
            }
        }
    }

    /// The error of a command that a signal ended.
    fn interrupted(&self, client: &Client, job: &Job, signal: i32) -> Result<CliError, CliError> {
        let Job { id, .. } = job;
        let object = self.object;
        let message = match self.kind {
            WorkKind::Hydrate => format!(
                "{object}: the hydration goes on; see it with `plyfs job show {id}`, end it with `plyfs job cancel {id}`"
            ),
            WorkKind::Flatten | WorkKind::Rebase | WorkKind::Compact | WorkKind::Move => format!(
                "{object}: the work goes on; see it with `plyfs job show {id}`, end it with `plyfs job cancel {id}`"
            ),
            WorkKind::Verify | WorkKind::Export | WorkKind::Import => {
                client.post_now(
                    &format!("/v1/jobs/{id}/cancel"),
                    None::<&()>,
                    &format!("cannot cancel job {id}"),
                )?;
                format!("{object}: the verification was cancelled; run the command again to begin anew")
            }
        };
        Ok(CliError::Interrupted { message, signal })
    }

    fn in_background(&self, job: &Job) -> String {
        format!("{}: the work goes on in the background; see: plyfs job show {}\n", title(job), job.id)
    }

    fn nothing(&self) -> String {
        let why = match self.kind {
            WorkKind::Flatten => "it has no base",
            WorkKind::Rebase => "it stands on that base already",
            WorkKind::Move => "all of it lies in that pool already",
            _ => "there are no layers to merge",
        };
        format!("{}: nothing to do, {why}\n", self.object)
    }

    fn disk_summary(&self, disk: &Disk) -> String {
        let layers: u64 = disk.layers.iter().map(|layer| layer.bytes).sum();
        let base = disk.base.as_ref().map_or("no base".to_owned(), |base| format!("base {base}"));
        let bytes = size(disk.delta_bytes + layers);
        format!("{}: it has {base}, {} layers, and {bytes} in the store\n", self.object, disk.layers.len())
    }

    fn failed(&self, job: &Job) -> CliError {
        let why = job.error.as_deref().unwrap_or("the daemon gives no reason; see its log");
        let message = match job.state {
            WorkState::Cancelled => format!("{}: cancelled: {why}", self.action()),
            _ => format!("{}: {why}", self.action()),
        };
        CliError::Refused { kind: None, message }
    }
}

/// The body of a request without options.
pub(super) fn no_options() -> Value {
    json!({})
}

/// The job counts what it compared, also where nothing is kept; so the base says how much is in the store.
fn summary(job: &Job, base: &Base) -> String {
    let is_kept = base.cached_percent.is_some();
    let digest = match (job.digest_matches, job.kind) {
        (Some(true), _) => "the digest matches",
        (_, WorkKind::Verify) if !base.complete && is_kept => {
            "their checksums match; verify the digest once the base is hydrated"
        }
        _ => "the base has no digest to compare with",
    };
    let bytes = match job.kind {
        WorkKind::Verify if is_kept => base.cached_bytes,
        _ => job.total,
    };
    format!("{}: {bytes} bytes are in the store; {digest}\n", job.base)
}

/// The name of what the job works on.
fn title(job: &Job) -> &str {
    job.disk.as_deref().unwrap_or(&job.base)
}

fn update(job: &Job) -> Update<'_> {
    let mut text = format!("{} of {}", size(job.bytes), size(job.total));
    if job.rate > 0 && !job.state.has_ended() {
        text += &format!(", {}/s", size(job.rate));
    }
    if let Some(seconds) = job.seconds_left {
        text += &format!(", {} left", duration(seconds));
    }
    text += &format!(", {}", job.state.name());
    if let Some(why) = job.error.as_deref().filter(|_| job.state == WorkState::Waiting) {
        text += &format!(": {why}");
    }
    Update { title: title(job), done: job.bytes, total: job.total, text, state: job.state.name() }
}
