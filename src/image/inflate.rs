//! Decompression of one cluster or grain into a buffer that has just its size.
//!
//! The output is never longer than the buffer and nothing else is allocated by what the input says: deflate has its
//! window in the output, and so has a zstd frame that is decompressed at once, whatever window it declares.
//!
//! Why these: flate2 on miniz_oxide is Rust without `unsafe`. For zstd the C library, which decompressed 1.1 GB/s
//! where ruzstd came to 0.2 and flate2 to 0.36 (64 KiB clusters of programs, one core), is fuzzed without end by
//! OSS-Fuzz, and is built without its legacy formats.

use std::cell::RefCell;

use flate2::{Decompress, FlushDecompress, Status};
use zstd_safe::DCtx;

/// Why a cluster does not inflate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bad {
    /// No valid stream, or its checksum does not fit.
    Broken,
    /// It ends before the cluster is full.
    Less,
    /// It goes on when the cluster is full.
    More,
}

impl Bad {
    pub(super) fn why(self) -> &'static str {
        match self {
            Self::Broken => "it cannot be decompressed",
            Self::Less => "it is shorter than a cluster when decompressed",
            Self::More => "it is longer than a cluster when decompressed",
        }
    }
}

thread_local! {
    // 43 KiB and 95 KiB, for each thread that ever inflated.
    static DEFLATE: RefCell<Option<Decompress>> = const { RefCell::new(None) };
    static ZSTD: RefCell<Option<DCtx<'static>>> = const { RefCell::new(None) };
}

/// What a deflate stream is wrapped in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wrap {
    Raw,
    Zlib,
}

/// Returns how many bytes of `out` were filled. What follows the end of the stream is ignored.
pub(super) fn deflate(wrap: Wrap, input: &[u8], out: &mut [u8]) -> Result<usize, Bad> {
    DEFLATE.with_borrow_mut(|slot| {
        let zlib = wrap == Wrap::Zlib;
        let inflater = slot.get_or_insert_with(|| Decompress::new(zlib));
        inflater.reset(zlib);
        // At once into `out`: that is what `Finish` in the first call means.
        let status = inflater.decompress(input, out, FlushDecompress::Finish).map_err(|_| Bad::Broken)?;
        let filled = usize::try_from(inflater.total_out()).map_err(|_| Bad::More)?;
        match status {
            Status::StreamEnd => Ok(filled),
            Status::Ok | Status::BufError if filled == out.len() => Err(Bad::More),
            Status::Ok | Status::BufError => Err(Bad::Less),
        }
    })
}

/// Fills `out` from as many frames as that takes. What follows is ignored.
pub(super) fn zstd(mut input: &[u8], out: &mut [u8]) -> Result<(), Bad> {
    ZSTD.with_borrow_mut(|slot| {
        let context = slot.get_or_insert_with(DCtx::create);
        let mut filled = 0;
        while filled < out.len() {
            let frame = match zstd_safe::find_frame_compressed_size(input) {
                Ok(len) if len > 0 && len <= input.len() => len,
                _ if filled > 0 => return Err(Bad::Less),
                _ => return Err(Bad::Broken),
            };
            filled += context.decompress(&mut out[filled..], &input[..frame]).map_err(|code| {
                let name = zstd_safe::get_error_name(code);
                if name.starts_with("Destination buffer") { Bad::More } else { Bad::Broken }
            })?;
            input = &input[frame..];
        }
        Ok(())
    })
}

/// What this thread's context has allocated.
#[cfg(test)]
pub(super) fn zstd_memory() -> usize {
    ZSTD.with_borrow(|slot| slot.as_ref().map_or(0, DCtx::sizeof))
}
