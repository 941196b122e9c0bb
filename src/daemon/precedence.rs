//! The threads that take requests get processors before the worker's others.
//!
//! Why: the kernel has one queue of requests for all disks, first in, first out. While one guest's large requests keep
//! all processors busy, that queue must stay short, or every other guest waits behind them. Taking a request costs little;
//! what costs more is handed over. What must hold: the right to precedence is used before the worker gives up its rights,
//! and only the threads that take requests have it.

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use crate::io::sys;

/// Nice value of the threads that take requests.
const NICE: i32 = -10;

type Job = Box<dyn FnOnce() + Send>;

/// The thread that has precedence.
pub struct Preferred(Sender<Job>);

impl Preferred {
    /// Runs `work` there; the threads that it starts have precedence too. None when that thread is gone.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let (say, done) = channel();
        self.0.send(Box::new(move || _ = say.send(work()))).ok()?;
        done.recv().ok()
    }
}

/// Gives this thread precedence, where the system allows it. To be called before rights go and other threads come.
pub fn take() {
    if let Err(error) = sys::set_thread_nice(NICE) {
        tracing::debug!(%error, "the threads that take requests have no precedence (CAP_SYS_NICE)");
    }
}

/// Runs `work` on a thread without precedence, and here what that asks for.
///
/// # Errors
/// When there is no thread.
pub fn beside<R: Send>(work: impl FnOnce(&Preferred) -> R + Send) -> io::Result<R> {
    thread::scope(|scope| {
        let (ask, jobs) = channel();
        let ordinary = move || {
            let _ = sys::set_thread_nice(0);
            work(&Preferred(ask))
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
    fn work_is_done_here_when_it_is_asked_for() {
        let here = thread::current().id();
        let (there, asked) = beside(|preferred| {
            (thread::current().id(), preferred.run(|| thread::current().id()).expect("an answer"))
        })
        .expect("a thread");
        assert!(asked == here && there != here);
    }
}
