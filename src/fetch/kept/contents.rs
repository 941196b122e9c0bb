//! The cached contents of one file of one base: blocks that were fetched for this base, and blocks of any base that were
//! compared with the file's digest.
//!
//! A base reads three kinds of cached sources:
//! - *verified* sources: all their blocks were compared, as a whole, with the digest that this base has too. They take
//!   no more blocks, so blocks that another base fetches never get into them.
//! - its *own* source: blocks that were fetched from the location that the base names.
//! - an *unproven* source: blocks that an earlier version cached under the digest's key. Which base fetched them is
//!   unknown, so a base reads them only to compare the whole.
//!
//! What must hold: a byte that a base reads was fetched for this base or was compared with the digest. The key alone
//! decides which source is a base's own. When that source becomes a verified one, later blocks go to the next key.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLock;
use sha2::{Digest as _, Sha256};

use super::{CACHE_BLOCK, CachedSource, DiskCache, EvictReason, Frozen, SourceKey};
use crate::source::holdings::HeldRow;

/// The most own sources of a base that are verified one after the other, each after the one before lost blocks.
const MOST: u32 = 64;

/// The keys of a base's file in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileKeys {
    /// Key of the blocks that are fetched for this base.
    pub own: SourceKey,
    /// Key of the file's digest, when it has one.
    pub digest: Option<SourceKey>,
    /// Bytes of the file.
    pub size: u64,
}

/// What an eviction does with verified blocks, which every base with the same digest reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SharedCopies {
    /// They stay: another base needs them.
    Keep,
    /// They go: no other base needs them.
    Drop,
}

/// Which sources a call reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// Verified sources alone.
    Verified,
    /// Verified sources, and the base's own.
    Proven,
    /// Also unproven sources, whose bytes must be compared before they are used.
    Any,
}

/// See the module. Any thread may call any method. A method waits for the local disk at most.
pub struct Contents {
    cache: Arc<DiskCache>,
    keys: FileKeys,
    source_set: RwLock<Option<SourceSet>>,
    pinned: AtomicBool,
}

/// The sources that a file is read from.
#[derive(Clone)]
struct SourceSet {
    /// [`Shared::verified_epoch`](super::Shared) when they were looked up.
    at: u64,
    own: Arc<CachedSource>,
    verified: Arc<[Arc<CachedSource>]>,
}

/// The sources of verified contents, by contents.
#[derive(Default)]
pub(super) struct Verified {
    /// [`Shared::verified_epoch`](super::Shared) when they were looked up.
    at: u64,
    by_contents: HashMap<SourceKey, Vec<Arc<CachedSource>>>,
}

/// The key of a base's own source number `n`.
fn nth(own: SourceKey, n: u32) -> SourceKey {
    if n == 0 {
        return own;
    }
    let mut sum = Sha256::new();
    sum.update(own.0);
    sum.update(n.to_le_bytes());
    SourceKey(sum.finalize().into())
}

impl DiskCache {
    /// The cached contents of a base's file.
    pub fn contents(self: &Arc<Self>, keys: FileKeys) -> Arc<Contents> {
        Arc::new(Contents {
            cache: self.clone(),
            keys,
            source_set: RwLock::new(None),
            pinned: AtomicBool::new(false),
        })
    }

    fn verified_for(&self, digest: &SourceKey, size: u64) -> Arc<[Arc<CachedSource>]> {
        let now = self.shared.verified_epoch.load(Ordering::Acquire);
        let mut verified = self.verified.lock();
        if verified.at != now {
            verified.by_contents.clear();
            for source in self.sources() {
                if let Some(contents) = source.contents() {
                    verified.by_contents.entry(contents).or_default().push(source);
                }
            }
            verified.at = now;
        }
        let all = verified.by_contents.get(digest).into_iter().flatten();
        all.filter(|source| source.size() == size).cloned().collect()
    }
}

impl Contents {
    /// The sources, when the last lookup is still valid.
    fn source_set_now(&self) -> Option<SourceSet> {
        let now = self.cache.shared.verified_epoch.load(Ordering::Acquire);
        let source_set = self.source_set.read();
        source_set
            .as_ref()
            .filter(|source_set| source_set.at == now && !source_set.own.is_detached())
            .cloned()
    }

    /// The sources. May wait for the disk when it must pin a new one.
    fn source_set(&self) -> SourceSet {
        if let Some(source_set) = self.source_set_now() {
            return source_set;
        }
        let now = self.cache.shared.verified_epoch.load(Ordering::Acquire);
        let verified = match &self.keys.digest {
            Some(digest) => self.cache.verified_for(digest, self.keys.size),
            None => Arc::default(),
        };
        let taken = |key: &SourceKey| self.cache.find(key).is_some_and(|source| source.contents().is_some());
        let free = (0..MOST).map(|n| nth(self.keys.own, n)).find(|key| !taken(key));
        let own = self.cache.attach(free.unwrap_or(nth(self.keys.own, MOST)), self.keys.size);
        own.report_as(self.keys.own);
        if self.pinned.load(Ordering::Relaxed) && !own.is_pinned() {
            own.pin(true);
        }
        let source_set = SourceSet { at: now, own, verified };
        *self.source_set.write() = Some(source_set.clone());
        source_set
    }

    /// The sources in the order in which they are read, each with the contents that it must have been compared with.
    fn sources(&self, reach: Reach) -> Vec<(Arc<CachedSource>, Option<SourceKey>)> {
        let SourceSet { own, verified, .. } = self.source_set();
        let mut all: Vec<_> = verified.iter().map(|source| (source.clone(), self.keys.digest)).collect();
        if reach != Reach::Verified {
            all.push((own, None));
        }
        if reach == Reach::Any {
            all.extend(self.unproven().map(|source| (source, None)));
        }
        all
    }

    /// The source that an earlier version cached under the digest's key.
    fn unproven(&self) -> Option<Arc<CachedSource>> {
        let source = self.cache.find(&self.keys.digest?)?;
        (source.size() == self.keys.size && source.contents().is_none() && source.has_files())
            .then_some(source)
    }

    /// The keys of the file.
    pub fn file_keys(&self) -> &FileKeys {
        &self.keys
    }

    /// Bytes of the file.
    pub fn size(&self) -> u64 {
        self.keys.size
    }

    /// Cache blocks of the file; the last may be short.
    pub fn blocks(&self) -> u64 {
        self.keys.size.div_ceil(CACHE_BLOCK)
    }

    /// As [`CachedSource::read`], from all sources that `reach` allows.
    pub fn read(&self, first: u64, buf: &mut [u8], reach: Reach) -> usize {
        let wanted = self.blocks_in(first, buf.len());
        let sources = self.sources(reach);
        let mut done = 0;
        while done < wanted {
            let got = sources.iter().find_map(|(source, contents)| {
                let rest = &mut buf[(done * CACHE_BLOCK) as usize..];
                let got = source.read_sound(first + done, wanted - done, rest, *contents);
                (got > 0).then_some(got)
            });
            let Some(got) = got else { break };
            done += got;
        }
        self.cache.shared.looked_up(wanted, done);
        done as usize
    }

    /// As [`read`](Self::read), for another host: it counts nothing and notes no use, so that a host that reads all of it
    /// evicts nothing that guests use. A damaged block ends it, and is left to the reads of guests.
    pub fn lend(&self, first: u64, buf: &mut [u8], reach: Reach) -> usize {
        let wanted = self.blocks_in(first, buf.len());
        let sources = self.sources(reach);
        let mut done = 0;
        while done < wanted {
            let rest = &mut buf[(done * CACHE_BLOCK) as usize..];
            let mut lend = |(source, contents): &(Arc<CachedSource>, Option<SourceKey>)| {
                source.lend(first + done, wanted - done, rest, *contents)
            };
            let Some(got) = sources.iter().map(&mut lend).find(|got| *got > 0) else { break };
            done += got;
        }
        done as usize
    }

    /// As [`read`](Self::read) of [`Reach::Proven`], but never waits and may return fewer blocks; 0 when the first is
    /// missing. `None`: only `read` can tell.
    pub fn read_now(&self, first: u64, buf: &mut [u8]) -> Option<usize> {
        let wanted = self.blocks_in(first, buf.len());
        let SourceSet { own, verified, .. } = self.source_set_now()?;
        let theirs = verified.iter().map(|source| (source, self.keys.digest));
        let mut here = Some(0);
        for (source, contents) in theirs.chain([(&own, None)]) {
            match source.read_sound_now(first, wanted, buf, contents) {
                Some(0) => {}
                None => here = None,
                Some(got) => {
                    self.cache.shared.looked_up(got, got);
                    return Some(got as usize);
                }
            }
        }
        // Only the first missing block is counted: the caller reads on behind it, and counts the next.
        if here == Some(0) {
            self.cache.shared.looked_up(wanted.min(1), 0);
        }
        here
    }

    /// As [`contains`](Self::contains), but never waits. `None`: only `contains` can tell.
    pub fn contains_now(&self, block: u64) -> Option<bool> {
        let SourceSet { own, verified, .. } = self.source_set_now()?;
        let all = verified.iter().chain([&own]).map(|source| source.contains_now(block));
        all.reduce(|one, other| match (one, other) {
            (Some(true), _) | (_, Some(true)) => Some(true),
            (None, _) | (_, None) => None,
            _ => Some(false),
        })?
    }

    /// The disk stopped answering reads (`false`), or answers again (`true`). Never waits.
    pub fn disk_answers(&self, answers: bool) {
        let shared = &self.cache.shared;
        if answers {
            shared.health.retry_now();
            shared.worked();
        } else {
            shared.degrade("its disk does not answer a read");
        }
    }

    /// The number of blocks that `len` bytes from block `first` on fill; the last block of the file may be short.
    fn blocks_in(&self, first: u64, len: usize) -> u64 {
        if len as u64 >= self.keys.size.saturating_sub(first * CACHE_BLOCK) {
            self.blocks().saturating_sub(first)
        } else {
            len as u64 / CACHE_BLOCK
        }
    }

    /// Whether a block is present, as far as the cache knows without reading it.
    pub fn contains(&self, block: u64) -> bool {
        let SourceSet { own, verified, .. } = self.source_set();
        own.contains(block) || verified.iter().any(|source| source.contains(block))
    }

    /// Notes in `rows` which blocks are present, from row `first` on. Reads no block and no checksum.
    pub fn hold(&self, first: u64, rows: &mut [HeldRow]) {
        let SourceSet { own, verified, .. } = self.source_set();
        verified.iter().chain([&own]).for_each(|source| source.hold(first, rows));
        rows.iter_mut().for_each(|row| row.unknown &= !row.cached);
    }

    /// The first row at or after `row` that may have a present block.
    pub fn next_held(&self, row: u64) -> Option<u64> {
        let SourceSet { own, verified, .. } = self.source_set();
        verified.iter().chain([&own]).filter_map(|source| source.next_held(row)).min()
    }

    /// Inserts fetched blocks that are missing, as [`CachedSource::insert`] does.
    pub fn insert(&self, first: u64, data: &[u8]) {
        let end = first + (data.len() as u64).div_ceil(CACHE_BLOCK);
        let SourceSet { own, verified, .. } = self.source_set();
        let mut at = first;
        while at < end {
            let here = |source: &Arc<CachedSource>| source.present_run(at, end - at);
            let skip = verified.iter().map(here).max().unwrap_or(0);
            if skip > 0 {
                at += skip;
                continue;
            }
            let missing = verified.iter().map(|source| source.missing_run(at, end - at)).min();
            let run = missing.unwrap_or(end - at).max(1);
            let from = ((at - first) * CACHE_BLOCK) as usize;
            let to = (((at + run - first) * CACHE_BLOCK) as usize).min(data.len());
            own.insert(at, &data[from..to]);
            at += run;
        }
    }

    /// The number of consecutive present blocks from `first` on, at most `max`.
    pub fn present_run(&self, first: u64, max: u64, reach: Reach) -> u64 {
        let sources = self.sources(reach);
        let mut done = 0;
        while done < max {
            let run = sources.iter().map(|(source, _)| source.present_run(first + done, max - done)).max();
            match run.unwrap_or(0) {
                0 => break,
                run => done += run,
            }
        }
        done
    }

    /// The number of consecutive missing blocks from `first` on, at most `max`, up to the end of the file.
    pub fn missing_run(&self, first: u64, max: u64, reach: Reach) -> u64 {
        let runs = self.sources(reach).into_iter().map(|(source, _)| source.missing_run(first, max));
        runs.min().unwrap_or(0)
    }

    /// The first missing block at or after `from`.
    pub fn next_missing(&self, from: u64, reach: Reach) -> Option<u64> {
        let end = self.blocks();
        let at = from + self.present_run(from, end.saturating_sub(from), reach);
        (at < end).then_some(at)
    }

    /// Bytes of the present blocks.
    pub fn cached_bytes(&self, reach: Reach) -> u64 {
        let sources = self.sources(reach);
        if let [(only, _)] = &sources[..] {
            return only.cached_bytes();
        }
        if !self.is_known() {
            let bytes: u64 = sources.iter().map(|(source, _)| source.cached_bytes()).sum();
            return bytes.min(self.keys.size);
        }
        let (mut bytes, mut at, end) = (0, 0, self.blocks());
        while at < end {
            let here = self.present_run(at, end - at, reach);
            bytes += ((at + here) * CACHE_BLOCK).min(self.keys.size) - (at * CACHE_BLOCK).min(self.keys.size);
            at += here;
            at += self.missing_run(at, end - at, reach).max(u64::from(here == 0));
        }
        bytes
    }

    /// Whether all blocks are present.
    pub fn is_complete(&self, reach: Reach) -> bool {
        let any = self.sources(reach).iter().any(|(source, _)| source.is_complete());
        any || self.next_missing(0, reach).is_none()
    }

    /// As [`is_complete`](Self::is_complete), without a read of the cache's disk, which may hang. `None` when only such a
    /// read can tell.
    pub fn is_complete_now(&self, reach: Reach) -> Option<bool> {
        if self.sources(reach).iter().any(|(source, _)| source.is_complete()) {
            return Some(true);
        }
        self.is_known().then(|| self.is_complete(reach))
    }

    /// As [`is_verified`](Self::is_verified), without a read of the cache's disk, which may hang. `None` when only such a
    /// read can tell.
    pub fn is_verified_now(&self) -> Option<bool> {
        if self.source_set().verified.iter().any(|source| source.is_verified()) {
            return Some(true);
        }
        self.is_known().then(|| self.is_verified())
    }

    /// Whether all blocks that an earlier worker left are indexed. Until then [`is_complete`](Self::is_complete) takes
    /// long.
    pub fn is_known(&self) -> bool {
        self.sources(Reach::Any).iter().all(|(source, _)| source.is_known())
    }

    /// Whether all blocks are present and were compared with the digest.
    pub fn is_verified(&self) -> bool {
        let verified = self.source_set().verified;
        // The common case: one source has all blocks.
        if verified.iter().any(|source| source.is_verified()) {
            return true;
        }
        let (mut at, end) = (0, self.blocks());
        while at < end {
            match verified.iter().map(|source| source.present_run(at, end - at)).max() {
                None | Some(0) => return false,
                Some(run) => at += run,
            }
        }
        true
    }

    /// Keys of the sources that the file is read from.
    pub fn keys(&self) -> Vec<SourceKey> {
        self.sources(Reach::Any).iter().map(|(source, _)| *source.key()).collect()
    }

    /// Why cached blocks cannot be read now.
    pub fn trouble(&self) -> Option<String> {
        let sources = self.sources(Reach::Any);
        sources.iter().find_map(|(source, _)| self.cache.trouble(source.key()))
    }

    /// Pins or unpins the file. The cache does not evict a pinned file to make room.
    pub fn pin(&self, pinned: bool) {
        self.pinned.store(pinned, Ordering::Relaxed);
        let verified = self.source_set().verified.iter().any(|source| source.is_verified());
        for (source, _) in self.sources(Reach::Any) {
            // A fully verified file needs no own source of the base.
            let needless = verified && source.contents().is_none() && !source.has_files();
            if source.is_pinned() != pinned && !(pinned && needless) {
                source.pin(pinned);
            }
        }
    }

    /// Drops the base's own blocks and the unproven ones; with [`SharedCopies::Drop`] also the verified ones. Returns the
    /// bytes dropped.
    pub fn evict(&self, reason: EvictReason, shares: SharedCopies) -> u64 {
        self.cache.wait_for_load();
        let sources = self.sources(Reach::Any);
        let goes =
            sources.iter().filter(|(source, _)| shares == SharedCopies::Drop || source.contents().is_none());
        goes.map(|(source, _)| source.evict(reason)).sum()
    }

    /// Drops the unproven blocks. Returns the bytes dropped.
    pub fn drop_unproven(&self) -> u64 {
        self.unproven().map_or(0, |source| {
            let bytes = source.cached_bytes();
            self.cache.remove(source.key());
            bytes
        })
    }

    /// Whether the base's own source has blocks, which were not compared with a digest.
    pub fn has_own(&self) -> bool {
        self.source_set().own.cached_bytes() > 0
    }

    /// Removes the base's sources from the cache; see [`evict`](Self::evict).
    pub fn remove(&self, shares: SharedCopies) {
        for n in 0..=MOST {
            let key = nth(self.keys.own, n);
            match self.cache.find(&key) {
                Some(source) if source.contents().is_none() || shares == SharedCopies::Drop => {
                    self.cache.remove(&key);
                }
                Some(_) => {}
                None => break,
            }
        }
        if let (SharedCopies::Drop, Some(digest)) = (shares, &self.keys.digest) {
            let verified = self.source_set().verified;
            verified.iter().for_each(|source| self.cache.remove(source.key()));
            *self.source_set.write() = None;
            self.cache.remove(digest);
        }
    }

    /// Refuses inserts while the result is held.
    pub fn freeze(&self) -> FrozenContents {
        let open = |source: &Arc<CachedSource>| source.contents().is_none();
        let sources = self.sources(Reach::Any).into_iter().map(|(source, _)| source).filter(open);
        FrozenContents { frozen: sources.map(|source| source.freeze()).collect(), digest: self.keys.digest }
    }

    /// Takes over as verified what an earlier version noted as verified.
    pub fn adopt_verified(&self) {
        if let Some(source) = self.unproven() {
            source.adopt_verified();
        }
    }
}

/// Contents that refuse inserts while they are compared.
pub struct FrozenContents {
    frozen: Vec<Frozen>,
    digest: Option<SourceKey>,
}

impl FrozenContents {
    /// Notes that all present blocks were compared with the digest and matched. Returns whether that was noted.
    pub fn seal(&self) -> bool {
        let Some(digest) = self.digest else { return false };
        self.frozen.iter().filter(|frozen| frozen.has_blocks()).all(|frozen| frozen.seal(digest))
    }
}
