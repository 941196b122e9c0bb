//! Decodes and checks one entry of an L1 or L2 table.

use super::header::Header;

/// Bits 9 to 55: an offset in the file, a multiple of 512.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// A cluster as its L2 entry describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// Not in this image.
    Unallocated,
    /// Zeros, with or without an allocated cluster.
    Zero,
    /// Data in the cluster at this offset of the file.
    Data(u64),
    /// Compressed data: offset, and the most bytes it takes, inside the file.
    Compressed(u64, u64),
    /// 32 subclusters: the offset of the cluster, a bitmap of subclusters with data in it, and a bitmap of zero
    /// subclusters. Bit 0 is the first subcluster. No bit is set in both; a bit in neither is not in this image.
    Parts(u64, u32, u32),
}

/// The offset of the L2 table that an L1 entry names; 0 when there is none.
///
/// # Errors
/// Why the entry is invalid; the text completes "an entry ...".
pub fn l1(entry: u64, header: &Header, file_size: u64) -> Result<u64, &'static str> {
    let offset = entry & OFFSET;
    if entry & !(OFFSET | COPIED) != 0 {
        return Err("has reserved bits set");
    }
    if offset == 0 {
        return Ok(0);
    }
    let cluster = header.cluster();
    let table = (offset, cluster);
    if !offset.is_multiple_of(cluster) {
        Err("does not point at the start of a cluster")
    } else if offset + cluster > file_size {
        Err("points outside the file")
    } else if super::header::overlap(table, (header.l1_offset, header.l1_entries * 8)) {
        Err("points into the L1 table itself")
    } else if super::header::overlap(table, header.refcounts) {
        Err("points into the refcount table")
    } else {
        Ok(offset)
    }
}

/// The cluster that an L2 entry describes. `bitmap` is the second word of an extended entry, else 0.
///
/// # Errors
/// Why the entry is invalid; the text completes "an entry ...".
pub fn l2(entry: u64, bitmap: u64, header: &Header, file_size: u64) -> Result<Cluster, &'static str> {
    if entry & COMPRESSED != 0 {
        return compressed(entry, bitmap, header, file_size);
    }
    let offset = entry & OFFSET;
    let flag = entry & ZERO != 0;
    if entry & !(OFFSET | COPIED | ZERO) != 0 || flag && (header.version < 3 || header.extended) {
        return Err("has reserved bits set");
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
            _ => Err("has data subclusters but no host cluster"),
        };
    }
    if (!header.extended || present != 0) && offset >= file_size {
        return Err("points outside the file");
    }
    match (header.extended, present) {
        (false, _) | (true, u32::MAX) => Ok(Cluster::Data(offset)),
        (true, _) => Ok(Cluster::Parts(offset, present, zero)),
    }
}

fn compressed(entry: u64, bitmap: u64, header: &Header, file_size: u64) -> Result<Cluster, &'static str> {
    if entry & COPIED != 0 || bitmap != 0 {
        return Err("has reserved bits set");
    }
    // The upper bits hold the number of additional sectors. Their width depends on the cluster size.
    let shift = 62 - (header.cluster_bits - 8);
    let offset = entry & ((1 << shift) - 1);
    let sectors = (entry & (COMPRESSED - 1)) >> shift;
    if offset >= file_size {
        return Err("points outside the file");
    }
    // The end of the file may cut the last sector.
    let bytes = ((sectors + 1) * 512 - offset % 512).min(file_size - offset);
    Ok(Cluster::Compressed(offset, bytes))
}
