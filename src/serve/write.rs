//! Writes. They run on this thread if they go to memory or this thread may wait for the store, and otherwise in the
//! disk's lane with a copy of the bytes. A write whose ends need bytes of the base runs again when these are here.

use std::sync::Arc;

use parking_lot::Mutex;

use super::attempt::{Kind, PendingRequest};
use super::error::{Stop, fail, fail_disk};
use super::guard::guarded;
use super::measure::measured;
use super::pool::Lane;
use super::{Call, Errno, Handle, Service, Target, refuse};
use crate::base::{Wanted, without_files};
use crate::format::BLOCK;
use crate::limits::Cost;
use crate::stats::Operation;
use crate::store::DiskNode;

/// A write request without its bytes.
#[derive(Debug, Clone, Copy)]
pub struct WriteRequest {
    /// Offset on the disk in bytes.
    pub offset: u64,
    pub handle: Handle,
    /// Whether the write must be durable when it is answered.
    pub durable: bool,
}

impl WriteRequest {
    /// A part of the write, at `offset`.
    fn at(self, offset: u64) -> Self {
        Self { offset, ..self }
    }
}

/// Whether a write or discard covers its first or last block only in part. The rest of that block may be the base's.
fn is_partial(offset: u64, len: u64) -> bool {
    !(offset | len).is_multiple_of(BLOCK)
}

fn write_now(node: &DiskNode, request: WriteRequest, data: &[u8]) -> Result<(), Stop> {
    let done = node.change(|disk| disk.write(request.offset, data, request.handle.epoch()));
    done.map_err(|e| fail(&e))?.map_err(|e| fail_disk(node, "write", &e))
}

fn sync_now(node: &DiskNode, request: WriteRequest) -> Result<(), Stop> {
    if !request.durable {
        return Ok(());
    }
    let done = node.change(|disk| disk.flush(request.handle.epoch()));
    done.map_err(|e| fail(&e))?.map_err(|e| fail_disk(node, "flush", &e))
}

impl Service {
    /// Writes all of `data`, or fails. A failed write may have written a part.
    pub fn write(
        &self,
        call: Call,
        disk: u64,
        request: WriteRequest,
        data: &[u8],
        answer: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        let node = match self.disk(disk) {
            Ok(node) => node,
            Err(errno) => return answer(Err(errno)),
        };
        self.copies.changes(disk, call.thread);
        let answer = measured(&node, Operation::Write, data.len() as u64, answer);
        let cost = Cost::Write(data.len() as u64);
        if !self.passes(&node, cost) {
            let (data, held) = (data.to_vec(), data.len());
            return self.when_it_is_its_turn(
                call,
                &node,
                (cost, held),
                answer,
                refuse,
                move |service, call, answer| {
                    service.write_in_lane(call, disk, request, data, answer);
                },
            );
        }
        let Some(attached) = node.attached() else {
            let data = data.to_vec();
            return self.when_attached(call, Target::Disk(disk), answer, refuse, move |service, answer| {
                service.write_later(call, disk, request, data, answer);
            });
        };
        let partial = is_partial(request.offset, data.len() as u64);
        let memory = self.store.never_waits() && !partial && !request.durable;
        let plain = !partial || attached.is_plain();
        let lane = Lane::Disk(disk);
        let permit = if plain && !memory { self.runner.pool.try_inline_for(lane, data.len()) } else { None };
        if !memory && permit.is_none() {
            return self.write_later(call, disk, request, data.to_vec(), answer);
        }
        let Some(inside) = self.runner.gate.enter() else { return answer(Err(Errno::EIO)) };
        let write = || write_now(&node, request, data).and_then(|()| sync_now(&node, request));
        let (done, wanted) = without_files(|| guarded(write));
        // An answer waits for nothing, and the next request of a client comes before the call that answers returns: with the
        // permit still taken, another thread would write it, from a copy.
        let permit = permit.filter(|_| matches!(done, Err(Stop::Wait(_))));
        match done {
            Ok(()) => answer(Ok(())),
            Err(Stop::Errno(errno)) => answer(Err(errno)),
            Err(Stop::Wait(completion)) => {
                // Whole blocks need no bytes of the base: only the ends are held while the request waits for it (D49).
                let (ends, middle) = Ends::of(request.offset, data);
                let whole = || write_now(&node, request.at(ends.middle_at()), middle);
                if !middle.is_empty()
                    && let Err(stop) = guarded(whole)
                {
                    return answer(Err(stop.errno()));
                }
                drop((inside, permit));
                let parts = Parts { len: data.len(), pending: Mutex::new(Pending::Ends(ends)) };
                let attempt = self.write_of_parts(call, disk, request, parts, answer);
                match wanted {
                    Wanted::File => attempt.spawn_in_base(&self.runner),
                    Wanted::Nothing => attempt.wait_for(&self.runner, completion),
                }
            }
        }
    }

    /// Runs a write on a thread of its lane.
    fn write_in_lane(
        &self,
        call: Call,
        disk: u64,
        request: WriteRequest,
        data: Vec<u8>,
        answer: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        let target = Target::Disk(disk);
        if !self.is_attached(target) {
            return self.when_attached(call, target, answer, refuse, move |service, answer| {
                service.write_later(call, disk, request, data, answer);
            });
        }
        let parts = Parts { len: data.len(), pending: Mutex::new(Pending::Whole(data)) };
        self.write_of_parts(call, disk, request, parts, answer).run_here(&self.runner);
    }

    /// Queues a write, with a copy of its bytes.
    fn write_later(
        &self,
        call: Call,
        disk: u64,
        request: WriteRequest,
        data: Vec<u8>,
        answer: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        let len = data.len();
        let parts = Parts { len, pending: Mutex::new(Pending::Whole(data)) };
        let attempt = self.write_of_parts(call, disk, request, parts, answer);
        attempt.submit_later(&self.runner, len);
    }

    fn write_of_parts(
        &self,
        call: Call,
        disk: u64,
        request: WriteRequest,
        parts: Parts,
        answer: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) -> Arc<PendingRequest<()>> {
        let len = parts.len as u64;
        let origin = self.origin(call, Target::Disk(disk), parts.held(request.offset));
        let (writer, reader) = (self.clone(), self.clone());
        let work = move || {
            let node = writer.disk(disk)?;
            let mut pending = parts.pending.lock();
            match &*pending {
                Pending::Whole(data) => match write_now(&node, request, data) {
                    Err(Stop::Wait(completion)) => {
                        let (ends, middle) = Ends::of(request.offset, data);
                        // Whole blocks need no bytes of the base, and are not held while the request waits for it.
                        if !middle.is_empty() {
                            write_now(&node, request.at(ends.middle_at()), middle)?;
                        }
                        *pending = Pending::Ends(ends);
                        return Err(Stop::Wait(completion));
                    }
                    done => done?,
                },
                Pending::Ends(ends) => {
                    write_now(&node, request.at(ends.head_at), &ends.head)?;
                    write_now(&node, request.at(ends.tail_at), &ends.tail)?;
                }
            }
            drop(pending);
            sync_now(&node, request)
        };
        let attempt = PendingRequest::new(origin, Kind::Changes, work, answer);
        Arc::new(attempt.prepared_by(move || reader.read_ends(disk, request.offset, len)))
    }
}

/// The bytes of a queued write.
struct Parts {
    len: usize,
    pending: Mutex<Pending>,
}

impl Parts {
    /// Bytes that the write holds while it waits for the base.
    fn held(&self, offset: u64) -> usize {
        match &*self.pending.lock() {
            Pending::Whole(data) => data.len() - ends(offset, data).1.len(),
            Pending::Ends(ends) => ends.head.len() + ends.tail.len(),
        }
    }
}

/// The bytes that are not written yet.
enum Pending {
    Whole(Vec<u8>),
    /// The ends of a write that waits for the base.
    Ends(Ends),
}

/// The first and the last bytes of a write, where it covers a block only in part.
struct Ends {
    head_at: u64,
    head: Vec<u8>,
    tail_at: u64,
    tail: Vec<u8>,
}

impl Ends {
    /// The ends of a write, and the whole blocks between them.
    fn of(offset: u64, data: &[u8]) -> (Self, &[u8]) {
        let (head, middle, tail) = ends(offset, data);
        let tail_at = offset + (data.len() - tail.len()) as u64;
        (Self { head_at: offset, head: head.to_vec(), tail_at, tail: tail.to_vec() }, middle)
    }

    fn middle_at(&self) -> u64 {
        self.head_at + self.head.len() as u64
    }
}

/// The partial block with which `data` begins, its whole blocks, and the partial block with which it ends.
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
