//! The virtual disk inside an image file: which bytes of the file a range of the guest is.
//!
//! An [`Image`] maps, and inflates what is compressed; it keeps no data, only tables. What must hold:
//! - **An image is hostile until proven otherwise.** No number in it is believed before it was compared with the
//!   length of the file; time and memory of every call are bounded, whatever the tables say. Names in it are for
//!   messages only: nothing here can open anything, there is one [`Source`] and it was given.
//! - Every call can be run again. A read that fails because bytes have to be fetched first ends the call with that
//!   error, unchanged; what was parsed before is kept. No lock is held across a read of the source. Two threads may
//!   read one table at once: both get the same, one of them is kept.
//! - A failure of the source is never remembered. A verdict about the image is: the bytes do not change.

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
pub use sniff::compressed_as_a_whole;

use crate::source::Source;

/// How many bytes from the start of the file [`inspect`] wants to see; less when the file is shorter.
pub const HEAD: u64 = 64 * 1024;

/// What an image file is. Fixed when a base is registered, never guessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// The file is the disk.
    Raw,
    /// QEMU's, versions 2 and 3.
    Qcow2,
    /// VMware's, in one file: monolithicSparse and streamOptimized.
    Vmdk,
}

impl Format {
    /// As it is written in the command line and in messages.
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

/// What lies under an image, as the operator says. What the image says of it is compared, never followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Chain {
    /// Nothing: an image that wants a backing file is refused.
    Alone,
    /// A backing image that the operator named: an image that wants none is refused.
    OnBacking,
}

/// How a cluster or grain is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// Raw deflate, of qcow2.
    Deflate,
    /// Deflate with the header and checksum of zlib behind a grain marker, of VMDK.
    Zlib,
    /// One or more zstd frames, of qcow2.
    Zstd,
}

/// A compressed cluster or grain, to be given to [`Image::inflate`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Compressed {
    /// Guest offset where it begins.
    pub guest: u64,
    /// Guest bytes that are in it: a whole unit, or what is left of the disk.
    pub len: u64,
    /// Offset in the file.
    pub at: u64,
    /// Bytes in the file, at most; inside of it.
    pub bytes: u64,
    /// How.
    pub method: Method,
}

/// What a range of the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Zeros, whatever lies under the image.
    Zero,
    /// The bytes of the file from `at` on, all of them inside of it.
    Plain {
        /// Offset in the file of the first byte asked for.
        at: u64,
    },
    /// Part of this.
    Compressed(Compressed),
    /// Not in this image: in the backing image, or zeros where that ends. Only with [`Chain::OnBacking`].
    Below,
}

/// A mapped image. Any number of threads may use it at once.
pub trait Image: Send + Sync {
    /// Bytes of the virtual disk; any number.
    fn size(&self) -> u64;

    /// What begins at the guest's `offset`, and for how many bytes it goes on alike: 1 to `len`, maybe less than
    /// there are. What lies past the end of the disk is `Zero`. A run of `Plain` is contiguous in the file. A
    /// `Compressed` begins at its own `guest`, which may be before `offset`.
    ///
    /// # Errors
    /// `Source` when a table could not be read, or not yet; the others when the image is not what it should be.
    fn extent(&self, offset: u64, len: u64) -> Result<(Extent, u64), ImageError>;

    /// Reads what [`extent`](Self::extent) found and decompresses it, into exactly `what.len` bytes. `out` is
    /// replaced, and empty after an error. Takes a while: not for a thread that others wait for.
    ///
    /// # Errors
    /// As [`extent`](Self::extent).
    fn inflate(&self, what: &Compressed, out: &mut Vec<u8>) -> Result<(), ImageError>;

    /// Drops the tables that were read: the file's bytes are not what they were. To be called while nothing else is.
    fn forget(&self) {}
}

/// What the start of an image file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inspected {
    /// Bytes of the virtual disk.
    pub size: u64,
    /// Bytes of a cluster or grain; 1 for raw.
    pub unit: u64,
    /// How clusters are compressed, if any are.
    pub method: Option<Method>,
    /// What the image says of its backing file, made harmless: for messages only.
    pub backing_named: Option<String>,
}

/// Judges an image by its first [`HEAD`] bytes (all, of a shorter file). What passes may still turn out to be damaged
/// when its tables are read.
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

/// No disk is bigger than [`MAX_DISK_SIZE`].
fn too_big(format: Format, size: u64) -> ImageError {
    let what = format!("its disk is said to have {size} bytes, and more than 64 TiB is not supported");
    ImageError::refused(format, what, "check that this is the image that was meant")
}

/// An image over the bytes of `source`, of which [`inspect`] found that it has `size` bytes. Reads nothing before the
/// first [`Image::extent`].
pub fn open(format: Format, source: Arc<dyn Source>, size: u64, chain: Chain) -> Arc<dyn Image> {
    match format {
        Format::Raw => Arc::new(raw::Raw::new(&*source)),
        Format::Qcow2 => Arc::new(qcow2::Qcow2::new(source, size, chain)),
        Format::Vmdk => Arc::new(vmdk::Vmdk::new(source, size, chain)),
    }
}
