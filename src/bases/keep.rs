//! What the cache of this host keeps of bases: pin, evict, hydrate and verify.

use std::sync::Arc;

use super::Bases;
use crate::fetch::kept::{Reach, SharedCopies};
use crate::format::record::{BaseRecord, ImageFile};
use crate::store::{BaseNode, StoreError};

/// The result of an eviction, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evicted {
    /// Bytes that were dropped.
    pub dropped: u64,
    /// Bytes that stay, because another base with the same contents retains them.
    pub shared: u64,
}

impl Bases {
    /// The files of a base that are read through the cache of fetched blocks.
    pub fn kept_files<'a>(&self, base: &'a BaseNode) -> impl Iterator<Item = &'a ImageFile> + use<'a> {
        let options = base.options();
        base.record().files().filter(move |file| options.keeps(file))
    }

    /// Pins a base, or unpins it. Contents that another pinned base shares stay pinned.
    ///
    /// # Errors
    /// `NotFound`; errors of the storage when it writes the record.
    pub fn pin(&self, name: &str, pinned: bool) -> Result<Arc<BaseNode>, StoreError> {
        let base = self.store.base(name)?;
        let options = base.set_options(|options| options.pinned = pinned)?;
        let (pinned, others) = (options.retains(), self.others(&base));
        for file in self.kept_files(&base) {
            if pinned || self.sources.shares(base.record(), file, &others) == SharedCopies::Drop {
                self.sources.contents(base.record(), file).pin(pinned);
            }
        }
        Ok(base)
    }

    /// Drops what the cache has of a base, and ends its hydration.
    ///
    /// # Errors
    /// `NotFound`; `Source` for a hydrated file of this host whose original is gone or changed: the copy is the last
    /// one.
    pub fn evict(&self, name: &str) -> Result<Evicted, StoreError> {
        let base = self.store.base(name)?;
        let hydrated = base.options().hydrate;
        if hydrated {
            // Dropped bytes must come from the source again. A file is checked now; a server is not asked.
            for file in self.kept_files(&base).filter(|file| file.is_local()) {
                let wrap = |source| StoreError::Source { object: format!("base {name}"), source };
                self.sources.original_of(file).map_err(wrap)?;
            }
        }
        let files: Vec<_> = self.kept_files(&base).collect();
        // The record changes first: after a crash from here on, the next worker does not hydrate it again.
        let options = base.set_options(|options| options.hydrate = false)?;
        self.hydrations.cancel(base.id(), "the base was evicted");
        self.sources.forget_in_transit(base.id());
        let others = self.others(&base);
        let mut dropped = 0;
        for file in &files {
            dropped += self.sources.evict(base.record(), file, &others);
            if hydrated && self.sources.shares(base.record(), file, &others) == SharedCopies::Drop {
                self.sources.contents(base.record(), file).pin(options.pinned);
            }
        }
        if hydrated {
            base.detach();
        }
        let left = |file| self.sources.contents(base.record(), file).cached_bytes(Reach::Proven);
        let shared = files.into_iter().map(left).sum();
        Ok(Evicted { dropped, shared })
    }

    /// Begins to fetch all of a base, at most `rate` bytes per second.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a rate of 0, and when the cache has no room for it or is off.
    pub fn hydrate(&self, name: &str, rate: Option<u64>) -> Result<Arc<BaseNode>, StoreError> {
        let base = self.store.base(name)?;
        let invalid = |why| Err(StoreError::invalid(format!("base {name}"), why));
        if rate == Some(0) {
            return invalid("rate: 0 bytes per second would never end; omit it");
        }
        if self.sources.cache().stats().limit_bytes == 0 {
            return invalid("this daemon keeps no fetched blocks; start it with --cache-disk SIZE");
        }
        self.hydrations.hydrate(&base, rate)?;
        Ok(base)
    }

    /// Begins to compare the cached contents of a base with its digest.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` while it is being hydrated.
    pub fn verify(&self, name: &str) -> Result<Arc<BaseNode>, StoreError> {
        let base = self.store.base(name)?;
        self.hydrations.verify(&base)?;
        Ok(base)
    }

    /// The current records of all other bases.
    pub(super) fn others(&self, base: &BaseNode) -> Vec<BaseRecord> {
        let bases = self.store.bases();
        let others = bases.iter().filter(|other| other.id() != base.id());
        others.map(|other| other.current()).collect()
    }
}
