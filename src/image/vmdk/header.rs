//! Decodes the header sector of a sparse VMDK extent, and the footer, which has the same layout.
//!
//! Sources: VMware's "Virtual Disk Format 5.0" and QEMU's block/vmdk.c. All numbers are little endian; units are sectors
//! of 512 bytes.

use super::descriptor::{Descriptor, Kind};
use crate::format::MAX_DISK_SIZE;
use crate::image::{Chain, Format, HEAD, ImageError, sniff, too_big};

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// The largest grain directory, bytes.
const MAX_DIRECTORY: u64 = 32 << 20;

/// The directory offset that refers to a footer at the end of a compressed image.
const AT_END: u64 = u64::MAX;

// Flags.
const NEWLINES: u32 = 1 << 0;
const REDUNDANT: u32 = 1 << 1;
const ZERO_GRAINS: u32 = 1 << 2;
const COMPRESSED: u32 = 1 << 16;
const MARKERS: u32 = 1 << 17;
const KNOWN: u32 = NEWLINES | REDUNDANT | ZERO_GRAINS | COMPRESSED | MARKERS;

const MARKER_END: u32 = 0;
const MARKER_FOOTER: u32 = 3;

/// The parts of the header that a reader needs. All are checked against the length of the file, except the directory
/// when a footer has its offset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the virtual disk.
    pub size: u64,
    /// Bytes of a grain, a power of two.
    pub grain: u64,
    /// Entries of a grain table.
    pub entries: u64,
    /// Offset of the grain directory in the file; `None` when the footer has it.
    pub directory: Option<u64>,
    /// An entry of 1 means zeros.
    pub zero_grains: bool,
    /// Grains are compressed, each behind a marker.
    pub compressed: bool,
}

impl Header {
    /// Guest bytes that one grain table maps.
    pub fn table_span(&self) -> u64 {
        self.entries * self.grain
    }

    /// Entries of the grain directory.
    pub fn tables(&self) -> u64 {
        self.size.div_ceil(self.table_span())
    }

    /// Decodes and checks `head`, which is the first 64 KiB or all of a shorter file, and includes the descriptor.
    ///
    /// # Errors
    /// `Invalid`, `Refused` or `Unsupported`.
    pub fn decode(head: &[u8], file_size: u64, chain: Chain) -> Result<Self, ImageError> {
        other_kinds(head)?;
        let header = Self::sector(head, file_size, 0)?;
        let (start, len) = (long(head, 28)?, long(head, 36)?);
        if start == 0 || len == 0 {
            let what = "it has no descriptor: it is one of several files of a disk";
            let advice = "convert the whole disk to one file: qemu-img convert -O qcow2";
            return Err(refused(what.into(), advice).at(28));
        }
        let range = start.checked_mul(SECTOR).zip(len.checked_mul(SECTOR));
        let range = range.and_then(|(start, len)| Some((start, start.checked_add(len)?)));
        let descriptor = match range {
            Some((start, end)) if end <= HEAD => head.get(start as usize..end as usize),
            Some((_, end)) if end <= file_size => {
                let what = "its descriptor goes beyond the first 64 KiB";
                return Err(unsupported(what.into(), CONVERT).at(28));
            }
            _ => None,
        };
        let descriptor =
            descriptor.ok_or_else(|| invalid("its descriptor is outside the file".into()).at(28))?;
        let descriptor =
            Descriptor::parse(descriptor, header.size / SECTOR).map_err(|error| error.at(start * SECTOR))?;
        if (descriptor.kind == Kind::StreamOptimized) != header.compressed {
            let what = format!(
                "its descriptor says {}, but its grains are {}compressed",
                descriptor.kind.name(),
                if header.compressed { "" } else { "not " }
            );
            return Err(invalid(what).at(77));
        }
        match chain {
            Chain::Alone => Ok(header),
            Chain::OnBacking => {
                let what = "a backing image was given, but this image has none";
                Err(refused(what.into(), "omit the backing image"))
            }
        }
    }

    /// Decodes one header sector. `at` is its offset in the file, for messages.
    fn sector(head: &[u8], file_size: u64, at: u64) -> Result<Self, ImageError> {
        let _: [u8; SECTOR as usize] = bytes(head, 0)?;
        let version = word(head, 4)?;
        if !(1..=3).contains(&version) {
            return Err(unsupported(
                format!("it has version {version}, but plyfs reads only 1 to 3"),
                CONVERT,
            )
            .at(at + 4));
        }
        let flags = word(head, 8)?;
        if flags & !KNOWN != 0 {
            return Err(
                unsupported(format!("it has unknown flags: {:#x}", flags & !KNOWN), CONVERT).at(at + 8)
            );
        }
        if flags & NEWLINES != 0 && head.get(73..77) != Some(b"\n \r\n") {
            let what = "its line ends were changed by a copy in text mode";
            return Err(invalid(what.into()).advise("copy it again in binary mode").at(at + 73));
        }
        let compressed = match (u16_at(head, 77)?, flags & COMPRESSED != 0, flags & MARKERS != 0) {
            (0, false, false) => false,
            (1, true, true) => true,
            (algorithm, ..) => {
                let what = format!("compression {algorithm} with flags {flags:#x} is unknown");
                return Err(unsupported(what, CONVERT).at(at + 77));
            }
        };
        let (capacity, grain) = (long(head, 12)?, long(head, 20)?);
        let Some(size) = capacity.checked_mul(SECTOR).filter(|size| *size <= MAX_DISK_SIZE) else {
            return Err(too_big(Format::Vmdk, capacity.saturating_mul(SECTOR)).at(at + 12));
        };
        if size == 0 {
            return Err(invalid("it claims a disk of 0 bytes".into()).at(at + 12));
        }
        if !grain.is_power_of_two() || !(1..=4096).contains(&grain) {
            let what =
                format!("it claims grains of {grain} sectors, and that is no power of two up to 2 MiB");
            return Err(invalid(what).at(at + 20));
        }
        let entries = u64::from(word(head, 44)?);
        if !(1..=512).contains(&entries) {
            return Err(
                invalid(format!("it claims grain tables of {entries} entries, not of 1 to 512")).at(at + 44)
            );
        }
        let directory = match long(head, 56)? {
            AT_END if compressed => None,
            sector => Some(sector.saturating_mul(SECTOR)),
        };
        let zero_grains = flags & ZERO_GRAINS != 0;
        let header = Self { size, grain: grain * SECTOR, entries, directory, zero_grains, compressed };
        let needs = header.tables() * 4;
        if needs > MAX_DIRECTORY {
            return Err(unsupported(
                format!("its grain directory has {needs} bytes, more than 32 MiB"),
                CONVERT,
            )
            .at(at + 12));
        }
        if let Some(start) = directory
            && (start < SECTOR || start.checked_add(needs).is_none_or(|end| end > file_size))
        {
            let what = format!("its grain directory, {needs} bytes at {start:#x}, is outside the file");
            return Err(invalid(what).at(at + 56));
        }
        Ok(header)
    }

    /// The offset of the footer: a marker, a header and an end-of-stream marker, one sector each.
    pub fn footer_at(file_size: u64) -> u64 {
        file_size.next_multiple_of(SECTOR).saturating_sub(3 * SECTOR)
    }

    /// This header with the directory that the footer names.
    ///
    /// # Errors
    /// `Invalid`, or any error of the header itself.
    pub fn with_footer(&self, footer: &[u8], file_size: u64) -> Result<Self, ImageError> {
        let at = Self::footer_at(file_size);
        let marker = |from: usize, kind: u32| -> Result<bool, ImageError> {
            Ok(long(footer, from)? == u64::from(kind == MARKER_FOOTER)
                && word(footer, from + 8)? == 0
                && word(footer, from + 12)? == kind)
        };
        // The first word is the number of sectors that follow.
        let magic = footer.get(512..516) == Some(b"KDMV");
        if !(marker(0, MARKER_FOOTER)? && magic && marker(1024, MARKER_END)?) {
            let what = "its header places the grain directory at the end of the file, but there is no footer";
            return Err(invalid(what.into()).at(at));
        }
        let found = Self::sector(&footer[512..], file_size, at + SECTOR)?;
        if found.directory.is_none() || (Self { directory: None, ..found.clone() }) != *self {
            return Err(invalid("its header and its footer contradict each other".into()).at(at + SECTOR));
        }
        Ok(found)
    }
}

pub(super) const CONVERT: &str = "on a host that trusts the image, convert it: qemu-img convert -O qcow2";

/// Refuses other formats that are called VMDK.
fn other_kinds(head: &[u8]) -> Result<(), ImageError> {
    if head.starts_with(b"KDMV") {
        return Ok(());
    }
    let text = head.iter().position(|byte| !byte.is_ascii_whitespace()).map(|from| &head[from..]);
    if text.is_some_and(|text| text.starts_with(b"# Disk DescriptorFile") || text.starts_with(b"version=")) {
        let what = "it is a descriptor that names the files of the disk, and an image may not say which files are read";
        let advice =
            "on a host that trusts the image, convert the disk to one file: qemu-img convert -O qcow2";
        return Err(refused(what.into(), advice));
    }
    if head.starts_with(b"COWD") {
        return Err(unsupported("it has the old format COWD".into(), CONVERT));
    }
    if head.starts_with(&0x0000_0000_cafe_babe_u64.to_le_bytes()) {
        return Err(unsupported("it has the format SESparse".into(), CONVERT));
    }
    Err(sniff::not_this(Format::Vmdk, head))
}

pub(super) fn invalid(what: String) -> ImageError {
    ImageError::invalid(Format::Vmdk, what)
}

pub(super) fn refused(what: String, advice: &str) -> ImageError {
    ImageError::refused(Format::Vmdk, what, advice)
}

pub(super) fn unsupported(what: String, advice: &str) -> ImageError {
    ImageError::unsupported(Format::Vmdk, what, advice)
}

fn bytes<const N: usize>(head: &[u8], at: usize) -> Result<[u8; N], ImageError> {
    let found = head.get(at..).and_then(|rest| rest.first_chunk());
    found.copied().ok_or_else(|| invalid("the file ends within its header".into()))
}

fn u16_at(head: &[u8], at: usize) -> Result<u16, ImageError> {
    bytes(head, at).map(u16::from_le_bytes)
}

fn word(head: &[u8], at: usize) -> Result<u32, ImageError> {
    bytes(head, at).map(u32::from_le_bytes)
}

fn long(head: &[u8], at: usize) -> Result<u64, ImageError> {
    bytes(head, at).map(u64::from_le_bytes)
}
