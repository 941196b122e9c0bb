//! The header: the first cluster.

use super::super::ExportError;
use super::{CLUSTER, Refcounts, l1_entries};

const MAGIC: u32 = 0x5146_49fb;
const VERSION: u32 = 3;
const CLUSTER_BITS: u32 = 16;
/// Refcounts of 2^4 bits.
const REFCOUNT_ORDER: u32 = 4;
/// Bytes of the header: up to the compression type, and its padding.
const LENGTH: u32 = 112;
/// Incompatible feature: the compression is not zlib.
const COMPRESSION_TYPE: u64 = 1 << 3;
/// Header extension: the format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// The longest name of a backing file.
const LONGEST_NAME: usize = 1023;

/// The backing image that the header names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Its path, as a reader of the image finds it.
    pub path: String,
    /// Its format.
    pub format: String,
}

/// What the header says.
pub(super) struct Header<'a> {
    pub size: u64,
    pub backing: Option<&'a Backing>,
    /// Offset of the L1 table.
    pub l1_at: u64,
    /// Offset of the refcount table.
    pub refcounts_at: u64,
    pub refcounts: Refcounts,
    /// 0 zlib, 1 zstd.
    pub compression: u8,
}

impl Header<'_> {
    pub(super) fn encode(&self) -> Result<Vec<u8>, ExportError> {
        let name = self.backing.map_or("", |backing| &backing.path);
        let format = self.backing.map_or("", |backing| &backing.format);
        if name.len() > LONGEST_NAME {
            let why = format!(
                "the path of the backing image has {} bytes, and a qcow2 image can name {LONGEST_NAME}; give a shorter one",
                name.len()
            );
            return Err(ExportError::Unsuitable(why));
        }
        let mut extensions = Vec::new();
        if self.backing.is_some() {
            extensions.extend(BACKING_FORMAT.to_be_bytes());
            extensions.extend((format.len() as u32).to_be_bytes());
            extensions.extend(format.as_bytes());
            extensions.resize(extensions.len().next_multiple_of(8), 0);
        }
        // The end of the extensions.
        extensions.extend([0; 8]);
        let name_at = u64::from(LENGTH) + extensions.len() as u64;
        let incompatible = if self.compression == 0 { 0 } else { COMPRESSION_TYPE };

        let mut out = Vec::with_capacity(CLUSTER as usize);
        out.extend(MAGIC.to_be_bytes());
        out.extend(VERSION.to_be_bytes());
        out.extend(if name.is_empty() { 0 } else { name_at }.to_be_bytes());
        out.extend((name.len() as u32).to_be_bytes());
        out.extend(CLUSTER_BITS.to_be_bytes());
        out.extend(self.size.to_be_bytes());
        // No encryption.
        out.extend(0u32.to_be_bytes());
        out.extend((l1_entries(self.size) as u32).to_be_bytes());
        out.extend(self.l1_at.to_be_bytes());
        out.extend(self.refcounts_at.to_be_bytes());
        out.extend((self.refcounts.table as u32).to_be_bytes());
        // No snapshots.
        out.extend([0; 12]);
        out.extend(incompatible.to_be_bytes());
        // No compatible and no autoclear features.
        out.extend([0; 16]);
        out.extend(REFCOUNT_ORDER.to_be_bytes());
        out.extend(LENGTH.to_be_bytes());
        out.push(self.compression);
        out.resize(LENGTH as usize, 0);
        out.extend(extensions);
        out.extend(name.as_bytes());
        out.resize(CLUSTER as usize, 0);
        Ok(out)
    }
}
