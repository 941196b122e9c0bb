//! Requests that need bytes of a base: from a server, or from a file of this host that may hang as a server does.
//!
//! No thread that others need waits for them. The work of a request stops with [`Stop::Wait`], having changed nothing,
//! and is run again when the bytes are here. What must hold:
//! - The arrivals of all earlier tries are held until the request is answered, so that what they brought is found, and a
//!   request comes to an end although no cache may keep anything.
//! - The file of a base is read in that base's lane only ([`Lane::Base`]). A change reads what it needs first, and then
//!   changes the disk without files: so no change that is under way waits for a base (D28).
//! - A request that waits, in a lane or for an arrival, is counted ([`Waiting`](super::waiting::Waiting)) and can be
//!   ended by a signal, or with its process. So can one that reads. A change that is under way can not.

use std::sync::Arc;

use parking_lot::Mutex;

use super::error::Stop;
use super::guard::guarded;
use super::pool::Lane;
use super::runner::Runner;
use super::waiting::{Call, Cancel, Ticket};
use super::{Errno, Target, log};
use crate::base::{Arrival, Wanted, without_files};

/// So often a change reads what it needs of a base and finds it gone from the cache; then it waits with the change
/// under way.
const ROUNDS: u32 = 4;

/// Whether a request changes something, which it must not do once the daemon has stopped.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Reads,
    Changes,
}

type Work<T> = Box<dyn Fn() -> Result<T, Stop> + Send>;
type Answer<T> = Box<dyn FnOnce(Result<T, Errno>) + Send>;

/// Of whom a request is, and where it runs.
#[derive(Clone, Copy)]
pub(super) struct Origin {
    /// Its number, and who made it.
    pub call: Call,
    /// Its disk or base, which it counts for.
    pub target: Target,
    /// The base whose files it may need.
    pub base: Option<u64>,
    /// Where it runs as long as it waits for the store only.
    pub lane: Lane,
    /// Bytes that it holds while it waits.
    pub bytes: usize,
    /// Bytes that it moves.
    pub moves: usize,
}

/// A request that may have to be run more than once.
pub(super) struct Attempt<T> {
    origin: Origin,
    kind: Kind,
    state: Mutex<State<T>>,
}

struct State<T> {
    tries: Option<Tries<T>>,
    answer: Option<Answer<T>>,
    ticket: Option<Ticket>,
    /// A change is under way.
    pinned: bool,
}

struct Tries<T> {
    work: Work<T>,
    /// Reads what a change needs of the base.
    prepare: Option<Work<()>>,
    /// What earlier tries waited for.
    held: Vec<Arrival>,
    /// How many times it went to the base's lane.
    rounds: u32,
}

/// Where work on an attached disk or base runs first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// On this thread, if it may wait for the store.
    Here,
    /// In the disk's lane: it may have to decode.
    Lane,
    /// In the base's lane: it needs its files.
    Base,
}

/// Whether a try may wait for files of a base.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Files {
    Barred,
    Allowed,
}

impl<T: 'static> Cancel for Attempt<T> {
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

impl<T: Send + 'static> Attempt<T> {
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

    /// A change that needs bytes of the base: `prepare` reads them, and changes nothing.
    #[must_use]
    pub fn prepared_by(mut self, prepare: impl Fn() -> Result<(), Stop> + Send + 'static) -> Self {
        if let Some(tries) = &mut self.state.get_mut().tries {
            tries.prepare = Some(Box::new(prepare));
        }
        self
    }

    /// The answer, once.
    fn answer(&self, done: Result<T, Errno>) {
        let (answer, ticket) = {
            let mut state = self.state.lock();
            state.pinned = false;
            (state.answer.take(), state.ticket.take())
        };
        // First: the answer may go on with the same request, which then waits under the same number.
        drop(ticket);
        if let Some(answer) = answer {
            answer(done);
        }
    }

    /// Counts it among those that wait; false when too many do, and then it is answered.
    fn wait(self: &Arc<Self>, runner: &Arc<Runner>, tries: Option<Tries<T>>) -> bool {
        let has_place = {
            let mut state = self.state.lock();
            state.pinned = false;
            if state.answer.is_none() {
                // It was ended.
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
        match waiting.admit(target, bytes, call, Arc::downgrade(&this)) {
            Some(ticket) => {
                let mut state = self.state.lock();
                let is_wanted = state.answer.is_some();
                let unused = if is_wanted { state.ticket.replace(ticket) } else { Some(ticket) };
                drop(state);
                drop(unused);
                is_wanted
            }
            None => {
                log::refused(target, waiting.counts());
                drop(self.state.lock().tries.take());
                // Not EAGAIN: io_uring submits a request that ends with it again at once, without end.
                self.answer(Err(Errno::EIO));
                false
            }
        }
    }

    /// It moves so many bytes.
    #[must_use]
    pub fn moving(mut self, bytes: usize) -> Self {
        self.origin.moves = bytes;
        self
    }

    /// Runs it where it may wait for what it needs.
    pub fn submit(self, runner: &Arc<Runner>, place: Place) {
        let this = Arc::new(self);
        match place {
            Place::Base => this.spawn_in_base(runner),
            Place::Lane => this.spawn(runner, Files::Barred),
            Place::Here => match runner.pool.try_inline_for(this.origin.lane, this.origin.moves) {
                Some(_permit) => this.run(runner, Files::Barred),
                None => this.spawn(runner, Files::Barred),
            },
        }
    }

    /// Hands it over to its lane, where it holds `bytes` of a write. It runs here when too many bytes wait there.
    pub fn submit_later(self: Arc<Self>, runner: &Arc<Runner>, bytes: usize) {
        let (pool, lane, runner) = (&runner.pool, self.origin.lane, runner.clone());
        let job = Box::new(move || self.run(&runner, Files::Barred));
        if let Some(job) = pool.spawn_bounded(lane, bytes, job) {
            job();
        }
    }

    /// Runs it in the base's lane, where it may wait for files.
    pub fn spawn_in_base(self: Arc<Self>, runner: &Arc<Runner>) {
        let lane = self.origin.base.map_or(self.origin.lane, Lane::Base);
        self.spawn_in(runner, lane);
    }

    /// Runs it when `arrival` has happened, for which an earlier try stopped.
    pub fn wait_for(self: Arc<Self>, runner: &Arc<Runner>, arrival: Arrival) {
        if let Some(tries) = self.state.lock().tries.take() {
            self.clone().run_when(runner, tries, arrival, Files::Barred);
        }
    }

    /// Runs it in its lane, or in that of the base when it needs files.
    fn spawn(self: Arc<Self>, runner: &Arc<Runner>, files: Files) {
        let (pool, runner) = (&runner.pool, runner.clone());
        let lane = match (files, self.origin.base) {
            (Files::Allowed, Some(base)) => Lane::Base(base),
            _ => self.origin.lane,
        };
        pool.spawn_moving(lane, self.origin.moves, move || self.run(&runner, files));
    }

    /// As [`spawn`](Self::spawn), in a lane where it may wait for files for as long as they take.
    pub fn spawn_in(self: Arc<Self>, runner: &Arc<Runner>, lane: Lane) {
        if self.wait(runner, None) {
            let (pool, runner) = (&runner.pool, runner.clone());
            pool.spawn_moving(lane, self.origin.moves, move || self.run(&runner, Files::Allowed));
        }
    }

    /// One try, and what follows from it.
    fn run(self: Arc<Self>, runner: &Arc<Runner>, files: Files) {
        // It may have been ended by a signal.
        let Some(mut tries) = self.state.lock().tries.take() else { return };
        let mut files = files;
        if let (Files::Allowed, Some(prepare)) = (files, &tries.prepare)
            && tries.rounds <= ROUNDS
        {
            match guarded(prepare) {
                Err(Stop::Wait(arrival)) => return self.run_when(runner, tries, arrival, Files::Allowed),
                Err(Stop::Errno(errno)) => return self.answer(Err(errno)),
                // What is in memory now is found without files.
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
        // An end of the daemon does not wait for what comes; the request is sent again to the next worker.
        drop(gate);
        match done {
            Ok(done) => self.answer(Ok(done)),
            Err(Stop::Errno(errno)) => self.answer(Err(errno)),
            Err(Stop::Wait(arrival)) => {
                if wanted == Wanted::File && self.origin.base.is_some() {
                    tries.held.push(arrival);
                    tries.rounds += 1;
                    if self.wait(runner, Some(tries)) {
                        self.spawn(runner, Files::Allowed);
                    }
                } else {
                    self.run_when(runner, tries, arrival, Files::Barred);
                }
            }
        }
    }

    /// Runs it again when `arrival` has happened.
    fn run_when(self: Arc<Self>, runner: &Arc<Runner>, mut tries: Tries<T>, arrival: Arrival, files: Files) {
        tries.held.push(arrival.clone());
        if self.wait(runner, Some(tries)) {
            let runner = runner.clone();
            arrival.then(move || self.spawn(&runner, files));
        }
    }
}
