//! Requests that wait for their turn under the limits of their disk (D85).
//!
//! What must hold:
//! - A request that waits holds no thread, no lock and no lane. It is counted, and a signal or the end of its process
//!   ends it, as it does a request that waits for a base.
//! - One thread looks at the disks whose time has come, and hands their requests to the lanes. It waits for nothing else.
//! - A request is never refused because too many wait: the surplus passes, and its disk is in debt for it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::pool::Lane;
use super::waiting::{Call, Cancel, Purpose, Ticket};
use super::{Errno, Service, Target};
use crate::limits::{Cost, Entered, Turn, now};
use crate::stats::Counters;
use crate::store::DiskNode;

#[derive(Default)]
struct Plan {
    /// The disks with requests that wait, by the time of the next turn and the disk's number.
    due: BTreeMap<(i64, u64), Weak<DiskNode>>,
    closed: bool,
}

/// Says whose turn it is.
pub(super) struct Pacer {
    plan: Mutex<Plan>,
    changed: Condvar,
    /// All requests pass: the worker is about to pause.
    is_open: AtomicBool,
}

impl Pacer {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the thread cannot be started.
    pub fn new() -> std::io::Result<Arc<Self>> {
        let pacer = Arc::new(Self {
            plan: Mutex::default(),
            changed: Condvar::new(),
            is_open: AtomicBool::new(false),
        });
        let running = pacer.clone();
        std::thread::Builder::new().name("pace".into()).spawn(move || running.run())?;
        Ok(pacer)
    }

    fn plan(&self, at: i64, node: &Arc<DiskNode>) {
        let mut plan = self.plan.lock();
        let is_next = plan.due.first_key_value().is_none_or(|((first, _), _)| at < *first);
        plan.due.insert((at, node.id()), Arc::downgrade(node));
        drop(plan);
        if is_next {
            self.changed.notify_one();
        }
    }

    fn run(&self) {
        let mut plan = self.plan.lock();
        while !plan.closed {
            let Some((&(at, _), _)) = plan.due.first_key_value() else {
                self.changed.wait(&mut plan);
                continue;
            };
            let wait = at.saturating_sub(now());
            if wait > 0 {
                self.changed.wait_for(&mut plan, Duration::from_nanos(wait.unsigned_abs()));
                continue;
            }
            let due = plan.due.pop_first();
            parking_lot::MutexGuard::unlocked(&mut plan, || {
                if let Some(node) = due.and_then(|(_, node)| node.upgrade()) {
                    self.look_at(&node, Some(at));
                }
            });
        }
    }

    /// Lets the requests of a disk go whose turn has come. `at` is the time for which that was planned.
    fn look_at(&self, node: &Arc<DiskNode>, at: Option<i64>) {
        let pace = &node.limiter().pace;
        let (ready, next) = pace.run_due(at, now());
        ready.into_iter().for_each(|turn| turn.come());
        if let Some(next) = next {
            self.plan(next, node);
        }
    }

    fn open(&self, is_open: bool) {
        self.is_open.store(is_open, Ordering::Release);
        if is_open {
            let due = std::mem::take(&mut self.plan.lock().due);
            for node in due.into_values().filter_map(|node| node.upgrade()) {
                node.limiter().pace.take_all().into_iter().for_each(|turn| turn.come());
            }
        }
    }

    /// Ends the thread.
    pub fn close(&self) {
        self.plan.lock().closed = true;
        self.changed.notify_one();
    }
}

type Refuse<A> = Box<dyn FnOnce(A, Errno) + Send>;
type Then<A> = Box<dyn FnOnce(&Service, Call, A) + Send>;

/// For how long the number of a thread certainly means the thread that made a request (D56).
const FRESH: Duration = Duration::from_secs(2);

struct Waiting<A> {
    answer: A,
    refuse: Refuse<A>,
    then: Then<A>,
    ticket: Option<Ticket>,
}

/// A request that waits for its turn.
struct Paced<A> {
    service: Service,
    call: Call,
    lane: Lane,
    /// Bytes that the request moves when it runs.
    moves: usize,
    counters: Arc<Counters>,
    since: Instant,
    waiting: Mutex<Option<Waiting<A>>>,
}

impl<A: Send + 'static> Paced<A> {
    fn take(&self) -> Option<Waiting<A>> {
        let mut waiting = self.waiting.lock().take()?;
        // Dropped first: what follows may wait again under the same number.
        drop(waiting.ticket.take());
        Some(waiting)
    }

    /// Hands the request to its lane.
    fn go(&self) {
        if let Some(Waiting { answer, then, .. }) = self.take() {
            self.counters.throttled(self.since.elapsed());
            let (service, mut call) = (self.service.clone(), self.call);
            if self.since.elapsed() > FRESH {
                call.thread = 0;
            }
            self.service.runner.pool.spawn_sized(self.lane, self.moves, move || then(&service, call, answer));
        }
    }
}

impl<A: Send + 'static> Cancel for Paced<A> {
    fn cancel(&self, errno: Errno) -> bool {
        let Some(Waiting { answer, refuse, .. }) = self.take() else { return false };
        self.counters.throttled(self.since.elapsed());
        refuse(answer, errno);
        true
    }
}

impl<A: Send + 'static> Turn for Paced<A> {
    fn is_over(&self) -> bool {
        self.waiting.lock().is_none()
    }

    fn come(self: Arc<Self>) {
        self.go();
    }
}

impl Service {
    /// Whether a request on a disk need not wait for its turn. It then has its tokens.
    pub(super) fn passes(&self, node: &DiskNode, cost: Cost) -> bool {
        let pace = &node.limiter().pace;
        pace.passes(cost, now) || self.runner.pacer.is_open.load(Ordering::Relaxed)
    }

    /// Calls `then` in the disk's lane when the turn of a request has come. The request holds `held` bytes until then.
    pub(super) fn when_it_is_its_turn<A: Send + 'static>(
        &self,
        call: Call,
        node: &Arc<DiskNode>,
        (cost, held): (Cost, usize),
        answer: A,
        refuse: impl FnOnce(A, Errno) + Send + 'static,
        then: impl FnOnce(&Self, Call, A) + Send + 'static,
    ) {
        let (Cost::Read(bytes) | Cost::Write(bytes)) = cost;
        let target = Target::Disk(node.id());
        let waiting = Waiting { answer, refuse: Box::new(refuse), then: Box::new(then), ticket: None };
        let paced = Arc::new(Paced {
            service: self.clone(),
            call,
            lane: Lane::Disk(node.id()),
            moves: bytes as usize,
            counters: node.counters().clone(),
            since: Instant::now(),
            waiting: Mutex::new(Some(waiting)),
        });
        let turn = || {
            let cancel: Arc<dyn Cancel> = paced.clone();
            let cancel = Arc::downgrade(&cancel);
            let ticket = self.runner.waiting.admit_for(Purpose::Turn, target, held, call, cancel)?;
            // Given back at once when a signal has ended the request meanwhile.
            if let Some(waiting) = paced.waiting.lock().as_mut() {
                waiting.ticket = Some(ticket);
            }
            Some(paced.clone() as Arc<dyn Turn>)
        };
        match node.limiter().pace.enter(cost, now, turn) {
            Entered::Passes => paced.go(),
            Entered::Waits(Some(at)) => self.runner.pacer.plan(at, node),
            Entered::Waits(None) => {}
        }
        // It may have come between the opening and the look at those that wait.
        if self.runner.pacer.is_open.load(Ordering::Acquire) {
            paced.go();
        }
    }

    /// Lets all requests pass that wait for their turn, and later ones, or ends that. A worker that pauses answers all
    /// that it has read.
    pub fn set_all_pass(&self, all: bool) {
        self.runner.pacer.open(all);
    }

    /// The limits of a disk changed: requests that wait go by the new ones.
    pub fn limits_changed(&self, disk: u64) {
        if let Some(node) = self.store.disk_by_id(disk) {
            self.runner.pacer.look_at(&node, None);
        }
    }
}
