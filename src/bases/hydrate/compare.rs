//! Compares contents with the digests that the operator gave, and a file of this host with its proof.

use sha2::{Digest as _, Sha256, Sha512};

use crate::fetch::kept::{CACHE_BLOCK, Contents, Reach};
use crate::format::proof::{GROUP, Hash};
use crate::format::record::{Digest, ImageFile};
use crate::jobs::Stopped;
use crate::source::{FileSource, ProofFile, Source};

/// Bytes of one read.
const READ: u64 = 1 << 20;

/// Ranges that differ and are named.
const NAMED: usize = 8;

/// What the contents of a file are compared with.
#[derive(Clone, Copy, Debug, Default)]
pub struct Digests<'a> {
    /// SHA-256 or SHA-512.
    pub sha: Option<&'a Digest>,
    /// BLAKE3, which is the root of a proof.
    pub blake3: Option<&'a Hash>,
}

impl<'a> Digests<'a> {
    /// Those that a file was registered with.
    pub fn of(file: &'a ImageFile) -> Self {
        let blake3 = file.proof.as_ref().map(|proof| &proof.root);
        Self { sha: file.identity.digest.as_ref(), blake3 }
    }
}

/// The result of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The contents match the digest.
    Matches,
    /// The contents differ from the digest.
    Differs,
    /// The contents have the BLAKE3 hash, and not the other digest: one of the two is not of this image.
    Contradicts,
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
    digests: Digests<'_>,
    note: &dyn Fn(u64) -> Result<(), Stopped>,
) -> Result<Verdict, Stopped> {
    // Frozen contents take no block, so the contents after the comparison are those that were read.
    let frozen = contents.freeze();
    let mut sum = Sum::of(digests);
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
    Ok(match (whole, sum.verdict()) {
        (false, _) => Verdict::Incomplete,
        (true, Verdict::Matches) => {
            if !contents.is_verified() && !frozen.seal() {
                tracing::warn!(
                    "contents match their digest, but that cannot be noted; `plyfs base verify` compares them again"
                );
            }
            Verdict::Matches
        }
        (true, verdict) => verdict,
    })
}

/// Compares a file of this host.
///
/// # Errors
/// When it cannot be read, and those of `note`.
pub fn file(
    source: &FileSource,
    digests: Digests<'_>,
    note: &dyn Fn(u64) -> Result<(), Stopped>,
) -> Result<Verdict, Stopped> {
    let mut sum = Sum::of(digests);
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
    Ok(sum.verdict())
}

/// Compares a file of this host with its proof, group by group. Returns what to tell of the ranges that differ; none when
/// all are right.
///
/// # Errors
/// When one of the files cannot be read, and those of `note`.
pub fn file_with_proof(
    source: &FileSource,
    proof: &ProofFile,
    note: &dyn Fn(u64) -> Result<(), Stopped>,
) -> Result<Option<String>, Stopped> {
    let mut wrong: Vec<(u64, u64)> = Vec::new();
    let mut buffer = vec![0; READ as usize];
    let mut at = 0;
    while at < source.size() {
        let read = source.read_at(&mut buffer, at).map_err(|e| e.to_string())?;
        for (offset, group) in (at..).step_by(GROUP as usize).zip(buffer[..read].chunks(GROUP as usize)) {
            let Some(part) = proof.find_wrong(offset, group).map_err(|e| e.to_string())? else { continue };
            match wrong.last_mut() {
                Some((_, end)) if *end == part.range.start => *end = part.range.end,
                _ => wrong.push((part.range.start, part.range.end)),
            }
        }
        at += read as u64;
        note(at)?;
    }
    if wrong.is_empty() {
        return Ok(None);
    }
    let bytes: u64 = wrong.iter().map(|(start, end)| end - start).sum();
    let named: Vec<String> =
        wrong.iter().take(NAMED).map(|(start, end)| format!("{start} to {}", end - 1)).collect();
    let more = wrong.len().saturating_sub(NAMED);
    let more = if more > 0 { format!(" and {more} more ranges") } else { String::new() };
    Ok(Some(format!("{bytes} bytes differ from its proof: bytes {}{more}", named.join(", "))))
}

/// The digests that are being computed, and those to compare them with.
struct Sum<'a> {
    sha: Sha<'a>,
    blake3: Option<(blake3::Hasher, &'a Hash)>,
}

enum Sha<'a> {
    None,
    Sha256(Sha256, &'a [u8; 32]),
    Sha512(Sha512, &'a [u8; 64]),
}

impl<'a> Sum<'a> {
    fn of(wanted: Digests<'a>) -> Self {
        let sha = match wanted.sha {
            None => Sha::None,
            Some(Digest::Sha256(digest)) => Sha::Sha256(Sha256::new(), digest),
            Some(Digest::Sha512(digest)) => Sha::Sha512(Sha512::new(), digest),
        };
        Self { sha, blake3: wanted.blake3.map(|root| (blake3::Hasher::new(), root)) }
    }

    fn update(&mut self, bytes: &[u8]) {
        match &mut self.sha {
            Sha::None => {}
            Sha::Sha256(sum, _) => sum.update(bytes),
            Sha::Sha512(sum, _) => sum.update(bytes),
        }
        if let Some((sum, _)) = &mut self.blake3 {
            sum.update(bytes);
        }
    }

    /// What the digests say of contents that are complete.
    fn verdict(self) -> Verdict {
        let sha = match self.sha {
            Sha::None => None,
            Sha::Sha256(sum, digest) => Some(sum.finalize()[..] == digest[..]),
            Sha::Sha512(sum, digest) => Some(sum.finalize()[..] == digest[..]),
        };
        let blake3 = self.blake3.map(|(sum, root)| sum.finalize().as_bytes() == root);
        match (sha, blake3) {
            (None, None) => Verdict::Sound,
            (Some(false), Some(true)) => Verdict::Contradicts,
            (Some(false), _) | (_, Some(false)) => Verdict::Differs,
            (Some(true), _) | (_, Some(true)) => Verdict::Matches,
        }
    }
}
