//! The sums file of the cache of fetched blocks (docs/format.md, "Cache of fetched blocks").
//!
//! Everything here may be lost or wrong at any time, and costs a fetch then, never a wrong byte: what is cached is
//! compared with [`block_sum`] whenever it is read. So these structures have no repair but to be dropped.

use twox_hash::XxHash3_64;

use super::codec::{ENVELOPE_HEAD, Envelope, FormatError, Kind, Reader, Writer};
use super::{MAX_DISK_SIZE, MAX_NUMBER};

const HEADER: Envelope = Envelope { magic: *b"PLYCACHE", version: 2, structure: "cache header" };
/// Bases whose contents lie under another key than the one that is made for them now.
const INHERITED: Envelope = Envelope { magic: *b"PLYCKEYS", version: 1, structure: "list of inherited keys" };

/// Bytes of the source in one cache block.
pub const CACHE_BLOCK: u64 = 16 * 1024;
/// Cache blocks that a slot speaks for.
pub const SLOT_BLOCKS: u64 = 64;
/// Bytes of the sums file before the first slot.
pub const HEADER_AREA: u64 = 4096;
/// Bytes of a slot.
pub const SLOT: u64 = 640;
/// Where a slot's ages are in it.
pub const AGES_AT: u64 = 32;
/// Where a slot's sums are in it.
pub const SUMS_AT: u64 = 128;

const COPY: usize = 2048;
const PAYLOAD: usize = 8 + 32 + 8 + 4 + 4 + 1 + 1;
/// Autoclear: [`CacheHeader::direct`].
const DIRECT: u64 = 1;
/// In version 2 behind the payload of version 1.
const CONTENTS: usize = 32;
const STRUCTURE: &str = "cache slot";

/// Whose blocks a sums file is about, and what is known of them as a whole. It is there twice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheHeader {
    /// Grows with each copy that is written; the sound copy with the higher one counts.
    pub sequence: u64,
    /// Identity of the source's contents.
    pub key: [u8; 32],
    /// Bytes of the source.
    pub size: u64,
    /// Nothing of it is evicted to make room.
    pub pinned: bool,
    /// All of it was compared with the digest that the operator gave.
    pub verified: bool,
    /// Each block that is here was a part of contents that were compared, as a whole, with the digest that this key
    /// stands for. No block comes in any more.
    pub contents: Option<[u8; 32]>,
    /// Each slot lies at the place of its chunk: slot number n speaks of chunk n, or of nothing.
    pub direct: bool,
}

/// What [`CacheHeader::decode`] found.
#[derive(Debug)]
pub struct DecodedHeader {
    /// The newest sound copy.
    pub header: CacheHeader,
    /// What is wrong with the other copy.
    pub damaged: Option<FormatError>,
}

impl CacheHeader {
    /// Where the copy with this sequence number lies in the file.
    pub fn place(sequence: u64) -> u64 {
        (sequence % 2) * COPY as u64
    }

    /// The bytes of one copy: of version 1 as long as that says all.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u64(self.sequence).raw(&self.key).u64(self.size);
        w.u32(CACHE_BLOCK as u32).u32(SLOT_BLOCKS as u32);
        w.u8(self.pinned.into()).u8(self.verified.into());
        // Version 1 had verified contents under the key of their digest only.
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
            return Err(r.bad(format!("a source of {size} bytes")));
        }
        let (block, slot) = (r.u32()?, r.u32()?);
        if (u64::from(block), u64::from(slot)) != (CACHE_BLOCK, SLOT_BLOCKS) {
            return Err(r.bad(format!("blocks of {block} bytes, {slot} in a slot")));
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
    /// What is wrong with the first copy, when neither is sound.
    pub fn decode(area: &[u8]) -> Result<DecodedHeader, FormatError> {
        let copy = |at: usize| {
            let header = Self::decode_copy(area.get(at..(at + COPY).min(area.len())).unwrap_or_default())?;
            if Self::place(header.sequence) == at as u64 {
                Ok(header)
            } else {
                let why = "this copy belongs to the other place";
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

/// When each block of a slot was used last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ages {
    /// Added to the lower seven bits of each byte.
    pub base: u64,
    /// Of each block: the generation above `base`, and in the highest bit whether it was used again after it came.
    pub ages: [u8; SLOT_BLOCKS as usize],
}

/// A slot as it was read.
#[derive(Debug)]
pub struct Slot {
    /// Which run of [`SLOT_BLOCKS`] blocks it speaks for; `None`: it is free, or nobody knows.
    pub chunk: Option<u64>,
    /// `None`: damaged, or never written.
    pub ages: Option<Ages>,
    /// Of each block; 0: it is not here.
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

/// The part of a slot that is written again when blocks were used: bytes [`AGES_AT`] to [`SUMS_AT`].
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
/// When `bytes` are not [`SLOT`] bytes. Damage is no error: the slot says nothing then.
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

/// Where a slot begins in the sums file.
pub fn slot_place(slot: u32) -> u64 {
    HEADER_AREA + u64::from(slot) * SLOT
}

/// What the bytes of a cache block must sum up to. It covers whose block it is and which: bytes that were written to
/// another place, or for another source, do not pass. Never 0, which stands for "not here".
pub fn block_sum(key: &[u8; 32], block: u64, bytes: &[u8]) -> u64 {
    let mut name = [0; 40];
    name[..32].copy_from_slice(key);
    name[32..].copy_from_slice(&block.to_le_bytes());
    XxHash3_64::oneshot_with_seed(XxHash3_64::oneshot(&name), bytes).max(1)
}

/// Numbers of bases, ascending, whose contents lie under the key that version 0.1.0 made for them.
pub fn encode_inherited(bases: &[u64]) -> Vec<u8> {
    let mut w = Writer::new();
    for base in bases.iter().take(MAX_INHERITED) {
        w.u64(*base);
    }
    INHERITED.seal(&w.finish())
}

/// The most bases that [`encode_inherited`] takes.
pub const MAX_INHERITED: usize = 8000;

/// Reads what [`encode_inherited`] made.
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
