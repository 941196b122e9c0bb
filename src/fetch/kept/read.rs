//! Reads of cached blocks. Every block is compared with its checksum.
//!
//! What must hold: a block that does not match was never here (D30). A block that cannot be read is not damaged: it is
//! hidden and tried again later (D50).

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::files::Opened;
use super::open::Files;
use super::source::CachedSource;
use super::{CACHE_BLOCK, EvictReason, SourceKey, count};
use crate::format::cache::block_sum;
use crate::mutant::Mutant;

impl CachedSource {
    /// Fills `buf` with whole blocks from block `first` on, up to the first block that is missing. The last block of the
    /// source may be short. Returns the number of blocks; the rest of `buf` is undefined.
    pub fn read(&self, first: u64, buf: &mut [u8]) -> usize {
        let wanted = self.blocks_in(first, buf.len());
        let sound = self.read_sound(first, wanted, buf, None);
        self.shared.looked_up(wanted, sound);
        sound as usize
    }

    /// As [`read`](Self::read), without the counters. With `contents`, reads only blocks that were compared with them.
    pub(super) fn read_sound(
        &self,
        first: u64,
        wanted: u64,
        buf: &mut [u8],
        contents: Option<SourceKey>,
    ) -> u64 {
        if !self.look_up(first, wanted) {
            return 0;
        }
        let (files, pieces, run, moved) = {
            let mut index = self.index.lock();
            if contents.is_some() && index.contents != contents {
                return 0;
            }
            let run = index.run(first, wanted, true);
            let Some(files) = index.files.clone().filter(|_| run > 0) else { return 0 };
            let moved = index.touch(first, run, self.shared.generation());
            (files, index.pieces(first, run), run, moved)
        };
        self.shared.moved(moved * CACHE_BLOCK);
        self.note_use();
        // Without descriptors nothing can be read now, but nothing is lost.
        let Some(files) = self.open(&files) else { return 0 };
        let buf = &mut buf[..self.bytes_of(first, run) as usize];
        // After an error or a short read, each block is read alone, because one bad sector damages one block.
        let got = files.blocks.read_at(buf, first * CACHE_BLOCK).unwrap_or(0);
        let sums = files.read_sums(&pieces).unwrap_or_default();
        for (at, bytes) in buf.chunks_mut(CACHE_BLOCK as usize).enumerate() {
            let block = first + at as u64;
            let whole = at * CACHE_BLOCK as usize + bytes.len() <= got;
            let sound = whole && sums.get(at).is_some_and(|sum| self.matches(block, bytes, *sum));
            if !sound && !self.read_again(block, bytes, contents) {
                return at as u64;
            }
        }
        run
    }

    /// As [`read_sound`](Self::read_sound), up to the first block that is damaged or cannot be read, which stays as it
    /// is. It counts nothing and notes no use.
    pub(super) fn lend(&self, first: u64, wanted: u64, buf: &mut [u8], contents: Option<SourceKey>) -> u64 {
        if !self.look_up(first, wanted) {
            return 0;
        }
        let (files, pieces, run) = {
            let index = self.index.lock();
            if contents.is_some() && index.contents != contents {
                return 0;
            }
            let run = index.run(first, wanted, true);
            let Some(files) = index.files.clone().filter(|_| run > 0) else { return 0 };
            (files, index.pieces(first, run), run)
        };
        let Some(files) = self.open(&files) else { return 0 };
        let buf = &mut buf[..self.bytes_of(first, run) as usize];
        let got = files.blocks.read_at(buf, first * CACHE_BLOCK).unwrap_or(0);
        let sums = files.read_sums(&pieces).unwrap_or_default();
        let whole = buf[..got].chunks(CACHE_BLOCK as usize).zip(sums).enumerate();
        let sound = |(at, (bytes, sum)): &(usize, (&[u8], u64))| {
            let block = first + *at as u64;
            bytes.len() as u64 == self.bytes_of(block, 1) && self.matches(block, bytes, *sum)
        };
        whole.take_while(sound).count() as u64
    }

    /// Fills `buf` with one block, all of which fits, if it is here and sound. It counts nothing and notes no use. May wait
    /// for the disk.
    pub fn lend_block(&self, block: u64, buf: &mut [u8]) -> bool {
        block < self.blocks()
            && self.bytes_of(block, 1) == buf.len() as u64
            && self.lend(block, 1, buf, None) == 1
    }

    /// As [`read_sound`](Self::read_sound), but never waits and may return fewer blocks; 0 when the first is missing.
    /// `None`: only `read_sound` can tell.
    pub(super) fn read_sound_now(
        &self,
        first: u64,
        wanted: u64,
        buf: &mut [u8],
        contents: Option<SourceKey>,
    ) -> Option<u64> {
        if self.shared.first_load.is_pending() {
            return None;
        }
        let (files, pieces, run) = {
            let index = self.index.lock();
            if contents.is_some() && index.contents != contents {
                return Some(0);
            }
            if index.knows_nothing() || index.unknown(first, wanted, 1).is_some() {
                return None;
            }
            let run = index.run(first, wanted, true);
            let Some(files) = index.files.clone().filter(|_| run > 0) else { return Some(0) };
            (files, index.pieces(first, run), run)
        };
        let files = files.get_now()?;
        let buf = &mut buf[..self.bytes_of(first, run) as usize];
        let got = files.read_blocks_now(buf, first * CACHE_BLOCK)?;
        let sums = files.read_sums_now(&pieces)?;
        let mut done = 0;
        let mut end = 0;
        for (bytes, sum) in buf.chunks(CACHE_BLOCK as usize).zip(sums) {
            end += bytes.len();
            if end > got || !self.matches(first + done, bytes, sum) {
                break;
            }
            done += 1;
        }
        // The first block does not match: `read_sound`, which may wait, finds out why.
        if done == 0 {
            return None;
        }
        let moved = self.index.lock().touch(first, done, self.shared.generation());
        self.shared.moved(moved * CACHE_BLOCK);
        self.note_use();
        Some(done)
    }

    /// Notes the use for the bound on the number of sources.
    pub(super) fn note_use(&self) {
        self.used_at.store(self.shared.uses.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    pub(super) fn matches(&self, block: u64, bytes: &[u8], sum: u64) -> bool {
        sum != 0 && (block_sum(&self.key.0, block, bytes) == sum || Mutant::ChecksumIgnored.is_active())
    }

    /// Reads a block that did not match once more, under the lock against changes of the files. A block that still does
    /// not match is damaged, and is dropped (D30).
    fn read_again(&self, block: u64, bytes: &mut [u8], contents: Option<SourceKey>) -> bool {
        let mut writer = self.writer.lock();
        let (files, pieces) = {
            let index = self.index.lock();
            if contents.is_some() && index.contents != contents {
                return false;
            }
            match index.files.clone().filter(|_| index.contains(block)) {
                Some(files) => (files, index.pieces(block, 1)),
                // The block was evicted meanwhile.
                None => return false,
            }
        };
        let Some(files) = self.open(&files) else { return false };
        let read = files.blocks.read_at(bytes, block * CACHE_BLOCK);
        let reason = match read.and_then(|got| Ok((got, files.read_sums(&pieces)?))) {
            Ok((got, sums)) if got == bytes.len() && self.matches(block, bytes, sums[0]) => return true,
            Ok(_) => {
                count(&self.shared.counters.corrupt_blocks, 1);
                tracing::debug!(key = %self.key, block, "a cached block does not match its checksum");
                EvictReason::Corrupt
            }
            Err(error) => {
                count(&self.shared.counters.read_errors, 1);
                tracing::debug!(key = %self.key, block, %error, "a cached block cannot be read");
                if self.is_pinned() || error.raw_os_error() != Some(libc::EIO) {
                    // The block may be the only copy, or the error may be temporary.
                    self.hide(block);
                    return false;
                }
                EvictReason::ReadError
            }
        };
        let (blocks, gone) = self.drop_blocks(&mut writer, &files, &[(block, None)]);
        drop(writer);
        self.shared.report_evicted(&self.reported_as(), blocks, gone, reason);
        false
    }

    /// Opens the files. When that fails, all blocks count as missing until it works; nothing is lost.
    pub(super) fn open(&self, files: &Arc<Files>) -> Option<Arc<Opened>> {
        match files.get() {
            Ok(opened) => {
                self.shared.unreadable.clear(&self.key);
                Some(opened)
            }
            // The files were removed meanwhile, which is no error.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                count(&self.shared.counters.read_errors, 1);
                self.shared.note_unreadable(&self.key, &error);
                None
            }
        }
    }

    /// Treats a block that cannot be read as missing until it is tried again.
    fn hide(&self, block: u64) {
        let bytes = self.bytes_of(block, 1);
        let mut index = self.index.lock();
        if index.hide(block, self.shared.health.ticks()) {
            self.discharge(&mut index, bytes);
        }
    }

    /// Lets readers try hidden blocks again whose time has come; called at each tick.
    pub(super) fn show_again(&self) {
        let mut index = self.index.lock();
        let now = self.shared.health.ticks();
        for block in index.due(now) {
            let bytes = self.bytes_of(block, 1);
            self.charge(&mut index, bytes);
            index.show(block);
        }
    }
}
