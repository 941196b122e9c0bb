//! The memory budget of readers' requests: how many bytes may be under way, for one source and for all.
//!
//! Every request under way may have all its bytes in memory a moment later. What must hold:
//! - One source has at most [`PER_SOURCE`] bytes under way for readers. All sources together have at most [`TOTAL`],
//!   and in addition [`MINIMUM`] for each source that has any. So a source with endless readers never keeps another
//!   source from its next request.
//! - Waiting requests start in order. A request starts when bytes have come or were given up, whether or not the cache
//!   has taken them: a hanging cache disk stops no reader.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

/// See the module, bytes. The largest request fits into the minimum.
const PER_SOURCE: u64 = 64 << 20;
const TOTAL: u64 = 256 << 20;
const MINIMUM: u64 = super::MAX_REQUEST;
/// Bytes of all sources that came and that the cache has not taken yet. Above this bound the cache does not get them.
const UNKEPT: u64 = 256 << 20;

/// A source that waits for room in the budget.
pub(super) trait BudgetWaiter: Send + Sync {
    /// There may be room now.
    fn room(self: Arc<Self>);
}

/// The budget that all sources share.
#[derive(Default)]
pub struct DemandBudget {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    used: u64,
    unkept: u64,
    /// Sources that found no room, oldest first.
    waiting: VecDeque<Weak<dyn BudgetWaiter>>,
}

impl DemandBudget {
    /// Takes `bytes` for a source that has `own` under way. When the total has no room, the waiter that `source` returns
    /// is called as soon as there may be some.
    pub(super) fn take(
        &self,
        bytes: u64,
        own: u64,
        source: impl FnOnce() -> Option<Weak<dyn BudgetWaiter>>,
    ) -> bool {
        if own > 0 && own + bytes > PER_SOURCE {
            // The source tries again when its own bytes come.
            return false;
        }
        let mut state = self.state.lock();
        if own + bytes > MINIMUM && state.used + bytes > TOTAL {
            state.waiting.extend(source());
            return false;
        }
        state.used += bytes;
        true
    }

    /// Returns bytes, and calls the sources for which there is room now.
    pub(super) fn give(&self, bytes: u64) {
        self.state.lock().used -= bytes;
        loop {
            let next = {
                let mut state = self.state.lock();
                if state.used + MINIMUM > TOTAL {
                    return;
                }
                state.waiting.pop_front()
            };
            match next {
                // Without the lock. The source queues again when it finds no room.
                Some(next) => _ = next.upgrade().map(BudgetWaiter::room),
                None => return,
            }
        }
    }

    /// Whether bytes that came may stay in memory until the cache has taken them; [`kept`](Self::kept) returns them.
    pub(super) fn may_keep(&self, bytes: u64) -> bool {
        let mut state = self.state.lock();
        let may = state.unkept + bytes <= UNKEPT;
        state.unkept += if may { bytes } else { 0 };
        may
    }

    /// The cache has taken bytes.
    pub(super) fn kept(&self, bytes: u64) {
        self.state.lock().unkept -= bytes;
    }
}
