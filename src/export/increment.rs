//! An increment: only what changed, as a stream that another disk can be brought forward with.

use std::io::Write;

use super::{Content, ExportError, Input, Watch, is_zero, tell};
use crate::format::BLOCK;
pub use crate::format::increment::{BaseNote, IncrementHeader, Moment};
use crate::format::increment::{FrameKind, Frames, MOST_DATA};

/// Writes what of the input is not left to the disk that the stream is for.
///
/// # Errors
/// Errors of reading and of writing; [`ExportError::Stopped`].
pub fn write(
    input: &dyn Input,
    header: &IncrementHeader,
    out: &mut dyn Write,
    watch: Watch<'_>,
) -> Result<(), ExportError> {
    let mut out = Stream { out, frames: Frames::new(header) };
    out.put(&header.encode())?;
    let mut buf = vec![0; MOST_DATA as usize];
    let mut at = 0;
    while at < input.size() {
        let (content, end) = input.extent(at)?;
        tell(watch, at)?;
        match content {
            Content::Backing => {}
            Content::Zero => out.frame(FrameKind::Zero, at, end - at, &[])?,
            Content::Data => {
                let mut from = at;
                while from < end {
                    tell(watch, from)?;
                    let len = (end - from).min(MOST_DATA);
                    let bytes = &mut buf[..len as usize];
                    input.read(bytes, from)?;
                    out.data(from, bytes)?;
                    from += len;
                }
            }
        }
        at = end;
    }
    out.frame(FrameKind::End, input.size(), 0, &[])?;
    tell(watch, at)?;
    out.out.flush().map_err(ExportError::writing("writing it"))
}

struct Stream<'a> {
    out: &'a mut dyn Write,
    frames: Frames,
}

impl Stream<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), ExportError> {
        self.out.write_all(bytes).map_err(ExportError::writing("writing it"))
    }

    fn frame(&mut self, kind: FrameKind, offset: u64, len: u64, data: &[u8]) -> Result<(), ExportError> {
        let head = self.frames.encode(kind, offset, len, data);
        self.put(&head)?;
        self.put(data)
    }

    /// Blocks of zeros are frames without data.
    fn data(&mut self, at: u64, bytes: &[u8]) -> Result<(), ExportError> {
        let mut from = 0;
        for blocks in
            bytes.chunks(BLOCK as usize).collect::<Vec<_>>().chunk_by(|a, b| is_zero(a) == is_zero(b))
        {
            let len: usize = blocks.iter().map(|block| block.len()).sum();
            let part = &bytes[from..from + len];
            let offset = at + from as u64;
            if blocks.first().is_some_and(|block| is_zero(block)) {
                self.frame(FrameKind::Zero, offset, len as u64, &[])?;
            } else {
                self.frame(FrameKind::Data, offset, len as u64, part)?;
            }
            from += len;
        }
        Ok(())
    }
}
