//! One piece of work on a base: how far it is, and how it is ended.
//!
//! What must hold: every wait of a job is one of [`Job::pause`] and [`Job::wait`], and both end at once when it is
//! cancelled. So a caller that cancels a job can wait for its end.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::source::Completion;

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// All of it is fetched, then compared.
    Hydrate,
    /// It is compared.
    Verify,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Bytes come.
    Fetching,
    /// Nothing comes; it goes on by itself.
    Waiting,
    /// What is here is compared with the digest.
    Verifying,
    /// It has ended well.
    Done,
    /// It has ended, and not well.
    Failed,
    /// It was ended before its time, because it was asked for.
    Cancelled,
}

/// The last work on a base.
#[derive(Clone, Debug)]
pub struct Progress {
    /// What.
    pub what: What,
    /// How far.
    pub state: State,
    /// Bytes that are here, or compared.
    pub bytes: u64,
    /// Of so many.
    pub total: u64,
    /// Bytes per second since it began, of those that came meanwhile.
    pub rate: u64,
    /// What came of the comparison; nothing without a digest.
    pub digest_matches: Option<bool>,
    /// Why it failed, waits or was cancelled.
    pub error: Option<String>,
}

/// Why work ended early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// It was asked for, and by what.
    Cancelled(&'static str),
    /// It cannot go on.
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
    /// It was cancelled, has ended, or something that it waits for has happened.
    changed: Condvar,
    began: Instant,
    first: u64,
}

struct Inner {
    progress: Progress,
    cancelled: Option<&'static str>,
}

impl Job {
    /// Of `total` bytes, of which `first` are here.
    pub fn new(what: What, first: u64, total: u64) -> Arc<Self> {
        let state = if what == What::Hydrate { State::Fetching } else { State::Verifying };
        let progress =
            Progress { what, state, bytes: first, total, rate: 0, digest_matches: None, error: None };
        Arc::new(Self {
            inner: Mutex::new(Inner { progress, cancelled: None }),
            changed: Condvar::new(),
            began: Instant::now(),
            first,
        })
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        self.inner.lock().progress.clone()
    }

    /// Notes how far it is.
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

    /// Notes that nothing comes, and why.
    pub fn note_waiting(&self, bytes: u64, why: String) {
        self.note(State::Waiting, bytes);
        self.inner.lock().progress.error = Some(why);
    }

    /// Notes what came of the comparison.
    pub fn note_digest(&self, matches: Option<bool>) {
        self.inner.lock().progress.digest_matches = matches;
    }

    /// It has ended.
    pub fn end(&self, result: &Result<Option<bool>, Stopped>) {
        let mut inner = self.inner.lock();
        let progress = &mut inner.progress;
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

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        let state = self.inner.lock().progress.state;
        matches!(state, State::Done | State::Failed | State::Cancelled)
    }

    /// Ends it soon; `by` completes "cancelled: ". Nothing happens to one that has ended.
    pub fn cancel(&self, by: &'static str) {
        self.inner.lock().cancelled.get_or_insert(by);
        self.changed.notify_all();
    }

    /// Waits for its end.
    pub fn join(&self) {
        let mut inner = self.inner.lock();
        while !matches!(inner.progress.state, State::Done | State::Failed | State::Cancelled) {
            self.changed.wait(&mut inner);
        }
    }

    /// Whether to go on.
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

    /// Waits for a completion.
    ///
    /// # Errors
    /// When it was cancelled.
    pub fn wait(self: &Arc<Self>, completion: &Completion) -> Result<(), Stopped> {
        let this = Arc::downgrade(self);
        completion.then(move || {
            if let Some(job) = this.upgrade() {
                // Behind this lock the waiter has not looked yet, or waits.
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
            self.changed.wait(&mut inner);
        }
    }
}
