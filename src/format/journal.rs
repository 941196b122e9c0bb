//! The map file: a header, then records that each carry the state of one flush (docs/format.md, "Map file").

use super::codec::{FormatError, Kind, Reader, Writer};
use super::{BLOCK, MAX_DISK_SIZE};
use crate::sabotage::{Sabotage, sabotaged};

/// Bytes of a map file's header.
pub const HEADER: usize = 64;
/// Bytes of a record's header.
pub const RECORD_HEADER: usize = 32;
/// Blocks described by one word of the map.
pub const WORD_BLOCKS: u64 = 32;

const MAGIC: &[u8; 8] = b"PLYMAP\0\0";
const VERSION: u16 = 1;
const RECORD_MAGIC: u32 = 0x4a59_4c50; // "PLYJ"
const STRUCTURE: &str = "map file";

/// State of one block in the map; two bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// Never written: the base below the overlap, zeros above.
    Unmapped = 0,
    /// In the data file.
    Data = 1,
    /// Zeros; hides the base.
    Zero = 2,
}

impl State {
    /// The state of two bits; 3 is not a state.
    pub fn from_bits(bits: u64) -> Option<Self> {
        match bits {
            0 => Some(State::Unmapped),
            1 => Some(State::Data),
            2 => Some(State::Zero),
            _ => None,
        }
    }
}

/// Header of a map file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapHeader {
    /// Number of the disk.
    pub disk: u64,
    /// Generation; as in the disk's record.
    pub generation: u64,
    /// Random; goes into each record's checksum, so that bytes of another file are never a record of this one.
    pub nonce: u64,
}

impl MapHeader {
    /// The first [`HEADER`] bytes of the file.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.raw(MAGIC).u16(VERSION).u16(0).u64(0); // version, reserved, incompatible features
        w.u64(self.disk).u64(self.generation).u64(self.nonce);
        let pad = HEADER - 4 - w.len();
        w.raw(&vec![0; pad]);
        let mut bytes = w.finish();
        let sum = crc32c::crc32c(&bytes);
        bytes.extend_from_slice(&sum.to_le_bytes());
        bytes
    }
    /// Reads the first [`HEADER`] bytes of the file.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let fail = |kind, detail: String| Err(FormatError::new(kind, STRUCTURE, detail));
        if bytes.len() < HEADER {
            return fail(Kind::Truncated, format!("{} bytes, shorter than its header", bytes.len()));
        }
        let bytes = &bytes[..HEADER];
        if &bytes[..8] != MAGIC {
            return fail(Kind::Magic, "the magic bytes are not those of a map file".into());
        }
        let sum = u32::from_le_bytes([bytes[60], bytes[61], bytes[62], bytes[63]]);
        if crc32c::crc32c(&bytes[..60]) != sum {
            return fail(Kind::Checksum, "checksum of the header does not match".into());
        }
        let mut r = Reader::new(&bytes[8..60], STRUCTURE);
        let version = r.u16()?;
        r.u16()?;
        let incompatible = r.u64()?;
        if version == 0 || version > VERSION || incompatible != 0 {
            return fail(
                Kind::Newer,
                format!("version {version}, features {incompatible:#x}; use a newer plyfs"),
            );
        }
        Ok(Self { disk: r.u64()?, generation: r.u64()?, nonce: r.u64()? })
    }
}

/// A run of consecutive words of the map with their values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Index of the first word.
    pub first: u64,
    /// Values, 32 blocks each, block 0 in the lowest two bits.
    pub words: Vec<u64>,
}

/// What one flush makes durable.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Record {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Bytes from the start that fall through to the base.
    pub overlap: u64,
    /// Last modification, nanoseconds since the epoch.
    pub modified_ns: i64,
    /// Words that have these values from now on. Blocks at or past `size` are unmapped whatever they say.
    pub runs: Vec<Run>,
}

fn checksum(nonce: u64, head: &[u8], payload: &[u8]) -> u32 {
    let sum = crc32c::crc32c(&nonce.to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c_append(sum, head), payload)
}

impl Record {
    /// The bytes of the record with sequence number `seq`; a multiple of 8.
    pub fn encode(&self, nonce: u64, seq: u64) -> Vec<u8> {
        let mut p = Writer::new();
        p.u64(self.size).u64(self.overlap).i64(self.modified_ns);
        p.u32(u32::try_from(self.runs.len()).expect("bounded by the map"));
        p.u32(0);
        for run in &self.runs {
            p.u64(run.first).u64(run.words.len() as u64);
            // A run of one repeated value is stored once: a filled disk costs a few bytes.
            match run.words.first() {
                Some(first) if run.words.len() > 2 && run.words.iter().all(|w| w == first) => {
                    p.u64(1).u64(*first);
                }
                _ => {
                    p.u64(0);
                    run.words.iter().for_each(|w| {
                        p.u64(*w);
                    });
                }
            }
        }
        let payload = p.finish();
        let mut w = Writer::new();
        w.u32(RECORD_MAGIC).u32(0).u64(seq).u64(payload.len() as u64);
        let sum = checksum(nonce, w.as_slice(), &payload);
        w.u32(sum).u32(0);
        w.raw(&payload);
        w.finish()
    }

    fn decode(payload: &[u8]) -> Result<Self, FormatError> {
        let mut r = Reader::new(payload, "map record");
        let (size, overlap, modified_ns) = (r.u64()?, r.u64()?, r.i64()?);
        if size > MAX_DISK_SIZE || overlap > size {
            return Err(r.bad(format!("size {size}, overlap {overlap}")));
        }
        let count = r.u32()?;
        r.u32()?;
        let limit = MAX_DISK_SIZE / BLOCK / WORD_BLOCKS;
        let mut runs = Vec::new();
        for _ in 0..count {
            let (first, len, repeat) = (r.u64()?, r.u64()?, r.u64()?);
            if first.checked_add(len).is_none_or(|end| end > limit) {
                return Err(r.bad(format!("run of {len} words at {first} is outside of the largest disk")));
            }
            let words = if repeat == 1 {
                vec![r.u64()?; len as usize]
            } else if repeat == 0 {
                if len > r.left() as u64 / 8 {
                    return Err(r.bad("run is longer than its record"));
                }
                (0..len).map(|_| r.u64()).collect::<Result<_, _>>()?
            } else {
                return Err(r.bad(format!("run type {repeat} is not known")));
            };
            // The pair 11 is not a state.
            if words.iter().any(|w: &u64| w & (w >> 1) & 0x5555_5555_5555_5555 != 0) {
                return Err(r.bad("a block has a state that does not exist"));
            }
            runs.push(Run { first, words });
        }
        r.end()?;
        Ok(Self { size, overlap, modified_ns, runs })
    }
}

/// What a map file says.
#[derive(Debug)]
pub struct Journal {
    /// Its header.
    pub header: MapHeader,
    /// All valid records in order.
    pub records: Vec<Record>,
    /// Offset behind the last valid record.
    pub end: u64,
    /// Sequence number of the next record.
    pub next_seq: u64,
    /// Bytes behind `end` are not zero: a flush was cut off. They were never acknowledged.
    pub torn: bool,
}

fn record_at(bytes: &[u8], nonce: u64) -> Option<(u64, &[u8], usize)> {
    let head = bytes.get(..RECORD_HEADER)?;
    let mut r = Reader::new(head, STRUCTURE);
    let (magic, _zero, seq, len) = (r.u32().ok()?, r.u32().ok()?, r.u64().ok()?, r.u64().ok()?);
    let sum = r.u32().ok()?;
    if magic != RECORD_MAGIC || r.u32().ok()? != 0 {
        return None;
    }
    let end = RECORD_HEADER.checked_add(usize::try_from(len).ok()?)?;
    let payload = bytes.get(RECORD_HEADER..end)?;
    let whole = checksum(nonce, &head[..24], payload) == sum || sabotaged(Sabotage::ChecksumIgnored);
    whole.then_some((seq, payload, end))
}

impl Journal {
    /// Reads a whole map file of `disk`, which has to be valid through `floor` bytes.
    ///
    /// A damaged record that a valid one follows, or that lies below the floor, is an error: it was
    /// acknowledged. Behind that, the first damaged record is where a cut-off flush began.
    pub fn decode(bytes: &[u8], disk: u64, generation: u64, floor: u64) -> Result<Self, FormatError> {
        let header = MapHeader::decode(bytes)?;
        if (header.disk, header.generation) != (disk, generation) {
            return Err(FormatError::new(
                Kind::Value,
                STRUCTURE,
                format!(
                    "it is generation {} of disk number {}, not {generation} of {disk}",
                    header.generation, header.disk
                ),
            ));
        }
        let mut out = Self { header, records: Vec::new(), end: HEADER as u64, next_seq: 1, torn: false };
        let mut at = HEADER;
        while let Some((seq, payload, len)) = bytes.get(at..).and_then(|b| record_at(b, header.nonce)) {
            if seq != out.next_seq {
                break;
            }
            out.records.push(Record::decode(payload)?);
            out.next_seq += 1;
            at += len;
        }
        out.end = at as u64;
        if out.end < floor {
            let kind = if (bytes.len() as u64) < floor { Kind::Truncated } else { Kind::Checksum };
            return Err(FormatError::new(
                kind,
                STRUCTURE,
                format!("damaged at byte {at}, it was complete up to {floor} when last closed"),
            ));
        }
        let rest = bytes.get(at..).unwrap_or_default();
        if rest.iter().any(|b| *b != 0) {
            out.torn = true;
            for start in (0..rest.len()).step_by(8) {
                if record_at(&rest[start..], header.nonce).is_some_and(|(seq, _, _)| seq >= out.next_seq) {
                    return Err(FormatError::new(
                        Kind::Checksum,
                        STRUCTURE,
                        format!("damaged at byte {at}, a complete record follows at {}", at + start),
                    ));
                }
            }
        }
        Ok(out)
    }
}
