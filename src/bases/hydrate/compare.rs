//! Compares contents with the digest that the operator gave.

use sha2::{Digest as _, Sha256, Sha512};

use crate::fetch::kept::{CACHE_BLOCK, Contents, Reach};
use crate::format::record::Digest;
use crate::jobs::Stopped;
use crate::source::{FileSource, Source};

/// Bytes of one read.
const READ: u64 = 1 << 20;

/// The result of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The contents match the digest.
    Matches,
    /// The contents differ from the digest.
    Differs,
    /// There is no digest; the contents are complete and intact.
    Sound,
    /// The contents are not complete, or not intact.
    Incomplete,
}

/// Compares cached contents, and notes them as verified when they match. `note` gets the bytes so far, and may end the
/// comparison.
///
/// # Errors
/// Those of `note`.
pub fn kept(
    contents: &Contents,
    digest: Option<&Digest>,
    note: &dyn Fn(u64) -> Result<(), Stopped>,
) -> Result<Verdict, Stopped> {
    // Frozen contents take no block, so the contents after the comparison are those that were read.
    let frozen = contents.freeze();
    let mut sum = Sum::of(digest);
    let mut buffer = vec![0; READ as usize];
    let (mut block, mut whole) = (0, true);
    while block < contents.blocks() {
        let bytes = (contents.size() - block * CACHE_BLOCK).min(READ) as usize;
        // The read compares each block with its checksum, and drops a block that differs.
        let read = contents.read(block, &mut buffer[..bytes], Reach::Any) as u64;
        let got = ((read * CACHE_BLOCK) as usize).min(bytes);
        sum.update(&buffer[..got]);
        whole &= got == bytes;
        block += read.max(1);
        note((block * CACHE_BLOCK).min(contents.size()))?;
    }
    Ok(match (whole, sum.matches()) {
        (false, _) => Verdict::Incomplete,
        (true, None) => Verdict::Sound,
        (true, Some(false)) => Verdict::Differs,
        (true, Some(true)) => {
            if !contents.is_verified() && !frozen.seal() {
                tracing::warn!(
                    "contents match their digest, but that cannot be noted; `plyfs base verify` compares them again"
                );
            }
            Verdict::Matches
        }
    })
}

/// Compares a file of this host.
///
/// # Errors
/// When it cannot be read, and those of `note`.
pub fn file(
    source: &FileSource,
    digest: Option<&Digest>,
    note: &dyn Fn(u64) -> Result<(), Stopped>,
) -> Result<Verdict, Stopped> {
    let mut sum = Sum::of(digest);
    let mut buffer = vec![0; READ as usize];
    let mut at = 0;
    while at < source.size() {
        let read = source.read_at(&mut buffer, at).map_err(|e| e.to_string())?;
        if read == 0 {
            return Err(Stopped::Failed(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).to_string()));
        }
        sum.update(&buffer[..read]);
        at += read as u64;
        note(at)?;
    }
    Ok(match sum.matches() {
        None => Verdict::Sound,
        Some(true) => Verdict::Matches,
        Some(false) => Verdict::Differs,
    })
}

/// The digest that is being computed, and the one to compare it with.
enum Sum<'a> {
    None,
    Sha256(Sha256, &'a [u8; 32]),
    Sha512(Sha512, &'a [u8; 64]),
}

impl<'a> Sum<'a> {
    fn of(wanted: Option<&'a Digest>) -> Self {
        match wanted {
            None => Self::None,
            Some(Digest::Sha256(digest)) => Self::Sha256(Sha256::new(), digest),
            Some(Digest::Sha512(digest)) => Self::Sha512(Sha512::new(), digest),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::None => {}
            Self::Sha256(sum, _) => sum.update(bytes),
            Self::Sha512(sum, _) => sum.update(bytes),
        }
    }

    fn matches(self) -> Option<bool> {
        match self {
            Self::None => None,
            Self::Sha256(sum, digest) => Some(sum.finalize()[..] == digest[..]),
            Self::Sha512(sum, digest) => Some(sum.finalize()[..] == digest[..]),
        }
    }
}
