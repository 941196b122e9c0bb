//! Reads and writes: from memory at once, from the store on this thread or in the disk's lane, from a base's files in
//! the base's lane.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use fuser::{Errno, FileHandle, INodeNo, OpenFlags, ReplyData, ReplyWrite};
use parking_lot::Mutex;

use super::guard::guarded;
use super::kernel::MAX_WRITE;
use super::pool::{LARGE, Lane};
use super::wait::{Attempt, Kind, Origin, Stop};
use super::waiting::Call;
use super::{Node, Place, PlyFs, epoch, fail, fail_base, fail_disk};
use crate::base::{Wanted, without_files};
use crate::cache::Touch;
use crate::format::BLOCK;
use crate::io::sys;
use crate::store::DiskNode;

/// Bytes of the smallest buffer.
const SMALLEST: usize = 64 << 10;
/// What reads of bases ask for besides.
const READAHEAD: u32 = 128 << 10;

thread_local! {
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// A buffer that requests are answered from; this thread's own goes from request to request.
struct Filled {
    buffer: Vec<u8>,
    len: usize,
}

impl Filled {
    /// With room for `size` bytes, of which none is filled.
    fn with_room(size: usize) -> Self {
        let mut buffer = BUFFER.take();
        if buffer.len() < size {
            buffer = vec![0; size.next_power_of_two().max(SMALLEST)];
            // The kernel must not fault when it copies from here (D2).
            sys::touch_pages(&mut buffer);
        }
        Self { buffer, len: 0 }
    }

    fn bytes(&self) -> &[u8] {
        &self.buffer[..self.len]
    }
}

impl Drop for Filled {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        let other = BUFFER.replace(buffer);
        // The larger one stays.
        if other.len() > SMALLEST {
            BUFFER.set(other);
        }
    }
}

fn reply_with(done: Result<Filled, Errno>, reply: ReplyData) {
    match done {
        Ok(filled) => reply.data(filled.bytes()),
        Err(errno) => reply.error(errno),
    }
}

/// A write as it came.
#[derive(Clone, Copy)]
pub(super) struct Written {
    pub offset: u64,
    pub fh: FileHandle,
    pub flags: OpenFlags,
}

impl Written {
    /// Part of it that lies at `offset`.
    fn at(self, offset: u64) -> Self {
        Self { offset, ..self }
    }

    fn is_durable(self) -> bool {
        self.flags.0 & libc::O_DSYNC != 0
    }
}

/// Whether a write or discard ends within a block, whose rest may be the base's.
pub(super) fn is_partial(offset: u64, len: u64) -> bool {
    !(offset | len).is_multiple_of(BLOCK)
}

/// Reads the blocks at both ends of a range, so that those of the base are in memory.
pub(super) fn read_ends(fs: &PlyFs, ino: INodeNo, offset: u64, len: u64) -> Result<(), Stop> {
    let node = fs.disk(ino)?;
    let disk = node.attach().map_err(|e| fail(&e))?;
    let mut block = vec![0; BLOCK as usize];
    let mut missing = None;
    for at in [offset / BLOCK, offset.saturating_add(len).saturating_sub(1) / BLOCK] {
        match disk.read(at * BLOCK, &mut block) {
            Ok(_) => {}
            // All that is missing is asked for at once.
            Err(error) => match fail_disk(&node, "read", &error) {
                stop @ Stop::Wait(_) => missing = Some(stop),
                stop => return Err(stop),
            },
        }
    }
    missing.map_or(Ok(()), Err)
}

impl PlyFs {
    /// What of a read is in memory; none when it has to wait.
    fn read_from_memory(&self, node: Node, offset: u64, size: usize) -> Option<Filled> {
        let Node::Disk(id) = node else { return None };
        let disk = self.store().disk_by_id(id)?;
        let disk = disk.attached()?;
        let mut filled = Filled::with_room(size);
        let buffer = RefCell::new(&mut filled.buffer[..size]);
        let read = || Ok::<_, Errno>(disk.read_now(offset, &mut buffer.borrow_mut()));
        let len = guarded(read).ok().flatten()?;
        filled.len = len;
        Some(filled)
    }

    fn read_into(&self, node: Node, offset: u64, buffer: &mut [u8]) -> Result<usize, Stop> {
        match node {
            Node::Disk(id) => {
                let node = self.store().disk_by_id(id).ok_or(Errno::ESTALE)?;
                let disk = node.attach().map_err(|e| fail(&e))?;
                disk.read(offset, buffer).map_err(|e| fail_disk(&node, "read", &e))
            }
            Node::Base(id) => {
                let base = self.base_node(id)?.attach().map_err(|e| fail(&e))?.clone();
                let len = base.size().saturating_sub(offset).min(buffer.len() as u64) as usize;
                let done = base.read(offset, &mut buffer[..len], Touch::Repeat, READAHEAD);
                done.map(|()| len).map_err(|error| fail_base(id, &error))
            }
            _ => Err(Errno::EISDIR.into()),
        }
    }

    /// read(2).
    pub(super) fn read_file(&self, call: Call, node: Node, offset: u64, size: u32, reply: ReplyData) {
        let size = size.min(MAX_WRITE) as usize;
        if size <= LARGE
            && let Some(filled) = self.read_from_memory(node, offset, size)
        {
            return reply.data(filled.bytes());
        }
        self.when_attached(call, node, reply, ReplyData::error, move |fs, reply| {
            let attempt = Attempt::new(
                Origin { moves: size, ..fs.origin(call, node, 0) },
                Kind::Reads,
                move |fs| {
                    let mut filled = Filled::with_room(size);
                    filled.len = fs.read_into(node, offset, &mut filled.buffer[..size])?;
                    Ok(filled)
                },
                move |done| reply_with(done, reply),
            );
            fs.submit(attempt, fs.place_of_read(node, offset, size));
        });
    }

    /// Where a read of an attached file may run, of which not all is in memory.
    fn place_of_read(&self, node: Node, offset: u64, size: usize) -> Place {
        let all_base = |node: &DiskNode| {
            node.attached().is_some_and(|disk| disk.is_plain() && disk.falls_through(offset, size as u64))
        };
        match node {
            Node::Disk(id) if self.store().disk_by_id(id).is_some_and(|node| all_base(&node)) => Place::Base,
            _ => self.place(node),
        }
    }

    fn write_now(node: &DiskNode, written: Written, data: &[u8]) -> Result<(), Stop> {
        let disk = node.attach().map_err(|e| fail(&e))?;
        disk.write(written.offset, data, epoch(written.fh)).map_err(|e| fail_disk(node, "write", &e))
    }

    fn sync_now(node: &DiskNode, written: Written) -> Result<(), Stop> {
        if !written.is_durable() {
            return Ok(());
        }
        let disk = node.attach().map_err(|e| fail(&e))?;
        disk.flush(epoch(written.fh)).map_err(|e| fail_disk(node, "flush", &e))
    }

    /// write(2).
    pub(super) fn write_file(
        &self,
        call: Call,
        ino: INodeNo,
        written: Written,
        data: &[u8],
        reply: ReplyWrite,
    ) {
        let node = match self.disk(ino) {
            Ok(node) => node,
            Err(errno) => return reply.error(errno),
        };
        let Some(disk) = node.attached() else {
            let data = data.to_vec();
            let file = Node::Disk(node.id());
            return self.when_attached(call, file, reply, ReplyWrite::error, move |fs, reply| {
                fs.write_later(call, ino, written, data, reply);
            });
        };
        let partial = is_partial(written.offset, data.len() as u64);
        let memory = self.store().never_waits() && !partial && !written.is_durable();
        let plain = !partial || disk.is_plain();
        let lane = Lane::Disk(node.id());
        let permit = if plain && !memory { self.shared.pool.try_inline_for(lane, data.len()) } else { None };
        if !memory && permit.is_none() {
            return self.write_later(call, ino, written, data.to_vec(), reply);
        }
        let Some(inside) = self.shared.gate.enter() else { return reply.error(Errno::EIO) };
        let write = || Self::write_now(&node, written, data).and_then(|()| Self::sync_now(&node, written));
        let (done, wanted) = without_files(|| guarded(write));
        match done {
            Ok(()) => reply.written(data.len() as u32),
            Err(Stop::Errno(errno)) => reply.error(errno),
            Err(Stop::Wait(arrival)) => {
                // Whole blocks need nothing of the base: only the ends are kept while it is waited for (D49).
                let (ends, middle) = Ends::of(written.offset, data);
                let whole = || Self::write_now(&node, written.at(ends.middle_at()), middle);
                if !middle.is_empty()
                    && let Err(stop) = guarded(whole)
                {
                    return reply.error(stop.errno());
                }
                drop(inside);
                let parts = Parts { len: data.len(), pending: Mutex::new(Pending::Ends(ends)) };
                let attempt = self.write_of_parts(call, ino, written, parts, reply);
                match wanted {
                    Wanted::File => attempt.spawn_in_base(self),
                    Wanted::Nothing => attempt.wait_for(self, arrival),
                }
            }
        }
    }

    /// A write that is run elsewhere, with a copy of its bytes.
    fn write_later(&self, call: Call, ino: INodeNo, written: Written, data: Vec<u8>, reply: ReplyWrite) {
        let len = data.len();
        let parts = Parts { len, pending: Mutex::new(Pending::Whole(data)) };
        let attempt = self.write_of_parts(call, ino, written, parts, reply);
        self.submit_later(attempt, len);
    }

    fn write_of_parts(
        &self,
        call: Call,
        ino: INodeNo,
        written: Written,
        parts: Parts,
        reply: ReplyWrite,
    ) -> Arc<Attempt<()>> {
        let len = parts.len;
        let held = parts.held(written.offset);
        let node = Node::of(ino.0).unwrap_or(Node::Root);
        let origin = self.origin(call, node, held);
        let work = move |fs: &PlyFs| {
            let node = fs.disk(ino)?;
            let mut pending = parts.pending.lock();
            match &*pending {
                Pending::Whole(data) => match Self::write_now(&node, written, data) {
                    Err(Stop::Wait(arrival)) => {
                        let (ends, middle) = Ends::of(written.offset, data);
                        // Whole blocks need nothing of the base, and need not be held while it is waited for.
                        if !middle.is_empty() {
                            Self::write_now(&node, written.at(ends.middle_at()), middle)?;
                        }
                        *pending = Pending::Ends(ends);
                        return Err(Stop::Wait(arrival));
                    }
                    done => done?,
                },
                Pending::Ends(ends) => {
                    Self::write_now(&node, written.at(ends.head_at), &ends.head)?;
                    Self::write_now(&node, written.at(ends.tail_at), &ends.tail)?;
                }
            }
            drop(pending);
            Self::sync_now(&node, written)
        };
        let answer = move |done: Result<(), Errno>| match done {
            Ok(()) => reply.written(len as u32),
            Err(errno) => reply.error(errno),
        };
        let attempt = Attempt::new(origin, Kind::Changes, work, answer);
        Arc::new(attempt.prepared_by(move |fs| read_ends(fs, ino, written.offset, len as u64)))
    }
}

/// A write that is run elsewhere.
struct Parts {
    len: usize,
    pending: Mutex<Pending>,
}

impl Parts {
    /// Bytes that it holds while it waits for the base.
    fn held(&self, offset: u64) -> usize {
        match &*self.pending.lock() {
            Pending::Whole(data) => data.len() - ends(offset, data).1.len(),
            Pending::Ends(ends) => ends.head.len() + ends.tail.len(),
        }
    }
}

/// The bytes of it that are not written yet.
enum Pending {
    Whole(Vec<u8>),
    /// Of a write that waits for the base.
    Ends(Ends),
}

/// First and last bytes of a write, which are parts of blocks.
struct Ends {
    head_at: u64,
    head: Vec<u8>,
    tail_at: u64,
    tail: Vec<u8>,
}

impl Ends {
    /// And the whole blocks between them.
    fn of(offset: u64, data: &[u8]) -> (Self, &[u8]) {
        let (head, middle, tail) = ends(offset, data);
        let tail_at = offset + (data.len() - tail.len()) as u64;
        (Self { head_at: offset, head: head.to_vec(), tail_at, tail: tail.to_vec() }, middle)
    }

    fn middle_at(&self) -> u64 {
        self.head_at + self.head.len() as u64
    }
}

/// The part of a block that `data` begins with, its whole blocks, and the part that it ends with.
fn ends(offset: u64, data: &[u8]) -> (&[u8], &[u8], &[u8]) {
    let end = offset + data.len() as u64;
    let (first, last) = (offset.next_multiple_of(BLOCK), end / BLOCK * BLOCK);
    if first >= last {
        return (data, &[], &[]);
    }
    let (head, rest) = data.split_at((first - offset) as usize);
    let (middle, tail) = rest.split_at((last - first) as usize);
    (head, middle, tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_ends_of_a_write_are_parts_of_blocks() {
        let data = vec![7; 3 * BLOCK as usize];
        let lens = |offset, len: usize| {
            let (head, middle, tail) = ends(offset, &data[..len]);
            assert_eq!(head.len() + middle.len() + tail.len(), len);
            (head.len(), middle.len(), tail.len())
        };
        assert_eq!(lens(0, 4096), (0, 4096, 0));
        assert_eq!(lens(100, 50), (50, 0, 0));
        assert_eq!(lens(4000, 200), (200, 0, 0), "two parts, no whole block");
        assert_eq!(lens(4000, 4200), (96, 4096, 8));
        assert_eq!(lens(4096, 5000), (0, 4096, 904));
    }
}
