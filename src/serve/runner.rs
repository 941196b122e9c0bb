//! What all requests run on: the threads of the pool with their lanes, the gate for changes, the table of requests that
//! wait, and the thread that says whose turn it is under a limit.
//!
//! What must hold: a change runs inside the gate. A change that comes after the end of the daemon has begun is refused
//! at once.

use std::sync::Arc;
use std::time::Duration;

use super::gate::Gate;
use super::pacing::Pacer;
use super::pool::{Lane, Pool};
use super::waiting::{Limits, Waiting};
use super::{Errno, guard};

/// How long a stop with files open waits for running changes, which wait for the store's disk only.
const LAST_CHANGES: Duration = Duration::from_secs(60);

/// See the module.
pub(super) struct Runner {
    pub pool: Pool,
    /// Each change of a disk passes it. Closed for good when the daemon stops with files open.
    pub gate: Gate,
    pub waiting: Arc<Waiting>,
    pub pacer: Arc<Pacer>,
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.waiting.close();
        self.pacer.close();
    }
}

impl Runner {
    /// A runner with `threads` threads. At most `inline` threads of the frontend wait themselves at a time.
    ///
    /// # Errors
    /// When threads cannot be started.
    pub fn new(threads: usize, inline: usize, limits: Limits) -> std::io::Result<Arc<Self>> {
        let pool = Pool::new(threads, inline)?;
        let waiting = Waiting::new(limits)?;
        let pacer = Pacer::new()?;
        Ok(Arc::new(Self { pool, gate: Gate::default(), waiting, pacer }))
    }

    /// Waits for running changes to end and refuses all later ones.
    pub fn quiesce(&self) {
        let left = self.gate.close(LAST_CHANGES);
        if left > 0 {
            tracing::error!(
                left,
                "unacknowledged changes did not end in time; the store is closed without them"
            );
        }
    }

    /// Runs a change that waits for the store only: on the calling thread, or in its lane.
    pub fn change<A: Send + 'static>(
        self: &Arc<Self>,
        lane: Lane,
        answer: A,
        refuse: impl FnOnce(A, Errno) + Send + 'static,
        job: impl FnOnce(A) + Send + 'static,
    ) {
        let runner = self.clone();
        self.pool.run(lane, move || runner.change_here(answer, refuse, job));
    }

    /// As [`change`](Self::change), never on a thread of the frontend.
    pub fn change_in<A: Send + 'static>(
        self: &Arc<Self>,
        lane: Lane,
        answer: A,
        refuse: impl FnOnce(A, Errno) + Send + 'static,
        job: impl FnOnce(A) + Send + 'static,
    ) {
        let runner = self.clone();
        self.pool.spawn(lane, move || runner.change_here(answer, refuse, job));
    }

    fn change_here<A>(&self, answer: A, refuse: impl FnOnce(A, Errno), job: impl FnOnce(A)) {
        match self.gate.enter() {
            Some(_inside) => job(answer),
            None => refuse(answer, Errno::EIO),
        }
        if guard::must_end() {
            std::process::abort();
        }
    }
}
