//! A trace: which blocks of a base a boot read, in which order and when. The file travels with an image, so its bytes
//! are as untrusted as the image's.

use super::codec::{Envelope, FormatError, Kind, Reader, Writer};
use super::record::Digest;
use super::{BLOCK, MAX_DISK_SIZE, valid_name};

const TRACE: Envelope = Envelope { magic: *b"PLYTRACE", version: 1, structure: "trace" };

/// Most entries of a trace.
pub const MAX_ENTRIES: usize = 1 << 20;
/// Most bytes of the file.
pub const MAX_FILE: u64 = 16 << 20;
/// Fewest bytes of an entry: three numbers of at least one byte.
const SMALLEST_ENTRY: usize = 3;

/// What is known about the image on which a trace was recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Only its size.
    Unknown,
    /// The digest that the operator gave for the source.
    Digest(Digest),
    /// SHA-256 of the validators that the server sent. Another server sends others for the same bytes.
    Validator([u8; 32]),
}

impl Origin {
    /// Whether the two certainly belong to different images.
    pub fn contradicts(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Digest(Digest::Sha256(a)), Self::Digest(Digest::Sha256(b))) => a != b,
            (Self::Digest(Digest::Sha512(a)), Self::Digest(Digest::Sha512(b))) => a != b,
            _ => false,
        }
    }
}

/// Blocks that were first read together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceEntry {
    /// The first block.
    pub first: u64,
    /// Number of blocks; at least 1.
    pub blocks: u64,
    /// Milliseconds from the first read of the trace.
    pub at_ms: u32,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// Name of the base in the store where the trace was recorded. Means nothing in another store.
    pub base: String,
    /// Bytes of the base's virtual disk.
    pub size: u64,
    /// The image.
    pub origin: Origin,
    /// When it was recorded; nanoseconds since the epoch.
    pub recorded_ns: i64,
    /// Entries, in the order of the first read.
    pub entries: Vec<TraceEntry>,
}

/// Maps small distances in both directions to small numbers.
fn zigzag(v: i64) -> u64 {
    ((v << 1) ^ (v >> 63)) as u64
}

fn unzigzag(v: u64) -> i64 {
    (v >> 1) as i64 ^ -((v & 1) as i64)
}

impl Trace {
    /// Blocks of all entries.
    pub fn blocks(&self) -> u64 {
        self.entries.iter().map(|entry| entry.blocks).sum()
    }

    /// Milliseconds from the first to the last entry.
    pub fn duration_ms(&self) -> u32 {
        self.entries.last().map_or(0, |entry| entry.at_ms)
    }

    /// The bytes of the file.
    ///
    /// # Errors
    /// `Value` when [`decode`](Self::decode) would refuse the bytes: too many entries, out of bounds or out of order.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let mut bounds = Bounds::of(self.size);
        if self.entries.len() > MAX_ENTRIES {
            return Err(bad(format!("{} entries, at most {MAX_ENTRIES} are kept", self.entries.len())));
        }
        if !valid_name(&self.base) {
            return Err(bad("the name of its base is invalid"));
        }
        let mut w = Writer::new();
        w.bytes(self.base.as_bytes()).u64(self.size).i64(self.recorded_ns);
        match &self.origin {
            Origin::Unknown => w.u8(0),
            Origin::Digest(Digest::Sha256(digest)) => w.u8(1).raw(digest),
            Origin::Digest(Digest::Sha512(digest)) => w.u8(2).raw(digest),
            Origin::Validator(hash) => w.u8(3).raw(hash),
        };
        w.u32(self.entries.len() as u32);
        let mut end = 0;
        for entry in &self.entries {
            let since = entry.at_ms.checked_sub(bounds.at_ms);
            bounds.take(entry)?;
            w.varint(zigzag(entry.first as i64 - end as i64)).varint(entry.blocks - 1);
            w.varint(since.map(u64::from).ok_or_else(|| bad("its entries are not in order of time"))?);
            end = entry.first + entry.blocks;
        }
        let bytes = TRACE.seal(&w.finish());
        if bytes.len() as u64 > MAX_FILE {
            return Err(bad(format!("{} bytes, at most {MAX_FILE} are kept", bytes.len())));
        }
        Ok(bytes)
    }

    /// Reads the bytes of a file.
    ///
    /// # Errors
    /// When the bytes are not what plyfs writes: an entry outside of the base, more blocks than the base has, times
    /// that go back, too many entries or bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() as u64 > MAX_FILE {
            return Err(bad(format!("{} bytes, at most {MAX_FILE} are read", bytes.len())));
        }
        let mut r = Reader::new(TRACE.open(bytes)?, TRACE.structure);
        let base = r.text()?;
        if !valid_name(&base) {
            return Err(r.bad("the name of its base is invalid"));
        }
        let (size, recorded_ns) = (r.u64()?, r.i64()?);
        if size == 0 || size > MAX_DISK_SIZE {
            return Err(r.bad(format!("a base of {size} bytes")));
        }
        let origin = match r.u8()? {
            0 => Origin::Unknown,
            1 => Origin::Digest(Digest::Sha256(array(&mut r)?)),
            2 => Origin::Digest(Digest::Sha512(array(&mut r)?)),
            3 => Origin::Validator(array(&mut r)?),
            other => return Err(r.bad(format!("origin type {other} is not known"))),
        };
        let count = r.u32()? as usize;
        if count > MAX_ENTRIES || count > r.left() / SMALLEST_ENTRY {
            return Err(r.bad(format!("{count} entries in {} bytes", r.left())));
        }
        let mut entries = Vec::with_capacity(count);
        let mut bounds = Bounds::of(size);
        let mut end = 0u64;
        for _ in 0..count {
            let (gap, more, since) = (unzigzag(r.varint()?), r.varint()?, r.varint()?);
            let first = end.checked_add_signed(gap);
            let at_ms = u64::from(bounds.at_ms).checked_add(since).and_then(|at| u32::try_from(at).ok());
            let entry = match (first, more.checked_add(1), at_ms) {
                (Some(first), Some(blocks), Some(at_ms)) => TraceEntry { first, blocks, at_ms },
                _ => return Err(r.bad("a number in an entry is out of bounds")),
            };
            bounds.take(&entry)?;
            end = entry.first + entry.blocks;
            entries.push(entry);
        }
        r.end()?;
        Ok(Self { base, size, origin, recorded_ns, entries })
    }
}

fn bad(detail: impl Into<String>) -> FormatError {
    FormatError::new(Kind::Value, TRACE.structure, detail)
}

fn array<const N: usize>(r: &mut Reader<'_>) -> Result<[u8; N], FormatError> {
    let mut out = [0; N];
    out.copy_from_slice(r.raw(N)?);
    Ok(out)
}

/// Checks that entries stay within their bounds.
struct Bounds {
    /// Blocks of the base.
    blocks: u64,
    /// Blocks that no entry has named yet, if each is named once.
    left: u64,
    at_ms: u32,
}

impl Bounds {
    fn of(size: u64) -> Self {
        let blocks = size.div_ceil(BLOCK);
        Self { blocks, left: blocks, at_ms: 0 }
    }

    fn take(&mut self, entry: &TraceEntry) -> Result<(), FormatError> {
        let end = entry.first.checked_add(entry.blocks);
        if entry.blocks == 0 || end.is_none_or(|end| end > self.blocks) {
            return Err(bad(format!(
                "{} blocks at block {} of a base of {} blocks",
                entry.blocks, entry.first, self.blocks
            )));
        }
        self.left = self
            .left
            .checked_sub(entry.blocks)
            .ok_or_else(|| bad("its entries have more blocks than the base"))?;
        self.at_ms = entry.at_ms;
        Ok(())
    }
}
