//! Whether processes that have requests under way are ending: the worker asks, the supervisor looks at /proc.
//!
//! The supervisor, because the worker must not read /proc, and neither must the opener where `[security] base_dirs` says
//! what it may read; and because it sees, as root, processes of other users also where /proc hides them (`hidepid`). It
//! shares the pid namespace of the mount, which the numbers in requests belong to.
//!
//! What must hold:
//! - The answer is numbers only: which process a thread is of, and which processes are ending. A question costs the
//!   supervisor a bounded number of reads, and none of them waits for anything but /proc.
//! - A process is ending when no thread is left that runs its program: all are exiting (PF_EXITING), or are the kernel's
//!   own threads in it (io_uring, vhost) (D55). Such a process can only end, and nothing of it sees how its requests do.
//! - A kernel thread is no caller: it works for others, and its end says nothing of theirs.
//! - A supervisor that does not say in its report that it answers is not asked. Nothing depends on an answer.
//!
//! Source: proc(5), proc_pid_stat(5); include/linux/sched.h, `PF_*`.

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use serde::{Deserialize, Serialize};

use super::channel::{Channel, FromWorker};
use crate::io::sys;
use crate::serve::callers::{Findings, MAX_PER_QUESTION, Process, Question};

const PF_EXITING: u64 = 0x4;
/// Threads that the kernel made in a process for io_uring, and for all else that works there for it.
const PF_IO_WORKER: u64 = 0x10;
const PF_USER_WORKER: u64 = 0x4000;
const PF_KTHREAD: u64 = 0x0020_0000;

/// Threads that are looked at for one question.
const MOST_READS: usize = 2048;
/// How long the worker waits for an answer before it asks again.
const PATIENCE: Duration = Duration::from_secs(2);

/// A question on the wire. A process is its number and its start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// The answer carries the same number.
    pub number: u64,
    /// Which processes are these threads of?
    pub threads: Vec<u32>,
    /// Which of these are ending?
    pub processes: Vec<(u32, u64)>,
}

/// An answer on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answered {
    /// Of the question.
    pub number: u64,
    /// A thread, and the number and the start of its process.
    pub threads: Vec<(u32, u32, u64)>,
    /// Processes that are ending.
    pub ending: Vec<(u32, u64)>,
}

/// The worker's end: one question at a time.
pub struct Asker {
    channel: Arc<Channel>,
    state: Mutex<Asking>,
    came: Condvar,
}

#[derive(Default)]
struct Asking {
    /// Whether the supervisor answers.
    answers: bool,
    number: u64,
    answer: Option<Findings>,
}

impl Asker {
    /// Asks over the worker's channel.
    pub fn new(channel: Arc<Channel>) -> Arc<Self> {
        Arc::new(Self { channel, state: Mutex::default(), came: Condvar::new() })
    }

    /// What the supervisor says of itself; it may be another version from now on.
    pub fn supervisor_answers(&self, answers: bool) {
        self.state.lock().answers = answers;
    }

    /// Asks; `None` when there is no answer.
    pub fn ask(&self, question: &Question) -> Option<Findings> {
        let mut state = self.state.lock();
        if !state.answers {
            return None;
        }
        state.number += 1;
        state.answer = None;
        let asked = Asked {
            number: state.number,
            threads: question.threads.clone(),
            processes: question.processes.iter().map(|process| (process.id, process.start)).collect(),
        };
        // A supervisor that does not read has not answered before either.
        self.channel.send(&FromWorker::Callers(asked)).ok()?;
        let until = Instant::now() + PATIENCE;
        while state.answer.is_none() && !self.came.wait_until(&mut state, until).timed_out() {}
        state.answer.take()
    }

    /// The supervisor has answered.
    pub fn hear(&self, answered: Answered) {
        let mut state = self.state.lock();
        // That of an earlier question is late: its numbers may mean other threads now.
        if answered.number == state.number {
            let process = |(id, start)| Process { id, start };
            let of = |(thread, id, start)| (thread, process((id, start)));
            let threads = answered.threads.into_iter().map(of).collect();
            let ending = answered.ending.into_iter().map(process).collect();
            state.answer = Some(Findings { threads, ending });
            self.came.notify_one();
        }
    }
}

/// What a line of /proc/PID/stat says of a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    flags: u64,
    start: u64,
}

impl Stat {
    /// The name in it, between parentheses, may hold anything.
    fn parse(line: &[u8]) -> Option<Self> {
        let name_ends = line.iter().rposition(|byte| *byte == b')')?;
        let rest = std::str::from_utf8(&line[name_ends + 1..]).ok()?;
        // The third of proc(5) is the first here.
        let field = |number: usize| rest.split_ascii_whitespace().nth(number - 3)?.parse().ok();
        Some(Self { flags: field(9)?, start: field(22)? })
    }

    /// It may still run the program.
    fn runs(self) -> bool {
        self.flags & (PF_EXITING | PF_IO_WORKER | PF_USER_WORKER) == 0
    }
}

/// The number of the process in /proc/TID/status.
fn process_in(status: &[u8]) -> Option<u32> {
    let line = status.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"Tgid:"))?;
    std::str::from_utf8(line).ok()?.trim().parse().ok()
}

/// /proc, for one question.
struct Proc {
    root: PathBuf,
    /// Whether a process is there, also one that /proc hides.
    exists: fn(u32) -> bool,
    reads: usize,
}

impl Proc {
    fn read(&mut self, path: &str) -> Option<Vec<u8>> {
        self.reads = self.reads.checked_sub(1)?;
        std::fs::read(self.root.join(path)).ok()
    }

    fn stat(&mut self, process: u32, thread: u32) -> Option<Stat> {
        Stat::parse(&self.read(&format!("{process}/task/{thread}/stat"))?)
    }

    /// The process of a thread that is there.
    fn process_of(&mut self, thread: u32) -> Option<Process> {
        let id = process_in(&self.read(&format!("{thread}/status"))?)?;
        let leader = self.stat(id, id)?;
        (leader.flags & PF_KTHREAD == 0).then_some(Process { id, start: leader.start })
    }

    fn threads(&self, process: u32) -> Option<BTreeSet<u32>> {
        let entries = std::fs::read_dir(self.root.join(format!("{process}/task"))).ok()?;
        entries.map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
    }

    /// Whether a process is ending, or has ended.
    fn is_ending(&mut self, Process { id, start }: Process) -> bool {
        let Some(leader) = self.stat(id, id) else { return self.reads > 0 && !(self.exists)(id) };
        if leader.start != start {
            // The number is another's.
            return true;
        }
        if leader.runs() {
            return false;
        }
        // The first thread may end long before the others.
        let Some(threads) = self.threads(id) else { return false };
        for thread in &threads {
            // One that is not there any more has ended.
            if self.stat(id, *thread).is_some_and(Stat::runs) || self.reads == 0 {
                return false;
            }
        }
        // One of them may have made another one before it ended.
        self.threads(id).is_some_and(|now| now.is_subset(&threads))
    }

    fn look(mut self, asked: &Asked) -> Answered {
        let mut answered = Answered { number: asked.number, threads: Vec::new(), ending: Vec::new() };
        for thread in asked.threads.iter().take(MAX_PER_QUESTION).copied() {
            let process = self.process_of(thread);
            answered.threads.extend(process.map(|process| (thread, process.id, process.start)));
        }
        for (id, start) in asked.processes.iter().take(MAX_PER_QUESTION).copied() {
            if self.is_ending(Process { id, start }) {
                answered.ending.push((id, start));
            }
        }
        answered
    }
}

/// The supervisor's end; `None` when /proc is not of this process's pid namespace.
pub fn look(asked: &Asked) -> Option<Answered> {
    let root = PathBuf::from("/proc");
    let own = std::fs::read_link(root.join("self")).ok()?;
    let is_ours = own.to_str()?.parse() == Ok(sys::pid());
    is_ours.then(|| Proc { root, exists: sys::is_process, reads: MOST_READS }.look(asked))
}
