//! Pages of a proof on the disk of the cache. Whatever that disk does, no fetch waits for it long.

use std::sync::Arc;

use super::timed::TimedLane;
use crate::bases::lane::Lane;
use crate::fetch::kept::{DiskCache, SourceKey};
use crate::format::proof::{Layout, PageId, ProofHeader};
use crate::source::pages::Page;

/// Most pages that wait to be kept; more are not kept.
const MOST_WAITING: usize = 1024;

/// Reads and writes pages on threads of its own.
pub struct ProofDisk {
    cache: Arc<DiskCache>,
    readers: TimedLane,
    writers: Arc<Lane>,
    waiting: Arc<tokio::sync::Semaphore>,
}

impl ProofDisk {
    pub fn new(cache: Arc<DiskCache>) -> Arc<Self> {
        Arc::new(Self {
            cache,
            readers: TimedLane::new("proof-read", 2, usize::MAX),
            writers: Lane::new("proof-write", 1),
            waiting: Arc::new(tokio::sync::Semaphore::new(MOST_WAITING)),
        })
    }
}

/// The kept pages of one proof.
#[derive(Clone)]
pub struct KeptPages {
    disk: Arc<ProofDisk>,
    key: SourceKey,
    layout: Arc<Layout>,
    header: ProofHeader,
}

impl KeptPages {
    /// Of the proof with this header, under the key of the contents that it proves.
    pub fn new(disk: &Arc<ProofDisk>, key: SourceKey, header: ProofHeader) -> Self {
        Self { disk: disk.clone(), key, layout: Arc::new(Layout::of(header.size)), header }
    }

    /// The pages that are here, as far as the disk answers in time. They have to be proven.
    pub async fn read(&self, wanted: Vec<PageId>) -> Vec<(PageId, Vec<u8>)> {
        if wanted.is_empty() {
            return Vec::new();
        }
        let this = self.clone();
        let read = move || {
            let read = |page| Some((page, this.disk.cache.read_proof(&this.key, &this.layout, page).ok()?));
            wanted.into_iter().filter_map(read).collect()
        };
        self.disk.readers.ask(read).await.unwrap_or_default()
    }

    /// Keeps proven pages, with their offsets. Does not wait.
    pub fn keep(&self, pages: Vec<(u64, Page)>) {
        let Ok(place) = self.disk.waiting.clone().try_acquire_many_owned(pages.len() as u32) else { return };
        let this = self.clone();
        self.disk.writers.run(Box::new(move || {
            if let Err(error) = this.disk.cache.keep_proof(&this.key, &this.header, &pages) {
                tracing::debug!(%error, "pages of a proof are not kept; they are fetched again");
            }
            drop(place);
        }));
    }
}
