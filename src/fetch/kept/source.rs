//! The cached part of one source.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::{Condvar, Mutex};

use super::files::{self, Opened};
use super::index::{Class, Index, Piece};
use super::open::Files;
use super::seal::Frozen;
use super::{CACHE_BLOCK, DIR, DiskCache, EvictReason, Shared, SourceKey, count};
use crate::format::cache::{CacheHeader, DecodedHeader, SLOT_BLOCKS, block_sum};
use crate::sabotage::{Sabotage, sabotaged};

/// Blocks whose presence is looked up at once.
const LOOKED_UP: u64 = 64 * SLOT_BLOCKS;

/// What is cached of one source. All methods may be called from any thread, and wait for the local disk at most.
pub struct CachedSource {
    pub(super) key: SourceKey,
    size: u64,
    pub(super) shared: Arc<Shared>,
    pub(super) cache: Weak<DiskCache>,
    /// Held while the files are changed.
    pub(super) writer: Mutex<Writer>,
    /// Held for moments; no file is touched under it.
    pub(super) index: Mutex<Index>,
    /// With `index`: what had to be read as a whole is known.
    pub(super) ready: Condvar,
    pinned: AtomicBool,
    pub(super) verified: AtomicBool,
    /// Nothing comes in while this is not 0: what is here is being compared as a whole.
    pub(super) frozen: AtomicU64,
    /// Another source has its key now.
    detached: AtomicBool,
    /// Its files may have bytes that no sum speaks for.
    pub(super) unsettled: AtomicBool,
    pub(super) blocks_dirty: AtomicBool,
    pub(super) sums_dirty: AtomicBool,
    /// What an earlier worker left was not synced since.
    pub(super) inherited: AtomicBool,
    /// That, and a sync has failed: which of it is durable is not known.
    pub(super) doubtful: AtomicBool,
    /// What it is called when something is told of it.
    told_as: OnceLock<SourceKey>,
    /// [`Shared::uses`] when it was used last.
    pub(super) used_at: AtomicU64,
}

pub(super) struct Writer {
    header: CacheHeader,
    /// The file does not have this header.
    stale: bool,
    /// What the file says is durable. A killed worker may have taken "verified" back and not synced that.
    settled: bool,
}

impl Writer {
    pub(super) fn header(&self) -> &CacheHeader {
        &self.header
    }

    /// The header of the file that replaced the other one.
    pub(super) fn replace_header(&mut self, header: CacheHeader) {
        self.header = header;
        (self.stale, self.settled) = (false, true);
    }

    /// Whether the file does not have its header.
    pub(super) fn is_stale(&self) -> bool {
        self.stale
    }

    /// A sync failed: what the file has is not known. Writes one copy, so that it is dirty, and the next sync both.
    pub(super) fn write_again(&mut self, files: &Opened) -> io::Result<()> {
        self.stale = true;
        files.write_copy(&mut self.header)
    }

    /// Makes the file say durably what the header says.
    fn settle(&mut self, files: &Opened) -> io::Result<()> {
        if self.stale {
            files.write_header(&mut self.header)?;
        } else if !self.settled {
            files.sums.sync_data()?;
        }
        (self.stale, self.settled) = (false, true);
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
            writer: Mutex::new(Writer { header, stale: false, settled: true }),
            index: Mutex::default(),
            ready: Condvar::new(),
            pinned: AtomicBool::new(false),
            verified: AtomicBool::new(false),
            frozen: AtomicU64::new(0),
            detached: AtomicBool::new(false),
            unsettled: AtomicBool::new(false),
            blocks_dirty: AtomicBool::new(false),
            sums_dirty: AtomicBool::new(false),
            inherited: AtomicBool::new(false),
            doubtful: AtomicBool::new(false),
            told_as: OnceLock::new(),
            used_at: AtomicU64::new(0),
        }
    }

    /// What an earlier worker left of it.
    pub(super) fn take_over(&self, DecodedHeader { mut header, damaged }: DecodedHeader, mut index: Index) {
        let mut writer = self.writer.lock();
        // It may have been pinned while it could not be read.
        let newly = self.pinned.fetch_or(header.pinned, Ordering::Relaxed) && !header.pinned;
        header.pinned |= newly;
        // The copy that power tore is written again by the next sync (D54).
        let stale = newly || damaged.is_some();
        self.verified.store(header.verified, Ordering::Relaxed);
        self.unsettled.store(true, Ordering::Relaxed);
        // Who knows what a killed worker had synced.
        self.blocks_dirty.store(true, Ordering::Relaxed);
        self.sums_dirty.store(true, Ordering::Relaxed);
        self.inherited.store(true, Ordering::Relaxed);
        self.shared.names.store(true, Ordering::Relaxed);
        index.contents = header.contents.map(SourceKey);
        *writer = Writer { header, stale, settled: false };
        *self.index.lock() = index;
        self.shared.lineup();
        self.shared.used.fetch_add(self.cached_bytes(), Ordering::Relaxed);
    }

    /// Whose contents.
    pub fn key(&self) -> &SourceKey {
        &self.key
    }

    /// What it is called when something is told of it: its verified contents, or what its base calls it.
    pub(super) fn told_as(&self) -> SourceKey {
        self.contents().unwrap_or_else(|| self.told_as.get().copied().unwrap_or(self.key))
    }

    pub(super) fn tell_as(&self, key: SourceKey) {
        self.told_as.get_or_init(|| key);
    }

    /// It is not pinned any more, if it was.
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

    /// How many blocks from `first` on `len` bytes are; the last one may be short at the end of the source.
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

    /// Fills `buf` with whole cache blocks from number `first` on (the last block of the source may be short), as far as
    /// they are here without a gap; returns how many. What is behind them in `buf` is undefined.
    pub fn read(&self, first: u64, buf: &mut [u8]) -> usize {
        let wanted = self.blocks_in(first, buf.len());
        let sound = self.read_sound(first, wanted, buf, None);
        self.shared.looked_up(wanted, sound);
        sound as usize
    }

    /// As [`read`](Self::read), uncounted. With `contents` only what was compared with them is read.
    pub(super) fn read_sound(
        &self,
        first: u64,
        wanted: u64,
        buf: &mut [u8],
        contents: Option<SourceKey>,
    ) -> u64 {
        if !self.know(first, wanted) {
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
        // Without descriptors nothing is read now, and nothing is lost.
        let Some(files) = self.open(&files) else { return 0 };
        let buf = &mut buf[..self.bytes_of(first, run) as usize];
        // An error or too few bytes: the blocks are looked at one by one, because one bad sector is one bad block.
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

    /// As [`read_sound`](Self::read_sound), without waiting, and perhaps fewer of them; 0 when the first is not here.
    /// `None`: only `read_sound` can say.
    pub(super) fn read_sound_now(
        &self,
        first: u64,
        wanted: u64,
        buf: &mut [u8],
        contents: Option<SourceKey>,
    ) -> Option<u64> {
        if self.shared.first_load.is_to_come() {
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
        // Why the first does not match is looked at by who may wait.
        if done == 0 {
            return None;
        }
        let moved = self.index.lock().touch(first, done, self.shared.generation());
        self.shared.moved(moved * CACHE_BLOCK);
        self.note_use();
        Some(done)
    }

    pub(super) fn note_use(&self) {
        self.used_at.store(self.shared.uses.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    pub(super) fn matches(&self, block: u64, bytes: &[u8], sum: u64) -> bool {
        sum != 0 && (block_sum(&self.key.0, block, bytes) == sum || sabotaged(Sabotage::ChecksumIgnored))
    }

    /// Reads a block that did not match while nobody changes the files. What still does not match is damaged, and
    /// dropped (D30).
    fn read_again(&self, block: u64, bytes: &mut [u8], contents: Option<SourceKey>) -> bool {
        let mut writer = self.writer.lock();
        let (files, pieces) = {
            let index = self.index.lock();
            if contents.is_some() && index.contents != contents {
                return false;
            }
            match index.files.clone().filter(|_| index.contains(block)) {
                Some(files) => (files, index.pieces(block, 1)),
                // It was evicted meanwhile.
                None => return false,
            }
        };
        let Some(files) = self.open(&files) else { return false };
        let read = files.blocks.read_at(bytes, block * CACHE_BLOCK);
        let reason = match read.and_then(|got| Ok((got, files.read_sums(&pieces)?))) {
            Ok((got, sums)) if got == bytes.len() && self.matches(block, bytes, sums[0]) => return true,
            Ok(_) => {
                count(&self.shared.counters.corrupt_blocks, 1);
                tracing::debug!(key = %self.key, block, "a cached block does not match its sum");
                EvictReason::Corrupt
            }
            Err(error) => {
                count(&self.shared.counters.read_errors, 1);
                tracing::debug!(key = %self.key, block, %error, "a cached block cannot be read");
                if self.is_pinned() || error.raw_os_error() != Some(libc::EIO) {
                    // It may be the only copy, or a matter of moments.
                    self.hide(block);
                    return false;
                }
                EvictReason::ReadError
            }
        };
        let (blocks, gone) = self.drop_blocks(&mut writer, &files, &[(block, None)]);
        drop(writer);
        self.shared.went(&self.told_as(), blocks, gone, reason);
        false
    }

    /// The files, open. When they cannot be opened, nothing is here until they can, and nothing is lost.
    pub(super) fn open(&self, files: &Arc<Files>) -> Option<Arc<Opened>> {
        match files.get() {
            Ok(opened) => {
                self.shared.troubles.over(&self.key);
                Some(opened)
            }
            // Retired ones are no trouble, only late.
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                count(&self.shared.counters.read_errors, 1);
                self.shared.trouble(&self.key, &error);
                None
            }
        }
    }

    /// A block that cannot be read is not here until it is tried again.
    fn hide(&self, block: u64) {
        let bytes = self.bytes_of(block, 1);
        let mut index = self.index.lock();
        if index.hide(block, self.shared.health.ticks()) {
            self.discharge(&mut index, bytes);
        }
    }

    /// Blocks that could not be read are to be tried again; called at each tick.
    pub(super) fn show_again(&self) {
        let mut index = self.index.lock();
        let now = self.shared.health.ticks();
        for block in index.due(now) {
            let bytes = self.bytes_of(block, 1);
            self.charge(&mut index, bytes);
            index.show(block);
        }
    }

    /// Drops those of the blocks, which ascend, that are here and of the class given; returns how many, and how many
    /// bytes.
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
                // Used again since it was chosen.
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
        self.not_verified(writer, files);
        self.sums_dirty.store(true, Ordering::Relaxed);
        // The sums go first: a crash between leaves bytes that the next start punches, and no block that seems damaged.
        for (first, blocks, slot) in &runs {
            let piece = Piece { slot: *slot, at: first % SLOT_BLOCKS, blocks: *blocks };
            if let Err(error) = files.write_sums(&piece, &vec![0; *blocks as usize]) {
                self.shared.write_failed("writing the cache's sums", &error);
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
                self.unsettled.store(true, Ordering::Relaxed);
                self.shared.write_failed("giving back space of the cache", &error);
            }
        }
        (runs.iter().map(|run| run.1).sum(), bytes)
    }

    /// Before a block goes: a power cut must not leave the note without the block (D33).
    fn not_verified(&self, writer: &mut Writer, files: &Opened) {
        self.verified.store(false, Ordering::Relaxed);
        writer.stale |= std::mem::take(&mut writer.header.verified);
        // If this fails, nothing comes in until it has worked.
        if let Err(error) = writer.settle(files) {
            self.sync_failed(writer, files, Vec::new());
            self.shared.write_failed("writing a header of the cache", &error);
        }
    }

    /// Whether a block is here, as far as is known without reading it.
    pub fn contains(&self, block: u64) -> bool {
        self.know(block, 1) && self.index.lock().contains(block)
    }

    /// As [`contains`](Self::contains), without waiting. `None`: only `contains` can say.
    pub fn contains_now(&self, block: u64) -> Option<bool> {
        if self.shared.first_load.is_to_come() {
            return None;
        }
        let index = self.index.lock();
        let known = !index.knows_nothing() && index.unknown(block, 1, 1).is_none();
        known.then(|| index.contains(block))
    }

    /// How many of the `max` blocks from `first` on are not here, without a gap; the end of the source ends it.
    pub fn missing_run(&self, first: u64, max: u64) -> u64 {
        self.run(first, max, false)
    }

    /// How many blocks from `first` on are here, or are not. Looks up what is not known, as far as it goes.
    fn run(&self, first: u64, max: u64, present: bool) -> u64 {
        let max = max.min(self.blocks().saturating_sub(first));
        let mut done = 0;
        while done < max {
            let all = self.is_known();
            let part = if all { max - done } else { (max - done).min(LOOKED_UP) };
            if !all && !self.know(first + done, part) {
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

    /// How many of the `max` blocks from `first` on are here, without a gap.
    pub fn present_run(&self, first: u64, max: u64) -> u64 {
        self.run(first, max, true)
    }

    /// The first block at or after `from` that is here.
    pub fn next_present(&self, from: u64) -> Option<u64> {
        self.know(from, self.blocks().saturating_sub(from));
        self.index.lock().next_present(from)
    }

    /// The first block at or after `from` that is not here.
    pub fn next_missing(&self, from: u64) -> Option<u64> {
        let end = self.blocks();
        let at = from + self.present_run(from, end.saturating_sub(from));
        (at < end).then_some(at)
    }

    /// Bytes of it that are here.
    pub fn cached_bytes(&self) -> u64 {
        self.bytes_in(&self.index.lock())
    }

    /// Bytes that are here; an estimate as long as not all is known.
    pub(super) fn bytes_in(&self, index: &Index) -> u64 {
        if let Some(estimate) = index.estimate() {
            return estimate;
        }
        let last = self.blocks().saturating_sub(1);
        let short = if index.contains(last) { self.blocks() * CACHE_BLOCK - self.size } else { 0 };
        index.blocks() * CACHE_BLOCK - short
    }

    /// Whether all of it is here.
    pub fn is_complete(&self) -> bool {
        let index = self.index.lock();
        match index.estimate() {
            // What was verified was complete, and lost no block since.
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

    pub(super) fn is_pinned(&self) -> bool {
        self.pinned.load(Ordering::Relaxed)
    }

    /// The files, with a header that says no more than is so.
    pub(super) fn files_for_writing(&self, writer: &mut Writer) -> io::Result<Arc<Files>> {
        let files = self.index.lock().files.clone();
        let files = match files {
            Some(files) => files,
            None => {
                if self.shared.troubles.is_unloaded(&self.key) {
                    return Err(io::Error::other("what is cached of the source cannot be read now"));
                }
                writer.header.pinned = self.is_pinned();
                (writer.header.verified, writer.header.contents) = (false, None);
                let made = Opened::create(&*self.shared.medium, &mut writer.header)?;
                let files = Files::made(self.key, &self.shared.open, made);
                (writer.stale, writer.settled) = (false, true);
                self.shared.names.store(true, Ordering::Relaxed);
                self.index.lock().files = Some(files.clone());
                files
            }
        };
        if writer.stale || !writer.settled {
            let opened = files.get()?;
            writer.settle(&opened).inspect_err(|_| self.sync_failed(writer, &opened, Vec::new()))?;
        }
        Ok(files)
    }

    /// Drops all of it that is cached, pinned or not; returns how many bytes. It stays pinned when it is.
    pub fn evict(&self, reason: EvictReason) -> u64 {
        let bytes = self.empty(reason, self.is_pinned());
        self.shared.health.hope();
        bytes
    }

    /// Drops all of it, and its files.
    pub(super) fn reset(&self, reason: EvictReason) -> u64 {
        self.pinned.store(false, Ordering::Relaxed);
        self.empty(reason, false)
    }

    /// As `reset`; and nothing comes in any more.
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
            // A reader of these files for what was compared must not find in them what comes in later.
            let keep_files = keep_files && contents.is_none();
            let files = if keep_files { index.files.clone() } else { index.files.take() };
            (files, blocks, bytes, keep_files, contents)
        };
        self.ready.notify_all();
        self.shared.used.fetch_sub(bytes, Ordering::Relaxed);
        self.verified.store(false, Ordering::Relaxed);
        if contents.is_some() {
            self.shared.lineup();
        }
        let unread = self.shared.troubles.over(&self.key);
        if (files.is_some() || unread)
            && let Err(error) = self.drop_files(&mut writer, files, keep_files)
        {
            self.unsettled.store(true, Ordering::Relaxed);
            self.shared.write_failed("dropping cached blocks", &error);
        }
        drop(writer);
        self.shared.went(&contents.unwrap_or_else(|| self.told_as()), blocks, bytes, reason);
        bytes
    }

    fn drop_files(&self, writer: &mut Writer, files: Option<Arc<Files>>, keep_files: bool) -> io::Result<()> {
        let opened = files.as_ref().map(|files| files.get()).transpose();
        if let Ok(Some(opened)) = &opened {
            self.not_verified(writer, opened);
        }
        self.sums_dirty.store(true, Ordering::Relaxed);
        // Others may have them open, and space is wanted now.
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

    /// With `true` nothing of it is evicted to make room, now and after a restart, until it is `false` again.
    pub fn pin(&self, pinned: bool) {
        self.pinned.store(pinned, Ordering::Relaxed);
        if !pinned {
            self.shared.health.hope();
        }
        self.change_header(|header| header.pinned = pinned, pinned);
    }

    /// Notes durably that all of it was compared with the digest that the operator gave. It has to be complete; the
    /// note goes when a block goes.
    pub fn set_verified(&self, verified: bool) {
        if verified {
            // The note must not outlive a part of what it is about, nor stand beside an older file of the same name.
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

    /// Whether all of it is here and was compared with the operator's digest.
    pub fn is_verified(&self) -> bool {
        self.verified.load(Ordering::Relaxed) && self.is_complete()
    }

    /// Whether blocks may come in.
    pub(super) fn takes_blocks(&self) -> bool {
        self.frozen.load(Ordering::Relaxed) == 0 && self.index.lock().contents.is_none()
    }

    /// What all that is here was compared with.
    pub fn contents(&self) -> Option<SourceKey> {
        self.index.lock().contents
    }

    /// Nothing comes in as long as the result is kept, so that what is compared is what is here afterwards.
    pub fn freeze(self: &Arc<Self>) -> Frozen {
        // An insert that began before ends first.
        let _writer = self.writer.lock();
        self.frozen.fetch_add(1, Ordering::Relaxed);
        Frozen { source: self.clone() }
    }

    /// What an earlier version noted as verified, under the key of the digest.
    pub(super) fn believe(&self) {
        let mut writer = self.writer.lock();
        if writer.header.verified && writer.header.contents.is_none() {
            writer.header.contents = Some(self.key.0);
            self.index.lock().contents = Some(self.key);
            self.shared.lineup();
        }
    }

    /// Changes the header on disk too, when there is one or it is to be made; whether that was done.
    pub(super) fn change_header(&self, change: impl FnOnce(&mut CacheHeader), make: bool) -> bool {
        let mut writer = self.writer.lock();
        let old = writer.header.clone();
        change(&mut writer.header);
        let make = make && self.shared.loaded.load(Ordering::Acquire) && !self.is_detached();
        if (!make && !self.has_files()) || self.shared.troubles.is_unloaded(&self.key) {
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
