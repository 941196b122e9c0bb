//! Runs of clusters or grains that are alike.

use super::{Extent, ImageError};

/// How many clusters one call looks at. With that, and with [`TABLES`], it comes to an end soon whatever the tables
/// say; a run that goes on is found by the next call.
const STEPS: usize = 1 << 14;

/// How many tables one call reads or looks up.
const TABLES: usize = 32;

/// One cluster, or part of one, or a gap, at a time.
pub(super) trait Step {
    /// What begins at `offset`, and for how many bytes for sure; at least one, maybe more than `left`.
    fn step(&mut self, offset: u64, left: u64) -> Result<(Extent, u64), ImageError>;

    /// How many tables were looked up so far.
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
        // What fails there fails when it is asked for.
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
