//! Decides whether a worker answers. It counts pings, not time: a supervisor on a suspended host, or one that got no
//! processor time, sent no pings meanwhile.

use std::time::{Duration, Instant};

/// The time between two pings.
const INTERVAL: Duration = Duration::from_secs(1);
/// A worker is lost when this many pings in a row were due while the last one had no answer.
pub const MAX_MISSED: u32 = 5;

/// The result of a poll.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeartbeatStep {
    /// No ping is due yet, or the worker is of a version that does not answer pings.
    NotDue,
    /// The caller sends a ping.
    Ping,
    /// The last ping is not answered yet.
    Pending,
    /// The worker has just become lost.
    Lost,
}

/// The state of the pings to one worker.
#[derive(Debug, Default)]
pub struct Heartbeat {
    due: Option<Instant>,
    is_pending: bool,
    missed: u32,
    /// When the worker became lost, nanoseconds since the epoch.
    pub lost_at_ns: i64,
}

impl Heartbeat {
    /// Begins when the worker serves. `answers`: its version answers pings.
    pub fn begin(&mut self, answers: bool) {
        *self = Self { due: answers.then(|| Instant::now() + INTERVAL), ..Self::default() };
    }

    /// When the next [`poll`](Self::poll) is due.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Whether the worker counts as not answering.
    pub fn is_lost(&self) -> bool {
        self.missed >= MAX_MISSED
    }

    /// Advances the state when a poll is due; before that it does nothing.
    pub fn poll(&mut self, now: Instant) -> HeartbeatStep {
        if self.due.is_none_or(|due| due > now) {
            return HeartbeatStep::NotDue;
        }
        self.due = Some(now + INTERVAL);
        if !self.is_pending {
            self.is_pending = true;
            return HeartbeatStep::Ping;
        }
        self.missed = self.missed.saturating_add(1);
        if self.missed == MAX_MISSED { HeartbeatStep::Lost } else { HeartbeatStep::Pending }
    }

    /// Records an answer. Returns whether the worker was lost before.
    pub fn answered(&mut self) -> bool {
        let was_lost = self.is_lost();
        (self.is_pending, self.missed) = (false, 0);
        was_lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A heartbeat that began, and the time at which it is due for the `n`th time.
    fn heartbeat() -> (Heartbeat, impl Fn(u32) -> Instant) {
        let mut heartbeat = Heartbeat::default();
        heartbeat.begin(true);
        let begun = Instant::now();
        (heartbeat, move |n| begun + INTERVAL * (n + 1))
    }

    #[test]
    fn a_worker_that_answers_gets_further_pings() {
        let (mut heartbeat, at) = heartbeat();
        for n in 1..20 {
            assert_eq!(heartbeat.poll(at(n)), HeartbeatStep::Ping);
            assert_eq!(heartbeat.poll(at(n)), HeartbeatStep::NotDue);
            assert!(!heartbeat.answered());
        }
    }

    #[test]
    fn a_worker_that_does_not_answer_becomes_lost_once_and_recovers() {
        let (mut heartbeat, at) = heartbeat();
        assert_eq!(heartbeat.poll(at(1)), HeartbeatStep::Ping);
        let steps: Vec<_> = (2..10).map(|n| heartbeat.poll(at(n))).collect();
        assert_eq!(steps.iter().filter(|step| **step == HeartbeatStep::Lost).count(), 1, "{steps:?}");
        assert_eq!(steps[MAX_MISSED as usize - 1], HeartbeatStep::Lost, "{steps:?}");
        assert!(heartbeat.is_lost() && heartbeat.answered() && !heartbeat.is_lost());
        assert_eq!(heartbeat.poll(at(11)), HeartbeatStep::Ping);
    }

    #[test]
    fn time_without_pings_does_not_count() {
        let (mut heartbeat, at) = heartbeat();
        assert_eq!(heartbeat.poll(at(1)), HeartbeatStep::Ping);
        // The host was suspended for a day.
        assert_eq!(heartbeat.poll(at(86_400)), HeartbeatStep::Pending);
        assert!(!heartbeat.is_lost());
    }

    #[test]
    fn a_worker_of_a_version_without_pings_gets_none() {
        let mut heartbeat = Heartbeat::default();
        heartbeat.begin(false);
        assert_eq!(heartbeat.poll(Instant::now() + Duration::from_secs(60)), HeartbeatStep::NotDue);
    }
}
