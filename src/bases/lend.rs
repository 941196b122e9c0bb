//! Cached blocks of bases for other hosts.
//!
//! What must hold: only bytes are lent that were compared with the name under which they are asked for (D120): with the
//! proof of the base, group by group, or with its digest as a whole. Lending starts no fetch, counts as no use, and
//! changes nothing of the cache.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::proofs::ProofPages;
use super::sources::HostSources;
use crate::fetch::kept::{CACHE_BLOCK, Contents, Reach, SourceKey};
use crate::fetch::{Arriving, LazySource};
use crate::format::proof::Layout;
use crate::format::record::ImageFile;
use crate::source::http::peer::ContentName;
use crate::source::{Completion, proven_key};
use crate::store::BaseNode;

/// The cached blocks of one file of a base.
pub struct Lender {
    contents: Arc<Contents>,
    reach: Reach,
    /// The open source, whose blocks in transit are proven.
    source: Option<Arc<LazySource>>,
}

/// What was lent since the start of the worker.
#[derive(Default)]
pub struct LentCounters {
    requests: AtomicU64,
    misses: AtomicU64,
    refused: AtomicU64,
    bytes: AtomicU64,
}

/// How a request of another host ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lending {
    /// With so many bytes.
    Sent(u64),
    /// The bytes, or the base, are not here.
    Missed,
    /// There was no time for it, or it was not understood.
    Refused,
}

impl LentCounters {
    /// Counts one request.
    pub fn count(&self, lending: Lending) {
        let add = |counter: &AtomicU64, n| counter.fetch_add(n, Ordering::Relaxed);
        add(&self.requests, 1);
        match lending {
            Lending::Sent(bytes) => add(&self.bytes, bytes),
            Lending::Missed => add(&self.misses, 1),
            Lending::Refused => add(&self.refused, 1),
        };
    }

    /// All requests, those of them that missed, those that were refused, and the bytes sent.
    pub fn all(&self) -> [u64; 4] {
        [&self.requests, &self.misses, &self.refused, &self.bytes].map(|count| count.load(Ordering::Relaxed))
    }
}

impl HostSources {
    /// The proof whose URL has this path, with its size.
    pub fn lent_proof(&self, bases: &[Arc<BaseNode>], path: &str) -> Option<(Arc<ProofPages>, u64)> {
        let (record, file) = bases.iter().map(|node| node.record()).find_map(|record| {
            let named = |file: &&ImageFile| {
                file.proof.as_ref().is_some_and(|proof| {
                    !proof.places.is_empty() && ContentName::of_proof(&proof.root).path() == path
                })
            };
            Some((record, record.files().find(named)?))
        })?;
        let (proof, size) = (file.proof.as_ref()?, file.identity.size);
        let open = self.open_proofs.get(&SourceKey(proven_key(&proof.root, size)));
        let pages = open.unwrap_or_else(|| self.proof_pages(&[], size, proof, &record.options));
        Some((pages, Layout::of(size).proof_size()))
    }

    /// The files of bases whose contents have this name, by the path of its URL.
    pub fn lenders(&self, bases: &[Arc<BaseNode>], path: &str) -> Vec<Lender> {
        let named = bases.iter().filter(|node| !node.options().refused).flat_map(|node| {
            let files = node.record().files();
            files
                .filter(move |file| ContentName::of(file).is_some_and(|name| name.path() == path))
                .map(move |file| (node, file))
        });
        let lender = |(node, file): (&Arc<BaseNode>, &ImageFile)| {
            let (record, contents) = (node.record(), self.contents(node.record(), file));
            // What was fetched for a base with a proof is proven; for another it must have been compared as a whole.
            match file.proof.as_ref().is_some_and(|proof| !proof.places.is_empty()) {
                true => {
                    let source = self.open_source(record.id, contents.file_keys().own);
                    Lender { contents, reach: Reach::Proven, source }
                }
                false => Lender { contents, reach: Reach::Verified, source: None },
            }
        };
        named.map(lender).collect()
    }
}

impl Lender {
    /// Bytes of the file.
    pub fn size(&self) -> u64 {
        self.contents.size()
    }

    /// Fills `buf` with blocks from block `first` on, up to the first that is not here. Returns the bytes. May wait for
    /// the cache's disk.
    pub fn read(&self, first: u64, buf: &mut [u8]) -> usize {
        let mut at = 0;
        while at < buf.len() {
            let block = first + at as u64 / CACHE_BLOCK;
            let kept = self.contents.lend(block, &mut buf[at..], self.reach) as u64;
            let end = ((block + kept) * CACHE_BLOCK).min(self.size());
            at += end.saturating_sub(block * CACHE_BLOCK) as usize;
            if at >= buf.len() || end >= self.size() {
                break;
            }
            let Arriving::Here(blocks) = self.arriving(block + kept, (buf.len() - at) as u64) else { break };
            for bytes in blocks {
                let Some(into) = buf.get_mut(at..at + bytes.len()) else { return at };
                into.copy_from_slice(&bytes);
                at += bytes.len();
            }
        }
        at.min(buf.len())
    }

    /// When the blocks in transit from block `first` on will have come; none: none is in transit.
    pub fn coming(&self, first: u64, bytes: u64) -> Option<Completion> {
        match self.arriving(first, bytes) {
            Arriving::Coming(completion) => Some(completion),
            Arriving::Here(_) | Arriving::Absent => None,
        }
    }

    fn arriving(&self, first: u64, bytes: u64) -> Arriving {
        match &self.source {
            Some(source) => source.arriving(first, bytes.div_ceil(CACHE_BLOCK)),
            None => Arriving::Absent,
        }
    }

    /// The number of blocks from block `first` on that are neither here nor in transit, `most` at most. May wait for the
    /// cache's disk.
    pub fn missing(&self, first: u64, most: u64) -> u64 {
        let kept = self.contents.present_run(first, 1, self.reach) > 0;
        let run = if kept { 0 } else { self.contents.missing_run(first, most, self.reach) };
        // A base of which nothing was compared has no source that could miss a block.
        let run = if run == 0 && !kept { most } else { run };
        let absent = |block: &u64| matches!(self.arriving(*block, CACHE_BLOCK), Arriving::Absent);
        (first..first.saturating_add(run)).take_while(absent).count() as u64
    }
}
