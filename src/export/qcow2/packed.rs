//! An image with compressed clusters, written to a file.

use std::fs::File;
use std::os::unix::fs::FileExt;

use zlib_rs::{DeflateConfig, Method, ReturnCode, Strategy, compress_slice};

use super::super::{ExportError, Input, Watch, is_zero, tell};
use super::header::{Backing, Header};
use super::runs::{self, Kind};
use super::stream::read_clusters;
use super::{
    BLOCK_ENTRIES, CLUSTER, COPIED, L2_ENTRIES, Refcounts, ZERO, check_size, l1_entries, table_bytes,
};

/// In an L2 entry: the cluster is compressed.
const COMPRESSED: u64 = 1 << 62;
/// In the entry of a compressed cluster: the offset has the bits below, the number of sectors those above.
const SECTORS_SHIFT: u32 = 62 - (16 - 8);
const SECTOR: u64 = 512;
/// The most clusters that wait to be written together.
const HELD: usize = 16;
/// Readers inflate with a window of 2^12 bytes, as QEMU does; a minus means without a header.
const WINDOW_BITS: i32 = -12;

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate, which every reader of qcow2 knows.
    Zlib,
    /// zstd, which QEMU knows since 5.1.
    Zstd,
}

impl Compression {
    fn number(self) -> u8 {
        match self {
            Self::Zlib => 0,
            Self::Zstd => 1,
        }
    }

    /// Compresses a cluster; `None` when it would not be smaller.
    fn compress<'a>(self, cluster: &[u8], out: &'a mut [u8]) -> Option<&'a [u8]> {
        match self {
            Self::Zlib => {
                let config = DeflateConfig {
                    level: 6,
                    method: Method::Deflated,
                    window_bits: WINDOW_BITS,
                    mem_level: 8,
                    strategy: Strategy::Default,
                };
                let (packed, code) = compress_slice(out, cluster, config);
                (code == ReturnCode::Ok && packed.len() < cluster.len()).then_some(&*packed)
            }
            Self::Zstd => {
                let len = zstd_safe::compress(out, cluster, zstd_safe::CLEVEL_DEFAULT).ok()?;
                (len < cluster.len()).then(|| &out[..len])
            }
        }
    }
}

/// Writes an image. With `backing` it has only what the input does not leave to that image.
///
/// # Errors
/// As [`write`](super::write).
pub fn write_compressed(
    input: &dyn Input,
    backing: Option<&Backing>,
    compression: Compression,
    file: &File,
    watch: Watch<'_>,
) -> Result<(), ExportError> {
    check_size(input.size())?;
    let runs = runs::of(input, backing.is_some())?;
    let mut out = Packer { file, end: CLUSTER, counts: vec![1] };
    let mut l1 = vec![0; l1_entries(input.size()) as usize];
    let mut table =
        Table { number: 0, entries: vec![0; L2_ENTRIES as usize], held: Vec::new(), places: Vec::new() };
    let mut cluster_bytes = vec![0; CLUSTER as usize];
    let mut packed = vec![0; CLUSTER as usize + 1024];
    for run in &runs {
        for cluster in run.first..run.end {
            if cluster / L2_ENTRIES != table.number {
                table.put(&mut out, &mut l1)?;
                table.number = cluster / L2_ENTRIES;
            }
            let entry = match run.kind {
                Kind::Zero => ZERO,
                Kind::Data => {
                    tell(watch, cluster * CLUSTER)?;
                    read_clusters(input, cluster, &mut cluster_bytes)?;
                    if is_zero(&cluster_bytes) {
                        if backing.is_some() { ZERO } else { 0 }
                    } else if let Some(bytes) = compression.compress(&cluster_bytes, &mut packed) {
                        out.put_packed(bytes)?
                    } else {
                        table.hold(cluster % L2_ENTRIES, &cluster_bytes, &mut out)?;
                        continue;
                    }
                }
            };
            table.entries[(cluster % L2_ENTRIES) as usize] = entry;
        }
    }
    table.put(&mut out, &mut l1)?;
    let mut l1_bytes = table_bytes(l1.into_iter());
    l1_bytes.resize(l1_bytes.len().max(CLUSTER as usize), 0);
    let l1_at = out.put_aligned(&l1_bytes)?;
    let (refcounts, refcounts_at) = out.put_refcounts()?;
    let header = Header {
        size: input.size(),
        backing,
        l1_at,
        refcounts_at,
        refcounts,
        compression: compression.number(),
    };
    out.write(&header.encode()?, 0)?;
    tell(watch, input.size())
}

/// The L2 table that is being filled.
struct Table {
    number: u64,
    entries: Vec<u64>,
    /// Clusters that do not become smaller, and their places in the table. They begin at the border of a cluster, so that
    /// each of them alone would leave a gap behind a compressed one.
    held: Vec<u8>,
    places: Vec<u64>,
}

impl Table {
    /// Takes a cluster that is written as it is, with others.
    fn hold(&mut self, place: u64, cluster: &[u8], out: &mut Packer<'_>) -> Result<(), ExportError> {
        self.held.extend_from_slice(cluster);
        self.places.push(place);
        if self.places.len() < HELD { Ok(()) } else { self.put_held(out) }
    }

    fn put_held(&mut self, out: &mut Packer<'_>) -> Result<(), ExportError> {
        if self.places.is_empty() {
            return Ok(());
        }
        let at = out.put_aligned(&self.held)?;
        for (number, place) in (0..).zip(self.places.drain(..)) {
            self.entries[place as usize] = (at + number * CLUSTER) | COPIED;
        }
        self.held.clear();
        Ok(())
    }

    /// Writes the table if it has an entry, and begins an empty one.
    fn put(&mut self, out: &mut Packer<'_>, l1: &mut [u64]) -> Result<(), ExportError> {
        self.put_held(out)?;
        if self.entries.iter().any(|entry| *entry != 0) {
            l1[self.number as usize] = out.put_aligned(&table_bytes(self.entries.iter().copied()))? | COPIED;
            self.entries.fill(0);
        }
        Ok(())
    }
}

/// Appends to the file and counts the references to its clusters.
struct Packer<'a> {
    file: &'a File,
    end: u64,
    /// Of each cluster of the file.
    counts: Vec<u16>,
}

impl Packer<'_> {
    fn write(&self, bytes: &[u8], at: u64) -> Result<(), ExportError> {
        self.file.write_all_at(bytes, at).map_err(ExportError::writing("writing it"))
    }

    fn count(&mut self, from: u64, to: u64) {
        let last = ((to - 1) / CLUSTER) as usize;
        if self.counts.len() <= last {
            self.counts.resize(last + 1, 0);
        }
        self.counts[(from / CLUSTER) as usize..=last].iter_mut().for_each(|count| *count += 1);
    }

    /// Appends whole clusters. Returns where.
    fn put_aligned(&mut self, bytes: &[u8]) -> Result<u64, ExportError> {
        let at = self.end.next_multiple_of(CLUSTER);
        self.write(bytes, at)?;
        self.end = at + bytes.len() as u64;
        self.count(at, self.end);
        Ok(at)
    }

    /// Appends a compressed cluster. Returns its entry.
    fn put_packed(&mut self, bytes: &[u8]) -> Result<u64, ExportError> {
        let at = self.end;
        self.write(bytes, at)?;
        self.end = at + bytes.len() as u64;
        self.count(at, self.end);
        // Sectors behind the first one.
        let sectors = (self.end - 1) / SECTOR - at / SECTOR;
        Ok(COMPRESSED | sectors << SECTORS_SHIFT | at)
    }

    /// Appends the refcount table and its blocks. Returns where the table is.
    fn put_refcounts(&mut self) -> Result<(Refcounts, u64), ExportError> {
        let first = self.end.div_ceil(CLUSTER);
        let refcounts = Refcounts::of(first);
        self.counts.resize(first as usize, 0);
        self.counts.resize((first + refcounts.clusters()) as usize, 1);
        let blocks = (0..refcounts.blocks).map(|block| (first + refcounts.table + block) * CLUSTER);
        self.write(&table_bytes(blocks), first * CLUSTER)?;
        for (number, counts) in self.counts.chunks(BLOCK_ENTRIES as usize).enumerate() {
            let mut bytes: Vec<u8> = counts.iter().copied().flat_map(u16::to_be_bytes).collect();
            bytes.resize(CLUSTER as usize, 0);
            self.write(&bytes, (first + refcounts.table + number as u64) * CLUSTER)?;
        }
        Ok((refcounts, first * CLUSTER))
    }
}
