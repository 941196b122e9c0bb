//! Writes what a disk shows into a file or a pipe: raw or qcow2.
//!
//! A command runs this in its own process, on a snapshot that it reads through the mount. The worker opens no file for
//! it. What must hold:
//! - The [`Input`] does not change. A writer may look at its extents twice, and relies on the same answer.
//! - The file has its name only when it is complete and durable ([`Output`]).
//! - Memory goes with the number of extents, never with the bytes.

mod error;
pub mod increment;
mod input;
mod output;
pub mod qcow2;
pub mod raw;
#[cfg(test)]
mod tests;

pub use error::ExportError;
pub use input::{FileInput, Input, ListedInput};
pub use output::{Existing, Output};

/// Where bytes of a disk come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// They must be read.
    Data,
    /// They are zeros.
    Zero,
    /// They are those of the backing image, at the same offset; zeros beyond its end.
    Backing,
}

/// A run of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Where they come from.
    pub content: Content,
}

/// Is told how many bytes of the disk are done. False ends the work with [`ExportError::Stopped`].
pub type Watch<'a> = &'a mut dyn FnMut(u64) -> bool;

fn tell(watch: Watch<'_>, done: u64) -> Result<(), ExportError> {
    if watch(done) { Ok(()) } else { Err(ExportError::Stopped) }
}

/// Whether all bytes are zeros.
fn is_zero(bytes: &[u8]) -> bool {
    let words = bytes.chunks_exact(16);
    let is_rest_zero = words.remainder().iter().all(|byte| *byte == 0);
    is_rest_zero && words.into_iter().all(|word| word == [0; 16])
}
