//! What lies below a disk's delta: deltas whose sealing is under way, the chain of sealed layers, and the base.
//!
//! None of it ever changes, so a read needs no lock (D5).

use std::sync::Arc;

use super::DiskError;
use crate::base::{Base, BaseError};
use crate::cache::Touch;
use crate::delta::survey::{PAGE_BYTES, PageWords};
use crate::delta::{Delta, Mapping};
use crate::format::BLOCK;
use crate::format::journal::{State, WORD_BLOCKS};
use crate::layers::{Chain, LayerFile, Part};
use crate::stats::{Origin, Origins};
use crate::trace::Tap;

/// See the module.
#[derive(Clone, Default)]
pub struct Below {
    /// Deltas whose sealing is under way, the highest first. They have no index yet.
    pub pending: Vec<Arc<Delta>>,
    /// The sealed layers.
    pub chain: Option<Arc<Chain>>,
    /// The base.
    pub base: Option<Arc<Base>>,
}

/// Where bytes are that fall through a delta.
enum Source<'a> {
    Zero,
    Pending(&'a Delta),
    Layer(&'a LayerFile),
    Base(&'a Base),
}

/// How a read uses the base.
pub(super) struct BaseUse<'a> {
    pub touch: Touch,
    /// Bytes to read ahead.
    pub readahead: u32,
    /// Is told of each read before its bytes are here.
    pub tap: Option<&'a Arc<Tap>>,
}

impl BaseUse<'_> {
    /// A trace has the order of the requests.
    fn note(&self, offset: u64, len: usize) {
        if let Some(tap) = self.tap {
            tap.note(offset, len as u64);
        }
    }
}

/// The result of a read that may have to wait for parts of the base.
#[derive(Default)]
pub(super) struct Progress {
    pub origins: Origins,
    /// All missing parts are requested together.
    pub missing: Option<BaseError>,
}

impl Below {
    /// A base without layers, or nothing.
    pub fn only(base: Option<Arc<Base>>) -> Self {
        Self { base, ..Self::default() }
    }

    /// Whether there are layers.
    pub fn has_layers(&self) -> bool {
        self.chain.is_some() || !self.pending.is_empty()
    }

    /// Where the bytes from `offset` on are that the deltas under way leave to what lies below them. Returns the source
    /// when one of them has the bytes.
    fn pending(&self, offset: u64, end: &mut u64) -> Option<Source<'_>> {
        for delta in &self.pending {
            let size = delta.size();
            if offset >= size {
                return Some(Source::Zero);
            }
            let (mapping, stop) = delta.extent(offset, (*end).min(size));
            *end = stop;
            match mapping {
                Mapping::Data => return Some(Source::Pending(delta)),
                Mapping::Zero => return Some(Source::Zero),
                Mapping::Base => {}
            }
        }
        None
    }

    fn lowest(&self) -> Source<'_> {
        self.base.as_deref().map_or(Source::Zero, Source::Base)
    }

    fn of_part<'a>(&'a self, part: Part<'a>) -> Source<'a> {
        match part {
            Part::Zero => Source::Zero,
            Part::Layer(file) => Source::Layer(file),
            Part::Below => self.lowest(),
        }
    }

    fn extent(&self, offset: u64, mut end: u64) -> Result<(Source<'_>, u64), DiskError> {
        if let Some(source) = self.pending(offset, &mut end) {
            return Ok((source, end));
        }
        match &self.chain {
            None => Ok((self.lowest(), end)),
            Some(chain) => {
                let (part, stop) = chain.extent(offset, end)?;
                Ok((self.of_part(part), stop))
            }
        }
    }

    fn extent_now(&self, offset: u64, mut end: u64) -> Option<(Source<'_>, u64)> {
        if let Some(source) = self.pending(offset, &mut end) {
            return Some((source, end));
        }
        match &self.chain {
            None => Some((self.lowest(), end)),
            Some(chain) => {
                let (part, stop) = chain.extent_now(offset, end)?;
                Some((self.of_part(part), stop))
            }
        }
    }

    /// Reads from memory only. False when a part would wait.
    pub(super) fn read_now(
        &self,
        offset: u64,
        buf: &mut [u8],
        by: &BaseUse<'_>,
        origins: &mut Origins,
    ) -> bool {
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let Some((source, stop)) = self.extent_now(at, end) else { return false };
            let part = &mut buf[(at - offset) as usize..(stop - offset) as usize];
            let len = part.len();
            let (done, origin) = match source {
                Source::Zero => {
                    part.fill(0);
                    (true, Origin::Zero)
                }
                Source::Pending(delta) => (delta.read_now(part, at), Origin::Delta),
                Source::Layer(file) => (file.read_now(part, at), Origin::Delta),
                Source::Base(base) => {
                    by.note(at, len);
                    (base.read_now(at, part, by.touch), Origin::Memory)
                }
            };
            if !done {
                return false;
            }
            origins.add(origin, len);
            at = stop;
        }
        true
    }

    /// Fills `buf` from `offset`, but for the parts of the base that must be fetched first: `progress` has those.
    pub(super) fn read(
        &self,
        offset: u64,
        buf: &mut [u8],
        by: &BaseUse<'_>,
        progress: &mut Progress,
    ) -> Result<(), DiskError> {
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let (source, stop) = self.extent(at, end)?;
            let part = &mut buf[(at - offset) as usize..(stop - offset) as usize];
            let len = part.len();
            match source {
                Source::Zero => {
                    part.fill(0);
                    progress.origins.add(Origin::Zero, len);
                }
                Source::Pending(delta) => {
                    delta.read(part, at)?;
                    progress.origins.add(Origin::Delta, len);
                }
                Source::Layer(file) => {
                    file.read(part, at)?;
                    progress.origins.add(Origin::Delta, len);
                }
                Source::Base(base) => {
                    by.note(at, len);
                    match base.read(at, part, by.touch, by.readahead) {
                        Ok(from) => progress.origins.join(from),
                        Err(error) => {
                            progress.missing = Some(BaseError::join(progress.missing.take(), error)?);
                        }
                    }
                }
            }
            at = stop;
        }
        Ok(())
    }

    /// The first data at or after `offset`, if there is any below `end`.
    pub(super) fn next_data(&self, offset: u64, end: u64) -> Result<Option<u64>, DiskError> {
        let mut at = offset;
        while at < end {
            let (source, stop) = self.extent(at, end)?;
            let found = match source {
                Source::Zero => None,
                Source::Pending(_) | Source::Layer(_) => Some(at),
                Source::Base(base) => base.next_data(at)?.filter(|at| *at < stop),
            };
            if found.is_some() {
                return Ok(found);
            }
            at = stop;
        }
        Ok(None)
    }

    /// The first hole at or after `offset`, if there is any below `end`.
    pub(super) fn next_hole(&self, offset: u64, end: u64) -> Result<Option<u64>, DiskError> {
        let mut at = offset;
        while at < end {
            let (source, stop) = self.extent(at, end)?;
            let found = match source {
                Source::Zero => Some(at),
                Source::Pending(_) | Source::Layer(_) => None,
                Source::Base(base) => Some(base.next_hole(at)?).filter(|at| *at < stop),
            };
            if found.is_some() {
                return Ok(found);
            }
            at = stop;
        }
        Ok(None)
    }

    /// Numbers of the pages of the map of which layers have something, in order, up to `end` bytes.
    pub(super) fn pages(&self, end: u64) -> Vec<u32> {
        let (mut pages, mut at) = (Vec::new(), 0);
        while at < end {
            let Ok((source, stop)) = self.extent(at, end) else { break };
            if !matches!(source, Source::Base(_)) {
                let from = (at / PAGE_BYTES) as u32;
                let from = pages.last().map_or(from, |last: &u32| from.max(last + 1));
                pages.extend(from..stop.div_ceil(PAGE_BYTES) as u32);
                // The rest of the last page needs no look.
                at = stop.next_multiple_of(PAGE_BYTES);
            } else {
                at = stop;
            }
        }
        pages
    }

    /// The states of the blocks of a page of the map that layers decide: `Unmapped` is left to the base. A layer that
    /// cannot be read leaves its blocks to the base.
    pub(super) fn page(&self, page: u32, words: &mut PageWords) {
        words.fill(0);
        let first = u64::from(page) * PAGE_BYTES;
        let (mut at, end) = (first, first + PAGE_BYTES);
        while self.has_layers() && at < end {
            let Ok((source, stop)) = self.extent(at, end) else { return };
            let state = match source {
                Source::Zero => State::Zero,
                Source::Pending(_) | Source::Layer(_) => State::Data,
                Source::Base(_) => State::Unmapped,
            };
            for block in (at - first) / BLOCK..(stop - first).div_ceil(BLOCK) {
                let shift = 2 * (block % WORD_BLOCKS);
                words[(block / WORD_BLOCKS) as usize] |= (state as u64) << shift;
            }
            at = stop;
        }
    }
}
