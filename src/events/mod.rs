//! Events of bases, caches and disks, for clients that follow them.
//!
//! There are two kinds. **Traffic** (bytes found in a cache, fetched, evicted) happens hundreds of thousands of times a
//! second. It is counted exactly, and once a second [`Events::tick`] emits one event for each base and reason whose
//! counter grew, with the growth since the last one. Everything else is emitted as it happens ([`Events::emit`]).
//!
//! What must hold:
//! - Emitting and counting never wait for a listener: a slow listener loses the oldest events of its queue and is told
//!   how many. Counting takes no lock. Emitting takes one short lock, under which it makes no system call (D23).
//! - Memory is bounded by the length of the rings and queues, the number of listeners, and the length of a reason.
//! - For each base and reason, the bytes of all events and the bytes that no tick has emitted yet add up to the
//!   counter.

#[cfg(test)]
mod tests;
mod traffic;

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::{Condvar, Mutex};

pub use traffic::{Reason, Total, Totals, Traffic};

/// Recent events of each of the two kinds that are kept for later listeners.
pub const RECENT: usize = 512;
/// Events that wait for one listener before the oldest is lost.
pub const QUEUE: usize = 1024;
/// Most listeners at a time.
pub const LISTENERS: usize = 64;
/// How long a worker that is told to end waits for listeners to receive and deliver their last events.
pub const LAST_DELIVERIES: Duration = Duration::from_secs(2);
/// The same while guests wait for the end.
pub const HURRIED_DELIVERIES: Duration = Duration::from_millis(250);
/// Most bytes of a reason.
const LONGEST_REASON: usize = 512;

/// The kind of an event. The names are part of the interface: docs/semantics.md, "Events".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A worker began to serve. This is its first event.
    WorkerStarted,
    /// Requested bytes of a base were in a cache.
    BaseHit,
    /// Bytes of a base were fetched from its source.
    BaseMiss,
    /// Bytes of a base left a cache.
    BaseEvict,
    /// The source of a base failed.
    BaseError,
    /// The source of a base has another object than the registered one.
    BaseChanged,
    /// Reads of a base wait for its server.
    BaseWaiting,
    /// Reads of a base no longer wait for its server.
    BaseResumed,
    /// All of a base is in the store, and its digest matches.
    BaseHydrated,
    /// A base that nothing needed was removed.
    BaseRemoved,
    /// The persistent cache does not keep fetched blocks.
    CacheDegraded,
    /// The persistent cache keeps fetched blocks again.
    CacheRecovered,
    /// A trace was recorded.
    TraceRecorded,
    /// A disk has no room in its quota for what its client wrote.
    DiskFull,
    /// A disk has room in its quota again.
    DiskRoom,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 15] = [
        Self::WorkerStarted,
        Self::BaseHit,
        Self::BaseMiss,
        Self::BaseEvict,
        Self::BaseError,
        Self::BaseChanged,
        Self::BaseWaiting,
        Self::BaseResumed,
        Self::BaseHydrated,
        Self::BaseRemoved,
        Self::CacheDegraded,
        Self::CacheRecovered,
        Self::TraceRecorded,
        Self::DiskFull,
        Self::DiskRoom,
    ];

    /// Its name for users.
    pub fn name(self) -> &'static str {
        match self {
            Self::WorkerStarted => "worker.started",
            Self::BaseHit => "base.hit",
            Self::BaseMiss => "base.miss",
            Self::BaseEvict => "base.evict",
            Self::BaseError => "base.error",
            Self::BaseChanged => "base.changed",
            Self::BaseWaiting => "base.waiting",
            Self::BaseResumed => "base.resumed",
            Self::BaseHydrated => "base.hydrated",
            Self::BaseRemoved => "base.removed",
            Self::CacheDegraded => "cache.degraded",
            Self::CacheRecovered => "cache.recovered",
            Self::TraceRecorded => "trace.recorded",
            Self::DiskFull => "disk.full",
            Self::DiskRoom => "disk.room",
        }
    }

    /// Whether it is traffic, which is counted and emitted once a second.
    fn is_traffic(self) -> bool {
        matches!(self, Self::BaseHit | Self::BaseMiss | Self::BaseEvict)
    }
}

/// An event. Fields that are not known or do not apply to the kind are `None`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its kind.
    pub kind: Kind,
    /// Name of the base.
    pub base: Option<Arc<str>>,
    /// Name of the disk.
    pub disk: Option<Arc<str>>,
    /// Bytes of the base.
    pub bytes: Option<u64>,
    /// The number of pieces.
    pub count: Option<u64>,
    /// The reason, without secrets: a word for traffic, a sentence for other events.
    pub reason: Option<Cow<'static, str>>,
    /// When the condition began, for an event about a condition that lasts; nanoseconds since the epoch.
    pub since_ns: Option<i64>,
}

impl Event {
    /// An event that is not about a base.
    pub fn new(kind: Kind) -> Self {
        Self { kind, base: None, disk: None, bytes: None, count: None, reason: None, since_ns: None }
    }

    /// That a worker began to serve. `cut_off` says why the worker before it ended without having delivered its last
    /// events.
    pub fn worker_started(cut_off: Option<&str>) -> Self {
        let event = Self::new(Kind::WorkerStarted);
        match cut_off {
            Some(why) => {
                event.because(format!("the worker before it ended ({why}): its last events may be missing"))
            }
            None => event,
        }
    }

    /// An event about the base of that name.
    pub fn of_base(kind: Kind, base: &str) -> Self {
        Self { base: Some(base.into()), ..Self::new(kind) }
    }

    /// An event about the disk of that name.
    pub fn of_disk(kind: Kind, disk: &str) -> Self {
        Self { disk: Some(disk.into()), ..Self::new(kind) }
    }

    /// With a reason, which is cut to `LONGEST_REASON` bytes and an ellipsis.
    #[must_use]
    pub fn because(self, reason: impl Into<Cow<'static, str>>) -> Self {
        let reason = reason.into();
        let reason = match reason.len() > LONGEST_REASON {
            true => {
                let cut = (0..=LONGEST_REASON).rev().find(|at| reason.is_char_boundary(*at)).unwrap_or(0);
                format!("{}...", &reason[..cut]).into()
            }
            false => reason,
        };
        Self { reason: Some(reason), ..self }
    }

    /// With a number of bytes.
    #[must_use]
    pub fn bytes(self, bytes: u64) -> Self {
        Self { bytes: Some(bytes), ..self }
    }

    /// With a number of pieces.
    #[must_use]
    pub fn count(self, count: u64) -> Self {
        Self { count: Some(count), ..self }
    }

    /// With the time when the condition began.
    #[must_use]
    pub fn since(self, since: SystemTime) -> Self {
        Self { since_ns: Some(nanoseconds(since)), ..self }
    }
}

fn nanoseconds(at: SystemTime) -> i64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
}

/// An emitted event with its number and time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The number of the event. The events of this worker are numbered from 1.
    pub number: u64,
    /// When it was emitted; nanoseconds since the epoch.
    pub at_ns: i64,
    /// The event.
    pub event: Event,
}

/// What a listener receives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// An event.
    Event(Arc<Record>),
    /// This number of events is missing here, because the listener did not keep up.
    Lost(u64),
}

/// The event bus. Clones share it.
#[derive(Clone, Default)]
pub struct Events(Arc<Shared>);

#[derive(Default)]
struct Shared {
    bus: Mutex<Bus>,
    /// The last listener has gone.
    alone: Condvar,
    bases: Mutex<Bases>,
}

#[derive(Default)]
struct Bases {
    known: BTreeMap<u64, Arc<Traffic>>,
    /// Of the removed bases that were summed up.
    removed: Totals,
}

#[derive(Default)]
struct Bus {
    /// Number of the last event.
    last: u64,
    /// The recent events of traffic. They have a ring of their own, because they would displace the rare other events.
    traffic: VecDeque<Arc<Record>>,
    others: VecDeque<Arc<Record>>,
    listeners: Vec<Queue>,
    last_listener: u64,
    lost: u64,
    of_kind: [u64; Kind::ALL.len()],
    closed: bool,
}

struct Queue {
    listener: u64,
    events: VecDeque<Arc<Record>>,
    lost: u64,
    waker: Option<Waker>,
}

/// The counters of the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusState {
    /// Events so far.
    pub emitted: u64,
    /// Events that listeners lost so far. An event that two listeners lost counts twice.
    pub lost: u64,
    /// Listeners now.
    pub listeners: usize,
    /// Events so far, by kind.
    pub of_kind: [u64; Kind::ALL.len()],
}

impl Events {
    /// A new bus without events.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sends an event to all listeners, without waiting for them.
    pub fn emit(&self, event: Event) {
        let at_ns = nanoseconds(SystemTime::now());
        let mut wakers = Vec::new();
        {
            let mut bus = self.0.bus.lock();
            bus.last += 1;
            bus.of_kind[event.kind as usize] += 1;
            let record = Arc::new(Record { number: bus.last, at_ns, event });
            let ring = if record.event.kind.is_traffic() { &mut bus.traffic } else { &mut bus.others };
            if ring.len() == RECENT {
                ring.pop_front();
            }
            ring.push_back(record.clone());
            let mut lost = 0;
            for queue in &mut bus.listeners {
                if queue.events.len() == QUEUE {
                    queue.events.pop_front();
                    queue.lost += 1;
                    lost += 1;
                }
                queue.events.push_back(record.clone());
                wakers.extend(queue.waker.take());
            }
            bus.lost += lost;
        }
        // After the lock is released, because a waker may run any code.
        wakers.into_iter().for_each(Waker::wake);
    }

    /// The counters of a base. Calls with the same number return the same counters, with the name of the first call.
    pub fn base(&self, number: u64, name: &str) -> Arc<Traffic> {
        self.0.bases.lock().known.entry(number).or_insert_with(|| Arc::new(Traffic::new(name))).clone()
    }

    /// The counters of all bases, by number.
    pub fn bases(&self) -> Vec<(u64, Arc<Traffic>)> {
        self.0.bases.lock().known.iter().map(|(number, traffic)| (*number, traffic.clone())).collect()
    }

    /// Drops the counters of a removed base, after it has emitted their last growth.
    pub fn forget(&self, number: u64) {
        let removed = {
            let mut bases = self.0.bases.lock();
            let removed = bases.known.remove(&number);
            if let Some(traffic) = removed.as_ref().filter(|traffic| traffic.is_summed_up()) {
                traffic.add_to(&mut bases.removed);
            }
            removed
        };
        if let Some(traffic) = removed {
            traffic.emit_growth(|event| self.emit(event));
        }
    }

    /// The counters of all bases that were summed up ([`Traffic::sum_up`]), by reason. A removed base stays in the sum.
    pub fn summed_up(&self) -> Totals {
        let bases = self.0.bases.lock();
        let mut sum = bases.removed;
        bases
            .known
            .values()
            .filter(|traffic| traffic.is_summed_up())
            .for_each(|traffic| traffic.add_to(&mut sum));
        sum
    }

    /// Emits the growth of the counters since the last tick. One thread calls it once a second. It emits nothing when
    /// no counter grew.
    pub fn tick(&self) {
        for (_, traffic) in self.bases() {
            traffic.emit_growth(|event| self.emit(event));
        }
    }

    /// The recent events whose number is above `after`, oldest first: the last [`RECENT`] of traffic and the last
    /// [`RECENT`] others. So numbers may be missing.
    pub fn recent(&self, after: u64) -> Vec<Arc<Record>> {
        self.0.bus.lock().recent(after)
    }

    /// A listener for all events from now on. When `after` is a number, it receives [`recent`](Self::recent) events
    /// first. `None` when there are [`LISTENERS`] already.
    pub fn listen(&self, after: Option<u64>) -> Option<Listener> {
        let mut bus = self.0.bus.lock();
        if bus.listeners.len() >= LISTENERS {
            return None;
        }
        bus.last_listener += 1;
        let listener = bus.last_listener;
        let mut events: VecDeque<_> = after.map(|after| bus.recent(after)).unwrap_or_default().into();
        let surplus = events.len().saturating_sub(QUEUE);
        events.drain(..surplus);
        bus.listeners.push(Queue { listener, events, lost: 0, waker: None });
        Some(Listener { shared: self.0.clone(), listener })
    }

    /// Ends the bus: each listener receives the events in its queue, the growth of the counters since the last tick, and
    /// then the end.
    pub fn close(&self) {
        self.tick();
        let wakers: Vec<_> = {
            let mut bus = self.0.bus.lock();
            bus.closed = true;
            bus.listeners.iter_mut().filter_map(|queue| queue.waker.take()).collect()
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Waits until no listener is left, until `end` at most. A listener of a closed bus goes when it has delivered its last
    /// events.
    pub fn wait_for_listeners(&self, end: Instant) {
        let mut bus = self.0.bus.lock();
        while !bus.listeners.is_empty() {
            if self.0.alone.wait_until(&mut bus, end).timed_out() {
                return;
            }
        }
    }

    /// Ends the bus with its worker: [`close`](Self::close), and waits for [`LAST_DELIVERIES`] at most.
    pub fn finish(&self) {
        self.close();
        self.wait_for_listeners(Instant::now() + LAST_DELIVERIES);
    }

    /// The counters for `status`.
    pub fn state(&self) -> BusState {
        let bus = self.0.bus.lock();
        let Bus { last, lost, of_kind, .. } = *bus;
        BusState { emitted: last, lost, listeners: bus.listeners.len(), of_kind }
    }
}

impl Bus {
    fn recent(&self, after: u64) -> Vec<Arc<Record>> {
        let both = self.traffic.iter().chain(&self.others);
        let mut out: Vec<_> = both.filter(|record| record.number > after).cloned().collect();
        out.sort_by_key(|record| record.number);
        out
    }
}

/// A listener of events. Dropping it removes it from the bus.
pub struct Listener {
    shared: Arc<Shared>,
    listener: u64,
}

impl Listener {
    /// Polls for the next delivery; `None` after the end of the bus.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Delivery>> {
        let mut bus = self.shared.bus.lock();
        let closed = bus.closed;
        let Some(queue) = bus.listeners.iter_mut().find(|queue| queue.listener == self.listener) else {
            return Poll::Ready(None);
        };
        if queue.lost > 0 {
            return Poll::Ready(Some(Delivery::Lost(std::mem::take(&mut queue.lost))));
        }
        match queue.events.pop_front() {
            Some(record) => Poll::Ready(Some(Delivery::Event(record))),
            None if closed => Poll::Ready(None),
            None => {
                queue.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let is_last = {
            let mut bus = self.shared.bus.lock();
            bus.listeners.retain(|queue| queue.listener != self.listener);
            bus.listeners.is_empty()
        };
        if is_last {
            self.shared.alone.notify_all();
        }
    }
}
