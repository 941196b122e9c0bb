//! How many bytes readers have asked for and not got yet: of one source, and of all.
//!
//! Every request that is under way may have all its bytes in memory a moment later. What must hold:
//! - One source has at most [`OF_ONE`] bytes under way for readers, all together [`OF_ALL`] and [`LEAST`] for each
//!   source that has any: so many that a source with endless readers keeps no other from its next request.
//! - What waits is begun in its order. It takes its turn when bytes have come or were given up, whether the cache has
//!   taken them or not: a disk under the cache that hangs stops no reader.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

/// See the module, bytes. The largest request fits into the least.
const OF_ONE: u64 = 64 << 20;
const OF_ALL: u64 = 256 << 20;
const LEAST: u64 = super::MAX_REQUEST;
/// Bytes of all sources that came and that the cache has not taken yet. Above it they are not kept.
const UNKEPT: u64 = 256 << 20;

/// A source that may begin more when there is room.
pub(super) trait Begin: Send + Sync {
    fn begin(self: Arc<Self>);
}

/// What all sources share.
#[derive(Default)]
pub struct DemandBudget {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    used: u64,
    unkept: u64,
    /// Sources that found no room, in the order in which they came.
    waiting: VecDeque<Weak<dyn Begin>>,
}

impl DemandBudget {
    /// Takes `bytes` for a source that has `own` under way. Without room among all, what `source` returns is told when
    /// there may be some.
    pub(super) fn take(
        &self,
        bytes: u64,
        own: u64,
        source: impl FnOnce() -> Option<Weak<dyn Begin>>,
    ) -> bool {
        if own > 0 && own + bytes > OF_ONE {
            // Its own bytes come first, which it is told of anyway.
            return false;
        }
        let mut state = self.state.lock();
        if own + bytes > LEAST && state.used + bytes > OF_ALL {
            state.waiting.extend(source());
            return false;
        }
        state.used += bytes;
        true
    }

    /// Gives bytes back, and lets those begin that there is room for.
    pub(super) fn give(&self, bytes: u64) {
        self.state.lock().used -= bytes;
        loop {
            let next = {
                let mut state = self.state.lock();
                if state.used + LEAST > OF_ALL {
                    return;
                }
                state.waiting.pop_front()
            };
            match next {
                // Without the lock. It comes back when it finds no room.
                Some(next) => _ = next.upgrade().map(Begin::begin),
                None => return,
            }
        }
    }

    /// Whether bytes that came may be kept in memory until the cache has taken them; given back by
    /// [`kept`](Self::kept).
    pub(super) fn may_keep(&self, bytes: u64) -> bool {
        let mut state = self.state.lock();
        let may = state.unkept + bytes <= UNKEPT;
        state.unkept += if may { bytes } else { 0 };
        may
    }

    pub(super) fn kept(&self, bytes: u64) {
        self.state.lock().unkept -= bytes;
    }
}
