//! How long a fetch is retried, and which reads wait meanwhile.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant as Time, SystemTime};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::answer::Failure;
use super::too_late;
use crate::source::{Purpose, SourceError, Stall, StallKind};

/// The shortest time between two log lines that reads wait.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// The reads of one source that wait for a failing server.
pub(in crate::source) struct Stalls {
    next: AtomicU64,
    waiting: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    reads: BTreeMap<u64, Stall>,
    logged: Option<Instant>,
    /// Since when the log says that reads wait, and the URL; none when it does not.
    open: Option<(Instant, String)>,
}

impl Stalls {
    pub fn new() -> Arc<Self> {
        Arc::new(Self { next: AtomicU64::new(0), waiting: Mutex::default() })
    }

    /// The longest wait, with its last failure. When another object answered one of the reads, that failure is
    /// returned.
    pub fn longest(&self) -> Option<Stall> {
        let waiting = self.waiting.lock();
        let mut longest = waiting.reads.values().min_by_key(|stall| stall.since)?.clone();
        if let Some(changed) = waiting.reads.values().find(|stall| stall.kind == StallKind::Changed) {
            (longest.kind, longest.why) = (changed.kind, changed.why.clone());
        }
        Some(longest)
    }

    fn set(&self, number: u64, shown: &str, stall: Stall) {
        let mut waiting = self.waiting.lock();
        if waiting.open.is_none() && waiting.logged.is_none_or(|logged| logged.elapsed() >= LOG_EVERY) {
            let now = Instant::now();
            (waiting.logged, waiting.open) = (Some(now), Some((now, shown.to_owned())));
            tracing::warn!(url = shown, why = stall.why, "reads of a base wait for its server");
        }
        waiting.reads.insert(number, stall);
    }

    fn unset(&self, number: u64) {
        let mut waiting = self.waiting.lock();
        if waiting.reads.remove(&number).is_some()
            && waiting.reads.is_empty()
            && let Some((since, url)) = waiting.open.take()
        {
            let seconds = since.elapsed().as_secs_f64();
            tracing::info!(url, seconds, "no read of the base waits for its server any more");
        }
    }
}

/// How long a fetch is retried.
#[derive(Clone, Copy, Debug)]
pub(in crate::source) enum Patience {
    /// Without end.
    Endless,
    /// For this time from this moment on, unless bytes come at the minimum rate (H8).
    From(Instant, Duration),
    /// For this time after a failure, unless bytes come at the minimum rate.
    AfterFailure(Duration),
}

/// The patience of one fetch.
pub(in crate::source) struct Wait {
    number: u64,
    /// Notes that a reader waits; none when no reader waits for the fetch.
    stalls: Option<Arc<Stalls>>,
    patience: Patience,
    /// Bytes per second below which a transfer counts as stalled.
    min_rate: u64,
    clock: Mutex<Clock>,
    changed: Notify,
}

struct Clock {
    /// The start of the time that the patience limits.
    mark: Option<Instant>,
    /// Bytes since the mark, and since the last failure.
    since_mark: u64,
    since_failure: u64,
    failed: Option<(SystemTime, Failure)>,
}

/// The longest time of a fetch for which no reader waits.
const TRIED_FOR: Duration = Duration::from_secs(30);

impl Wait {
    /// Of one fetch of a base with this deadline, whose first reader waits since then.
    pub fn of_fetch(
        purpose: Purpose,
        since: Time,
        deadline: Option<Duration>,
        stalls: &Arc<Stalls>,
        min_rate: u64,
    ) -> Self {
        let demand = purpose == Purpose::Demand;
        let patience = match deadline {
            Some(deadline) if demand => Patience::From(Instant::from_std(since), deadline),
            None if demand => Patience::Endless,
            deadline => Patience::AfterFailure(deadline.unwrap_or(TRIED_FOR).min(TRIED_FOR)),
        };
        Self::new(demand.then(|| stalls.clone()), patience, min_rate)
    }

    /// The error of a fetch whose time is up. `shown` is what it reads.
    pub fn too_late(&self, shown: &str) -> SourceError {
        too_late(shown, self.limit().unwrap_or_default(), self.last())
    }

    pub fn new(stalls: Option<Arc<Stalls>>, patience: Patience, min_rate: u64) -> Self {
        let number = stalls.as_ref().map_or(0, |stalls| stalls.next.fetch_add(1, Ordering::Relaxed));
        let mark = match patience {
            Patience::From(start, _) => Some(start),
            Patience::Endless | Patience::AfterFailure(_) => None,
        };
        let clock = Mutex::new(Clock { mark, since_mark: 0, since_failure: 0, failed: None });
        Self { number, stalls, patience, min_rate, clock, changed: Notify::new() }
    }

    /// The limit, if there is one.
    pub fn limit(&self) -> Option<Duration> {
        match self.patience {
            Patience::Endless => None,
            Patience::From(_, limit) | Patience::AfterFailure(limit) => Some(limit),
        }
    }

    /// Notes a failure, after which the fetch waits. `shown` is the URL that failed.
    pub fn failed(&self, shown: &str, failure: &Failure) {
        let since = {
            let mut clock = self.clock.lock();
            clock.mark.get_or_insert_with(Instant::now);
            clock.since_failure = 0;
            let since = clock.failed.as_ref().map_or_else(SystemTime::now, |(since, _)| *since);
            clock.failed = Some((since, failure.clone()));
            since
        };
        self.changed.notify_one();
        if let Some(stalls) = &self.stalls {
            let kind = if failure.is_another() { StallKind::Changed } else { StallKind::Waiting };
            stalls.set(self.number, shown, Stall { since, why: failure.why().into(), kind });
        }
    }

    /// The last failure.
    pub fn last(&self) -> Option<Failure> {
        self.clock.lock().failed.as_ref().map(|(_, failure)| failure.clone())
    }

    /// Notes that bytes have come.
    pub fn progressed(&self, bytes: usize) {
        let mut clock = self.clock.lock();
        clock.since_mark += bytes as u64;
        clock.since_failure += bytes as u64;
        let seconds = self.limit().map_or(1.0, |limit| limit.as_secs_f64());
        if clock.since_mark as f64 >= self.min_rate as f64 * seconds {
            clock.since_mark = 0;
            clock.mark = match self.patience {
                Patience::From(..) => Some(Instant::now()),
                Patience::Endless | Patience::AfterFailure(_) => None,
            };
        }
        // One byte does not prove that the server works.
        if clock.since_failure >= self.min_rate && clock.failed.take().is_some() {
            drop(clock);
            self.changed.notify_one();
            if let Some(stalls) = &self.stalls {
                stalls.unset(self.number);
            }
        }
    }

    /// Returns when the time is up.
    pub async fn over(&self) {
        loop {
            let until = {
                let mark = self.clock.lock().mark;
                mark.zip(self.limit()).and_then(|(mark, limit)| mark.checked_add(limit))
            };
            match until {
                None => self.changed.notified().await,
                Some(until) if until <= Instant::now() => return,
                // The mark may have moved meanwhile.
                Some(until) => tokio::select! {
                    () = self.changed.notified() => {}
                    () = tokio::time::sleep_until(until) => {}
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
