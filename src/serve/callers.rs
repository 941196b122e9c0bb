//! Finds the process of each waiting request, and whether that process is ending.
//!
//! The kernel interrupts a request whose caller waits for it. An asynchronous request (libaio, io_uring) has no such
//! caller, and a killed process does not end before its requests do. So this module watches the processes of waiting
//! requests.
//!
//! What must hold:
//! - A request ends because its own process is ending, and for nothing else. Its process is looked up once, as soon as
//!   the request waits, and is identified by its number and start time: later the thread may be gone, and its number
//!   may be another thread's. A request whose thread was gone before the lookup is left alone (D56).
//! - Each process is checked once in a round, however many requests it has, and a round checks [`MAX_PER_QUESTION`]
//!   processes at most. A thread is looked up once in five seconds (D57).
//! - This process does not inspect other processes: it asks ([`Lookup`]). Without an answer, requests keep waiting.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use super::RequestId;

/// How often processes are looked at, while requests of theirs wait.
pub(super) const ROUND: Duration = Duration::from_millis(500);
/// The shortest time between two questions, so that one question covers many threads.
const PAUSE: Duration = Duration::from_millis(50);
/// How long a thread's number certainly means the same thread: the kernel reuses it only after as many new threads as
/// there are numbers.
const FRESH: Duration = Duration::from_secs(5);
/// Most threads, and most processes, in one question.
pub const MAX_PER_QUESTION: usize = 128;

/// A process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Process {
    /// Number in the pid namespace of the mount.
    pub id: u32,
    /// Start time, in the unit of proc(5). It tells processes of one number apart.
    pub start: u64,
}

/// A question about threads and processes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Question {
    /// Threads whose process is unknown.
    pub threads: Vec<u32>,
    /// Processes of which some may be ending.
    pub processes: Vec<Process>,
}

/// The answer to a [`Question`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Findings {
    /// The threads that exist, with their processes.
    pub threads: Vec<(u32, Process)>,
    /// The processes that are ending or have ended.
    pub ending: Vec<Process>,
}

/// Answers a question; `None` when there is no answer. May take a while.
pub type Lookup = Box<dyn Fn(&Question) -> Option<Findings> + Send>;

/// A waiting request whose process is unknown.
#[derive(Debug, Clone, Copy)]
struct UnidentifiedRequest {
    since: Instant,
    unique: RequestId,
    thread: u32,
}

/// The processes of the waiting requests.
#[derive(Default)]
pub(super) struct Callers {
    /// Whether there is a [`Lookup`] to ask.
    pub watched: bool,
    /// In the order in which the requests began to wait.
    unidentified: VecDeque<UnidentifiedRequest>,
    /// Threads that were looked up recently, with the time. A thread without a process was gone, or is not visible.
    threads: HashMap<u32, (Option<Process>, Instant)>,
    process_of: HashMap<RequestId, Process>,
    requests_of: HashMap<Process, HashSet<RequestId>>,
    /// Those known, the one that is looked at next first.
    queue: VecDeque<Process>,
    /// When it may be asked about threads, and about processes.
    threads_at: Option<Instant>,
    processes_at: Option<Instant>,
}

impl Callers {
    /// A request begins to wait; `thread` is 0 when it is not seen from the mount. Says whether [`due`](Self::due) may
    /// be earlier now.
    pub fn add(&mut self, unique: RequestId, thread: u32, now: Instant) -> bool {
        if !self.watched || thread == 0 {
            return false;
        }
        match self.threads.get(&thread) {
            Some((Some(process), seen)) if now.saturating_duration_since(*seen) < FRESH => {
                self.identify(*process, unique);
                self.process_of.len() == 1
            }
            Some((None, seen)) if now.saturating_duration_since(*seen) < FRESH => false,
            _ => {
                self.unidentified.push_back(UnidentifiedRequest { since: now, unique, thread });
                self.unidentified.len() == 1
            }
        }
    }

    /// It does not wait any more.
    pub fn remove(&mut self, unique: RequestId) {
        let Some(process) = self.process_of.remove(&unique) else { return };
        if let Some(requests) = self.requests_of.get_mut(&process) {
            requests.remove(&unique);
            if requests.is_empty() {
                self.requests_of.remove(&process);
            }
        }
    }

    /// Number of requests whose process is known.
    pub fn identified(&self) -> usize {
        self.process_of.len()
    }

    /// When the next question is due, if there is one; `now` if it is overdue.
    pub fn due(&self, now: Instant) -> Option<Instant> {
        let threads = (!self.unidentified.is_empty()).then(|| self.threads_at.unwrap_or(now));
        let processes = (!self.process_of.is_empty()).then(|| self.processes_at.unwrap_or(now));
        threads.into_iter().chain(processes).min()
    }

    /// What to ask now, if anything.
    pub fn question(&mut self, now: Instant, waits: impl Fn(RequestId) -> bool) -> Option<Question> {
        let mut question = Question::default();
        if self.threads_at.is_none_or(|at| at <= now) {
            let age = |request: &UnidentifiedRequest| now.saturating_duration_since(request.since);
            self.unidentified.retain(|request| age(request) < FRESH && waits(request.unique));
            self.threads.retain(|_, (_, seen)| now.saturating_duration_since(*seen) < FRESH);
            let mut threads = HashSet::new();
            for request in &self.unidentified {
                threads.insert(request.thread);
                if threads.len() == MAX_PER_QUESTION {
                    break;
                }
            }
            question.threads.extend(threads);
        }
        if self.processes_at.is_none_or(|at| at <= now) {
            self.processes_at = Some(now + ROUND);
            // A process moves to the end of the queue when it is checked, and leaves the queue when it has no request.
            for _ in 0..self.queue.len() {
                let Some(process) = self.queue.pop_front() else { break };
                if !self.requests_of.contains_key(&process) {
                    continue;
                }
                self.queue.push_back(process);
                question.processes.push(process);
                if question.processes.len() == MAX_PER_QUESTION {
                    break;
                }
            }
        }
        (question != Question::default()).then_some(question)
    }

    /// Takes the answer to `question`, which was asked at `asked`. Returns the requests to end.
    pub fn take_answer(
        &mut self,
        question: &Question,
        asked: Instant,
        findings: Option<Findings>,
        waits: impl Fn(RequestId) -> bool,
    ) -> Vec<RequestId> {
        let Some(findings) = findings else {
            // Ask about the threads again, while their numbers still mean the same threads.
            self.threads_at = Some(asked + ROUND);
            return Vec::new();
        };
        self.threads_at = Some(asked + PAUSE);
        self.threads.extend(question.threads.iter().map(|thread| (*thread, (None, asked))));
        let found = findings.threads.into_iter().map(|(thread, process)| (thread, (Some(process), asked)));
        self.threads.extend(found);
        for request in std::mem::take(&mut self.unidentified) {
            match self.threads.get(&request.thread) {
                _ if !waits(request.unique) => {}
                Some((Some(process), _)) => self.identify(*process, request.unique),
                Some((None, _)) => {}
                None => self.unidentified.push_back(request),
            }
        }
        let requests = |process: &Process| self.requests_of.get(process).into_iter().flatten().copied();
        findings.ending.iter().flat_map(requests).collect()
    }

    fn identify(&mut self, process: Process, unique: RequestId) {
        if self.process_of.contains_key(&unique) {
            return;
        }
        self.process_of.insert(unique, process);
        let requests = self.requests_of.entry(process).or_default();
        requests.insert(unique);
        if requests.len() == 1 && !self.queue.contains(&process) {
            self.queue.push_back(process);
        }
    }
}
