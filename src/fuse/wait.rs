//! Requests that need bytes which have to be fetched first.
//!
//! No thread waits for them. The work of a request fails with [`Stop::Wait`], having changed nothing, and is run again on
//! the pool when they are here. What must hold: the arrivals of all earlier tries are held until the request is
//! answered, so that what they brought is found, and a request comes to an end although no cache may keep anything.

use fuser::Errno;

use super::{Node, PlyFs, guarded};
use crate::base::Arrival;

/// Why the work of a request stopped.
pub(super) enum Stop {
    /// It failed.
    Errno(Errno),
    /// It is to be run again.
    Wait(Arrival),
}

impl From<Errno> for Stop {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl Stop {
    /// For work that needs nothing of a base.
    pub fn errno(self) -> Errno {
        match self {
            Self::Errno(errno) => errno,
            Self::Wait(_) => Errno::EIO,
        }
    }
}

/// Whether a request changes something, which it must not do once the daemon has stopped.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Reads,
    Changes,
}

type Work<T> = Box<dyn Fn(&PlyFs) -> Result<T, Stop> + Send>;
type Answer<T> = Box<dyn FnOnce(Result<T, Errno>) + Send>;

/// A request that may have to be run more than once.
pub(super) struct Attempt<T> {
    kind: Kind,
    work: Work<T>,
    answer: Answer<T>,
    /// What earlier tries waited for.
    held: Vec<Arrival>,
}

impl<T: 'static> Attempt<T> {
    pub fn new(
        kind: Kind,
        work: impl Fn(&PlyFs) -> Result<T, Stop> + Send + 'static,
        answer: impl FnOnce(Result<T, Errno>) + Send + 'static,
    ) -> Self {
        Self { kind, work: Box::new(work), answer: Box::new(answer), held: Vec::new() }
    }

    /// One try, and what follows from it.
    pub fn run(self, fs: &PlyFs) {
        let stopped = (self.kind == Kind::Changes).then(|| fs.shared.quiesce.read());
        if stopped.as_ref().is_some_and(|stopped| **stopped) {
            return (self.answer)(Err(Errno::EIO));
        }
        match guarded(|| (self.work)(fs)) {
            Ok(done) => (self.answer)(Ok(done)),
            Err(Stop::Errno(errno)) => (self.answer)(Err(errno)),
            Err(Stop::Wait(arrival)) => {
                // Who stops the daemon does not wait for this request; it is sent again to whoever comes next.
                drop(stopped);
                self.wait(fs, &arrival);
            }
        }
    }

    /// Runs it when `arrival` has happened.
    pub fn wait(mut self, fs: &PlyFs, arrival: &Arrival) {
        self.held.push(arrival.clone());
        fs.when(arrival, move |fs| self.run(fs));
    }
}

impl PlyFs {
    /// Whether reading of it is reading a file of this host: nothing that may take long is done for it on a FUSE thread.
    pub(super) fn is_plain(&self, node: Node) -> bool {
        match node {
            Node::Disk(id) => {
                self.store().disk_by_id(id).is_some_and(|n| n.peek().is_some_and(|disk| disk.is_plain()))
            }
            Node::Base(id) => {
                self.store().base_by_id(id).is_some_and(|n| n.attached().is_some_and(|base| base.is_plain()))
            }
            _ => true,
        }
    }

    /// Runs what may wait or, when it is not `plain`, may take long or have to be run again.
    pub(super) fn attempt<T: Send + 'static>(&self, plain: bool, attempt: Attempt<T>) {
        let fs = self.clone();
        let job = move || attempt.run(&fs);
        if plain { self.shared.pool.run(job) } else { self.shared.pool.spawn(job) }
    }

    /// Runs `job` on the pool when `arrival` has happened.
    pub(super) fn when(&self, arrival: &Arrival, job: impl FnOnce(&PlyFs) + Send + 'static) {
        let fs = self.clone();
        arrival.then(move || {
            let shared = fs.shared.clone();
            shared.pool.spawn(move || job(&fs));
        });
    }
}
