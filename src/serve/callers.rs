//! Which process a request that waits is of, and whether that process is ending.
//!
//! The kernel interrupts a request whose caller waits for it. An asynchronous one (libaio, io_uring) has no such caller,
//! and a killed process does not end before these do. So their processes are looked at while they wait.
//!
//! What must hold:
//! - A request ends because its own process does, and for nothing else. The process is learned once, as soon as the
//!   request waits, and is known by its number and the time of its start: later the thread may be gone, and its number
//!   another's. A request whose thread is gone before it was seen is left alone (D56).
//! - Each process is looked at once in a round, however many requests it has, and a round looks at [`MOST`]. A thread is
//!   looked at once in five seconds (D57).
//! - This process reads nothing of others; it asks ([`Lookup`]). Without an answer requests wait on.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use super::RequestId;

/// How often processes are looked at, while requests of theirs wait.
pub(super) const ROUND: Duration = Duration::from_millis(500);
/// The shortest time between two questions, so that threads are asked about many at a time.
const PAUSE: Duration = Duration::from_millis(50);
/// For so long the number of a thread means the same thread: until all other numbers were given out, which takes as
/// many new threads.
const FRESH: Duration = Duration::from_secs(5);
/// Threads, and processes, of a question.
pub const MOST: usize = 128;

/// A process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Process {
    /// Its number in the pid namespace of the mount.
    pub id: u32,
    /// When it started, in the unit of proc(5): processes of the same number differ in it.
    pub start: u64,
}

/// What is to be found out.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Question {
    /// Which processes these threads are of.
    pub threads: Vec<u32>,
    /// Which of these are ending.
    pub processes: Vec<Process>,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Findings {
    /// Threads of the question that are there, with their processes.
    pub threads: Vec<(u32, Process)>,
    /// Processes of the question that are ending, or have ended.
    pub ending: Vec<Process>,
}

/// Finds out; `None` when there is no answer. It may take a while.
pub type Lookup = Box<dyn Fn(&Question) -> Option<Findings> + Send>;

/// A request whose process is not known.
#[derive(Debug, Clone, Copy)]
struct Stranger {
    since: Instant,
    unique: RequestId,
    thread: u32,
}

/// Those who made the requests that wait.
#[derive(Default)]
pub(super) struct Callers {
    /// Whether there is anything to ask.
    pub watched: bool,
    /// In the order in which they began to wait.
    strangers: VecDeque<Stranger>,
    /// Threads that were looked at a short while ago, and when; those without a process are not seen, or were gone.
    threads: HashMap<u32, (Option<Process>, Instant)>,
    process_of: HashMap<RequestId, Process>,
    requests_of: HashMap<Process, HashSet<RequestId>>,
    /// Those known, the one that is looked at next first.
    turns: VecDeque<Process>,
    /// When it may be asked about threads, and about processes.
    threads_at: Option<Instant>,
    processes_at: Option<Instant>,
}

impl Callers {
    /// A request begins to wait; `thread` is 0 when it is not seen from the mount. Says whether [`due`](Self::due) may
    /// be earlier now.
    pub fn came(&mut self, unique: RequestId, thread: u32, now: Instant) -> bool {
        if !self.watched || thread == 0 {
            return false;
        }
        match self.threads.get(&thread) {
            Some((Some(process), seen)) if now.saturating_duration_since(*seen) < FRESH => {
                self.know(*process, unique);
                self.process_of.len() == 1
            }
            Some((None, seen)) if now.saturating_duration_since(*seen) < FRESH => false,
            _ => {
                self.strangers.push_back(Stranger { since: now, unique, thread });
                self.strangers.len() == 1
            }
        }
    }

    /// It does not wait any more.
    pub fn left(&mut self, unique: RequestId) {
        let Some(process) = self.process_of.remove(&unique) else { return };
        if let Some(requests) = self.requests_of.get_mut(&process) {
            requests.remove(&unique);
            if requests.is_empty() {
                self.requests_of.remove(&process);
            }
        }
    }

    /// Requests whose process is known.
    pub fn known(&self) -> usize {
        self.process_of.len()
    }

    /// When the next question is due, if there is one; now, when it was due earlier.
    pub fn due(&self, now: Instant) -> Option<Instant> {
        let threads = (!self.strangers.is_empty()).then(|| self.threads_at.unwrap_or(now));
        let processes = (!self.process_of.is_empty()).then(|| self.processes_at.unwrap_or(now));
        threads.into_iter().chain(processes).min()
    }

    /// What to ask now, if anything.
    pub fn question(&mut self, now: Instant, waits: impl Fn(RequestId) -> bool) -> Option<Question> {
        let mut question = Question::default();
        if self.threads_at.is_none_or(|at| at <= now) {
            let age = |stranger: &Stranger| now.saturating_duration_since(stranger.since);
            self.strangers.retain(|stranger| age(stranger) < FRESH && waits(stranger.unique));
            self.threads.retain(|_, (_, seen)| now.saturating_duration_since(*seen) < FRESH);
            let mut threads = HashSet::new();
            for stranger in &self.strangers {
                threads.insert(stranger.thread);
                if threads.len() == MOST {
                    break;
                }
            }
            question.threads.extend(threads);
        }
        if self.processes_at.is_none_or(|at| at <= now) {
            self.processes_at = Some(now + ROUND);
            // A process comes to the end of the queue when it is asked about, and leaves it when it has no request.
            for _ in 0..self.turns.len() {
                let Some(process) = self.turns.pop_front() else { break };
                if !self.requests_of.contains_key(&process) {
                    continue;
                }
                self.turns.push_back(process);
                question.processes.push(process);
                if question.processes.len() == MOST {
                    break;
                }
            }
        }
        (question != Question::default()).then_some(question)
    }

    /// The answer to `question`, which was asked at `asked`; says which requests end.
    pub fn hear(
        &mut self,
        question: &Question,
        asked: Instant,
        findings: Option<Findings>,
        waits: impl Fn(RequestId) -> bool,
    ) -> Vec<RequestId> {
        let Some(findings) = findings else {
            // Threads are asked about again, as long as their numbers mean something.
            self.threads_at = Some(asked + ROUND);
            return Vec::new();
        };
        self.threads_at = Some(asked + PAUSE);
        self.threads.extend(question.threads.iter().map(|thread| (*thread, (None, asked))));
        let found = findings.threads.into_iter().map(|(thread, process)| (thread, (Some(process), asked)));
        self.threads.extend(found);
        for stranger in std::mem::take(&mut self.strangers) {
            match self.threads.get(&stranger.thread) {
                _ if !waits(stranger.unique) => {}
                Some((Some(process), _)) => self.know(*process, stranger.unique),
                Some((None, _)) => {}
                None => self.strangers.push_back(stranger),
            }
        }
        let requests = |process: &Process| self.requests_of.get(process).into_iter().flatten().copied();
        findings.ending.iter().flat_map(requests).collect()
    }

    fn know(&mut self, process: Process, unique: RequestId) {
        if self.process_of.contains_key(&unique) {
            return;
        }
        self.process_of.insert(unique, process);
        let requests = self.requests_of.entry(process).or_default();
        requests.insert(unique);
        if requests.len() == 1 && !self.turns.contains(&process) {
            self.turns.push_back(process);
        }
    }
}
