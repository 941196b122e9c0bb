//! The files that a base is made of: the image, and below it those that it leaves clusters to, as its operator named
//! them.
//!
//! What must hold: what is decoded never depends on what is here: a read that lacks bytes of a source says so, having
//! seen to it that all it lacks is under way, and is run again.

use std::sync::Arc;

use super::Cause;
use crate::image::{Compressed, Extent, Image};
use crate::source::{Arrival, Identity, Purpose, Source, SourceError, SourceErrorKind};

/// One file of a base.
pub struct Layer {
    /// Its bytes.
    pub source: Arc<dyn Source>,
    /// What they mean; none when they are the disk.
    pub image: Option<Arc<dyn Image>>,
}

/// Where a range of the virtual disk is.
enum Place<'a> {
    Zero,
    Plain(&'a dyn Source, u64),
    Compressed(&'a dyn Source, &'a dyn Image, Compressed),
}

pub(super) struct Stack {
    /// The image first.
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

    /// Its only file, when that is the disk.
    pub fn raw(&self) -> Option<&dyn Source> {
        match &self.layers[..] {
            [Layer { source, image: None }] => Some(&**source),
            _ => None,
        }
    }

    pub fn sources(&self) -> impl Iterator<Item = &dyn Source> {
        self.layers.iter().map(|layer| &*layer.source)
    }

    /// Drops what its images keep of their files.
    pub fn forget(&self) {
        self.layers.iter().filter_map(|layer| layer.image.as_ref()).for_each(|image| image.forget());
    }

    /// Tells this base's blocks from those of every other.
    pub fn identity(&self) -> Vec<u8> {
        let mut bytes = self.size.to_le_bytes().to_vec();
        for layer in &self.layers {
            bytes.push(u8::from(layer.image.is_some()));
            bytes.extend(Identity::to_bytes(layer.source.identity()));
        }
        bytes
    }

    /// What begins at `offset`, and how many of at most `length` bytes are alike.
    fn place(&self, offset: u64, length: u64) -> Result<(Place<'_>, u64), Cause> {
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

    /// Fills `buf` from `offset` on, all of it inside. `whole` is given each cluster that was decompressed, with its
    /// place, because more of it may be kept than was asked for.
    pub fn read(&self, buf: &mut [u8], offset: u64, mut whole: impl FnMut(u64, &[u8])) -> Result<(), Cause> {
        let mut coming = Coming::default();
        let mut cluster = Vec::new();
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let (place, length) = match self.place(at, (buf.len() - done) as u64) {
                Ok(found) => found,
                // Without the tables there is nothing more to be known.
                Err(cause) => return Err(coming.and(cause)),
            };
            let part = &mut buf[done..done + length as usize];
            match place {
                Place::Zero => part.fill(0),
                Place::Plain(source, from) => match source.read_at(part, from) {
                    // The file of an image may end within its last cluster; the rest of that is zeros.
                    Ok(read) => part[read..].fill(0),
                    Err(error) => coming.wait_for(error)?,
                },
                Place::Compressed(_, image, what) => match image.inflate(&what, &mut cluster) {
                    Ok(()) => {
                        let skip = (at - what.guest) as usize;
                        part.copy_from_slice(&cluster[skip..skip + part.len()]);
                        whole(what.guest, &cluster);
                    }
                    Err(error) => match Cause::from(error) {
                        Cause::Source(error) => coming.wait_for(error)?,
                        other => return Err(other),
                    },
                },
            }
            done += length as usize;
        }
        coming.end()
    }

    /// Has the bytes of a range of the virtual disk fetched. Returns when those that are under way now are here.
    pub fn prefetch(&self, offset: u64, length: u64, purpose: Purpose) -> Result<Option<Arrival>, Cause> {
        let mut arrivals = Vec::new();
        let end = offset.saturating_add(length).min(self.size);
        let mut at = offset;
        while at < end {
            let (place, length) = match self.place(at, end - at) {
                Ok(found) => found,
                Err(cause) => {
                    arrivals.extend(cause.arrival().cloned());
                    return if arrivals.is_empty() { Err(cause) } else { Ok(Some(Arrival::all(arrivals))) };
                }
            };
            match place {
                Place::Zero => {}
                Place::Plain(source, from) => arrivals.extend(source.prefetch(&[(from, length)], purpose)),
                Place::Compressed(source, _, what) => {
                    arrivals.extend(source.prefetch(&[(what.at, what.bytes)], purpose));
                }
            }
            at += length;
        }
        Ok((!arrivals.is_empty()).then(|| Arrival::all(arrivals)))
    }

    /// The first offset at or after `offset` and below the end that is data (or is not).
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

/// Arrivals that a read has to wait for.
#[derive(Default)]
pub(super) struct Coming {
    arrivals: Vec<Arrival>,
    last: Option<SourceError>,
}

impl Coming {
    /// Notes an error that is no failure; any other is the end.
    pub fn wait_for(&mut self, error: SourceError) -> Result<(), SourceError> {
        match error.arrival() {
            Some(arrival) if error.kind() == SourceErrorKind::NotHere => {
                self.arrivals.push(arrival.clone());
                self.last = Some(error);
                Ok(())
            }
            _ => Err(error),
        }
    }

    /// `cause`, and what was noted before when that is to be waited for as well.
    fn and(mut self, cause: Cause) -> Cause {
        match cause {
            Cause::Source(error) => match self.wait_for(error) {
                Ok(()) => match self.end() {
                    Err(cause) => cause,
                    Ok(()) => unreachable!("an arrival was noted"),
                },
                Err(error) => Cause::Source(error),
            },
            other => other,
        }
    }

    /// The error for all that was noted.
    pub fn end(mut self) -> Result<(), Cause> {
        match (self.arrivals.len(), self.last) {
            (0, _) | (_, None) => Ok(()),
            (1, Some(error)) => Err(Cause::Source(error)),
            (_, Some(error)) => {
                let arrival = Arrival::all(std::mem::take(&mut self.arrivals));
                Err(Cause::Source(SourceError::not_here(error.object().to_owned(), arrival)))
            }
        }
    }
}
