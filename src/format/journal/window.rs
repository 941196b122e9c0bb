//! Reads a map file through a window of bounded size: heads of records, their checksums, their words.

use super::{
    CARRIED, CARRYING, CHECKED_HEAD, MAX_WORDS, MOST_CARRIED, PAYLOAD_HEAD, PIECE, RECORD_HEADER,
    RECORD_MAGIC, RUN_HEAD, ReadError, STRUCTURE, WINDOW, WORD_BLOCKS,
};
use crate::format::codec::{FormatError, Kind, Reader};
use crate::format::replay::Words;
use crate::format::{BLOCK, MAX_DISK_SIZE};
use crate::mutant::Mutant;

/// The part of the file in memory: a large file is never in memory as a whole.
pub(super) struct Window<F> {
    /// Fills a buffer from an offset; fewer bytes only at the end of the file.
    read: F,
    /// Bytes of the file.
    pub(super) len: u64,
    bytes: Vec<u8>,
    /// Offset of `bytes` in the file.
    start: u64,
}

impl<E, F: FnMut(&mut [u8], u64) -> Result<usize, E>> Window<F> {
    pub(super) fn new(read: F, len: u64) -> Self {
        Self { read, len, bytes: Vec::new(), start: 0 }
    }

    /// Up to `most` bytes at `at`, at most [`WINDOW`]; fewer only at the end of the file.
    pub(super) fn get(&mut self, at: u64, most: u64) -> Result<&[u8], ReadError<E>> {
        let want = most.min(WINDOW).min(self.len.saturating_sub(at)) as usize;
        let has = self.bytes.len() as u64;
        if at < self.start || at + want as u64 > self.start + has {
            self.hold(at, WINDOW)?;
        }
        let from = (at - self.start) as usize;
        let to = (from + want).min(self.bytes.len());
        Ok(&self.bytes[from.min(to)..to])
    }

    /// Reads `len` bytes at `at`, to get parts of them in any order.
    pub(super) fn hold(&mut self, at: u64, len: u64) -> Result<(), ReadError<E>> {
        let wanted = len.min(self.len.saturating_sub(at)) as usize;
        self.bytes.resize(wanted, 0);
        self.start = at;
        let got = (self.read)(&mut self.bytes, at).map_err(ReadError::Source)?;
        if got < wanted {
            // The file was truncated meanwhile.
            self.bytes.truncate(got);
            self.len = at + got as u64;
        }
        Ok(())
    }

    /// The bytes in memory from `at`: at least a record's header, except at the end of the file.
    pub(super) fn some(&mut self, at: u64) -> Result<&[u8], ReadError<E>> {
        let here = (self.start + self.bytes.len() as u64).saturating_sub(at);
        self.get(at, if at < self.start { RECORD_HEADER as u64 } else { here.max(RECORD_HEADER as u64) })
    }

    /// Exactly `n` bytes at `at`.
    pub(super) fn exactly(&mut self, at: u64, n: usize) -> Result<&[u8], ReadError<E>> {
        let bytes = self.get(at, n as u64)?;
        let left = bytes.len();
        if left < n {
            let detail = format!("{n} bytes needed at {at}, {left} left");
            return Err(FormatError::new(Kind::Truncated, STRUCTURE, detail).into());
        }
        Ok(bytes)
    }

    /// The header at `at`, if it has the form of a record that ends within the file. Compares no checksum.
    pub(super) fn head(&mut self, at: u64) -> Result<Option<Head>, ReadError<E>> {
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
    pub(super) fn is_whole(&mut self, at: u64, head: &Head, nonce: u64) -> Result<bool, ReadError<E>> {
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

/// The part of a record before its words.
pub(super) struct RecordHead {
    pub(super) size: u64,
    pub(super) overlap: u64,
    pub(super) modified_ns: i64,
    /// The first word, and the one behind the last; `None` without words.
    pub(super) words: Option<(u64, u64)>,
    /// The blocks that it carries, and where in the file their bytes are; `None` of a record before which the data file
    /// was synced.
    pub(super) carried: Option<Vec<(u64, u64)>>,
}

impl<E, F: FnMut(&mut [u8], u64) -> Result<usize, E>> Window<F> {
    /// Reads the record at `at`, whose checksum matches. Gives its words to `set`, without those of blocks from `limit`
    /// on, and from the record's own size on. `carries`: whether records of the file may carry blocks.
    pub(super) fn record(
        &mut self,
        at: u64,
        head: &Head,
        (limit, carries): (u64, bool),
        mut set: impl FnMut(u64, Words<'_>) -> Result<(), E>,
    ) -> Result<RecordHead, ReadError<E>> {
        let (mut at, end) = (at + RECORD_HEADER as u64, at + head.len());
        let payload_ends = || impossible("a run is longer than its record");
        if head.payload < PAYLOAD_HEAD as u64 {
            return Err(payload_ends());
        }
        let mut r = Reader::new(self.exactly(at, PAYLOAD_HEAD)?, "map record");
        let (size, overlap, modified_ns) = (r.u64()?, r.u64()?, r.i64()?);
        let (runs, flags) = (r.u32()?, r.u32()?);
        let known = if carries { CARRYING } else { 0 };
        if size > MAX_DISK_SIZE || overlap > size || flags & !known != 0 {
            return Err(impossible(format!("size {size}, overlap {overlap}, flags {flags:#x}")));
        }
        at += PAYLOAD_HEAD as u64;
        let keep = size.div_ceil(BLOCK).min(limit).div_ceil(WORD_BLOCKS);
        let (mut before, mut behind) = (None, 0);
        for _ in 0..runs {
            if end - at < RUN_HEAD as u64 {
                return Err(payload_ends());
            }
            let mut r = Reader::new(self.exactly(at, RUN_HEAD)?, "map record");
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
            before = before.or(Some(first));
            behind = last;
            let mut set = |first: u64, words: Words<'_>| {
                let room = keep.saturating_sub(first);
                match words {
                    Words::Same(len, value) => set(first, Words::Same(len.min(room), value)),
                    Words::Each(words) => set(first, Words::Each(&words[..words.len().min(room as usize)])),
                }
                .map_err(ReadError::Source)
            };
            match kind {
                1 if end - at >= 8 => {
                    let value = Reader::new(self.exactly(at, 8)?, "map record").u64()?;
                    if has_no_state(value) {
                        return Err(impossible("a block has a state that does not exist"));
                    }
                    set(first, Words::Same(len, value))?;
                    at += 8;
                }
                0 if len <= (end - at) / 8 => {
                    let mut word = first;
                    while word < last {
                        let n = (last - word).min(PIECE as u64) as usize;
                        let mut words = [0; PIECE];
                        let bytes = self.exactly(at, n * 8)?;
                        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
                            *word = Reader::new(bytes, "map record").u64()?;
                        }
                        if words.iter().any(|word| has_no_state(*word)) {
                            return Err(impossible("a block has a state that does not exist"));
                        }
                        set(word, Words::Each(&words[..n]))?;
                        at += n as u64 * 8;
                        word += n as u64;
                    }
                }
                0 | 1 => return Err(payload_ends()),
                other => return Err(impossible(format!("run type {other} is not known"))),
            }
        }
        let mut carried = None;
        if flags & CARRYING != 0 {
            carried = Some(self.carried((at, end), size)?);
            at = end;
        }
        if at != end {
            return Err(impossible(format!("{} bytes too many", end - at)));
        }
        let words = before.map(|first| (first, behind));
        Ok(RecordHead { size, overlap, modified_ns, words, carried })
    }

    /// The blocks that a record of a disk of `size` bytes carries from `at` to `end`, and where their bytes are.
    fn carried(&mut self, (mut at, end): (u64, u64), size: u64) -> Result<Vec<(u64, u64)>, ReadError<E>> {
        if end - at < 8 {
            return Err(impossible("a record ends before what it carries"));
        }
        let count = Reader::new(self.exactly(at, 8)?, "map record").u64()?;
        at += 8;
        if count > MOST_CARRIED as u64 || count * CARRIED as u64 != end - at {
            return Err(impossible(format!("{count} carried blocks in {} bytes", end - at)));
        }
        let (mut blocks, mut behind) = (Vec::new(), 0);
        for _ in 0..count {
            let block = Reader::new(self.exactly(at, 8)?, "map record").u64()?;
            if block < behind || block >= size / BLOCK {
                return Err(impossible(format!("carried block {block} after {behind}, size {size}")));
            }
            behind = block + 1;
            blocks.push((block, at + 8));
            at += CARRIED as u64;
        }
        Ok(blocks)
    }
}

/// Header of a record.
pub(super) struct Head {
    pub(super) seq: u64,
    payload: u64,
    sum: u32,
}

impl Head {
    pub(super) fn len(&self) -> u64 {
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
