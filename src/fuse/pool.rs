//! Threads for what may wait.
//!
//! A FUSE thread runs work that may wait itself as long as enough of its siblings are free to answer what is in
//! memory; past that, work goes to these threads. So a single request costs no hand-over, and a flood of slow ones
//! never stops the fast ones.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::{Sender, unbounded};

type Job = Box<dyn FnOnce() + Send>;

/// See the module.
pub struct Pool {
    jobs: Sender<Job>,
    permits: Arc<AtomicUsize>,
}

/// Permission to wait on this thread.
pub struct Permit(Arc<AtomicUsize>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Release);
    }
}

impl Pool {
    /// Starts `threads` threads; at most `inline` callers wait on their own at any time.
    pub fn new(threads: usize, inline: usize) -> io::Result<Self> {
        let (jobs, work) = unbounded::<Job>();
        for n in 0..threads {
            let work = work.clone();
            std::thread::Builder::new().name(format!("io-{n}")).stack_size(512 << 10).spawn(move || {
                while let Ok(job) = work.recv() {
                    job();
                }
            })?;
        }
        Ok(Self { jobs, permits: Arc::new(AtomicUsize::new(inline)) })
    }

    /// A permit, when the caller may wait here.
    pub fn try_inline(&self) -> Option<Permit> {
        let take = |n: usize| n.checked_sub(1);
        let taken = self.permits.fetch_update(Ordering::Acquire, Ordering::Relaxed, take);
        taken.is_ok().then(|| Permit(self.permits.clone()))
    }

    /// Hands work over.
    pub fn spawn(&self, job: impl FnOnce() + Send + 'static) {
        // The receivers live as long as the pool.
        let _ = self.jobs.send(Box::new(job));
    }

    /// Runs work here when the caller may wait, hands it over otherwise.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        match self.try_inline() {
            Some(_permit) => job(),
            None => self.spawn(job),
        }
    }
}
