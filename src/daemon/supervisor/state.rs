//! Where the supervisor stands: who serves the mount, and how far the end is.
//!
//! ```text
//! who serves:            activate                Ready
//!              Vacant --------------> TakingOver ------> Serving
//!                ^                        |                 |
//!                +------ it ended <-------+                 |
//!                ^       (killed, when it is late)          |
//!                +----------------- it ended <--------------+
//!
//! the end:          stop, no version changes hands
//!              No ------------------------------------> Closing ---> outcome
//!              |                                          ^  |
//!              | stop while a version changes hands       |  +-- the worker died: another one takes over
//!              +------------> Wanted ---------------------+      to close the store, three times at most
//!                                     one of them serves
//! ```
//!
//! What must hold: each deadline belongs to a state and goes with it. In `Vacant` it is the next try, in `TakingOver` the
//! patience with the worker, in `Closing` the time after which a worker that does not end is left alone.

use std::time::Instant;

/// Who serves the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::daemon) enum Seat {
    /// No worker is active. The next one is tried at `next`; without it, another event brings it.
    Vacant { since: Instant, next: Option<Instant> },
    /// The active worker takes over. Without `until` it may take as long as it takes.
    TakingOver { since: Instant, until: Option<Instant> },
    /// The active worker serves.
    Serving,
}

impl Seat {
    /// Since when no worker serves.
    pub fn down_since(self) -> Option<Instant> {
        match self {
            Self::Vacant { since, .. } | Self::TakingOver { since, .. } => Some(since),
            Self::Serving => None,
        }
    }

    /// When something is to be done about it.
    pub fn deadline(self) -> Option<Instant> {
        match self {
            Self::Vacant { next: at, .. } | Self::TakingOver { until: at, .. } => at,
            Self::Serving => None,
        }
    }

    /// No worker is active any more, or still none.
    pub fn vacate(&mut self, next: Option<Instant>) {
        *self = Self::Vacant { since: self.down_since().unwrap_or_else(Instant::now), next };
    }

    /// A worker takes over.
    pub fn take_over(&mut self, until: Option<Instant>) {
        *self = Self::TakingOver { since: self.down_since().unwrap_or_else(Instant::now), until };
    }

    /// The same state with another deadline; `Serving` has none.
    pub fn set_deadline(&mut self, at: Option<Instant>) {
        match self {
            Self::Vacant { next, .. } => *next = at,
            Self::TakingOver { until, .. } => *until = at,
            Self::Serving => {}
        }
    }
}

/// How far the end is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::daemon) enum Ending {
    /// It is not wanted.
    No,
    /// The operator wants it; it waits until a hand-over to another version is over.
    Wanted,
    /// The active worker closes the store.
    Closing(Closing),
}

/// See [`Ending::Closing`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::daemon) struct Closing {
    pub mount: MountEnd,
    /// Number of the mount's device, by which its connection can be aborted once it is out of sight.
    pub device: Option<u32>,
    /// Workers that ended before they had closed the store.
    pub deaths: u32,
    /// A worker has closed the store.
    pub closed: bool,
    /// When the worker, which has closed the store or was killed, is not waited for any more.
    pub leave_at: Option<Instant>,
}

/// What became of the mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::daemon) enum MountEnd {
    /// It is gone; the worker sees that, and closes the store.
    Unmounted,
    /// It is out of sight and files on it are open; the worker is told to close the store all the same.
    Detached,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::Seat;

    #[test]
    fn the_time_without_service_goes_on_until_a_worker_serves() {
        let since = std::time::Instant::now();
        let at = since + Duration::from_secs(1);
        let mut seat = Seat::Vacant { since, next: Some(at) };
        assert_eq!((seat.down_since(), seat.deadline()), (Some(since), Some(at)));
        seat.take_over(None);
        assert_eq!((seat.down_since(), seat.deadline()), (Some(since), None));
        seat.set_deadline(Some(at));
        assert_eq!(seat, Seat::TakingOver { since, until: Some(at) });
        // It ends, and the next one is to come.
        seat.vacate(None);
        assert_eq!((seat.down_since(), seat.deadline()), (Some(since), None));
        seat = Seat::Serving;
        seat.set_deadline(Some(at));
        assert_eq!((seat.down_since(), seat.deadline()), (None, None));
        seat.vacate(None);
        assert!(seat.down_since().is_some_and(|now| now >= since));
    }
}
