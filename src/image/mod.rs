//! The virtual disk inside an image file: maps a guest range to bytes of the file.
//!
//! An [`Image`] maps ranges and inflates compressed clusters. It keeps tables, but no data. What must hold:
//! - **Every image is treated as hostile.** A number from the image is compared with the length of the file before it
//!   is used. Time and memory of every call are bounded, whatever the tables say. Names in the image appear in messages
//!   only: this module opens no file and reads only the one [`Source`] that it was given.
//! - Every call can be run again. When bytes must be fetched first, the call returns that error unchanged and keeps what
//!   it parsed before. No lock is held across a read of the source. Two threads may read one table at once: both get the
//!   same bytes, and one copy is kept.
//! - A failure of the source is never cached. An error about the image is, because its bytes do not change.

mod error;
mod fetch;
mod inflate;
pub mod qcow2;
mod raw;
mod sniff;
mod table;
#[cfg(test)]
mod tests;
pub mod vmdk;
mod walk;

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

pub use error::{ImageError, ImageErrorKind};
pub use sniff::not_raw_by_default;

use crate::source::Source;

/// The bytes from the start of the file that [`inspect`] needs; fewer when the file is shorter.
pub const HEAD: u64 = 64 * 1024;

/// The format of an image file. The operator names it when a base is registered; plyfs never guesses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// The file is the disk.
    Raw,
    /// QEMU's qcow2, versions 2 and 3.
    Qcow2,
    /// VMware's VMDK in one file: monolithicSparse and streamOptimized.
    Vmdk,
}

impl Format {
    /// The name on the command line and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            "vmdk" => Ok(Self::Vmdk),
            _ => Err(format!("there is no image format {text:?}; there are raw, qcow2 and vmdk")),
        }
    }
}

/// Whether the operator named a backing image. A backing file name inside the image is only compared with this, and
/// never followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Chain {
    /// No backing image: an image that needs one is refused.
    Alone,
    /// The operator named a backing image: an image that needs none is refused.
    OnBacking,
}

/// How a cluster or grain is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// Raw deflate (qcow2).
    Deflate,
    /// Deflate with zlib's header and checksum, behind a grain marker (VMDK).
    Zlib,
    /// One or more zstd frames (qcow2).
    Zstd,
}

/// A compressed cluster or grain, the input of [`Image::inflate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Compressed {
    /// Its guest offset.
    pub guest: u64,
    /// Its guest bytes: a whole unit, or the rest of the disk.
    pub len: u64,
    /// Its offset in the file.
    pub at: u64,
    /// The most bytes that it takes in the file; they lie inside the file.
    pub bytes: u64,
    /// How it is compressed.
    pub method: Method,
}

/// The mapping of a guest range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Zeros, which hide the backing image.
    Zero,
    /// The bytes of the file from `at` on, all of them inside the file.
    Plain {
        /// The offset in the file of the first requested byte.
        at: u64,
    },
    /// A part of this cluster or grain.
    Compressed(Compressed),
    /// Not in this image, but in the backing image; zeros beyond its end. Only with [`Chain::OnBacking`].
    Below,
}

/// An open image. Any number of threads may use it at once.
pub trait Image: Send + Sync {
    /// Bytes of the virtual disk; any number.
    fn size(&self) -> u64;

    /// The mapping of the guest's `offset`, and the bytes for which it holds: 1 to `len`, maybe less than possible.
    /// Beyond the end of the disk it is `Zero`. A run of `Plain` is contiguous in the file. A `Compressed` begins at its
    /// own `guest`, which may be before `offset`.
    ///
    /// # Errors
    /// `Source` when a table could not be read, or is not here yet; the others when the image is damaged or unsupported.
    fn extent(&self, offset: u64, len: u64) -> Result<(Extent, u64), ImageError>;

    /// Reads a cluster or grain that [`extent`](Self::extent) found, and decompresses it into exactly `what.len` bytes.
    /// Replaces `out`, which is empty after an error. Takes long: not for a thread that others wait for.
    ///
    /// # Errors
    /// As [`extent`](Self::extent).
    fn inflate(&self, what: &Compressed, out: &mut Vec<u8>) -> Result<(), ImageError>;

    /// Drops the cached tables, because the file's bytes have changed. The caller makes no other call meanwhile.
    fn forget(&self) {}
}

/// The facts from the start of an image file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspected {
    /// Bytes of the virtual disk.
    pub size: u64,
    /// Bytes of a cluster or grain; 1 for raw.
    pub unit: u64,
    /// How clusters are compressed, if any are.
    pub method: Option<Method>,
    /// The backing file name in the image, sanitised. For messages only.
    pub backing_named: Option<String>,
}

/// Checks an image by its first [`HEAD`] bytes, or all of a shorter file. The image may still prove damaged when its
/// tables are read.
///
/// # Errors
/// `Invalid`, `Refused` or `Unsupported`.
pub fn inspect(format: Format, head: &[u8], file_size: u64, chain: Chain) -> Result<Inspected, ImageError> {
    match format {
        Format::Raw => raw::inspect(file_size, chain),
        Format::Qcow2 => qcow2::inspect(head, file_size, chain),
        Format::Vmdk => vmdk::inspect(head, file_size, chain),
    }
}

/// The error for a disk larger than [`MAX_DISK_SIZE`].
fn too_big(format: Format, size: u64) -> ImageError {
    let what = format!("it claims a disk of {size} bytes, and the limit is 64 TiB");
    ImageError::refused(format, what, "check that this is the intended image")
}

/// Opens the image in `source`. `size` is the disk size that [`inspect`] found. Reads nothing before the first
/// [`Image::extent`].
pub fn open(format: Format, source: Arc<dyn Source>, size: u64, chain: Chain) -> Arc<dyn Image> {
    match format {
        Format::Raw => Arc::new(raw::Raw::new(&*source)),
        Format::Qcow2 => Arc::new(qcow2::Qcow2::new(source, size, chain)),
        Format::Vmdk => Arc::new(vmdk::Vmdk::new(source, size, chain)),
    }
}
