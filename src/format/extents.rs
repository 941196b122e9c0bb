//! The index of a layer: for each byte of the layer's disk, which layer of its chain has it (docs/format.md, "Index of a
//! layer").
//!
//! An index is made of the map files of the chain and can be made again; what must hold is that a reader never takes
//! damaged or foreign bytes for extents. So each part has a checksum over a nonce of the file.

use super::codec::{FormatError, Kind, Reader, Writer};
use super::{MAX_DISK_SIZE, MAX_NUMBER};

/// Bytes of the header and of a leaf.
pub const PAGE: usize = 4096;
/// Extents in a full leaf.
pub const LEAF_EXTENTS: usize = PAGE / 8 - 1;
/// The most layers of a chain.
pub const MOST_LAYERS: usize = u16::MAX as usize - 2;

const MAGIC: [u8; 8] = *b"PLYINDEX";
const VERSION: u16 = 1;
const STRUCTURE: &str = "index of a layer";
/// Bytes of the header that have a meaning.
const HEADER: usize = 64;

/// Where the bytes of an extent are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Where {
    /// Nowhere: zeros.
    Zero,
    /// In what lies below the chain.
    Below,
    /// In the data file of a layer: its position in the table of the index.
    Layer(u16),
}

/// The beginning of an extent. It ends where the next one begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Extent(u64);

impl Extent {
    /// The largest size of a disk in bytes is below 2^47, so a start and a code fit one word.
    pub fn new(start: u64, place: Where) -> Self {
        let code = match place {
            Where::Zero => 0,
            Where::Below => 1,
            Where::Layer(slot) => u64::from(slot) + 2,
        };
        Self(start << 16 | code)
    }

    /// First byte.
    pub fn start(self) -> u64 {
        self.0 >> 16
    }

    /// Where its bytes are.
    pub fn place(self) -> Where {
        match self.0 as u16 {
            0 => Where::Zero,
            1 => Where::Below,
            code => Where::Layer(code - 2),
        }
    }
}

/// The header of an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexHeader {
    /// Number of the layer at the top of the chain.
    pub layer: u64,
    /// Random, new with each file.
    pub nonce: u64,
    /// Bytes of the disk that the top layer was. All bytes behind are zeros.
    pub end: u64,
    /// Number of leaves.
    pub leaves: u64,
    /// Number of layers in the table.
    pub layers: u16,
}

fn bad(kind: Kind, detail: impl Into<String>) -> FormatError {
    FormatError::new(kind, STRUCTURE, detail)
}

impl IndexHeader {
    /// Where the table begins: behind the leaves.
    pub fn table_at(&self) -> u64 {
        leaf_at(self.leaves)
    }

    /// Bytes of the table.
    pub fn table_len(&self) -> usize {
        8 * (usize::from(self.layers) + self.leaves as usize) + 4
    }

    /// The bytes of the page.
    pub fn encode(&self) -> [u8; PAGE] {
        let mut w = Writer::new();
        w.raw(&MAGIC).u16(VERSION).u16(self.layers).u64(self.layer).u64(self.nonce);
        w.u64(self.end).u64(self.leaves);
        let mut page = [0; PAGE];
        page[..w.len()].copy_from_slice(w.as_slice());
        let sum = crc32c::crc32c(&page[..HEADER - 4]);
        page[HEADER - 4..HEADER].copy_from_slice(&sum.to_le_bytes());
        page
    }

    /// Reads the page of an index with `len` bytes.
    ///
    /// # Errors
    /// When it is damaged, of a newer plyfs, or does not fit the length.
    pub fn decode(page: &[u8], len: u64) -> Result<Self, FormatError> {
        let mut r = Reader::new(page.get(..HEADER).unwrap_or(page), STRUCTURE);
        if r.raw(8)? != MAGIC {
            return Err(bad(Kind::Magic, "the magic bytes are not those of this structure"));
        }
        let version = r.u16()?;
        let layers = r.u16()?;
        let (layer, nonce, end, leaves) = (r.u64()?, r.u64()?, r.u64()?, r.u64()?);
        r.raw(HEADER - 4 - 44)?;
        if crc32c::crc32c(&page[..HEADER - 4]) != r.u32()? {
            return Err(bad(Kind::Checksum, "the checksum of the header does not match"));
        }
        if version != VERSION {
            return Err(bad(Kind::Newer, format!("version {version}, this plyfs knows {VERSION}")));
        }
        let header = Self { layer, nonce, end, leaves, layers };
        let fits = layer <= MAX_NUMBER && end <= MAX_DISK_SIZE && usize::from(layers) <= MOST_LAYERS;
        if !fits || leaves == 0 || leaves > len / PAGE as u64 {
            return Err(bad(Kind::Value, format!("{header:?} in {len} bytes is not possible")));
        }
        if len != header.table_at() + header.table_len() as u64 {
            return Err(bad(Kind::Truncated, format!("{len} bytes do not fit {leaves} leaves")));
        }
        Ok(header)
    }
}

/// Where a leaf begins in the file.
pub fn leaf_at(leaf: u64) -> u64 {
    (leaf + 1) * PAGE as u64
}

fn leaf_sum(nonce: u64, leaf: u64, bytes: &[u8]) -> u32 {
    let sum = crc32c::crc32c(&nonce.to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c_append(sum, &leaf.to_le_bytes()), bytes)
}

/// The bytes of a leaf. `extents` ascend, and are at most [`LEAF_EXTENTS`].
pub fn encode_leaf(nonce: u64, leaf: u64, extents: &[Extent]) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    for (slot, extent) in page.chunks_exact_mut(8).zip(extents) {
        slot.copy_from_slice(&extent.0.to_le_bytes());
    }
    page[PAGE - 8..PAGE - 4].copy_from_slice(&(extents.len() as u32).to_le_bytes());
    let sum = leaf_sum(nonce, leaf, &page[..PAGE - 4]);
    page[PAGE - 4..].copy_from_slice(&sum.to_le_bytes());
    page
}

/// Reads a leaf: the beginnings of its extents, in order.
///
/// # Errors
/// When its checksum does not match, or its extents are not possible.
pub fn decode_leaf(header: &IndexHeader, leaf: u64, page: &[u8; PAGE]) -> Result<Vec<Extent>, FormatError> {
    let mut r = Reader::new(&page[PAGE - 8..], STRUCTURE);
    let (count, sum) = (r.u32()? as usize, r.u32()?);
    if leaf_sum(header.nonce, leaf, &page[..PAGE - 4]) != sum {
        return Err(bad(Kind::Checksum, format!("the checksum of leaf {leaf} does not match")));
    }
    if !(1..=LEAF_EXTENTS).contains(&count) {
        return Err(bad(Kind::Value, format!("leaf {leaf} has {count} extents")));
    }
    let mut r = Reader::new(&page[..8 * count], STRUCTURE);
    let extents: Vec<Extent> = (0..count).map(|_| r.u64().map(Extent)).collect::<Result<_, _>>()?;
    let ascend = extents.windows(2).all(|pair| pair[0].start() < pair[1].start());
    let known = |extent: &Extent| match extent.place() {
        Where::Layer(slot) => slot < header.layers,
        Where::Zero | Where::Below => true,
    };
    if !ascend || !extents.iter().all(known) || extents.iter().any(|extent| extent.start() > header.end) {
        return Err(bad(Kind::Value, format!("the extents of leaf {leaf} are not possible")));
    }
    Ok(extents)
}

/// The bytes of the table: the numbers of the layers, and the first extent of each leaf.
pub fn encode_table(nonce: u64, layers: &[u64], firsts: &[Extent]) -> Vec<u8> {
    let mut w = Writer::new();
    for number in layers.iter().copied().chain(firsts.iter().map(|first| first.0)) {
        w.u64(number);
    }
    let sum = leaf_sum(nonce, u64::MAX, w.as_slice());
    w.u32(sum);
    w.finish()
}

/// Reads a table: the numbers of the layers, and the first extent of each leaf, in order.
///
/// # Errors
/// When its checksum does not match, or the leaves are out of order.
pub fn decode_table(header: &IndexHeader, bytes: &[u8]) -> Result<(Vec<u64>, Vec<Extent>), FormatError> {
    let mut r = Reader::new(bytes, STRUCTURE);
    let layers: Vec<u64> = (0..header.layers).map(|_| r.u64()).collect::<Result<_, _>>()?;
    let firsts: Vec<Extent> = (0..header.leaves).map(|_| r.u64().map(Extent)).collect::<Result<_, _>>()?;
    let sum = r.u32()?;
    r.end()?;
    if leaf_sum(header.nonce, u64::MAX, &bytes[..bytes.len() - 4]) != sum {
        return Err(bad(Kind::Checksum, "the checksum of the table does not match"));
    }
    let begins = firsts.first().is_some_and(|first| first.start() == 0);
    if !begins || !firsts.windows(2).all(|pair| pair[0].start() < pair[1].start()) {
        return Err(bad(Kind::Value, "the leaves are out of order"));
    }
    Ok((layers, firsts))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> IndexHeader {
        IndexHeader { layer: 7, nonce: 0x1234, end: 1 << 20, leaves: 1, layers: 2 }
    }

    fn extents() -> Vec<Extent> {
        vec![
            Extent::new(0, Where::Below),
            Extent::new(4096, Where::Layer(1)),
            Extent::new(5000, Where::Layer(0)),
            Extent::new(1 << 20, Where::Zero),
        ]
    }

    #[test]
    fn an_index_is_read_as_it_was_written() {
        let header = header();
        let leaf = encode_leaf(header.nonce, 0, &extents());
        let table = encode_table(header.nonce, &[7, 3], &extents()[..1]);
        let len = header.table_at() + table.len() as u64;
        assert_eq!(table.len(), header.table_len());
        assert_eq!(IndexHeader::decode(&header.encode(), len), Ok(header));
        assert_eq!(decode_leaf(&header, 0, &leaf), Ok(extents()));
        assert_eq!(decode_table(&header, &table), Ok((vec![7, 3], extents()[..1].to_vec())));
        let found: Vec<_> = extents().iter().map(|extent| (extent.start(), extent.place())).collect();
        assert_eq!(found[1..3], [(4096, Where::Layer(1)), (5000, Where::Layer(0))]);
    }

    #[test]
    fn changed_bytes_of_an_index_are_noticed() {
        let header = header();
        let page = header.encode();
        let len = header.table_at() + header.table_len() as u64;
        for at in 0..HEADER {
            let mut page = page;
            page[at] ^= 1;
            assert!(IndexHeader::decode(&page, len).is_err(), "byte {at}");
        }
        assert!(IndexHeader::decode(&page[..20], len).is_err());
        assert!(IndexHeader::decode(&page, len + 1).is_err());
        let leaf = encode_leaf(header.nonce, 0, &extents());
        for at in (0..40).chain(PAGE - 8..PAGE) {
            let mut leaf = leaf;
            leaf[at] ^= 1;
            assert!(decode_leaf(&header, 0, &leaf).is_err(), "byte {at}");
        }
        // A leaf of another place, or of another file.
        assert!(decode_leaf(&header, 1, &leaf).is_err());
        assert!(decode_leaf(&IndexHeader { nonce: 1, ..header }, 0, &leaf).is_err());
        let mut table = encode_table(header.nonce, &[7, 3], &extents()[..1]);
        table[3] ^= 1;
        assert!(decode_table(&header, &table).is_err());
    }

    #[test]
    fn impossible_extents_are_refused() {
        let header = header();
        let refused = |extents: &[Extent]| {
            decode_leaf(&header, 0, &encode_leaf(header.nonce, 0, extents)).unwrap_err().kind
        };
        assert_eq!(refused(&[]), Kind::Value);
        assert_eq!(refused(&[Extent::new(9, Where::Zero), Extent::new(9, Where::Below)]), Kind::Value);
        assert_eq!(refused(&[Extent::new(0, Where::Layer(2))]), Kind::Value);
        assert_eq!(refused(&[Extent::new((1 << 20) + 1, Where::Zero)]), Kind::Value);
        let late = encode_table(header.nonce, &[7, 3], &[Extent::new(1, Where::Zero)]);
        assert_eq!(decode_table(&header, &late).unwrap_err().kind, Kind::Value);
    }
}
