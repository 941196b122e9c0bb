//! What an earlier worker left: taken over when it fits, dropped when it does not.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::files::{Files, Named, named};
use super::index::Index;
use super::{DIR, DiskCache, MIB, SourceKey, count};
use crate::format::cache::CACHE_BLOCK;
use crate::io::is_full;

/// Punched at once while nothing else of the source is written.
const GAPS: usize = 64;

impl DiskCache {
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
        let mut keys = BTreeSet::new();
        let names = medium.list(DIR)?;
        for name in &names {
            if let Some(Named::Sums(key) | Named::Blocks(key)) = named(name) {
                keys.insert(key);
            }
        }
        for key in keys {
            if let Err(error) = self.load_source(&key) {
                // Sums that are gone are a crash between two steps, and nothing to speak of.
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(%key, %error, "cached blocks that cannot be used are dropped");
                }
                if let Err(error) = Files::remove(medium, &key) {
                    count(&self.shared.counters.write_errors, 1);
                    tracing::warn!(%key, %error, "and cannot be removed");
                }
                self.shared.names.store(true, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    fn load_source(&self, key: &SourceKey) -> io::Result<()> {
        let files = Files::open(&*self.shared.medium, key)?;
        let header = files.header()?.header;
        if header.key != key.0 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the header is of another source"));
        }
        let mut index = Index::default();
        let errors = files.load(&header, &mut index)?;
        count(&self.shared.counters.read_errors, errors);
        index.files = Some(Arc::new(files));
        let newest = index.newest();
        if self.table.lock().get(key).is_some_and(|source| source.size() != header.size) {
            let why = format!("they are of a source of {} bytes", header.size);
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        self.source(*key, header.size).take_over(header, index);
        self.shared.generation.fetch_max(newest + 1, Ordering::Relaxed);
        Ok(())
    }

    /// A worker that was killed, or a power cut, may have left bytes in the files that no sum speaks for. They take
    /// space that nobody counts, so they are punched out.
    pub(super) fn settle(&self) {
        for source in self.sources() {
            if !source.unsettled.swap(false, Ordering::Relaxed) {
                continue;
            }
            if let Err(error) = source.punch_gaps() {
                self.shared.write_failed("punching what was left over", &error);
            }
        }
    }
}

impl super::CachedSource {
    fn punch_gaps(&self) -> io::Result<()> {
        let Some(files) = self.index.lock().files.clone() else { return Ok(()) };
        let (allocated, len) = (files.blocks.allocated()?, files.blocks.len()?);
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
                if !index.files.as_ref().is_some_and(|now| Arc::ptr_eq(now, &files)) {
                    return Ok(());
                }
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
                files.blocks.punch(first * CACHE_BLOCK, blocks * CACHE_BLOCK)?;
            }
            at = gaps.last().map_or(end, |(first, blocks)| first + blocks);
        }
        tracing::debug!(key = %self.key(), allocated, cached, "left-over bytes of the cache were punched out");
        Ok(())
    }
}
