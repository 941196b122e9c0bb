//! Counts requests: each one when it is answered, before its caller has the answer, so that a caller that asks for the
//! counters then finds its request there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Errno, Service, Target};
use crate::stats::{Counters, Operation};
use crate::store::DiskNode;

/// A request that is not answered yet.
#[derive(Clone, Copy)]
pub(super) struct Began {
    operation: Operation,
    at: Instant,
}

impl Began {
    pub fn now(operation: Operation) -> Self {
        Self { operation, at: Instant::now() }
    }

    /// Counts the request. `done` has the bytes that it moved.
    pub fn ends(self, counters: &Counters, done: Result<u64, Errno>) {
        let took = self.at.elapsed();
        match done {
            Ok(bytes) => counters.succeeded(self.operation, bytes, took),
            Err(Errno::EINTR) => counters.interrupted(self.operation, took),
            Err(_) => counters.failed(self.operation, took),
        }
    }
}

/// A request that waits for bytes of a base, from now on.
pub(super) struct Wait {
    since: Instant,
    counters: [Option<Arc<Counters>>; 2],
}

impl Wait {
    /// Counts for its disk and for its base.
    pub fn new(counters: [Option<Arc<Counters>>; 2]) -> Self {
        Self { since: Instant::now(), counters }
    }

    fn took(&self) -> Duration {
        self.since.elapsed()
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        let took = self.took();
        self.counters.iter().flatten().for_each(|counters| counters.waited(took));
    }
}

impl Service {
    /// The counters of a disk or base that exists.
    pub(super) fn counters(&self, target: Target) -> Option<Arc<Counters>> {
        match target {
            Target::Disk(id) => self.store.disk_by_id(id).map(|node| node.counters().clone()),
            Target::Base(id) => self.store.base_by_id(id).map(|node| node.counters().clone()),
            Target::Snapshot(number) => {
                self.store.snapshot_by_number(number).map(|(node, _)| node.counters().clone())
            }
        }
    }

    /// Wraps the answer to a request that begins now, so that the request is counted. `bytes`: what it moves when it
    /// succeeds.
    pub(super) fn measured<T: 'static, A: FnOnce(Result<T, Errno>) + Send + 'static>(
        &self,
        target: Target,
        operation: Operation,
        bytes: u64,
        answer: A,
    ) -> impl FnOnce(Result<T, Errno>) + Send + 'static + use<T, A> {
        measured_by(self.counters(target), operation, bytes, answer)
    }
}

/// As [`Service::measured`], for a disk that was found.
pub(super) fn measured<T: 'static, A: FnOnce(Result<T, Errno>) + Send + 'static>(
    node: &DiskNode,
    operation: Operation,
    bytes: u64,
    answer: A,
) -> impl FnOnce(Result<T, Errno>) + Send + 'static + use<T, A> {
    measured_by(Some(node.counters().clone()), operation, bytes, answer)
}

fn measured_by<T: 'static, A: FnOnce(Result<T, Errno>) + Send + 'static>(
    counters: Option<Arc<Counters>>,
    operation: Operation,
    bytes: u64,
    answer: A,
) -> impl FnOnce(Result<T, Errno>) + Send + 'static {
    let began = Began::now(operation);
    move |done: Result<T, Errno>| {
        if let Some(counters) = counters {
            began.ends(&counters, done.as_ref().map(|_| bytes).map_err(|errno| *errno));
        }
        answer(done);
    }
}
