//! Loads the files that an earlier worker left. A sound source is taken over. A source with a wrong checksum is dropped.
//! An unreadable source stays.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Condvar, Mutex};

use super::files::{self, FileKind, file_kind};
use super::index::{Index, Piece};
use super::open::Files;
use super::{DIR, DiskCache, MIB, OnDamage, SourceKey, count};
use crate::format::cache::{CACHE_BLOCK, CacheHeader, SLOT_BLOCKS};
use crate::format::layout::STAGED_SUFFIX;
use crate::io::is_full;

/// Gaps that are punched out under one hold of the writer's lock.
const GAPS: usize = 64;

/// The result of an attempt to load a source.
enum Loaded {
    Done,
    /// The files do not belong together, or a checksum is wrong; and how.
    Damaged(String),
}

/// The first attempt to read the directory, which takes as long as the cache's disk needs.
#[derive(Default)]
pub(super) struct FirstLoad {
    over: AtomicBool,
    waiting: Mutex<()>,
    ended: Condvar,
}

impl FirstLoad {
    /// Whether it has not ended.
    pub fn is_pending(&self) -> bool {
        !self.over.load(Ordering::Acquire)
    }

    /// Waits for its end.
    pub fn wait(&self) {
        if self.is_pending() {
            let mut waiting = self.waiting.lock();
            while self.is_pending() {
                self.ended.wait(&mut waiting);
            }
        }
    }

    fn end(&self) {
        let _waiting = self.waiting.lock();
        self.over.store(true, Ordering::Release);
        self.ended.notify_all();
    }
}

impl DiskCache {
    /// Reads the directory for the first time.
    pub(super) fn load_first(&self) {
        self.load();
        self.shared.first_load.end();
    }

    /// Waits until the cache has read all names and headers that an earlier worker left, or failed to read them. That
    /// takes as long as the disk needs.
    pub fn wait_for_load(&self) {
        self.shared.first_load.wait();
    }

    /// Reads the directory. When that fails, the cache is empty, takes no blocks, and tries again later.
    pub(super) fn load(&self) {
        match self.load_all() {
            Ok(()) => {
                self.shared.loaded.store(true, Ordering::Release);
                self.shared.worked();
            }
            Err(error) => self.shared.write_failed("reading the cache's directory", &error),
        }
    }

    fn load_all(&self) -> io::Result<()> {
        let medium = &*self.shared.medium;
        match medium.make_dir(DIR) {
            // On a full filesystem the existing files can be read and evicted all the same.
            Err(e) if !is_full(&e) => return Err(e),
            _ => {}
        }
        let mut found: BTreeMap<SourceKey, BTreeSet<bool>> = BTreeMap::new();
        for name in &medium.list(DIR)? {
            match file_kind(name) {
                Some(FileKind::Sums(key)) => found.entry(key).or_default().insert(true),
                Some(FileKind::Blocks(key)) => found.entry(key).or_default().insert(false),
                // A file that a killed worker was writing.
                None if name.ends_with(STAGED_SUFFIX) => medium.remove(&format!("{DIR}/{name}")).is_ok(),
                Some(FileKind::Inherited | FileKind::Proof(_)) | None => false,
            };
        }
        for (key, files) in found {
            if files.len() == 2 {
                self.load_again(&key);
            } else {
                // A crash between two steps left one of the two files.
                self.drop_files(&key);
            }
        }
        Ok(())
    }

    /// Loads one source. Damaged files are removed; unreadable files stay and are tried again.
    fn load_again(&self, key: &SourceKey) {
        match self.load_source(key) {
            Ok(Loaded::Done) => {
                if self.shared.unreadable.clear(key) {
                    tracing::info!(%key, "cached blocks can be read again");
                }
            }
            Ok(Loaded::Damaged(why)) if self.damaged == OnDamage::Keep => {
                tracing::warn!(%key, why, "cached blocks have a damaged header; plyfs keeps them until it knows whether a base needs them");
                self.shared.unreadable.note(*key, why.clone(), true, u64::MAX / 2);
                self.bad.lock().insert(*key, why);
            }
            Ok(Loaded::Damaged(why)) => {
                tracing::warn!(%key, why, "damaged cached blocks are dropped");
                self.drop_files(key);
            }
            Err(error) => {
                count(&self.shared.counters.read_errors, 1);
                self.shared.note_unloaded(key, &error);
            }
        }
    }

    /// Tries to load sources again that could not be read before.
    pub(super) fn load_due(&self) {
        for key in self.shared.unreadable.due(self.shared.health.ticks()) {
            self.load_again(&key);
        }
    }

    fn drop_files(&self, key: &SourceKey) {
        self.shared.unreadable.clear(key);
        if let Err(error) = files::remove(&*self.shared.medium, key) {
            count(&self.shared.counters.write_errors, 1);
            tracing::warn!(%key, %error, "the files of a cached source cannot be removed; plyfs tries again at the next start");
        }
        self.shared.names.store(true, Ordering::Relaxed);
    }

    fn load_source(&self, key: &SourceKey) -> io::Result<Loaded> {
        let files = Files::existing(*key, &self.shared.open);
        let opened = files.get()?;
        let decoded = match opened.header()? {
            Ok(decoded) => decoded,
            Err(error) => return Ok(Loaded::Damaged(error.to_string())),
        };
        let header = &decoded.header;
        if header.key != key.0 {
            return Ok(Loaded::Damaged("the header belongs to another source".into()));
        }
        if self.table.lock().get(key).is_some_and(|source| source.size() != header.size) {
            return Ok(Loaded::Damaged(format!("they belong to a source of {} bytes", header.size)));
        }
        let estimate = super::scan::estimate(opened.blocks.allocated()?, header.size);
        let source = self.source(*key, header.size);
        let direct = header.direct;
        source.take_over(decoded, Index::unread(files, direct, estimate));
        // Files that must be read as a whole come first, because reads of their sources wait for that.
        let mut queue = self.queue.lock();
        if direct {
            queue.push_back((source, 0));
        } else {
            queue.push_front((source, 0));
        }
        Ok(Loaded::Done)
    }

    /// Decides about the sources with damaged headers. The sources of `wanted`, given with their sizes, get a new header;
    /// the checksum of each block then shows whether the block is sound. The others are removed.
    pub fn settle_damaged(&self, wanted: &[(SourceKey, u64)]) {
        let bad = std::mem::take(&mut *self.bad.lock());
        for (key, why) in bad {
            let Some((_, size)) = wanted.iter().find(|(wanted, _)| *wanted == key) else {
                tracing::warn!(%key, why, "damaged cached blocks are dropped");
                self.drop_files(&key);
                continue;
            };
            let again = || -> io::Result<()> {
                let opened = Files::existing(key, &self.shared.open).get()?;
                let mut header = CacheHeader {
                    sequence: 0,
                    key: key.0,
                    size: *size,
                    pinned: true,
                    verified: false,
                    contents: None,
                    direct: false,
                };
                opened.write_header(&mut header)
            };
            match again() {
                Ok(()) => {
                    self.shared.unreadable.clear(&key);
                    self.load_again(&key);
                }
                Err(error) => {
                    self.shared.note_unloaded(&key, &error);
                    self.bad.lock().insert(key, why);
                }
            }
        }
    }

    /// Punches out bytes without a checksum, which a killed worker or a power cut may have left. They would take space
    /// that does not count towards the bound.
    pub(super) fn punch_stray_bytes(&self) {
        for source in self.sources() {
            source.show_again();
            if !source.is_known() || !source.stray_bytes.swap(false, Ordering::Relaxed) {
                continue;
            }
            let cleared =
                source.clear_torn().inspect_err(|_| source.stray_bytes.store(true, Ordering::Relaxed));
            if let Err(error) = cleared.and_then(|()| source.punch_gaps()) {
                self.shared.write_failed("punching out stray bytes of the cache", &error);
            }
        }
    }
}

impl super::CachedSource {
    /// Clears sums that belong to no block, in slots that lie at the places of their chunks (D54).
    fn clear_torn(&self) -> io::Result<()> {
        let _writer = self.writer.lock();
        let (torn, files) = {
            let index = self.index.lock();
            (index.torn().to_vec(), index.files.clone())
        };
        let Some(files) = files.filter(|_| !torn.is_empty()) else { return Ok(()) };
        let opened = match files.get() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        for slot in torn {
            let first = u64::from(slot) * SLOT_BLOCKS;
            let used = self.index.lock().slot(first).is_some();
            // A used slot has such sums only beyond the end of the source.
            let at = if used { (self.blocks() - first).min(SLOT_BLOCKS) } else { 0 };
            let piece = Piece { slot, at, blocks: SLOT_BLOCKS - at };
            opened.write_sums(&piece, &vec![0; piece.blocks as usize])?;
            self.sums_dirty.store(true, Ordering::Relaxed);
        }
        self.index.lock().forget_torn();
        Ok(())
    }

    fn punch_gaps(&self) -> io::Result<()> {
        let Some(files) = self.index.lock().files.clone() else { return Ok(()) };
        let opened = match files.get() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other?,
        };
        let (allocated, len) = (opened.blocks.allocated()?, opened.blocks.len()?);
        let cached = self.cached_bytes();
        // The filesystem counts metadata and preallocated space as well.
        if allocated <= cached + cached / 16 + MIB {
            return Ok(());
        }
        let (mut at, end) = (0, len.div_ceil(CACHE_BLOCK));
        while at < end {
            let _writer = self.writer.lock();
            let gaps: Vec<(u64, u64)> = {
                let index = self.index.lock();
                if !index.files.as_ref().is_some_and(|now| Arc::ptr_eq(now, &files)) || index.hides() {
                    return Ok(());
                }
                debug_assert!(
                    index.estimate().is_none(),
                    "gaps are known only when the source is fully indexed"
                );
                let mut from = at;
                std::iter::from_fn(|| {
                    let gap = index.next_gap(from, end)?;
                    from = gap.0 + gap.1;
                    Some(gap)
                })
                .take(GAPS)
                .collect()
            };
            for (first, blocks) in &gaps {
                opened.blocks.punch(first * CACHE_BLOCK, blocks * CACHE_BLOCK)?;
            }
            at = gaps.last().map_or(end, |(first, blocks)| first + blocks);
        }
        tracing::debug!(key = %self.key(), allocated, cached, "stray bytes of the cache were punched out");
        Ok(())
    }
}
