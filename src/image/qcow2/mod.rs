//! qcow2, versions 2 and 3: the parts that a reader of the current state needs.
//!
//! All L1 entries are read and checked once, together. That finds two entries that share an L2 table, and one whose
//! table overlaps another structure. L2 tables are read in slices and checked entry by entry. Refcounts, snapshots and
//! bitmaps are ignored: a reader does not need them, and so an image that is marked dirty is fine.
//!
//! Round trips are few: the start of the file is fetched together with the structures that `qemu-img` puts there (L1
//! and first L2 table, for clusters of 64 KiB), and all L2 tables are announced together.

pub mod entry;
pub mod header;

use std::sync::Arc;

use parking_lot::RwLock;

use self::entry::Cluster;
use self::header::Header;
use super::inflate::{self, Wrap};
use super::table::{TABLES, Tables};
use super::{
    Chain, Compressed, Extent, HEAD, Image, ImageError, ImageErrorKind, Inspected, Method, fetch, walk,
};
use crate::source::Source;

/// L2 tables are read and cached in slices of this many bytes; a table of smaller clusters is one slice.
const SLICE: u64 = 16 * 1024;

/// If all L2 tables take at most this many bytes, all are announced together; else the neighbours of a missing one.
const ANNOUNCE: u64 = 4 << 20;

/// The neighbours of a missing table that are announced with it.
const NEIGHBOURS: usize = 16;

/// Announced before the header is known: header, refcounts, L1 and first L2 table as qemu-img arranges them.
const START: u64 = 320 * 1024;

/// A qcow2 image.
pub(super) struct Qcow2 {
    source: Arc<dyn Source>,
    size: u64,
    chain: Chain,
    map: RwLock<Option<Result<Arc<Map>, ImageError>>>,
    /// L2 slices, by their offsets in the file.
    slices: Tables<u64>,
}

/// The structures that are read once.
struct Map {
    header: Header,
    /// The offset of each L2 table; 0 when there is none.
    l1: Box<[u64]>,
}

pub(super) fn inspect(head: &[u8], file_size: u64, chain: Chain) -> Result<Inspected, ImageError> {
    let header = Header::decode(head, file_size, chain)?;
    Ok(Inspected {
        size: header.size,
        unit: header.cluster(),
        method: Some(header.method),
        backing_named: header.backing,
    })
}

impl Qcow2 {
    pub(super) fn new(source: Arc<dyn Source>, size: u64, chain: Chain) -> Self {
        Self { source, size, chain, map: RwLock::new(None), slices: Tables::new(TABLES) }
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
        source.announce(&[(0, START.min(file_size))]);
        let head = fetch::bytes(source, 0, HEAD.min(file_size) as usize)?;
        let header = Header::decode(&head, file_size, self.chain)?;
        if header.size != self.size {
            let what = format!("its disk has {} bytes, but had {} when it was added", header.size, self.size);
            return Err(header::invalid(what).at(24));
        }
        // The check of the header bounds it to 32 MiB.
        let bytes = fetch::bytes(source, header.l1_offset, header.l1_entries as usize * 8)?;
        let l1 = bytes.chunks_exact(8).enumerate().map(|(index, word)| {
            let word = u64::from_be_bytes(word.try_into().expect("8 bytes"));
            entry::l1(word, &header, file_size).map_err(|why| {
                header::invalid(format!("L1 entry {index} {why}")).at(header.l1_offset + index as u64 * 8)
            })
        });
        let l1: Box<[u64]> = l1.collect::<Result<_, _>>()?;
        if l1.len() as u64 != header.l1_entries {
            return Err(header::invalid("the file ends within the L1 table".into()));
        }
        self.check_and_announce(&header, &l1)?;
        Ok(Map { header, l1 })
    }

    /// Checks that no two L1 entries share an L2 table, and announces the tables in file order, so that requests can be
    /// merged.
    fn check_and_announce(&self, header: &Header, l1: &[u64]) -> Result<(), ImageError> {
        let mut tables: Vec<u64> = l1.iter().copied().filter(|table| *table != 0).collect();
        tables.sort_unstable();
        if let Some(twice) = tables.windows(2).find(|pair| pair[0] == pair[1]) {
            let what = format!("two L1 entries point at one L2 table, at {:#x}", twice[0]);
            return Err(header::invalid(what).at(header.l1_offset));
        }
        let each = self.used(header);
        if self.source.is_remote() && tables.len() as u64 * each <= ANNOUNCE {
            let ranges: Vec<(u64, u64)> = tables.iter().map(|table| (*table, each)).collect();
            self.source.announce(&ranges);
        }
        Ok(())
    }

    /// The bytes of an L2 table that a reader can need. With large clusters, a disk of a few GiB needs only a part of
    /// one.
    fn used(&self, header: &Header) -> u64 {
        header.cluster().min(self.size.div_ceil(header.cluster()).saturating_mul(header.entry()))
    }

    /// The slice at `at` of the L2 table of L1 entry `index`.
    fn slice(&self, map: &Map, index: usize, at: u64) -> Result<Arc<[u64]>, ImageError> {
        if let Some(slice) = self.slices.get(at) {
            return Ok(slice);
        }
        let len = SLICE.min(map.header.cluster());
        let bytes = fetch::bytes(&*self.source, at, len as usize).inspect_err(|error| {
            if error.completion().is_some() {
                self.announce_neighbours(map, index);
            }
        })?;
        if (bytes.len() as u64) < len {
            return Err(header::invalid("the file ends within an L2 table".into()).at(at));
        }
        let words = bytes.chunks_exact(8).map(|word| u64::from_be_bytes(word.try_into().expect("8 bytes")));
        let slice: Arc<[u64]> = words.collect();
        self.slices.put(at, slice.clone());
        Ok(slice)
    }

    fn announce_neighbours(&self, map: &Map, index: usize) {
        let each = self.used(&map.header);
        let next = map.l1[index..].iter().take(NEIGHBOURS);
        let mut ranges: Vec<(u64, u64)> =
            next.filter(|table| **table != 0).map(|table| (*table, each.min(SLICE * 4))).collect();
        ranges.sort_unstable();
        self.source.announce(&ranges);
    }
}

impl Image for Qcow2 {
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
        self.slices.clear();
    }

    fn inflate(&self, what: &Compressed, out: &mut Vec<u8>) -> Result<(), ImageError> {
        out.clear();
        let header = &self.map()?.header;
        // An entry can name two clusters at most.
        if what.bytes > 2 * header.cluster() || what.len > header.cluster() || what.method != header.method {
            return Err(header::invalid("no such compressed cluster".into()).at(what.at));
        }
        let input = fetch::bytes(&*self.source, what.at, what.bytes as usize)?;
        out.resize(header.cluster() as usize, 0);
        let inflated = match what.method {
            Method::Zstd => inflate::zstd(&input, out),
            Method::Deflate | Method::Zlib => match inflate::deflate(Wrap::Raw, &input, out) {
                Ok(filled) if filled < out.len() => Err(inflate::InflateError::TooShort),
                Ok(_) => Ok(()),
                Err(bad) => Err(bad),
            },
        };
        if let Err(bad) = inflated {
            out.clear();
            let text =
                format!("its compressed cluster of guest offset {:#x} is bad: {}", what.guest, bad.why());
            return Err(header::invalid(text).at(what.at));
        }
        out.truncate(what.len as usize);
        Ok(())
    }
}

/// The state of one call of `extent`. It holds the last slice, because most steps stay in one.
struct Walk<'a> {
    image: &'a Qcow2,
    map: &'a Map,
    held: Option<(u64, Arc<[u64]>)>,
    tables: usize,
}

impl walk::Step for Walk<'_> {
    fn step(&mut self, offset: u64, left: u64) -> Result<(Extent, u64), ImageError> {
        let header = &self.map.header;
        let span = header.l2_span();
        let index = (offset / span) as usize;
        let table = self.map.l1[index];
        let nothing = if header.backing.is_some() { Extent::Below } else { Extent::Zero };
        if table == 0 {
            let many = left.div_ceil(span) as usize;
            let gap = self.map.l1[index..].iter().take(many + 1).take_while(|table| **table == 0).count();
            return Ok((nothing, (index + gap) as u64 * span - offset));
        }
        let place = table + (offset % span) / header.cluster() * header.entry();
        let len = SLICE.min(header.cluster());
        let at = place / len * len;
        if self.held.as_ref().is_none_or(|(held, _)| *held != at) {
            self.tables += 1;
            self.held = Some((at, self.image.slice(self.map, index, at)?));
        }
        let (_, slice) = self.held.as_ref().expect("just held");
        let word = ((place - at) / 8) as usize;
        let bitmap = if header.extended { slice[word + 1] } else { 0 };
        let file_size = self.image.source.size();
        let cluster = entry::l2(slice[word], bitmap, header, file_size).map_err(|why| {
            header::invalid(format!("the L2 entry of guest offset {offset:#x} {why}")).at(place)
        })?;
        let start = offset / header.cluster() * header.cluster();
        let inside = offset - start;
        let rest = header.cluster() - inside;
        Ok(match cluster {
            Cluster::Unallocated => (nothing, rest),
            Cluster::Zero => (Extent::Zero, rest),
            Cluster::Data(data) => plain(data + inside, rest, file_size),
            Cluster::Compressed(at, bytes) => {
                let len = header.cluster().min(header.size - start);
                let method = header.method;
                (Extent::Compressed(Compressed { guest: start, len, at, bytes, method }), len - inside)
            }
            Cluster::Parts(data, present, zero) => {
                let sub = header.subcluster();
                let first = inside / sub;
                let run = |bits: u32| u64::from((bits >> first).trailing_ones());
                let (extent, parts) = if present >> first & 1 != 0 {
                    let parts = run(present);
                    return Ok(plain(data + inside, (first + parts) * sub - inside, file_size));
                } else if zero >> first & 1 != 0 {
                    (Extent::Zero, run(zero))
                } else {
                    // The shift filled the upper bits with zeros, which are no subclusters.
                    (nothing, run(!(present | zero)).min(32 - first))
                };
                (extent, (first + parts) * sub - inside)
            }
        })
    }

    fn tables(&self) -> usize {
        self.tables
    }
}

/// The extent of a cluster's data. Beyond the end of the file it reads zeros, as in QEMU.
pub(super) fn plain(at: u64, len: u64, file_size: u64) -> (Extent, u64) {
    match file_size.checked_sub(at) {
        None | Some(0) => (Extent::Zero, len),
        Some(left) => (Extent::Plain { at }, len.min(left)),
    }
}
