//! Getting to know which blocks an earlier worker left, while they are used.
//!
//! Serving does not wait for it. At the start only names and headers are read. What a read asks for is looked up in the
//! sums file at once: the slot of a chunk lies at the chunk's own place. Behind that a scan reads the whole file, so that
//! totals are known and the oldest blocks can be told. What must hold until it is through:
//! - A read of what is cached finds it, and waits for its own slot only (D52).
//! - A source counts with what its file takes on the filesystem, so that the bound on bytes holds.
//! - Nothing is evicted to make room: what is old is not known yet. A full cache takes nothing new for so long.
//!
//! Version 0.1.0 had slots in any order. Such a file is read as a whole first, and reads of its source wait for that; it
//! is then written anew with each slot in its place.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::files::{chunks_of, sums_name};
use super::index::{Index, mask};
use super::open::Files;
use super::source::CachedSource;
use super::{DIR, DiskCache, count};
use crate::format::cache::{CACHE_BLOCK, HEADER_AREA, SLOT, SLOT_BLOCKS, decode_slot, slot_place};
use crate::format::layout::staged;
use crate::io::Open;

/// Slots that are read at once.
const BATCH: u64 = 1024;
/// Slots that a read looks up at once.
const NEAR: u64 = 64;

/// Sources that are not wholly known, and the ticks at which those that could not be read are tried again.
pub(super) type Queue = VecDeque<(Arc<CachedSource>, u64)>;

impl DiskCache {
    /// One step of the scan. Returns whether there is more to do now.
    pub(super) fn scan_step(&self) -> bool {
        let now = self.shared.health.ticks();
        let next = {
            let mut queue = self.queue.lock();
            let due = queue.iter().position(|(_, due)| *due <= now);
            due.and_then(|at| queue.remove(at)).map(|(source, _)| source)
        };
        let Some(source) = next else {
            self.scanned();
            return false;
        };
        match source.scan() {
            Ok(true) => {}
            Ok(false) => self.queue.lock().push_front((source, 0)),
            Err(error) => {
                count(&self.shared.counters.read_errors, 1);
                self.shared.trouble(source.key(), &error);
                self.queue.lock().push_back((source, now + 1 + now % 16));
            }
        }
        true
    }

    /// All that can be read is known.
    fn scanned(&self) {
        if self.shared.loaded.load(Ordering::Acquire) && !self.shared.indexed.swap(true, Ordering::AcqRel) {
            let generation = self.shared.generation();
            for source in self.sources() {
                source.index.lock().renew_young(generation);
            }
        }
    }
}

impl CachedSource {
    /// What an earlier worker left of some blocks is known after this. False when it cannot be read.
    pub(super) fn know(&self, first: u64, blocks: u64) -> bool {
        self.shared.first_load.wait();
        loop {
            let (from, count, files) = {
                let mut index = self.index.lock();
                while index.knows_nothing() {
                    if index.unreadable {
                        return false;
                    }
                    self.ready.wait(&mut index);
                }
                let Some((from, count)) = index.unknown(first, blocks, NEAR) else { return true };
                (from, count, index.files.clone())
            };
            let Some(opened) = files.and_then(|files| self.open(&files)) else { return false };
            let mut bytes = vec![0; (count * SLOT) as usize];
            match opened.sums.read_at(&mut bytes, slot_place(from)) {
                Ok(got) => self.learn(&mut self.index.lock(), from, count, &bytes[..got]),
                Err(error) => {
                    super::count(&self.shared.counters.read_errors, 1);
                    self.shared.trouble(&self.key, &error);
                    return false;
                }
            }
        }
    }

    /// Notes what `count` slots from number `from` on say of the chunks at whose places they lie. What is missing of them
    /// lies behind the end of the file.
    fn learn(&self, index: &mut Index, from: u32, count: u64, bytes: &[u8]) {
        let blocks = self.blocks();
        let mut slots = bytes.chunks_exact(SLOT as usize);
        for slot in from..from + count as u32 {
            let bytes = slots.next();
            if !index.is_unknown(slot) {
                continue;
            }
            index.note_known(slot);
            let Some(bytes) = bytes else { continue };
            let Ok(found) = decode_slot(&self.key.0, slot, bytes) else { continue };
            let mut present = 0;
            for (at, sum) in found.sums.iter().enumerate() {
                present |= u64::from(*sum != 0) << at;
            }
            let possible = mask(0, blocks - u64::from(slot) * SLOT_BLOCKS);
            let owned = found.chunk == Some(u64::from(slot));
            if present & !possible != 0 || (present != 0 && !owned) {
                index.note_torn(slot);
            }
            if !owned {
                continue;
            }
            present &= possible;
            if present != 0 {
                index.found(slot, slot, present, found.ages);
            }
        }
        self.shared.generation.fetch_max(index.newest() + 1, Ordering::Relaxed);
    }

    /// One step. Returns whether all of it is known.
    fn scan(&self) -> io::Result<bool> {
        let (from, files) = {
            let index = self.index.lock();
            let Some(from) = index.scan_from() else { return Ok(true) };
            (from, index.files.clone())
        };
        let Some(files) = files else { return Ok(true) };
        let opened = match files.get() {
            // Dropped meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(true),
            Err(error) => {
                self.index.lock().unreadable = true;
                self.ready.notify_all();
                return Err(error);
            }
            Ok(opened) => opened,
        };
        let Some(from) = from else {
            self.scan_as_a_whole(&files, &opened)?;
            return Ok(true);
        };
        let chunks = chunks_of(self.size());
        // Holes are passed over: a large source of which little is cached is a small file.
        let data = opened.sums.next_data(slot_place(from))?;
        let next = data.map_or(chunks, |at| at.saturating_sub(HEADER_AREA) / SLOT).max(u64::from(from));
        let to = (next + BATCH).min(chunks);
        let mut bytes = vec![0; (to.saturating_sub(next) * SLOT) as usize];
        let got = opened.sums.read_at(&mut bytes, slot_place(next as u32))?;
        let mut rest = &bytes[..got];
        // In small parts: readers need the lock.
        for first in (next..to).step_by(NEAR as usize) {
            let count = NEAR.min(to - first);
            let (part, more) = rest.split_at(rest.len().min((count * SLOT) as usize));
            rest = more;
            let mut index = self.index.lock();
            if !index.files.as_ref().is_some_and(|now| Arc::ptr_eq(now, &files)) {
                return Ok(true);
            }
            self.learn(&mut index, first as u32, count, part);
            index.scanned_to((first + count) as u32);
        }
        if to < chunks {
            return Ok(false);
        }
        let mut index = self.index.lock();
        if index.files.as_ref().is_some_and(|now| Arc::ptr_eq(now, &files)) {
            self.finish(&mut index);
        }
        Ok(true)
    }

    /// All of it is known: it counts with what is here.
    fn finish(&self, index: &mut Index) {
        if index.estimate().is_none() {
            // It was emptied meanwhile.
            return;
        }
        let estimate = index.know_all();
        let exact = self.bytes_in(index);
        self.shared.used.fetch_add(exact, Ordering::Relaxed);
        self.shared.used.fetch_sub(estimate, Ordering::Relaxed);
        self.used_at.fetch_max(index.newest(), Ordering::Relaxed);
        self.shared.uses.fetch_max(index.newest(), Ordering::Relaxed);
        self.shared.troubles.over(&self.key);
        self.ready.notify_all();
    }

    /// A file of version 0.1.0, with slots in any order.
    fn scan_as_a_whole(&self, files: &Arc<Files>, opened: &super::files::Opened) -> io::Result<()> {
        let header = self.writer.lock().header().clone();
        let mut found = Index::of_any_order();
        let lasting = self.shared.troubles.is_lasting(&self.key);
        let read = opened.load(&header, &mut found).and_then(|errors| match errors {
            0 => Ok(()),
            _ if lasting => Ok(()),
            _ => Err(io::Error::other("its sums cannot be read")),
        });
        if let Err(error) = read {
            // Who waits for it goes to the source.
            self.index.lock().unreadable = true;
            self.ready.notify_all();
            return Err(error);
        }
        let mut writer = self.writer.lock();
        {
            let mut index = self.index.lock();
            if !index.knows_nothing() || !index.files.as_ref().is_some_and(|now| Arc::ptr_eq(now, files)) {
                return Ok(());
            }
            let newest = found.newest();
            index.adopt(found);
            self.finish(&mut index);
            self.shared.generation.fetch_max(newest + 1, Ordering::Relaxed);
        }
        if let Err(error) = self.put_slots_in_place(&mut writer, opened) {
            // It is as it was, and is read as a whole again by the next worker.
            tracing::debug!(key = %self.key, %error, "the sums of a source stay in any order");
        }
        Ok(())
    }

    /// Writes the sums file anew, each slot at the place of its chunk. Readers go on with the old file until then.
    fn put_slots_in_place(
        &self,
        writer: &mut super::source::Writer,
        opened: &super::files::Opened,
    ) -> io::Result<()> {
        let medium = &*self.shared.medium;
        let (name, staged) = (sums_name(&self.key), staged(&sums_name(&self.key)));
        let mut header = writer.header().clone();
        header.direct = true;
        let slots = self.index.lock().slots();
        let put = || -> io::Result<Arc<Files>> {
            let sums = medium.open(&staged, Open::Create)?;
            sums.set_len(0)?;
            sums.set_len(HEADER_AREA)?;
            let new = super::files::Opened { blocks: opened.blocks.clone(), sums };
            for (chunk, slot) in slots {
                let mut bytes = [0; SLOT as usize];
                opened.sums.read_at(&mut bytes, slot_place(slot))?;
                new.move_slot(&self.key, (slot, chunk), &bytes)?;
            }
            new.write_header(&mut header)?;
            medium.rename(&staged, &name)?;
            Ok(Files::existing(self.key, &self.shared.open))
        };
        let files = put().inspect_err(|_| {
            let _ = medium.remove(&staged);
        })?;
        writer.replace_header(header);
        let old = {
            let mut index = self.index.lock();
            index.in_place();
            index.files.replace(files)
        };
        if let Some(old) = old {
            old.retire();
        }
        self.shared.names.store(true, Ordering::Relaxed);
        medium.sync_dir(DIR)
    }

    /// Blocks of the source that an earlier worker may have left and that are not known yet.
    pub fn is_known(&self) -> bool {
        !self.shared.first_load.is_to_come() && self.index.lock().scan_from().is_none()
    }

    /// Bytes came in or went while not all is known.
    pub(super) fn charge(&self, index: &mut Index, bytes: u64) {
        index.charge(bytes);
        self.shared.used.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn discharge(&self, index: &mut Index, bytes: u64) {
        self.shared.used.fetch_sub(index.discharge(bytes), Ordering::Relaxed);
    }
}

/// Bytes that a source counts with before it is known.
pub(super) fn estimate(allocated: u64, size: u64) -> u64 {
    allocated.next_multiple_of(CACHE_BLOCK).min(size)
}
