//! Inserts of fetched blocks.

use std::io;
use std::sync::atomic::Ordering;

use super::files::Opened;
use super::index::{Index, Piece};
use super::source::{CachedSource, Writer};
use super::{CACHE_BLOCK, DiskCache, count};
use crate::format::cache::{SLOT_BLOCKS, block_sum};

impl CachedSource {
    /// Inserts fetched blocks: `data` is whole blocks from block `first` on; the last block of the source may be short.
    /// Present blocks are not written again. Best effort: after a failure the missing blocks stay missing, and readers
    /// go to the source.
    pub fn insert(&self, first: u64, data: &[u8]) {
        let Some(cache) = self.cache.upgrade() else { return };
        let end = first + self.blocks_in(first, data.len());
        let mut block = first;
        while block < end {
            if !self.shared.loaded.load(Ordering::Acquire)
                || !self.shared.health.may_write()
                || self.is_detached()
                || self.shared.unreadable.is_unloaded(&self.key)
            {
                return;
            }
            let blocks = (SLOT_BLOCKS - block % SLOT_BLOCKS).min(end - block);
            let from = ((block - first) * CACHE_BLOCK) as usize;
            let bytes = &data[from..from + self.bytes_of(block, blocks) as usize];
            if !self.insert_chunk(&cache, block, blocks, bytes) {
                return;
            }
            block += blocks;
        }
    }

    /// Inserts blocks of one chunk. Returns false when the cache takes no more blocks now.
    fn insert_chunk(&self, cache: &DiskCache, first: u64, blocks: u64, data: &[u8]) -> bool {
        if !self.look_up(first, blocks) {
            return false;
        }
        let missing =
            |index: &Index| (first..first + blocks).filter(|block| !index.contains(*block)).count() as u64;
        let wanted = missing(&self.index.lock());
        if wanted == 0 {
            return true;
        }
        if !cache.admit(self) {
            return false;
        }
        self.note_use();
        let Some(mut room) = cache.room_for(wanted * CACHE_BLOCK) else { return false };
        let mut writer = self.writer.lock();
        if self.is_detached() || !self.takes_blocks() {
            return false;
        }
        match self.write_missing(&mut writer, first, first + blocks, data, &mut room.bytes) {
            Ok(()) => {
                self.shared.worked();
                true
            }
            Err(error) => {
                self.shared.write_failed("writing to the cache", &error);
                false
            }
        }
    }

    /// Writes the missing blocks of `first..end`, and takes their bytes from `room`.
    fn write_missing(
        &self,
        writer: &mut Writer,
        first: u64,
        end: u64,
        data: &[u8],
        room: &mut u64,
    ) -> io::Result<()> {
        let files = self.files_for_writing(writer)?.get()?;
        if self.index.lock().unknown(first, end - first, 1).is_some() {
            return Ok(());
        }
        let mut from = first;
        loop {
            let Some((start, blocks)) = self.index.lock().next_gap(from, end) else { return Ok(()) };
            from = start + blocks;
            let len = self.bytes_of(start, blocks);
            // Other inserts and evictions may have changed the gaps since the room was made.
            if len > *room {
                return Ok(());
            }
            let at = ((start - first) * CACHE_BLOCK) as usize;
            let bytes = &data[at..at + len as usize];
            if let Err(error) = self.write_blocks(&files, start, blocks, bytes) {
                // Give back the space of a partial write.
                if files.blocks.punch(start * CACHE_BLOCK, blocks * CACHE_BLOCK).is_err() {
                    self.stray_bytes.store(true, Ordering::Relaxed);
                }
                return Err(error);
            }
            *room -= len;
            count(&self.shared.counters.insertions, blocks);
            count(&self.shared.unsynced, len);
            self.shared.moved(len);
        }
    }

    fn write_blocks(&self, files: &Opened, first: u64, blocks: u64, bytes: &[u8]) -> io::Result<()> {
        let sums: Vec<u64> = (first..)
            .zip(bytes.chunks(CACHE_BLOCK as usize))
            .map(|(block, bytes)| block_sum(&self.key.0, block, bytes))
            .collect();
        files.blocks.write_at(bytes, first * CACHE_BLOCK)?;
        self.blocks_dirty.store(true, Ordering::Relaxed);
        let generation = self.shared.generation();
        let (chunk, at) = (first / SLOT_BLOCKS, first % SLOT_BLOCKS);
        let (slot, ages) = {
            let mut index = self.index.lock();
            match index.slot(first) {
                Some(slot) => (slot, None),
                None => (index.take_slot(first), Some(index.ages_of_new(first, blocks, generation))),
            }
        };
        let piece = Piece { slot, at, blocks };
        let written = match &ages {
            Some(ages) => files.write_slot(&self.key, chunk, &piece, ages, &sums),
            None => files.write_sums(&piece, &sums),
        };
        self.sums_dirty.store(true, Ordering::Relaxed);
        if let Err(error) = written {
            // Some of the sums may be written. Clear them, because the caller punches the blocks out, and they must not
            // seem damaged.
            let _ = files.write_sums(&piece, &vec![0; blocks as usize]);
            if ages.is_some() {
                self.index.lock().give_slot_back(slot);
            }
            return Err(error);
        }
        // Publish the blocks only now, after their bytes and sums are written (D32).
        let mut index = self.index.lock();
        index.charge(bytes.len() as u64);
        index.publish(first, blocks, slot, generation);
        Ok(())
    }
}
