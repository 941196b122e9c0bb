//! The two files of a cached source: its blocks at the source's own offsets, and their checksums (sums).

use std::io;
use std::sync::Arc;

use super::index::{Index, Piece};
use super::{DIR, SourceKey};
use crate::format::FormatError;
use crate::format::cache::{
    Ages, CACHE_BLOCK, CacheHeader, DecodedHeader, HEADER_AREA, SLOT, SLOT_BLOCKS, SUMS_AT, decode_slot,
    encode_ages, encode_slot, slot_place,
};
use crate::format::layout::{BLOCKS_SUFFIX, INHERITED, PROOF_SUFFIX, SUMS_SUFFIX};
use crate::io::{Medium, MediumFile, Open};

/// Slots that one read reads.
const BATCH: u64 = 1024;

/// The open files of a source.
pub(super) struct Opened {
    pub blocks: Arc<dyn MediumFile>,
    pub sums: Arc<dyn MediumFile>,
}

/// The kind of a file in the cache's directory, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileKind {
    Blocks(SourceKey),
    Sums(SourceKey),
    /// Pages of a proof.
    Proof(SourceKey),
    /// The list of inherited bases; it belongs to no source.
    Inherited,
}

pub(super) fn file_kind(name: &str) -> Option<FileKind> {
    if name == INHERITED {
        return Some(FileKind::Inherited);
    }
    if let Some(hex) = name.strip_suffix(BLOCKS_SUFFIX) {
        return SourceKey::from_hex(hex).map(FileKind::Blocks);
    }
    if let Some(hex) = name.strip_suffix(PROOF_SUFFIX) {
        return SourceKey::from_hex(hex).map(FileKind::Proof);
    }
    SourceKey::from_hex(name.strip_suffix(SUMS_SUFFIX)?).map(FileKind::Sums)
}

pub(super) fn blocks_name(key: &SourceKey) -> String {
    format!("{DIR}/{key}{BLOCKS_SUFFIX}")
}

pub(super) fn sums_name(key: &SourceKey) -> String {
    format!("{DIR}/{key}{SUMS_SUFFIX}")
}

/// The number of chunks of a source of `size` bytes.
pub(super) fn chunks_of(size: u64) -> u64 {
    size.div_ceil(CACHE_BLOCK).div_ceil(SLOT_BLOCKS)
}

/// Removes the names of both files. The sums go first: blocks without sums are useless, and the next start removes them.
pub(super) fn remove(medium: &dyn Medium, key: &SourceKey) -> io::Result<()> {
    for name in [sums_name(key), blocks_name(key)] {
        match medium.remove(&name) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// Reads only from the page cache, without any disk I/O.
fn read_now(file: &dyn MediumFile, buf: &mut [u8], offset: u64) -> Option<usize> {
    if !file.is_in_memory(offset, buf.len() as u64) {
        return None;
    }
    file.read_now(buf, offset).ok()?
}

impl Opened {
    /// Reads the blocks' file if that does not wait for the disk.
    pub fn read_blocks_now(&self, buf: &mut [u8], offset: u64) -> Option<usize> {
        read_now(&*self.blocks, buf, offset)
    }

    /// Creates empty files with this header. After an error there are none, as far as they can be removed.
    pub fn create(medium: &dyn Medium, header: &mut CacheHeader) -> io::Result<Self> {
        medium.make_dir(DIR)?;
        let key = SourceKey(header.key);
        // Remove first, so that a reader with open files of these names goes on with the old ones.
        remove(medium, &key)?;
        Self::create_new(medium, header, &key).inspect_err(|_| _ = remove(medium, &key))
    }

    fn create_new(medium: &dyn Medium, header: &mut CacheHeader, key: &SourceKey) -> io::Result<Self> {
        let sums = medium.open(&sums_name(key), Open::Create)?;
        sums.set_len(0)?;
        let blocks = medium.open(&blocks_name(key), Open::Create)?;
        blocks.set_len(0)?;
        let files = Self { blocks, sums };
        header.direct = true;
        for _ in 0..2 {
            files.write_copy(header)?;
        }
        sums_area(&files)?;
        Ok(files)
    }

    /// Opens existing files, for a check.
    pub fn open(medium: &dyn Medium, key: &SourceKey, how: Open) -> io::Result<Self> {
        let sums = medium.open(&sums_name(key), how)?;
        let blocks = medium.open(&blocks_name(key), how)?;
        Ok(Self { blocks, sums })
    }

    /// The header, or how it is damaged.
    ///
    /// # Errors
    /// When the header cannot be read. Then it is unknown whether it is damaged.
    pub fn header(&self) -> io::Result<Result<DecodedHeader, FormatError>> {
        let mut area = vec![0; HEADER_AREA as usize];
        let got = self.sums.read_at(&mut area, 0)?;
        Ok(CacheHeader::decode(&area[..got]))
    }

    /// Replaces the older copy of the header. The caller syncs later.
    pub fn write_copy(&self, header: &mut CacheHeader) -> io::Result<()> {
        header.sequence += 1;
        self.sums.write_at(&header.encode(), CacheHeader::place(header.sequence))
    }

    /// Replaces both copies of the header durably. One of them is sound at any time.
    pub fn write_header(&self, header: &mut CacheHeader) -> io::Result<()> {
        for _ in 0..2 {
            self.write_copy(header)?;
            self.sums.sync_data()?;
        }
        Ok(())
    }

    /// As [`read_sums`](Self::read_sums), if that does not wait for the disk.
    pub fn read_sums_now(&self, pieces: &[Piece]) -> Option<Vec<u64>> {
        let mut out = Vec::with_capacity(pieces.iter().map(|p| p.blocks as usize).sum());
        let mut bytes = [0; (SLOT_BLOCKS * 8) as usize];
        for piece in pieces {
            let bytes = &mut bytes[..(piece.blocks * 8) as usize];
            if read_now(&*self.sums, bytes, sum_place(piece))? != bytes.len() {
                return None;
            }
            out.extend(bytes.as_chunks().0.iter().map(|b| u64::from_le_bytes(*b)));
        }
        Some(out)
    }

    /// Reads the sums of blocks, in the order of the pieces.
    pub fn read_sums(&self, pieces: &[Piece]) -> io::Result<Vec<u64>> {
        let mut out = Vec::with_capacity(pieces.iter().map(|p| p.blocks as usize).sum());
        let mut bytes = [0; (SLOT_BLOCKS * 8) as usize];
        for piece in pieces {
            let bytes = &mut bytes[..(piece.blocks * 8) as usize];
            bytes.fill(0);
            self.sums.read_at(bytes, sum_place(piece))?;
            out.extend(bytes.as_chunks().0.iter().map(|b| u64::from_le_bytes(*b)));
        }
        Ok(out)
    }

    /// Writes the sums of blocks into the slot of their chunk; 0 for blocks that are dropped.
    pub fn write_sums(&self, piece: &Piece, sums: &[u64]) -> io::Result<()> {
        let bytes: Vec<u8> = sums.iter().flat_map(|sum| sum.to_le_bytes()).collect();
        self.sums.write_at(&bytes, sum_place(piece))
    }

    /// Writes a new slot for a chunk that has none.
    pub fn write_slot(
        &self,
        key: &SourceKey,
        chunk: u64,
        piece: &Piece,
        ages: &Ages,
        sums: &[u64],
    ) -> io::Result<()> {
        let mut all = [0; SLOT_BLOCKS as usize];
        all[piece.at as usize..(piece.at + piece.blocks) as usize].copy_from_slice(sums);
        self.sums.write_at(&encode_slot(&key.0, piece.slot, chunk, ages, &all), slot_place(piece.slot))
    }

    /// Moves the contents of slot `from` to the place of its chunk.
    pub fn move_slot(&self, key: &SourceKey, (from, chunk): (u32, u32), bytes: &[u8]) -> io::Result<()> {
        let slot = decode_slot(&key.0, from, bytes).map_err(io::Error::other)?;
        let ages = slot.ages.unwrap_or(Ages { base: 0, ages: [0; SLOT_BLOCKS as usize] });
        let bytes = encode_slot(&key.0, chunk, chunk.into(), &ages, &slot.sums);
        self.sums.write_at(&bytes, slot_place(chunk))
    }

    pub fn write_ages(&self, key: &SourceKey, slot: u32, chunk: u32, ages: &Ages) -> io::Result<()> {
        let place = slot_place(slot) + crate::format::cache::AGES_AT;
        self.sums.write_at(&encode_ages(&key.0, chunk.into(), ages), place)
    }

    /// Fills `index` from the file. Returns the number of reads that failed; the blocks of those slots count as missing.
    pub fn load(&self, header: &CacheHeader, index: &mut Index) -> io::Result<u64> {
        let (blocks, chunks) = (header.size.div_ceil(CACHE_BLOCK), chunks_of(header.size));
        let slots = self.sums.len()?.saturating_sub(HEADER_AREA) / SLOT;
        // Each chunk has one slot; failed reads may have cost some more. More slots than this are not genuine.
        let slots = slots.min(2 * chunks + 64);
        let mut bytes = vec![0; (BATCH.min(slots) * SLOT) as usize];
        let (mut first, mut errors) = (0, 0);
        while first < slots {
            let count = BATCH.min(slots - first);
            let bytes = &mut bytes[..(count * SLOT) as usize];
            let got = match self.sums.read_at(bytes, slot_place(first as u32)) {
                Ok(got) => got,
                Err(_) => {
                    // The slots of this part stay unused until the file is written anew.
                    errors += 1;
                    index.skip_slots((first + count) as u32);
                    0
                }
            };
            for (slot, bytes) in (first as u32..).zip(bytes[..got].chunks_exact(SLOT as usize)) {
                let Ok(found) = decode_slot(&header.key, slot, bytes) else { continue };
                let mut present = 0;
                for (at, sum) in found.sums.iter().enumerate() {
                    present |= u64::from(*sum != 0) << at;
                }
                let chunk = found.chunk.filter(|chunk| *chunk < chunks);
                present &= super::index::mask(0, chunk.map_or(0, |c| blocks - c * SLOT_BLOCKS));
                let known = match chunk.filter(|_| present != 0) {
                    Some(chunk) => index.add_found(chunk as u32, slot, present, found.ages),
                    None => false,
                };
                if !known {
                    index.add_free_slot(slot);
                }
            }
            first += count;
        }
        Ok(errors)
    }
}

/// Extends the file to the end of its header area. A shorter file was truncated.
fn sums_area(files: &Opened) -> io::Result<()> {
    files.sums.set_len(HEADER_AREA)
}

fn sum_place(piece: &Piece) -> u64 {
    slot_place(piece.slot) + SUMS_AT + piece.at * 8
}
