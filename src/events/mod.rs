//! What happens to bases and caches, for whoever wants to know while it happens.
//!
//! Two kinds of things are told. **Traffic** (bytes found in a cache, fetched, evicted) comes hundreds of thousands of
//! times a second: it is counted, exactly, and once a second [`Events::tick`] makes one event for each base and reason
//! that grew, with what was added since the last. Everything else is an event as it happens ([`Events::emit`]).
//!
//! What must hold:
//! - Whoever emits or counts never waits for whoever listens: a listener that is slow loses the oldest events of its
//!   queue and is told how many. Counting takes no lock, emitting one short lock that no system call is made under (D23).
//! - Memory is bounded: by the length of the rings and queues, by the number of listeners, and by the longest reason.
//! - The bytes of all events of one base and reason, and what is yet to be ticked, are the counter.

#[cfg(test)]
mod tests;
mod traffic;

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

pub use traffic::{Reason, Total, Traffic};

/// Events of each of the two kinds that are kept for whoever asks later.
pub const RECENT: usize = 512;
/// Events that wait for one listener before the oldest is lost.
pub const QUEUE: usize = 1024;
/// Listeners at a time.
pub const LISTENERS: usize = 64;
/// Bytes of a reason.
const LONGEST_REASON: usize = 512;

/// What happened. Names are part of the interface: docs/semantics.md, "Events".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A worker began to serve; the first event that it has.
    WorkerStarted,
    /// Bytes of a base that were asked for were in a cache.
    BaseHit,
    /// Bytes of a base had to be got from its source.
    BaseMiss,
    /// Bytes of a base left a cache.
    BaseEvict,
    /// The source of a base failed.
    BaseError,
    /// The source of a base is not what was registered.
    BaseChanged,
    /// Reads of a base wait for its server.
    BaseWaiting,
    /// They do not wait any more.
    BaseResumed,
    /// All of a base is in the store, and is what its digest says.
    BaseHydrated,
    /// The persistent cache does not keep what is fetched.
    CacheDegraded,
    /// It does again.
    CacheRecovered,
    /// A trace was recorded.
    TraceRecorded,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::WorkerStarted,
        Self::BaseHit,
        Self::BaseMiss,
        Self::BaseEvict,
        Self::BaseError,
        Self::BaseChanged,
        Self::BaseWaiting,
        Self::BaseResumed,
        Self::BaseHydrated,
        Self::CacheDegraded,
        Self::CacheRecovered,
        Self::TraceRecorded,
    ];

    /// As users see it.
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
            Self::CacheDegraded => "cache.degraded",
            Self::CacheRecovered => "cache.recovered",
            Self::TraceRecorded => "trace.recorded",
        }
    }

    /// Whether it is counted and told once a second.
    fn is_traffic(self) -> bool {
        matches!(self, Self::BaseHit | Self::BaseMiss | Self::BaseEvict)
    }
}

/// Something that happened. What is not known or makes no sense for the kind is left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// What.
    pub kind: Kind,
    /// To which base.
    pub base: Option<Arc<str>>,
    /// How many bytes of it.
    pub bytes: Option<u64>,
    /// In how many pieces.
    pub count: Option<u64>,
    /// Why, without anything secret: a word for traffic, a sentence for all else.
    pub reason: Option<Cow<'static, str>>,
    /// Since when, for what lasts; nanoseconds since the epoch.
    pub since_ns: Option<i64>,
}

impl Event {
    /// About no base in particular.
    pub fn new(kind: Kind) -> Self {
        Self { kind, base: None, bytes: None, count: None, reason: None, since_ns: None }
    }

    /// About the base of that name.
    pub fn of_base(kind: Kind, base: &str) -> Self {
        Self { base: Some(base.into()), ..Self::new(kind) }
    }

    /// With a reason; a long one is cut.
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

    /// With the time since when it is so.
    #[must_use]
    pub fn since(self, since: SystemTime) -> Self {
        Self { since_ns: Some(nanoseconds(since)), ..self }
    }
}

fn nanoseconds(at: SystemTime) -> i64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
}

/// An event as it is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Told {
    /// From 1, one higher for each event of this worker.
    pub number: u64,
    /// When; nanoseconds since the epoch.
    pub at_ns: i64,
    /// What happened.
    pub event: Event,
}

/// What a listener gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// An event.
    Event(Arc<Told>),
    /// So many events were lost here, because the listener did not keep up.
    Lost(u64),
}

/// The bus; clones are the same one.
#[derive(Clone, Default)]
pub struct Events(Arc<Shared>);

#[derive(Default)]
struct Shared {
    bus: Mutex<Bus>,
    bases: Mutex<BTreeMap<u64, Arc<Traffic>>>,
}

#[derive(Default)]
struct Bus {
    /// Number of the last event.
    last: u64,
    /// Apart, so that what comes every second does not push out what comes once a week.
    traffic: VecDeque<Arc<Told>>,
    others: VecDeque<Arc<Told>>,
    listeners: Vec<Queue>,
    last_listener: u64,
    lost: u64,
    closed: bool,
}

struct Queue {
    listener: u64,
    events: VecDeque<Arc<Told>>,
    lost: u64,
    waker: Option<Waker>,
}

/// What there is to say of the bus itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusState {
    /// Events so far.
    pub emitted: u64,
    /// Events that listeners lost so far; one that two lost counts twice.
    pub lost: u64,
    /// Who listens.
    pub listeners: usize,
}

impl Events {
    /// A bus of its own, on which nothing happened.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tells everybody who listens; waits for nobody.
    pub fn emit(&self, event: Event) {
        let at_ns = nanoseconds(SystemTime::now());
        let mut wakers = Vec::new();
        {
            let mut bus = self.0.bus.lock();
            bus.last += 1;
            let told = Arc::new(Told { number: bus.last, at_ns, event });
            let ring = if told.event.kind.is_traffic() { &mut bus.traffic } else { &mut bus.others };
            if ring.len() == RECENT {
                ring.pop_front();
            }
            ring.push_back(told.clone());
            let mut lost = 0;
            for queue in &mut bus.listeners {
                if queue.events.len() == QUEUE {
                    queue.events.pop_front();
                    queue.lost += 1;
                    lost += 1;
                }
                queue.events.push_back(told.clone());
                wakers.extend(queue.waker.take());
            }
            bus.lost += lost;
        }
        // Without the lock: a waker may do anything.
        wakers.into_iter().for_each(Waker::wake);
    }

    /// The counters of a base: the same ones for the same number. The name is the one of the first call.
    pub fn base(&self, number: u64, name: &str) -> Arc<Traffic> {
        self.0.bases.lock().entry(number).or_insert_with(|| Arc::new(Traffic::new(name))).clone()
    }

    /// The counters of all bases, by number.
    pub fn bases(&self) -> Vec<(u64, Arc<Traffic>)> {
        self.0.bases.lock().iter().map(|(number, traffic)| (*number, traffic.clone())).collect()
    }

    /// Drops the counters of a base that is removed, after what is yet to be told of it.
    pub fn forget(&self, number: u64) {
        let gone = self.0.bases.lock().remove(&number);
        if let Some(traffic) = gone {
            traffic.take(|event| self.emit(event));
        }
    }

    /// Tells what was counted since the last time. To be called once a second by one thread; nothing happens when
    /// nothing was counted.
    pub fn tick(&self) {
        for (_, traffic) in self.bases() {
            traffic.take(|event| self.emit(event));
        }
    }

    /// The last events, oldest first, of which the number is above `after`: of traffic and of all else the last
    /// [`RECENT`] each, so there may be gaps.
    pub fn recent(&self, after: u64) -> Vec<Arc<Told>> {
        self.0.bus.lock().recent(after)
    }

    /// Hears everything from now on, after what [`recent`](Self::recent) gives when `after` is a number. Nothing when
    /// there are [`LISTENERS`] already.
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

    /// Nothing more is told: each listener hears what is in its queue, and then that this is the end.
    pub fn close(&self) {
        let wakers: Vec<_> = {
            let mut bus = self.0.bus.lock();
            bus.closed = true;
            bus.listeners.iter_mut().filter_map(|queue| queue.waker.take()).collect()
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// For `status`.
    pub fn state(&self) -> BusState {
        let bus = self.0.bus.lock();
        BusState { emitted: bus.last, lost: bus.lost, listeners: bus.listeners.len() }
    }
}

impl Bus {
    fn recent(&self, after: u64) -> Vec<Arc<Told>> {
        let both = self.traffic.iter().chain(&self.others);
        let mut out: Vec<_> = both.filter(|told| told.number > after).cloned().collect();
        out.sort_by_key(|told| told.number);
        out
    }
}

/// Somebody who hears events. Dropped, it hears no more.
pub struct Listener {
    shared: Arc<Shared>,
    listener: u64,
}

impl Listener {
    /// What comes next, when there is something; `None` when there will be nothing any more.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Heard>> {
        let mut bus = self.shared.bus.lock();
        let closed = bus.closed;
        let Some(queue) = bus.listeners.iter_mut().find(|queue| queue.listener == self.listener) else {
            return Poll::Ready(None);
        };
        if queue.lost > 0 {
            return Poll::Ready(Some(Heard::Lost(std::mem::take(&mut queue.lost))));
        }
        match queue.events.pop_front() {
            Some(told) => Poll::Ready(Some(Heard::Event(told))),
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
        self.shared.bus.lock().listeners.retain(|queue| queue.listener != self.listener);
    }
}
