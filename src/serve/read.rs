//! Reads of bytes, and lookups of data and holes. They are answered from memory at once, from the store on this thread
//! or in the disk's lane, or from a base's files in the base's lane.

use std::cell::{Cell, RefCell};

use super::attempt::{Caller, Place};
use super::error::{Stop, fail, fail_base, fail_disk};
use super::guard::guarded;
use super::measure::Began;
use super::pool::LARGE;
use super::{Call, Errno, Service, Target, refuse};
use crate::cache::Touch;
use crate::disk::{DiskError, Frozen, Seek};
use crate::format::BLOCK;
use crate::io::sys;
use crate::limits::Cost;
use crate::stats::{Counters, Operation, Origins};
use crate::store::DiskNode;

/// Bytes of the smallest buffer.
const SMALLEST: usize = 64 << 10;
/// Bytes that direct reads of bases read ahead.
const READAHEAD: u32 = 128 << 10;

thread_local! {
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// A buffer with the answer to a read. Each thread reuses its own buffer.
struct Filled {
    buffer: Vec<u8>,
    len: usize,
    origins: Origins,
}

impl Filled {
    /// A buffer with room for `size` bytes, none of them filled.
    fn with_room(size: usize) -> Self {
        let mut buffer = BUFFER.take();
        if buffer.len() < size {
            buffer = vec![0; size.next_power_of_two().max(SMALLEST)];
            // The kernel must not fault when it copies from the buffer (D2).
            sys::touch_pages(&mut buffer);
        }
        Self { buffer, len: 0, origins: Origins::default() }
    }

    fn holds(&mut self, origins: Origins) {
        (self.len, self.origins) = (origins.bytes() as usize, origins);
    }

    fn bytes(&self) -> &[u8] {
        &self.buffer[..self.len]
    }
}

impl Drop for Filled {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        let other = BUFFER.replace(buffer);
        // The thread keeps the larger buffer.
        if other.len() > SMALLEST {
            BUFFER.set(other);
        }
    }
}

/// Reads from memory; `None` when the read would wait.
fn read_from_memory(node: &DiskNode, offset: u64, size: usize) -> Option<Filled> {
    let disk = node.attached()?;
    let mut filled = Filled::with_room(size);
    let buffer = RefCell::new(&mut filled.buffer[..size]);
    let read = || Ok::<_, Errno>(disk.read_now(offset, &mut buffer.borrow_mut()));
    let origins = guarded(read).ok().flatten()?;
    filled.holds(origins);
    Some(filled)
}

/// As [`read_from_memory`], of a snapshot.
fn read_snapshot_from_memory(frozen: &Frozen, offset: u64, size: usize) -> Option<Filled> {
    let mut filled = Filled::with_room(size);
    let buffer = RefCell::new(&mut filled.buffer[..size]);
    let read = || Ok::<_, Errno>(frozen.read_now(offset, &mut buffer.borrow_mut()));
    let origins = guarded(read).ok().flatten()?;
    filled.holds(origins);
    Some(filled)
}

/// Counts a read that is about to be answered.
fn count(began: Began, counters: &Counters, done: Result<&Filled, Errno>) {
    if let Ok(filled) = done {
        counters.read_from(&filled.origins);
    }
    began.ends(counters, done.map(|filled| filled.len as u64));
}

/// Ends a read that waits for its turn.
fn refuse_read(answer: impl FnOnce(Result<&[u8], Errno>), errno: Errno) {
    answer(Err(errno));
}

impl Service {
    /// Reads `size` bytes from `offset`; fewer only at the end. `answer` gets a slice of the buffer, and is done with
    /// it when it returns. The frontend bounds `size`, which is allocated.
    pub fn read(
        &self,
        call: Call,
        target: Target,
        offset: u64,
        size: usize,
        answer: impl FnOnce(Result<&[u8], Errno>) + Send + 'static,
    ) {
        let began = Began::now(Operation::Read);
        let node = match target {
            Target::Disk(id) => self.store.disk_by_id(id),
            Target::Base(_) | Target::Snapshot(_) => None,
        };
        if let Some(node) = node {
            let cost = Cost::Read(size as u64);
            if self.passes(&node, cost) {
                return self.read_disk(began, call, &node, (offset, size), Caller::Frontend, answer);
            }
            let counters = node.counters().clone();
            let refuse = move |answer: _, errno| {
                began.ends(&counters, Err(errno));
                refuse_read(answer, errno);
            };
            let reader = node.clone();
            return self.when_it_is_its_turn(
                call,
                &node,
                (cost, 0),
                answer,
                refuse,
                move |service, call, answer| {
                    service.read_disk(began, call, &reader, (offset, size), Caller::Lane, answer);
                },
            );
        }
        if size <= LARGE
            && let Target::Snapshot(number) = target
            && let Some(frozen) = self.store.opened_snapshot(number)
            && let Some(filled) = read_snapshot_from_memory(&frozen, offset, size)
        {
            if let Some(counters) = self.counters(target) {
                count(began, &counters, Ok(&filled));
            }
            return answer(Ok(filled.bytes()));
        }
        self.read_slowly(began, call, target, (offset, size), Caller::Frontend, answer);
    }

    /// Reads from a disk, from memory if possible.
    fn read_disk(
        &self,
        began: Began,
        call: Call,
        node: &DiskNode,
        (offset, size): (u64, usize),
        caller: Caller,
        answer: impl FnOnce(Result<&[u8], Errno>) + Send + 'static,
    ) {
        if size <= LARGE
            && let Some(filled) = read_from_memory(node, offset, size)
        {
            count(began, node.counters(), Ok(&filled));
            return answer(Ok(filled.bytes()));
        }
        self.read_slowly(began, call, Target::Disk(node.id()), (offset, size), caller, answer);
    }

    /// Reads where it may wait.
    fn read_slowly(
        &self,
        began: Began,
        call: Call,
        target: Target,
        (offset, size): (u64, usize),
        caller: Caller,
        answer: impl FnOnce(Result<&[u8], Errno>) + Send + 'static,
    ) {
        let counters = self.counters(target);
        let answer = move |done: Result<&Filled, Errno>| {
            if let Some(counters) = counters {
                count(began, &counters, done);
            }
            answer(done.map(Filled::bytes));
        };
        // What attaches the disk runs in another lane, and the read in its own afterwards.
        let caller = if self.is_attached(target) { caller } else { Caller::Frontend };
        self.when_attached(call, target, answer, refuse, move |service, answer| {
            let work = move |service: &Self| {
                let mut filled = Filled::with_room(size);
                let origins = service.read_into(target, offset, &mut filled.buffer[..size])?;
                filled.holds(origins);
                Ok(filled)
            };
            let answer = move |done: Result<Filled, Errno>| answer(done.as_ref().map_err(|errno| *errno));
            let attempt = service.reads(call, target, work, answer).moving(size);
            let place = service.place_of_read(target, offset, size);
            match caller {
                Caller::Frontend => attempt.submit(&service.runner, place),
                Caller::Lane => attempt.run_in_lane(&service.runner, place),
            }
        });
    }

    /// Finds the first data, or the first hole, at or after `from`; `None` when there is none up to the end.
    pub fn seek(
        &self,
        call: Call,
        target: Target,
        from: u64,
        what: Seek,
        answer: impl FnOnce(Result<Option<u64>, Errno>) + Send + 'static,
    ) {
        let answer = self.measured(target, Operation::Seek, 0, answer);
        let (copies, thread) = (self.copies.clone(), call.thread);
        let answer = move |found: Result<Option<u64>, Errno>| {
            if let Ok(Some(at)) = found {
                copies.sought(target, thread, what, at);
            }
            answer(found);
        };
        self.when_attached(call, target, answer, refuse, move |service, answer| {
            let work = move |service: &Self| service.find(target, from, what);
            service.reads(call, target, work, answer).submit(&service.runner, service.place(target));
        });
    }

    fn read_into(&self, target: Target, offset: u64, buffer: &mut [u8]) -> Result<Origins, Stop> {
        match target {
            Target::Disk(id) => {
                let node = self.disk(id)?;
                let disk = node.attach().map_err(|e| fail(&e))?;
                disk.read(offset, buffer).map_err(|e| fail_disk(&node, "read", &e))
            }
            Target::Base(id) => {
                let base = self.base(id)?.attach().map_err(|e| fail(&e))?.clone();
                let len = base.size().saturating_sub(offset).min(buffer.len() as u64) as usize;
                let done = base.read(offset, &mut buffer[..len], Touch::Repeat, READAHEAD);
                done.map_err(|error| fail_base(id, &error))
            }
            Target::Snapshot(number) => {
                let frozen = self.store.attach_snapshot(number).map_err(|e| fail(&e))?;
                let done = frozen.read(offset, buffer, READAHEAD);
                done.map_err(|error| self.fail_snapshot(number, "read", &error))
            }
        }
    }

    fn find(&self, target: Target, from: u64, what: Seek) -> Result<Option<u64>, Stop> {
        match target {
            Target::Disk(id) => {
                let node = self.disk(id)?;
                let disk = node.attach().map_err(|e| fail(&e))?;
                disk.seek(from, what).map_err(|e| fail_disk(&node, "seek", &e))
            }
            Target::Base(id) => {
                let base = self.base(id)?.attach().map_err(|e| fail(&e))?;
                let found = match what {
                    _ if from >= base.size() => Ok(None),
                    Seek::Data => base.next_data(from),
                    Seek::Hole => base.next_hole(from).map(Some),
                };
                found.map_err(|error| fail_base(id, &error))
            }
            Target::Snapshot(number) => {
                let frozen = self.store.attach_snapshot(number).map_err(|e| fail(&e))?;
                frozen.seek(from, what).map_err(|error| self.fail_snapshot(number, "seek", &error))
            }
        }
    }

    fn fail_snapshot(&self, number: u64, operation: &'static str, error: &DiskError) -> Stop {
        match self.store.snapshot_by_number(number) {
            Some((node, _)) => fail_disk(&node, operation, error),
            None => Stop::from(Errno::ESTALE),
        }
    }

    /// Where a read of an attached disk or base may run, when not all of it is in memory.
    fn place_of_read(&self, target: Target, offset: u64, size: usize) -> Place {
        let all_base = |node: &DiskNode| {
            node.attached().is_some_and(|disk| disk.is_plain() && disk.falls_through(offset, size as u64))
        };
        match target {
            Target::Disk(id) if self.store.disk_by_id(id).is_some_and(|node| all_base(&node)) => {
                Place::BaseLane
            }
            _ => self.place(target),
        }
    }

    /// Reads the blocks at both ends of a range, so that the base's blocks are in memory.
    pub(super) fn read_ends(&self, disk: u64, offset: u64, len: u64) -> Result<(), Stop> {
        let node = self.disk(disk)?;
        let disk = node.attach().map_err(|e| fail(&e))?;
        let mut block = vec![0; BLOCK as usize];
        let mut missing = None;
        for at in [offset / BLOCK, offset.saturating_add(len).saturating_sub(1) / BLOCK] {
            match disk.read(at * BLOCK, &mut block) {
                Ok(_) => {}
                // All missing bytes are requested together.
                Err(error) => match fail_disk(&node, "read", &error) {
                    stop @ Stop::Wait(_) => missing = Some(stop),
                    stop => return Err(stop),
                },
            }
        }
        missing.map_or(Ok(()), Err)
    }
}
