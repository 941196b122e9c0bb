//! Raw: the file is the disk.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

use super::{Content, ExportError, Input, Watch, is_zero, tell};
use crate::format::BLOCK;

/// Bytes that are read at a time.
const STEP: u64 = 1 << 20;

/// Writes a sparse file: zeros are holes.
///
/// # Errors
/// Errors of reading and of writing; [`ExportError::Stopped`].
pub fn to_file(input: &dyn Input, file: &File, watch: Watch<'_>) -> Result<(), ExportError> {
    file.set_len(input.size()).map_err(ExportError::writing("setting its size"))?;
    each_part(input, watch, &mut |at, part| {
        let Some(bytes) = part.bytes() else { return Ok(()) };
        // Runs of blocks that are not zero.
        let mut from = 0;
        for (number, block) in bytes.chunks(BLOCK as usize).enumerate() {
            let start = number * BLOCK as usize;
            if is_zero(block) {
                put(file, at, bytes, from..start)?;
                from = start + block.len();
            }
        }
        put(file, at, bytes, from..bytes.len())
    })
}

fn put(file: &File, at: u64, bytes: &[u8], range: std::ops::Range<usize>) -> Result<(), ExportError> {
    let offset = at + range.start as u64;
    file.write_all_at(&bytes[range], offset).map_err(ExportError::writing("writing it"))
}

/// Writes all bytes in order.
///
/// # Errors
/// As [`to_file`].
pub fn to_pipe(input: &dyn Input, out: &mut dyn Write, watch: Watch<'_>) -> Result<(), ExportError> {
    let zeros = vec![0; STEP as usize];
    each_part(input, watch, &mut |_, part| {
        let bytes = match &part {
            Part::Bytes(bytes) => bytes,
            Part::Zeros(len) => &zeros[..*len as usize],
        };
        out.write_all(bytes).map_err(ExportError::writing("writing it"))
    })?;
    out.flush().map_err(ExportError::writing("writing it"))
}

/// At most [`STEP`] bytes.
enum Part<'a> {
    Bytes(&'a [u8]),
    Zeros(u64),
}

impl Part<'_> {
    fn bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Bytes(bytes) => Some(bytes),
            Self::Zeros(_) => None,
        }
    }
}

fn each_part(
    input: &dyn Input,
    watch: Watch<'_>,
    each: &mut dyn FnMut(u64, Part<'_>) -> Result<(), ExportError>,
) -> Result<(), ExportError> {
    let mut buf = vec![0; STEP as usize];
    let mut at = 0;
    while at < input.size() {
        let (content, end) = input.extent(at)?;
        while at < end {
            tell(watch, at)?;
            let len = (end - at).min(STEP);
            match content {
                Content::Zero => each(at, Part::Zeros(len))?,
                Content::Data | Content::Backing => {
                    let buf = &mut buf[..len as usize];
                    input.read(buf, at)?;
                    each(at, Part::Bytes(buf))?;
                }
            }
            at += len;
        }
    }
    tell(watch, at)
}
