//! Requests that wait for the bytes of a base: how many there may be, and which one a signal ends.
//!
//! What must hold:
//! - Requests and their bytes are bounded for each disk and in all. A disk may have as much as is left for all others
//!   together, at most its own bound. So a disk that takes all it can get leaves room for those that come later, and
//!   the kernel's window of asynchronous requests is never full of requests that wait (D29).
//! - A request that a signal interrupts while it waits ends with EINTR within [`GRACE`]. One that is answered before is
//!   not touched: a signal that is not fatal shows only where a base's source has been silent for longer (D60).
//! - A request whose process is ending ends in the same way ([`callers`](super::callers)).
//! - What is known of a request goes with its answer.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::callers::{Callers, Lookup};
use super::{Errno, Target};

/// How long a request that was interrupted may still be answered. A signal that does not kill is common (profilers,
/// timers, job control), and a read of a regular file does not fail with EINTR where its bytes are about to come.
const GRACE: Duration = Duration::from_millis(200);
/// Interrupts that are remembered of requests that do not wait: those on their way to it, and those that were answered
/// at the same moment (D61).
const REMEMBERED: usize = 16 << 10;

/// How much may wait.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Requests, in all.
    pub requests: usize,
    /// Requests of one disk. Far more than a guest's queues hold.
    pub of_disk: usize,
    /// Bytes of writes, in all.
    pub bytes: usize,
    /// Bytes of writes of one disk.
    pub bytes_of_disk: usize,
    /// Requests that each disk may have whatever the others have: many disks that boot at once are no attack.
    pub floor: usize,
}

/// Bytes that each disk may have whatever the others have.
const FLOOR_BYTES: usize = 256 << 10;

impl Limits {
    /// For a mount whose kernel side has at most `window` asynchronous requests under way.
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

/// What waits now, and what became of others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Waiters {
    /// Requests that wait.
    pub requests: usize,
    /// Bytes of writes that wait.
    pub bytes: usize,
    /// Requests that wait and whose process is known: they end when it is killed.
    pub watched: usize,
    /// Requests that were refused since the worker began, because too many waited.
    pub refused: u64,
    /// Requests that were ended by a signal, or with their process.
    pub interrupted: u64,
}

/// A request, and the thread that made it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Call {
    /// The request's number, which an interrupt names.
    pub unique: u64,
    /// In the pid namespace of the mount; 0 when it is not seen from there, or may be gone by now.
    pub thread: u32,
}

/// A request that can be ended from outside.
pub(super) trait Cancel: Send + Sync {
    /// Ends it; false when it cannot be ended now.
    fn cancel(&self, errno: Errno) -> bool;
}

#[derive(Default, Clone, Copy)]
struct Held {
    requests: usize,
    bytes: usize,
}

#[derive(Default)]
struct State {
    held: HashMap<Target, Held>,
    all: Held,
    requests: HashMap<u64, Weak<dyn Cancel>>,
    /// Interrupted, and not among `requests`.
    early: HashSet<u64>,
    early_order: VecDeque<u64>,
    /// Interrupted, and to be ended then.
    due: VecDeque<(Instant, u64)>,
    callers: Callers,
    closed: bool,
}

/// See the module.
pub(super) struct Waiting {
    limits: Limits,
    state: Mutex<State>,
    interrupts: Condvar,
    /// A request came that a question may be about.
    came: Condvar,
    refused: AtomicU64,
    interrupted: AtomicU64,
}

/// A place among those that wait.
pub(super) struct Ticket {
    table: Arc<Waiting>,
    target: Target,
    bytes: usize,
    unique: u64,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.table.state.lock();
        let state = &mut *state;
        state.all.requests -= 1;
        state.all.bytes -= self.bytes;
        if let Some(held) = state.held.get_mut(&self.target) {
            held.requests -= 1;
            held.bytes -= self.bytes;
            if held.requests == 0 {
                state.held.remove(&self.target);
            }
        }
        state.requests.remove(&self.unique);
        state.callers.remove(self.unique);
    }
}

impl Waiting {
    /// With a thread that ends interrupted requests.
    ///
    /// # Errors
    /// When there is no thread.
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

    /// A place for a request on a disk or base with `bytes` of a write; none when too many wait.
    pub fn admit(
        self: &Arc<Self>,
        target: Target,
        bytes: usize,
        call: Call,
        request: Weak<dyn Cancel>,
    ) -> Option<Ticket> {
        let unique = call.unique;
        let mut state = self.state.lock();
        let Held { requests, bytes: all_bytes } = state.all;
        let held = state.held.get(&target).copied().unwrap_or_default();
        let left = self.limits.requests.saturating_sub(requests);
        let left_bytes = self.limits.bytes.saturating_sub(all_bytes);
        let fits = held.requests < self.limits.of_disk.min(left).max(self.limits.floor)
            && held.bytes + bytes <= self.limits.bytes_of_disk.min(left_bytes).max(FLOOR_BYTES);
        if !fits {
            drop(state);
            self.refused.fetch_add(1, Ordering::Relaxed);
            return None;
        }
        let held = Held { requests: held.requests + 1, bytes: held.bytes + bytes };
        state.held.insert(target, held);
        state.all = Held { requests: requests + 1, bytes: all_bytes + bytes };
        state.requests.insert(unique, request);
        if state.callers.add(unique, call.thread, Instant::now()) {
            self.came.notify_one();
        }
        if state.early.remove(&unique) {
            state.due.push_back((Instant::now() + GRACE, unique));
            self.interrupts.notify_one();
        }
        Some(Ticket { table: self.clone(), target, bytes, unique })
    }

    /// A request that has its place goes on waiting after a try that could not be ended.
    pub fn waits_again(&self, unique: u64) {
        let mut state = self.state.lock();
        if state.early.remove(&unique) {
            state.due.push_back((Instant::now() + GRACE, unique));
            self.interrupts.notify_one();
        }
    }

    /// The kernel says that the caller of a request got a signal.
    pub fn interrupt(&self, unique: u64) {
        let mut state = self.state.lock();
        if state.requests.contains_key(&unique) {
            state.due.push_back((Instant::now() + GRACE, unique));
            self.interrupts.notify_one();
        } else {
            state.remember(unique);
        }
    }

    /// What waits now.
    pub fn counts(&self) -> Waiters {
        let (Held { requests, bytes }, watched) = {
            let state = self.state.lock();
            (state.all, state.callers.identified())
        };
        let (refused, interrupted) =
            (self.refused.load(Ordering::Relaxed), self.interrupted.load(Ordering::Relaxed));
        Waiters { requests, bytes, watched, refused, interrupted }
    }

    /// Ends the thread.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.interrupts.notify_one();
        self.came.notify_one();
    }

    fn end_those_due(&self) {
        let mut state = self.state.lock();
        while !state.closed {
            let Some((at, unique)) = state.due.front().copied() else {
                self.interrupts.wait(&mut state);
                continue;
            };
            if at > Instant::now() {
                self.interrupts.wait_until(&mut state, at);
                continue;
            }
            state.due.pop_front();
            self.end(&mut state, unique);
        }
    }

    /// Ends a request that waits, as a signal does.
    fn end(&self, state: &mut MutexGuard<'_, State>, unique: u64) {
        let Some(request) = state.requests.get(&unique).and_then(Weak::upgrade) else { return };
        // Without the lock: the answer gives the ticket back.
        MutexGuard::unlocked(state, || {
            // Counted first: the caller may look as soon as it is answered.
            self.interrupted.fetch_add(1, Ordering::Relaxed);
            if !request.cancel(Errno::EINTR) {
                self.interrupted.fetch_sub(1, Ordering::Relaxed);
                // It runs; should it have to wait again, it ends then.
                self.state.lock().remember(unique);
            }
            drop(request);
        });
    }

    /// From now on the processes of requests that wait are looked at, on a thread of its own, and requests of those that
    /// are ending end with EINTR.
    ///
    /// # Errors
    /// When there is no thread.
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
            let Some(question) = callers.question(now, |unique| requests.contains_key(&unique)) else {
                continue;
            };
            let findings = MutexGuard::unlocked(&mut state, || lookup(&question));
            let State { callers, requests, .. } = &mut *state;
            for unique in
                callers.take_answer(&question, now, findings, |unique| requests.contains_key(&unique))
            {
                self.end(&mut state, unique);
            }
        }
    }
}

impl State {
    fn remember(&mut self, unique: u64) {
        if self.early.insert(unique) {
            self.early_order.push_back(unique);
        }
        while self.early_order.len() > REMEMBERED {
            if let Some(oldest) = self.early_order.pop_front() {
                self.early.remove(&oldest);
            }
        }
    }
}
