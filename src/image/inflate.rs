//! Decompression of one cluster or grain into a buffer of exactly its size.
//!
//! The output is never longer than the buffer, and no number in the input causes any other allocation: deflate has its
//! window in the output, and so has a zstd frame that is decompressed in one call, whatever window it declares.
//!
//! Why these libraries: flate2 on miniz_oxide is Rust without `unsafe`. The C library of zstd decompressed 1.1 GB/s,
//! where ruzstd reached 0.2 and flate2 0.36 (64 KiB clusters of programs, one core). OSS-Fuzz fuzzes it continuously,
//! and it is built without its legacy formats.

use std::cell::RefCell;

use flate2::{Decompress, FlushDecompress, Status};
use zstd_safe::DCtx;

/// Why a cluster cannot be inflated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InflateError {
    /// The stream is invalid, or its checksum does not match.
    Broken,
    /// The stream ends before the cluster is full.
    TooShort,
    /// The stream continues when the cluster is full.
    TooLong,
}

impl InflateError {
    pub(super) fn why(self) -> &'static str {
        match self {
            Self::Broken => "it cannot be decompressed",
            Self::TooShort => "it is shorter than a cluster when decompressed",
            Self::TooLong => "it is longer than a cluster when decompressed",
        }
    }
}

thread_local! {
    // 43 KiB and 95 KiB for each thread that has inflated a cluster.
    static DEFLATE: RefCell<Option<Decompress>> = const { RefCell::new(None) };
    static ZSTD: RefCell<Option<DCtx<'static>>> = const { RefCell::new(None) };
}

/// The container of a deflate stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wrap {
    Raw,
    Zlib,
}

/// Inflates into `out`, and returns the number of bytes. Ignores input beyond the end of the stream.
pub(super) fn deflate(wrap: Wrap, input: &[u8], out: &mut [u8]) -> Result<usize, InflateError> {
    DEFLATE.with_borrow_mut(|slot| {
        let zlib = wrap == Wrap::Zlib;
        let inflater = slot.get_or_insert_with(|| Decompress::new(zlib));
        inflater.reset(zlib);
        // `Finish` in the first call inflates everything into `out` in one go.
        let status =
            inflater.decompress(input, out, FlushDecompress::Finish).map_err(|_| InflateError::Broken)?;
        let filled = usize::try_from(inflater.total_out()).map_err(|_| InflateError::TooLong)?;
        match status {
            Status::StreamEnd => Ok(filled),
            Status::Ok | Status::BufError if filled == out.len() => Err(InflateError::TooLong),
            Status::Ok | Status::BufError => Err(InflateError::TooShort),
        }
    })
}

/// Fills `out` from as many frames as needed. Ignores input beyond them.
pub(super) fn zstd(mut input: &[u8], out: &mut [u8]) -> Result<(), InflateError> {
    ZSTD.with_borrow_mut(|slot| {
        let context = slot.get_or_insert_with(DCtx::create);
        let mut filled = 0;
        while filled < out.len() {
            let frame = match zstd_safe::find_frame_compressed_size(input) {
                Ok(len) if len > 0 && len <= input.len() => len,
                _ if filled > 0 => return Err(InflateError::TooShort),
                _ => return Err(InflateError::Broken),
            };
            filled += context.decompress(&mut out[filled..], &input[..frame]).map_err(|code| {
                let name = zstd_safe::get_error_name(code);
                if name.starts_with("Destination buffer") {
                    InflateError::TooLong
                } else {
                    InflateError::Broken
                }
            })?;
            input = &input[frame..];
        }
        Ok(())
    })
}

/// The memory of this thread's zstd context.
#[cfg(test)]
pub(super) fn zstd_memory() -> usize {
    ZSTD.with_borrow(|slot| slot.as_ref().map_or(0, DCtx::sizeof))
}
