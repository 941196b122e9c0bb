//! How long a fetch is tried, and who is told that reads wait.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::source::Stall;

/// Whoever reads the log wants to know that reads wait, not each time that they do.
const SAID_EVERY: Duration = Duration::from_secs(10);

/// The reads of one source that wait for a server that fails.
pub(super) struct Stalls {
    shown: String,
    next: AtomicU64,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    reads: BTreeMap<u64, Stall>,
    said: Option<Instant>,
    /// Whether the log says that reads wait, and since when.
    open: Option<Instant>,
}

impl Stalls {
    pub fn new(shown: String) -> Arc<Self> {
        Arc::new(Self { shown, next: AtomicU64::new(0), waiting: Mutex::default() })
    }

    /// The longest wait, with the last reason.
    pub fn longest(&self) -> Option<Stall> {
        self.waiting.lock().reads.values().min_by_key(|stall| stall.since).cloned()
    }

    fn set(&self, number: u64, stall: Stall) {
        let mut waiting = self.waiting.lock();
        if waiting.open.is_none() && waiting.said.is_none_or(|said| said.elapsed() >= SAID_EVERY) {
            let now = Instant::now();
            (waiting.said, waiting.open) = (Some(now), Some(now));
            tracing::warn!(url = self.shown, why = stall.why, "reads of a base wait for its server");
        }
        waiting.reads.insert(number, stall);
    }

    fn unset(&self, number: u64) {
        let mut waiting = self.waiting.lock();
        if waiting.reads.remove(&number).is_some()
            && waiting.reads.is_empty()
            && let Some(since) = waiting.open.take()
        {
            let seconds = since.elapsed().as_secs_f64();
            tracing::info!(url = self.shown, seconds, "no read of the base waits any more");
        }
    }
}

/// The patience of one fetch.
pub(super) struct Wait {
    number: u64,
    /// Whom to tell, when somebody reads.
    stalls: Option<Arc<Stalls>>,
    /// How long after the first failure since the last byte it is given up.
    limit: Option<Duration>,
    first: Mutex<Option<(Instant, SystemTime)>>,
    why: Mutex<Option<String>>,
    changed: Notify,
}

impl Wait {
    pub fn new(stalls: Option<Arc<Stalls>>, limit: Option<Duration>) -> Self {
        let number = stalls.as_ref().map_or(0, |stalls| stalls.next.fetch_add(1, Ordering::Relaxed));
        Self { number, stalls, limit, first: Mutex::new(None), why: Mutex::new(None), changed: Notify::new() }
    }

    /// It has to wait.
    pub fn failed(&self, why: &str) {
        let since = {
            let mut first = self.first.lock();
            first.get_or_insert_with(|| (Instant::now(), SystemTime::now())).1
        };
        self.changed.notify_one();
        *self.why.lock() = Some(why.to_owned());
        if let Some(stalls) = &self.stalls {
            stalls.set(self.number, Stall { since, why: why.into() });
        }
    }

    /// What failed last.
    pub fn why(&self) -> Option<String> {
        self.why.lock().clone()
    }

    /// Bytes have come.
    pub fn progressed(&self) {
        if self.first.lock().take().is_some() {
            self.changed.notify_one();
            if let Some(stalls) = &self.stalls {
                stalls.unset(self.number);
            }
        }
    }

    /// Returns when the patience is over.
    pub async fn over(&self) {
        loop {
            let until = {
                let first = self.first.lock();
                first.zip(self.limit).and_then(|((first, _), limit)| first.checked_add(limit))
            };
            match until {
                None => self.changed.notified().await,
                Some(until) => tokio::select! {
                    () = self.changed.notified() => {}
                    () = tokio::time::sleep_until(until) => return,
                },
            }
        }
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        if let Some(stalls) = &self.stalls {
            stalls.unset(self.number);
        }
    }
}
