//! What the cache of this host keeps of bases: pin, evict, hydrate and verify.

use std::sync::Arc;

use super::Bases;
use super::copies::{CopyView, dropping};
use super::origin::Delivery;
use super::servers::another;
use crate::fetch::kept::{Reach, SharedCopies};
use crate::format::record::{BaseOptions, BaseRecord, ImageFile, KeptCopies};
use crate::source::http::peer::is_peer;
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
            for url in record.urls_of(file).into_iter().filter(|url| !is_peer(url)) {
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

    /// Pins a base, or unpins it. Contents that another pinned base shares stay pinned. With `copies`, as many copies of
    /// its cached blocks are kept, one of them in the store and each other one in another pool; without, as many as
    /// before. A base that is not pinned has no further copies.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a number of copies that the store has not the pools for; errors of the storage when it
    /// writes the record.
    pub fn pin(&self, name: &str, pinned: bool, copies: Option<u8>) -> Result<Arc<BaseNode>, StoreError> {
        let base = self.store.base(name)?;
        if let Some(count) = copies {
            self.may_copy(name, pinned, count)?;
        }
        let number = match copies {
            Some(2..) if base.options().copies.is_none() => Some(self.store.new_number()?),
            _ => None,
        };
        let change = |options: &mut BaseOptions| {
            options.pinned = pinned;
            options.copies = match (copies, options.copies) {
                _ if !pinned => None,
                (None, had) => had,
                (Some(count @ 2..), Some(had)) => Some(KeptCopies { count, ..had }),
                (Some(count @ 2..), None) => number.map(|number| KeptCopies { count, number }),
                (Some(_), _) => None,
            };
        };
        let options = base.set_options(change)?;
        let started = self.keeper.open();
        started.map_err(StoreError::io(format!("base {name}"), "starting a thread"))?;
        let (pinned, others) = (options.retains(), self.others(&base));
        for file in self.kept_files(&base) {
            if pinned || self.sources.shares(base.record(), file, &others) == SharedCopies::Drop {
                self.sources.contents(base.record(), file).pin(pinned);
            }
        }
        Ok(base)
    }

    /// Whether a base may have so many copies.
    fn may_copy(&self, name: &str, pinned: bool, count: u8) -> Result<(), StoreError> {
        let invalid = |why: String| Err(StoreError::invalid(format!("base {name}"), why));
        if !(1..=KeptCopies::MOST).contains(&count) {
            return invalid(format!("{count} copies; give a number from 1 to {}", KeptCopies::MOST));
        }
        if count == 1 {
            return Ok(());
        }
        if !pinned {
            return invalid("only a pinned base has further copies; pin it".into());
        }
        if !self.sources.copies().is_on() {
            return invalid("this daemon keeps no fetched blocks; start it with --cache-disk SIZE".into());
        }
        let pools = self.store.pool_numbers().len() - 1;
        let needed = usize::from(count) - 1;
        if pools < needed {
            return invalid(format!(
                "{count} copies need {needed} pools besides the store, and it has {pools}; add a directory of another \
                 drive with: plyfs pool add NAME DIR"
            ));
        }
        Ok(())
    }

    /// Removes the copies in a pool that was taken off the list. A pool that does not answer keeps their files, which are
    /// copies of nothing then.
    pub fn leave_pool(&self, number: u64) {
        self.keeper.leave_soon(number);
    }

    /// The further copies that pools have of a base.
    pub fn copies(&self, base: &BaseNode) -> Vec<CopyView> {
        let Some(wanted) = base.options().copies else { return Vec::new() };
        let keys: Vec<_> = self.kept_files(base).map(|file| self.sources.of(base.record(), file)).collect();
        self.sources.copies().view(base.id(), &keys, wanted)
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
        let others = self.others(&base);
        let (dropped, noted) = dropping(&self.store, &self.sources, std::slice::from_ref(&base), || {
            self.sources.forget_in_transit(base.id());
            let mut dropped = 0;
            for file in &files {
                dropped += self.sources.evict(base.record(), file, &others);
                if hydrated && self.sources.shares(base.record(), file, &others) == SharedCopies::Drop {
                    self.sources.contents(base.record(), file).pin(options.pinned);
                }
            }
            dropped
        });
        noted?;
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
