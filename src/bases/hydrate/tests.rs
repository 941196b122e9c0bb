//! Jobs on a fake source that is slow, busy or dead.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::fetch::{self, CachedBlocks, Origin};
use crate::fetch::kept::CACHE_BLOCK;
use crate::jobs::{Job, Start, State, Stopped, What};
use crate::source::{Completer, Completion};

const BLOCKS: u64 = 2000;

/// A file of which the first blocks are cached.
#[derive(Default)]
struct Fake {
    here: AtomicU64,
    busy: AtomicBool,
    dead: AtomicBool,
    asked: AtomicU64,
    /// Fetches that never end.
    pending: Mutex<Vec<Completer>>,
}

impl Origin for Fake {
    fn fetch(&self, first: u64, blocks: u64) -> Option<Completion> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let (completer, completion) = Completion::new();
        if self.dead.load(Ordering::SeqCst) {
            self.pending.lock().push(completer);
        } else {
            self.here.store(first + blocks, Ordering::SeqCst);
        }
        Some(completion)
    }
    fn is_busy(&self) -> bool {
        self.busy.load(Ordering::SeqCst)
    }
    fn is_settled(&self) -> bool {
        true
    }
    fn stall(&self) -> Option<String> {
        let stalls = self.busy.load(Ordering::SeqCst) || self.dead.load(Ordering::SeqCst);
        stalls.then(|| "the server does not answer".to_owned())
    }
}

impl CachedBlocks for Fake {
    fn next_missing(&self, from: u64) -> Option<u64> {
        let at = from.max(self.here.load(Ordering::SeqCst));
        (at < BLOCKS).then_some(at)
    }
    fn missing_run(&self, first: u64, max: u64) -> u64 {
        max.min(BLOCKS - first)
    }
    fn bytes(&self) -> u64 {
        self.here.load(Ordering::SeqCst) * CACHE_BLOCK
    }
    fn full(&self) -> Option<String> {
        None
    }
}

fn start(fake: &Arc<Fake>) -> (Arc<Job>, thread::JoinHandle<Result<(), Stopped>>) {
    let job = Job::new(What::Hydrate, 0, BLOCKS * CACHE_BLOCK, Start::default());
    let (fake, job_) = (fake.clone(), job.clone());
    let run = move || {
        let result = fetch::all(&job_, &*fake, &*fake, 0, &|| Ok(()));
        job_.end(&result.clone().map(|()| None));
        result
    };
    (job, thread::spawn(run))
}

#[track_caller]
fn until(what: &str, so: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !so() {
        assert!(Instant::now() < end, "it never came to this: {what}");
        thread::yield_now();
    }
}

#[test]
fn a_hydration_fetches_all_blocks() {
    let fake = Arc::new(Fake::default());
    let (job, thread) = start(&fake);
    assert_eq!(thread.join().unwrap(), Ok(()));
    assert_eq!((job.progress().state, job.progress().bytes), (State::Done, BLOCKS * CACHE_BLOCK));
}

/// One reader waits for a dead server. The hydration gives way to it, reports that it waits, and ends when cancelled.
#[test]
fn a_hydration_behind_a_reader_of_a_dead_server_is_cancelled_at_once() {
    let fake = Arc::new(Fake::default());
    fake.busy.store(true, Ordering::SeqCst);
    let (job, thread) = start(&fake);
    until("it waits", || job.progress().state == State::Waiting);
    assert_eq!(job.progress().error.as_deref(), Some("the server does not answer"));
    assert_eq!(fake.asked.load(Ordering::SeqCst), 0, "the reader comes first");
    job.cancel("the base was evicted");
    job.join();
    assert_eq!(thread.join().unwrap(), Err(Stopped::Cancelled("the base was evicted")));
    let progress = job.progress();
    assert_eq!((progress.state, progress.error.as_deref()), (State::Cancelled, Some("the base was evicted")));
    assert!(progress.has_ended());
}

#[test]
fn a_hydration_continues_when_the_reader_is_served() {
    let fake = Arc::new(Fake::default());
    fake.busy.store(true, Ordering::SeqCst);
    let (job, thread) = start(&fake);
    until("it waits", || job.progress().state == State::Waiting);
    fake.busy.store(false, Ordering::SeqCst);
    assert_eq!(thread.join().unwrap(), Ok(()));
    assert_eq!((job.progress().state, job.progress().error), (State::Done, None));
}

// The state stayed "fetching" without an error.
#[test]
fn a_hydration_of_a_dead_server_says_that_it_waits_and_why() {
    let fake = Arc::new(Fake::default());
    fake.dead.store(true, Ordering::SeqCst);
    let (job, thread) = start(&fake);
    until("it waits", || job.progress().state == State::Waiting);
    assert_eq!(job.progress().error.as_deref(), Some("the server does not answer"));
    job.cancel("the base was removed");
    assert_eq!(thread.join().unwrap(), Err(Stopped::Cancelled("the base was removed")));
}

/// The fetched bytes never come: the wait for them ends, too.
#[test]
fn a_hydration_that_waits_for_a_completion_is_cancelled_at_once() {
    let fake = Arc::new(Fake::default());
    fake.dead.store(true, Ordering::SeqCst);
    let (job, thread) = start(&fake);
    until("requests under way", || fake.pending.lock().len() >= 4);
    job.cancel("the base was removed");
    assert_eq!(thread.join().unwrap(), Err(Stopped::Cancelled("the base was removed")));
    // A job may be cancelled before it begins; cancelling one that has ended does not change it.
    let job = Job::new(What::Verify, 0, 1, Start::default());
    job.cancel("early");
    assert_eq!(job.pause(Duration::from_secs(3600)), Err(Stopped::Cancelled("early")));
    job.end(&Ok(Some(true)));
    job.cancel("late");
    job.join();
    assert_eq!((job.progress().state, job.progress().digest_matches), (State::Done, Some(true)));
}
