//! Copies an image into the file of a disk: raw, qcow2 or VMDK.
//!
//! A command runs this in its own process, and writes the disk through the mount. What must hold:
//! - An image is hostile, as everywhere ([`image`](crate::image)). No file is opened but the one that was given.
//! - The disk stores only what differs from its base. Zeros of the image hide the base.

mod file;
pub mod increment;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

pub use file::ImageFile;
use thiserror::Error;

pub use crate::image::Format;

use crate::format::{BLOCK, FormatError};
use crate::image::{Extent, Image, ImageError};
use crate::io::sys;
use crate::source::{Source, SourceError};

/// Bytes that are copied at a time.
const STEP: u64 = 1 << 20;

/// Why an import failed.
#[derive(Debug, Error)]
pub enum ImportError {
    /// The image is damaged, refused or cannot be read.
    #[error("{0}")]
    Image(#[from] ImageError),
    /// The file of the image cannot be read.
    #[error("{0}")]
    Source(#[from] SourceError),
    /// The disk failed.
    #[error("{doing} the disk at byte {offset}: {source}")]
    Disk {
        /// `reading` or `writing`.
        doing: &'static str,
        /// Where.
        offset: u64,
        /// Why.
        source: io::Error,
    },
    /// The stream of an increment cannot be read.
    #[error("reading it: {0}")]
    Stream(io::Error),
    /// The stream of an increment ends before its last frame.
    #[error("it ends too early")]
    Cut,
    /// The stream of an increment goes on behind its last frame.
    #[error("it has more bytes than belong to it")]
    Longer,
    /// A part of an increment is damaged, or newer.
    #[error("{0}")]
    Increment(FormatError),
    /// The caller ended the work.
    #[error("it was stopped")]
    Stopped,
}

/// What the new disk shows before the import.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Under {
    /// Zeros.
    Nothing,
    /// The base that the image is on top of.
    Backing,
    /// A base that the image has a copy of: blocks with the same bytes are left to it.
    Copy,
}

/// Copies an image to the file of a new disk of its size. `watch` is told how many bytes are done; false ends the work.
///
/// # Errors
/// As [`ImportError`] says. The disk has a part of the image then.
pub fn copy(
    image: &dyn Image,
    source: &dyn Source,
    (disk, under): (&File, Under),
    watch: &mut dyn FnMut(u64) -> bool,
) -> Result<(), ImportError> {
    let mut target = Target { disk, under, old: Vec::new() };
    let (mut buf, mut cluster) = (Vec::new(), Vec::new());
    // The cluster that is in `cluster`.
    let mut inflated = None;
    let mut at = 0;
    while at < image.size() {
        if !watch(at) {
            return Err(ImportError::Stopped);
        }
        let (extent, len) = image.extent(at, image.size() - at)?;
        let len = match extent {
            Extent::Below => len,
            Extent::Zero => {
                target.zero(at..at + len)?;
                len
            }
            Extent::Compressed(what) => {
                if inflated != Some(what) {
                    image.inflate(&what, &mut cluster)?;
                    inflated = Some(what);
                }
                let from = (at - what.guest) as usize;
                let len = len.min(what.len - from as u64);
                target.put(at, &cluster[from..from + len as usize])?;
                len
            }
            Extent::Plain { at: place } => {
                // A hole of the file is zeros.
                let data = source.next_data(place)?.unwrap_or(u64::MAX);
                if data > place {
                    let len = len.min(data - place);
                    target.zero(at..at + len)?;
                    len
                } else {
                    let hole = source.next_hole(place)?.max(place + 1);
                    let len = len.min(hole - place).min(STEP);
                    buf.resize(len as usize, 0);
                    let got = source.read_at(&mut buf, place)?;
                    buf[got..].fill(0);
                    target.put(at, &buf)?;
                    len
                }
            }
        };
        at += len;
    }
    if watch(at) { Ok(()) } else { Err(ImportError::Stopped) }
}

/// The file of the disk.
struct Target<'a> {
    disk: &'a File,
    under: Under,
    /// What the disk had where it is written.
    old: Vec<u8>,
}

impl Target<'_> {
    /// Makes a range read as zeros.
    fn zero(&self, range: Range<u64>) -> Result<(), ImportError> {
        if self.under == Under::Nothing {
            return Ok(());
        }
        // Only what the base has needs to be hidden.
        let failed = |offset| move |source| ImportError::Disk { doing: "writing", offset, source };
        let mut at = range.start;
        while let Some(from) = sys::next_data(self.disk.as_fd(), at).map_err(failed(at))? {
            if from >= range.end {
                break;
            }
            let hole = sys::next_hole(self.disk.as_fd(), from).map_err(failed(from))?;
            let to = hole.unwrap_or(range.end).min(range.end);
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            sys::fallocate(self.disk.as_fd(), mode, from, to - from).map_err(failed(from))?;
            at = to;
            if at >= range.end {
                break;
            }
        }
        Ok(())
    }

    /// Writes bytes, as far as the disk does not show them already.
    fn put(&mut self, at: u64, bytes: &[u8]) -> Result<(), ImportError> {
        if self.under == Under::Copy {
            self.old.resize(bytes.len(), 0);
            let read = self.disk.read_exact_at(&mut self.old, at);
            read.map_err(|source| ImportError::Disk { doing: "reading", offset: at, source })?;
        }
        // Runs of blocks of one kind; a block is one of the disk.
        let mut run: (Kind, Range<usize>) = (Kind::Same, 0..0);
        let mut from = 0;
        while from < bytes.len() {
            let to = (((at + from as u64) / BLOCK + 1) * BLOCK - at).min(bytes.len() as u64) as usize;
            let kind = self.kind(bytes, from..to);
            if kind != run.0 {
                self.end(at, bytes, &run)?;
                run = (kind, from..from);
            }
            run.1.end = to;
            from = to;
        }
        self.end(at, bytes, &run)
    }

    fn kind(&self, bytes: &[u8], range: Range<usize>) -> Kind {
        let new = &bytes[range.clone()];
        let is_zero = new.iter().all(|byte| *byte == 0);
        match self.under {
            Under::Copy if self.old[range] == *new => Kind::Same,
            Under::Nothing if is_zero => Kind::Same,
            _ if is_zero => Kind::Zero,
            _ => Kind::Data,
        }
    }

    fn end(&self, at: u64, bytes: &[u8], (kind, range): &(Kind, Range<usize>)) -> Result<(), ImportError> {
        let offset = at + range.start as u64;
        match kind {
            Kind::Same => Ok(()),
            Kind::Zero => self.zero(offset..at + range.end as u64),
            Kind::Data => {
                let written = self.disk.write_all_at(&bytes[range.clone()], offset);
                written.map_err(|source| ImportError::Disk { doing: "writing", offset, source })
            }
        }
    }
}

/// What becomes of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// The disk shows it already.
    Same,
    Zero,
    Data,
}
