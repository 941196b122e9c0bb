//! qcow2, version 3, with clusters of 64 KiB (the format: docs/interop/qcow2.txt of QEMU).
//!
//! Without compression the place of every cluster follows from the extents, so the file is written in one pass from its
//! beginning, to a pipe as well: header, refcounts, tables, data. With compression the sizes are known at the end only:
//! clusters and tables are written as they come, and the header last.

mod header;
mod packed;
mod runs;
mod stream;

pub use header::Backing;
pub use packed::{Compression, write_compressed};
pub use stream::write;

use super::ExportError;

/// Bytes of a cluster.
pub const CLUSTER: u64 = 64 << 10;
/// Entries of an L2 table: 512 MiB of the disk.
const L2_ENTRIES: u64 = CLUSTER / 8;
/// Refcounts of a refcount block: 2 GiB of the file.
const BLOCK_ENTRIES: u64 = CLUSTER / 2;
/// In L1 and L2 entries: the cluster is referred to once.
const COPIED: u64 = 1 << 63;
/// In an L2 entry: the cluster reads as zeros.
const ZERO: u64 = 1;

/// Clusters that hold the refcounts of a file: of the table, and of the blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Refcounts {
    table: u64,
    blocks: u64,
}

impl Refcounts {
    /// Of a file with so many other clusters. They count themselves.
    fn of(others: u64) -> Self {
        let mut counts = Self::default();
        loop {
            let blocks = (others + counts.table + counts.blocks).div_ceil(BLOCK_ENTRIES);
            let next = Self { table: (blocks * 8).div_ceil(CLUSTER), blocks };
            if next == counts {
                return counts;
            }
            counts = next;
        }
    }

    fn clusters(self) -> u64 {
        self.table + self.blocks
    }
}

/// Entries of the L1 table.
fn l1_entries(size: u64) -> u64 {
    size.div_ceil(CLUSTER * L2_ENTRIES)
}

/// Refuses a disk that the format cannot express.
fn check_size(size: u64) -> Result<(), ExportError> {
    if size.is_multiple_of(512) {
        return Ok(());
    }
    let why = format!(
        "the disk has {size} bytes, and a qcow2 image has whole sectors of 512 bytes; resize the disk, or export it as raw"
    );
    Err(ExportError::Unsuitable(why))
}

/// Big endian, padded to whole clusters.
fn table_bytes(entries: impl Iterator<Item = u64>) -> Vec<u8> {
    let mut bytes: Vec<u8> = entries.flat_map(u64::to_be_bytes).collect();
    bytes.resize(bytes.len().next_multiple_of(CLUSTER as usize), 0);
    bytes
}
