//! Threads for work that may wait, in lanes, so that one party's waiting delays no other party.
//!
//! Each job belongs to a lane: data of one disk, its flushes, files of one base, names. What must hold:
//! - A lane runs a bounded number of jobs at a time, which move a bounded number of bytes, in the order of its queue.
//!   Lanes that have work take turns, whatever the lengths of their queues.
//! - A job that runs for longer than [`STUCK`] does not count against the pool: another thread takes its place, up to
//!   [`max_threads`]. So a filesystem that hangs holds the threads of its own lanes only.
//! - A FUSE thread runs work itself only while enough other FUSE threads are free ([`Pool::try_inline`]), only work
//!   that waits for nothing but the store, and a large request only while its lane has no other work. So a single
//!   request needs no hand-over, and large requests of one disk leave FUSE threads and processors to the other disks
//!   (D59).

#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::io::sys;

pub type Job = Box<dyn FnOnce() + Send>;

/// A job that runs for longer may wait for something that hangs. A job that does not hang then occupies one thread more
/// for a while.
const STUCK: Duration = Duration::from_millis(100);
/// How often the pool looks for stuck jobs while work waits for a thread.
const WATCH_INTERVAL: Duration = Duration::from_millis(25);
const STACK: usize = 512 << 10;

/// Most threads of the pool, with stuck ones.
fn max_threads(threads: usize) -> usize {
    (threads * 8).max(512)
}

/// The party that a job works for, and the kind of the job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Reads, writes and discards of a disk that wait for the store only.
    Disk(u64),
    /// Flushes of a disk.
    Sync(u64),
    /// Opening a disk without a base, and its attributes; attributes of a base.
    Node(u64),
    /// Requests that need the files of a base, of any disk.
    Base(u64),
    /// Opening a base's files; open and stat of detached disks on it.
    Attach(u64),
    /// Changes of names and records.
    Names,
    /// Removing disks that have no name and no user, of one pool: one drive may hang.
    Purge(u64),
    /// statfs of the store's filesystem.
    Space,
}

impl Lane {
    /// Jobs of the lane that run at a time.
    fn width(self) -> usize {
        match self {
            Lane::Disk(_) | Lane::Base(_) => 16,
            Lane::Sync(_) | Lane::Attach(_) | Lane::Names => 4,
            Lane::Node(_) | Lane::Space => 2,
            Lane::Purge(_) => 1,
        }
    }
}

/// A request of more bytes occupies a thread for so long that other requests notice.
pub const LARGE: usize = 256 << 10;

/// Bytes that the running jobs of one lane move at a time. A job that runs alone may move more. The first call reads
/// files of the kernel that a confined process may not read.
pub fn lane_byte_limit() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    *BYTES.get_or_init(|| std::thread::available_parallelism().map_or(4, NonZero::get).max(4) << 20)
}

/// Bytes of writes that wait in one lane. Writes above this run on FUSE threads while enough others are free.
const QUEUED_BYTES: usize = 16 << 20;
/// Bytes of writes that may always wait in a lane, whatever the others have.
const FLOOR_BYTES: usize = 1 << 20;

/// Bytes of writes that may wait in all lanes: an eighth of the machine's memory, 256 MiB at least. A lane has at most as
/// much as is left for all others. The first call makes a system call that a confined process may not make.
pub fn queued_bytes_limit() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    *BYTES.get_or_init(|| (sys::total_memory() / 8).max(256 << 20))
}

struct Queued {
    job: Job,
    /// Bytes that the job holds while it waits.
    held: usize,
    /// Bytes that the job moves when it runs.
    moves: usize,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Queued>,
    /// Bytes that the waiting jobs hold.
    held: usize,
    running: usize,
    /// Bytes that the running jobs move.
    moved: usize,
    /// Whether the lane is in the list `ready`.
    listed: bool,
}

struct State {
    lanes: HashMap<Lane, Queue>,
    /// Lanes whose first job may run.
    ready: VecDeque<Lane>,
    /// When each thread began its job, by the thread's number; `None`: it has none.
    began: Vec<Option<Instant>>,
    /// Where each thread waits for work, by the thread's number.
    work: Vec<Arc<Condvar>>,
    /// Numbers of ended threads, for reuse.
    free: Vec<usize>,
    threads: usize,
    /// Numbers of the threads that wait for work. The last one that began to wait is woken first: its buffers are still
    /// in the processor's cache.
    idle: Vec<usize>,
    /// Bytes that all waiting jobs hold.
    held: usize,
    closed: bool,
}

struct Shared {
    state: Mutex<State>,
    /// Work waits and no thread is idle.
    backlog: Condvar,
    threads: usize,
    /// Bytes of writes that may wait in all lanes.
    queued_bytes: usize,
}

/// See the module.
pub struct Pool {
    shared: Arc<Shared>,
    permits: Arc<AtomicUsize>,
}

/// Permission to wait for the store on this thread.
pub struct Permit(Arc<AtomicUsize>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Release);
    }
}

impl State {
    /// Adds a job to the queue of its lane.
    fn add(&mut self, lane: Lane, job: Queued) {
        let queue = self.lanes.entry(lane).or_default();
        queue.held += job.held;
        self.held += job.held;
        queue.jobs.push_back(job);
        self.list(lane);
    }

    /// Lists a lane when it has work and may run it.
    fn list(&mut self, lane: Lane) {
        if let Some(queue) = self.lanes.get_mut(&lane)
            && !queue.listed
            && let Some(next) = queue.jobs.front()
            && queue.running < lane.width()
            && (queue.moved == 0 || queue.moved + next.moves <= lane_byte_limit())
        {
            queue.listed = true;
            self.ready.push_back(lane);
        }
    }

    /// The next job: the oldest of the next lane in the round.
    fn take(&mut self) -> Option<(Lane, Job, usize)> {
        let lane = self.ready.pop_front()?;
        let queue = self.lanes.get_mut(&lane)?;
        queue.listed = false;
        let Queued { job, held, moves } = queue.jobs.pop_front()?;
        queue.running += 1;
        queue.moved += moves;
        queue.held -= held;
        self.held -= held;
        self.list(lane);
        Some((lane, job, moves))
    }

    fn ended(&mut self, lane: Lane, moves: usize) {
        if let Some(queue) = self.lanes.get_mut(&lane) {
            queue.running -= 1;
            queue.moved -= moves;
            if queue.running == 0 && queue.jobs.is_empty() {
                self.lanes.remove(&lane);
            }
        }
        self.list(lane);
    }

    /// Wakes a thread that waits for work. Returns false when there is none.
    fn wake_one(&mut self) -> bool {
        let Some(number) = self.idle.pop() else { return false };
        self.work[number].notify_one();
        true
    }

    fn stuck(&self) -> usize {
        self.began.iter().flatten().filter(|began| began.elapsed() > STUCK).count()
    }
}

impl Pool {
    /// Starts `threads` threads. At most `inline` callers run work themselves at a time.
    ///
    /// # Errors
    /// When threads cannot be started.
    pub fn new(threads: usize, inline: usize) -> io::Result<Self> {
        Self::bounded(threads, inline, queued_bytes_limit())
    }

    /// As [`new`](Self::new), with a bound on the bytes of writes that wait.
    fn bounded(threads: usize, inline: usize, queued_bytes: usize) -> io::Result<Self> {
        let state = State {
            lanes: HashMap::new(),
            ready: VecDeque::new(),
            began: Vec::new(),
            work: Vec::new(),
            free: Vec::new(),
            threads: 0,
            idle: Vec::new(),
            held: 0,
            closed: false,
        };
        let (state, backlog) = (Mutex::new(state), Condvar::new());
        let shared = Arc::new(Shared { state, backlog, threads, queued_bytes });
        for _ in 0..threads {
            let mut state = shared.state.lock();
            shared.start_one(&mut state)?;
        }
        let watched = shared.clone();
        std::thread::Builder::new().name("io-watch".into()).spawn(move || watched.watch())?;
        Ok(Self { shared, permits: Arc::new(AtomicUsize::new(inline)) })
    }

    /// A permit to wait for the store on the calling thread, if enough others are free.
    pub fn try_inline(&self) -> Option<Permit> {
        let take = |n: usize| n.checked_sub(1);
        let taken = self.permits.fetch_update(Ordering::Acquire, Ordering::Relaxed, take);
        taken.is_ok().then(|| Permit(self.permits.clone()))
    }

    /// As [`try_inline`](Self::try_inline), for work in a lane that moves `bytes` bytes.
    pub fn try_inline_for(&self, lane: Lane, bytes: usize) -> Option<Permit> {
        if bytes > LARGE && self.shared.state.lock().lanes.contains_key(&lane) {
            return None;
        }
        self.try_inline()
    }

    /// Queues a job in a lane.
    pub fn spawn(&self, lane: Lane, job: impl FnOnce() + Send + 'static) {
        self.spawn_sized(lane, 0, job);
    }

    /// Queues a job that moves `bytes` bytes.
    pub fn spawn_sized(&self, lane: Lane, bytes: usize, job: impl FnOnce() + Send + 'static) {
        let mut state = self.shared.state.lock();
        state.add(lane, Queued { job: Box::new(job), held: 0, moves: bytes });
        self.shared.wake(&mut state);
    }

    /// Queues a job that holds and moves `bytes` bytes. Runs it on the calling thread instead when many bytes wait in its
    /// lane and a permit is free. Returns it when its lane already holds as much as is left for all other lanes: so a lane
    /// that takes all it can never keeps another one from queueing (D49).
    pub fn spawn_bounded(&self, lane: Lane, bytes: usize, job: Job) -> Option<Job> {
        let mut state = self.shared.state.lock();
        let left = self.shared.queued_bytes.saturating_sub(state.held).max(FLOOR_BYTES);
        let queue = state.lanes.entry(lane).or_default();
        let wanted = queue.held + bytes;
        if !queue.jobs.is_empty() && wanted > left.min(QUEUED_BYTES) {
            if let Some(permit) = self.try_inline() {
                drop(state);
                job();
                drop(permit);
                return None;
            }
            if wanted > left {
                return Some(job);
            }
        }
        state.add(lane, Queued { job, held: bytes, moves: bytes });
        self.shared.wake(&mut state);
        None
    }

    /// Runs a job that waits for the store only: on the calling thread if it may wait, otherwise in the lane.
    pub fn run(&self, lane: Lane, job: impl FnOnce() + Send + 'static) {
        match self.try_inline() {
            Some(_permit) => job(),
            None => self.spawn(lane, job),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.closed = true;
        while state.wake_one() {}
        drop(state);
        self.shared.backlog.notify_all();
    }
}

impl Shared {
    /// Wakes an idle thread for ready work, if there is any, or the watcher, which may start one.
    fn wake(&self, state: &mut State) {
        if !state.ready.is_empty() && !state.wake_one() {
            self.backlog.notify_one();
        }
    }

    fn start_one(self: &Arc<Self>, state: &mut State) -> io::Result<()> {
        let number = state.free.pop().unwrap_or(state.began.len());
        if number == state.began.len() {
            state.began.push(None);
            state.work.push(Arc::default());
        }
        let shared = self.clone();
        let thread = std::thread::Builder::new().name(format!("io-{number}")).stack_size(STACK);
        match thread.spawn(move || shared.serve(number)) {
            Ok(_) => {
                state.threads += 1;
                Ok(())
            }
            Err(error) => {
                state.free.push(number);
                Err(error)
            }
        }
    }

    fn serve(&self, number: usize) {
        let mut state = self.state.lock();
        let work = state.work[number].clone();
        loop {
            if let Some((lane, job, moves)) = state.take() {
                state.began[number] = Some(Instant::now());
                // One notification may stand for more than one job.
                if !state.ready.is_empty() {
                    self.wake(&mut state);
                }
                MutexGuard::unlocked(&mut state, job);
                state.began[number] = None;
                state.ended(lane, moves);
                continue;
            }
            // A thread that took the place of a stuck one ends when the stuck one is back.
            if state.closed || state.threads > self.threads && state.threads > self.threads + state.stuck() {
                state.threads -= 1;
                state.free.push(number);
                return;
            }
            state.idle.push(number);
            while state.idle.contains(&number) {
                work.wait(&mut state);
            }
        }
    }

    /// Starts threads in place of stuck ones while work waits.
    fn watch(self: &Arc<Self>) {
        let mut state = self.state.lock();
        while !state.closed {
            if state.ready.is_empty() || !state.idle.is_empty() {
                self.backlog.wait(&mut state);
                continue;
            }
            let wanted = (self.threads + state.stuck()).min(max_threads(self.threads));
            while state.threads < wanted {
                if let Err(error) = self.start_one(&mut state) {
                    tracing::error!(%error, threads = state.threads, "no thread can be started for waiting work; it waits for the threads that there are");
                    break;
                }
            }
            self.backlog.wait_for(&mut state, WATCH_INTERVAL);
        }
    }
}
