//! The map file: a header, then records that each carry the state of one flush (docs/format.md, "Map file").

use std::convert::Infallible;

use thiserror::Error;

use super::codec::{FormatError, Kind, Reader, Writer};
use super::replay::{Replay, Words};
use super::{BLOCK, MAX_DISK_SIZE};
use crate::mutant::Mutant;

/// Bytes of a map file's header.
pub const HEADER: usize = 64;
/// Bytes of a record's header.
pub const RECORD_HEADER: usize = 32;
/// Blocks described by one word of the map.
pub const WORD_BLOCKS: u64 = 32;

/// Words of the map of the largest disk.
const MAX_WORDS: u64 = MAX_DISK_SIZE / BLOCK / WORD_BLOCKS;
/// No map file is larger: four times a record with all words of the largest disk, and one more such record.
const LARGEST_MAP_FILE: u64 = 8 * MAX_WORDS * 8;
/// Bytes of the file in memory at a time.
const WINDOW: u64 = 256 << 10;
/// Words that are decoded at a time.
const PIECE: usize = 512;
/// Bytes of a record's header that its checksum covers.
const CHECKED_HEAD: usize = 24;
/// Bytes of a payload before the runs.
const PAYLOAD_HEAD: usize = 32;
/// Bytes of a run before its words.
const RUN_HEAD: usize = 24;

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
    /// Random. Each record's checksum covers it, so bytes of another file never pass as a record of this one.
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

/// The state that one flush makes durable.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Record {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Bytes from the start that fall through to the base.
    pub overlap: u64,
    /// Last modification, nanoseconds since the epoch.
    pub modified_ns: i64,
    /// The new values of these words. Blocks at or above `size` are unmapped, whatever the words say.
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
            // A run of one repeated value is stored once, so a full disk takes a few bytes.
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
}

/// The replayed contents of a map file.
#[derive(Debug)]
pub struct Journal {
    /// Its header.
    pub header: MapHeader,
    /// Number of valid records.
    pub records: u64,
    /// The map after the last record.
    pub map: Replay,
    /// Size of the disk after the last record.
    pub size: u64,
    /// Overlap after the last record.
    pub overlap: u64,
    /// The latest modification time in any record.
    pub modified_ns: i64,
    /// The first record with an overlap above the one before it. No plyfs writes such a record.
    pub raised: Option<Raised>,
    /// Offset of the end of the last valid record.
    pub end: u64,
    /// Sequence number of the next record.
    pub next_seq: u64,
    /// Whether bytes past `end` are not zero: a flush was interrupted. It was never acknowledged.
    pub torn: bool,
}

/// A record with an overlap above the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Raised {
    /// Its sequence number.
    pub seq: u64,
    /// Its overlap.
    pub overlap: u64,
    /// The overlap before it.
    pub before: u64,
}

/// What a disk's record says about its map file, and about the disk before the first record of that file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// Number of the disk.
    pub disk: u64,
    /// Generation.
    pub generation: u64,
    /// The file must be valid up to this byte.
    pub floor: u64,
    /// Size of the disk when it was created.
    pub size: u64,
    /// Overlap when the disk was created.
    pub overlap: u64,
    /// Last modification according to the record.
    pub modified_ns: i64,
}

/// Why a map file could not be replayed.
#[derive(Debug, Error)]
pub enum ReadError<E> {
    /// The file is damaged, or of a newer plyfs.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Its bytes could not be read.
    #[error("{0}")]
    Source(E),
}

/// The part of the file in memory: a large file is never in memory as a whole.
struct Window<F> {
    /// Fills a buffer from an offset; fewer bytes only at the end of the file.
    read: F,
    /// Bytes of the file.
    len: u64,
    bytes: Vec<u8>,
    /// Offset of `bytes` in the file.
    start: u64,
}

impl<E, F: FnMut(&mut [u8], u64) -> Result<usize, E>> Window<F> {
    fn new(read: F, len: u64) -> Self {
        Self { read, len, bytes: Vec::new(), start: 0 }
    }

    /// Up to `most` bytes at `at`, at most [`WINDOW`]; fewer only at the end of the file.
    fn get(&mut self, at: u64, most: u64) -> Result<&[u8], ReadError<E>> {
        let want = most.min(WINDOW).min(self.len.saturating_sub(at)) as usize;
        let has = self.bytes.len() as u64;
        if at < self.start || at + want as u64 > self.start + has {
            let wanted = WINDOW.min(self.len.saturating_sub(at)) as usize;
            self.bytes.resize(wanted, 0);
            self.start = at;
            let got = (self.read)(&mut self.bytes, at).map_err(ReadError::Source)?;
            if got < wanted {
                // The file was truncated meanwhile.
                self.bytes.truncate(got);
                self.len = at + got as u64;
            }
        }
        let from = (at - self.start) as usize;
        let to = (from + want).min(self.bytes.len());
        Ok(&self.bytes[from.min(to)..to])
    }

    /// The bytes in memory from `at`: at least a record's header, except at the end of the file.
    fn some(&mut self, at: u64) -> Result<&[u8], ReadError<E>> {
        let here = (self.start + self.bytes.len() as u64).saturating_sub(at);
        self.get(at, if at < self.start { RECORD_HEADER as u64 } else { here.max(RECORD_HEADER as u64) })
    }

    /// Exactly `n` bytes at `at`.
    fn exactly(&mut self, at: u64, n: usize) -> Result<&[u8], ReadError<E>> {
        let bytes = self.get(at, n as u64)?;
        let left = bytes.len();
        if left < n {
            let detail = format!("{n} bytes needed at {at}, {left} left");
            return Err(FormatError::new(Kind::Truncated, STRUCTURE, detail).into());
        }
        Ok(bytes)
    }

    /// The header at `at`, if it has the form of a record that ends within the file. Compares no checksum.
    fn head(&mut self, at: u64) -> Result<Option<Head>, ReadError<E>> {
        let len = self.len;
        let bytes = self.get(at, RECORD_HEADER as u64)?;
        if bytes.len() < RECORD_HEADER {
            return Ok(None);
        }
        let mut r = Reader::new(bytes, STRUCTURE);
        let (magic, zero, seq, payload) = (r.u32()?, r.u32()?, r.u64()?, r.u64()?);
        let (sum, reserved) = (r.u32()?, r.u32()?);
        let room = len.saturating_sub(at + RECORD_HEADER as u64);
        let is_record = magic == RECORD_MAGIC && zero == 0 && reserved == 0 && payload <= room;
        Ok((is_record && payload.is_multiple_of(8)).then_some(Head { seq, payload, sum }))
    }

    /// Whether the checksum of the record at `at` matches.
    fn is_whole(&mut self, at: u64, head: &Head, nonce: u64) -> Result<bool, ReadError<E>> {
        let mut sum = crc32c::crc32c(&nonce.to_le_bytes());
        sum = crc32c::crc32c_append(sum, self.exactly(at, CHECKED_HEAD)?);
        let (mut at, end) = (at + RECORD_HEADER as u64, at + head.len());
        while at < end {
            let bytes = self.get(at, end - at)?;
            if bytes.is_empty() {
                return Ok(false);
            }
            sum = crc32c::crc32c_append(sum, bytes);
            at += bytes.len() as u64;
        }
        Ok(sum == head.sum || Mutant::ChecksumIgnored.is_active())
    }
}

/// Header of a record.
struct Head {
    seq: u64,
    payload: u64,
    sum: u32,
}

impl Head {
    fn len(&self) -> u64 {
        RECORD_HEADER as u64 + self.payload
    }
}

fn impossible<E>(detail: impl Into<String>) -> ReadError<E> {
    FormatError::new(Kind::Value, "map record", detail).into()
}

/// Whether a word has a pair of bits 11, which is no state.
fn has_no_state(word: u64) -> bool {
    word & (word >> 1) & 0x5555_5555_5555_5555 != 0
}

impl Journal {
    /// As [`Journal::read`], from bytes in memory.
    ///
    /// # Errors
    /// As [`Journal::read`].
    pub fn decode(bytes: &[u8], expected: &Expected) -> Result<Self, FormatError> {
        let read = |buf: &mut [u8], at: u64| -> Result<usize, Infallible> {
            let rest = usize::try_from(at).ok().and_then(|at| bytes.get(at..)).unwrap_or_default();
            let n = rest.len().min(buf.len());
            buf[..n].copy_from_slice(&rest[..n]);
            Ok(n)
        };
        Self::read(read, bytes.len() as u64, expected).map_err(|error| match error {
            ReadError::Format(error) => error,
            ReadError::Source(never) => match never {},
        })
    }

    /// Replays a map file of `len` bytes. `read` fills a buffer from an offset, with fewer bytes only at the end of the
    /// file. The length of the file bounds memory and time.
    ///
    /// A damaged record is an error when a valid record follows it or when it lies below the floor: it was
    /// acknowledged. Otherwise an interrupted flush begins at the first damaged record.
    ///
    /// # Errors
    /// `Format` for damage, `Source` when `read` fails.
    pub fn read<E>(
        read: impl FnMut(&mut [u8], u64) -> Result<usize, E>,
        len: u64,
        expected: &Expected,
    ) -> Result<Self, ReadError<E>> {
        let fail = |kind, detail| Err(FormatError::new(kind, STRUCTURE, detail).into());
        if len > LARGEST_MAP_FILE {
            return fail(Kind::Value, format!("{len} bytes, but at most {LARGEST_MAP_FILE} are possible"));
        }
        let mut file = Window::new(read, len);
        let header = MapHeader::decode(file.get(0, HEADER as u64)?)?;
        if (header.disk, header.generation) != (expected.disk, expected.generation) {
            return fail(
                Kind::Value,
                format!(
                    "it is generation {} of disk number {}, not generation {} of disk number {}",
                    header.generation, header.disk, expected.generation, expected.disk
                ),
            );
        }
        let mut out = Self {
            header,
            records: 0,
            map: Replay::default(),
            size: expected.size,
            overlap: expected.overlap,
            modified_ns: expected.modified_ns,
            raised: None,
            end: HEADER as u64,
            next_seq: 1,
            torn: false,
        };
        while let Some(head) = file.head(out.end)? {
            if head.seq != out.next_seq || !file.is_whole(out.end, &head, header.nonce)? {
                break;
            }
            out.replay(&mut file, &head)?;
            out.records += 1;
            out.next_seq += 1;
            out.end += head.len();
        }
        if out.end < expected.floor {
            let kind = if file.len < expected.floor { Kind::Truncated } else { Kind::Checksum };
            let (end, floor) = (out.end, expected.floor);
            return fail(
                kind,
                format!(
                    "damaged at byte {end}, but the file was complete up to byte {floor} when it was last closed"
                ),
            );
        }
        out.tail(&mut file)?;
        Ok(out)
    }

    /// Applies the record at `self.end`, whose checksum matches.
    fn replay<E, F: FnMut(&mut [u8], u64) -> Result<usize, E>>(
        &mut self,
        file: &mut Window<F>,
        head: &Head,
    ) -> Result<(), ReadError<E>> {
        let (mut at, end) = (self.end + RECORD_HEADER as u64, self.end + head.len());
        let payload_ends = || impossible("a run is longer than its record");
        if head.payload < PAYLOAD_HEAD as u64 {
            return Err(payload_ends());
        }
        let mut r = Reader::new(file.exactly(at, PAYLOAD_HEAD)?, "map record");
        let (size, overlap, modified_ns) = (r.u64()?, r.u64()?, r.i64()?);
        let (runs, reserved) = (r.u32()?, r.u32()?);
        if size > MAX_DISK_SIZE || overlap > size || reserved != 0 {
            return Err(impossible(format!("size {size}, overlap {overlap}")));
        }
        at += PAYLOAD_HEAD as u64;
        // Words past the size are cleared below, so they are not even set.
        let keep = size.div_ceil(BLOCK).div_ceil(WORD_BLOCKS);
        let mut behind = 0;
        for _ in 0..runs {
            if end - at < RUN_HEAD as u64 {
                return Err(payload_ends());
            }
            let mut r = Reader::new(file.exactly(at, RUN_HEAD)?, "map record");
            let (first, len, kind) = (r.u64()?, r.u64()?, r.u64()?);
            at += RUN_HEAD as u64;
            let Some(last) = first.checked_add(len).filter(|last| *last <= MAX_WORDS && len > 0) else {
                return Err(impossible(format!(
                    "run of {len} words at {first} is outside of the largest disk"
                )));
            };
            if first < behind {
                return Err(impossible(format!("run at word {first} follows one that ends at {behind}")));
            }
            behind = last;
            let mut set = |first: u64, words: Words<'_>| {
                let room = keep.saturating_sub(first);
                match words {
                    Words::Same(len, value) => self.map.set(first, Words::Same(len.min(room), value)),
                    Words::Each(words) => {
                        self.map.set(first, Words::Each(&words[..words.len().min(room as usize)]));
                    }
                }
            };
            match kind {
                1 if end - at >= 8 => {
                    let value = Reader::new(file.exactly(at, 8)?, "map record").u64()?;
                    if has_no_state(value) {
                        return Err(impossible("a block has a state that does not exist"));
                    }
                    set(first, Words::Same(len, value));
                    at += 8;
                }
                0 if len <= (end - at) / 8 => {
                    let mut word = first;
                    while word < last {
                        let n = (last - word).min(PIECE as u64) as usize;
                        let mut words = [0; PIECE];
                        let bytes = file.exactly(at, n * 8)?;
                        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
                            *word = Reader::new(bytes, "map record").u64()?;
                        }
                        if words.iter().any(|word| has_no_state(*word)) {
                            return Err(impossible("a block has a state that does not exist"));
                        }
                        set(word, Words::Each(&words[..n]));
                        at += n as u64 * 8;
                        word += n as u64;
                    }
                }
                0 | 1 => return Err(payload_ends()),
                other => return Err(impossible(format!("run type {other} is not known"))),
            }
        }
        if at != end {
            return Err(impossible(format!("{} bytes too many", end - at)));
        }
        if overlap > self.overlap && self.raised.is_none() {
            self.raised = Some(Raised { seq: head.seq, overlap, before: self.overlap });
        }
        if size < self.size || runs > 0 {
            self.map.clear_from(size.div_ceil(BLOCK));
        }
        (self.size, self.overlap) = (size, overlap);
        self.modified_ns = self.modified_ns.max(modified_ns);
        Ok(())
    }

    /// Classifies the bytes past the last valid record: zeros, the torn tail of a flush, or damage.
    fn tail<E, F: FnMut(&mut [u8], u64) -> Result<usize, E>>(
        &mut self,
        file: &mut Window<F>,
    ) -> Result<(), ReadError<E>> {
        // A candidate record is summed up to its claimed end. No map word has the bits of a record's magic, so there
        // are few candidates. Many of them would take time quadratic in the length of the file.
        let mut budget = 2 * file.len.saturating_sub(self.end) + (1 << 20);
        let mut at = self.end;
        loop {
            let bytes = file.some(at)?;
            if bytes.is_empty() {
                return Ok(());
            }
            let len = bytes.len();
            let Some(skip) = bytes.iter().position(|b| *b != 0) else {
                at += len as u64;
                continue;
            };
            self.torn = true;
            // Records begin at multiples of 8 bytes from the end of the last one.
            let here = at + skip as u64;
            at = here - (here - self.end) % 8;
            let Some(head) = file.head(at)?.filter(|head| head.seq >= self.next_seq) else {
                at += 8;
                continue;
            };
            let damaged = |detail: String| Err(FormatError::new(Kind::Checksum, STRUCTURE, detail).into());
            if head.len() > budget {
                return damaged(format!(
                    "damaged at byte {}, and too much of the rest looks like a record",
                    self.end
                ));
            }
            budget -= head.len();
            if file.is_whole(at, &head, self.header.nonce)? {
                return damaged(format!("damaged at byte {}, a complete record follows at {at}", self.end));
            }
            at += 8;
        }
    }
}
