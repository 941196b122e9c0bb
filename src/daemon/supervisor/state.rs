//! The states of the supervisor: which worker serves the mount, and the progress of the end.
//!
//! ```text
//! ServingState:          activate                Ready
//!              Vacant --------------> TakingOver ------> Serving
//!                ^                        |                 |
//!                +--- worker ended <------+                 |
//!                ^    (killed after the deadline)           |
//!                +--------------- worker ended <------------+
//!
//! Shutdown:         stop, no upgrade hands over
//!              None ----------------------------------> Closing ---> outcome
//!              |                                          ^  |
//!              | stop while an upgrade hands over         |  +-- the worker died: another one takes over
//!              +----------> Requested --------------------+      to close the store, three times at most
//!                                     a worker serves
//! ```
//!
//! What must hold: each deadline belongs to a state and ends with it. In `Vacant` it is the time of the next start, in
//! `TakingOver` the limit for the worker, in `Closing` the time after which a worker that does not end is left behind.

use std::time::Instant;

/// Whether a worker serves the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::daemon) enum ServingState {
    /// No worker is active. The next one is started at `next`; when that is `None`, another event starts it.
    Vacant { since: Instant, next: Option<Instant> },
    /// The active worker takes over. Without `until` it has no limit.
    TakingOver { since: Instant, until: Option<Instant> },
    /// The active worker serves.
    Serving,
}

impl ServingState {
    /// Since when no worker serves.
    pub fn down_since(self) -> Option<Instant> {
        match self {
            Self::Vacant { since, .. } | Self::TakingOver { since, .. } => Some(since),
            Self::Serving => None,
        }
    }

    /// When the supervisor has to act on this state.
    pub fn deadline(self) -> Option<Instant> {
        match self {
            Self::Vacant { next: at, .. } | Self::TakingOver { until: at, .. } => at,
            Self::Serving => None,
        }
    }

    /// Enters `Vacant`.
    pub fn vacate(&mut self, next: Option<Instant>) {
        *self = Self::Vacant { since: self.down_since().unwrap_or_else(Instant::now), next };
    }

    /// Enters `TakingOver`.
    pub fn take_over(&mut self, until: Option<Instant>) {
        *self = Self::TakingOver { since: self.down_since().unwrap_or_else(Instant::now), until };
    }

    /// Changes the deadline of the state; `Serving` has none.
    pub fn set_deadline(&mut self, at: Option<Instant>) {
        match self {
            Self::Vacant { next, .. } => *next = at,
            Self::TakingOver { until, .. } => *until = at,
            Self::Serving => {}
        }
    }
}

/// The progress of the daemon's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::daemon) enum Shutdown {
    /// The end is not requested.
    None,
    /// The operator requested the end. It waits until an upgrade's hand-over is complete.
    Requested,
    /// The active worker closes the store.
    Closing(Closing),
}

/// See [`Shutdown::Closing`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::daemon) struct Closing {
    pub mount: MountEnd,
    /// Number of the mount's device. It identifies the connection to abort once the mount is detached.
    pub device: Option<u32>,
    /// Workers that ended before they had closed the store.
    pub deaths: u32,
    /// Whether a worker has closed the store.
    pub closed: bool,
    /// When the supervisor stops waiting for the worker, which has closed the store or was killed.
    pub abandon_at: Option<Instant>,
}

/// How the mount ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::daemon) enum MountEnd {
    /// It is unmounted. The worker sees that, and closes the store.
    Unmounted,
    /// It is detached, and files on it are open, or it is mounted elsewhere too. The worker is told to close the store
    /// nevertheless.
    Detached,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::ServingState;

    #[test]
    fn the_time_without_service_counts_until_a_worker_serves() {
        let since = std::time::Instant::now();
        let at = since + Duration::from_secs(1);
        let mut serving_state = ServingState::Vacant { since, next: Some(at) };
        assert_eq!((serving_state.down_since(), serving_state.deadline()), (Some(since), Some(at)));
        serving_state.take_over(None);
        assert_eq!((serving_state.down_since(), serving_state.deadline()), (Some(since), None));
        serving_state.set_deadline(Some(at));
        assert_eq!(serving_state, ServingState::TakingOver { since, until: Some(at) });
        // The worker ends before it serves.
        serving_state.vacate(None);
        assert_eq!((serving_state.down_since(), serving_state.deadline()), (Some(since), None));
        serving_state = ServingState::Serving;
        serving_state.set_deadline(Some(at));
        assert_eq!((serving_state.down_since(), serving_state.deadline()), (None, None));
        serving_state.vacate(None);
        assert!(serving_state.down_since().is_some_and(|now| now >= since));
    }
}
