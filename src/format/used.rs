//! The list of uses: when each base was needed last (docs/format.md, "List of uses"). A hint that decides only when a base
//! that nothing needs is removed, if the operator wants that at all.

use super::codec::{Envelope, FormatError, Reader, Writer};

/// Most bytes of the list.
pub const LONGEST_LIST: u64 = 16 << 20;

const ENVELOPE: Envelope = Envelope { magic: *b"PLYUSED\0", version: 1, structure: "list of uses" };

/// The last use of a base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UsedBase {
    /// Number of the base.
    pub base: u64,
    /// When it was needed last, nanoseconds since the epoch.
    pub used_ns: i64,
}

/// The bytes of a list.
pub fn encode(list: &[UsedBase]) -> Vec<u8> {
    let mut w = Writer::new();
    w.varint(list.len() as u64);
    for UsedBase { base, used_ns } in list {
        w.u64(*base).i64(*used_ns);
    }
    ENVELOPE.seal(&w.finish())
}

/// Reads the bytes of a list.
///
/// # Errors
/// When they are damaged or of a newer plyfs.
pub fn decode(bytes: &[u8]) -> Result<Vec<UsedBase>, FormatError> {
    let mut r = Reader::new(ENVELOPE.open(bytes)?, ENVELOPE.structure);
    let count = r.varint()?;
    let mut list = Vec::new();
    for _ in 0..count {
        list.push(UsedBase { base: r.u64()?, used_ns: r.i64()? });
    }
    r.end()?;
    Ok(list)
}
