//! The stack of files of a base: the image on top, below it the backing images that the operator named.
//!
//! What must hold: decoded bytes never depend on which bytes are here. A read that misses bytes of a source starts to
//! fetch all of them, returns `NotHere`, and is run again.

use std::sync::Arc;

use super::Cause;
use crate::image::{Compressed, Extent, Image};
use crate::source::{Completion, Identity, Purpose, Source, SourceError, SourceErrorKind};

/// One file of a base.
pub struct Layer {
    /// The bytes of the file.
    pub source: Arc<dyn Source>,
    /// Interprets the bytes; `None` when the file is the disk.
    pub image: Option<Arc<dyn Image>>,
}

/// Where the bytes of a range of the virtual disk come from.
pub(super) enum Place<'a> {
    Zero,
    Plain(&'a dyn Source, u64),
    Compressed(&'a dyn Source, &'a dyn Image, Compressed),
}

pub(super) struct Stack {
    /// From top to bottom: the image, then its backing images.
    layers: Vec<Layer>,
    size: u64,
}

impl Stack {
    pub fn new(layers: Vec<Layer>, size: u64) -> Self {
        Self { layers, size }
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    /// The only file of the base, when that file is the disk.
    pub fn raw(&self) -> Option<&dyn Source> {
        match &self.layers[..] {
            [Layer { source, image: None }] => Some(&**source),
            _ => None,
        }
    }

    pub fn sources(&self) -> impl Iterator<Item = &dyn Source> {
        self.layers.iter().map(|layer| &*layer.source)
    }

    /// Drops the tables that its images cache.
    pub fn forget(&self) {
        self.layers.iter().filter_map(|layer| layer.image.as_ref()).for_each(|image| image.forget());
    }

    /// Identifies this base's blocks in the memory cache.
    pub fn identity(&self) -> Vec<u8> {
        let mut bytes = self.size.to_le_bytes().to_vec();
        for layer in &self.layers {
            bytes.push(u8::from(layer.image.is_some()));
            bytes.extend(Identity::to_bytes(layer.source.identity()));
        }
        bytes
    }

    /// The place of the byte at `offset`, and the number of bytes, at most `length`, for which it holds.
    pub fn place(&self, offset: u64, length: u64) -> Result<(Place<'_>, u64), Cause> {
        let mut length = length;
        for layer in &self.layers {
            let Some(image) = &layer.image else {
                let left = layer.source.size().saturating_sub(offset);
                return Ok(match left {
                    0 => (Place::Zero, length),
                    _ => (Place::Plain(&*layer.source, offset), length.min(left)),
                });
            };
            let left = image.size().saturating_sub(offset);
            if left == 0 {
                return Ok((Place::Zero, length));
            }
            let (extent, alike) = image.extent(offset, length.min(left))?;
            length = alike.clamp(1, length);
            let place = match extent {
                Extent::Zero => Place::Zero,
                Extent::Plain { at } => Place::Plain(&*layer.source, at),
                Extent::Compressed(what) => Place::Compressed(&*layer.source, &**image, what),
                Extent::Below => continue,
            };
            return Ok((place, length));
        }
        Ok((Place::Zero, length))
    }

    /// Fills `buf` from `offset` on; all of it is inside the disk. Calls `whole` with the guest offset and the bytes of
    /// each decompressed cluster, so that the caller can cache all of it.
    pub fn read(&self, buf: &mut [u8], offset: u64, mut whole: impl FnMut(u64, &[u8])) -> Result<(), Cause> {
        let mut pending = PendingFetches::default();
        let mut cluster = Vec::new();
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let (place, length) = match self.place(at, (buf.len() - done) as u64) {
                Ok(found) => found,
                // Without the tables, the rest of the range is unknown.
                Err(cause) => return Err(pending.and(cause)),
            };
            let part = &mut buf[done..done + length as usize];
            match place {
                Place::Zero => part.fill(0),
                Place::Plain(source, from) => match source.read_at(part, from) {
                    // The file of an image may end within its last cluster, whose rest reads zeros.
                    Ok(read) => part[read..].fill(0),
                    Err(error) => pending.wait_for(error)?,
                },
                Place::Compressed(_, image, what) => match image.inflate(&what, &mut cluster) {
                    Ok(()) => {
                        let skip = (at - what.guest) as usize;
                        part.copy_from_slice(&cluster[skip..skip + part.len()]);
                        whole(what.guest, &cluster);
                    }
                    Err(error) => match Cause::from(error) {
                        Cause::Source(error) => pending.wait_for(error)?,
                        other => return Err(other),
                    },
                },
            }
            done += length as usize;
        }
        pending.end()
    }

    /// Starts to fetch the bytes of a range of the virtual disk. The completion is that of all requests now under way.
    pub fn prefetch(&self, offset: u64, length: u64, purpose: Purpose) -> Result<Option<Completion>, Cause> {
        let mut completions = Vec::new();
        let end = offset.saturating_add(length).min(self.size);
        let mut at = offset;
        while at < end {
            let (place, length) = match self.place(at, end - at) {
                Ok(found) => found,
                Err(cause) => {
                    completions.extend(cause.completion().cloned());
                    return if completions.is_empty() {
                        Err(cause)
                    } else {
                        Ok(Some(Completion::all(completions)))
                    };
                }
            };
            match place {
                Place::Zero => {}
                Place::Plain(source, from) => completions.extend(source.prefetch(&[(from, length)], purpose)),
                Place::Compressed(source, _, what) => {
                    completions.extend(source.prefetch(&[(what.at, what.bytes)], purpose));
                }
            }
            at += length;
        }
        Ok((!completions.is_empty()).then(|| Completion::all(completions)))
    }

    /// The first offset at or after `offset`, below the end, that is data (or is a hole).
    pub fn next(&self, offset: u64, data: bool) -> Result<Option<u64>, Cause> {
        if let Some(source) = self.raw() {
            let found = if data { source.next_data(offset)? } else { Some(source.next_hole(offset)?) };
            return Ok(found.filter(|found| *found < self.size).map(|found| found.max(offset)));
        }
        let mut at = offset;
        while at < self.size {
            let (place, length) = self.place(at, self.size - at)?;
            if matches!(place, Place::Zero) != data {
                return Ok(Some(at));
            }
            at += length;
        }
        Ok(None)
    }

    pub fn check(&self) -> Result<(), SourceError> {
        self.sources().try_for_each(Source::check)
    }
}

/// The fetches that a read must wait for.
#[derive(Default)]
pub(super) struct PendingFetches {
    completions: Vec<Completion>,
    last: Option<SourceError>,
}

impl PendingFetches {
    /// Notes an error that means "not here yet". Returns any other error.
    pub fn wait_for(&mut self, error: SourceError) -> Result<(), SourceError> {
        match error.completion() {
            Some(completion) if error.kind() == SourceErrorKind::NotHere => {
                self.completions.push(completion.clone());
                self.last = Some(error);
                Ok(())
            }
            _ => Err(error),
        }
    }

    /// Joins `cause` with the noted fetches, unless it is a failure.
    fn and(mut self, cause: Cause) -> Cause {
        match cause {
            Cause::Source(error) => match self.wait_for(error) {
                Ok(()) => match self.end() {
                    Err(cause) => cause,
                    Ok(()) => unreachable!("a completion was noted"),
                },
                Err(error) => Cause::Source(error),
            },
            other => other,
        }
    }

    /// The error for all noted fetches.
    pub fn end(mut self) -> Result<(), Cause> {
        match (self.completions.len(), self.last) {
            (0, _) | (_, None) => Ok(()),
            (1, Some(error)) => Err(Cause::Source(error)),
            (_, Some(error)) => {
                let completion = Completion::all(std::mem::take(&mut self.completions));
                Err(Cause::Source(SourceError::not_here(error.object().to_owned(), completion)))
            }
        }
    }
}
