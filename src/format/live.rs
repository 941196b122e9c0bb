//! The record of live maps, which tells where the live maps of a store are (docs/format.md, "Record of live maps"). It
//! is a hint for this boot, never durable.

use super::codec::{Envelope, FormatError, Reader, Writer};

/// Most bytes of the record.
pub const LONGEST_LIVE_RECORD: u64 = 8 << 10;

const ENVELOPE: Envelope = Envelope { magic: *b"PLYLIVE\0", version: 1, structure: "record of live maps" };

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveRecord {
    /// The boot to which the record belongs.
    pub boot: u64,
    /// The id in the arena must match.
    pub id: u64,
    /// Device of the store's directory.
    pub device: u64,
    /// Its inode number.
    pub inode: u64,
    /// Path of the arena.
    pub path: String,
}

impl LiveRecord {
    /// The bytes of the record.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u64(self.boot).u64(self.id).u64(self.device).u64(self.inode).bytes(self.path.as_bytes());
        ENVELOPE.seal(&w.finish())
    }

    /// Reads the bytes of a record.
    ///
    /// # Errors
    /// When they are damaged or of a newer plyfs.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut r = Reader::new(ENVELOPE.open(bytes)?, ENVELOPE.structure);
        let (boot, id, device, inode) = (r.u64()?, r.u64()?, r.u64()?, r.u64()?);
        let path = r.text()?;
        r.end()?;
        Ok(Self { boot, id, device, inode, path })
    }
}
