//! One entry of an L1 or L2 table.

use super::header::Header;

/// Bits 9 to 55: an offset in the file, of a multiple of 512.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// A cluster, as its entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Not in this image.
    Unallocated,
    /// Zeros, space for data or not.
    Zero,
    /// The cluster at this offset of the file.
    Data(u64),
    /// Compressed: offset, and bytes at most, inside of the file.
    Compressed(u64, u64),
    /// Of each of 32 subclusters (bit 0 is the first) whether its data is in the cluster at that offset, and whether
    /// it is zeros. No bit is in both; neither: not in this image.
    Parts(u64, u32, u32),
}

/// The offset of an L2 table; 0 when there is none.
///
/// # Errors
/// Why it is invalid, completing "an entry ...".
pub fn l1(entry: u64, header: &Header, file_size: u64) -> Result<u64, &'static str> {
    let offset = entry & OFFSET;
    if entry & !(OFFSET | COPIED) != 0 {
        return Err("has bits that are reserved");
    }
    if offset == 0 {
        return Ok(0);
    }
    let cluster = header.cluster();
    let table = (offset, cluster);
    if !offset.is_multiple_of(cluster) {
        Err("does not point at the start of a cluster")
    } else if offset + cluster > file_size {
        Err("points outside of the file")
    } else if super::header::overlap(table, (header.l1_offset, header.l1_entries * 8)) {
        Err("points into the L1 table itself")
    } else if super::header::overlap(table, header.refcounts) {
        Err("points into the refcount table")
    } else {
        Ok(offset)
    }
}

/// `bitmap` is the second word of an extended entry, 0 of others.
///
/// # Errors
/// Why it is invalid, completing "an entry ...".
pub fn l2(entry: u64, bitmap: u64, header: &Header, file_size: u64) -> Result<Cluster, &'static str> {
    if entry & COMPRESSED != 0 {
        return compressed(entry, bitmap, header, file_size);
    }
    let offset = entry & OFFSET;
    let flag = entry & ZERO != 0;
    if entry & !(OFFSET | COPIED | ZERO) != 0 || flag && (header.version < 3 || header.extended) {
        return Err("has bits that are reserved");
    }
    if !offset.is_multiple_of(header.cluster()) {
        return Err("does not point at the start of a cluster");
    }
    let (present, zero) = (bitmap as u32, (bitmap >> 32) as u32);
    if present & zero != 0 {
        return Err("has a subcluster that is both data and zeros");
    }
    if flag || zero == u32::MAX {
        return Ok(Cluster::Zero);
    }
    if offset == 0 {
        return match (present, zero) {
            (0, 0) => Ok(Cluster::Unallocated),
            (0, _) => Ok(Cluster::Parts(0, 0, zero)),
            _ => Err("has subclusters of data and no place for them"),
        };
    }
    if (!header.extended || present != 0) && offset >= file_size {
        return Err("points outside of the file");
    }
    match (header.extended, present) {
        (false, _) | (true, u32::MAX) => Ok(Cluster::Data(offset)),
        (true, _) => Ok(Cluster::Parts(offset, present, zero)),
    }
}

fn compressed(entry: u64, bitmap: u64, header: &Header, file_size: u64) -> Result<Cluster, &'static str> {
    if entry & COPIED != 0 || bitmap != 0 {
        return Err("has bits that are reserved");
    }
    // The number of further sectors is in the upper bits; how many bits, depends on the size of clusters.
    let shift = 62 - (header.cluster_bits - 8);
    let offset = entry & ((1 << shift) - 1);
    let sectors = (entry & (COMPRESSED - 1)) >> shift;
    if offset >= file_size {
        return Err("points outside of the file");
    }
    // The last sector may be cut by the end of the file.
    let bytes = ((sectors + 1) * 512 - offset % 512).min(file_size - offset);
    Ok(Cluster::Compressed(offset, bytes))
}
