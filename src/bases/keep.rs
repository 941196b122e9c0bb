//! What the cache of this host keeps of bases: pin, evict, hydrate and verify.

use std::sync::Arc;

use super::Bases;
use super::origin::Delivery;
use super::servers::another;
use crate::fetch::kept::{Reach, SharedCopies};
use crate::format::record::{BaseRecord, ImageFile};
use crate::source::{SourceError, compare};
use crate::store::{BaseNode, StoreError};

/// The result of an eviction, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Evicted {
    /// Bytes that were dropped.
    pub dropped: u64,
    /// Bytes that stay, because another base with the same contents retains them.
    pub shared: u64,
}

/// Whether an eviction may drop the last copy of a base.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastCopy {
    /// It is refused.
    Keep,
    /// The operator accepts the loss.
    Drop,
}

/// The refusal of an eviction that would lose data.
fn last_copy(name: &str, source: &SourceError) -> StoreError {
    let why = format!("the copy in the store may be the last one ({source}); repeat with --force to drop it");
    StoreError::invalid(format!("base {name}"), why)
}

impl Bases {
    /// Asks the servers of a hydrated base, when its copy is complete, whether one of them still has the image.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` when no server has it.
    pub async fn ask_for_originals(&self, name: &str) -> Result<(), StoreError> {
        let base = self.store.base(name)?;
        let record = base.current();
        if !record.options.hydrate {
            return Ok(());
        }
        for file in record.files() {
            if file.is_local() {
                continue;
            }
            // An incomplete copy is of no use without the server.
            if !self.sources.contents(base.record(), file).is_complete(Reach::Proven) {
                continue;
            }
            let mut refusal = None;
            for url in record.urls_of(file) {
                let (object, urls) = (format!("base {name}"), std::slice::from_ref(&url));
                let delivery = Delivery::of(&file.identity.validator);
                let found = match self.probe(&object, urls, &record.options, delivery).await {
                    Ok(found) => found,
                    Err(StoreError::Source { source, .. }) => {
                        refusal = Some(last_copy(name, &source));
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                let Some(found) = found else { continue };
                match compare(&file.identity, &found.identity, record.options.strictness).difference() {
                    None => {
                        refusal = None;
                        break;
                    }
                    Some(why) => refusal = Some(last_copy(name, &another(&url, &why))),
                }
            }
            if let Some(refusal) = refusal {
                return Err(refusal);
            }
        }
        Ok(())
    }

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

    /// Drops what is kept of a base, and ends its hydration. For a base with servers,
    /// [`ask_for_originals`](Self::ask_for_originals) comes first.
    ///
    /// # Errors
    /// `NotFound`; of a hydrated file of this host, when the original is gone or changed: the copy is the last one.
    pub fn evict(&self, name: &str, last: LastCopy) -> Result<Evicted, StoreError> {
        let base = self.store.base(name)?;
        let hydrated = base.options().hydrate;
        if hydrated && last == LastCopy::Keep {
            for file in self.kept_files(&base).filter(|file| file.is_local()) {
                self.sources.original_of(file).map_err(|source| last_copy(name, &source))?;
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
