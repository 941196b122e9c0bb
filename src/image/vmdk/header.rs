//! The sector that a sparse extent of VMDK begins with, and the same at its end.
//!
//! After VMware's "Virtual Disk Format 5.0" and QEMU's block/vmdk.c. Everything is little endian, in sectors of 512
//! bytes.

use super::descriptor::{Descriptor, Kind};
use crate::format::MAX_DISK_SIZE;
use crate::image::{Chain, Format, HEAD, ImageError, sniff, too_big};

/// Bytes of a sector.
pub const SECTOR: u64 = 512;

/// The most that a grain directory may take.
const MAX_DIRECTORY: u64 = 32 << 20;

/// In a compressed image the directory may be at the end, found by a footer.
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

/// What of the header decides how grains are found. Checked against the length of the file, but for the directory
/// when a footer says where it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes of the virtual disk.
    pub size: u64,
    /// Bytes of a grain, a power of two.
    pub grain: u64,
    /// Entries of a grain table.
    pub entries: u64,
    /// Offset of the grain directory in the file; none when the footer says it.
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

    /// Decodes and judges `head`, which is the first 64 KiB or all of a shorter file, with the descriptor in it.
    ///
    /// # Errors
    /// `Invalid`, `Refused` or `Unsupported`.
    pub fn decode(head: &[u8], file_size: u64, chain: Chain) -> Result<Self, ImageError> {
        other_kinds(head)?;
        let header = Self::sector(head, file_size, 0)?;
        let (start, len) = (long(head, 28)?, long(head, 36)?);
        if start == 0 || len == 0 {
            let what = "there is no descriptor in it: it is one file of a disk of several";
            let advice = "make one file of the disk where all of them are: qemu-img convert -O qcow2";
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
            descriptor.ok_or_else(|| invalid("its descriptor is not inside of the file".into()).at(28))?;
        let descriptor =
            Descriptor::parse(descriptor, header.size / SECTOR).map_err(|error| error.at(start * SECTOR))?;
        if (descriptor.kind == Kind::StreamOptimized) != header.compressed {
            let what = format!(
                "its descriptor says {}, and its grains are {}compressed",
                descriptor.kind.name(),
                if header.compressed { "" } else { "not " }
            );
            return Err(invalid(what).at(77));
        }
        match chain {
            Chain::Alone => Ok(header),
            Chain::OnBacking => {
                let what = "a backing image was given, and this image has none";
                Err(refused(what.into(), "leave the backing image out"))
            }
        }
    }

    /// `at` is where in the file `head` begins, for messages.
    fn sector(head: &[u8], file_size: u64, at: u64) -> Result<Self, ImageError> {
        let _: [u8; SECTOR as usize] = bytes(head, 0)?;
        let version = word(head, 4)?;
        if !(1..=3).contains(&version) {
            return Err(unsupported(format!("it has version {version}, and only 1 to 3 are read"), CONVERT)
                .at(at + 4));
        }
        let flags = word(head, 8)?;
        if flags & !KNOWN != 0 {
            return Err(unsupported(
                format!("it has flags that are not known: {:#x}", flags & !KNOWN),
                CONVERT,
            )
            .at(at + 8));
        }
        if flags & NEWLINES != 0 && head.get(73..77) != Some(b"\n \r\n") {
            let what = "its line ends were changed: it was copied as text";
            return Err(invalid(what.into()).advise("copy it again, as binary").at(at + 73));
        }
        let compressed = match (u16_at(head, 77)?, flags & COMPRESSED != 0, flags & MARKERS != 0) {
            (0, false, false) => false,
            (1, true, true) => true,
            (algorithm, ..) => {
                let what = format!("compression {algorithm} with flags {flags:#x} is not known");
                return Err(unsupported(what, CONVERT).at(at + 77));
            }
        };
        let (capacity, grain) = (long(head, 12)?, long(head, 20)?);
        let Some(size) = capacity.checked_mul(SECTOR).filter(|size| *size <= MAX_DISK_SIZE) else {
            return Err(too_big(Format::Vmdk, capacity.saturating_mul(SECTOR)).at(at + 12));
        };
        if size == 0 {
            return Err(invalid("its disk is said to have no bytes".into()).at(at + 12));
        }
        if !grain.is_power_of_two() || !(1..=4096).contains(&grain) {
            let what = format!("its grains are said to have {grain} sectors, not a power of two up to 2 MiB");
            return Err(invalid(what).at(at + 20));
        }
        let entries = u64::from(word(head, 44)?);
        if !(1..=512).contains(&entries) {
            return Err(invalid(format!("its grain tables are said to have {entries} entries")).at(at + 44));
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
            let what = format!("its grain directory, {needs} bytes at {start:#x}, is not inside of the file");
            return Err(invalid(what).at(at + 56));
        }
        Ok(header)
    }

    /// Where the footer is: marker, header and end of stream, a sector each.
    pub fn footer_at(file_size: u64) -> u64 {
        file_size.next_multiple_of(SECTOR).saturating_sub(3 * SECTOR)
    }

    /// This header with the directory that the footer names.
    ///
    /// # Errors
    /// `Invalid`, or what the header itself can be refused for.
    pub fn with_footer(&self, footer: &[u8], file_size: u64) -> Result<Self, ImageError> {
        let at = Self::footer_at(file_size);
        let marker = |from: usize, kind: u32| -> Result<bool, ImageError> {
            Ok(long(footer, from)? == u64::from(kind == MARKER_FOOTER)
                && word(footer, from + 8)? == 0
                && word(footer, from + 12)? == kind)
        };
        // The first word is how many sectors follow.
        let magic = footer.get(512..516) == Some(b"KDMV");
        if !(marker(0, MARKER_FOOTER)? && magic && marker(1024, MARKER_END)?) {
            let what = "its grain directory is said to be at its end, and no footer is there";
            return Err(invalid(what.into()).at(at));
        }
        let found = Self::sector(&footer[512..], file_size, at + SECTOR)?;
        if found.directory.is_none() || (Self { directory: None, ..found.clone() }) != *self {
            return Err(invalid("its header and its footer contradict each other".into()).at(at + SECTOR));
        }
        Ok(found)
    }
}

pub(super) const CONVERT: &str = "convert it where it is trusted: qemu-img convert -O qcow2";

/// What is called VMDK and has another form.
fn other_kinds(head: &[u8]) -> Result<(), ImageError> {
    if head.starts_with(b"KDMV") {
        return Ok(());
    }
    let text = head.iter().position(|byte| !byte.is_ascii_whitespace()).map(|from| &head[from..]);
    if text.is_some_and(|text| text.starts_with(b"# Disk DescriptorFile") || text.starts_with(b"version=")) {
        let what = "it is a descriptor that names the files of the disk, and an image may not say which files are \
                    read";
        let advice = "make one file of the disk where it is trusted: qemu-img convert -O qcow2";
        return Err(refused(what.into(), advice));
    }
    if head.starts_with(b"COWD") {
        return Err(unsupported("it is of the old form COWD".into(), CONVERT));
    }
    if head.starts_with(&0x0000_0000_cafe_babe_u64.to_le_bytes()) {
        return Err(unsupported("it is of the form SESparse".into(), CONVERT));
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
