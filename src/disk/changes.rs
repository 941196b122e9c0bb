//! What differs between two moments of one disk, found from the maps of layers.
//!
//! What must hold:
//! - No data is read. A layer never changes, so a byte that both moments have in the same layer is the same byte (D5).
//! - One call takes bounded time and memory, whatever the size, and holds no lock that a request needs: it looks at
//!   `MOST_STEPS` extents, and returns where the next call continues (D90).

use std::sync::Arc;

use super::below::Piece;
use super::{Below, Disk, DiskError};
use crate::delta::{Delta, Mapping};
use crate::mutant::limit;

/// The most extents that one call looks at.
const MOST_STEPS: u64 = 64 << 10;
/// The most bytes of one look. The map of a delta is searched for the end of a run, and layers may end the run earlier.
const LONGEST_LOOK: u64 = 4 << 30;

/// Where the bytes of a changed extent come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// A delta or a layer.
    Data,
    /// Nowhere: they read as zeros.
    Zero,
    /// The base: the earlier moment hid it here.
    Base,
}

/// A run of bytes that differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// What the later moment has there.
    pub content: Content,
}

/// A part of what differs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Runs in order. The last one may continue in the next part.
    pub list: Vec<Change>,
    /// Where the next part begins; `None`: this is the last one.
    pub next: Option<u64>,
    /// Bytes of the disk at the later moment.
    pub size: u64,
}

/// One moment of a disk.
pub struct View {
    delta: Option<Arc<Delta>>,
    below: Below,
    size: u64,
    /// Bytes from the start that fall through `delta`, when there is none.
    overlap: u64,
    base_size: u64,
}

impl View {
    /// The disk as it is while it is looked at. `base_size`: bytes of its base, 0 without one.
    pub fn now(disk: &Disk, base_size: u64) -> Self {
        let (delta, below) = (disk.delta().clone(), disk.below().clone());
        Self { size: delta.size(), overlap: delta.overlap(), delta: Some(delta), below, base_size }
    }

    /// A snapshot.
    pub fn frozen(below: Below, size: u64, overlap: u64, base_size: u64) -> Self {
        Self { delta: None, below, size, overlap, base_size }
    }

    /// The base itself, with zeros behind its end.
    pub fn base(base_size: u64) -> Self {
        Self { delta: None, below: Below::default(), size: u64::MAX, overlap: base_size, base_size }
    }

    /// Whether it stands on the layer with this number.
    pub fn stands_on(&self, layer: u64) -> bool {
        let is_sealed = |chain: &Arc<crate::layers::Chain>| chain.numbers().contains(&layer);
        let mut pending = self.below.pending.iter();
        pending.any(|delta| delta.number() == layer) || self.below.chain.as_ref().is_some_and(is_sealed)
    }

    /// Where the bytes from `offset` on are, and where that ends, at most `end`; `None` behind the end of the disk.
    fn look(&self, offset: u64, end: u64) -> Result<(Option<Piece>, u64), DiskError> {
        if offset >= self.size {
            return Ok((None, end));
        }
        let mut end = end.min(self.size);
        if let Some(delta) = &self.delta {
            let (mapping, stop) = delta.extent(offset, end);
            end = stop;
            match mapping {
                Mapping::Data => return Ok((Some(Piece::In(delta.number())), end)),
                Mapping::Zero => return Ok((Some(Piece::Zero), end)),
                Mapping::Base => {}
            }
        } else if offset >= self.overlap {
            return Ok((Some(Piece::Zero), end));
        } else {
            end = end.min(self.overlap);
        }
        let (piece, stop) = self.below.piece(offset, end)?;
        if piece != Piece::Lowest {
            return Ok((Some(piece), stop));
        }
        if offset >= self.base_size {
            return Ok((Some(Piece::Zero), stop));
        }
        Ok((Some(piece), stop.min(self.base_size)))
    }
}

/// What differs between two moments of one disk from byte `start` on: at most `most` runs. Bytes behind the end of the
/// earlier moment differ.
///
/// # Errors
/// When the index of a layer cannot be read.
pub fn between(since: &View, until: &View, start: u64, most: usize) -> Result<Changes, DiskError> {
    let size = until.size;
    let mut changes = Changes { size, ..Changes::default() };
    let (mut at, mut steps) = (start, 0);
    while at < size {
        let is_enough = changes.list.len() >= most.max(1) || steps >= limit(MOST_STEPS, 3);
        if is_enough {
            changes.next = Some(at);
            break;
        }
        steps += 1;
        let (now, stop) = until.look(at, size.min(at.saturating_add(LONGEST_LOOK)))?;
        let (then, stop) = since.look(at, stop)?;
        let content = match now {
            Some(Piece::In(_)) => Content::Data,
            Some(Piece::Lowest) => Content::Base,
            Some(Piece::Zero) | None => Content::Zero,
        };
        if now != then {
            match changes.list.last_mut() {
                Some(last) if last.content == content && last.offset + last.len == at => {
                    last.len += stop - at
                }
                _ => changes.list.push(Change { offset: at, len: stop - at, content }),
            }
        }
        at = stop;
    }
    Ok(changes)
}
