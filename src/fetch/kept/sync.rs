//! Makes cached blocks durable, and handles a failed sync.
//!
//! What must hold: after a sync that worked, all present blocks are durable. A failed sync may have lost the writes
//! since the last one, although the page cache still shows them, to the next worker too. So these blocks are written
//! again at once, which makes their pages dirty for a later sync. A block that cannot be written again is dropped,
//! unless it may have been durable before (D53).

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::files::Opened;
use super::index::Piece;
use super::open::Files;
use super::source::{CachedSource, Writer};
use super::{CACHE_BLOCK, EvictReason};
use crate::format::cache::SLOT_BLOCKS;
use crate::mutant::Mutant;

/// Chunks whose ages are written under one hold of the writer's lock.
const AGED: usize = 1024;

impl CachedSource {
    /// Makes the cached blocks of the source durable.
    pub(super) fn sync(&self) -> io::Result<()> {
        let Some(files) = self.index.lock().files.clone() else { return Ok(()) };
        let dirty = [&self.blocks_dirty, &self.sums_dirty].iter().any(|dirty| dirty.load(Ordering::Relaxed));
        if !dirty && !self.index.lock().is_aged() && !self.writer.lock().is_stale() {
            return Ok(());
        }
        let opened = match files.get() {
            // The files were removed meanwhile, with all their blocks.
            Err(_) if !self.uses(&files) => return Ok(()),
            other => other?,
        };
        self.rewrite_doubtful(&opened)?;
        let unsynced = self.index.lock().take_unsynced();
        let done = self.sync_files(&files, &opened);
        match &done {
            Ok(()) => self.inherited.store(false, Ordering::Relaxed),
            Err(_) => {
                self.sync_failed(&mut self.writer.lock(), &opened, unsynced);
                let _ = self.rewrite_doubtful(&opened);
            }
        }
        done
    }

    fn sync_files(&self, files: &Arc<Files>, opened: &Opened) -> io::Result<()> {
        self.write_ages(files, opened)?;
        {
            let mut writer = self.writer.lock();
            if writer.is_stale() && self.has_files() {
                self.files_for_writing(&mut writer)?;
            }
        }
        // Without a lock, because it may take long. The blocks come first, so that a durable sum has durable bytes.
        for (dirty, file) in [(&self.blocks_dirty, &opened.blocks), (&self.sums_dirty, &opened.sums)] {
            if dirty.swap(false, Ordering::Relaxed)
                && !Mutant::CacheBlockNotSynced.is_active()
                && let Err(error) = file.sync_data()
            {
                dirty.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Handles a failed sync of one of the files. The sync should have made `unsynced` (first block, blocks) durable,
    /// and all blocks that were inserted since.
    pub(super) fn sync_failed(&self, writer: &mut Writer, opened: &Opened, mut unsynced: Vec<(u64, u64)>) {
        unsynced.extend(self.index.lock().take_unsynced());
        if Mutant::CacheBlockNotRewritten.is_active() {
            return;
        }
        // Only one copy of the header, because the other may be the durable one.
        let _ = writer.write_again(opened);
        // Which blocks an earlier worker had synced is unknown.
        self.doubtful.fetch_or(self.inherited.load(Ordering::Relaxed), Ordering::Relaxed);
        for (first, blocks) in unsynced {
            for (at, count) in chunks(first, blocks) {
                if let Err(error) = self.write_chunk_again(opened, at, count) {
                    let lost: Vec<_> = (at..at + count).map(|block| (block, None)).collect();
                    let (blocks, bytes) = self.drop_blocks(writer, opened, &lost);
                    tracing::warn!(key = %self.key, %error, blocks, "cached blocks that a failed sync may have lost cannot be written again; they are dropped");
                    self.shared.report_evicted(&self.reported_as(), blocks, bytes, EvictReason::ReadError);
                }
            }
        }
    }

    /// After a failed sync of blocks that an earlier worker left: writes all blocks of a pinned source again, and drops
    /// those of any other. After an error, a sync would not make all blocks durable.
    fn rewrite_doubtful(&self, opened: &Opened) -> io::Result<()> {
        if !self.doubtful.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        if !self.is_pinned() {
            self.empty(EvictReason::ReadError, false);
            return Ok(());
        }
        for (at, count) in chunks(0, self.blocks()) {
            if !self.look_up(at, count) {
                // These blocks count as missing until they can be read; they are written again then.
                self.doubtful.store(true, Ordering::Relaxed);
                continue;
            }
            let _writer = self.writer.lock();
            if let Err(error) = self.write_chunk_again(opened, at, count) {
                tracing::warn!(key = %self.key, %error, "cached blocks that a failed sync may have lost cannot be written again; plyfs tries again at the next sync");
                self.doubtful.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Writes the present blocks of one chunk again, so that their pages are dirty. The caller holds the writer's lock. A
    /// block that cannot be read is skipped without an error, because one bad sector must not stop the cache of all
    /// bases; the block's reader handles it.
    fn write_chunk_again(&self, opened: &Opened, first: u64, count: u64) -> io::Result<()> {
        let (no, end) = (first / SLOT_BLOCKS, first + count);
        let mut at = first;
        loop {
            let (run, found) = {
                let index = self.index.lock();
                let from = index.next_present(at).filter(|from| *from < end);
                let Some(from) = from else { break };
                ((from, index.run(from, end - from, true)), index.slot(from).zip(index.ages_of(no as u32)))
            };
            let Some((slot, ages)) = found else { break };
            let mut bytes = vec![0; self.bytes_of(run.0, run.1) as usize];
            at = run.0 + run.1;
            let whole = |slot| Piece { slot, at: 0, blocks: SLOT_BLOCKS };
            let Ok(got) = opened.blocks.read_at(&mut bytes, run.0 * CACHE_BLOCK) else { continue };
            let Ok(sums) = opened.read_sums(&[whole(slot)]) else { continue };
            for (n, block) in bytes[..got].chunks(CACHE_BLOCK as usize).enumerate() {
                let no = run.0 + n as u64;
                // A damaged block is left to its reader.
                if self.matches(no, block, sums[(no % SLOT_BLOCKS) as usize]) {
                    opened.blocks.write_at(block, no * CACHE_BLOCK)?;
                }
            }
            self.blocks_dirty.store(true, Ordering::Relaxed);
            opened.write_slot(&self.key, no, &whole(slot), &ages, &sums)?;
            self.sums_dirty.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    fn uses(&self, files: &Arc<Files>) -> bool {
        self.index.lock().files.as_ref().is_some_and(|now| Arc::ptr_eq(now, files))
    }

    fn write_ages(&self, files: &Arc<Files>, opened: &Opened) -> io::Result<()> {
        loop {
            let _writer = self.writer.lock();
            let aged = {
                let mut index = self.index.lock();
                if !index.files.as_ref().is_some_and(|now| Arc::ptr_eq(now, files)) {
                    return Ok(());
                }
                index.take_aged(AGED)
            };
            for (slot, chunk, ages) in &aged {
                opened.write_ages(&self.key, *slot, *chunk, ages)?;
                self.sums_dirty.store(true, Ordering::Relaxed);
            }
            if aged.len() < AGED {
                return Ok(());
            }
        }
    }
}

/// Splits a run of blocks at the ends of chunks: first block and blocks of each part.
fn chunks(first: u64, blocks: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = first + blocks;
    std::iter::successors(Some((first, 0)), move |(at, count)| {
        let at = at + count;
        (at < end).then(|| (at, (SLOT_BLOCKS - at % SLOT_BLOCKS).min(end - at)))
    })
    .skip(1)
}
