//! Which clusters of the disk an image has: found from extents, before any data is read.

use super::super::{Content, ExportError, Input};
use super::{CLUSTER, L2_ENTRIES};

/// Consecutive clusters of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub first: u64,
    /// The cluster behind the last one.
    pub end: u64,
    pub kind: Kind,
}

/// A kind of cluster that has an entry. All other clusters are left to the backing image, or are zeros without one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// The image has its bytes.
    Data,
    /// Zeros, which hide the backing image.
    Zero,
}

/// What a cluster has, by its extents.
#[derive(Clone, Copy, Default)]
struct Parts {
    data: bool,
    zero: bool,
    backing: bool,
}

impl Parts {
    fn add(&mut self, content: Content) {
        match content {
            Content::Data => self.data = true,
            Content::Zero => self.zero = true,
            Content::Backing => self.backing = true,
        }
    }

    fn kind(self, has_backing: bool) -> Option<Kind> {
        match self {
            Self { data: true, .. } => Some(Kind::Data),
            // A part is zero and a part shows through: the image has the whole cluster.
            Self { zero: true, backing: true, .. } => Some(Kind::Data),
            Self { zero: true, .. } if has_backing => Some(Kind::Zero),
            _ => None,
        }
    }
}

/// The runs of a disk, in order.
pub(super) fn of(input: &dyn Input, has_backing: bool) -> Result<Vec<Run>, ExportError> {
    let mut runs: Vec<Run> = Vec::new();
    let mut push = |first: u64, end: u64, parts: Parts| {
        let Some(kind) = parts.kind(has_backing) else { return };
        match runs.last_mut() {
            Some(last) if last.kind == kind && last.end == first => last.end = end,
            _ => runs.push(Run { first, end, kind }),
        }
    };
    // The cluster that the next extent may still add to.
    let (mut open, mut parts) = (0, Parts::default());
    let mut at = 0;
    while at < input.size() {
        let (content, end) = input.extent(at)?;
        let (first, last) = (at / CLUSTER, (end - 1) / CLUSTER);
        if first != open {
            push(open, open + 1, std::mem::take(&mut parts));
            open = first;
        }
        parts.add(content);
        if last > open {
            push(open, open + 1, std::mem::take(&mut parts));
            parts.add(content);
            push(first + 1, last, parts);
            open = last;
        }
        at = end;
    }
    if input.size() > 0 {
        push(open, open + 1, parts);
    }
    runs.retain(|run| run.first < run.end);
    Ok(runs)
}

/// Numbers of the L2 tables that runs need, in order.
pub(super) fn tables(runs: &[Run]) -> Vec<u64> {
    let mut tables: Vec<u64> = Vec::new();
    for run in runs {
        let first = run.first / L2_ENTRIES;
        let first = tables.last().map_or(first, |last| first.max(last + 1));
        tables.extend(first..=(run.end - 1) / L2_ENTRIES);
    }
    tables
}
