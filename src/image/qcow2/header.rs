//! Decodes the first cluster of a qcow2 image: header, header extensions and backing file name.
//!
//! Source: QEMU's docs/interop/qcow2.txt. All numbers are big endian.

use crate::format::MAX_DISK_SIZE;
use crate::image::{Chain, Format, HEAD, ImageError, Method, sniff, too_big};

/// The most that an L1 table may take, as in QEMU.
const MAX_L1: u64 = 32 << 20;

const SUBCLUSTERS: u64 = 32;

// Incompatible features.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;

// Header extensions.
const END: u32 = 0;
const FEATURE_NAMES: u32 = 0x6803_f857;
const ENCRYPTION: u32 = 0x0537_be77;
const DATA_FILE_NAME: u32 = 0x4441_5441;

/// The parts of the header that a reader needs. Every number was checked against the length of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the cluster size: 9 to 21.
    pub cluster_bits: u32,
    /// Bytes of the virtual disk.
    pub size: u64,
    /// The offset of the L1 table.
    pub l1_offset: u64,
    /// The L1 entries that the disk needs; further entries are ignored.
    pub l1_entries: u64,
    /// The refcount table, offset and length. No other table may overlap it.
    pub refcounts: (u64, u64),
    /// L2 entries have two words (subclusters).
    pub extended: bool,
    /// The compression of compressed clusters.
    pub method: Method,
    /// The backing file name, sanitised.
    pub backing: Option<String>,
}

impl Header {
    /// Bytes of a cluster, and of an L2 table.
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an entry of an L2 table.
    pub fn entry(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster() / self.entry()
    }

    /// Guest bytes that one L2 table maps.
    pub fn l2_span(&self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// Guest bytes of a subcluster.
    pub fn subcluster(&self) -> u64 {
        self.cluster() / SUBCLUSTERS
    }

    /// Decodes and checks `head`, which is the first [`HEAD`] bytes or all of a shorter file.
    ///
    /// # Errors
    /// `Invalid`, `Refused` or `Unsupported`.
    pub fn decode(head: &[u8], file_size: u64, chain: Chain) -> Result<Self, ImageError> {
        if !head.starts_with(b"QFI\xfb") {
            return Err(sniff::not_this(Format::Qcow2, head));
        }
        let word = |at: usize| u32_at(head, at);
        let long = |at: usize| u64_at(head, at);
        let version = word(4)?;
        if version != 2 && version != 3 {
            let what = format!("it has version {version}, but plyfs reads only 2 and 3");
            return Err(unsupported(what, "convert it: qemu-img convert -O qcow2").at(4));
        }
        let cluster_bits = word(20)?;
        if !(9..=21).contains(&cluster_bits) {
            return Err(invalid(format!("its clusters have 2^{cluster_bits} bytes, not 2^9 to 2^21")).at(20));
        }
        let cluster = 1u64 << cluster_bits;
        let (incompatible, length) = match version {
            2 => (0, 72),
            _ => (long(72)?, u64::from(word(100)?)),
        };
        if version == 3 && (length < 104 || length > cluster || !length.is_multiple_of(8)) {
            return Err(invalid(format!("its header claims a length of {length} bytes")).at(100));
        }
        let backing_offset = long(8)?;
        let extensions = Extensions::decode(head, length, backing_offset, cluster)?;

        features(incompatible, &extensions)?;
        let method = compression(head, version, incompatible, length)?;
        let crypt = word(32)?;
        if crypt != 0 || extensions.encryption.is_some() {
            let advice = "decrypt it: qemu-img convert --image-opts with the secret, -O qcow2";
            let at = if crypt != 0 { 32 } else { extensions.encryption.unwrap_or(0) };
            return Err(unsupported("it is encrypted".into(), advice).at(at));
        }
        if let Some(at) = extensions.data_file {
            return Err(data_file().at(at));
        }
        if version == 3 && word(96)? > 6 {
            let what = format!("its refcounts have 2^{} bits, more than 64", word(96)?);
            return Err(invalid(what).at(96));
        }
        let extended = incompatible & EXTENDED_L2 != 0;
        if extended && cluster_bits < 14 {
            return Err(invalid(format!(
                "its clusters of {cluster} bytes are too small for subclusters (extended L2 entries)"
            ))
            .at(20));
        }

        let size = long(24)?;
        if size > MAX_DISK_SIZE {
            return Err(too_big(Format::Qcow2, size).at(24));
        }
        let backing = backing(head, backing_offset, cluster, chain)?;
        let mut header = Self {
            version,
            cluster_bits,
            size,
            l1_offset: long(40)?,
            l1_entries: 0,
            refcounts: (long(48)?, u64::from(word(56)?) << cluster_bits),
            extended,
            method,
            backing,
        };
        header.l1_entries = size.div_ceil(header.l2_span());
        header.check_l1(u64::from(word(36)?), file_size)?;
        Ok(header)
    }

    fn check_l1(&self, has: u64, file_size: u64) -> Result<(), ImageError> {
        let needs = self.l1_entries;
        if has.max(needs) > MAX_L1 / 8 {
            let what = format!("its L1 table has {} entries, more than 32 MiB", has.max(needs));
            return Err(
                unsupported(what, "convert it with larger clusters: qemu-img convert -O qcow2").at(36)
            );
        }
        if has < needs {
            return Err(invalid(format!("its L1 table has {has} entries, but the disk needs {needs}")).at(36));
        }
        if needs == 0 {
            return Ok(());
        }
        let offset = self.l1_offset;
        let wrong = if !offset.is_multiple_of(self.cluster()) {
            "does not begin at a cluster"
        } else if offset < self.cluster() {
            "overlaps the header"
        } else if offset.checked_add(needs * 8).is_none_or(|end| end > file_size) {
            "is outside the file"
        } else if overlap((offset, needs * 8), self.refcounts) {
            "overlaps the refcount table"
        } else {
            return Ok(());
        };
        Err(invalid(format!("its L1 table, at {offset:#x}, {wrong}")).at(40))
    }
}

pub(super) fn overlap(a: (u64, u64), b: (u64, u64)) -> bool {
    a.1 > 0 && b.1 > 0 && a.0 < b.0.saturating_add(b.1) && b.0 < a.0.saturating_add(a.1)
}

pub(super) fn invalid(what: String) -> ImageError {
    ImageError::invalid(Format::Qcow2, what)
}

fn unsupported(what: String, advice: &str) -> ImageError {
    ImageError::unsupported(Format::Qcow2, what, advice)
}

fn data_file() -> ImageError {
    let what = "it keeps its data in another file, and an image may not say which files are read";
    ImageError::refused(
        Format::Qcow2,
        what,
        "on a host that trusts the image, convert it to one file: qemu-img convert -O qcow2",
    )
}

fn cut(head: &[u8], what: &str) -> ImageError {
    if head.len() as u64 >= HEAD {
        return invalid(format!("{what} goes beyond the first 64 KiB"));
    }
    invalid(format!("the file ends within {what}"))
}

fn u32_at(head: &[u8], at: usize) -> Result<u32, ImageError> {
    let bytes = head.get(at..).and_then(|rest| rest.first_chunk());
    bytes.map(|bytes| u32::from_be_bytes(*bytes)).ok_or_else(|| cut(head, "the header"))
}

fn u64_at(head: &[u8], at: usize) -> Result<u64, ImageError> {
    let bytes = head.get(at..).and_then(|rest| rest.first_chunk());
    bytes.map(|bytes| u64::from_be_bytes(*bytes)).ok_or_else(|| cut(head, "the header"))
}

/// The header extensions that matter to a reader. Bitmaps, the format of the backing file, and unknown extensions do not
/// matter, by the definition of extensions.
#[derive(Default)]
struct Extensions {
    /// Bit numbers and names of incompatible features.
    names: Vec<(u8, String)>,
    /// The offset of such an extension.
    encryption: Option<u64>,
    data_file: Option<u64>,
}

impl Extensions {
    fn decode(head: &[u8], from: u64, backing_offset: u64, cluster: u64) -> Result<Self, ImageError> {
        let mut found = Self::default();
        let end = if backing_offset == 0 { cluster } else { backing_offset.min(cluster) };
        let mut at = from;
        while at.checked_add(8).is_some_and(|next| next <= end) {
            let position = usize::try_from(at).map_err(|_| cut(head, "the header"))?;
            let kind = u32_at(head, position).map_err(|_| cut(head, "a header extension"))?;
            if kind == END {
                break;
            }
            let len = u64::from(u32_at(head, position + 4).map_err(|_| cut(head, "a header extension"))?);
            if len > end - at - 8 {
                let what = format!("its header extension {kind:#010x} claims a length of {len} bytes");
                return Err(invalid(what).at(at + 4));
            }
            let last = position + 8 + usize::try_from(len).map_err(|_| cut(head, "a header extension"))?;
            let data = head.get(position + 8..last).ok_or_else(|| cut(head, "a header extension"))?;
            match kind {
                FEATURE_NAMES => {
                    found.names.extend(data.chunks_exact(48).filter(|e| e[0] == 0).map(|entry| {
                        let name = entry[2..].split(|byte| *byte == 0).next().unwrap_or_default();
                        (entry[1], sanitise(name))
                    }))
                }
                ENCRYPTION => found.encryption = Some(at),
                DATA_FILE_NAME => found.data_file = Some(at),
                _ => {}
            }
            at += 8 + len.next_multiple_of(8);
        }
        Ok(found)
    }
}

fn features(incompatible: u64, extensions: &Extensions) -> Result<(), ImageError> {
    let unknown = incompatible & !KNOWN;
    if unknown != 0 {
        let all: Vec<String> = (0..64u8)
            .filter(|bit| unknown >> bit & 1 != 0)
            .map(|bit| match extensions.names.iter().find(|(number, _)| *number == bit) {
                Some((_, name)) => format!("bit {bit} ({name})"),
                None => format!("bit {bit}"),
            })
            .collect();
        let what = format!("it has unknown incompatible features: {}", all.join(", "));
        return Err(unsupported(what, "convert it with the program that wrote it").at(72));
    }
    if incompatible & CORRUPT != 0 {
        let what = "it is marked as corrupt";
        return Err(ImageError::refused(
            Format::Qcow2,
            what,
            "repair a copy (qemu-img check -r all) and check what is in it",
        )
        .at(72));
    }
    if incompatible & DATA_FILE != 0 {
        return Err(data_file().at(72));
    }
    Ok(())
}

/// The compression method. The type field and the feature bit must agree.
fn compression(head: &[u8], version: u32, incompatible: u64, length: u64) -> Result<Method, ImageError> {
    let kind = match head.get(104) {
        Some(kind) if version == 3 && length > 104 => *kind,
        _ => 0,
    };
    let flag = incompatible & COMPRESSION != 0;
    match kind {
        0 if !flag => Ok(Method::Deflate),
        1 if flag => Ok(Method::Zstd),
        0 | 1 => Err(invalid(format!(
            "its compression type is {kind}, but the feature bit for a type other than zlib is {}",
            if flag { "set" } else { "not set" }
        ))
        .at(104)),
        _ => Err(unsupported(
            format!("its compression type {kind} is unknown"),
            "convert it: qemu-img convert -c -O qcow2",
        )
        .at(104)),
    }
}

fn backing(head: &[u8], offset: u64, cluster: u64, chain: Chain) -> Result<Option<String>, ImageError> {
    let len = u64::from(u32_at(head, 16)?);
    if offset == 0 {
        return match chain {
            Chain::Alone => Ok(None),
            Chain::OnBacking => {
                let what = "a backing image was given, but this image has none";
                Err(ImageError::refused(Format::Qcow2, what, "omit the backing image"))
            }
        };
    }
    if len == 0 || len > 1023 || offset < 72 || offset.checked_add(len).is_none_or(|end| end > cluster) {
        let what = format!(
            "the name of its backing file, {len} bytes at {offset:#x}, is not in the header's cluster"
        );
        return Err(invalid(what).at(8));
    }
    let end = usize::try_from(offset + len).map_err(|_| cut(head, "the name of the backing file"))?;
    let name = head.get(end - len as usize..end).ok_or_else(|| cut(head, "the name of the backing file"))?;
    let name = sanitise(name);
    match chain {
        Chain::OnBacking => Ok(Some(name)),
        Chain::Alone => {
            let what = format!(
                "it is on top of a backing file (\"{name}\"), and an image may not say which files are read"
            );
            let advice =
                "name the file yourself with --backing, or make one file of both: qemu-img convert -O qcow2";
            Err(ImageError::refused(Format::Qcow2, what, advice).at(8))
        }
    }
}

/// Sanitises a name from an image for a message: escapes control characters, shortens it, and removes user info and query
/// from a URL.
fn sanitise(name: &[u8]) -> String {
    let text = String::from_utf8_lossy(name);
    let mut shown: &str = &text;
    let rest;
    if let Some((scheme, after)) = text.split_once("://") {
        let after = after.split(['?', '#']).next().unwrap_or_default();
        let (host, path) = after.find('/').map_or((after, ""), |slash| after.split_at(slash));
        let host = host.rsplit('@').next().unwrap_or_default();
        rest = format!("{scheme}://{host}{path}");
        shown = &rest;
    }
    let mut out: String = shown.chars().take(200).flat_map(char::escape_default).collect();
    if shown.chars().nth(200).is_some() {
        out.push_str("...");
    }
    out
}
