//! Brings a disk forward by an increment.

use std::fs::File;
use std::io::{self, Read};

use super::{ImportError, Target, Under};
use crate::format::FormatError;
use crate::format::increment::{FRAME, FrameKind, Frames, HEADER_HEAD, MOST_DATA};
pub use crate::format::increment::{IncrementHeader, Moment};

/// An increment whose header was read.
pub struct Increment<R> {
    header: IncrementHeader,
    input: R,
}

fn cut(error: io::Error) -> ImportError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => ImportError::Cut,
        _ => ImportError::Stream(error),
    }
}

fn damaged(error: FormatError) -> ImportError {
    ImportError::Increment(error)
}

impl<R: Read> Increment<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// When the stream cannot be read, or is no increment that this plyfs knows.
    pub fn open(mut input: R) -> Result<Self, ImportError> {
        let mut head = [0; HEADER_HEAD];
        input.read_exact(&mut head).map_err(cut)?;
        let mut bytes = head.to_vec();
        bytes.resize(IncrementHeader::len(&head).map_err(damaged)?, 0);
        input.read_exact(&mut bytes[HEADER_HEAD..]).map_err(cut)?;
        Ok(Self { header: IncrementHeader::decode(&bytes).map_err(damaged)?, input })
    }

    /// The header.
    pub fn header(&self) -> &IncrementHeader {
        &self.header
    }

    /// Applies it to the file of a disk that shows the earlier moment and has the size of the later one. `watch` is told
    /// how many bytes of the disk are done; false ends the work.
    ///
    /// # Errors
    /// As [`ImportError`] says. The disk has a part of the changes then.
    pub fn apply(mut self, disk: &File, watch: &mut dyn FnMut(u64) -> bool) -> Result<(), ImportError> {
        let mut target = Target { disk, under: Under::Backing, old: Vec::new() };
        let mut frames = Frames::new(&self.header);
        let mut data = Vec::with_capacity(MOST_DATA as usize);
        loop {
            let mut head = [0; FRAME];
            self.input.read_exact(&mut head).map_err(cut)?;
            let frame = frames.decode(&head).map_err(damaged)?;
            let len = if frame.kind == FrameKind::Data { frame.len as usize } else { 0 };
            data.resize(len, 0);
            self.input.read_exact(&mut data).map_err(cut)?;
            frames.check(&head, &frame, &data).map_err(damaged)?;
            if !watch(frame.offset) {
                return Err(ImportError::Stopped);
            }
            match frame.kind {
                FrameKind::Data => target.put(frame.offset, &data)?,
                FrameKind::Zero => target.zero(frame.offset..frame.offset + frame.len)?,
                FrameKind::End => break,
            }
        }
        // Bytes behind the end are no part of it: the file is another one than its writer made.
        match self.input.read(&mut [0]).map_err(ImportError::Stream)? {
            0 => Ok(()),
            _ => Err(ImportError::Longer),
        }
    }
}
