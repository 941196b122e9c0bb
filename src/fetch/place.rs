//! A place with cached blocks of one file: the cache of this host, or a further copy on another drive.
//!
//! What must hold: each drive has its own time limit ([`TimedReads`]), so a drive that hangs delays no read that another
//! one answers. The cache is asked first; a further copy is asked only for blocks that the cache did not deliver, and its
//! bytes count like those of the cache (D101).

use std::sync::Arc;

use parking_lot::{Mutex, RwLock};

use super::FetchCache;
use super::late::LateBlocks;
use super::timed_reads::{TimedOut, TimedReads};

/// See the module.
pub struct Place {
    pub(super) keep: Arc<dyn FetchCache>,
    /// Those of its drive. All files share them.
    pub(super) timed_reads: Arc<TimedReads>,
    /// Blocks that it did not read in time.
    pub(super) late: Mutex<LateBlocks>,
}

impl Place {
    /// `timed_reads` are those of the drive that `keep` is on.
    pub fn new(keep: Arc<dyn FetchCache>, timed_reads: Arc<TimedReads>) -> Arc<Self> {
        Arc::new(Self { keep, timed_reads, late: Mutex::default() })
    }

    /// Whether it has a block. While its drive hangs, the answer is yes, so that plyfs fetches nothing on a guess.
    pub(super) fn contains(&self, block: u64) -> bool {
        let wait = || self.timed_reads.wait_for(&self.keep, move |keep| keep.contains(block)).unwrap_or(true);
        self.keep.contains_now(block).unwrap_or_else(wait)
    }

    /// Fills `buf` with its blocks, as [`FetchCache::read`] does, within the time limit.
    pub(super) fn read(&self, first: u64, buf: &mut [u8]) -> Result<usize, TimedOut> {
        if let Some(kept) = self.keep.read_now(first, buf) {
            return Ok(kept);
        }
        let len = buf.len();
        let (kept, bytes) = self.timed_reads.wait_for(&self.keep, move |keep| {
            let mut bytes = vec![0; len];
            (keep.read(first, &mut bytes), bytes)
        })?;
        buf.copy_from_slice(&bytes);
        Ok(kept)
    }
}

/// The further copies of a file, in the order in which they are asked. They may change while the file is read.
#[derive(Default)]
pub struct FurtherCopies(RwLock<Arc<[Arc<Place>]>>);

impl FurtherCopies {
    /// Replaces them. A read that runs may still read one of the former copies.
    pub fn set(&self, places: Vec<Arc<Place>>) {
        *self.0.write() = places.into();
    }

    pub(super) fn all(&self) -> Arc<[Arc<Place>]> {
        self.0.read().clone()
    }
}

/// Blocks of a place that did not answer in time.
pub(super) struct LateRange {
    pub place: Arc<Place>,
    pub first: u64,
    pub blocks: u64,
}
