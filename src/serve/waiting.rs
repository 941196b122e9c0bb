//! Requests that wait, for the bytes of a base or for their turn under a limit: how many may wait, and which ones a
//! signal ends.
//!
//! What must hold:
//! - Requests and their bytes are bounded for each disk and in all. A disk may have at most as much as is left for all
//!   others together, and at most its own bound. So a disk that takes all it can get leaves room for later disks, and
//!   waiting requests never fill the kernel's window of asynchronous requests (D29).
//! - A request that a signal interrupts while it waits ends with EINTR after [`GRACE`]. A request that is answered
//!   before is not affected: a signal that is not fatal shows only when a base's source is silent for longer (D60).
//! - A request whose process is ending ends in the same way ([`callers`](super::callers)).
//! - The answer of a request removes all state of the request here.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::callers::{Callers, Lookup};
use super::pool::queued_bytes_limit;
use super::{Errno, RequestId, Target};

/// How long an interrupted request may still be answered. Signals that do not kill are common (profilers, timers, job
/// control), and a read of a regular file must not fail with EINTR when its bytes are about to come.
const GRACE: Duration = Duration::from_millis(200);
/// Most remembered interrupts of requests that do not wait: requests that are about to wait, and requests that were
/// answered at the same moment (D61).
const REMEMBERED: usize = 16 << 10;

/// Limits of the requests that wait.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Requests in all.
    pub requests: usize,
    /// Requests of one disk. Far more than a guest's queues hold.
    pub of_disk: usize,
    /// Bytes of writes in all.
    pub bytes: usize,
    /// Bytes of writes of one disk.
    pub bytes_of_disk: usize,
    /// Requests that each disk may always have, so that many disks can boot at once.
    pub floor: usize,
}

/// What a request waits for. Each has bounds of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Purpose {
    /// Bytes of a base.
    Bytes,
    /// Its turn under the limits of its disk. All of these take at most half of the room for requests, and leave the rest
    /// to those that wait for bytes (D85).
    Turn,
}

/// Bytes of writes that each disk may always have.
const FLOOR_BYTES: usize = 256 << 10;
/// The same for writes that wait for their turn.
const TURN_FLOOR_BYTES: usize = 4 << 20;

impl Limits {
    /// For a mount whose kernel has at most `window` asynchronous requests in flight.
    pub fn of_window(window: u16) -> Self {
        Self {
            requests: usize::from(window) / 4 * 3,
            of_disk: 16 << 10,
            bytes: 256 << 20,
            bytes_of_disk: 64 << 20,
            floor: 64,
        }
    }
}

/// Counters of waiting requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Waiters {
    /// Requests that wait.
    pub requests: usize,
    /// Bytes of writes that wait.
    pub bytes: usize,
    /// Requests that wait and whose process is known, so that they end with it.
    pub watched: usize,
    /// Requests that were refused since the start of the worker, because too many waited.
    pub refused: u64,
    /// Requests that ended by a signal or with their process.
    pub interrupted: u64,
    /// Requests that wait for their turn under the limits of their disks, and the bytes of their writes.
    pub throttled: usize,
    pub throttled_bytes: usize,
}

/// A request, and the thread that made it.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// The request, as an interrupt names it.
    pub request: RequestId,
    /// Number of the thread in the pid namespace of the mount. 0 when the thread is not visible there, may be gone, or
    /// uses a frontend that is no mount.
    pub thread: u32,
}

/// A request that can be cancelled while it waits.
pub(super) trait Cancel: Send + Sync {
    /// Answers the request with `errno`. Returns false when it cannot be cancelled now.
    fn cancel(&self, errno: Errno) -> bool;
}

#[derive(Default, Clone, Copy)]
struct Held {
    requests: usize,
    bytes: usize,
}

#[derive(Default)]
struct State {
    held: HashMap<(Purpose, Target), Held>,
    /// By purpose.
    all: [Held; 2],
    requests: HashMap<RequestId, Weak<dyn Cancel>>,
    /// Interrupted requests that are not in `requests`.
    early: HashSet<RequestId>,
    early_order: VecDeque<RequestId>,
    /// Interrupted requests, and when to end them.
    due: VecDeque<(Instant, RequestId)>,
    callers: Callers,
    closed: bool,
}

/// See the module.
pub(super) struct Waiting {
    limits: Limits,
    state: Mutex<State>,
    interrupts: Condvar,
    /// Signalled when a request came whose process may be looked up.
    came: Condvar,
    refused: AtomicU64,
    interrupted: AtomicU64,
}

/// The place of a request among those that wait. Dropping it gives the place back.
pub(super) struct Ticket {
    table: Arc<Waiting>,
    purpose: Purpose,
    target: Target,
    bytes: usize,
    request: RequestId,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.table.state.lock();
        let state = &mut *state;
        let all = &mut state.all[self.purpose as usize];
        all.requests -= 1;
        all.bytes -= self.bytes;
        let key = (self.purpose, self.target);
        if let Some(held) = state.held.get_mut(&key) {
            held.requests -= 1;
            held.bytes -= self.bytes;
            if held.requests == 0 {
                state.held.remove(&key);
            }
        }
        state.requests.remove(&self.request);
        state.callers.remove(self.request);
    }
}

impl Waiting {
    /// Starts the thread that ends interrupted requests.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn new(limits: Limits) -> std::io::Result<Arc<Self>> {
        let table = Arc::new(Self {
            limits,
            state: Mutex::default(),
            interrupts: Condvar::new(),
            came: Condvar::new(),
            refused: AtomicU64::new(0),
            interrupted: AtomicU64::new(0),
        });
        let ending = table.clone();
        std::thread::Builder::new().name("interrupts".into()).spawn(move || ending.end_those_due())?;
        Ok(table)
    }

    /// Gives a request on a disk or base, with `bytes` of a write, a place; none when too many wait.
    pub fn admit(
        self: &Arc<Self>,
        target: Target,
        bytes: usize,
        call: Call,
        cancel: Weak<dyn Cancel>,
    ) -> Option<Ticket> {
        let ticket = self.admit_for(Purpose::Bytes, target, bytes, call, cancel);
        if ticket.is_none() {
            self.refused.fetch_add(1, Ordering::Relaxed);
        }
        ticket
    }

    /// As [`admit`](Self::admit), for any purpose. A request without a place for its turn is not refused.
    pub fn admit_for(
        self: &Arc<Self>,
        purpose: Purpose,
        target: Target,
        bytes: usize,
        call: Call,
        cancel: Weak<dyn Cancel>,
    ) -> Option<Ticket> {
        let request = call.request;
        let mut state = self.state.lock();
        let key = (purpose, target);
        let held = state.held.get(&key).copied().unwrap_or_default();
        let waiting: usize = state.all.iter().map(|all| all.requests).sum();
        let Limits { requests, of_disk, bytes: all_bytes, bytes_of_disk, floor } = self.limits;
        let (requests, all_bytes, bytes_of_disk, floor_bytes) = match purpose {
            Purpose::Bytes => (requests, all_bytes, bytes_of_disk, FLOOR_BYTES),
            Purpose::Turn => (requests / 2, queued_bytes_limit(), usize::MAX, TURN_FLOOR_BYTES),
        };
        let left = requests.saturating_sub(waiting);
        let left_bytes = all_bytes.saturating_sub(state.all[purpose as usize].bytes);
        let fits = held.requests < of_disk.min(left).max(floor)
            && held.bytes + bytes <= bytes_of_disk.min(left_bytes).max(floor_bytes);
        if !fits {
            return None;
        }
        state.held.insert(key, Held { requests: held.requests + 1, bytes: held.bytes + bytes });
        let all = &mut state.all[purpose as usize];
        *all = Held { requests: all.requests + 1, bytes: all.bytes + bytes };
        state.requests.insert(request, cancel);
        if state.callers.add(request, call.thread, Instant::now()) {
            self.came.notify_one();
        }
        if state.early.remove(&request) {
            state.due.push_back((Instant::now() + GRACE, request));
            self.interrupts.notify_one();
        }
        Some(Ticket { table: self.clone(), purpose, target, bytes, request })
    }

    /// A request with a place waits again after an attempt that could not be cancelled.
    pub fn waits_again(&self, request: RequestId) {
        let mut state = self.state.lock();
        if state.early.remove(&request) {
            state.due.push_back((Instant::now() + GRACE, request));
            self.interrupts.notify_one();
        }
    }

    /// The caller of a request got a signal.
    pub fn interrupt(&self, request: RequestId) {
        let mut state = self.state.lock();
        if state.requests.contains_key(&request) {
            state.due.push_back((Instant::now() + GRACE, request));
            self.interrupts.notify_one();
        } else {
            state.remember(request);
        }
    }

    /// The present counters.
    pub fn counts(&self) -> Waiters {
        let ([Held { requests, bytes }, turns], watched) = {
            let state = self.state.lock();
            (state.all, state.callers.identified())
        };
        let Held { requests: throttled, bytes: throttled_bytes } = turns;
        let (refused, interrupted) =
            (self.refused.load(Ordering::Relaxed), self.interrupted.load(Ordering::Relaxed));
        Waiters { requests, bytes, watched, refused, interrupted, throttled, throttled_bytes }
    }

    /// Ends the threads.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.interrupts.notify_one();
        self.came.notify_one();
    }

    fn end_those_due(&self) {
        let mut state = self.state.lock();
        while !state.closed {
            let Some((at, request)) = state.due.front().copied() else {
                self.interrupts.wait(&mut state);
                continue;
            };
            if at > Instant::now() {
                self.interrupts.wait_until(&mut state, at);
                continue;
            }
            state.due.pop_front();
            self.end(&mut state, request);
        }
    }

    /// Ends a waiting request with EINTR.
    fn end(&self, state: &mut MutexGuard<'_, State>, request: RequestId) {
        let Some(cancel) = state.requests.get(&request).and_then(Weak::upgrade) else { return };
        // Without the lock: the answer drops the ticket, which takes it.
        MutexGuard::unlocked(state, || {
            // Counted first: the caller may read the counters as soon as it has the answer.
            self.interrupted.fetch_add(1, Ordering::Relaxed);
            if !cancel.cancel(Errno::EINTR) {
                self.interrupted.fetch_sub(1, Ordering::Relaxed);
                // It runs now. If it waits again, it ends then.
                self.state.lock().remember(request);
            }
            drop(cancel);
        });
    }

    /// Starts a thread that watches the processes of waiting requests. Requests of a process that is ending end with
    /// EINTR.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn watch(self: &Arc<Self>, lookup: Lookup) -> std::io::Result<()> {
        self.state.lock().callers.watched = true;
        let watching = self.clone();
        let watch = move || watching.end_those_of_the_dying(&lookup);
        std::thread::Builder::new().name("callers".into()).spawn(watch).map(drop)
    }

    fn end_those_of_the_dying(&self, lookup: &Lookup) {
        let mut state = self.state.lock();
        while !state.closed {
            let now = Instant::now();
            match state.callers.due(now) {
                None => {
                    self.came.wait(&mut state);
                    continue;
                }
                Some(at) if at > now => {
                    self.came.wait_until(&mut state, at);
                    continue;
                }
                Some(_) => {}
            }
            let State { callers, requests, .. } = &mut *state;
            let Some(question) = callers.question(now, |request| requests.contains_key(&request)) else {
                continue;
            };
            let findings = MutexGuard::unlocked(&mut state, || lookup(&question));
            let State { callers, requests, .. } = &mut *state;
            for request in
                callers.take_answer(&question, now, findings, |request| requests.contains_key(&request))
            {
                self.end(&mut state, request);
            }
        }
    }
}

impl State {
    fn remember(&mut self, request: RequestId) {
        if self.early.insert(request) {
            self.early_order.push_back(request);
        }
        while self.early_order.len() > REMEMBERED {
            if let Some(oldest) = self.early_order.pop_front() {
                self.early.remove(&oldest);
            }
        }
    }
}
