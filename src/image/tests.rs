//! Images written here, over sources that are slow, fail, or run out.

mod model;
mod refusals;
mod restart;
mod writer;

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Chain, Extent, Format, HEAD, Image, ImageError, ImageErrorKind, inspect, open};
use crate::source::{Arrival, Identity, Source, SourceError, SourceErrorKind};

/// Of the persistent cache.
const BLOCK: u64 = 16 * 1024;

/// Bytes behind a network, or near.
struct Far {
    bytes: Vec<u8>,
    identity: Identity,
    way: Way,
    state: Mutex<State>,
}

#[derive(Clone, Copy, PartialEq)]
enum Way {
    /// All here.
    Near,
    /// In blocks that have to be fetched; each trip brings all that was asked for or announced before it.
    Trips,
    /// Each read of a range is refused the first time, and every other time.
    Moody,
}

#[derive(Default)]
struct State {
    here: BTreeSet<u64>,
    coming: BTreeSet<u64>,
    trips: usize,
    moods: HashMap<(u64, usize), bool>,
    reads: usize,
    /// Fails with EIO at this read.
    fail_at: Option<usize>,
}

impl Far {
    fn new(bytes: Vec<u8>, way: Way) -> Arc<Self> {
        let identity = Identity::Contents { size: bytes.len() as u64, key: [0; 32] };
        Arc::new(Self { bytes, identity, way, state: Mutex::default() })
    }

    fn deliver(&self) {
        let mut state = self.state.lock();
        state.trips += 1;
        let coming = std::mem::take(&mut state.coming);
        state.here.extend(coming);
    }

    fn blocks(&self, offset: u64, len: u64) -> std::ops::Range<u64> {
        offset / BLOCK..offset.saturating_add(len).min(self.size()).div_ceil(BLOCK)
    }
}

impl Source for Far {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize, SourceError> {
        let mut state = self.state.lock();
        state.reads += 1;
        if state.fail_at == Some(state.reads) {
            return Err(SourceError::new(SourceErrorKind::Io, "read", Path::new("far")));
        }
        let wait = match self.way {
            Way::Near => false,
            Way::Trips => {
                let missing: Vec<u64> = self
                    .blocks(offset, buf.len() as u64)
                    .filter(|block| !state.here.contains(block))
                    .collect();
                let wait = !missing.is_empty();
                state.coming.extend(missing);
                wait
            }
            Way::Moody => {
                let mood = state.moods.entry((offset, buf.len())).or_default();
                *mood = !*mood;
                *mood
            }
        };
        if wait {
            return Err(SourceError::not_here("far", Arrival::new().1));
        }
        let rest = &self.bytes[self.bytes.len().min(offset as usize)..];
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn next_data(&self, offset: u64) -> Result<Option<u64>, SourceError> {
        Ok((offset < self.size()).then_some(offset))
    }

    fn next_hole(&self, _offset: u64) -> Result<u64, SourceError> {
        Ok(self.size())
    }

    fn check(&self) -> Result<(), SourceError> {
        Ok(())
    }

    fn announce(&self, ranges: &[(u64, u64)]) {
        let mut state = self.state.lock();
        for (offset, len) in ranges {
            assert!(offset + len <= self.size(), "announces {offset} + {len} of {}", self.size());
            let missing: Vec<u64> =
                self.blocks(*offset, *len).filter(|block| !state.here.contains(block)).collect();
            state.coming.extend(missing);
        }
    }

    fn is_remote(&self) -> bool {
        self.way == Way::Trips
    }
}

fn head(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.len().min(HEAD as usize)]
}

/// Inspected and opened.
fn opened(format: Format, source: &Arc<Far>, chain: Chain) -> Result<Arc<dyn Image>, ImageError> {
    let found = inspect(format, head(&source.bytes), source.size(), chain)?;
    Ok(open(format, source.clone(), found.size, chain))
}

/// Runs it until nothing is missing any more.
fn persist<T>(source: &Far, mut run: impl FnMut() -> Result<T, ImageError>) -> Result<T, ImageError> {
    for _ in 0..1000 {
        match run() {
            Err(error) if error.arrival().is_some() => source.deliver(),
            result => return result,
        }
    }
    panic!("it does not come to an end");
}

/// A byte of a disk, or none where what lies under the image shows.
type Flat = Vec<Option<u8>>;

/// What the image has in a range.
fn read(image: &dyn Image, source: &Far, offset: u64, len: u64) -> Result<Flat, ImageError> {
    let (mut out, mut inflated): (Flat, _) = (Vec::new(), Vec::new());
    while (out.len() as u64) < len {
        let (here, left) = (offset + out.len() as u64, len - out.len() as u64);
        let (extent, run) = persist(source, || image.extent(here, left))?;
        assert!((1..=left).contains(&run), "a run of {run} at {here}");
        let to = out.len() + run as usize;
        match extent {
            Extent::Zero => out.resize(to, Some(0)),
            Extent::Below => out.resize(to, None),
            Extent::Plain { at } => {
                let bytes = &source.bytes[at as usize..(at + run) as usize];
                out.extend(bytes.iter().map(|byte| Some(*byte)));
            }
            Extent::Compressed(what) => {
                assert!(what.at + what.bytes <= source.size());
                persist(source, || image.inflate(&what, &mut inflated))?;
                assert_eq!(inflated.len() as u64, what.len);
                let from = (here - what.guest) as usize;
                out.extend(inflated[from..from + run as usize].iter().map(|byte| Some(*byte)));
            }
        }
    }
    Ok(out)
}

/// Numbers that are the same in every run.
struct Numbers(u64);

impl Numbers {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15) | 1)
    }
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end.max(1)
    }
    fn shuffle<T>(&mut self, list: &mut [T]) {
        for index in (1..list.len()).rev() {
            list.swap(index, self.below(index as u64 + 1) as usize);
        }
    }
    fn data(&mut self, len: usize) -> Vec<u8> {
        match self.below(3) {
            0 => (0..len).map(|_| (self.next() >> 32) as u8).collect(),
            1 => vec![self.next() as u8 | 1; len],
            _ => {
                let word = self.next().to_le_bytes();
                (0..len).map(|at| word[at % 8] ^ (at / 64) as u8).collect()
            }
        }
    }
}
