//! One request on one disk, for any frontend: where it runs, what it waits for, how it fails, when it is answered.
//!
//! A frontend decodes a request, calls [`Service`] with it and with what answers it, and encodes the answer. It knows
//! its protocol and nothing of lanes, bases that are not here yet, or panics. What must hold:
//! - Nothing that may wait runs on a thread of the frontend unless enough others are free (`pool`), and nothing that
//!   waits for the files of a base ever does (`attempt`).
//! - Each request is answered once, with a result or an [`Errno`], whatever happens to its work; only the end of the
//!   process leaves it to the next worker.
//! - A request that is sent again after a crash of the worker has the result that the first try had (D4); a handle means the
//!   same to every worker.
//! - A change that comes after [`Service::quiesce`] is refused and changes nothing.

mod attempt;
pub mod callers;
mod change;
mod error;
mod frontend;
mod gate;
pub mod guard;
mod log;
mod names;
mod pool;
mod purge;
mod read;
mod runner;
#[cfg(test)]
mod tests;
mod waiting;
mod write;

use std::sync::Arc;

use attempt::{Attempt, Kind, Origin, Place};
pub use change::{Allocate, Change};
pub use error::Errno;
use error::{Stop, fail, fail_disk};
use frontend::Frontends;
pub use frontend::{Frontend, FrontendId, RequestId};
use guard::guarded;
pub use names::{Asker, Created};
use pool::Lane;
use runner::Runner;
pub use waiting::{Call, Limits, Waiters};
pub use write::Written;

use crate::io::Space;
use crate::store::{Attributes, BaseNode, DiskNode, Store};

/// What a request is on, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// A disk.
    Disk(u64),
    /// A base, read as it is.
    Base(u64),
}

/// What an open returns and later requests bring back: the error epoch of the disk at that time. After a failed sync it
/// is an older one, and is refused until the disk is opened again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Handle(u64);

impl Handle {
    /// From a number that [`number`](Self::number) gave.
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

/// Runs requests on the disks and bases of a store. A clone is the same service.
#[derive(Clone)]
pub struct Service {
    store: Arc<Store>,
    runner: Arc<Runner>,
    frontends: Arc<Frontends>,
}

/// Learns how many processors there are, from files that a process that has given up its rights must not read.
pub fn look_at_processors() {
    pool::moved_at_once();
}

impl Service {
    /// Of `store`; `threads` threads may wait besides `inline` of the frontend's, and requests as `limits` say.
    ///
    /// # Errors
    /// When threads cannot be started.
    pub fn new(store: Arc<Store>, threads: usize, inline: usize, limits: Limits) -> std::io::Result<Self> {
        Ok(Self { store, runner: Runner::new(threads, inline, limits)?, frontends: Arc::default() })
    }

    /// Adds a frontend, whose requests go by what is returned. To be called before its first request.
    pub fn add_frontend(&self, frontend: Arc<dyn Frontend>) -> FrontendId {
        self.frontends.add(frontend)
    }

    /// The size of a disk changed outside of all frontends. May wait for them.
    pub fn resized(&self, disk: u64) {
        self.frontends.resized(disk);
    }

    /// Lets running changes end and refuses all later ones, so that the store can be closed under open files.
    pub fn quiesce(&self) {
        self.runner.quiesce();
    }

    /// Requests that wait for the bytes of bases.
    pub fn waiters(&self) -> Waiters {
        self.runner.waiting.counts()
    }

    /// The caller of a request got a signal.
    pub fn interrupt(&self, request: RequestId) {
        self.runner.waiting.interrupt(request);
    }

    /// Ends what waits of processes that are ending, which `lookup` finds out.
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

    /// Runs what waits for the store only.
    fn run(&self, lane: Lane, job: impl FnOnce(&Self) + Send + 'static) {
        let service = self.clone();
        self.runner.pool.run(lane, move || job(&service));
    }

    /// Of whom a request is. `bytes`: what it holds while it waits.
    fn origin(&self, call: Call, target: Target, bytes: usize) -> Origin {
        let (base, lane) = match target {
            Target::Disk(id) => (self.store.disk_by_id(id).and_then(|n| n.base_id()), Lane::Disk(id)),
            Target::Base(id) => (Some(id), Lane::Base(id)),
        };
        Origin { call, target, base, lane, bytes, moves: bytes }
    }

    /// Work that has changed nothing when it stops, and may run any number of times.
    fn reads<T: Send + 'static>(
        &self,
        call: Call,
        target: Target,
        work: impl Fn(&Self) -> Result<T, Stop> + Send + 'static,
        answer: impl FnOnce(Result<T, Errno>) + Send + 'static,
    ) -> Attempt<T> {
        let service = self.clone();
        Attempt::new(self.origin(call, target, 0), Kind::Reads, move || work(&service), answer)
    }

    fn is_attached(&self, target: Target) -> bool {
        match target {
            Target::Disk(id) => self.store.disk_by_id(id).is_none_or(|node| node.attached().is_some()),
            Target::Base(id) => self.store.base_by_id(id).is_none_or(|node| node.attached().is_some()),
        }
    }

    /// The lane for what has to open the files of `target` first.
    fn attach_lane(&self, target: Target) -> Lane {
        match target {
            Target::Base(id) => Lane::Attach(id),
            Target::Disk(id) => {
                let base = self.store.disk_by_id(id).and_then(|node| node.base_id());
                base.map_or(Lane::Node(id), Lane::Attach)
            }
        }
    }

    /// Goes on once the files of `target` are open, which may take as long as its base's filesystem does. A signal ends
    /// the waiting.
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

    /// Where work on an attached disk or base may run.
    fn place(&self, target: Target) -> Place {
        match target {
            Target::Disk(id) => {
                let node = self.store.disk_by_id(id);
                let is_plain = node.is_none_or(|node| node.peek().is_none_or(|disk| disk.is_plain()));
                if is_plain { Place::Here } else { Place::Lane }
            }
            Target::Base(_) => Place::Base,
        }
    }

    /// Opens a disk or base. Who opened a disk says so when it closes it ([`closed`](Self::closed)).
    pub fn open(
        &self,
        call: Call,
        target: Target,
        answer: impl FnOnce(Result<Handle, Errno>) + Send + 'static,
    ) {
        self.when_attached(call, target, answer, refuse, move |service, answer| {
            answer(match target {
                Target::Disk(id) => service.disk(id).and_then(|node| open_disk(&node)),
                Target::Base(_) => Ok(Handle(0)),
            });
        });
    }

    /// The last user of a handle has closed it.
    pub fn closed(&self, disk: u64) {
        if let Ok(node) = self.disk(disk) {
            node.closed();
        }
    }

    /// Finds what is known of a disk. Of one that is not attached it may take as long as opening it does.
    pub fn attributes(
        &self,
        call: Call,
        disk: u64,
        answer: impl FnOnce(Result<Attributes, Errno>) + Send + 'static,
    ) {
        let target = Target::Disk(disk);
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

    /// Everything on a disk that was completed before it is durable.
    pub fn flush(
        &self,
        call: Call,
        disk: u64,
        handle: Handle,
        answer: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        let target = Target::Disk(disk);
        self.when_attached(call, target, answer, refuse, move |service, answer| {
            let flusher = service.clone();
            // It waits for the disk in any case, and encoding a large map takes a processor for seconds.
            service.runner.change_in(Lane::Sync(disk), answer, refuse, move |answer| {
                answer(guarded(|| {
                    let node = flusher.disk(disk)?;
                    let disk = node.attach().map_err(|e| fail(&e))?;
                    disk.flush(handle.epoch()).map_err(|e| fail_disk(&node, "flush", &e).errno())
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

/// Answers a request that fails before its work has run.
fn refuse<T, A: FnOnce(Result<T, Errno>)>(answer: A, errno: Errno) {
    answer(Err(errno));
}

/// Of an attached disk.
fn open_disk(node: &DiskNode) -> Result<Handle, Errno> {
    let disk = node.attach().map_err(|e| fail(&e))?;
    disk.delta().opened();
    node.opened();
    Ok(Handle::new(disk.delta().error_epoch()))
}
