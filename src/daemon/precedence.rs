//! The threads that take requests have precedence over the worker's other threads.
//!
//! Why: the kernel has one FIFO queue of requests for all disks. While one guest's large requests keep all processors
//! busy, that queue must stay short, or every other guest waits behind them. Taking a request costs little; expensive
//! work is handed over to other threads. What must hold: the worker uses the right to raise the priority before it
//! gives up its rights, and only the threads that take requests have precedence.

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use crate::io::sys;

/// Nice value of the threads that take requests.
const NICE: i32 = -10;

type Job = Box<dyn FnOnce() + Send>;

/// A handle to the thread that has precedence.
pub struct PriorityThread(Sender<Job>);

impl PriorityThread {
    /// Runs `work` on that thread. The threads that `work` starts inherit its precedence. `None` when the thread is
    /// gone.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let (sender, done) = channel();
        self.0.send(Box::new(move || _ = sender.send(work()))).ok()?;
        done.recv().ok()
    }
}

/// The nice value that the daemon was started with.
#[derive(Debug, Clone, Copy)]
pub struct DaemonNice(i32);

/// Gives this thread precedence, where the system allows it. The caller has not given up its rights or started other
/// threads yet.
pub fn raise_priority() -> DaemonNice {
    let nice = sys::thread_nice();
    if let Err(error) = sys::set_thread_nice(NICE.min(nice)) {
        tracing::debug!(%error, "the threads that take requests have no precedence (CAP_SYS_NICE)");
    }
    DaemonNice(nice)
}

/// Runs `work` on a thread with the nice value of the daemon. Meanwhile this thread runs the jobs that `work` passes to
/// [`PriorityThread::run`].
///
/// # Errors
/// When the thread cannot be started, or panics.
pub fn run_beside<R: Send>(
    nice: DaemonNice,
    work: impl FnOnce(&PriorityThread) -> R + Send,
) -> io::Result<R> {
    thread::scope(|scope| {
        let (sender, jobs) = channel();
        let ordinary = move || {
            let _ = sys::set_thread_nice(nice.0);
            work(&PriorityThread(sender))
        };
        let ordinary = thread::Builder::new().name("work".into()).spawn_scoped(scope, ordinary)?;
        jobs.iter().for_each(|job: Job| job());
        ordinary.join().map_err(|_| io::Error::other("it panicked"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_run_on_the_calling_thread_and_work_runs_on_another() {
        let here = thread::current().id();
        let (there, asked) = run_beside(DaemonNice(sys::thread_nice()), |preferred| {
            (thread::current().id(), preferred.run(|| thread::current().id()).expect("an answer"))
        })
        .expect("a thread");
        assert!(asked == here && there != here);
    }
}
