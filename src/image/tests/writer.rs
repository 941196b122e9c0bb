//! Writes images for the tests: every kind of cluster that the formats allow, in any arrangement.

use std::io::Write;

use flate2::Compression;
use flate2::write::{DeflateEncoder, ZlibEncoder};

use super::{Flat, Numbers};
use crate::image::Method;

/// The kind of a cluster or grain.
#[derive(Clone, Debug)]
pub(super) enum Fill {
    /// Not in the image.
    Nothing,
    Zero,
    /// Zeros, with an allocated cluster in the file.
    Reserved,
    Data,
    Packed,
    /// Each subcluster: 0 nothing, 1 data, 2 zeros.
    Parts(Vec<u8>),
}

#[derive(Clone, Debug)]
pub(super) struct Qcow2 {
    pub version: u32,
    pub bits: u32,
    pub extended: bool,
    pub method: Method,
    pub size: u64,
    pub fills: Vec<Fill>,
    pub backing: Option<&'static str>,
    /// The seed of contents and arrangement.
    pub seed: u64,
    /// Clusters lie in the order of the guest.
    pub in_order: bool,
    /// The file ends within the last cluster.
    pub cut: bool,
}

impl Default for Qcow2 {
    fn default() -> Self {
        Self {
            version: 3,
            bits: 9,
            extended: false,
            method: Method::Deflate,
            size: 4 * 512,
            fills: vec![Fill::Data, Fill::Nothing, Fill::Packed, Fill::Zero],
            backing: None,
            seed: 1,
            in_order: true,
            cut: false,
        }
    }
}

pub(super) fn pack(method: Method, bytes: &[u8]) -> Vec<u8> {
    match method {
        Method::Deflate => {
            let mut encoder = DeflateEncoder::new(Vec::new(), Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        Method::Zlib => {
            let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        Method::Zstd => {
            let mut out = vec![0; bytes.len() + 1024];
            let len = zstd_safe::compress(&mut out[..], bytes, 1).unwrap();
            out.truncate(len);
            out
        }
    }
}

pub(super) fn put32(file: &mut [u8], at: usize, value: u32) {
    file[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

pub(super) fn put64(file: &mut [u8], at: usize, value: u64) {
    file[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// A file that grows by clusters.
struct Clusters {
    file: Vec<u8>,
    size: usize,
}

impl Clusters {
    fn take(&mut self, bytes: usize) -> usize {
        let at = self.file.len().next_multiple_of(self.size);
        self.file.resize(at + bytes.next_multiple_of(self.size), 0);
        at
    }
}

impl Qcow2 {
    /// The file, and the bytes that a reader must get.
    pub(super) fn write(&self) -> (Vec<u8>, Flat) {
        let mut numbers = Numbers::new(self.seed);
        let cluster = 1usize << self.bits;
        let entry = if self.extended { 16 } else { 8 };
        let per_table = cluster / entry;
        let mut flat: Flat = Vec::new();
        let mut out = Clusters { file: vec![0; cluster], size: cluster };
        let refcounts = out.take(cluster);
        let tables = self.fills.len().div_ceil(per_table);
        let l1 = out.take(tables * 8);
        let mut l2 = vec![0usize; tables];
        let nothing = if self.backing.is_some() { None } else { Some(0) };
        flat.resize(self.fills.len() * cluster, nothing);

        let mut order: Vec<usize> = (0..self.fills.len()).collect();
        if !self.in_order {
            numbers.shuffle(&mut order);
        }
        let (mut last_packed, mut last_data): (Option<usize>, Option<(usize, usize)>) = (None, None);
        for index in order {
            let fill = &self.fills[index];
            if matches!(fill, Fill::Nothing) {
                continue;
            }
            if l2[index / per_table] == 0 {
                l2[index / per_table] = out.take(cluster);
            }
            let place = l2[index / per_table] + index % per_table * entry;
            let mut data = numbers.data(cluster);
            let here = &mut flat[index * cluster..][..cluster];
            let (mut word, mut bitmap) = (0u64, 0u64);
            match fill {
                Fill::Nothing => {}
                Fill::Zero | Fill::Reserved => {
                    here.fill(Some(0));
                    if matches!(fill, Fill::Reserved) {
                        let at = out.take(cluster);
                        out.file[at..at + cluster].copy_from_slice(&data);
                        word = at as u64 | 1 << 63;
                    }
                    if self.extended { bitmap = u64::from(u32::MAX) << 32 } else { word |= 1 }
                }
                Fill::Packed => {
                    let packed = pack(self.method, &data);
                    // No writer stores data compressed that does not become smaller, and it may not fit.
                    if packed.len() > cluster {
                        data.fill(index as u8);
                    }
                    let packed = pack(self.method, &data);
                    // Half of the time directly behind the last compressed cluster.
                    let at = match last_packed.filter(|_| numbers.below(2) == 0) {
                        Some(end) if end.next_multiple_of(cluster) == out.file.len() => end,
                        _ => out.take(1),
                    };
                    let end = at + packed.len();
                    if out.file.len() < end {
                        out.file.resize(end.next_multiple_of(cluster), 0);
                    }
                    out.file[at..end].copy_from_slice(&packed);
                    last_packed = Some(end);
                    let shift = 62 - (self.bits - 8);
                    let sectors = ((end - 1) / 512 - at / 512) as u64;
                    word = 1 << 62 | sectors << shift | at as u64;
                    here.iter_mut().zip(&data).for_each(|(flat, byte)| *flat = Some(*byte));
                }
                Fill::Data => {
                    let at = out.take(cluster);
                    out.file[at..at + cluster].copy_from_slice(&data);
                    word = at as u64 | 1 << 63;
                    bitmap = u64::from(u32::MAX);
                    last_data = Some((index, at));
                    here.iter_mut().zip(&data).for_each(|(flat, byte)| *flat = Some(*byte));
                }
                Fill::Parts(parts) => {
                    let sub = cluster / 32;
                    if parts.contains(&1) || numbers.below(2) == 0 {
                        let at = out.take(cluster);
                        out.file[at..at + cluster].copy_from_slice(&data);
                        word = at as u64 | 1 << 63;
                    }
                    for (bit, part) in parts.iter().enumerate() {
                        let range = bit * sub..(bit + 1) * sub;
                        match part {
                            0 => {}
                            1 => {
                                bitmap |= 1 << bit;
                                let bytes = here[range.clone()].iter_mut().zip(&data[range]);
                                bytes.for_each(|(flat, byte)| *flat = Some(*byte));
                            }
                            _ => {
                                bitmap |= 1 << (32 + bit);
                                here[range].fill(Some(0));
                            }
                        }
                    }
                }
            }
            if !self.extended {
                bitmap = 0;
            }
            put64(&mut out.file, place, word);
            if self.extended {
                put64(&mut out.file, place + 8, bitmap);
            }
        }
        if let Some((index, at)) = last_data.filter(|(_, at)| self.cut && at + cluster == out.file.len()) {
            // Bytes beyond the end of the file read zeros.
            let keep = 1 + numbers.below(cluster as u64 - 1) as usize;
            out.file.truncate(at + keep);
            flat[index * cluster + keep..(index + 1) * cluster].fill(Some(0));
        }
        flat.truncate(self.size as usize);
        let file = &mut out.file;
        for (index, table) in l2.iter().enumerate().filter(|(_, table)| **table != 0) {
            put64(file, l1 + index * 8, *table as u64 | 1 << 63);
        }
        self.header(file, l1, tables, refcounts);
        (out.file, flat)
    }

    fn header(&self, file: &mut [u8], l1: usize, tables: usize, refcounts: usize) {
        file[..4].copy_from_slice(b"QFI\xfb");
        put32(file, 4, self.version);
        put32(file, 20, self.bits);
        put64(file, 24, self.size);
        put32(file, 36, tables as u32);
        put64(file, 40, l1 as u64);
        put64(file, 48, refcounts as u64);
        put32(file, 56, 1);
        let mut end = 72;
        if self.version == 3 {
            let zstd = self.method == Method::Zstd;
            put64(file, 72, u64::from(zstd) << 3 | u64::from(self.extended) << 4);
            put32(file, 96, 4);
            put32(file, 100, 112);
            file[104] = u8::from(zstd);
            end = 112;
        }
        if let Some(name) = self.backing {
            let at = end + 8;
            put64(file, 8, at as u64);
            put32(file, 16, name.len() as u32);
            file[at..at + name.len()].copy_from_slice(name.as_bytes());
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Vmdk {
    /// Sectors.
    pub grain: u64,
    pub entries: u32,
    /// Sectors.
    pub capacity: u64,
    pub compressed: bool,
    pub zero_grains: bool,
    /// `Nothing`, `Zero` or `Data`.
    pub fills: Vec<Fill>,
    /// The directory is at the end.
    pub footer: bool,
    pub seed: u64,
    pub in_order: bool,
    pub descriptor: Option<String>,
}

impl Default for Vmdk {
    fn default() -> Self {
        Self {
            grain: 8,
            entries: 512,
            capacity: 32,
            compressed: false,
            zero_grains: true,
            fills: vec![Fill::Data, Fill::Nothing, Fill::Data, Fill::Zero],
            footer: false,
            seed: 1,
            in_order: true,
            descriptor: None,
        }
    }
}

/// A descriptor as VMware writes it.
pub(super) fn descriptor(kind: &str, capacity: u64) -> String {
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=a1b2c3d4\nparentCID=ffffffff\ncreateType=\"{kind}\"\n\n\
         # Extent description\nRW {capacity} SPARSE \"disk one.vmdk\"\n\n# The Disk Data Base\n#DDB\n\n\
         ddb.adapterType = \"lsilogic\"\nddb.geometry.cylinders = \"1\"\n"
    )
}

impl Vmdk {
    pub(super) fn write(&self) -> (Vec<u8>, Flat) {
        let mut numbers = Numbers::new(self.seed);
        let grain = self.grain as usize * 512;
        let mut file = vec![0u8; 512 * 3];
        let kind = if self.compressed { "streamOptimized" } else { "monolithicSparse" };
        let text = self.descriptor.clone().unwrap_or_else(|| descriptor(kind, self.capacity));
        file[512..512 + text.len()].copy_from_slice(text.as_bytes());
        let entries = self.entries as usize;
        let tables = self.fills.len().div_ceil(entries);
        let mut flat: Flat = vec![Some(0); self.fills.len() * grain];
        let mut table = vec![vec![0u32; entries]; tables];
        let mut order: Vec<usize> = (0..self.fills.len()).collect();
        if !self.in_order {
            numbers.shuffle(&mut order);
        }
        for index in order {
            let entry = &mut table[index / entries][index % entries];
            match self.fills[index] {
                Fill::Data => {
                    let data = numbers.data(grain);
                    flat[index * grain..][..grain].iter_mut().zip(&data).for_each(|(f, b)| *f = Some(*b));
                    *entry = (file.len() / 512) as u32;
                    if self.compressed {
                        let packed = pack(Method::Zlib, &data);
                        file.extend(((index * grain / 512) as u64).to_le_bytes());
                        file.extend((packed.len() as u32).to_le_bytes());
                        file.extend(packed);
                    } else {
                        file.extend(data);
                    }
                    file.resize(file.len().next_multiple_of(512), 0);
                }
                Fill::Zero if self.zero_grains => *entry = 1,
                _ => {}
            }
        }
        let mut directory = Vec::new();
        for table in &table {
            if table.iter().all(|entry| *entry == 0) {
                directory.push(0);
                continue;
            }
            directory.push((file.len() / 512) as u32);
            file.extend(table.iter().flat_map(|entry| entry.to_le_bytes()));
            file.resize(file.len().next_multiple_of(512), 0);
        }
        let at = (file.len() / 512) as u64;
        file.extend(directory.iter().flat_map(|sector| sector.to_le_bytes()));
        file.resize(file.len().next_multiple_of(512), 0);
        let header = self.header(if self.footer { u64::MAX } else { at });
        file[..512].copy_from_slice(&header);
        if self.footer {
            let mut marker = [0; 512];
            marker[0] = 1;
            marker[12] = 3;
            file.extend(marker);
            file.extend(self.header(at));
            file.extend([0; 512]);
        }
        flat.truncate(self.capacity as usize * 512);
        (file, flat)
    }

    fn header(&self, directory: u64) -> [u8; 512] {
        let mut sector = [0; 512];
        let mut put = |at: usize, bytes: &[u8]| sector[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"KDMV");
        put(4, &(if self.compressed { 3u32 } else { 1 }).to_le_bytes());
        let flags = 1 | u32::from(self.zero_grains) << 2 | if self.compressed { 3 << 16 } else { 0 };
        put(8, &flags.to_le_bytes());
        put(12, &self.capacity.to_le_bytes());
        put(20, &self.grain.to_le_bytes());
        put(28, &1u64.to_le_bytes());
        put(36, &2u64.to_le_bytes());
        put(44, &self.entries.to_le_bytes());
        put(56, &directory.to_le_bytes());
        put(73, b"\n \r\n");
        put(77, &u16::from(self.compressed).to_le_bytes());
        sector
    }
}
