//! Tests on images that the tests write, over sources that are remote, slow or failing.

mod model;
mod refusals;
mod restart;
mod writer;

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use super::{Chain, Extent, Format, HEAD, Image, ImageError, ImageErrorKind, inspect, open};
use crate::source::{Completion, Identity, Source, SourceError, SourceErrorKind};

/// Bytes of a block of the persistent cache.
const BLOCK: u64 = 16 * 1024;

/// A source in memory that behaves like a local or a remote one.
struct TestSource {
    bytes: Vec<u8>,
    identity: Identity,
    access: Access,
    state: Mutex<State>,
}

#[derive(Clone, Copy, PartialEq)]
enum Access {
    /// All bytes are here.
    Local,
    /// Blocks must be fetched. Each round trip brings all blocks that were requested or announced before it.
    Remote,
    /// Each read of a range fails with `NotHere` the first time, and then every other time.
    Alternating,
}

#[derive(Default)]
struct State {
    present: BTreeSet<u64>,
    requested: BTreeSet<u64>,
    round_trips: usize,
    /// Whether the next read of a range fails.
    fails: HashMap<(u64, usize), bool>,
    reads: usize,
    /// The number of the read that fails with EIO.
    fail_at: Option<usize>,
}

impl TestSource {
    fn new(bytes: Vec<u8>, access: Access) -> Arc<Self> {
        let identity = Identity::Contents { size: bytes.len() as u64, key: [0; 32] };
        Arc::new(Self { bytes, identity, access, state: Mutex::default() })
    }

    fn deliver(&self) {
        let mut state = self.state.lock();
        state.round_trips += 1;
        let requested = std::mem::take(&mut state.requested);
        state.present.extend(requested);
    }

    fn blocks(&self, offset: u64, len: u64) -> std::ops::Range<u64> {
        offset / BLOCK..offset.saturating_add(len).min(self.size()).div_ceil(BLOCK)
    }
}

impl Source for TestSource {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize, SourceError> {
        let mut state = self.state.lock();
        state.reads += 1;
        if state.fail_at == Some(state.reads) {
            return Err(SourceError::new(SourceErrorKind::Io, "read", Path::new("far")));
        }
        let wait = match self.access {
            Access::Local => false,
            Access::Remote => {
                let missing: Vec<u64> = self
                    .blocks(offset, buf.len() as u64)
                    .filter(|block| !state.present.contains(block))
                    .collect();
                let wait = !missing.is_empty();
                state.requested.extend(missing);
                wait
            }
            Access::Alternating => {
                let fails = state.fails.entry((offset, buf.len())).or_default();
                *fails = !*fails;
                *fails
            }
        };
        if wait {
            return Err(SourceError::not_here("far", Completion::new().1));
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
                self.blocks(*offset, *len).filter(|block| !state.present.contains(block)).collect();
            state.requested.extend(missing);
        }
    }

    fn is_remote(&self) -> bool {
        self.access == Access::Remote
    }
}

fn head(bytes: &[u8]) -> &[u8] {
    &bytes[..bytes.len().min(HEAD as usize)]
}

/// Inspects and opens an image.
fn opened(format: Format, source: &Arc<TestSource>, chain: Chain) -> Result<Arc<dyn Image>, ImageError> {
    let found = inspect(format, head(&source.bytes), source.size(), chain)?;
    Ok(open(format, source.clone(), found.size, chain))
}

/// Runs a call again until no bytes are missing.
fn retry<T>(source: &TestSource, mut run: impl FnMut() -> Result<T, ImageError>) -> Result<T, ImageError> {
    for _ in 0..1000 {
        match run() {
            Err(error) if error.completion().is_some() => source.deliver(),
            result => return result,
        }
    }
    panic!("the call always misses bytes");
}

/// The bytes of a disk; `None` where the backing image shows through.
type Flat = Vec<Option<u8>>;

/// The bytes of a range of the image.
fn read(image: &dyn Image, source: &TestSource, offset: u64, len: u64) -> Result<Flat, ImageError> {
    let (mut out, mut inflated): (Flat, _) = (Vec::new(), Vec::new());
    while (out.len() as u64) < len {
        let (here, left) = (offset + out.len() as u64, len - out.len() as u64);
        let (extent, run) = retry(source, || image.extent(here, left))?;
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
                retry(source, || image.inflate(&what, &mut inflated))?;
                assert_eq!(inflated.len() as u64, what.len);
                let from = (here - what.guest) as usize;
                out.extend(inflated[from..from + run as usize].iter().map(|byte| Some(*byte)));
            }
        }
    }
    Ok(out)
}

/// Pseudo-random numbers that are the same in every run.
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
