//! What an earlier worker left: taken over when it fits, dropped when its checksums say that it does not, kept when it
//! cannot be read.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Condvar, Mutex};

use super::files::{self, Named, named};
use super::index::{Index, Piece};
use super::open::Files;
use super::{DIR, Damaged, DiskCache, MIB, SourceKey, count};
use crate::format::cache::{CACHE_BLOCK, CacheHeader, SLOT_BLOCKS};
use crate::format::layout::STAGED_SUFFIX;
use crate::io::is_full;

/// Punched at once while nothing else of the source is written.
const GAPS: usize = 64;

/// What came of an attempt to load a source.
enum Loaded {
    Here,
    /// A checksum says so, or one of the two files is missing.
    Bad(String),
}

/// The first attempt to read the directory, which takes as long as the cache's disk does.
#[derive(Default)]
pub(super) struct FirstLoad {
    over: AtomicBool,
    waiting: Mutex<()>,
    ended: Condvar,
}

impl FirstLoad {
    /// Whether it has not ended.
    pub fn is_to_come(&self) -> bool {
        !self.over.load(Ordering::Acquire)
    }

    /// Waits for its end.
    pub fn wait(&self) {
        if self.is_to_come() {
            let mut waiting = self.waiting.lock();
            while self.is_to_come() {
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

    /// Waits until names and headers of what an earlier worker left are known, or cannot be read. That takes as long as
    /// the disk does.
    pub fn wait_for_load(&self) {
        self.shared.first_load.wait();
    }

    /// Reads the directory. When that fails the cache is empty and takes nothing, and it is tried again.
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
            // What is there can be read, and evicted, all the same.
            Err(e) if !is_full(&e) => return Err(e),
            _ => {}
        }
        let mut found: BTreeMap<SourceKey, BTreeSet<bool>> = BTreeMap::new();
        for name in &medium.list(DIR)? {
            match named(name) {
                Some(Named::Sums(key)) => found.entry(key).or_default().insert(true),
                Some(Named::Blocks(key)) => found.entry(key).or_default().insert(false),
                // One that was being written.
                None if name.ends_with(STAGED_SUFFIX) => medium.remove(&format!("{DIR}/{name}")).is_ok(),
                Some(Named::Inherited) | None => false,
            };
        }
        for (key, files) in found {
            if files.len() == 2 {
                self.load_again(&key);
            } else {
                // A crash between two steps, and nothing to speak of.
                self.drop_files(&key);
            }
        }
        Ok(())
    }

    /// Loads one source. What is bad goes; what cannot be read stays, and is tried again.
    fn load_again(&self, key: &SourceKey) {
        match self.load_source(key) {
            Ok(Loaded::Here) => {
                if self.shared.troubles.over(key) {
                    tracing::info!(%key, "cached blocks can be read again");
                }
            }
            Ok(Loaded::Bad(why)) if self.damaged == Damaged::Keep => {
                tracing::warn!(%key, why, "cached blocks cannot be used as they are");
                self.shared.troubles.note(*key, why.clone(), true, u64::MAX / 2);
                self.bad.lock().insert(*key, why);
            }
            Ok(Loaded::Bad(why)) => {
                tracing::warn!(%key, why, "cached blocks that cannot be used are dropped");
                self.drop_files(key);
            }
            Err(error) => {
                count(&self.shared.counters.read_errors, 1);
                self.shared.unloaded(key, &error);
            }
        }
    }

    /// Tries what could not be read before.
    pub(super) fn load_due(&self) {
        for key in self.shared.troubles.due(self.shared.health.ticks()) {
            self.load_again(&key);
        }
    }

    fn drop_files(&self, key: &SourceKey) {
        self.shared.troubles.over(key);
        if let Err(error) = files::remove(&*self.shared.medium, key) {
            count(&self.shared.counters.write_errors, 1);
            tracing::warn!(%key, %error, "and cannot be removed");
        }
        self.shared.names.store(true, Ordering::Relaxed);
    }

    fn load_source(&self, key: &SourceKey) -> io::Result<Loaded> {
        let files = Files::existing(*key, &self.shared.open);
        let opened = files.get()?;
        let decoded = match opened.header()? {
            Ok(decoded) => decoded,
            Err(error) => return Ok(Loaded::Bad(error.to_string())),
        };
        let header = &decoded.header;
        if header.key != key.0 {
            return Ok(Loaded::Bad("the header is of another source".into()));
        }
        if self.table.lock().get(key).is_some_and(|source| source.size() != header.size) {
            return Ok(Loaded::Bad(format!("they are of a source of {} bytes", header.size)));
        }
        let estimate = super::scan::estimate(opened.blocks.allocated()?, header.size);
        let source = self.source(*key, header.size);
        let direct = header.direct;
        source.take_over(decoded, Index::unread(files, direct, estimate));
        // Those that are read as a whole go first: reads of them wait for it.
        let mut queue = self.queue.lock();
        if direct {
            queue.push_back((source, 0));
        } else {
            queue.push_front((source, 0));
        }
        Ok(Loaded::Here)
    }

    /// Decides about the sources whose headers are damaged: those of `wanted`, each with its size, get a new header,
    /// behind which each block has to prove itself; the others go.
    pub fn settle_damaged(&self, wanted: &[(SourceKey, u64)]) {
        let bad = std::mem::take(&mut *self.bad.lock());
        for (key, why) in bad {
            let Some((_, size)) = wanted.iter().find(|(wanted, _)| *wanted == key) else {
                tracing::warn!(%key, why, "cached blocks that cannot be used are dropped");
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
                    self.shared.troubles.over(&key);
                    self.load_again(&key);
                }
                Err(error) => {
                    self.shared.unloaded(&key, &error);
                    self.bad.lock().insert(key, why);
                }
            }
        }
    }

    /// A worker that was killed, or a power cut, may have left bytes in the files that no sum speaks for. They take
    /// space that nobody counts, so they are punched out.
    pub(super) fn settle(&self) {
        for source in self.sources() {
            source.show_again();
            if !source.is_known() || !source.unsettled.swap(false, Ordering::Relaxed) {
                continue;
            }
            let cleared =
                source.clear_torn().inspect_err(|_| source.unsettled.store(true, Ordering::Relaxed));
            if let Err(error) = cleared.and_then(|()| source.punch_gaps()) {
                self.shared.write_failed("clearing what was left over", &error);
            }
        }
    }
}

impl super::CachedSource {
    /// Sums of no block go, of slots at the places of their chunks (D54).
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
            // Of one that is used the end of the source cuts the sums.
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
        // Filesystems count some of their own, and allocate ahead.
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
                debug_assert!(index.estimate().is_none(), "gaps are known only when all is");
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
        tracing::debug!(key = %self.key(), allocated, cached, "left-over bytes of the cache were punched out");
        Ok(())
    }
}
