//! The sums file of the cache of fetched blocks (docs/format.md, "Cache of fetched blocks").
//!
//! Everything here may be lost or damaged at any time. That costs a fetch, never a wrong byte: each read compares the
//! cached bytes with [`block_sum`]. So the only repair of these structures is to drop them.

use twox_hash::XxHash3_64;

use super::codec::{ENVELOPE_HEAD, Envelope, FormatError, Kind, Reader, Writer};
use super::{MAX_DISK_SIZE, MAX_NUMBER};

const HEADER: Envelope = Envelope { magic: *b"PLYCACHE", version: 2, structure: "cache header" };
/// Bases whose contents lie under another key than the current one for them.
const INHERITED: Envelope = Envelope { magic: *b"PLYCKEYS", version: 1, structure: "list of inherited keys" };

/// Bytes of the source in one cache block.
pub const CACHE_BLOCK: u64 = 16 * 1024;
/// Cache blocks of a slot.
pub const SLOT_BLOCKS: u64 = 64;
/// Bytes of the sums file before the first slot.
pub const HEADER_AREA: u64 = 4096;
/// Bytes of a slot.
pub const SLOT: u64 = 640;
/// Offset of the ages in a slot.
pub const AGES_AT: u64 = 32;
/// Offset of the sums in a slot.
pub const SUMS_AT: u64 = 128;

const COPY: usize = 2048;
const PAYLOAD: usize = 8 + 32 + 8 + 4 + 4 + 1 + 1;
/// Autoclear: [`CacheHeader::direct`].
const DIRECT: u64 = 1;
/// Bytes that version 2 adds to the payload of version 1.
const CONTENTS: usize = 32;
const STRUCTURE: &str = "cache slot";

/// The header of a sums file: the source of its blocks, and what is known about the contents as a whole. The file has
/// two copies of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheHeader {
    /// Grows with each copy that is written. The sound copy with the higher number counts.
    pub sequence: u64,
    /// Identity of the source's contents.
    pub key: [u8; 32],
    /// Bytes of the source.
    pub size: u64,
    /// No block is evicted to make room.
    pub pinned: bool,
    /// All contents were compared with the digest that the operator gave.
    pub verified: bool,
    /// Key of a digest. The blocks that are here were part of contents that, as a whole, matched this digest. No
    /// further block may be inserted.
    pub contents: Option<[u8; 32]>,
    /// Slot n is the slot of chunk n, or is free.
    pub direct: bool,
}

/// The result of [`CacheHeader::decode`].
#[derive(Debug)]
pub struct DecodedHeader {
    /// The newest sound copy.
    pub header: CacheHeader,
    /// What is wrong with the other copy.
    pub damaged: Option<FormatError>,
}

impl CacheHeader {
    /// Offset in the file of the copy with this sequence number.
    pub fn place(sequence: u64) -> u64 {
        (sequence % 2) * COPY as u64
    }

    /// The bytes of one copy, in version 1 if that can express the header.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u64(self.sequence).raw(&self.key).u64(self.size);
        w.u32(CACHE_BLOCK as u32).u32(SLOT_BLOCKS as u32);
        w.u8(self.pinned.into()).u8(self.verified.into());
        // In version 1, verified contents always lie under the key of their digest.
        let contents = self.contents.filter(|contents| !self.verified || *contents != self.key);
        let version = if contents.is_some() { 2 } else { 1 };
        w.raw(contents.as_ref().map_or(&[], |contents| contents));
        HEADER.seal_with(version, if self.direct { DIRECT } else { 0 }, &w.finish())
    }

    fn decode_copy(area: &[u8]) -> Result<Self, FormatError> {
        let short = || FormatError::new(Kind::Truncated, HEADER.structure, "the file is too short");
        let length = area.get(12..16).and_then(|bytes| bytes.try_into().ok()).map(u32::from_le_bytes);
        let length = length.ok_or_else(short)? as usize;
        let length = if length == PAYLOAD + CONTENTS { length } else { PAYLOAD };
        let bytes = area.get(..ENVELOPE_HEAD + length + 4).ok_or_else(short)?;
        let (payload, version, autoclear) = HEADER.open_with(bytes)?;
        let direct = autoclear & DIRECT != 0;
        let mut r = Reader::new(payload, HEADER.structure);
        let sequence = r.u64()?;
        if sequence > MAX_NUMBER {
            return Err(r.bad(format!("sequence number {sequence} is above 2^62")));
        }
        let mut key = [0; 32];
        key.copy_from_slice(r.raw(32)?);
        let size = r.u64()?;
        if size == 0 || size > MAX_DISK_SIZE {
            return Err(r.bad(format!("source size {size} is out of range")));
        }
        let (block, slot) = (r.u32()?, r.u32()?);
        if (u64::from(block), u64::from(slot)) != (CACHE_BLOCK, SLOT_BLOCKS) {
            return Err(
                r.bad(format!("blocks of {block} bytes and slots of {slot} blocks are not supported"))
            );
        }
        let mut flag = || match r.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(r.bad(format!("a flag is {other}"))),
        };
        let (pinned, verified) = (flag()?, flag()?);
        let contents = if version > 1 {
            let mut contents = [0; CONTENTS];
            contents.copy_from_slice(r.raw(CONTENTS)?);
            Some(contents)
        } else {
            None
        };
        r.end()?;
        Ok(Self { sequence, key, size, pinned, verified, contents, direct })
    }

    /// Reads the first [`HEADER_AREA`] bytes of a sums file.
    ///
    /// # Errors
    /// The error of the first copy, when neither copy is sound.
    pub fn decode(area: &[u8]) -> Result<DecodedHeader, FormatError> {
        let copy = |at: usize| {
            let header = Self::decode_copy(area.get(at..(at + COPY).min(area.len())).unwrap_or_default())?;
            if Self::place(header.sequence) == at as u64 {
                Ok(header)
            } else {
                let why = "this copy lies at the offset of the other copy";
                Err(FormatError::new(Kind::Value, HEADER.structure, why))
            }
        };
        match (copy(0), copy(COPY)) {
            (Ok(a), Ok(b)) => {
                let header = if a.sequence > b.sequence { a } else { b };
                Ok(DecodedHeader { header, damaged: None })
            }
            (Ok(header), Err(damaged)) | (Err(damaged), Ok(header)) => {
                Ok(DecodedHeader { header, damaged: Some(damaged) })
            }
            (Err(error), Err(_)) => Err(error),
        }
    }
}

/// When each block of a slot was last used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ages {
    /// Added to the lower seven bits of each byte.
    pub base: u64,
    /// For each block: in the lower seven bits its generation above `base`; in the highest bit whether it was used
    /// again after it came.
    pub ages: [u8; SLOT_BLOCKS as usize],
}

/// A decoded slot.
#[derive(Debug)]
pub struct Slot {
    /// Index of the run of [`SLOT_BLOCKS`] blocks that the slot describes. `None`: the slot is free or its owner sum is
    /// wrong.
    pub chunk: Option<u64>,
    /// `None`: damaged, or never written.
    pub ages: Option<Ages>,
    /// The sum of each block; 0: the block is not here.
    pub sums: [u64; SLOT_BLOCKS as usize],
}

fn owner_sum(key: &[u8; 32], slot: u32, chunk: u64) -> u32 {
    let sum = crc32c::crc32c_append(crc32c::crc32c(key), &slot.to_le_bytes());
    crc32c::crc32c_append(sum, &chunk.to_le_bytes())
}

fn ages_sum(key: &[u8; 32], chunk: u64, ages: &Ages) -> u32 {
    let sum = crc32c::crc32c_append(crc32c::crc32c(key), &chunk.to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c_append(sum, &ages.base.to_le_bytes()), &ages.ages)
}

/// The part of a slot that is rewritten when blocks were used: bytes [`AGES_AT`] to [`SUMS_AT`].
pub fn encode_ages(key: &[u8; 32], chunk: u64, ages: &Ages) -> Vec<u8> {
    let mut w = Writer::new();
    w.u64(ages.base).u32(ages_sum(key, chunk, ages)).u32(0).raw(&ages.ages).raw(&[0; 16]);
    w.finish()
}

/// All bytes of slot number `slot`.
pub fn encode_slot(
    key: &[u8; 32],
    slot: u32,
    chunk: u64,
    ages: &Ages,
    sums: &[u64; SLOT_BLOCKS as usize],
) -> Vec<u8> {
    let mut w = Writer::new();
    w.u64(chunk).u32(owner_sum(key, slot, chunk)).u32(0).raw(&[0; 16]);
    w.raw(&encode_ages(key, chunk, ages));
    for sum in sums {
        w.u64(*sum);
    }
    w.finish()
}

/// Reads slot number `slot`.
///
/// # Errors
/// When `bytes` does not have [`SLOT`] bytes. Damage is no error: the slot is then free.
pub fn decode_slot(key: &[u8; 32], slot: u32, bytes: &[u8]) -> Result<Slot, FormatError> {
    let mut r = Reader::new(bytes, STRUCTURE);
    let (chunk, sum, _) = (r.u64()?, r.u32()?, r.raw(20)?);
    let chunk = (sum == owner_sum(key, slot, chunk)).then_some(chunk);
    let (base, ages_are, _) = (r.u64()?, r.u32()?, r.u32()?);
    let mut ages = Ages { base, ages: [0; SLOT_BLOCKS as usize] };
    ages.ages.copy_from_slice(r.raw(SLOT_BLOCKS as usize)?);
    r.raw(16)?;
    let sound = chunk.is_some_and(|chunk| ages_are == ages_sum(key, chunk, &ages)) && base <= MAX_NUMBER;
    let mut sums = [0; SLOT_BLOCKS as usize];
    for sum in &mut sums {
        *sum = r.u64()?;
    }
    r.end()?;
    Ok(Slot { chunk, ages: sound.then_some(ages), sums })
}

/// Offset of a slot in the sums file.
pub fn slot_place(slot: u32) -> u64 {
    HEADER_AREA + u64::from(slot) * SLOT
}

/// The sum of a cache block. It covers the source and the block's number, so bytes of another block or another source
/// do not match. Never 0, which means "not here".
pub fn block_sum(key: &[u8; 32], block: u64, bytes: &[u8]) -> u64 {
    let mut name = [0; 40];
    name[..32].copy_from_slice(key);
    name[32..].copy_from_slice(&block.to_le_bytes());
    XxHash3_64::oneshot_with_seed(XxHash3_64::oneshot(&name), bytes).max(1)
}

/// Encodes the numbers of the bases, ascending, whose contents lie under the key that version 0.1.0 made for them.
pub fn encode_inherited(bases: &[u64]) -> Vec<u8> {
    let mut w = Writer::new();
    for base in bases.iter().take(MAX_INHERITED) {
        w.u64(*base);
    }
    INHERITED.seal(&w.finish())
}

/// Most bases that [`encode_inherited`] takes.
pub const MAX_INHERITED: usize = 8000;

/// Decodes the bytes of [`encode_inherited`].
///
/// # Errors
/// When it is damaged.
pub fn decode_inherited(bytes: &[u8]) -> Result<Vec<u64>, FormatError> {
    let mut r = Reader::new(INHERITED.open(bytes)?, INHERITED.structure);
    let mut bases = Vec::new();
    while r.left() > 0 {
        bases.push(r.u64()?);
    }
    Ok(bases)
}
