//! Whether a worker answers. Counted in questions, not in time that passes: a host that was suspended, or a supervisor
//! that got no processor time, has asked nothing meanwhile.

use std::time::{Duration, Instant};

/// How often a worker is asked.
const INTERVAL: Duration = Duration::from_secs(1);
/// A worker is lost when it was to be asked so many times in a row and had not answered the last question.
pub const LOST: u32 = 5;

/// The next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Felt {
    /// It is not time yet, or the worker is of a version that does not answer.
    NotDue,
    /// A question is to be sent.
    Ask,
    /// The last one is not answered yet.
    Waits,
    /// It is lost, as of now.
    Lost,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Pulse {
    due: Option<Instant>,
    asked: bool,
    missed: u32,
    /// When it was lost, nanoseconds since the epoch.
    pub lost_at_ns: i64,
}

impl Pulse {
    /// The worker serves from now on; `answers`: its version does.
    pub fn begin(&mut self, answers: bool) {
        *self = Self { due: answers.then(|| Instant::now() + INTERVAL), ..Self::default() };
    }

    /// When it is to be felt.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Whether the worker does not answer.
    pub fn is_lost(&self) -> bool {
        self.missed >= LOST
    }

    /// To be called when it is due; does nothing before.
    pub fn feel(&mut self, now: Instant) -> Felt {
        if self.due.is_none_or(|due| due > now) {
            return Felt::NotDue;
        }
        self.due = Some(now + INTERVAL);
        if !self.asked {
            self.asked = true;
            return Felt::Ask;
        }
        self.missed = self.missed.saturating_add(1);
        if self.missed == LOST { Felt::Lost } else { Felt::Waits }
    }

    /// An answer came; true when it was lost before.
    pub fn answered(&mut self) -> bool {
        let was_lost = self.is_lost();
        (self.asked, self.missed) = (false, 0);
        was_lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pulse that began, and the time at which it is due for the `n`th time.
    fn pulse() -> (Pulse, impl Fn(u32) -> Instant) {
        let mut pulse = Pulse::default();
        pulse.begin(true);
        let begun = Instant::now();
        (pulse, move |n| begun + INTERVAL * (n + 1))
    }

    #[test]
    fn a_worker_that_answers_is_asked_again_and_again() {
        let (mut pulse, at) = pulse();
        for n in 1..20 {
            assert_eq!(pulse.feel(at(n)), Felt::Ask);
            assert_eq!(pulse.feel(at(n)), Felt::NotDue);
            assert!(!pulse.answered());
        }
    }

    #[test]
    fn one_that_does_not_answer_is_lost_once_and_comes_back() {
        let (mut pulse, at) = pulse();
        assert_eq!(pulse.feel(at(1)), Felt::Ask);
        let felt: Vec<_> = (2..10).map(|n| pulse.feel(at(n))).collect();
        assert_eq!(felt.iter().filter(|felt| **felt == Felt::Lost).count(), 1, "{felt:?}");
        assert_eq!(felt[LOST as usize - 1], Felt::Lost, "{felt:?}");
        assert!(pulse.is_lost() && pulse.answered() && !pulse.is_lost());
        assert_eq!(pulse.feel(at(11)), Felt::Ask);
    }

    #[test]
    fn time_in_which_nothing_was_asked_proves_nothing() {
        let (mut pulse, at) = pulse();
        assert_eq!(pulse.feel(at(1)), Felt::Ask);
        // The host was suspended for a day.
        assert_eq!(pulse.feel(at(86_400)), Felt::Waits);
        assert!(!pulse.is_lost());
    }

    #[test]
    fn a_worker_of_the_version_before_is_not_asked() {
        let mut pulse = Pulse::default();
        pulse.begin(false);
        assert_eq!(pulse.feel(Instant::now() + Duration::from_secs(60)), Felt::NotDue);
    }
}
