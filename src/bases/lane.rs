//! Threads for work that waits for a disk. Each purpose has a lane with a bounded number of threads.
//!
//! What must hold: work that hangs, as a file on a hanging filesystem does, blocks the threads of its own lane only.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::Builder;
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::io::priority;

type Job = Box<dyn FnOnce() + Send>;

/// A thread without work for this time ends.
const IDLE: Duration = Duration::from_secs(10);
/// Small, because memory may be locked; these jobs are not deep.
const STACK: usize = 256 << 10;

/// See the module.
pub struct Lane {
    /// Name of its threads.
    name: &'static str,
    /// Most threads at a time.
    threads: usize,
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    running: usize,
    idle: usize,
    waiting: VecDeque<Job>,
}

impl Lane {
    /// With at most `threads` threads at a time. `name` has at most 15 bytes.
    pub fn new(name: &'static str, threads: usize) -> Arc<Self> {
        Arc::new(Self { name, threads, state: Mutex::default(), work: Condvar::new() })
    }

    /// Runs a job on a thread of the lane, in the order of the calls.
    pub fn run(self: &Arc<Self>, job: Job) {
        let mut state = self.state.lock();
        state.waiting.push_back(job);
        if state.idle >= state.waiting.len() {
            self.work.notify_one();
        } else if state.running < self.threads {
            state.running += 1;
            drop(state);
            self.start();
        }
    }

    /// Starts a thread that is counted already.
    fn start(self: &Arc<Self>) {
        let this = self.clone();
        let thread = Builder::new().name(self.name.into()).stack_size(STACK);
        if let Err(error) = thread.spawn(move || this.serve()) {
            tracing::error!(
                %error,
                lane = self.name,
                "no thread can be started, and work waits; check the limit of processes"
            );
            self.state.lock().running -= 1;
        }
    }

    fn serve(self: Arc<Self>) {
        // A thread of background work may have started this one.
        priority::ordinary();
        /// Starts another thread when a job panics.
        struct Place<'a>(&'a Arc<Lane>);
        impl Drop for Place<'_> {
            fn drop(&mut self) {
                // The jobs that wait are not lost with this thread.
                self.0.start();
            }
        }
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.waiting.pop_front() {
                MutexGuard::unlocked(&mut state, || {
                    let place = Place(&self);
                    job();
                    std::mem::forget(place);
                });
                continue;
            }
            state.idle += 1;
            let waited = self.work.wait_for(&mut state, IDLE);
            state.idle -= 1;
            if waited.timed_out() && state.waiting.is_empty() {
                state.running -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    /// Reads of a file on a hanging filesystem took all threads, and the cache, names and credentials had none.
    #[test]
    fn a_hanging_lane_takes_no_thread_of_another() {
        let (hangs, works) = (Lane::new("hangs", 2), Lane::new("works", 2));
        let (end, ends) = mpsc::channel::<()>();
        let ends = Arc::new(Mutex::new(ends));
        let (done, all_done) = mpsc::channel();
        for number in 0..100 {
            let (ends, done) = (ends.clone(), done.clone());
            hangs.run(Box::new(move || {
                _ = ends.lock().recv();
                _ = done.send(number);
            }));
        }
        let (worked, has_worked) = mpsc::channel();
        for number in 0..100 {
            let worked = worked.clone();
            works.run(Box::new(move || {
                assert!(number != 50, "a job that panics ends no other");
                _ = worked.send(number);
            }));
        }
        for _ in 0..99 {
            has_worked.recv_timeout(Duration::from_secs(60)).expect("it works");
        }
        assert!(hangs.state.lock().running <= 2);
        drop(end);
        for _ in 0..100 {
            all_done.recv_timeout(Duration::from_secs(60)).expect("it continues");
        }
    }
}
