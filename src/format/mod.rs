//! Encodes and decodes the structures that plyfs keeps on disk; no I/O.
//!
//! docs/format.md specifies every byte. Structures are encoded field by field, little endian, so that a change of a
//! Rust type never changes a store. A decoder returns an error for anything that it does not know. It never panics, and
//! never allocates more than the length of its input justifies.

pub mod cache;
mod codec;
pub mod encryption;
pub mod extents;
pub mod features;
mod file_proof;
mod identity;
pub mod increment;
pub mod journal;
pub mod layout;
pub mod limits;
pub mod lineage;
pub mod live;
pub mod names;
mod options;
pub mod pools;
pub mod proof;
pub mod record;
pub mod replay;
pub mod rework;
#[cfg(test)]
mod tests;
pub mod trace;
pub mod used;

pub use codec::{Envelope, FormatError, Kind, Reader, Writer};

/// Bytes of a block, the unit of a delta's map.
pub const BLOCK: u64 = 4096;

/// Largest size of a disk or base in bytes (64 TiB).
pub const MAX_DISK_SIZE: u64 = 1 << 46;

/// Largest disk or base number, position in the order of names, and generation: far above what counting reaches, and
/// far below an overflow.
pub const MAX_NUMBER: u64 = 1 << 62;

/// Whether `name` can be the name of a disk or a base: `[A-Za-z0-9][A-Za-z0-9._-]{0,127}`.
pub fn valid_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    (1..=128).contains(&bytes.len())
        && bytes[0].is_ascii_alphanumeric()
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}
