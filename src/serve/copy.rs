//! Copies from one file to another, as copy_file_range(2) asks for. Blocks are shared where that is possible, and read
//! and written elsewhere.
//!
//! What must hold: a copy has the bytes that the source has during the call, with one exception. The kernel passes a
//! large copy in several requests, and a program that copies a sparse file asks for one part after the other. Such calls
//! of one thread are one copy, as of the moment of its first call, unless that thread changes the source in between.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::error::{fail, fail_disk};
use super::guard::guarded;
use super::measure::Began;
use super::pool::Lane;
use super::{Call, Errno, Handle, Service, SpaceChange, Target, WriteRequest, refuse};
use crate::disk::{Grow, Seek, Shown};
use crate::format::BLOCK;
use crate::stats::Operation;
use crate::store::{CopySource, DiskNode, Sharing};

/// Most bytes that one request reads and writes. The kernel cannot interrupt a request; the program asks for the rest.
const MOST_BYTES: u64 = 16 << 20;
/// Most steps of one request, each of which reads, writes, zeros or shares.
const MOST_STEPS: u32 = 256;
/// Bytes that are read and written at a time.
const CHUNK: u64 = 1 << 20;
/// How long after a call the next one may be a part of the same copy.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most copies that are remembered.
const REMEMBERED: usize = 128;

/// A request to copy.
#[derive(Debug, Clone, Copy)]
pub struct CopyRequest {
    pub source: Target,
    /// Offset in the source in bytes.
    pub from: u64,
    /// Number of the disk that gets the bytes.
    pub to: u64,
    /// Offset on that disk in bytes.
    pub at: u64,
    /// Bytes.
    pub len: u64,
    /// Whether `len` is the most that the frontend can ask for: the program asked for more.
    pub is_cut: bool,
    /// Of the disk that gets the bytes.
    pub handle: Handle,
}

/// A copy of several requests.
struct Run {
    source: Target,
    to: u64,
    thread: u32,
    /// Where the last request ended, and whether it was cut.
    end: u64,
    is_cut: bool,
    /// The extent of the source that the thread has looked up since.
    data: Option<u64>,
    hole: Option<u64>,
    last: Instant,
    sharing: Sharing,
}

impl Run {
    fn goes_on(&self, thread: u32, request: &CopyRequest) -> bool {
        let is_extent = self.data == Some(request.from) && self.hole == Some(request.from + request.len);
        let is_rest = self.is_cut && request.from == self.end;
        (self.source, self.to, self.thread) == (request.source, request.to, thread)
            && self.last.elapsed() < PATIENCE
            && request.from >= self.end
            && (is_rest || is_extent)
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Copies {
    runs: Mutex<Vec<Run>>,
    /// Whether there are any. Most requests look no further.
    any: AtomicBool,
    shared: AtomicU64,
    zeroed: AtomicU64,
    moved: AtomicU64,
}

/// How the bytes of copies came to their disks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CopiedBytes {
    /// They are shared with the source.
    pub shared: u64,
    /// They are zeros, which take no space.
    pub zeroed: u64,
    /// They were read and written.
    pub moved: u64,
}

impl Copies {
    /// Bytes of all copies.
    pub fn bytes(&self) -> CopiedBytes {
        let load = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed);
        CopiedBytes { shared: load(&self.shared), zeroed: load(&self.zeroed), moved: load(&self.moved) }
    }

    fn has_any(&self) -> bool {
        self.any.load(Ordering::Acquire)
    }

    /// A thread changes a disk: its copies of that disk are over.
    pub fn changes(&self, disk: u64, thread: u32) {
        if self.has_any() {
            let mut runs = self.runs.lock();
            // A thread that is not known may be any.
            runs.retain(|run| {
                let is_other = run.source != Target::Disk(disk) || (thread != 0 && run.thread != thread);
                is_other && run.last.elapsed() < PATIENCE
            });
            self.any.store(!runs.is_empty(), Ordering::Release);
        }
    }

    /// A thread has found data or a hole.
    pub fn sought(&self, target: Target, thread: u32, what: Seek, at: u64) {
        if self.has_any() && thread != 0 {
            for run in self.runs.lock().iter_mut().filter(|run| run.source == target && run.thread == thread)
            {
                match what {
                    Seek::Data => (run.data, run.hole) = (Some(at), None),
                    Seek::Hole => run.hole = Some(at),
                }
            }
        }
    }

    /// What an earlier request of the same copy found.
    fn earlier(&self, thread: u32, request: &CopyRequest) -> Option<Sharing> {
        if !self.has_any() || thread == 0 {
            return None;
        }
        let runs = self.runs.lock();
        runs.iter().find(|run| run.goes_on(thread, request)).map(|run| run.sharing.clone())
    }

    /// A request ends at `end`. `None`: the source has nothing there.
    fn note(&self, thread: u32, request: &CopyRequest, end: u64, sharing: Option<Sharing>) {
        if thread == 0 || (sharing.is_none() && !self.has_any()) {
            return;
        }
        let mut runs = self.runs.lock();
        runs.retain(|run| run.last.elapsed() < PATIENCE && (run.to != request.to || run.thread != thread));
        // At the end of the source the copy is complete: a later call finds what was appended since.
        let Some(sharing) = sharing.filter(|sharing| end < sharing.size) else {
            self.any.store(!runs.is_empty(), Ordering::Release);
            return;
        };
        if runs.len() >= REMEMBERED {
            runs.remove(0);
        }
        let is_cut = request.is_cut || end < request.from + request.len;
        let (source, to) = (request.source, request.to);
        let last = Instant::now();
        runs.push(Run { source, to, thread, end, is_cut, data: None, hole: None, last, sharing });
        self.any.store(true, Ordering::Release);
    }
}

type Answer = Box<dyn FnOnce(Result<u64, Errno>) + Send>;

/// A copy under way.
struct Progress {
    call: Call,
    request: CopyRequest,
    sharing: Option<Sharing>,
    /// Bytes that are copied.
    done: u64,
    /// Bytes of these that were read and written, and how many steps that took.
    moved: u64,
    steps: u32,
    answer: Answer,
}

/// What a step has to do.
enum Step {
    /// These bytes are shared now.
    Shared(u64),
    /// These bytes are zeros now.
    Zeroed(u64),
    /// These are to be read and written.
    Move(u64),
    /// The source ends.
    End,
}

impl Service {
    /// Copies up to `len` bytes to a disk, and answers how many; fewer at the end of the source, and when the request
    /// would take long. A copy to the disk itself has ranges that do not overlap.
    pub fn copy(
        &self,
        call: Call,
        request: CopyRequest,
        answer: impl FnOnce(Result<u64, Errno>) + Send + 'static,
    ) {
        self.copies.changes(request.to, call.thread);
        let (counters, began) = (self.counters(Target::Disk(request.to)), Began::now(Operation::Copy));
        let answer: Answer = Box::new(move |done: Result<u64, Errno>| {
            if let Some(counters) = counters {
                began.ends(&counters, done);
            }
            answer(done);
        });
        self.when_attached(call, request.source, answer, refuse, move |service, answer| {
            let to = Target::Disk(request.to);
            service.when_attached(call, to, answer, refuse, move |service, answer| {
                let service = service.clone();
                let lane = Lane::Sync(request.to);
                let runner = service.runner.clone();
                runner.change_in(lane, answer, refuse, move |answer| {
                    let sharing = guarded(|| service.sharing(call, &request));
                    match sharing {
                        Ok(sharing) => {
                            let progress =
                                Progress { call, request, sharing, done: 0, moved: 0, steps: 0, answer };
                            service.copy_on(progress);
                        }
                        Err(errno) => answer(Err(errno)),
                    }
                });
            });
        });
    }

    /// What the disk can show of the source, if anything.
    fn sharing(&self, call: Call, request: &CopyRequest) -> Result<Option<Sharing>, Errno> {
        if request.from != request.at || request.len < BLOCK {
            return Ok(None);
        }
        let to = self.disk(request.to)?;
        let source = match request.source {
            Target::Disk(id) => CopySource::Disk(self.disk(id)?),
            Target::Base(id) => CopySource::Base(self.base(id)?),
            Target::Snapshot(number) => {
                let (node, _) = self.store.snapshot_by_number(number).ok_or(Errno::ESTALE)?;
                CopySource::Snapshot(node, number)
            }
        };
        let earlier = self.copies.earlier(call.thread, request);
        match self.store.share(&source, &to, earlier.as_ref()) {
            Ok(sharing) => Ok(sharing),
            // The bytes can still be copied.
            Err(error) => {
                tracing::warn!(disk = to.name(), %error, "a copy cannot share the blocks of its source, and copies the bytes");
                Ok(None)
            }
        }
    }

    /// Goes on with a copy until a step has to wait for bytes, which goes on with it then.
    fn copy_on(&self, mut progress: Progress) {
        let Some(_inside) = self.runner.gate.enter() else { return self.stopped(progress, Errno::EIO) };
        loop {
            let CopyRequest { len, .. } = progress.request;
            if progress.done >= len || progress.moved >= MOST_BYTES || progress.steps >= MOST_STEPS {
                return self.copied(progress);
            }
            progress.steps += 1;
            let step = guarded(|| self.step(&progress));
            match step {
                Ok(Step::Shared(bytes)) => {
                    self.copies.shared.fetch_add(bytes, Ordering::Relaxed);
                    progress.done += bytes;
                }
                Ok(Step::Zeroed(bytes)) => {
                    self.copies.zeroed.fetch_add(bytes, Ordering::Relaxed);
                    progress.done += bytes;
                }
                Ok(Step::Move(bytes)) => return self.move_bytes(progress, bytes.min(CHUNK)),
                Ok(Step::End) => return self.copied(progress),
                // What was copied before counts, and the next call finds the error.
                Err(_) if progress.done > 0 => return self.copied(progress),
                Err(errno) => return (progress.answer)(Err(errno)),
            }
        }
    }

    fn copied(&self, progress: Progress) {
        let Progress { call, request, sharing, done, answer, .. } = progress;
        if sharing.is_some() {
            self.copies.note(call.thread, &request, request.from + done, sharing.filter(|_| done > 0));
        }
        answer(Ok(done));
    }

    fn step(&self, progress: &Progress) -> Result<Step, Errno> {
        let CopyRequest { from, len, to, handle, .. } = progress.request;
        let left = len - progress.done;
        let Some(sharing) = &progress.sharing else { return Ok(Step::Move(left)) };
        let at = from + progress.done;
        let end = sharing.size.min(at.saturating_add(left));
        if at >= end {
            return Ok(Step::End);
        }
        let node = self.disk(to)?;
        if at >= sharing.overlap {
            zero(&node, at, end, handle)?;
            return Ok(Step::Zeroed(end - at));
        }
        let end = end.min(sharing.overlap);
        let shown = node.change(|disk| disk.show((at, end), &sharing.ground, handle.epoch()));
        let shown = shown.map_err(|e| fail(&e))?.map_err(|e| fail_disk(&node, "copy", &e).errno())?;
        Ok(match shown {
            Shown::Shows(stop) => Step::Shared(stop - at),
            Shown::Copy(stop) => Step::Move(stop - at),
            Shown::Elsewhere => Step::Move(end - at),
        })
    }

    /// Reads and writes the next part of a copy, at most `most` bytes of it.
    fn move_bytes(&self, mut progress: Progress, most: u64) {
        let (call, source) = (progress.call, progress.request.source);
        let (from, at) = (progress.request.from + progress.done, progress.request.at + progress.done);
        let (to, handle) = (progress.request.to, progress.request.handle);
        let service = self.clone();
        // A hole of the source takes no space in the copy.
        self.seek(call, source, from, Seek::Data, move |found| match found {
            Ok(Some(data)) if data <= from => {
                let (reader, writer) = (service.clone(), service);
                reader.read(call, source, from, most as usize, move |read| {
                    let bytes = match read {
                        Ok(bytes) => bytes,
                        Err(errno) => return writer.stopped(progress, errno),
                    };
                    if bytes.is_empty() {
                        return writer.copied(progress);
                    }
                    let moved = bytes.len() as u64;
                    let write = WriteRequest { offset: at, handle, durable: false };
                    let service = writer.clone();
                    writer.write(call, to, write, bytes, move |done| match done {
                        Ok(()) => {
                            progress.done += moved;
                            progress.moved += moved;
                            service.copies.moved.fetch_add(moved, Ordering::Relaxed);
                            service.run(Lane::Disk(to), move |service| service.copy_on(progress));
                        }
                        Err(errno) => service.stopped(progress, errno),
                    });
                });
            }
            Ok(found) => {
                service.clone().skip_hole(progress, found.map_or(u64::MAX, |data| data - from).min(most));
            }
            Err(errno) => service.stopped(progress, errno),
        });
    }

    /// Zeros up to `len` bytes that are a hole of the source.
    fn skip_hole(self, mut progress: Progress, len: u64) {
        let from = progress.request.from + progress.done;
        let size = guarded(|| self.size_of(progress.request.source));
        let len = match size {
            Ok(size) => len.min(size.saturating_sub(from)),
            Err(errno) => return self.stopped(progress, errno),
        };
        if len == 0 {
            return self.copied(progress);
        }
        let (call, handle) = (progress.call, progress.request.handle);
        let range = (progress.request.at + progress.done, len);
        let (to, service) = (progress.request.to, self.clone());
        self.allocate(call, to, SpaceChange::Zero(Grow::Yes), range, handle, move |done| match done {
            Ok(()) => {
                progress.done += len;
                service.copies.zeroed.fetch_add(len, Ordering::Relaxed);
                service.run(Lane::Disk(to), move |service| service.copy_on(progress));
            }
            Err(errno) => service.stopped(progress, errno),
        });
    }

    /// A step failed. What was copied before counts, and the next call finds the error.
    fn stopped(&self, progress: Progress, errno: Errno) {
        if progress.done > 0 { self.copied(progress) } else { (progress.answer)(Err(errno)) }
    }

    /// Bytes of all copies that this worker made.
    pub fn copied_bytes(&self) -> CopiedBytes {
        self.copies.bytes()
    }

    /// Bytes of an attached source.
    fn size_of(&self, source: Target) -> Result<u64, Errno> {
        Ok(match source {
            Target::Disk(id) => self.disk(id)?.attach().map_err(|e| fail(&e))?.size(),
            Target::Base(id) => self.base(id)?.record().size(),
            Target::Snapshot(number) => self.store.snapshot_by_number(number).ok_or(Errno::ESTALE)?.1.size,
        })
    }
}

/// Zeros a range and grows the disk to its end.
fn zero(node: &Arc<DiskNode>, from: u64, end: u64, handle: Handle) -> Result<(), Errno> {
    let epoch = handle.epoch();
    let done = node.change(|disk| {
        disk.grow(end, Grow::Yes)?;
        disk.zero(from, end - from, epoch)
    });
    done.map_err(|e| fail(&e))?.map_err(|e| fail_disk(node, "copy", &e).errno())
}

#[cfg(test)]
mod tests;
