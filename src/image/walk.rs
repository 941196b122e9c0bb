//! Merges neighbouring clusters or grains with the same mapping into one extent.

use super::{Extent, ImageError};

/// The most clusters that one call visits. With [`TABLES`], it bounds the time of a call, whatever the tables say. The
/// next call finds the rest of a longer run.
const STEPS: usize = 1 << 14;

/// The most tables that one call reads or looks up.
const TABLES: usize = 32;

/// Visits one cluster, a part of one, or a gap at a time.
pub(super) trait Step {
    /// The mapping at `offset`, and for how many bytes it certainly holds; at least one, maybe more than `left`.
    fn step(&mut self, offset: u64, left: u64) -> Result<(Extent, u64), ImageError>;

    /// The number of tables looked up so far.
    fn tables(&self) -> usize;
}

/// As [`super::Image::extent`], for an image of `size` bytes.
pub(super) fn extent(
    step: &mut impl Step,
    size: u64,
    offset: u64,
    len: u64,
) -> Result<(Extent, u64), ImageError> {
    let len = match size.checked_sub(offset) {
        None | Some(0) => return Ok((Extent::Zero, len)),
        Some(left) => len.min(left),
    };
    if len == 0 {
        return Ok((Extent::Zero, 0));
    }
    let (first, mut run) = step.step(offset, len)?;
    let mut steps = 0;
    while run < len && steps < STEPS && step.tables() < TABLES {
        steps += 1;
        // An error behind the first step is returned when that offset is requested.
        let Ok((next, more)) = step.step(offset + run, len - run) else { break };
        let goes_on = match (first, next) {
            (Extent::Zero, Extent::Zero) | (Extent::Below, Extent::Below) => true,
            (Extent::Plain { at }, Extent::Plain { at: next }) => at + run == next,
            _ => false,
        };
        if !goes_on {
            break;
        }
        run += more;
    }
    Ok((first, run.min(len)))
}
