//! What is kept of bases on this host: pinning, evicting, hydrating and comparing them.

use std::sync::Arc;

use super::Bases;
use crate::fetch::kept::{Reach, SharedCopies};
use crate::format::record::{BaseRecord, ImageFile};
use crate::store::{BaseNode, StoreError};

/// What an eviction did, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evicted {
    /// That were dropped.
    pub dropped: u64,
    /// That stay, because another base has the same contents and wants them kept.
    pub shared: u64,
}

impl Bases {
    /// Its files that are kept block by block.
    pub fn kept_files<'a>(&self, base: &'a BaseNode) -> impl Iterator<Item = &'a ImageFile> + use<'a> {
        let hydrate = base.options().hydrate;
        base.record().files().filter(move |file| hydrate || !file.is_local())
    }

    /// Pins a base, or no longer. What another pinned base has too stays pinned.
    ///
    /// # Errors
    /// `NotFound`; what the storage says of noting it.
    pub fn pin(&self, name: &str, pinned: bool) -> Result<Arc<BaseNode>, StoreError> {
        let base = self.store.base(name)?;
        let options = base.set_options(|options| options.pinned = pinned)?;
        let (pinned, others) = (options.pinned || options.hydrate, self.others(&base));
        for file in self.kept_files(&base) {
            if pinned || self.sources.shares(base.record(), file, &others) == SharedCopies::Drop {
                self.sources.contents(base.record(), file).pin(pinned);
            }
        }
        Ok(base)
    }

    /// Drops what is kept of a base, and ends its hydration.
    ///
    /// # Errors
    /// `NotFound`; of a hydrated file of this host, when the original is gone or changed: the copy is the last one.
    pub fn evict(&self, name: &str) -> Result<Evicted, StoreError> {
        let base = self.store.base(name)?;
        let hydrated = base.options().hydrate;
        if hydrated {
            // What is dropped has to be found where it came from: of a server that is asked for, of a file now.
            for file in self.kept_files(&base).filter(|file| file.is_local()) {
                let wrap = |source| StoreError::Source { object: format!("base {name}"), source };
                self.sources.original_of(file).map_err(wrap)?;
            }
        }
        let files: Vec<_> = self.kept_files(&base).collect();
        // The wish goes first: whatever happens from here on, the next worker does not fetch it all again.
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
    /// `NotFound`; `Invalid` for a rate of 0, and when there is no room for it or nothing is kept on this host.
    pub fn hydrate(&self, name: &str, rate: Option<u64>) -> Result<Arc<BaseNode>, StoreError> {
        let base = self.store.base(name)?;
        let invalid = |why| Err(StoreError::invalid(format!("base {name}"), why));
        if rate == Some(0) {
            return invalid("rate: 0 bytes per second would never end; omit it");
        }
        if self.sources.cache().stats().limit_bytes == 0 {
            return invalid("nothing is kept on this host; start it with --cache-disk SIZE");
        }
        self.hydrations.hydrate(&base, rate)?;
        Ok(base)
    }

    /// Begins to compare what is here of a base with its digest.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` while it is being hydrated.
    pub fn verify(&self, name: &str) -> Result<Arc<BaseNode>, StoreError> {
        let base = self.store.base(name)?;
        self.hydrations.verify(&base)?;
        Ok(base)
    }

    /// All other bases, as they are now.
    pub(super) fn others(&self, base: &BaseNode) -> Vec<BaseRecord> {
        let bases = self.store.bases();
        let others = bases.iter().filter(|other| other.id() != base.id());
        others.map(|other| other.current()).collect()
    }
}
