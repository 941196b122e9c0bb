//! The scan that indexes the blocks that an earlier worker left, while the cache is in use.
//!
//! Serving does not wait for the scan. A start reads only names and headers. A read looks up its own chunk in the sums
//! file, where the slot of a chunk lies at the chunk's own place. In the background the scan reads the whole file, so
//! that the totals and the oldest blocks are known. What must hold until the scan is done:
//! - A read of a cached block finds it, and waits for its own slot only (D52).
//! - A source counts for the space that its file takes on the filesystem, so that the bound on bytes holds.
//! - Nothing is evicted to make room, because the oldest blocks are not known yet. A full cache takes no new blocks.
//!
//! Version 0.1.0 wrote slots in any order. The scan reads such a file as a whole first, and reads of its source wait for
//! that. Then it writes the file anew, with each slot in its place.

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

/// Slots that one step of the scan reads.
const BATCH: u64 = 1024;
/// Slots that a lookup reads at a time.
const NEAR: u64 = 64;

/// Sources that are not fully indexed, and the tick at which each is due. A source that could not be read is due later.
pub(super) type Queue = VecDeque<(Arc<CachedSource>, u64)>;

impl DiskCache {
    /// Runs one step of the scan. Returns whether there is more to do now.
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
                self.shared.note_unreadable(source.key(), &error);
                self.queue.lock().push_back((source, now + 1 + now % 16));
            }
        }
        true
    }

    /// Notes that every readable source is indexed.
    fn scanned(&self) {
        if self.shared.loaded.load(Ordering::Acquire) && !self.shared.indexed.swap(true, Ordering::AcqRel) {
            let generation = self.shared.generation();
            for source in self.sources() {
                source.index.lock().renew_added_in_scan(generation);
            }
        }
    }
}

impl CachedSource {
    /// Indexes the chunks of some blocks, if they are not indexed yet. Returns false when the sums cannot be read.
    pub(super) fn look_up(&self, first: u64, blocks: u64) -> bool {
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
                Ok(got) => self.note_slots(&mut self.index.lock(), from, count, &bytes[..got]),
                Err(error) => {
                    super::count(&self.shared.counters.read_errors, 1);
                    self.shared.note_unreadable(&self.key, &error);
                    return false;
                }
            }
        }
    }

    /// Adds `count` slots from slot `from` on to the index. Each slot lies at the place of its chunk. Slots that are
    /// missing in `bytes` lie beyond the end of the file.
    fn note_slots(&self, index: &mut Index, from: u32, count: u64, bytes: &[u8]) {
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
                index.add_found(slot, slot, present, found.ages);
            }
        }
        self.shared.generation.fetch_max(index.newest() + 1, Ordering::Relaxed);
    }

    /// Runs one step of the scan of this source. Returns whether the source is fully indexed.
    fn scan(&self) -> io::Result<bool> {
        let (from, files) = {
            let index = self.index.lock();
            let Some(from) = index.scan_from() else { return Ok(true) };
            (from, index.files.clone())
        };
        let Some(files) = files else { return Ok(true) };
        let opened = match files.get() {
            // The files were removed meanwhile.
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
        // Skip holes: the sums file of a large source with few cached blocks is sparse.
        let data = opened.sums.next_data(slot_place(from))?;
        let next = data.map_or(chunks, |at| at.saturating_sub(HEADER_AREA) / SLOT).max(u64::from(from));
        let to = (next + BATCH).min(chunks);
        let mut bytes = vec![0; (to.saturating_sub(next) * SLOT) as usize];
        let got = opened.sums.read_at(&mut bytes, slot_place(next as u32))?;
        let mut rest = &bytes[..got];
        // In small parts, because readers need the lock.
        for first in (next..to).step_by(NEAR as usize) {
            let count = NEAR.min(to - first);
            let (part, more) = rest.split_at(rest.len().min((count * SLOT) as usize));
            rest = more;
            let mut index = self.index.lock();
            if !index.files.as_ref().is_some_and(|now| Arc::ptr_eq(now, &files)) {
                return Ok(true);
            }
            self.note_slots(&mut index, first as u32, count, part);
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

    /// The source is fully indexed: replaces the estimate by the bytes of its present blocks.
    fn finish(&self, index: &mut Index) {
        if index.estimate().is_none() {
            // The source was emptied meanwhile.
            return;
        }
        let estimate = index.know_all();
        let exact = self.bytes_in(index);
        self.shared.used.fetch_add(exact, Ordering::Relaxed);
        self.shared.used.fetch_sub(estimate, Ordering::Relaxed);
        self.used_at.fetch_max(index.newest(), Ordering::Relaxed);
        self.shared.uses.fetch_max(index.newest(), Ordering::Relaxed);
        self.shared.unreadable.clear(&self.key);
        self.ready.notify_all();
    }

    /// Reads a file of version 0.1.0, with slots in any order, as a whole.
    fn scan_as_a_whole(&self, files: &Arc<Files>, opened: &super::files::Opened) -> io::Result<()> {
        let header = self.writer.lock().header().clone();
        let mut found = Index::of_any_order();
        let lasting = self.shared.unreadable.is_lasting(&self.key);
        let read = opened.load(&header, &mut found).and_then(|errors| match errors {
            0 => Ok(()),
            _ if lasting => Ok(()),
            _ => Err(io::Error::other("its checksums cannot be read")),
        });
        if let Err(error) = read {
            // Waiting readers go to the source.
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
            // The file is unchanged, and the next worker reads it as a whole again.
            tracing::debug!(key = %self.key, %error, "the checksums of a source cannot be put in order; they stay as they are");
        }
        Ok(())
    }

    /// Writes the sums file anew, with each slot at the place of its chunk. Readers use the old file until that is done.
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

    /// Whether all blocks that an earlier worker left are indexed.
    pub fn is_known(&self) -> bool {
        !self.shared.first_load.is_pending() && self.index.lock().scan_from().is_none()
    }

    /// Counts inserted bytes as used.
    pub(super) fn charge(&self, index: &mut Index, bytes: u64) {
        index.charge(bytes);
        self.shared.used.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts dropped bytes as free.
    pub(super) fn discharge(&self, index: &mut Index, bytes: u64) {
        self.shared.used.fetch_sub(index.discharge(bytes), Ordering::Relaxed);
    }
}

/// The bytes that a source counts for before it is indexed.
pub(super) fn estimate(allocated: u64, size: u64) -> u64 {
    allocated.next_multiple_of(CACHE_BLOCK).min(size)
}
