//! The list of names: the names that records had, for records that cannot be read (docs/format.md, "List of names"). A
//! hint, never durable: an entry counts only while the record's file is the one that was read.

use super::codec::{Envelope, FormatError, Reader, Writer};

/// Most bytes of the list.
pub const LONGEST_NAME_LIST: u64 = 64 << 20;

const ENVELOPE: Envelope = Envelope { magic: *b"PLYNAMES", version: 1, structure: "list of names" };

/// What a record said, and which file it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NameEntry {
    /// Whether it is the record of a base, and not that of a disk.
    pub is_base: bool,
    /// Number of the disk or base.
    pub number: u64,
    /// Inode number of the file.
    pub inode: u64,
    /// Last change of the file.
    pub changed_ns: i64,
    /// Bytes of the file.
    pub len: u64,
    /// The name.
    pub name: String,
    /// Number of the disk's base; 0 when it has none.
    pub base: u64,
}

/// The bytes of a list.
pub fn encode(entries: &[NameEntry]) -> Vec<u8> {
    let mut w = Writer::new();
    w.varint(entries.len() as u64);
    for entry in entries {
        w.u8(entry.is_base.into()).u64(entry.number).u64(entry.inode).i64(entry.changed_ns).u64(entry.len);
        w.bytes(entry.name.as_bytes()).u64(entry.base);
    }
    ENVELOPE.seal(&w.finish())
}

/// Reads the bytes of a list.
///
/// # Errors
/// When they are damaged or of a newer plyfs.
pub fn decode(bytes: &[u8]) -> Result<Vec<NameEntry>, FormatError> {
    let mut r = Reader::new(ENVELOPE.open(bytes)?, ENVELOPE.structure);
    let count = r.varint()?;
    let mut entries = Vec::new();
    for _ in 0..count {
        let is_base = match r.u8()? {
            0 => false,
            1 => true,
            other => return Err(r.bad(format!("{other} is no kind of record"))),
        };
        let (number, inode, changed_ns, len) = (r.u64()?, r.u64()?, r.i64()?, r.u64()?);
        let name = r.text()?;
        entries.push(NameEntry { is_base, number, inode, changed_ns, len, name, base: r.u64()? });
    }
    r.end()?;
    Ok(entries)
}
