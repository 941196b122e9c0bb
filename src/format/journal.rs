//! The map file: a header, then records that each carry the state of one flush (docs/format.md, "Map file").
//!
//! A record says that the data file was synced before it, or carries the blocks that a reader puts into the data file. So
//! what must hold: only the blocks carried since the last record of the first kind count (D96).

mod window;

use std::collections::BTreeMap;
use std::convert::Infallible;

use thiserror::Error;

use self::window::{Head, RecordHead, Window};
use super::codec::{FormatError, Kind, Reader, Writer};
use super::replay::{Replay, Words};
use super::{BLOCK, MAX_DISK_SIZE};
use crate::mutant::{Mutant, limit};

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
/// Bytes of the file between two places that a reader notes, to find the records from the last one to the first.
const PART: u64 = 1 << 20;
/// Most blocks that a record carries.
pub const MOST_CARRIED: usize = 16;
/// Bytes of a carried block: its number, and its bytes as they are stored in the data file.
const CARRIED: usize = 8 + BLOCK as usize;
/// Incompatible feature of a map file: its records may carry blocks.
const CARRIES: u64 = 1;
/// Flag of a record: it carries blocks, and the data file was not synced for it.
const CARRYING: u32 = 1;

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
    /// Whether records may carry blocks.
    pub carries: bool,
}

impl MapHeader {
    /// The first [`HEADER`] bytes of the file.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        let incompatible = if self.carries { CARRIES } else { 0 };
        w.raw(MAGIC).u16(VERSION).u16(0).u64(incompatible); // 0: reserved
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
        if version == 0 || version > VERSION || incompatible & !CARRIES != 0 {
            return fail(
                Kind::Newer,
                format!("version {version}, features {incompatible:#x}; use a newer plyfs"),
            );
        }
        let carries = incompatible & CARRIES != 0;
        Ok(Self { disk: r.u64()?, generation: r.u64()?, nonce: r.u64()?, carries })
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
    /// `None`: the data file was synced before the record was written.
    pub carried: Option<Carried>,
}

/// The blocks that a record carries, ascending; all of each lies below the size of the disk.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Carried {
    /// Numbers of the blocks.
    pub blocks: Vec<u64>,
    /// Their bytes, as they are stored in the data file.
    pub bytes: Vec<u8>,
}

impl Carried {
    /// Whether bytes of a block can be carried: nothing in them looks like the beginning of a record, so that what
    /// follows a torn record is told apart at once.
    pub fn may_carry(block: &[u8]) -> bool {
        block.chunks_exact(8).all(|bytes| bytes[..4] != RECORD_MAGIC.to_le_bytes())
    }

    /// Where the bytes of each block lie in a file in which the record that carries them ends at `end`.
    pub fn places(&self, end: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let from = end - (self.blocks.len() * CARRIED) as u64 + 8;
        (0..).zip(&self.blocks).map(move |(n, block)| (*block, from + n * CARRIED as u64))
    }
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
        p.u32(if self.carried.is_some() { CARRYING } else { 0 });
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
        if let Some(carried) = &self.carried {
            p.u64(carried.blocks.len() as u64);
            for (block, bytes) in carried.blocks.iter().zip(carried.bytes.chunks_exact(BLOCK as usize)) {
                p.u64(*block).raw(bytes);
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

/// What the words of the records of a map file go to, in the order of the file.
pub trait WordSink: Default {
    /// Sets the words from `first` on.
    fn set(&mut self, first: u64, words: Words<'_>);
    /// Clears the blocks from `block` on.
    fn clear_from(&mut self, block: u64);
}

/// The words are not kept.
impl WordSink for () {
    fn set(&mut self, _: u64, _: Words<'_>) {}
    fn clear_from(&mut self, _: u64) {}
}

impl WordSink for Replay {
    fn set(&mut self, first: u64, words: Words<'_>) {
        self.set(first, words);
    }
    fn clear_from(&mut self, block: u64) {
        self.clear_from(block);
    }
}

/// The contents of a map file. Without a map (`M` is `()`) its memory is bounded, whatever the length of the file.
#[derive(Debug)]
pub struct Journal<M = Replay> {
    /// Its header.
    pub header: MapHeader,
    /// Number of valid records.
    pub records: u64,
    /// The map after the last record.
    pub map: M,
    /// Size of the disk after the last record.
    pub size: u64,
    /// Overlap after the last record.
    pub overlap: u64,
    /// The latest modification time in any record.
    pub modified_ns: i64,
    /// Blocks that were carried since the data file was synced last, and where their latest bytes lie in this file. The
    /// data file may lack the bytes of those that are `Data`.
    pub carried: BTreeMap<u64, u64>,
    /// Bytes of the records that carry blocks.
    pub carrying: u64,
    /// The first record with an overlap above the one before it. No plyfs writes such a record.
    pub raised: Option<Raised>,
    /// Offset of the last valid record.
    pub last: u64,
    /// Offset of the end of the last valid record.
    pub end: u64,
    /// Sequence number of the next record.
    pub next_seq: u64,
    /// Whether bytes past `end` are not zero: a flush was interrupted. It was never acknowledged.
    pub torn: bool,
    /// Length of the first part of the file, in which no word is before an earlier one: as long as the file was when it
    /// was written anew, unless later records only went on behind it.
    pub ordered_len: u64,
    /// No record of that part has a word from here on; `None` behind it.
    ordered_to: Option<u64>,
    /// Where parts of the file begin, each with a number of records.
    parts: Vec<u64>,
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

    /// As [`Journal::read_with`], with the map.
    ///
    /// # Errors
    /// As [`Journal::read_with`].
    pub fn read<E>(
        read: impl FnMut(&mut [u8], u64) -> Result<usize, E>,
        len: u64,
        expected: &Expected,
    ) -> Result<Self, ReadError<E>> {
        Self::read_with(read, len, expected)
    }
}

impl Journal {
    /// The carried blocks that are `Data`, and where their bytes lie in this file.
    pub fn carried_data(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let data = |block: &u64| self.map.state(*block) == Some(State::Data);
        self.carried.iter().filter(move |(block, _)| data(block)).map(|(block, at)| (*block, *at))
    }

    /// The block after the last one whose bytes must be in the data file; 0 when there is none.
    pub fn data_end(&self) -> u64 {
        let mut end = self.map.data_end();
        while end > 0 && self.carried.contains_key(&(end - 1)) {
            end = self.map.data_end_before(end - 1);
        }
        end
    }
}

impl<M: WordSink> Journal<M> {
    /// Replays a map file of `len` bytes. `read` fills a buffer from an offset, with fewer bytes only at the end of the
    /// file. The length of the file bounds memory and time.
    ///
    /// A damaged record is an error when a valid record follows it or when it lies below the floor: it was
    /// acknowledged. Otherwise an interrupted flush begins at the first damaged record.
    ///
    /// # Errors
    /// `Format` for damage, `Source` when `read` fails.
    pub fn read_with<E>(
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
            map: M::default(),
            size: expected.size,
            overlap: expected.overlap,
            modified_ns: expected.modified_ns,
            carried: BTreeMap::new(),
            carrying: 0,
            raised: None,
            last: HEADER as u64,
            end: HEADER as u64,
            next_seq: 1,
            torn: false,
            ordered_len: HEADER as u64,
            ordered_to: Some(0),
            parts: Vec::new(),
        };
        while let Some(head) = file.head(out.end)? {
            if head.seq != out.next_seq || !file.is_whole(out.end, &head, header.nonce)? {
                break;
            }
            if out.parts.last().is_none_or(|begin| out.end - begin >= limit(PART, 300)) {
                out.parts.push(out.end);
            }
            out.replay(&mut file, &head)?;
            out.records += 1;
            out.next_seq += 1;
            out.last = out.end;
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
        // Words past the size are cleared below, so they are not even set.
        let set = |first: u64, words: Words<'_>| {
            self.map.set(first, words);
            Ok(())
        };
        let record = file.record(self.end, head, (u64::MAX, self.header.carries), set)?;
        let RecordHead { size, overlap, modified_ns, words, carried } = record;
        let carries = carried.is_some();
        match carried {
            None if Mutant::CarriedOutlivesSync.is_active() => {}
            None => self.carried.clear(),
            Some(blocks) => {
                self.carried.extend(blocks);
                self.carrying += head.len();
            }
        }
        if overlap > self.overlap && self.raised.is_none() {
            self.raised = Some(Raised { seq: head.seq, overlap, before: self.overlap });
        }
        if size < self.size || words.is_some() {
            self.map.clear_from(size.div_ceil(BLOCK));
        }
        (self.size, self.overlap) = (size, overlap);
        self.modified_ns = self.modified_ns.max(modified_ns);
        let goes_on = |end: u64| words.is_none_or(|(first, _)| first >= end);
        self.ordered_to =
            self.ordered_to.filter(|end| goes_on(*end) && (words.is_some() || self.records == 0) && !carries);
        if let Some(end) = &mut self.ordered_to {
            *end = words.map_or(*end, |(_, last)| last);
            self.ordered_len = self.end + head.len();
        }
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

    /// Reads the words of the records again, from the last record to the first. So the first value of a word that `set`
    /// gets is the word of the map, and later ones are outdated. Words that `set` does not get are 0. Memory is bounded:
    /// the heads of the records in a MiB of the file.
    ///
    /// # Errors
    /// `Format` when the file is not what was read before, `Source` when `read` or `set` fails.
    pub fn words_backwards<E>(
        &self,
        read: impl FnMut(&mut [u8], u64) -> Result<usize, E>,
        mut set: impl FnMut(u64, Words<'_>) -> Result<(), E>,
    ) -> Result<(), ReadError<E>> {
        let mut file = Window::new(read, self.end);
        let changed = |at: u64| {
            FormatError::new(Kind::Checksum, STRUCTURE, format!("it changed at byte {at} while it was read"))
        };
        // Whatever an earlier record says of blocks above the size in a later one, they are unmapped.
        let mut below = u64::MAX;
        let mut end = self.end;
        for begin in self.parts.iter().copied().rev() {
            let (mut heads, mut at) = (Vec::new(), begin);
            let behind = std::mem::replace(&mut end, begin);
            while at < behind {
                let head = file.head(at)?.ok_or_else(|| changed(at))?;
                let next = at + head.len();
                heads.push((at, head));
                at = next;
            }
            // Those before the last one, which alone may be longer than a part, take less than a part.
            let mut rest = heads.last().map(|(last, _)| last - begin);
            for (number, (at, head)) in heads.iter().enumerate().rev() {
                let at = *at;
                if number + 1 < heads.len()
                    && let Some(len) = rest.take()
                {
                    file.hold(begin, len)?;
                }
                if !file.is_whole(at, head, self.header.nonce)? {
                    return Err(changed(at).into());
                }
                let size = Reader::new(file.exactly(at + RECORD_HEADER as u64, 8)?, "map record").u64()?;
                below = below.min(size.div_ceil(BLOCK));
                let (last, mask) = (below / WORD_BLOCKS, (1u64 << (2 * (below % WORD_BLOCKS))) - 1);
                file.record(at, head, (below, self.header.carries), |first, words| {
                    let count = match words {
                        Words::Same(count, _) => count,
                        Words::Each(words) => words.len() as u64,
                    };
                    // The word with blocks on both sides of the size.
                    if count == 0 || first + count <= last {
                        return set(first, words);
                    }
                    let value = match words {
                        Words::Same(_, value) => {
                            set(first, Words::Same(count - 1, value))?;
                            value
                        }
                        Words::Each(words) => {
                            let (rest, value) = words.split_at(words.len() - 1);
                            set(first, Words::Each(rest))?;
                            value[0]
                        }
                    };
                    set(last, Words::Same(1, value & mask))
                })?;
            }
        }
        Ok(())
    }
}
