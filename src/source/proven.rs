//! Bytes that are proven part by part while they are fetched.
//!
//! What must hold: a byte is delivered only when the whole part that it belongs to has the hash that is expected of it
//! (D103). A part that does not is not delivered, and neither is anything behind it.

use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::{SourceError, SourceErrorKind};
use crate::format::proof::{GROUP, Hash, Layout, PAGE, PageId};

/// The hash that each part of a range must have. The parts are groups of an image file, or pages of its proof.
#[derive(Clone)]
pub struct Parts {
    layout: Arc<Layout>,
    kind: PartKind,
    /// Number of the first part: a group, or a page of a level.
    first: u64,
    hashes: Arc<[Hash]>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum PartKind {
    Group,
    Page { level: u8 },
}

impl Parts {
    /// Groups of an image file, from group `first` on.
    pub fn groups(layout: &Arc<Layout>, first: u64, hashes: Vec<Hash>) -> Self {
        Self { layout: layout.clone(), kind: PartKind::Group, first, hashes: hashes.into() }
    }

    /// Pages of one level of a proof, from page `first` on.
    pub fn pages(layout: &Arc<Layout>, first: PageId, hashes: Vec<Hash>) -> Self {
        let kind = PartKind::Page { level: first.level };
        Self { layout: layout.clone(), kind, first: first.index, hashes: hashes.into() }
    }

    fn range_of(&self, part: u64) -> Range<u64> {
        let (start, len) = match self.kind {
            PartKind::Group => (part * GROUP, self.layout.group_len(part)),
            PartKind::Page { level } => self.layout.place(PageId { level, index: part }),
        };
        start..start + len
    }

    /// The bytes of the object that the parts are.
    pub fn range(&self) -> Range<u64> {
        let last = self.first + (self.hashes.len() as u64).max(1) - 1;
        self.range_of(self.first).start..self.range_of(last).end
    }

    /// Bytes of a part that is not the last of the object.
    pub fn unit(&self) -> u64 {
        match self.kind {
            PartKind::Group => GROUP,
            PartKind::Page { .. } => PAGE,
        }
    }

    /// Whether `bytes` are those of the part at `offset` of the object.
    pub fn prove(&self, offset: u64, bytes: &[u8]) -> bool {
        let Some(at) = offset.checked_sub(self.range_of(self.first).start) else { return false };
        let (number, rest) = (at / self.unit(), at % self.unit());
        let Some(hash) = self.hashes.get(number as usize).filter(|_| rest == 0) else { return false };
        let part = self.first + number;
        match self.kind {
            PartKind::Group => self.layout.group_has(part, bytes, hash),
            PartKind::Page { level } => self.layout.page_has(PageId { level, index: part }, bytes, hash),
        }
    }

    /// The part at `offset` alone.
    pub fn only(&self, offset: u64) -> Self {
        let number = offset.saturating_sub(self.range_of(self.first).start) / self.unit();
        let hashes = self.hashes.get(number as usize).into_iter().copied().collect();
        Self { first: self.first + number, hashes, ..self.clone() }
    }

    /// Those of a range that starts and ends with a part.
    pub fn within(&self, range: &Range<u64>) -> Self {
        let start = self.range_of(self.first).start;
        let number = |offset: u64| (offset.saturating_sub(start) / self.unit()) as usize;
        let last = number(range.end.saturating_sub(1));
        let hashes = self.hashes.get(number(range.start)..=last).unwrap_or_default().into();
        Self { first: self.first + number(range.start) as u64, hashes, ..self.clone() }
    }

    /// The parts as what a fetch takes.
    pub fn known(self) -> ProofOfRange {
        ProofOfRange { unit: self.unit(), parts: Box::pin(std::future::ready(Ok(self))) }
    }
}

/// By what the bytes of a fetch are proven.
pub struct ProofOfRange {
    /// Bytes of a part; the last part of the range may be short.
    pub unit: u64,
    /// The hashes, which may have to be fetched.
    pub parts: Pin<Box<dyn Future<Output = Result<Parts, SourceError>> + Send>>,
}

/// The key of contents of which each part is proven, in the caches of memory and disk: the same for each source of them.
pub fn proven_key(root: &Hash, size: u64) -> [u8; 32] {
    let sum = Sha256::new().chain_update(b"plyfs proven contents").chain_update(root);
    sum.chain_update(size.to_le_bytes()).finalize().into()
}

/// A part that is not what it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disproven {
    /// Its bytes in the object.
    pub range: Range<u64>,
}

impl Disproven {
    /// What is wrong, for messages about `whose` bytes.
    pub fn why(&self) -> String {
        let (first, last) = (self.range.start, self.range.end - 1);
        format!("bytes {first} to {last} are not those that the proof names")
    }
}

/// Cuts the bytes of a fetch into parts and delivers those that are proven.
pub struct Prover {
    unit: u64,
    /// Where the next part that is to be proven starts, and where the range ends.
    at: u64,
    end: u64,
    /// The bytes of the part that is being received.
    part: Vec<u8>,
    /// Parts that wait for their hashes.
    whole: VecDeque<Vec<u8>>,
    parts: Option<Parts>,
}

impl Prover {
    /// For the bytes of `range`, which starts and ends with a part.
    pub fn new(range: Range<u64>, unit: u64) -> Self {
        let (part, whole) = (Vec::new(), VecDeque::new());
        Self { unit, at: range.start, end: range.end, part, whole, parts: None }
    }

    /// Where the bytes end that were delivered.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// The hashes, once they came.
    pub fn parts(&self) -> Option<&Parts> {
        self.parts.as_ref()
    }

    /// The hashes came.
    pub fn know(&mut self, parts: Parts) {
        self.parts = Some(parts);
    }

    /// Whether whole parts wait for their hashes.
    pub fn waits(&self) -> bool {
        !self.whole.is_empty()
    }

    /// Forgets all that was not delivered: the next bytes are those at [`at`](Self::at).
    pub fn restart(&mut self) {
        self.part.clear();
        self.whole.clear();
    }

    /// Takes the next bytes.
    pub fn take(&mut self, mut bytes: &[u8]) {
        let mut start = self.at + self.whole.iter().map(|part| part.len() as u64).sum::<u64>();
        while !bytes.is_empty() && start < self.end {
            let whole = (self.end - start).min(self.unit) as usize;
            let take = (whole - self.part.len()).min(bytes.len());
            self.part.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if self.part.len() == whole {
                self.whole.push_back(std::mem::replace(&mut self.part, Vec::with_capacity(whole)));
                start += whole as u64;
            }
        }
    }

    /// Delivers the whole parts that are proven. Returns their bytes.
    ///
    /// # Errors
    /// At the first part that is not what it must be; those before it were delivered.
    pub fn deliver(&mut self, deliver: &mut dyn FnMut(&[u8])) -> Result<usize, Disproven> {
        let Some(parts) = &self.parts else { return Ok(0) };
        let mut proven = 0;
        while let Some(part) = self.whole.pop_front() {
            if !parts.prove(self.at, &part) {
                let range = self.at..self.at + part.len() as u64;
                self.restart();
                return Err(Disproven { range });
            }
            deliver(&part);
            self.at += part.len() as u64;
            proven += part.len();
        }
        Ok(proven)
    }
}

/// The error for a file of this host with a part that is not what it must be.
pub fn disproven(object: &str, what: &Disproven) -> SourceError {
    let advice = "put the original file back; `plyfs base verify` names all parts that differ";
    SourceError::remote(SourceErrorKind::Changed, "read", object, what.why(), advice)
}
