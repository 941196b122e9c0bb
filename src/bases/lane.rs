//! Threads that wait for a disk, so many for each purpose.
//!
//! What must hold: work that hangs (a file on a filesystem that does) keeps the threads of its own lane, and no other's.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::runtime::Handle;

type Job = Box<dyn FnOnce() + Send>;

/// See the module.
pub struct Lane {
    handle: Handle,
    /// Threads at a time.
    threads: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    running: usize,
    waiting: VecDeque<Job>,
}

impl Lane {
    /// At most so many of the runtime's threads for blocking work at a time.
    pub fn new(handle: Handle, threads: usize) -> Arc<Self> {
        Arc::new(Self { handle, threads, state: Mutex::default() })
    }

    /// Runs a job when there is a thread for it, in the order in which they came.
    pub fn run(self: &Arc<Self>, job: Job) {
        {
            let mut state = self.state.lock();
            state.waiting.push_back(job);
            if state.running == self.threads {
                return;
            }
            state.running += 1;
        }
        let this = self.clone();
        drop(self.handle.spawn_blocking(move || this.work()));
    }

    fn work(self: Arc<Self>) {
        /// Gives the place back when a job panics.
        struct Place<'a>(&'a Arc<Lane>);
        impl Drop for Place<'_> {
            fn drop(&mut self) {
                self.0.state.lock().running -= 1;
                // The others are not lost with this one.
                self.0.run(Box::new(|| {}));
            }
        }
        loop {
            let job = {
                let mut state = self.state.lock();
                match state.waiting.pop_front() {
                    Some(job) => job,
                    None => {
                        state.running -= 1;
                        return;
                    }
                }
            };
            let place = Place(&self);
            job();
            std::mem::forget(place);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    /// Reads of a file on a filesystem that hangs took all threads, and with them those of the cache, of names and of
    /// credentials.
    #[test]
    fn a_lane_that_hangs_keeps_no_thread_from_another() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).build().unwrap();
        let (hangs, works) = (Lane::new(runtime.handle().clone(), 2), Lane::new(runtime.handle().clone(), 2));
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
                assert!(number != 50, "one that panics takes no other along");
                _ = worked.send(number);
            }));
        }
        for _ in 0..99 {
            has_worked.recv_timeout(Duration::from_secs(60)).expect("it works");
        }
        assert!(hangs.state.lock().running <= 2);
        drop(end);
        for _ in 0..100 {
            all_done.recv_timeout(Duration::from_secs(60)).expect("it goes on");
        }
    }
}
