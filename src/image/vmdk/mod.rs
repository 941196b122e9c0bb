//! VMDK in one file: monolithicSparse, and streamOptimized as in OVA files.
//!
//! The grain directory is read and checked once. Grain tables (2 KiB for 32 MiB of the disk) are read one by one and
//! cached. This is our own code, because `imago` (0.2.6) reads only flat extents, which are in other files.

pub mod descriptor;
pub mod header;

use std::sync::Arc;

use parking_lot::RwLock;

use self::header::{Header, SECTOR, invalid};
use super::inflate::{self, InflateError, Wrap};
use super::qcow2::plain;
use super::table::{TABLES, Tables};
use super::{
    Chain, Compressed, Extent, HEAD, Image, ImageError, ImageErrorKind, Inspected, Method, fetch, walk,
};
use crate::source::Source;

/// If all grain tables take at most this many bytes, all are announced together; else the neighbours of a missing one.
const ANNOUNCE: u64 = 4 << 20;

/// The neighbours of a missing table that are announced with it: 1 GiB of the disk.
const NEIGHBOURS: usize = 32;

/// The bytes at the end of the file that are announced with its start. The directory and some tables may be there.
const END: u64 = 128 * 1024;

/// Bytes of the marker before each compressed grain: its first sector in the disk, and the number of bytes that follow.
const MARKER: usize = 12;

/// A VMDK image.
pub(super) struct Vmdk {
    source: Arc<dyn Source>,
    size: u64,
    chain: Chain,
    map: RwLock<Option<Result<Arc<Map>, ImageError>>>,
    /// Entries of grain tables, by the offset of the table.
    tables: Tables<u32>,
}

/// The structures that are read once.
struct Map {
    header: Header,
    /// The sector of each grain table; 0 when there is none.
    directory: Box<[u32]>,
}

pub(super) fn inspect(head: &[u8], file_size: u64, chain: Chain) -> Result<Inspected, ImageError> {
    let header = Header::decode(head, file_size, chain)?;
    let method = header.compressed.then_some(Method::Zlib);
    Ok(Inspected { size: header.size, unit: header.grain, method, backing_named: None })
}

impl Vmdk {
    pub(super) fn new(source: Arc<dyn Source>, size: u64, chain: Chain) -> Self {
        Self { source, size, chain, map: RwLock::new(None), tables: Tables::new(TABLES) }
    }

    fn map(&self) -> Result<Arc<Map>, ImageError> {
        if let Some(known) = &*self.map.read() {
            return known.clone();
        }
        let found = self.read_map().map(Arc::new);
        if found.as_ref().is_err_and(|error| error.kind() == ImageErrorKind::Source) {
            return found;
        }
        // A concurrent reader finds the same.
        self.map.write().get_or_insert(found).clone()
    }

    fn read_map(&self) -> Result<Map, ImageError> {
        let source = &*self.source;
        let file_size = source.size();
        let head = HEAD.min(file_size);
        source.announce(&[(0, head), (file_size - END.min(file_size), END.min(file_size))]);
        let head = fetch::bytes(source, 0, head as usize)?;
        let mut header = Header::decode(&head, file_size, self.chain)?;
        if header.directory.is_none() {
            let footer = fetch::bytes(source, Header::footer_at(file_size), 3 * SECTOR as usize)?;
            header = header.with_footer(&footer, file_size)?;
        }
        if header.size != self.size {
            let what = format!("its disk has {} bytes, but had {} when it was added", header.size, self.size);
            return Err(invalid(what).at(12));
        }
        let at = header.directory.expect("the footer has one");
        // The check of the header bounds it to 32 MiB.
        let bytes = fetch::bytes(source, at, header.tables() as usize * 4)?;
        let words = bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().expect("4 bytes")));
        let directory: Box<[u32]> = words.collect();
        if directory.len() as u64 != header.tables() {
            return Err(invalid("the file ends within its grain directory".into()).at(at));
        }
        self.check_and_announce(&header, at, &directory)?;
        Ok(Map { header, directory })
    }

    /// Checks that each table lies inside the file and overlaps neither the directory nor another table, and announces
    /// the tables.
    fn check_and_announce(&self, header: &Header, at: u64, directory: &[u32]) -> Result<(), ImageError> {
        let (file_size, each) = (self.source.size(), header.entries * 4);
        let mut tables: Vec<u64> = directory
            .iter()
            .filter(|sector| **sector != 0)
            .map(|sector| u64::from(*sector) * SECTOR)
            .collect();
        tables.sort_unstable();
        for (index, table) in tables.iter().copied().enumerate() {
            let wrong = if table + each > file_size {
                "is outside the file"
            } else if table < at + directory.len() as u64 * 4 && at < table + each {
                "overlaps the grain directory"
            } else if tables.get(index + 1).is_some_and(|next| *next < table + each) {
                "overlaps another one"
            } else {
                continue;
            };
            return Err(invalid(format!("its grain table at {table:#x} {wrong}")).at(at));
        }
        if self.source.is_remote() && tables.len() as u64 * each <= ANNOUNCE {
            let ranges: Vec<(u64, u64)> = tables.iter().map(|table| (*table, each)).collect();
            self.source.announce(&ranges);
        }
        Ok(())
    }

    /// The grain table of directory entry `index`.
    fn table(&self, map: &Map, index: usize) -> Result<Arc<[u32]>, ImageError> {
        let at = u64::from(map.directory[index]) * SECTOR;
        if let Some(table) = self.tables.get(at) {
            return Ok(table);
        }
        let len = map.header.entries * 4;
        let bytes = fetch::bytes(&*self.source, at, len as usize).inspect_err(|error| {
            if error.completion().is_some() {
                let next = map.directory[index..].iter().filter(|sector| **sector != 0).take(NEIGHBOURS);
                let mut ranges: Vec<(u64, u64)> =
                    next.map(|sector| (u64::from(*sector) * SECTOR, len)).collect();
                ranges.sort_unstable();
                self.source.announce(&ranges);
            }
        })?;
        if (bytes.len() as u64) < len {
            return Err(invalid("the file ends within a grain table".into()).at(at));
        }
        let words = bytes.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().expect("4 bytes")));
        let table: Arc<[u32]> = words.collect();
        self.tables.put(at, table.clone());
        Ok(table)
    }
}

impl Image for Vmdk {
    fn size(&self) -> u64 {
        self.size
    }

    fn extent(&self, offset: u64, len: u64) -> Result<(Extent, u64), ImageError> {
        let map = self.map()?;
        let mut walk = Walk { image: self, map: &map, held: None, tables: 0 };
        walk::extent(&mut walk, self.size, offset, len)
    }

    fn forget(&self) {
        *self.map.write() = None;
        self.tables.clear();
    }

    fn inflate(&self, what: &Compressed, out: &mut Vec<u8>) -> Result<(), ImageError> {
        out.clear();
        let header = &self.map()?.header;
        if what.bytes > max_compressed(header) || what.len > header.grain || what.method != Method::Zlib {
            return Err(invalid("no such compressed grain".into()).at(what.at));
        }
        let input = fetch::bytes(&*self.source, what.at, what.bytes as usize)?;
        let grain = |why: &str| {
            invalid(format!("its compressed grain of guest offset {:#x} is bad: {why}", what.guest))
                .at(what.at)
        };
        let (marker, data) =
            input.split_at_checked(MARKER).ok_or_else(|| grain("the file ends within its marker"))?;
        let first = u64::from_le_bytes(marker[..8].try_into().expect("8 bytes"));
        let len = u32::from_le_bytes(marker[8..].try_into().expect("4 bytes")) as usize;
        if first.checked_mul(SECTOR) != Some(what.guest) {
            return Err(grain(&format!("its marker names sector {first} of the disk")));
        }
        let data = data.get(..len).ok_or_else(|| grain("it overlaps the data behind it"))?;
        out.resize(header.grain as usize, 0);
        // The last grain of a disk may be compressed as a whole, or only up to the end of the disk.
        let wrong = match inflate::deflate(Wrap::Zlib, data, out) {
            Ok(filled) if filled as u64 >= what.len => {
                out.truncate(what.len as usize);
                return Ok(());
            }
            Ok(_) => InflateError::TooShort,
            Err(bad) => bad,
        };
        out.clear();
        Err(grain(wrong.why()))
    }
}

/// The most bytes that a compressed grain may take in the file.
fn max_compressed(header: &Header) -> u64 {
    2 * header.grain + SECTOR
}

/// The state of one call of `extent`. It holds the last table, because most steps stay in one.
struct Walk<'a> {
    image: &'a Vmdk,
    map: &'a Map,
    held: Option<(usize, Arc<[u32]>)>,
    tables: usize,
}

impl walk::Step for Walk<'_> {
    fn step(&mut self, offset: u64, left: u64) -> Result<(Extent, u64), ImageError> {
        let header = &self.map.header;
        let span = header.table_span();
        let index = (offset / span) as usize;
        if self.map.directory[index] == 0 {
            let many = left.div_ceil(span) as usize;
            let gap =
                self.map.directory[index..].iter().take(many + 1).take_while(|sector| **sector == 0).count();
            return Ok((Extent::Zero, (index + gap) as u64 * span - offset));
        }
        if self.held.as_ref().is_none_or(|(held, _)| *held != index) {
            self.tables += 1;
            self.held = Some((index, self.image.table(self.map, index)?));
        }
        let (_, table) = self.held.as_ref().expect("just held");
        let entry = (offset % span) / header.grain;
        let sector = table[entry as usize];
        let start = offset / header.grain * header.grain;
        let inside = offset - start;
        let rest = header.grain - inside;
        if sector == 0 || sector == 1 && header.zero_grains {
            return Ok((Extent::Zero, rest));
        }
        let (at, file_size) = (u64::from(sector) * SECTOR, self.image.source.size());
        if at >= file_size {
            let place = u64::from(self.map.directory[index]) * SECTOR + entry * 4;
            return Err(invalid(format!(
                "the grain table entry of guest offset {offset:#x} points outside the file"
            ))
            .at(place));
        }
        if !header.compressed {
            return Ok(plain(at + inside, rest, file_size));
        }
        // The exact length is in the marker, but reading that would cost a request. The grain ends where the next one
        // begins, at the latest.
        let next = table.iter().copied().filter(|other| *other > sector).min();
        let end = next.map_or(file_size, |next| (u64::from(next) * SECTOR).min(file_size));
        let bytes = (end - at).min(max_compressed(header));
        let len = header.grain.min(header.size - start);
        let what = Compressed { guest: start, len, at, bytes, method: Method::Zlib };
        Ok((Extent::Compressed(what), len - inside))
    }

    fn tables(&self) -> usize {
        self.tables
    }
}
