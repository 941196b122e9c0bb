//! A byte buffer whose address suits O_DIRECT.

use std::ops::{Deref, DerefMut};

/// Alignment of address, offset and length that every filesystem with O_DIRECT accepts in practice.
pub(crate) const ALIGN: usize = 4096;

/// A zeroed buffer whose first byte lies at a multiple of [`ALIGN`].
pub(crate) struct AlignedBuf {
    /// Never resized, so it never moves.
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuf {
    pub(crate) fn new(len: usize) -> Self {
        let bytes = vec![0; len + ALIGN];
        let start = bytes.as_ptr().addr().next_multiple_of(ALIGN) - bytes.as_ptr().addr();
        Self { bytes, start, len }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}
