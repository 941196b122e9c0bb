//! Whether processes with requests in flight are ending: the worker asks, and the supervisor reads /proc.
//!
//! The supervisor does this for two reasons. The worker must not read /proc, nor may the opener where `[security]
//! base_dirs` restricts it. And the supervisor of root sees processes of other users even where /proc hides them
//! (`hidepid`). It is in the pid namespace of the mount, to which the pids in requests belong.
//!
//! What must hold:
//! - The answer has numbers only: the process of each thread, and the processes that are ending. A query costs the
//!   supervisor a bounded number of reads, which wait for /proc only.
//! - A process is ending when none of its threads runs its program any more: each is exiting (PF_EXITING), or is a
//!   kernel thread in the process (io_uring, vhost) (D55). Such a process can only end, and cannot see the results of
//!   its requests.
//! - A kernel thread is no caller: it works for other processes, and its end says nothing about theirs.
//! - The worker queries only a supervisor whose report announces that it answers. Nothing depends on an answer.
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
/// Kernel threads in a process: those of io_uring, and all others.
const PF_IO_WORKER: u64 = 0x10;
const PF_USER_WORKER: u64 = 0x4000;
const PF_KTHREAD: u64 = 0x0020_0000;

/// Most reads of /proc for one query.
const MOST_READS: usize = 2048;
/// How long the worker waits for a reply.
const REPLY_TIMEOUT: Duration = Duration::from_secs(2);

/// A query on the wire. A process is identified by its pid and its start time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallersQuery {
    /// The number of the query. The reply has the same number.
    pub number: u64,
    /// Threads whose process the worker wants to know.
    pub threads: Vec<u32>,
    /// Processes of which the worker wants to know whether they are ending.
    pub processes: Vec<(u32, u64)>,
}

/// A reply on the wire.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallersReply {
    /// The number of the query.
    pub number: u64,
    /// A thread, and the pid and the start time of its process.
    pub threads: Vec<(u32, u32, u64)>,
    /// Processes that are ending.
    pub ending: Vec<(u32, u64)>,
}

/// The worker's end. It has one query in flight at a time.
pub struct CallersClient {
    channel: Arc<Channel>,
    state: Mutex<ClientState>,
    replied: Condvar,
}

#[derive(Default)]
struct ClientState {
    /// Whether the supervisor answers queries.
    is_supported: bool,
    number: u64,
    reply: Option<Findings>,
}

impl CallersClient {
    /// A client that sends its queries over the worker's channel.
    pub fn new(channel: Arc<Channel>) -> Arc<Self> {
        Arc::new(Self { channel, state: Mutex::default(), replied: Condvar::new() })
    }

    /// Sets whether the supervisor answers queries, as its report announces. An upgrade may change it.
    pub fn set_supported(&self, is_supported: bool) {
        self.state.lock().is_supported = is_supported;
    }

    /// Sends a query and waits for its reply; `None` when there is none in time.
    pub fn query(&self, question: &Question) -> Option<Findings> {
        let mut state = self.state.lock();
        if !state.is_supported {
            return None;
        }
        state.number += 1;
        state.reply = None;
        let query = CallersQuery {
            number: state.number,
            threads: question.threads.clone(),
            processes: question.processes.iter().map(|process| (process.id, process.start)).collect(),
        };
        // The send fails when the supervisor does not read. Then it would not reply either.
        self.channel.send(&FromWorker::Callers(query)).ok()?;
        let until = Instant::now() + REPLY_TIMEOUT;
        while state.reply.is_none() && !self.replied.wait_until(&mut state, until).timed_out() {}
        state.reply.take()
    }

    /// Takes a reply of the supervisor.
    pub fn receive(&self, reply: CallersReply) {
        let mut state = self.state.lock();
        // The reply to an earlier query is too late: its pids may belong to other threads now.
        if reply.number == state.number {
            let process = |(id, start)| Process { id, start };
            let of = |(thread, id, start)| (thread, process((id, start)));
            let threads = reply.threads.into_iter().map(of).collect();
            let ending = reply.ending.into_iter().map(process).collect();
            state.reply = Some(Findings { threads, ending });
            self.replied.notify_one();
        }
    }
}

/// The fields of a thread in /proc/PID/task/TID/stat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    flags: u64,
    start: u64,
}

impl Stat {
    /// Parses a line. The name in parentheses may contain any bytes.
    fn parse(line: &[u8]) -> Option<Self> {
        let name_ends = line.iter().rposition(|byte| *byte == b')')?;
        let rest = std::str::from_utf8(&line[name_ends + 1..]).ok()?;
        // The first field after the name is the third of proc(5).
        let field = |number: usize| rest.split_ascii_whitespace().nth(number - 3)?.parse().ok();
        Some(Self { flags: field(9)?, start: field(22)? })
    }

    /// Whether the thread may still run the program.
    fn runs(self) -> bool {
        self.flags & (PF_EXITING | PF_IO_WORKER | PF_USER_WORKER) == 0
    }
}

/// The pid of the process in /proc/TID/status.
fn process_in(status: &[u8]) -> Option<u32> {
    let line = status.split(|byte| *byte == b'\n').find_map(|line| line.strip_prefix(b"Tgid:"))?;
    std::str::from_utf8(line).ok()?.trim().parse().ok()
}

/// /proc, for one query.
struct Proc {
    root: PathBuf,
    /// Whether a process exists, even one that /proc hides.
    exists: fn(u32) -> bool,
    /// Reads that are left for this query.
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

    /// The process of a thread; `None` when the thread does not exist or is the kernel's.
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
            // Another process has this pid now.
            return true;
        }
        if leader.runs() {
            return false;
        }
        // The first thread may end long before the others.
        let Some(threads) = self.threads(id) else { return false };
        for thread in &threads {
            // A thread that no longer exists has ended.
            if self.stat(id, *thread).is_some_and(Stat::runs) || self.reads == 0 {
                return false;
            }
        }
        // A thread may have created another one before it ended.
        self.threads(id).is_some_and(|now| now.is_subset(&threads))
    }

    fn inspect(mut self, query: &CallersQuery) -> CallersReply {
        let mut reply = CallersReply { number: query.number, threads: Vec::new(), ending: Vec::new() };
        for thread in query.threads.iter().take(MAX_PER_QUESTION).copied() {
            let process = self.process_of(thread);
            reply.threads.extend(process.map(|process| (thread, process.id, process.start)));
        }
        for (id, start) in query.processes.iter().take(MAX_PER_QUESTION).copied() {
            if self.is_ending(Process { id, start }) {
                reply.ending.push((id, start));
            }
        }
        reply
    }
}

/// The supervisor's end: answers a query. `None` when /proc belongs to another pid namespace than this process.
pub fn inspect(query: &CallersQuery) -> Option<CallersReply> {
    let root = PathBuf::from("/proc");
    let own = std::fs::read_link(root.join("self")).ok()?;
    let is_ours = own.to_str()?.parse() == Ok(sys::pid());
    is_ours.then(|| Proc { root, exists: sys::is_process, reads: MOST_READS }.inspect(query))
}
