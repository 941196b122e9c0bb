//! One job on a base or a disk: its progress, and how it is cancelled.
//!
//! What must hold: a job waits only in [`Job::pause`] and [`Job::wait`], and both end at once when it is cancelled. So
//! a caller that cancels a job can wait for its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::source::Completion;

/// How long a job waits for bytes before it looks why they do not come.
const NOTICE: Duration = Duration::from_secs(1);

/// The kind of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Fetches the whole base, then compares it.
    Hydrate,
    /// Compares the base.
    Verify,
    /// Makes a disk independent of its base.
    Flatten,
    /// Puts a disk on another base.
    Rebase,
    /// Merges layers of a disk.
    Compact,
    /// Copies a disk to another pool.
    Move,
}

impl What {
    /// The kinds of jobs on bases.
    pub const ON_BASES: [Self; 2] = [Self::Hydrate, Self::Verify];
    /// The kinds of jobs on disks.
    pub const ON_DISKS: [Self; 4] = [Self::Flatten, Self::Rebase, Self::Compact, Self::Move];

    /// Its name, the first part of a job's identifier.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hydrate => "hydrate",
            Self::Verify => "verify",
            Self::Flatten => "flatten",
            Self::Rebase => "rebase",
            Self::Compact => "compact",
            Self::Move => "move",
        }
    }
}

/// The state of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Bytes come.
    Fetching,
    /// No bytes come; the job continues when they do.
    Waiting,
    /// The cached contents are compared with the digest.
    Verifying,
    /// Blocks of a disk are compared and copied.
    Copying,
    /// The job has succeeded.
    Done,
    /// The job has failed.
    Failed,
    /// The job was cancelled.
    Cancelled,
}

/// The progress of a job.
#[derive(Clone, Debug)]
pub struct Progress {
    /// Kind of the job.
    pub what: What,
    /// State of the job.
    pub state: State,
    /// Bytes that are cached, compared or copied.
    pub bytes: u64,
    /// Bytes in all.
    pub total: u64,
    /// Bytes per second since the start of the job, without those that were cached before.
    pub rate: u64,
    /// Result of the comparison; none without a digest.
    pub digest_matches: Option<bool>,
    /// Why the job failed, waits or was cancelled.
    pub error: Option<String>,
    /// When this worker began the job.
    pub began: SystemTime,
    /// When it ended.
    pub ended: Option<SystemTime>,
    /// Whether it continues the job of an earlier worker.
    pub resumed: bool,
}

/// How a job begins.
#[derive(Clone, Copy, Debug, Default)]
pub struct Start {
    /// Most bytes per second.
    pub rate: Option<u64>,
    /// It continues the job of an earlier worker.
    pub resumed: bool,
    /// The base was hydrated before: a hydration that is cancelled leaves it so.
    pub repeats: bool,
}

/// Why [`Job::pace`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paced {
    /// The bytes are due.
    Due,
    /// The job has another rate now.
    Changed,
}

/// Why a job ended early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// It was cancelled; what cancelled it.
    Cancelled(&'static str),
    /// It cannot continue; the cause.
    Failed(String),
}

impl From<String> for Stopped {
    fn from(why: String) -> Self {
        Self::Failed(why)
    }
}

/// See the module.
pub struct Job {
    inner: Mutex<Inner>,
    /// The job was cancelled or has ended, or a completion that it waits for is complete.
    changed: Condvar,
    began: Instant,
    first: u64,
    /// Most bytes per second; 0 without a limit.
    rate: AtomicU64,
    repeats: bool,
}

struct Inner {
    progress: Progress,
    cancelled: Option<&'static str>,
}

impl Job {
    /// On a base of `total` bytes, of which `first` are cached.
    pub fn new(what: What, first: u64, total: u64, start: Start) -> Arc<Self> {
        let state = match what {
            What::Hydrate => State::Fetching,
            What::Verify => State::Verifying,
            What::Flatten | What::Rebase | What::Compact | What::Move => State::Copying,
        };
        let progress = Progress {
            what,
            state,
            bytes: first,
            total,
            rate: 0,
            digest_matches: None,
            error: None,
            began: SystemTime::now(),
            ended: None,
            resumed: start.resumed,
        };
        Arc::new(Self {
            inner: Mutex::new(Inner { progress, cancelled: None }),
            changed: Condvar::new(),
            began: Instant::now(),
            first,
            rate: AtomicU64::new(start.rate.unwrap_or(0)),
            repeats: start.repeats,
        })
    }

    /// The kind of the job.
    pub fn what(&self) -> What {
        self.inner.lock().progress.what
    }

    /// Most bytes per second.
    pub fn rate(&self) -> Option<u64> {
        Some(self.rate.load(Ordering::Relaxed)).filter(|rate| *rate > 0)
    }

    /// Changes the most bytes per second. The job takes it up with its next request.
    pub fn set_rate(&self, rate: u64) {
        self.rate.store(rate, Ordering::Relaxed);
        // A pause that the former rate demands may be long.
        drop(self.inner.lock());
        self.changed.notify_all();
    }

    /// Whether the base was hydrated before the job began.
    pub fn repeats(&self) -> bool {
        self.repeats
    }

    /// The progress of the job.
    pub fn progress(&self) -> Progress {
        self.inner.lock().progress.clone()
    }

    /// Notes state and bytes.
    pub fn note(&self, state: State, bytes: u64) {
        let mut inner = self.inner.lock();
        let progress = &mut inner.progress;
        (progress.state, progress.bytes) = (state, bytes);
        let seconds = self.began.elapsed().as_secs_f64().max(0.001);
        progress.rate = (bytes.saturating_sub(self.first) as f64 / seconds) as u64;
        if state != State::Waiting {
            progress.error = None;
        }
    }

    /// Notes that no bytes come, and why.
    pub fn note_waiting(&self, bytes: u64, why: String) {
        self.note(State::Waiting, bytes);
        self.inner.lock().progress.error = Some(why);
    }

    /// Notes the result of the comparison.
    pub fn note_digest(&self, matches: Option<bool>) {
        self.inner.lock().progress.digest_matches = matches;
    }

    /// Notes the end of the job.
    pub fn end(&self, result: &Result<Option<bool>, Stopped>) {
        let mut inner = self.inner.lock();
        let progress = &mut inner.progress;
        progress.ended = Some(SystemTime::now());
        match result {
            Ok(matches) => (progress.state, progress.digest_matches) = (State::Done, *matches),
            Err(Stopped::Failed(why)) => {
                (progress.state, progress.error) = (State::Failed, Some(why.clone()));
            }
            Err(Stopped::Cancelled(by)) => {
                (progress.state, progress.error) = (State::Cancelled, Some((*by).to_owned()));
            }
        }
        self.changed.notify_all();
    }

    /// Whether the job has ended.
    pub fn has_ended(&self) -> bool {
        let state = self.inner.lock().progress.state;
        matches!(state, State::Done | State::Failed | State::Cancelled)
    }

    /// Cancels the job, which then ends soon; `by` says what cancels it. A job that has ended is not changed.
    pub fn cancel(&self, by: &'static str) {
        self.inner.lock().cancelled.get_or_insert(by);
        self.changed.notify_all();
    }

    /// Whether the job was cancelled. It may not have ended yet.
    pub fn is_cancelled(&self) -> bool {
        self.inner.lock().cancelled.is_some()
    }

    /// Waits for the end of the job.
    pub fn join(&self) {
        let mut inner = self.inner.lock();
        while !matches!(inner.progress.state, State::Done | State::Failed | State::Cancelled) {
            self.changed.wait(&mut inner);
        }
    }

    /// Checks that the job was not cancelled.
    ///
    /// # Errors
    /// When it was cancelled.
    pub fn check(&self) -> Result<(), Stopped> {
        self.inner.lock().cancelled.map_or(Ok(()), |by| Err(Stopped::Cancelled(by)))
    }

    /// Waits for a while.
    ///
    /// # Errors
    /// When it was cancelled.
    pub fn pause(&self, time: Duration) -> Result<(), Stopped> {
        let end = Instant::now() + time;
        let mut inner = self.inner.lock();
        loop {
            if let Some(by) = inner.cancelled {
                return Err(Stopped::Cancelled(by));
            }
            if Instant::now() >= end {
                return Ok(());
            }
            self.changed.wait_until(&mut inner, end);
        }
    }

    /// Waits until `bytes` that were requested since `since` are due at the job's rate. Returns early when the rate
    /// changes; the caller then counts anew.
    ///
    /// # Errors
    /// When it was cancelled.
    pub fn pace(&self, bytes: u64, since: Instant) -> Result<Paced, Stopped> {
        let Some(rate) = self.rate() else { return Ok(Paced::Due) };
        let end = since + Duration::from_secs_f64(bytes as f64 / rate as f64);
        let mut inner = self.inner.lock();
        loop {
            if let Some(by) = inner.cancelled {
                return Err(Stopped::Cancelled(by));
            }
            if self.rate() != Some(rate) {
                return Ok(Paced::Changed);
            }
            if Instant::now() >= end {
                return Ok(Paced::Due);
            }
            self.changed.wait_until(&mut inner, end);
        }
    }

    /// Waits for a completion. Calls `meanwhile` once a second, without a lock.
    ///
    /// # Errors
    /// When it was cancelled.
    pub fn wait(self: &Arc<Self>, completion: &Completion, meanwhile: impl Fn()) -> Result<(), Stopped> {
        let this = Arc::downgrade(self);
        completion.then(move || {
            if let Some(job) = this.upgrade() {
                // After this lock, the waiter either has not checked yet, or waits on `changed`.
                drop(job.inner.lock());
                job.changed.notify_all();
            }
        });
        let mut inner = self.inner.lock();
        loop {
            if let Some(by) = inner.cancelled {
                return Err(Stopped::Cancelled(by));
            }
            if completion.is_complete() {
                return Ok(());
            }
            if self.changed.wait_for(&mut inner, NOTICE).timed_out() {
                MutexGuard::unlocked(&mut inner, &meanwhile);
            }
        }
    }
}

impl Progress {
    /// Notes that the work ended before it began.
    pub fn cancel(&mut self, by: &str) {
        (self.state, self.error) = (State::Cancelled, Some(by.to_owned()));
        self.ended = Some(SystemTime::now());
    }

    /// Whether the work has ended.
    pub fn has_ended(&self) -> bool {
        matches!(self.state, State::Done | State::Failed | State::Cancelled)
    }
}
