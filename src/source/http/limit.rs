//! How many requests run at once, and how fast bytes come, for one base or for all.
//!
//! What must hold: a request that a reader waits for is the next to run, and finds a free slot even when readahead,
//! prefetch and hydration have more to do than there are slots.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::source::Purpose;

const PURPOSES: usize = 4;
/// Bytes may come this much ahead of their rate, so that a small request is not chopped.
const BURST: Duration = Duration::from_millis(50);

/// A number of slots for requests.
pub(super) struct Slots {
    state: Mutex<State>,
    /// As many may be held for other purposes than [`Purpose::Demand`].
    for_others: usize,
}

struct State {
    free: usize,
    /// Held for other purposes than demand.
    others: usize,
    waiting: [VecDeque<oneshot::Sender<Slot>>; PURPOSES],
}

/// Held while a request runs.
pub(super) struct Slot {
    /// None: of no number.
    slots: Option<Arc<Slots>>,
    purpose: Purpose,
}

impl Slot {
    /// Where there is nothing to count.
    pub fn none() -> Self {
        Self { slots: None, purpose: Purpose::Demand }
    }
}

impl Slots {
    pub fn new(count: u32) -> Arc<Self> {
        let count = count.max(1) as usize;
        let waiting = std::array::from_fn(|_| VecDeque::new());
        let for_others = (count - count / 4).min((count - 1).max(1));
        Arc::new(Self { state: Mutex::new(State { free: count, others: 0, waiting }), for_others })
    }

    /// Waits for a slot. Dropped while it waits, it has none.
    pub async fn get(self: &Arc<Self>, purpose: Purpose) -> Slot {
        let waits = {
            let mut state = self.state.lock();
            if self.give(&mut state, purpose) {
                return Slot { slots: Some(self.clone()), purpose };
            }
            let (send, waits) = oneshot::channel();
            state.waiting[purpose as usize].push_back(send);
            waits
        };
        // The sender stays in the queue until it is used: there is no other way for this to end.
        waits.await.unwrap_or_else(|_| Slot { slots: Some(self.clone()), purpose })
    }

    fn give(&self, state: &mut State, purpose: Purpose) -> bool {
        let demand = purpose == Purpose::Demand;
        if state.free == 0 || (!demand && state.others >= self.for_others) {
            return false;
        }
        state.free -= 1;
        state.others += usize::from(!demand);
        true
    }
}

const ORDER: [Purpose; PURPOSES] = [Purpose::Demand, Purpose::Readahead, Purpose::Prefetch, Purpose::Hydrate];

impl Drop for Slot {
    fn drop(&mut self) {
        let Some(slots) = self.slots.take() else { return };
        let mut passed_on = Vec::new();
        {
            let mut state = slots.state.lock();
            state.free += 1;
            state.others -= usize::from(self.purpose != Purpose::Demand);
            for purpose in ORDER {
                state.waiting[purpose as usize].retain(|waits| !waits.is_closed());
                while !state.waiting[purpose as usize].is_empty() && slots.give(&mut state, purpose) {
                    let waits = state.waiting[purpose as usize].pop_front();
                    passed_on.extend(waits.map(|waits| (waits, purpose)));
                }
            }
        }
        // Without the lock: a slot that nobody takes any more is dropped here, and comes back to this place.
        for (waits, purpose) in passed_on {
            let _ = waits.send(Slot { slots: Some(slots.clone()), purpose });
        }
    }
}

/// Bytes per second.
pub(super) struct Rate {
    per_second: Option<u64>,
    /// When everything that has come would have come at this rate.
    paid: Mutex<Instant>,
}

impl Rate {
    pub fn new(per_second: Option<u64>) -> Self {
        Self { per_second: per_second.filter(|rate| *rate > 0), paid: Mutex::new(Instant::now()) }
    }

    /// Waits until so many bytes more may have come.
    pub async fn took(&self, bytes: usize) {
        let Some(rate) = self.per_second else { return };
        let now = Instant::now();
        let paid = {
            let mut paid = self.paid.lock();
            let start = (*paid).max(now.checked_sub(BURST).unwrap_or(now));
            *paid = start + Duration::from_secs_f64(bytes as f64 / rate as f64);
            *paid
        };
        if paid > now {
            tokio::time::sleep_until(paid).await;
        }
    }
}
