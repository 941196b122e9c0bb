//! Reads of tables from a source.

use super::ImageError;
use crate::source::Source;

/// Fills `buf` from `at` on, with zeros beyond the end of the file. Returns the number of bytes read from the file.
pub(super) fn padded(source: &dyn Source, buf: &mut [u8], at: u64) -> Result<usize, ImageError> {
    let read = if at >= source.size() { 0 } else { source.read_at(buf, at)? };
    buf[read..].fill(0);
    Ok(read)
}

/// The `len` bytes at `at`, or fewer at the end of the file. `len` is bounded by the caller.
pub(super) fn bytes(source: &dyn Source, at: u64, len: usize) -> Result<Vec<u8>, ImageError> {
    let mut buf = vec![0; len];
    let read = padded(source, &mut buf, at)?;
    buf.truncate(read);
    Ok(buf)
}
