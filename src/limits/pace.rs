//! How fast the requests of one disk go: token buckets, and the requests that wait for their turn.
//!
//! A request passes when none of the buckets that it takes from is in debt. Reads and changes wait in queues of their
//! own, each in the order of arrival, and take turns where both may pass: a limit of writes delays no read.
//!
//! Several buckets are taken from together or not at all, and limits change while requests wait. So the buckets are
//! plain numbers under the lock of the queues, and no atomics. The holder of the lock waits for nothing.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::{Mutex, MutexGuard};

use super::bucket::Bucket;
use crate::format::limits::{Limits, Rates};

/// As [`Pace::surplus`], of all disks.
static EXCEEDED: AtomicU64 = AtomicU64::new(0);

/// Requests of all disks that passed a limit since the worker began, because too many waited.
pub fn exceeded() -> u64 {
    EXCEEDED.load(Ordering::Relaxed)
}

/// For how long a disk may save up what it does not use, when its limits do not say.
const DEFAULT_BURST: Duration = Duration::from_millis(100);
/// Shortest time between two looks at the requests that wait. What a bucket gets meanwhile is not lost.
const SHORTEST_WAIT: i64 = 1_000_000;

/// What a request takes of the buckets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cost {
    /// A read of so many bytes.
    Read(u64),
    /// A request that changes the disk, with so many bytes.
    Write(u64),
}

impl Cost {
    pub(super) fn side(self) -> usize {
        match self {
            Self::Read(_) => 0,
            Self::Write(_) => 1,
        }
    }

    fn bytes(self) -> u64 {
        match self {
            Self::Read(bytes) | Self::Write(bytes) => bytes,
        }
    }
}

/// A request that waits.
pub trait Turn: Send + Sync {
    /// Whether it was given up. It then takes no tokens.
    fn is_over(&self) -> bool;

    /// Its turn has come. Returns without waiting.
    fn come(self: Arc<Self>);
}

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entered {
    /// It passes.
    Passes,
    /// It waits. [`Pace::run_due`] is to be called at this time, if there is one.
    Waits(Option<i64>),
}

#[derive(Default)]
pub(super) struct State {
    /// Of all requests, reads, changes.
    iops: [Option<Bucket>; 3],
    bytes: [Option<Bucket>; 3],
    /// Of reads, of changes.
    pub(super) queues: [VecDeque<(Cost, Arc<dyn Turn>)>; 2],
    /// Whose turn it is when both may pass.
    next: usize,
    /// When `run_due` is to be called.
    pub(super) due: Option<i64>,
}

/// See the module.
#[derive(Default)]
pub struct Pace {
    is_limited: AtomicBool,
    /// Made at the first limit: most disks of a large store have none.
    state: OnceLock<Box<Mutex<State>>>,
    /// Requests that passed without tokens, because too many waited.
    surplus: AtomicU64,
}

impl State {
    fn buckets(&mut self, cost: Cost) -> impl Iterator<Item = (&mut Bucket, u64)> {
        let Self { iops, bytes, .. } = self;
        // The bucket of the other side.
        let other = 2 - cost.side();
        let requests = iops.iter_mut().enumerate().filter(move |(at, _)| *at != other);
        let requests = requests.filter_map(|(_, bucket)| Some((bucket.as_mut()?, 1)));
        let bytes = bytes.iter_mut().enumerate().filter(move |(at, _)| *at != other);
        requests.chain(bytes.filter_map(move |(_, bucket)| Some((bucket.as_mut()?, cost.bytes()))))
    }

    /// Nanoseconds until a request passes.
    fn wait(&mut self, cost: Cost, now: i64) -> i64 {
        let waits = self.buckets(cost).filter(|(_, tokens)| *tokens > 0).map(|(bucket, _)| bucket.wait(now));
        waits.max().unwrap_or(0)
    }

    fn take(&mut self, cost: Cost, now: i64) {
        self.buckets(cost).for_each(|(bucket, tokens)| bucket.take(tokens, now));
    }

    /// The request at the head of a queue, without those that were given up.
    fn head(&mut self, side: usize) -> Option<Cost> {
        let queue = &mut self.queues[side];
        while queue.front().is_some_and(|(_, turn)| turn.is_over()) {
            queue.pop_front();
        }
        queue.front().map(|(cost, _)| *cost)
    }

    /// Whether a new request passes. It overtakes none of its side, and takes no tokens away from one of the other side
    /// that could go now.
    fn may_pass(&mut self, cost: Cost, now: i64) -> bool {
        if self.head(cost.side()).is_some() || self.wait(cost, now) > 0 {
            return false;
        }
        let shares = self.iops[0].is_some() || self.bytes[0].is_some();
        let other = if shares { self.head(1 - cost.side()) } else { None };
        other.is_none_or(|other| self.wait(other, now) > 0)
    }

    /// When the next request that waits passes.
    fn next_due(&mut self, now: i64) -> Option<i64> {
        let waits = [0, 1].map(|side| self.head(side).map(|cost| self.wait(cost, now)));
        let wait = waits.into_iter().flatten().min()?;
        Some(now.saturating_add(wait.max(SHORTEST_WAIT)))
    }
}

impl Pace {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.get_or_init(Box::default).lock()
    }

    /// Whether the disk has limits of requests or bytes.
    pub fn is_limited(&self) -> bool {
        self.is_limited.load(Ordering::Relaxed)
    }

    /// Whether a request passes at once. It then has its tokens.
    pub fn passes(&self, cost: Cost, now: impl FnOnce() -> i64) -> bool {
        if !self.is_limited() {
            return true;
        }
        let mut state = self.state();
        let now = now();
        let passes = state.may_pass(cost, now);
        if passes {
            state.take(cost, now);
        }
        passes
    }

    /// Lets a request pass, or has it wait. `turn` makes the request that waits, with a place among all that wait; when
    /// there is no place, the request passes, and the disk is in debt for it.
    pub fn enter(
        &self,
        cost: Cost,
        now: impl FnOnce() -> i64,
        turn: impl FnOnce() -> Option<Arc<dyn Turn>>,
    ) -> Entered {
        let mut state = self.state();
        let now = now();
        if state.may_pass(cost, now) {
            state.take(cost, now);
            return Entered::Passes;
        }
        let Some(turn) = turn() else {
            state.take(cost, now);
            self.surplus.fetch_add(1, Ordering::Relaxed);
            EXCEEDED.fetch_add(1, Ordering::Relaxed);
            return Entered::Passes;
        };
        state.queues[cost.side()].push_back((cost, turn));
        let next = state.next_due(now);
        // A call that comes too early is harmless.
        match (state.due, next) {
            (Some(due), Some(next)) if due <= next => Entered::Waits(None),
            (_, next) => {
                state.due = next;
                Entered::Waits(next)
            }
        }
    }

    /// Takes the requests whose turn has come, and says when to call again. `at` is the time for which this call was
    /// planned; another call has taken its place when it is not the planned one any more. `None`: at any time.
    pub fn run_due(&self, at: Option<i64>, now: i64) -> (Vec<Arc<dyn Turn>>, Option<i64>) {
        let mut state = self.state();
        if at.is_some() && at != state.due {
            return (Vec::new(), None);
        }
        let mut ready = Vec::new();
        loop {
            let first = state.next;
            let able = [first, 1 - first].into_iter().find(|side| {
                let head = state.head(*side);
                head.is_some_and(|cost| state.wait(cost, now) == 0)
            });
            let Some(side) = able else { break };
            if let Some((cost, turn)) = state.queues[side].pop_front() {
                state.take(cost, now);
                ready.push(turn);
            }
            state.next = 1 - side;
        }
        state.due = state.next_due(now);
        (ready, state.due)
    }

    /// Takes all requests that wait, without tokens: the worker is about to end.
    pub fn take_all(&self) -> Vec<Arc<dyn Turn>> {
        let Some(state) = self.state.get() else { return Vec::new() };
        let mut state = state.lock();
        state.due = None;
        state.queues.iter_mut().flat_map(std::mem::take).map(|(_, turn)| turn).collect()
    }

    /// Puts other limits in force. The caller calls [`run_due`](Self::run_due) then.
    pub fn set(&self, limits: &Limits, now: i64) {
        if limits.iops.is_none() && limits.bandwidth.is_none() && self.state.get().is_none() {
            return;
        }
        let burst = limits.burst_ms.map_or(DEFAULT_BURST, |ms| Duration::from_millis(ms.into()));
        let burst_ns = i64::try_from(burst.as_nanos()).unwrap_or(i64::MAX);
        let set = |buckets: &mut [Option<Bucket>; 3], rates: &Rates| {
            for (bucket, rate) in buckets.iter_mut().zip(rates.each()) {
                *bucket = rate.map(|rate| match bucket.take() {
                    Some(bucket) => bucket.changed(rate, burst_ns, now),
                    None => Bucket::full(rate, burst_ns, now),
                });
            }
        };
        let mut state = self.state();
        set(&mut state.iops, &limits.iops);
        set(&mut state.bytes, &limits.bandwidth);
        self.is_limited.store(!limits.iops.is_none() || !limits.bandwidth.is_none(), Ordering::Relaxed);
    }

    /// Requests that wait for their turn now.
    pub fn waiting(&self) -> usize {
        let Some(state) = self.state.get() else { return 0 };
        let state = state.lock();
        state.queues.iter().flatten().filter(|(_, turn)| !turn.is_over()).count()
    }

    /// Requests that passed without tokens since the worker began, because too many waited.
    pub fn surplus(&self) -> u64 {
        self.surplus.load(Ordering::Relaxed)
    }
}
