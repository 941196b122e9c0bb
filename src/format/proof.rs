//! The proof of an image file: a BLAKE3 outboard, by which each group of the file is proven by itself (docs/format.md,
//! "Proof of an image").
//!
//! The hash of the whole file, which `b3sum` prints, is the root of a tree. The proof has the hashes of the tree at every
//! sixth level, in *pages* of 64 hashes: a page of the lowest level is about a MiB of the file. What must hold:
//! - Nothing in a proof is trusted: each page is proven by a hash of the page above it, and the highest page by the root.
//!   So a page needs no other checksum, on a server or on a disk.
//! - The size of the file alone decides how large its proof is and where each page lies. No offset or length is read out
//!   of a proof.

use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};

use super::MAX_DISK_SIZE;
use super::codec::{ENVELOPE_HEAD, Envelope, FormatError, Kind, Reader, Writer};

const HEADER: Envelope = Envelope { magic: *b"PLYPROOF", version: 1, structure: "proof" };
/// Bytes of the payload of the header.
const PAYLOAD: usize = 8 + 4 + 4 + 32;
/// Bytes of a proof before its first page.
pub const HEADER_AREA: u64 = 128;
/// Bytes of the file that are proven together.
pub const GROUP: u64 = 16 * 1024;
/// Hashes of a page.
pub const FAN: u64 = 64;
/// Bytes of a hash.
pub const HASH: u64 = 32;
/// Bytes of a full page.
pub const PAGE: u64 = FAN * HASH;
/// What follows the name of an image in the name of its proof.
pub const SUFFIX: &str = ".obao";

/// A hash: of a group, of a page, or of the whole file.
pub type Hash = [u8; 32];

/// What the header of a proof says. Only the size is used without being proven.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ProofHeader {
    /// Bytes of the image file.
    pub size: u64,
    /// The BLAKE3 hash of the image file.
    pub root: Hash,
}

impl ProofHeader {
    /// The first [`HEADER_AREA`] bytes of the proof.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u64(self.size).u32(GROUP as u32).u32(FAN as u32).raw(&self.root);
        let mut bytes = HEADER.seal(&w.finish());
        bytes.resize(HEADER_AREA as usize, 0);
        bytes
    }

    /// Reads the beginning of a proof.
    ///
    /// # Errors
    /// When it is no proof, is damaged, or was made by a newer plyfs.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let end = ENVELOPE_HEAD + PAYLOAD + 4;
        let Some(head) = bytes.get(..end) else {
            return Err(FormatError::new(Kind::Truncated, HEADER.structure, "it ends within its header"));
        };
        let mut r = Reader::new(HEADER.open(head)?, HEADER.structure);
        let (size, group, fan) = (r.u64()?, r.u32()?, r.u32()?);
        if (u64::from(group), u64::from(fan)) != (GROUP, FAN) {
            return Err(r.newer(format!(
                "it has groups of {group} bytes and pages of {fan} hashes; make it again with this version's \
                 `plyfs base seal`"
            )));
        }
        if size == 0 || size > MAX_DISK_SIZE {
            return Err(r.bad(format!("it is of an image of {size} bytes, which no image has")));
        }
        let mut root = [0; 32];
        root.copy_from_slice(r.raw(32)?);
        r.end()?;
        Ok(Self { size, root })
    }
}

/// One page of a proof.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId {
    /// 0 has the hashes of groups; the highest level has one page.
    pub level: u8,
    /// Counted from the start of the file.
    pub index: u64,
}

impl PageId {
    /// The page with the hash of this one, and the place of the hash there.
    pub fn parent(self) -> (Self, usize) {
        let above = Self { level: self.level + 1, index: self.index / FAN };
        (above, (self.index % FAN) as usize)
    }
}

/// Where the pages of a proof lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    size: u64,
    /// Of each level, from the lowest: its number of hashes, and its offset in the proof.
    levels: Vec<(u64, u64)>,
}

impl Layout {
    /// Of the proof of a file with `size` bytes, 1 at least.
    pub fn of(size: u64) -> Self {
        let mut counts = Vec::new();
        let mut count = size.div_ceil(GROUP);
        // The hash of a single group is the root.
        while count > 1 {
            counts.push(count);
            count = count.div_ceil(FAN);
        }
        let mut at = HEADER_AREA;
        let mut levels: Vec<(u64, u64)> = Vec::with_capacity(counts.len());
        for count in counts.into_iter().rev() {
            levels.push((count, at));
            at += count * HASH;
        }
        levels.reverse();
        Self { size, levels }
    }

    /// Bytes of the file.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Groups of the file; the last may be short.
    pub fn groups(&self) -> u64 {
        self.size.div_ceil(GROUP)
    }

    /// Bytes of a group.
    pub fn group_len(&self, group: u64) -> u64 {
        self.size.saturating_sub(group * GROUP).min(GROUP)
    }

    /// Bytes of the proof.
    pub fn proof_size(&self) -> u64 {
        self.levels.first().map_or(HEADER_AREA, |(count, at)| at + count * HASH)
    }

    /// Number of levels; 0 of a file with one group.
    pub fn levels(&self) -> u8 {
        self.levels.len() as u8
    }

    /// Pages of a level.
    pub fn pages(&self, level: u8) -> u64 {
        self.levels.get(usize::from(level)).map_or(0, |(count, _)| count.div_ceil(FAN))
    }

    /// Whether a page is the highest.
    pub fn is_top(&self, page: PageId) -> bool {
        usize::from(page.level) + 1 == self.levels.len()
    }

    /// Offset in the proof, and bytes, of a page that there is.
    pub fn place(&self, page: PageId) -> (u64, u64) {
        let (count, at) = self.levels[usize::from(page.level)];
        (at + page.index * PAGE, (count - page.index * FAN).min(FAN) * HASH)
    }

    /// The page with the hash of a group, and the place of the hash there; none of a file with one group.
    pub fn page_of(&self, group: u64) -> Option<(PageId, usize)> {
        let page = PageId { level: 0, index: group / FAN };
        (!self.levels.is_empty()).then_some((page, (group % FAN) as usize))
    }

    /// Whether `bytes` are those of a page with this hash.
    pub fn page_has(&self, page: PageId, bytes: &[u8], hash: &Hash) -> bool {
        let (hashes, rest) = bytes.as_chunks::<32>();
        rest.is_empty()
            && bytes.len() as u64 == self.place(page).1
            && !hashes.is_empty()
            && fold(hashes, self.is_top(page)) == *hash
    }

    /// Whether `bytes` are those of a group with this hash.
    pub fn group_has(&self, group: u64, bytes: &[u8], hash: &Hash) -> bool {
        bytes.len() as u64 == self.group_len(group)
            && !bytes.is_empty()
            && self.hash_group(group, bytes) == *hash
    }

    fn hash_group(&self, group: u64, bytes: &[u8]) -> Hash {
        if self.levels.is_empty() {
            return *blake3::hash(bytes).as_bytes();
        }
        let mut hasher = blake3::Hasher::new();
        hasher.set_input_offset(group * GROUP).update(bytes);
        hasher.finalize_non_root()
    }
}

/// The hash of a page: that of the part of the tree above its hashes. The left part of a BLAKE3 tree is the largest power
/// of two that leaves something for the right part, and all hashes but the last are of equally many bytes.
fn fold(hashes: &[Hash], is_root: bool) -> Hash {
    if let [only] = hashes {
        return *only;
    }
    let (left, right) = hashes.split_at(hashes.len().next_power_of_two() / 2);
    let (left, right) = (fold(left, false), fold(right, false));
    match is_root {
        true => *merge_subtrees_root(&left, &right, Mode::Hash).as_bytes(),
        false => merge_subtrees_non_root(&left, &right, Mode::Hash),
    }
}

/// Takes a page of a proof, and its offset there.
pub type Put<'a, E> = dyn FnMut(u64, &[u8]) -> Result<(), E> + 'a;

/// Makes the proof of a file from its bytes. Its memory does not grow with the file.
pub struct Builder {
    layout: Layout,
    group: Vec<u8>,
    /// Groups hashed so far.
    done: u64,
    /// Of each level, the number of its next page and the hashes of it so far.
    open: Vec<(u64, Vec<Hash>)>,
    root: Option<Hash>,
}

impl Builder {
    /// For a file with `size` bytes, 1 at least.
    pub fn new(size: u64) -> Self {
        let layout = Layout::of(size);
        let open = (0..layout.levels()).map(|_| (0, Vec::new())).collect();
        Self { layout, group: Vec::with_capacity(GROUP as usize), done: 0, open, root: None }
    }

    /// Where the pages lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Takes the next bytes of the file. `put` gets each page that is complete, with its offset in the proof.
    ///
    /// # Errors
    /// Those of `put`.
    pub fn update<E>(&mut self, mut bytes: &[u8], put: &mut Put<'_, E>) -> Result<(), E> {
        while !bytes.is_empty() && self.done < self.layout.groups() {
            let whole = self.layout.group_len(self.done) as usize;
            let take = (whole - self.group.len()).min(bytes.len());
            self.group.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if self.group.len() == whole {
                let hash = self.layout.hash_group(self.done, &self.group);
                self.group.clear();
                self.done += 1;
                self.add(hash, put)?;
            }
        }
        Ok(())
    }

    /// Adds the hash of a group, and closes the pages that it completes.
    fn add<E>(&mut self, mut hash: Hash, put: &mut Put<'_, E>) -> Result<(), E> {
        for level in 0..self.layout.levels() {
            let (index, hashes) = &mut self.open[usize::from(level)];
            hashes.push(hash);
            let page = PageId { level, index: *index };
            let (offset, length) = self.layout.place(page);
            if (hashes.len() as u64) * HASH < length {
                return Ok(());
            }
            put(offset, hashes.as_flattened())?;
            hash = fold(hashes, self.layout.is_top(page));
            hashes.clear();
            *index += 1;
        }
        self.root = Some(hash);
        Ok(())
    }

    /// The root, once all bytes of the file came; the caller then writes [`ProofHeader::encode`] at offset 0.
    pub fn root(&self) -> Option<Hash> {
        self.root
    }
}

/// A hash as it is written: 64 hexadecimal digits, as `b3sum` prints it.
pub fn hex(hash: &Hash) -> String {
    hex::encode(hash)
}
