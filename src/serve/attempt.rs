//! Requests that may need bytes of a base, from a server or from a file of this host that may hang as a server does.
//!
//! No thread that other requests need waits for these bytes. Without them the work of a request stops with
//! [`Stop::Wait`], having changed nothing, and runs again when the bytes are here. What must hold:
//! - The completions of all earlier tries are held until the request is answered. So the bytes that they brought are
//!   found, and a request ends even if no cache may keep anything.
//! - The file of a base is read only in that base's lane ([`Lane::Base`]). A change first reads what it needs, and then
//!   changes the disk without files, so no running change waits for a base (D28).
//! - A request that waits, in a lane or for a completion, is counted ([`Waiting`](super::waiting::Waiting)). A signal
//!   or the end of its process can end it. The same holds for a read that runs, but not for a change that runs.

use std::sync::Arc;

use parking_lot::Mutex;

use super::error::Stop;
use super::guard::guarded;
use super::measure::Wait;
use super::pool::{Lane, Permit};
use super::runner::Runner;
use super::waiting::{Call, Cancel, Ticket};
use super::{Errno, Target, log};
use crate::base::{Completion, Wanted, without_files};
use crate::stats::Counters;

/// How many times a change may read what it needs of a base and find it evicted from the cache again. After that the
/// change waits for the base while it runs.
const ROUNDS: u32 = 4;

/// Whether a request changes something. A change is refused once the daemon has stopped.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Reads,
    Changes,
}

type Work<T> = Box<dyn Fn() -> Result<T, Stop> + Send>;
type Answer<T> = Box<dyn FnOnce(Result<T, Errno>) + Send>;

/// The origin of a request, and where it runs.
pub(super) struct Origin {
    /// The number of the request, and the thread that made it.
    pub call: Call,
    /// The disk or base to which the request is charged.
    pub target: Target,
    /// The base whose files the request may need.
    pub base: Option<u64>,
    /// The lane for work that waits for the store only.
    pub lane: Lane,
    /// Bytes that the request holds while it waits.
    pub bytes: usize,
    /// Bytes that the request moves when it runs.
    pub moves: usize,
    /// The counters of the disk or base, and those of the disk's base.
    pub counters: [Option<Arc<Counters>>; 2],
}

/// A request that may have to run more than once.
pub(super) struct PendingRequest<T> {
    origin: Origin,
    kind: Kind,
    state: Mutex<State<T>>,
}

struct State<T> {
    tries: Option<Tries<T>>,
    answer: Option<Answer<T>>,
    ticket: Option<(Ticket, Wait)>,
    /// Whether a change is running, which cannot be cancelled.
    pinned: bool,
}

struct Tries<T> {
    work: Work<T>,
    /// Reads the bytes of the base that a change needs.
    prepare: Option<Work<()>>,
    /// The completions for which earlier tries waited.
    held: Vec<Completion>,
    /// Number of times that the request went to the base's lane.
    rounds: u32,
}

/// Where work on an attached disk or base runs first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// On the calling thread, if that may wait for the store.
    CallingThread,
    /// In the disk's lane: the work may have to decode.
    DiskLane,
    /// In the base's lane: the work needs the base's files.
    BaseLane,
}

/// The thread that runs the first part of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Caller {
    /// One of a frontend, which must not wait without a permit.
    Frontend,
    /// One of the pool, in the lane of the disk.
    Lane,
}

/// Whether a try may wait for files of a base.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Files {
    Barred,
    Allowed,
}

impl<T: 'static> Cancel for PendingRequest<T> {
    fn cancel(&self, errno: Errno) -> bool {
        let mut state = self.state.lock();
        if state.pinned {
            return false;
        }
        let (tries, answer, ticket) = (state.tries.take(), state.answer.take(), state.ticket.take());
        drop(state);
        drop((tries, ticket));
        let is_ended = answer.is_some();
        if let Some(answer) = answer {
            answer(Err(errno));
        }
        is_ended
    }
}

impl<T: Send + 'static> PendingRequest<T> {
    pub fn new(
        origin: Origin,
        kind: Kind,
        work: impl Fn() -> Result<T, Stop> + Send + 'static,
        answer: impl FnOnce(Result<T, Errno>) + Send + 'static,
    ) -> Self {
        let tries = Tries { work: Box::new(work), prepare: None, held: Vec::new(), rounds: 0 };
        let state = State { tries: Some(tries), answer: Some(Box::new(answer)), ticket: None, pinned: false };
        Self { origin, kind, state: Mutex::new(state) }
    }

    /// Adds `prepare`, which reads the bytes of the base that a change needs, and changes nothing.
    #[must_use]
    pub fn prepared_by(mut self, prepare: impl Fn() -> Result<(), Stop> + Send + 'static) -> Self {
        if let Some(tries) = &mut self.state.get_mut().tries {
            tries.prepare = Some(Box::new(prepare));
        }
        self
    }

    /// Answers the request, once.
    fn answer(&self, done: Result<T, Errno>) {
        let (answer, ticket) = {
            let mut state = self.state.lock();
            state.pinned = false;
            (state.answer.take(), state.ticket.take())
        };
        // Dropped first: the answer may continue the same request, which then waits under the same number.
        drop(ticket);
        if let Some(answer) = answer {
            answer(done);
        }
    }

    /// Counts the request as waiting. Returns false when too many wait, after answering it.
    fn wait(self: &Arc<Self>, runner: &Arc<Runner>, tries: Option<Tries<T>>) -> bool {
        let has_place = {
            let mut state = self.state.lock();
            state.pinned = false;
            if state.answer.is_none() {
                // It was cancelled.
                return false;
            }
            if tries.is_some() {
                state.tries = tries;
            }
            state.ticket.is_some()
        };
        let Origin { call, target, bytes, .. } = self.origin;
        let waiting = &runner.waiting;
        if has_place {
            waiting.waits_again(call.request);
            return true;
        }
        let this: Arc<dyn Cancel> = self.clone();
        let counters = &self.origin.counters;
        match waiting.admit(target, bytes, call, Arc::downgrade(&this)) {
            Some(ticket) => {
                let ticket = (ticket, Wait::new(counters.clone()));
                let mut state = self.state.lock();
                let is_wanted = state.answer.is_some();
                let unused = if is_wanted { state.ticket.replace(ticket) } else { Some(ticket) };
                drop(state);
                drop(unused);
                is_wanted
            }
            None => {
                log::refused(target, waiting.counts());
                counters.iter().flatten().for_each(|counters| counters.refused());
                drop(self.state.lock().tries.take());
                // Not EAGAIN: io_uring would submit such a request again at once, without end.
                self.answer(Err(Errno::EIO));
                false
            }
        }
    }

    /// Sets how many bytes the request moves.
    #[must_use]
    pub fn moving(mut self, bytes: usize) -> Self {
        self.origin.moves = bytes;
        self
    }

    /// Runs the request where it may wait for what it needs.
    pub fn submit(self, runner: &Arc<Runner>, place: Place) {
        let this = Arc::new(self);
        match place {
            Place::BaseLane => this.spawn_in_base(runner),
            Place::DiskLane => this.spawn(runner, Files::Barred),
            Place::CallingThread => match runner.pool.try_inline_for(this.origin.lane, this.origin.moves) {
                Some(permit) => this.run_with(runner, Files::Barred, Some(permit)),
                None => this.spawn(runner, Files::Barred),
            },
        }
    }

    /// Runs the request on a thread of its lane, as far as it need not wait for files of a base.
    pub fn run_in_lane(self, runner: &Arc<Runner>, place: Place) {
        let this = Arc::new(self);
        match place {
            Place::BaseLane => this.spawn_in_base(runner),
            Place::DiskLane | Place::CallingThread => this.run(runner, Files::Barred),
        }
    }

    /// As [`run_in_lane`](Self::run_in_lane), for work that needs no files at first.
    pub fn run_here(self: Arc<Self>, runner: &Arc<Runner>) {
        self.run(runner, Files::Barred);
    }

    /// Queues the request in its lane, where it holds `bytes` of a write. Runs it on the calling thread when too many
    /// bytes wait.
    pub fn submit_later(self: Arc<Self>, runner: &Arc<Runner>, bytes: usize) {
        let (pool, lane, runner) = (&runner.pool, self.origin.lane, runner.clone());
        let job = Box::new(move || self.run(&runner, Files::Barred));
        if let Some(job) = pool.spawn_bounded(lane, bytes, job) {
            job();
        }
    }

    /// Queues the request in the base's lane, where it may wait for files.
    pub fn spawn_in_base(self: Arc<Self>, runner: &Arc<Runner>) {
        let lane = self.origin.base.map_or(self.origin.lane, Lane::Base);
        self.spawn_in(runner, lane);
    }

    /// Runs it when `completion`, for which an earlier try stopped, is complete.
    pub fn wait_for(self: Arc<Self>, runner: &Arc<Runner>, completion: Completion) {
        if let Some(tries) = self.state.lock().tries.take() {
            self.clone().run_when(runner, tries, completion, Files::Barred);
        }
    }

    /// Queues the request in its lane, or in the base's lane when it needs files.
    fn spawn(self: Arc<Self>, runner: &Arc<Runner>, files: Files) {
        let (pool, runner) = (&runner.pool, runner.clone());
        let lane = match (files, self.origin.base) {
            (Files::Allowed, Some(base)) => Lane::Base(base),
            _ => self.origin.lane,
        };
        pool.spawn_sized(lane, self.origin.moves, move || self.run(&runner, files));
    }

    /// As [`spawn`](Self::spawn), in a lane where the request may wait for files as long as they take.
    pub fn spawn_in(self: Arc<Self>, runner: &Arc<Runner>, lane: Lane) {
        if self.wait(runner, None) {
            let (pool, runner) = (&runner.pool, runner.clone());
            pool.spawn_sized(lane, self.origin.moves, move || self.run(&runner, Files::Allowed));
        }
    }

    /// Runs the request once, and handles the result.
    fn run(self: Arc<Self>, runner: &Arc<Runner>, files: Files) {
        self.run_with(runner, files, None);
    }

    /// As [`run`](Self::run), on a thread of a frontend that holds a permit to wait for the store.
    fn run_with(self: Arc<Self>, runner: &Arc<Runner>, files: Files, permit: Option<Permit>) {
        // A signal may have ended the request.
        let Some(mut tries) = self.state.lock().tries.take() else { return };
        let mut files = files;
        if let (Files::Allowed, Some(prepare)) = (files, &tries.prepare)
            && tries.rounds <= ROUNDS
        {
            match guarded(prepare) {
                Err(Stop::Wait(completion)) => {
                    return self.run_when(runner, tries, completion, Files::Allowed);
                }
                Err(Stop::Errno(errno)) => return self.answer(Err(errno)),
                // The bytes are in memory now, so the work needs no files.
                Ok(()) => files = Files::Barred,
            }
        }
        let gate = match self.kind {
            Kind::Reads => None,
            Kind::Changes => {
                let mut state = self.state.lock();
                if state.answer.is_none() {
                    return;
                }
                state.pinned = true;
                drop(state);
                let Some(inside) = runner.gate.enter() else { return self.answer(Err(Errno::EIO)) };
                Some(inside)
            }
        };
        let work = || guarded(|| (tries.work)());
        let (done, wanted) = match files {
            Files::Barred => without_files(work),
            Files::Allowed => (work(), Wanted::Nothing),
        };
        // The end of the daemon does not wait for what follows: the kernel sends the request again to the next worker.
        drop(gate);
        // Nor does the answer to a change wait for the store. The answer to a read moves its bytes.
        let _permit = permit.filter(|_| self.kind == Kind::Reads);
        match done {
            Ok(done) => self.answer(Ok(done)),
            Err(Stop::Errno(errno)) => self.answer(Err(errno)),
            Err(Stop::Wait(completion)) => {
                if wanted == Wanted::File && self.origin.base.is_some() {
                    tries.held.push(completion);
                    tries.rounds += 1;
                    if self.wait(runner, Some(tries)) {
                        self.spawn(runner, Files::Allowed);
                    }
                } else {
                    self.run_when(runner, tries, completion, Files::Barred);
                }
            }
        }
    }

    /// Runs it again when `completion` is complete.
    fn run_when(
        self: Arc<Self>,
        runner: &Arc<Runner>,
        mut tries: Tries<T>,
        completion: Completion,
        files: Files,
    ) {
        tries.held.push(completion.clone());
        if self.wait(runner, Some(tries)) {
            let runner = runner.clone();
            completion.then(move || self.spawn(&runner, files));
        }
    }
}
