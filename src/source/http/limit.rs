//! Limits how many requests run at once and how fast bytes come, for one base or for all bases.
//!
//! What must hold:
//! - A request that a reader waits for runs next. It finds a free slot even when readahead, prefetch and hydration have
//!   more requests than there are slots.
//! - However many slots one base holds, a reader of a base that holds none gets a slot at once, and a free slot goes to
//!   the base that holds the fewest. So at most as many requests run as there are slots, and one more for each base
//!   (H7).

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::source::Purpose;

const PURPOSES: usize = 4;
/// Bytes may come this much ahead of their rate, so that a small request is not delayed.
const BURST: Duration = Duration::from_millis(50);

/// A number of slots that several parties share. A party is a base.
pub(in crate::source) struct Slots {
    state: Mutex<State>,
    /// Most slots that may be held for other purposes than [`Purpose::Demand`].
    for_others: usize,
}

/// A user of slots, with a number of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::source) struct Party(u64);

impl Party {
    /// A party that differs from all others.
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

struct State {
    /// Free slots. Below zero, when parties without a slot got one although all were held.
    free: isize,
    /// Slots that are held for other purposes than demand.
    others: usize,
    /// Slots of each party that holds any.
    held: HashMap<Party, usize>,
    waiting: [VecDeque<Waiter>; PURPOSES],
}

struct Waiter {
    party: Party,
    send: oneshot::Sender<Slot>,
}

/// Held while a request runs.
pub(in crate::source) struct Slot {
    /// None: not counted.
    slots: Option<Arc<Slots>>,
    party: Party,
    purpose: Purpose,
}

impl Slot {
    /// A slot that is not counted.
    pub fn none() -> Self {
        Self { slots: None, party: Party(u64::MAX), purpose: Purpose::Demand }
    }
}

impl Slots {
    pub fn new(count: u32) -> Arc<Self> {
        let count = count.max(1) as usize;
        let waiting = std::array::from_fn(|_| VecDeque::new());
        let for_others = (count - count / 4).min((count - 1).max(1));
        let state = State { free: count as isize, others: 0, held: HashMap::new(), waiting };
        Arc::new(Self { state: Mutex::new(state), for_others })
    }

    /// Waits for a slot. Dropping the future gives the wait up.
    pub async fn get(self: &Arc<Self>, party: Party, purpose: Purpose) -> Slot {
        let slot = || Slot { slots: Some(self.clone()), party, purpose };
        let waits = {
            let mut state = self.state.lock();
            if self.give(&mut state, party, purpose) {
                return slot();
            }
            let (send, waits) = oneshot::channel();
            state.waiting[purpose as usize].push_back(Waiter { party, send });
            waits
        };
        // The sender stays in the queue until it is used, so receiving does not fail.
        waits.await.unwrap_or_else(|_| slot())
    }

    fn give(&self, state: &mut State, party: Party, purpose: Purpose) -> bool {
        let demand = purpose == Purpose::Demand;
        let is_first = demand && !state.held.contains_key(&party);
        let is_free = state.free > 0 && (demand || state.others < self.for_others);
        if !is_first && !is_free {
            return false;
        }
        state.free -= 1;
        state.others += usize::from(!demand);
        *state.held.entry(party).or_default() += 1;
        true
    }

    /// The next waiter for this purpose: the first one of the party that holds the fewest slots.
    fn next(state: &State, purpose: Purpose) -> Option<usize> {
        let waiting = state.waiting[purpose as usize].iter().enumerate();
        let held = |waiter: &Waiter| state.held.get(&waiter.party).copied().unwrap_or(0);
        waiting.min_by_key(|(_, waiter)| held(waiter)).map(|(index, _)| index)
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
            if let Entry::Occupied(mut held) = state.held.entry(self.party) {
                *held.get_mut() -= 1;
                if *held.get() == 0 {
                    held.remove();
                }
            }
            for purpose in ORDER {
                state.waiting[purpose as usize].retain(|waiter| !waiter.send.is_closed());
                while let Some(index) = Slots::next(&state, purpose) {
                    let party = state.waiting[purpose as usize][index].party;
                    if !slots.give(&mut state, party, purpose) {
                        break;
                    }
                    let waiter = state.waiting[purpose as usize].remove(index);
                    passed_on.extend(waiter.map(|waiter| (waiter, purpose)));
                }
            }
        }
        // Without the lock: a slot whose waiter is gone is dropped here, and this function runs again.
        for (Waiter { party, send }, purpose) in passed_on {
            let _ = send.send(Slot { slots: Some(slots.clone()), party, purpose });
        }
    }
}

/// A limit in bytes per second.
pub(in crate::source) struct Rate {
    per_second: Option<u64>,
    /// When all bytes so far would have come at this rate.
    paid: Mutex<Instant>,
}

impl Rate {
    pub fn new(per_second: Option<u64>) -> Self {
        Self { per_second: per_second.filter(|rate| *rate > 0), paid: Mutex::new(Instant::now()) }
    }

    /// Waits until the rate allows `bytes` more.
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
