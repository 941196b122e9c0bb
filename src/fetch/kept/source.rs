//! The cached blocks of one source: state, queries, eviction, pins and headers. `read` and `insert` have the I/O of
//! blocks.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::{Condvar, Mutex};

use super::files::{self, Opened};
use super::index::{Class, Index, Piece};
use super::open::Files;
use super::seal::Frozen;
use super::{CACHE_BLOCK, DIR, DiskCache, EvictReason, Shared, SourceKey};
use crate::format::cache::{CacheHeader, DecodedHeader, SLOT_BLOCKS};
use crate::source::holdings::HeldRow;

/// Blocks that are looked up at a time.
const LOOKED_UP: u64 = 64 * SLOT_BLOCKS;

/// The cached blocks of one source. Any thread may call any method. A method waits for the local disk at most.
pub struct CachedSource {
    pub(super) key: SourceKey,
    size: u64,
    pub(super) shared: Arc<Shared>,
    pub(super) cache: Weak<DiskCache>,
    /// Held while the files are changed.
    pub(super) writer: Mutex<Writer>,
    /// Held briefly; no file I/O under it.
    pub(super) index: Mutex<Index>,
    /// With `index`: a file that must be read as a whole has been read.
    pub(super) ready: Condvar,
    pinned: AtomicBool,
    pub(super) verified: AtomicBool,
    /// Inserts are refused while this is not 0: the blocks are being compared as a whole.
    pub(super) frozen: AtomicU64,
    /// Another source has the key now.
    detached: AtomicBool,
    /// Its files may have bytes without a checksum.
    pub(super) stray_bytes: AtomicBool,
    pub(super) blocks_dirty: AtomicBool,
    pub(super) sums_dirty: AtomicBool,
    /// Blocks that an earlier worker left were not synced since.
    pub(super) inherited: AtomicBool,
    /// The same, and a sync has failed: it is unknown which of these blocks are durable.
    pub(super) doubtful: AtomicBool,
    /// The key under which the source's events are reported.
    reported_as: OnceLock<SourceKey>,
    /// [`Shared::uses`] when it was used last.
    pub(super) used_at: AtomicU64,
}

pub(super) struct Writer {
    header: CacheHeader,
    /// The file has another header.
    stale: bool,
    /// The header in the file is durable. A killed worker may have cleared "verified" without a sync.
    durable: bool,
}

impl Writer {
    pub(super) fn header(&self) -> &CacheHeader {
        &self.header
    }

    /// Sets the header of a file that replaced the earlier one.
    pub(super) fn replace_header(&mut self, header: CacheHeader) {
        self.header = header;
        (self.stale, self.durable) = (false, true);
    }

    /// Whether the file has another header.
    pub(super) fn is_stale(&self) -> bool {
        self.stale
    }

    /// After a failed sync, the contents of the file are unknown. Writes one copy of the header now, so that the page is
    /// dirty. The next sync writes both copies.
    pub(super) fn write_again(&mut self, files: &Opened) -> io::Result<()> {
        self.stale = true;
        files.write_copy(&mut self.header)
    }

    /// Writes the header if the file has another one, and makes it durable.
    fn make_durable(&mut self, files: &Opened) -> io::Result<()> {
        if self.stale {
            files.write_header(&mut self.header)?;
        } else if !self.durable {
            files.sums.sync_data()?;
        }
        (self.stale, self.durable) = (false, true);
        Ok(())
    }
}

impl CachedSource {
    pub(super) fn new(key: SourceKey, size: u64, shared: &Arc<Shared>, cache: Weak<DiskCache>) -> Self {
        let header = CacheHeader {
            sequence: 0,
            key: key.0,
            size,
            pinned: false,
            verified: false,
            contents: None,
            direct: true,
        };
        Self {
            key,
            size,
            shared: shared.clone(),
            cache,
            writer: Mutex::new(Writer { header, stale: false, durable: true }),
            index: Mutex::default(),
            ready: Condvar::new(),
            pinned: AtomicBool::new(false),
            verified: AtomicBool::new(false),
            frozen: AtomicU64::new(0),
            detached: AtomicBool::new(false),
            stray_bytes: AtomicBool::new(false),
            blocks_dirty: AtomicBool::new(false),
            sums_dirty: AtomicBool::new(false),
            inherited: AtomicBool::new(false),
            doubtful: AtomicBool::new(false),
            reported_as: OnceLock::new(),
            used_at: AtomicU64::new(0),
        }
    }

    /// Takes over the files that an earlier worker left.
    pub(super) fn take_over(&self, DecodedHeader { mut header, damaged }: DecodedHeader, mut index: Index) {
        let mut writer = self.writer.lock();
        // The source may have been pinned while its files could not be read.
        let newly = self.pinned.fetch_or(header.pinned, Ordering::Relaxed) && !header.pinned;
        header.pinned |= newly;
        // The next sync rewrites a header copy that a power cut tore (D54).
        let stale = newly || damaged.is_some();
        self.verified.store(header.verified, Ordering::Relaxed);
        self.stray_bytes.store(true, Ordering::Relaxed);
        // What a killed worker had synced is unknown.
        self.blocks_dirty.store(true, Ordering::Relaxed);
        self.sums_dirty.store(true, Ordering::Relaxed);
        self.inherited.store(true, Ordering::Relaxed);
        self.shared.names.store(true, Ordering::Relaxed);
        index.contents = header.contents.map(SourceKey);
        *writer = Writer { header, stale, durable: false };
        *self.index.lock() = index;
        self.shared.verified_changed();
        self.shared.used.fetch_add(self.cached_bytes(), Ordering::Relaxed);
    }

    /// When it was used last: a number that grows with each use of the cache.
    pub fn last_used(&self) -> u64 {
        self.used_at.load(Ordering::Relaxed)
    }

    /// The key of its contents.
    pub fn key(&self) -> &SourceKey {
        &self.key
    }

    /// The key under which its events are reported: that of its verified contents, or the one that its base uses.
    pub(super) fn reported_as(&self) -> SourceKey {
        self.contents().unwrap_or_else(|| self.reported_as.get().copied().unwrap_or(self.key))
    }

    pub(super) fn report_as(&self, key: SourceKey) {
        self.reported_as.get_or_init(|| key);
    }

    /// Removes the pin, if there is one.
    pub fn unpin(&self) {
        if self.is_pinned() {
            self.pin(false);
        }
    }

    /// Bytes of the source.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Cache blocks of the source; the last may be short.
    pub fn blocks(&self) -> u64 {
        self.size.div_ceil(CACHE_BLOCK)
    }

    /// Bytes of some of its blocks.
    pub(super) fn bytes_of(&self, first: u64, blocks: u64) -> u64 {
        ((first + blocks) * CACHE_BLOCK).min(self.size).saturating_sub(first * CACHE_BLOCK)
    }

    /// The number of blocks that `len` bytes from block `first` on fill; the last block of the source may be short.
    pub(super) fn blocks_in(&self, first: u64, len: usize) -> u64 {
        let len = len as u64;
        if first >= self.blocks() {
            0
        } else if len >= self.size - first * CACHE_BLOCK {
            self.blocks() - first
        } else {
            len / CACHE_BLOCK
        }
    }

    /// Drops the blocks of an ascending list that are present and, where a class is given, of that class. Returns the
    /// number of blocks and bytes dropped.
    pub(super) fn drop_blocks(
        &self,
        writer: &mut Writer,
        files: &Opened,
        victims: &[(u64, Option<Class>)],
    ) -> (u64, u64) {
        let mut runs: Vec<(u64, u64, u32)> = Vec::new();
        let mut bytes = 0;
        {
            let mut index = self.index.lock();
            for (block, class) in victims {
                // The block was used again since it was selected.
                if class.is_some() && index.class_of(*block) != *class {
                    continue;
                }
                let Some(slot) = index.clear(*block) else { continue };
                bytes += self.bytes_of(*block, 1);
                match runs.last_mut() {
                    Some((first, blocks, of)) if *of == slot && *first + *blocks == *block => *blocks += 1,
                    _ => runs.push((*block, 1, slot)),
                }
            }
            self.discharge(&mut index, bytes);
        }
        if runs.is_empty() {
            return (0, 0);
        }
        self.clear_verified(writer, files);
        self.sums_dirty.store(true, Ordering::Relaxed);
        // The sums go first. A crash in between then leaves bytes that the next start punches out, and no block that
        // seems damaged.
        for (first, blocks, slot) in &runs {
            let piece = Piece { slot: *slot, at: first % SLOT_BLOCKS, blocks: *blocks };
            if let Err(error) = files.write_sums(&piece, &vec![0; *blocks as usize]) {
                self.shared.write_failed("writing the cache's checksums", &error);
            }
        }
        let mut at = 0;
        while let Some((first, mut blocks, _)) = runs.get(at).copied() {
            at += 1;
            while let Some((_, more, _)) = runs.get(at).filter(|next| next.0 == first + blocks) {
                blocks += more;
                at += 1;
            }
            if let Err(error) = files.blocks.punch(first * CACHE_BLOCK, blocks * CACHE_BLOCK) {
                self.stray_bytes.store(true, Ordering::Relaxed);
                self.shared.write_failed("punching out evicted blocks of the cache", &error);
            }
        }
        (runs.iter().map(|run| run.1).sum(), bytes)
    }

    /// Clears "verified" durably before a block goes: a power cut must not leave the note without the block (D33).
    fn clear_verified(&self, writer: &mut Writer, files: &Opened) {
        self.verified.store(false, Ordering::Relaxed);
        writer.stale |= std::mem::take(&mut writer.header.verified);
        // If this fails, inserts are refused until it works.
        if let Err(error) = writer.make_durable(files) {
            self.sync_failed(writer, files, Vec::new());
            self.shared.write_failed("writing a header of the cache", &error);
        }
    }

    /// Whether a block is present, as far as the cache knows without reading it.
    pub fn contains(&self, block: u64) -> bool {
        self.look_up(block, 1) && self.index.lock().contains(block)
    }

    /// As [`contains`](Self::contains), but never waits. `None`: only `contains` can tell.
    pub fn contains_now(&self, block: u64) -> Option<bool> {
        if self.shared.first_load.is_pending() {
            return None;
        }
        let index = self.index.lock();
        let known = !index.knows_nothing() && index.unknown(block, 1, 1).is_none();
        known.then(|| index.contains(block))
    }

    /// Notes in `rows` which blocks are present, from row `first` on. Reads nothing: blocks that are not indexed yet are
    /// unknown. Holds the lock of readers for as many chunks as there are rows.
    pub(super) fn hold(&self, first: u64, rows: &mut [HeldRow]) {
        if self.shared.first_load.is_pending() {
            rows.iter_mut().for_each(|row| row.unknown = u64::MAX);
        } else if let Ok(first) = u32::try_from(first) {
            self.index.lock().hold(first, rows);
        }
    }

    /// The first row at or after `row` that may have a present block.
    pub(super) fn next_held(&self, row: u64) -> Option<u64> {
        if self.shared.first_load.is_pending() {
            return Some(row);
        }
        self.index.lock().next_chunk(u32::try_from(row).ok()?).map(u64::from)
    }

    /// The number of consecutive missing blocks from `first` on, at most `max`, up to the end of the source.
    pub fn missing_run(&self, first: u64, max: u64) -> u64 {
        self.run(first, max, false)
    }

    /// The number of consecutive blocks from `first` on that are present (or missing), at most `max`. Looks up blocks
    /// that are not indexed yet.
    fn run(&self, first: u64, max: u64, present: bool) -> u64 {
        let max = max.min(self.blocks().saturating_sub(first));
        let mut done = 0;
        while done < max {
            let all = self.is_known();
            let part = if all { max - done } else { (max - done).min(LOOKED_UP) };
            if !all && !self.look_up(first + done, part) {
                break;
            }
            let run = self.index.lock().run(first + done, part, present);
            done += run;
            if run < part {
                break;
            }
        }
        done
    }

    /// The number of consecutive present blocks from `first` on, at most `max`.
    pub fn present_run(&self, first: u64, max: u64) -> u64 {
        self.run(first, max, true)
    }

    /// The first present block at or after `from`.
    pub fn next_present(&self, from: u64) -> Option<u64> {
        self.look_up(from, self.blocks().saturating_sub(from));
        self.index.lock().next_present(from)
    }

    /// The first missing block at or after `from`.
    pub fn next_missing(&self, from: u64) -> Option<u64> {
        let end = self.blocks();
        let at = from + self.present_run(from, end.saturating_sub(from));
        (at < end).then_some(at)
    }

    /// Bytes of its present blocks.
    pub fn cached_bytes(&self) -> u64 {
        self.bytes_in(&self.index.lock())
    }

    /// Bytes of its present blocks; an estimate until the source is fully indexed.
    pub(super) fn bytes_in(&self, index: &Index) -> u64 {
        if let Some(estimate) = index.estimate() {
            return estimate;
        }
        let last = self.blocks().saturating_sub(1);
        let short = if index.contains(last) { self.blocks() * CACHE_BLOCK - self.size } else { 0 };
        index.blocks() * CACHE_BLOCK - short
    }

    /// Whether all blocks are present.
    pub fn is_complete(&self) -> bool {
        let index = self.index.lock();
        match index.estimate() {
            // A verified source was complete, and lost no block since.
            Some(_) => self.verified.load(Ordering::Relaxed),
            None => index.blocks() == self.blocks(),
        }
    }

    pub(super) fn has_files(&self) -> bool {
        self.index.lock().files.is_some()
    }

    pub(super) fn is_detached(&self) -> bool {
        self.detached.load(Ordering::Relaxed)
    }

    /// Whether the cache does not evict it to make room.
    pub fn is_pinned(&self) -> bool {
        self.pinned.load(Ordering::Relaxed)
    }

    /// The files, created if there are none, with a durable header that claims no more than is true.
    pub(super) fn files_for_writing(&self, writer: &mut Writer) -> io::Result<Arc<Files>> {
        let files = self.index.lock().files.clone();
        let files = match files {
            Some(files) => files,
            None => {
                if self.shared.unreadable.is_unloaded(&self.key) {
                    return Err(io::Error::other("the cached blocks of the source cannot be read now"));
                }
                writer.header.pinned = self.is_pinned();
                (writer.header.verified, writer.header.contents) = (false, None);
                let made = Opened::create(&*self.shared.medium, &mut writer.header)?;
                let files = Files::made(self.key, &self.shared.open, made);
                (writer.stale, writer.durable) = (false, true);
                self.shared.names.store(true, Ordering::Relaxed);
                self.index.lock().files = Some(files.clone());
                files
            }
        };
        if writer.stale || !writer.durable {
            let opened = files.get()?;
            writer.make_durable(&opened).inspect_err(|_| self.sync_failed(writer, &opened, Vec::new()))?;
        }
        Ok(files)
    }

    /// Drops all its blocks, even when it is pinned. Returns the bytes dropped. The pin stays.
    pub fn evict(&self, reason: EvictReason) -> u64 {
        let bytes = self.empty(reason, self.is_pinned());
        self.shared.health.retry_now();
        bytes
    }

    /// Drops all its blocks, its files and its pin.
    pub(super) fn reset(&self, reason: EvictReason) -> u64 {
        self.pinned.store(false, Ordering::Relaxed);
        self.empty(reason, false)
    }

    /// As `reset`, and refuses inserts from now on.
    pub(super) fn detach(&self, reason: EvictReason) -> u64 {
        self.detached.store(true, Ordering::Relaxed);
        self.reset(reason)
    }

    pub(super) fn empty(&self, reason: EvictReason, keep_files: bool) -> u64 {
        let mut writer = self.writer.lock();
        let (files, blocks, bytes, keep_files, contents) = {
            let mut index = self.index.lock();
            let bytes = self.bytes_in(&index);
            let contents = index.contents;
            let blocks = index.clear_all();
            // A reader that has these files open for their verified contents must not find later blocks in them.
            let keep_files = keep_files && contents.is_none();
            let files = if keep_files { index.files.clone() } else { index.files.take() };
            (files, blocks, bytes, keep_files, contents)
        };
        self.ready.notify_all();
        self.shared.used.fetch_sub(bytes, Ordering::Relaxed);
        self.verified.store(false, Ordering::Relaxed);
        if contents.is_some() {
            self.shared.verified_changed();
        }
        let unread = self.shared.unreadable.clear(&self.key);
        if (files.is_some() || unread)
            && let Err(error) = self.drop_files(&mut writer, files, keep_files)
        {
            self.stray_bytes.store(true, Ordering::Relaxed);
            self.shared.write_failed("dropping cached blocks", &error);
        }
        drop(writer);
        self.shared.report_evicted(&contents.unwrap_or_else(|| self.reported_as()), blocks, bytes, reason);
        bytes
    }

    fn drop_files(&self, writer: &mut Writer, files: Option<Arc<Files>>, keep_files: bool) -> io::Result<()> {
        let opened = files.as_ref().map(|files| files.get()).transpose();
        if let Ok(Some(opened)) = &opened {
            self.clear_verified(writer, opened);
        }
        self.sums_dirty.store(true, Ordering::Relaxed);
        // Readers may have the files open, and the space is needed now: truncate them.
        let cut = opened.and_then(|opened| {
            let Some(opened) = opened else { return Ok(()) };
            opened.sums.set_len(crate::format::cache::HEADER_AREA)?;
            opened.blocks.set_len(0)
        });
        if keep_files {
            return cut;
        }
        writer.header.contents = None;
        if let Some(files) = files {
            files.retire();
        }
        self.shared.names.store(true, Ordering::Relaxed);
        files::remove(&*self.shared.medium, &self.key).and(cut)
    }

    /// Pins or unpins the source. The cache does not evict a pinned source to make room, not even after a restart.
    pub fn pin(&self, pinned: bool) {
        self.pinned.store(pinned, Ordering::Relaxed);
        if !pinned {
            self.shared.health.retry_now();
        }
        self.change_header(|header| header.pinned = pinned, pinned);
    }

    /// Notes durably that all of it was compared with the operator's digest. The source must be complete. The note goes
    /// when a block goes.
    pub fn set_verified(&self, verified: bool) {
        if verified {
            // The note must not outlive any block that it is about, nor stand beside an older file of the same name.
            let durable = || self.sync().and_then(|()| self.shared.medium.sync_dir(DIR));
            if !self.is_complete() {
                return;
            }
            if let Err(error) = durable() {
                self.shared.write_failed("syncing the cache", &error);
                return;
            }
        }
        if self.change_header(|header| header.verified = verified, false) || !verified {
            self.verified.store(verified, Ordering::Relaxed);
        }
    }

    /// Whether all blocks are present and were compared with the operator's digest.
    pub fn is_verified(&self) -> bool {
        self.verified.load(Ordering::Relaxed) && self.is_complete()
    }

    /// Whether blocks may be inserted.
    pub(super) fn takes_blocks(&self) -> bool {
        self.frozen.load(Ordering::Relaxed) == 0 && self.index.lock().contents.is_none()
    }

    /// The digest key that all present blocks were compared with.
    pub fn contents(&self) -> Option<SourceKey> {
        self.index.lock().contents
    }

    /// Refuses inserts while the result is held, so that the blocks do not change while they are compared.
    pub fn freeze(self: &Arc<Self>) -> Frozen {
        // Waits for an insert under way.
        let _writer = self.writer.lock();
        self.frozen.fetch_add(1, Ordering::Relaxed);
        Frozen { source: self.clone() }
    }

    /// Takes over what an earlier version noted as verified under the key of the digest.
    pub(super) fn adopt_verified(&self) {
        let mut writer = self.writer.lock();
        if writer.header.verified && writer.header.contents.is_none() {
            writer.header.contents = Some(self.key.0);
            self.index.lock().contents = Some(self.key);
            self.shared.verified_changed();
        }
    }

    /// Changes the header in memory, and on disk when there is a file or `make` asks for one. Returns whether the header
    /// on disk was changed.
    pub(super) fn change_header(&self, change: impl FnOnce(&mut CacheHeader), make: bool) -> bool {
        let mut writer = self.writer.lock();
        let old = writer.header.clone();
        change(&mut writer.header);
        let make = make && self.shared.loaded.load(Ordering::Acquire) && !self.is_detached();
        if (!make && !self.has_files()) || self.shared.unreadable.is_unloaded(&self.key) {
            return false;
        }
        writer.stale |= writer.header != old;
        match self.files_for_writing(&mut writer) {
            Ok(_) => true,
            Err(error) => {
                self.shared.write_failed("writing a header of the cache", &error);
                false
            }
        }
    }
}
