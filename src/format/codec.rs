//! Little-endian fields and the envelope that all durable records share.

use thiserror::Error;

/// What is wrong with a durable structure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Fewer bytes than the structure says it has.
    Truncated,
    /// The first bytes are not those of this structure.
    Magic,
    /// Written by a newer plyfs.
    Newer,
    /// The checksum does not match the bytes.
    Checksum,
    /// The checksum is right, but a value is impossible.
    Value,
}

/// A durable structure that cannot be decoded.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{structure}: {detail}")]
pub struct FormatError {
    /// Kind, for programs.
    pub kind: Kind,
    /// Which structure.
    pub structure: &'static str,
    /// What is wrong, for people.
    pub detail: String,
}

impl FormatError {
    pub(crate) fn new(kind: Kind, structure: &'static str, detail: impl Into<String>) -> Self {
        Self { kind, structure, detail: detail.into() }
    }
}

/// Appends fields to a byte vector.
#[derive(Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// An empty writer.
    pub fn new() -> Self {
        Self::default()
    }
    /// Appends one byte.
    pub fn u8(&mut self, v: u8) -> &mut Self {
        self.bytes.push(v);
        self
    }
    /// Appends 16 bits.
    pub fn u16(&mut self, v: u16) -> &mut Self {
        self.bytes.extend_from_slice(&v.to_le_bytes());
        self
    }
    /// Appends 32 bits.
    pub fn u32(&mut self, v: u32) -> &mut Self {
        self.bytes.extend_from_slice(&v.to_le_bytes());
        self
    }
    /// Appends 64 bits.
    pub fn u64(&mut self, v: u64) -> &mut Self {
        self.bytes.extend_from_slice(&v.to_le_bytes());
        self
    }
    /// Appends 64 bits, signed.
    pub fn i64(&mut self, v: i64) -> &mut Self {
        self.bytes.extend_from_slice(&v.to_le_bytes());
        self
    }
    /// Appends bytes as they are.
    pub fn raw(&mut self, v: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(v);
        self
    }
    /// Appends a 16-bit length and the bytes.
    ///
    /// # Panics
    /// When `v` is longer than 65,535 bytes. Callers bound their strings.
    pub fn bytes(&mut self, v: &[u8]) -> &mut Self {
        let len = u16::try_from(v.len()).expect("field is bounded by the caller");
        self.u16(len).raw(v)
    }
    /// Appends a number in groups of 7 bits, the lowest first. All bytes except the last have the highest bit set.
    pub fn varint(&mut self, mut v: u64) -> &mut Self {
        while v >= 0x80 {
            self.u8(v as u8 | 0x80);
            v >>= 7;
        }
        self.u8(v as u8)
    }
    /// The bytes written so far.
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
    /// The bytes written so far; more can follow.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes
    }
    /// Number of bytes written so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }
    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// Takes fields from a byte slice; running out of bytes is an error.
#[derive(Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
    structure: &'static str,
}

impl<'a> Reader<'a> {
    /// Reads `bytes` as a `structure`.
    pub fn new(bytes: &'a [u8], structure: &'static str) -> Self {
        Self { rest: bytes, structure }
    }
    /// Takes `n` bytes.
    pub fn raw(&mut self, n: usize) -> Result<&'a [u8], FormatError> {
        if self.rest.len() < n {
            return Err(FormatError::new(
                Kind::Truncated,
                self.structure,
                format!("{n} bytes needed, {} left", self.rest.len()),
            ));
        }
        let (head, tail) = self.rest.split_at(n);
        self.rest = tail;
        Ok(head)
    }
    fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let mut out = [0; N];
        out.copy_from_slice(self.raw(N)?);
        Ok(out)
    }
    /// Takes one byte.
    pub fn u8(&mut self) -> Result<u8, FormatError> {
        Ok(self.array::<1>()?[0])
    }
    /// Takes 16 bits.
    pub fn u16(&mut self) -> Result<u16, FormatError> {
        Ok(u16::from_le_bytes(self.array()?))
    }
    /// Takes 32 bits.
    pub fn u32(&mut self) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.array()?))
    }
    /// Takes 64 bits.
    pub fn u64(&mut self) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(self.array()?))
    }
    /// Takes 64 bits, signed.
    pub fn i64(&mut self) -> Result<i64, FormatError> {
        Ok(i64::from_le_bytes(self.array()?))
    }
    /// Takes a 16-bit length and that many bytes.
    pub fn bytes(&mut self) -> Result<&'a [u8], FormatError> {
        let len = self.u16()?;
        self.raw(len.into())
    }
    /// Takes a length and UTF-8 text.
    pub fn text(&mut self) -> Result<String, FormatError> {
        let bytes = self.bytes()?;
        String::from_utf8(bytes.to_vec()).map_err(|_| self.bad("text is not UTF-8"))
    }
    /// Takes a number that [`Writer::varint`] wrote. Refuses an encoding with more bytes than necessary.
    pub fn varint(&mut self) -> Result<u64, FormatError> {
        let mut v = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                break;
            }
            v |= bits << shift;
            if byte & 0x80 == 0 {
                if byte == 0 && shift != 0 {
                    return Err(self.bad("a number has more bytes than it needs"));
                }
                return Ok(v);
            }
        }
        Err(self.bad("a number has more than 64 bits"))
    }
    /// Bytes not taken yet.
    pub fn left(&self) -> usize {
        self.rest.len()
    }
    /// An error about a value of this structure.
    pub fn bad(&self, detail: impl Into<String>) -> FormatError {
        FormatError::new(Kind::Value, self.structure, detail)
    }
    /// An error about a value that only a newer plyfs writes.
    pub fn newer(&self, detail: impl Into<String>) -> FormatError {
        FormatError::new(Kind::Newer, self.structure, detail)
    }
    /// Fails when bytes are left over.
    pub fn end(&self) -> Result<(), FormatError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(self.bad(format!("{} bytes too many", self.rest.len())))
        }
    }
}

/// Header, feature words and checksum around the payload of a record (docs/format.md, "Envelope").
#[derive(Debug, Clone, Copy)]
pub struct Envelope {
    /// First eight bytes of the file.
    pub magic: [u8; 8],
    /// Newest version this code reads.
    pub version: u16,
    /// For error messages.
    pub structure: &'static str,
}

/// Bytes of an envelope before its payload.
pub(super) const ENVELOPE_HEAD: usize = 8 + 2 + 2 + 4 + 3 * 8;
const HEAD: usize = ENVELOPE_HEAD;

impl Envelope {
    /// Wraps `payload`. This version sets no feature bit.
    pub fn seal(&self, payload: &[u8]) -> Vec<u8> {
        self.seal_as(self.version, payload)
    }

    /// As [`seal`](Self::seal), for a payload of an older version.
    pub fn seal_as(&self, version: u16, payload: &[u8]) -> Vec<u8> {
        self.seal_with(version, 0, payload)
    }

    /// As [`seal_as`](Self::seal_as), with bits of the autoclear word.
    pub fn seal_with(&self, version: u16, autoclear: u64, payload: &[u8]) -> Vec<u8> {
        let mut w = Writer::new();
        w.raw(&self.magic).u16(version).u16(0);
        w.u32(u32::try_from(payload.len()).expect("records are small"));
        w.u64(0).u64(0).u64(autoclear);
        w.raw(payload);
        let sum = crc32c::crc32c(&w.bytes);
        w.u32(sum);
        w.finish()
    }

    /// The payload of `bytes`, if magic, version, features, length and checksum are right.
    pub fn open<'a>(&self, bytes: &'a [u8]) -> Result<&'a [u8], FormatError> {
        self.open_any(bytes).map(|(payload, _)| payload)
    }

    /// As [`open`](Self::open), with the version of the payload: 1 to the newest.
    pub fn open_any<'a>(&self, bytes: &'a [u8]) -> Result<(&'a [u8], u16), FormatError> {
        self.open_with(bytes).map(|(payload, version, _)| (payload, version))
    }

    /// As [`open_any`](Self::open_any), with the autoclear word.
    pub fn open_with<'a>(&self, bytes: &'a [u8]) -> Result<(&'a [u8], u16, u64), FormatError> {
        let fail = |kind, detail: String| Err(FormatError::new(kind, self.structure, detail));
        let mut r = Reader::new(bytes, self.structure);
        let magic = r.raw(8)?;
        if magic != self.magic {
            return fail(Kind::Magic, "the magic bytes are not those of this structure".into());
        }
        let version = r.u16()?;
        let _reserved = r.u16()?;
        let len = r.u32()? as usize;
        let incompatible = r.u64()?;
        let _compatible = r.u64()?;
        let autoclear = r.u64()?;
        // The checksum is compared before the version: a flipped bit must not be reported as a newer store.
        let end = HEAD.checked_add(len).filter(|end| bytes.len() == end.saturating_add(4));
        let Some(end) = end else {
            return fail(
                Kind::Truncated,
                format!("{} bytes, {} expected", bytes.len(), HEAD.saturating_add(len).saturating_add(4)),
            );
        };
        let mut sum = [0; 4];
        sum.copy_from_slice(&bytes[end..]);
        if crc32c::crc32c(&bytes[..end]) != u32::from_le_bytes(sum) {
            return fail(Kind::Checksum, "checksum mismatch, the bytes were damaged".into());
        }
        if version > self.version || version == 0 {
            return fail(
                Kind::Newer,
                format!(
                    "version {version}, but this plyfs reads versions up to {}; use a newer plyfs",
                    self.version
                ),
            );
        }
        if incompatible != 0 {
            return fail(
                Kind::Newer,
                format!("unknown incompatible features {incompatible:#x}; use a newer plyfs"),
            );
        }
        Ok((&bytes[HEAD..end], version, autoclear))
    }
}
