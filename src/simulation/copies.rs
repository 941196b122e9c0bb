//! The files of bases, and their hydrated copies on the simulated medium.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};

use super::Campaign;
use crate::events::{Events, Traffic};
use crate::fetch::kept::{
    CACHE_BLOCK, CacheObserver, Contents, DiskCache, EvictReason, FileKeys, Limits, Reach, SharedCopies,
    SourceKey,
};
use crate::format::record::{BaseRecord, ImageFile};
use crate::io::sim::SimMedium;
use crate::source::{FileSource, Identity, OpenHere, Source, SourceError, SourceErrorKind};
use crate::store::{BaseNode, Sources};

/// The index of the campaign's file that has a digest; the other has none.
const WITH_DIGEST: usize = 0;

/// See the module. There is one for each start of a daemon.
pub(super) struct Copies {
    campaign: Arc<Campaign>,
    cache: Arc<DiskCache>,
    /// The campaign's files that were removed, because a hydration reported that all of each is in the store.
    gone: Arc<Mutex<BTreeSet<usize>>>,
}

/// An observer that ignores all events.
struct NoObserver;

impl CacheObserver for NoObserver {
    fn evicted(&self, _: &SourceKey, _: u64, _: EvictReason) {}
    fn degraded(&self, _: Option<&str>) {}
}

/// The result of copying all of a file into the store.
#[derive(Debug)]
pub(super) enum CopyResult {
    /// All of it is in the store, durably.
    Complete,
    /// An error of the medium, or the cache has no directory since an earlier error.
    Failed(String),
}

impl Copies {
    pub fn open(campaign: &Arc<Campaign>, medium: &SimMedium, gone: BTreeSet<usize>) -> Arc<Self> {
        let limits = Limits { bytes: Some(1 << 30), bases: None, free_floor: 0 };
        let cache = DiskCache::open(Arc::new(medium.clone()), limits, Arc::new(NoObserver));
        Arc::new(Self { campaign: campaign.clone(), cache, gone: Arc::new(Mutex::new(gone)) })
    }

    fn contents(&self, source: usize) -> Arc<Contents> {
        let file = &self.campaign.bases[source];
        let key = |bytes: &[u8]| SourceKey(Sha256::digest(bytes).into());
        self.cache.contents(FileKeys {
            own: key(file.path.as_os_str().as_encoded_bytes()),
            digest: (source == WITH_DIGEST).then(|| key(&file.bytes)),
            size: file.bytes.len() as u64,
        })
    }

    /// Applies the options `pinned` and `hydrate` of a base.
    pub fn pin(&self, source: usize, pinned: bool) {
        self.contents(source).pin(pinned);
    }

    /// Fetches all blocks, compares the whole, and makes it durable.
    pub fn keep(&self, node: &BaseNode, source: usize) -> CopyResult {
        let contents = self.contents(source);
        contents.pin(true);
        node.detach();
        let bytes = &self.campaign.bases[source].bytes;
        while let Some(block) = contents.next_missing(0, Reach::Any) {
            let at = (block * CACHE_BLOCK) as usize;
            contents.insert(block, &bytes[at..(at + CACHE_BLOCK as usize).min(bytes.len())]);
            if !contents.contains(block) {
                return CopyResult::Failed(format!("block {block} cannot be cached"));
            }
        }
        let frozen = contents.freeze();
        let mut found = vec![0; bytes.len()];
        let read = contents.read(0, &mut found, Reach::Any) as u64;
        if read < contents.blocks() {
            return CopyResult::Failed("not all cached blocks can be read".into());
        }
        assert!(found == *bytes, "the copy of base file {source} has wrong bytes");
        if source == WITH_DIGEST && !contents.is_verified() && !frozen.seal() {
            return CopyResult::Failed("the verified digest cannot be noted".into());
        }
        match self.cache.flush() {
            Ok(()) => CopyResult::Complete,
            Err(e) => CopyResult::Failed(e.to_string()),
        }
    }

    /// The operator put the file back: its copy is no longer promised.
    pub fn put_back(&self, source: usize) {
        self.gone.lock().remove(&source);
    }

    /// Evicts all blocks of a file.
    pub fn evict(&self, source: usize) {
        self.contents(source).evict(EvictReason::Asked, SharedCopies::Drop);
    }

    /// Removes all blocks of a file whose last base was removed.
    pub fn forget(&self, source: usize) {
        self.contents(source).remove(SharedCopies::Drop);
    }

    /// Ticks and flushes the cache, as a daemon does before it stops.
    pub fn flush(&self) -> io::Result<()> {
        self.cache.tick();
        self.cache.flush()
    }
}

impl Sources for Copies {
    fn file(&self, path: &Path) -> Result<FileSource, SourceError> {
        FileSource::open_with(&OpenHere, path)
    }

    fn kept(&self, _: &BaseRecord, file: &ImageFile) -> Result<Arc<dyn Source>, SourceError> {
        let path = Path::new(&file.source);
        let source =
            self.campaign.bases.iter().position(|base| base.path == path).expect("a file of the campaign");
        let identity = self.file(path)?.identity().clone();
        let (campaign, gone) = (self.campaign.clone(), self.gone.clone());
        Ok(Arc::new(CopiedFile { campaign, source, contents: self.contents(source), identity, gone }))
    }

    fn traffic(&self, base: &BaseRecord) -> Arc<Traffic> {
        Events::new().base(base.id, &base.name)
    }
}

/// A file with a complete or partial copy in the store.
struct CopiedFile {
    campaign: Arc<Campaign>,
    source: usize,
    contents: Arc<Contents>,
    identity: Identity,
    gone: Arc<Mutex<BTreeSet<usize>>>,
}

impl CopiedFile {
    /// Reads one block, and caches it if it is missing.
    fn block(&self, block: u64) -> Result<Vec<u8>, SourceError> {
        let all = &self.campaign.bases[self.source].bytes;
        let at = (block * CACHE_BLOCK) as usize;
        let original = &all[at..(at + CACHE_BLOCK as usize).min(all.len())];
        let mut bytes = vec![0xee; original.len()];
        if self.contents.read(block, &mut bytes, Reach::Proven) == 1 {
            return Ok(bytes);
        }
        if self.gone.lock().contains(&self.source) {
            let why = format!("block {block} is not in the store, although its hydration was complete");
            let name = format!("base file {}", self.source);
            return Err(SourceError::remote(
                SourceErrorKind::NotFound,
                "read",
                name,
                why,
                "there is no other copy",
            ));
        }
        self.contents.insert(block, original);
        Ok(original.to_vec())
    }
}

impl Source for CopiedFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize, SourceError> {
        let mut done = 0;
        while done < buf.len() && offset + (done as u64) < self.size() {
            let at = offset + done as u64;
            let block = self.block(at / CACHE_BLOCK)?;
            let part = &block[(at % CACHE_BLOCK) as usize..];
            let some = part.len().min(buf.len() - done);
            buf[done..done + some].copy_from_slice(&part[..some]);
            done += some;
        }
        Ok(done)
    }

    fn size(&self) -> u64 {
        self.contents.size()
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn next_data(&self, offset: u64) -> Result<Option<u64>, SourceError> {
        Ok((offset < self.size()).then_some(offset))
    }

    fn next_hole(&self, offset: u64) -> Result<u64, SourceError> {
        Ok(offset.max(self.size()))
    }

    fn check(&self) -> Result<(), SourceError> {
        Ok(())
    }
}
