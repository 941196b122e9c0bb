//! The list of uses: when each base was needed last, and the times that clients gave the files of bases (docs/format.md,
//! "List of uses"). A hint that decides only when a base that nothing needs is removed, if the operator wants that at all.

use super::codec::{Envelope, FormatError, Reader, Writer};

/// Most bytes of the list.
pub const LONGEST_LIST: u64 = 16 << 20;

const ENVELOPE: Envelope = Envelope { magic: *b"PLYUSED\0", version: 2, structure: "list of uses" };
/// The version without times, which an older plyfs reads too.
const WITHOUT_TIMES: u16 = 1;

/// The last use of a base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UsedBase {
    /// Number of the base.
    pub base: u64,
    /// When it was needed last, nanoseconds since the epoch.
    pub used_ns: i64,
}

/// The times that a client gave the file of a base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimesOfBase {
    /// Number of the base.
    pub base: u64,
    /// Its modification time, nanoseconds since the epoch.
    pub modified_ns: i64,
    /// When the client set it, nanoseconds since the epoch.
    pub changed_ns: i64,
}

/// What the list has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UseList {
    /// Uses, each base once.
    pub used: Vec<UsedBase>,
    /// Times, each base once.
    pub times: Vec<TimesOfBase>,
}

/// The bytes of a list.
pub fn encode(list: &UseList) -> Vec<u8> {
    let mut w = Writer::new();
    w.varint(list.used.len() as u64);
    for UsedBase { base, used_ns } in &list.used {
        w.u64(*base).i64(*used_ns);
    }
    if list.times.is_empty() {
        return ENVELOPE.seal_as(WITHOUT_TIMES, &w.finish());
    }
    w.varint(list.times.len() as u64);
    for TimesOfBase { base, modified_ns, changed_ns } in &list.times {
        w.u64(*base).i64(*modified_ns).i64(*changed_ns);
    }
    ENVELOPE.seal(&w.finish())
}

/// Reads the bytes of a list.
///
/// # Errors
/// When they are damaged or of a newer plyfs.
pub fn decode(bytes: &[u8]) -> Result<UseList, FormatError> {
    let (payload, version) = ENVELOPE.open_any(bytes)?;
    let mut r = Reader::new(payload, ENVELOPE.structure);
    let mut list = UseList::default();
    for _ in 0..r.varint()? {
        list.used.push(UsedBase { base: r.u64()?, used_ns: r.i64()? });
    }
    if version > WITHOUT_TIMES {
        for _ in 0..r.varint()? {
            list.times.push(TimesOfBase { base: r.u64()?, modified_ns: r.i64()?, changed_ns: r.i64()? });
        }
    }
    r.end()?;
    Ok(list)
}
