//! Runs one request on one disk or base, for any frontend: on which thread it runs, what it waits for, how it fails,
//! and when it is answered.
//!
//! A frontend decodes a request, calls [`Service`] with it and a function that answers it, and encodes the answer. The
//! frontend knows its protocol, and nothing of lanes, bases that are not here yet, or panics. What must hold:
//! - Work that may wait runs on a thread of the frontend only while enough others of them are free (`pool`). Work that
//!   waits for the files of a base never does (`attempt`).
//! - Each request is answered once, with a result or an [`Errno`], however its work ends. Only the end of the process
//!   leaves it to the next worker.
//! - A request that is sent again after the death of a worker has the result of the first attempt (D4). A handle means
//!   the same to every worker.
//! - A change after [`Service::quiesce`] is refused and changes nothing.

mod attempt;
pub mod callers;
mod change;
mod copy;
mod error;
mod frontend;
mod gate;
pub mod guard;
mod log;
mod measure;
mod names;
mod pacing;
mod pool;
mod purge;
mod read;
mod refused_names;
mod runner;
#[cfg(test)]
mod tests;
mod waiting;
mod write;

use std::sync::Arc;

use attempt::{Kind, Origin, PendingRequest, Place};
pub use change::{AttributeChange, BaseAttributes, SpaceChange};
use copy::Copies;
pub use copy::{CopiedBytes, CopyRequest};
pub use error::Errno;
use error::{Stop, fail, fail_disk};
use frontend::Frontends;
pub use frontend::{Frontend, FrontendId, RequestId};
use guard::guarded;
pub use names::{CreatedDisk, Requester};
use pool::Lane;
pub use refused_names::RefusedName;
use runner::Runner;
pub use waiting::{Call, Limits, Waiters};
pub use write::WriteRequest;

use crate::io::Space;
use crate::stats::Operation;
use crate::store::{Attributes, BaseNode, DiskNode, Store};

/// The disk or base of a request, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// A disk.
    Disk(u64),
    /// A base, read directly.
    Base(u64),
    /// A snapshot of a disk.
    Snapshot(u64),
}

/// The result of an open, which later requests carry: the disk's error epoch at that time. After a failed sync the
/// epoch is outdated, and requests with it are refused until the disk is opened again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handle(u64);

impl Handle {
    /// A handle from the number that [`number`](Self::number) returned.
    pub fn new(number: u64) -> Self {
        Self(number & 0xffff)
    }

    pub fn number(self) -> u64 {
        self.0
    }

    fn epoch(self) -> u64 {
        self.0
    }
}

/// Runs requests on the disks and bases of a store. A clone shares the state.
#[derive(Clone)]
pub struct Service {
    store: Arc<Store>,
    runner: Arc<Runner>,
    frontends: Arc<Frontends>,
    copies: Arc<Copies>,
}

/// Reads and caches the number of processors. The number is in files that a confined process may not read.
pub fn cache_processor_count() {
    pool::lane_byte_limit();
    pool::queued_bytes_limit();
}

impl Service {
    /// A service for `store`, with `threads` threads of its own. At most `inline` threads of the frontend may wait.
    /// `limits` bounds the requests that wait for bases.
    ///
    /// # Errors
    /// When threads cannot be started.
    pub fn new(store: Arc<Store>, threads: usize, inline: usize, limits: Limits) -> std::io::Result<Self> {
        let runner = Runner::new(threads, inline, limits)?;
        Ok(Self { store, runner, frontends: Arc::default(), copies: Arc::default() })
    }

    /// Adds a frontend, whose requests go by what is returned. To be called before its first request.
    pub fn add_frontend(&self, frontend: Arc<dyn Frontend>) -> FrontendId {
        self.frontends.add(frontend)
    }

    /// The size of a disk changed outside of all frontends. May wait for them.
    pub fn resized(&self, disk: u64) {
        self.frontends.resized(disk);
    }

    /// Waits for running changes to end and refuses all later ones, so that the store can be closed under open files.
    pub fn quiesce(&self) {
        self.runner.quiesce();
    }

    /// Counts of the requests that wait for bytes of bases.
    pub fn waiters(&self) -> Waiters {
        self.runner.waiting.counts()
    }

    /// The caller of a request got a signal.
    pub fn interrupt(&self, request: RequestId) {
        self.runner.waiting.interrupt(request);
    }

    /// Ends waiting requests whose process is ending. `lookup` tells which processes are.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn watch_callers(&self, lookup: callers::Lookup) -> std::io::Result<()> {
        self.runner.waiting.watch(lookup)
    }

    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// A base by its number.
    ///
    /// # Errors
    /// ESTALE when there is none.
    pub fn base(&self, id: u64) -> Result<Arc<BaseNode>, Errno> {
        self.store.base_by_id(id).ok_or(Errno::ESTALE)
    }

    fn disk(&self, id: u64) -> Result<Arc<DiskNode>, Errno> {
        self.store.disk_by_id(id).ok_or(Errno::ESTALE)
    }

    /// Runs work that waits for the store only.
    fn run(&self, lane: Lane, job: impl FnOnce(&Self) + Send + 'static) {
        let service = self.clone();
        self.runner.pool.run(lane, move || job(&service));
    }

    /// The origin of a request. `bytes`: bytes that it holds while it waits.
    fn origin(&self, call: Call, target: Target, bytes: usize) -> Origin {
        let (base, lane) = match target {
            Target::Disk(id) => (self.store.disk_by_id(id).and_then(|n| n.base_id()), Lane::Disk(id)),
            Target::Base(id) => (Some(id), Lane::Base(id)),
            Target::Snapshot(number) => (self.base_of_snapshot(number), Lane::Disk(number)),
        };
        let of_base = base.filter(|id| target != Target::Base(*id)).map(Target::Base);
        let counters = [self.counters(target), of_base.and_then(|base| self.counters(base))];
        Origin { call, target, base, lane, bytes, moves: bytes, counters }
    }

    /// A request that only reads: its work may stop and run any number of times.
    fn reads<T: Send + 'static>(
        &self,
        call: Call,
        target: Target,
        work: impl Fn(&Self) -> Result<T, Stop> + Send + 'static,
        answer: impl FnOnce(Result<T, Errno>) + Send + 'static,
    ) -> PendingRequest<T> {
        let service = self.clone();
        PendingRequest::new(self.origin(call, target, 0), Kind::Reads, move || work(&service), answer)
    }

    fn is_attached(&self, target: Target) -> bool {
        match target {
            Target::Disk(id) => self.store.disk_by_id(id).is_none_or(|node| node.attached().is_some()),
            Target::Base(id) => self.store.base_by_id(id).is_none_or(|node| node.attached().is_some()),
            Target::Snapshot(number) => self.store.opened_snapshot(number).is_some(),
        }
    }

    fn base_of_snapshot(&self, number: u64) -> Option<u64> {
        self.store.snapshot_by_number(number).and_then(|(node, _)| node.base_id())
    }

    /// The lane for work that must first open the files of `target`.
    fn attach_lane(&self, target: Target) -> Lane {
        match target {
            Target::Base(id) => Lane::Attach(id),
            Target::Disk(id) => {
                let base = self.store.disk_by_id(id).and_then(|node| node.base_id());
                base.map_or(Lane::Node(id), Lane::Attach)
            }
            Target::Snapshot(number) => {
                self.base_of_snapshot(number).map_or(Lane::Node(number), Lane::Attach)
            }
        }
    }

    /// Calls `then` once the files of `target` are open. That may take as long as the base's filesystem does. A signal
    /// ends the waiting.
    fn when_attached<A: Send + 'static>(
        &self,
        call: Call,
        target: Target,
        answer: A,
        refuse: impl FnOnce(A, Errno) + Send + 'static,
        then: impl FnOnce(&Self, A) + Send + 'static,
    ) {
        if self.is_attached(target) {
            return then(self, answer);
        }
        let attach = move |service: &Self| {
            match target {
                Target::Disk(id) => service.store.disk_by_id(id).map(|node| node.attach().map(drop)),
                Target::Base(id) => service.store.base_by_id(id).map(|node| node.attach().map(drop)),
                Target::Snapshot(number) => Some(service.store.attach_snapshot(number).map(drop)),
            }
            .transpose()
            .map(drop)
            .map_err(|e| Stop::from(fail(&e)))
        };
        let service = self.clone();
        let attached = move |done: Result<(), Errno>| match done {
            Ok(()) => then(&service, answer),
            Err(errno) => refuse(answer, errno),
        };
        let attempt = self.reads(call, target, attach, attached);
        Arc::new(attempt).spawn_in(&self.runner, self.attach_lane(target));
    }

    /// Where work on an attached disk or base may run first.
    fn place(&self, target: Target) -> Place {
        match target {
            Target::Disk(id) => {
                let node = self.store.disk_by_id(id);
                let is_plain = node.is_none_or(|node| node.peek().is_none_or(|disk| disk.is_plain()));
                if is_plain { Place::CallingThread } else { Place::DiskLane }
            }
            Target::Base(_) => Place::BaseLane,
            Target::Snapshot(number) => {
                let is_plain = self.store.opened_snapshot(number).is_none_or(|frozen| frozen.is_plain());
                if is_plain { Place::CallingThread } else { Place::DiskLane }
            }
        }
    }

    /// Opens a disk or base. The opener of a disk calls [`closed`](Self::closed) when it closes the disk.
    pub fn open(
        &self,
        call: Call,
        target: Target,
        answer: impl FnOnce(Result<Handle, Errno>) + Send + 'static,
    ) {
        let answer = self.measured(target, Operation::Open, 0, answer);
        self.when_attached(call, target, answer, refuse, move |service, answer| {
            answer(match target {
                Target::Disk(id) => service.disk(id).and_then(|node| open_disk(&node)),
                Target::Base(id) => service.base(id).map(|node| {
                    node.opened();
                    Handle(0)
                }),
                Target::Snapshot(_) => Ok(Handle(0)),
            });
        });
    }

    /// Notes that the last user of a handle has closed it.
    pub fn closed(&self, disk: u64) {
        if let Ok(node) = self.disk(disk) {
            node.closed();
            self.purge_later(&node);
        }
    }

    /// Notes that the last user of a handle of a base's own file has closed it.
    pub fn closed_base(&self, base: u64) {
        if let Ok(node) = self.base(base) {
            node.closed();
        }
    }

    /// Returns the attributes of a disk. For a detached disk that may take as long as opening it.
    pub fn attributes(
        &self,
        call: Call,
        disk: u64,
        answer: impl FnOnce(Result<Attributes, Errno>) + Send + 'static,
    ) {
        let target = Target::Disk(disk);
        let answer = self.measured(target, Operation::Attributes, 0, answer);
        if self.is_attached(target) {
            return self.run(Lane::Node(disk), move |service| answer(service.attributes_now(disk)));
        }
        let find = move |service: &Self| service.attributes_now(disk).map_err(Stop::from);
        let attempt = self.reads(call, target, find, answer);
        Arc::new(attempt).spawn_in(&self.runner, self.attach_lane(target));
    }

    fn attributes_now(&self, disk: u64) -> Result<Attributes, Errno> {
        Ok(self.disk(disk)?.attributes())
    }

    /// Makes everything durable that was completed on a disk before the call.
    pub fn flush(
        &self,
        call: Call,
        disk: u64,
        handle: Handle,
        answer: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        let target = Target::Disk(disk);
        let answer = self.measured(target, Operation::Flush, 0, answer);
        self.when_attached(call, target, answer, refuse, move |service, answer| {
            let flusher = service.clone();
            // A flush waits for the disk in any case, and encoding a large map takes a processor for seconds.
            service.runner.change_in(Lane::Sync(disk), answer, refuse, move |answer| {
                answer(guarded(|| {
                    let node = flusher.disk(disk)?;
                    let done = node.change(|disk| disk.flush(handle.epoch()));
                    done.map_err(|e| fail(&e))?.map_err(|e| fail_disk(&node, "flush", &e).errno())
                }));
            });
        });
    }

    /// Space of the store's filesystem.
    pub fn space(&self, answer: impl FnOnce(Result<Space, Errno>) + Send + 'static) {
        self.run(Lane::Space, move |service| {
            let space = service.store.space();
            answer(space.map_err(|error| Errno::new(error.raw_os_error().unwrap_or(libc::EIO))));
        });
    }
}

/// Answers a request that fails before its work runs.
fn refuse<T, A: FnOnce(Result<T, Errno>)>(answer: A, errno: Errno) {
    answer(Err(errno));
}

/// Opens an attached disk.
fn open_disk(node: &DiskNode) -> Result<Handle, Errno> {
    let disk = node.attach().map_err(|e| fail(&e))?;
    disk.delta().opened();
    node.opened();
    Ok(Handle::new(disk.delta().error_epoch()))
}
