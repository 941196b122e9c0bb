//! A copy that copies nothing: a disk shows what lies below it.
//!
//! What must hold: only blocks that were never written fall through, and only in ranges that were copied. All other
//! blocks of the disk keep what they show (D81).

use std::sync::Arc;

use super::{Below, Disk, DiskError};
use crate::base::Base;
use crate::delta::{Edges, Mapping};
use crate::format::BLOCK;

/// What a disk stands on.
#[derive(Clone, Default)]
pub struct Ground {
    /// The base.
    pub base: Option<Arc<Base>>,
    /// Number of the highest sealed layer.
    pub layer: Option<u64>,
}

impl Ground {
    /// Of a disk; `None` while a sealing is under way.
    pub fn of(below: &Below) -> Option<Self> {
        let layer = below.chain.as_ref().map(|chain| chain.number());
        below.pending.is_empty().then(|| Self { base: below.base.clone(), layer })
    }

    /// Whether both are the same.
    pub fn is(&self, other: &Self) -> bool {
        let same_base = match (&self.base, &other.base) {
            (Some(base), Some(other)) => Arc::ptr_eq(base, other),
            (None, None) => true,
            _ => false,
        };
        same_base && self.layer == other.layer
    }
}

/// What became of the first part of a range that was to show what lies below.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shown {
    /// It shows what lies below, up to this offset.
    Shows(u64),
    /// It must be copied, up to this offset.
    Copy(u64),
    /// The disk stands on something else.
    Elsewhere,
}

impl Disk {
    /// Lets what lies below show from `from` on, up to `end`, where nothing was written. The disk grows to `end` if it is
    /// smaller. `ground` is what the caller knows to have the bytes.
    ///
    /// # Errors
    /// As [`Disk::write`].
    pub fn show(&self, (from, end): (u64, u64), ground: &Ground, epoch: u64) -> Result<Shown, DiskError> {
        self.check_epoch(epoch)?;
        if !Ground::of(&self.below).is_some_and(|now| now.is(ground)) {
            return Ok(Shown::Elsewhere);
        }
        // Another caller may move the overlap in between.
        for _ in 0..8 {
            let overlap = self.delta.overlap();
            let (mapping, stop) = self.delta.extent(from, end);
            if mapping == Mapping::Data {
                return Ok(Shown::Copy(stop));
            }
            if from < overlap {
                let shows = mapping == Mapping::Base;
                return Ok(if shows { Shown::Shows(stop) } else { Shown::Copy(stop) });
            }
            // The block with the old end has bytes of its own from here on.
            let border = overlap.next_multiple_of(BLOCK);
            if from < border {
                return Ok(Shown::Copy(end.min(border)));
            }
            if overlap < border {
                let head = Some(self.block_below(overlap / BLOCK)?);
                let edges = Edges { head, ..Edges::default() };
                self.change_with(|delta| delta.own_block(overlap / BLOCK, &edges))?;
            }
            if !from.is_multiple_of(BLOCK) {
                return Ok(Shown::Copy(end.min(from.next_multiple_of(BLOCK))));
            }
            let hide = match self.below.next_data(border, from) {
                // Hiding what has no data is wrong for no reader.
                Err(error) if error.completion().is_some() => true,
                found => found?.is_some(),
            };
            self.change_with(|delta| delta.show_below(overlap, (from, stop), hide))?;
        }
        Ok(Shown::Copy(end.min((from + 1).next_multiple_of(BLOCK))))
    }
}
