//! Images from outside, which are hostile until proven otherwise: no panic, bounded time and memory, nothing outside
//! of the file.
//!
//! An input is a sparse file, so that tables can be far apart and inputs short: flags (bit 0: on a backing image),
//! the length in three bytes, then pieces of {sector in two bytes, length in two, bytes}. All little endian.

use std::collections::HashSet;
use std::sync::Arc;

use parking_lot::Mutex;
use plyfs::image::{self, Chain, Compressed, Extent, Format, HEAD, Image, ImageErrorKind, Method};
use plyfs::source::{Completion, Identity, Source, SourceError};

/// Of a file.
const MOST: usize = 1 << 20;

/// The file that an input stands for.
pub fn unpack(data: &[u8]) -> Option<(Chain, Vec<u8>)> {
    let (head, mut rest) = data.split_at_checked(4)?;
    let chain = if head[0] & 1 == 0 { Chain::Alone } else { Chain::OnBacking };
    let len = u32::from_le_bytes([head[1], head[2], head[3], 0]) as usize % (MOST + 1);
    let mut file = vec![0; len];
    while let Some((piece, more)) = rest.split_at_checked(4) {
        let at = usize::from(u16::from_le_bytes([piece[0], piece[1]])) * 512;
        let len = usize::from(u16::from_le_bytes([piece[2], piece[3]])).min(more.len());
        let (bytes, more) = more.split_at(len);
        rest = more;
        if let Some(place) = file.get_mut(at..) {
            let len = place.len().min(bytes.len());
            place[..len].copy_from_slice(&bytes[..len]);
        }
    }
    Some((chain, file))
}

/// The input that stands for a file, without its zeros.
pub fn pack(chain: Chain, file: &[u8]) -> Vec<u8> {
    let flags = u8::from(chain == Chain::OnBacking);
    let len = (file.len() as u32).to_le_bytes();
    let mut out = vec![flags, len[0], len[1], len[2]];
    for (sector, bytes) in file.chunks(512).enumerate() {
        let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
        if end > 0 {
            out.extend((sector as u16).to_le_bytes());
            out.extend((end as u16).to_le_bytes());
            out.extend(&bytes[..end]);
        }
    }
    out
}

/// Of which each range has to be asked for again, every other time.
struct Memory {
    file: Vec<u8>,
    identity: Identity,
    here: Mutex<HashSet<(u64, usize)>>,
}

impl Source for Memory {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize, SourceError> {
        let mut here = self.here.lock();
        if !here.remove(&(offset, buf.len())) {
            here.insert((offset, buf.len()));
            return Err(SourceError::not_here("memory", Completion::new().1));
        }
        // The most that is read at once: an L1 table.
        assert!(buf.len() <= 32 << 20);
        let rest = self.file.get(usize::try_from(offset).unwrap_or(usize::MAX)..).unwrap_or_default();
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }
    fn size(&self) -> u64 {
        self.file.len() as u64
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
        assert!(ranges.iter().all(|(at, len)| at + len <= self.size()));
    }
    fn is_remote(&self) -> bool {
        true
    }
}

/// Again until it is here. A call has a bounded number of reads, and each is refused once in the worst case.
fn persist<T>(mut run: impl FnMut() -> Result<T, image::ImageError>) -> Result<T, image::ImageError> {
    for _ in 0..200 {
        match run() {
            Err(error) if error.completion().is_some() => {}
            result => return result,
        }
    }
    panic!("it does not come to an end");
}

/// Registers it, maps it as far as 300 extents go, inflates some.
pub fn run(format: Format, data: &[u8]) {
    let Some((chain, file)) = unpack(data) else { return };
    let size = file.len() as u64;
    let found = match image::inspect(format, &file[..file.len().min(HEAD as usize)], size, chain) {
        Ok(found) => found,
        Err(error) => {
            assert!(error.kind() != ImageErrorKind::Source);
            assert!(error.to_string().len() < 3000 && !error.to_string().contains(char::is_control));
            return;
        }
    };
    assert!(found.size <= plyfs::format::MAX_DISK_SIZE);
    assert!(found.unit.is_power_of_two() && (512..=2 << 20).contains(&found.unit));
    let identity = Identity::Contents { size, key: [0; 32] };
    let source = Arc::new(Memory { file, identity, here: Mutex::default() });
    let image = image::open(format, source, found.size, chain);
    let (mut at, mut budget) = (0, 8 << 20u64);
    for _ in 0..300 {
        if at >= found.size {
            break;
        }
        // From time to time a smaller piece, and a jump.
        let left = found.size - at;
        let len = if at % 3 == 0 { left } else { left.min(5000) };
        match persist(|| image.extent(at, len)) {
            Err(error) => {
                assert!(error.kind() != ImageErrorKind::Source);
                at += found.unit;
            }
            Ok((extent, run)) => {
                assert!((1..=len).contains(&run), "{run} of {len}");
                look(&*image, &extent, run, at, size, &found, chain, &mut budget);
                at += run;
            }
        }
    }
}

#[allow(clippy::too_many_arguments)]
fn look(
    image: &dyn Image,
    extent: &Extent,
    run: u64,
    at: u64,
    size: u64,
    found: &image::Inspected,
    chain: Chain,
    budget: &mut u64,
) {
    match extent {
        Extent::Zero => {}
        Extent::Below => assert!(chain == Chain::OnBacking),
        Extent::Plain { at } => assert!(at + run <= size),
        Extent::Compressed(what) => {
            let Compressed { guest, len, at: place, bytes, method } = *what;
            assert!(place + bytes <= size && bytes <= 2 * found.unit + 512);
            assert!(guest <= at && at + run <= guest + len && len <= found.unit && guest + len <= found.size);
            assert!(found.method == Some(method) && (method != Method::Zlib || bytes > 0));
            if *budget < found.unit {
                return;
            }
            *budget -= found.unit;
            let mut out = vec![1; 3];
            match persist(|| image.inflate(what, &mut out)) {
                Ok(()) => assert_eq!(out.len() as u64, len),
                Err(error) => assert!(out.is_empty() && error.kind() == ImageErrorKind::Invalid),
            }
        }
    }
}
