//! What is kept for one file of one base: what was fetched for it, and what was compared with its digest for whichever
//! base.
//!
//! A base reads three kinds of sources of the cache:
//! - *verified* ones: all that is in them was compared, as a whole, with the digest that the base has too. They take no
//!   block any more, so what another base fetches never gets into them.
//! - its *own*: what was fetched from where the base says that its bytes are.
//! - *unproven* ones, only while all of it is being compared: what an earlier version kept under the digest's key:
//!   its fetcher is not known.
//!
//! What must hold: a byte that a base reads was fetched for it or was compared. What its own source is, is decided by
//! its key alone: when that became a verified one, later blocks go to the next key.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLock;
use sha2::{Digest as _, Sha256};

use super::{CACHE_BLOCK, CachedSource, DiskCache, EvictReason, Frozen, SourceKey};

/// Own sources of a base that were verified one after the other and lost blocks since. More are not verified.
const MOST: u32 = 64;

/// What a base's file is called in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Of {
    /// Key of what is fetched for it.
    pub own: SourceKey,
    /// Key of its digest, when it has one.
    pub digest: Option<SourceKey>,
    /// Bytes.
    pub size: u64,
}

/// Whether other bases have the same digest, and want their contents kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shares {
    /// What was verified stays.
    Wanted,
    /// Nothing needs what was verified.
    Free,
}

/// What may be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// What is right or was fetched for this base.
    Proven,
    /// Also what has to be compared first.
    Any,
}

/// See the module. All methods may be called from any thread, and wait for the local disk at most.
pub struct Contents {
    cache: Arc<DiskCache>,
    of: Of,
    lineup: RwLock<Option<Lineup>>,
    pinned: AtomicBool,
}

#[derive(Clone)]
struct Lineup {
    /// [`Shared::lineups`](super::Shared) when it was looked at.
    at: u64,
    own: Arc<CachedSource>,
    verified: Arc<[Arc<CachedSource>]>,
}

/// Sources of verified contents.
#[derive(Default)]
pub(super) struct Verified {
    /// [`Shared::lineups`](super::Shared) when it was looked at.
    at: u64,
    by_contents: HashMap<SourceKey, Vec<Arc<CachedSource>>>,
}

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
    /// What is kept of a file of a base, attached or not.
    pub fn contents(self: &Arc<Self>, of: Of) -> Arc<Contents> {
        Arc::new(Contents {
            cache: self.clone(),
            of,
            lineup: RwLock::new(None),
            pinned: AtomicBool::new(false),
        })
    }

    fn verified_for(&self, digest: &SourceKey, size: u64) -> Arc<[Arc<CachedSource>]> {
        let now = self.shared.lineups.load(Ordering::Acquire);
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
    /// The sources, when they are those that were looked up last.
    fn lineup_now(&self) -> Option<Lineup> {
        let now = self.cache.shared.lineups.load(Ordering::Acquire);
        let lineup = self.lineup.read();
        lineup.as_ref().filter(|lineup| lineup.at == now && !lineup.own.is_detached()).cloned()
    }

    /// The sources. May wait for the disk when one begins to be pinned.
    fn lineup(&self) -> Lineup {
        if let Some(lineup) = self.lineup_now() {
            return lineup;
        }
        let now = self.cache.shared.lineups.load(Ordering::Acquire);
        let verified = match &self.of.digest {
            Some(digest) => self.cache.verified_for(digest, self.of.size),
            None => Arc::default(),
        };
        let taken = |key: &SourceKey| self.cache.find(key).is_some_and(|source| source.contents().is_some());
        let free = (0..MOST).map(|n| nth(self.of.own, n)).find(|key| !taken(key));
        let own = self.cache.attach(free.unwrap_or(nth(self.of.own, MOST)), self.of.size);
        own.tell_as(self.of.own);
        if self.pinned.load(Ordering::Relaxed) && !own.is_pinned() {
            own.pin(true);
        }
        let lineup = Lineup { at: now, own, verified };
        *self.lineup.write() = Some(lineup.clone());
        lineup
    }

    /// The sources in the order in which they are read, each with what it has to have been compared with.
    fn sources(&self, reach: Reach) -> Vec<(Arc<CachedSource>, Option<SourceKey>)> {
        let Lineup { own, verified, .. } = self.lineup();
        let mut all: Vec<_> = verified.iter().map(|source| (source.clone(), self.of.digest)).collect();
        all.push((own, None));
        if reach == Reach::Any {
            all.extend(self.unproven().map(|source| (source, None)));
        }
        all
    }

    /// What an earlier version kept under the digest.
    fn unproven(&self) -> Option<Arc<CachedSource>> {
        let source = self.cache.find(&self.of.digest?)?;
        (source.size() == self.of.size && source.contents().is_none() && source.has_files()).then_some(source)
    }

    /// What it is called.
    pub fn of(&self) -> &Of {
        &self.of
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.of.size
    }

    /// Cache blocks.
    pub fn blocks(&self) -> u64 {
        self.of.size.div_ceil(CACHE_BLOCK)
    }

    /// As [`CachedSource::read`].
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

    /// As [`read`](Self::read) of what is proven, without waiting, and perhaps fewer of them; 0 when the first is not
    /// here. `None`: only `read` can say.
    pub fn read_now(&self, first: u64, buf: &mut [u8]) -> Option<usize> {
        let wanted = self.blocks_in(first, buf.len());
        let Lineup { own, verified, .. } = self.lineup_now()?;
        let theirs = verified.iter().map(|source| (source, self.of.digest));
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
        // What is not here is counted by who asks for it then.
        if here == Some(0) {
            self.cache.shared.looked_up(wanted.min(1), 0);
        }
        here
    }

    /// As [`contains`](Self::contains), without waiting. `None`: only `contains` can say.
    pub fn contains_now(&self, block: u64) -> Option<bool> {
        let Lineup { own, verified, .. } = self.lineup_now()?;
        let all = verified.iter().chain([&own]).map(|source| source.contains_now(block));
        all.reduce(|one, other| match (one, other) {
            (Some(true), _) | (_, Some(true)) => Some(true),
            (None, _) | (_, None) => None,
            _ => Some(false),
        })?
    }

    /// The disk has not answered a read for a while, or does again. Waits for nothing.
    pub fn disk_answers(&self, answers: bool) {
        let shared = &self.cache.shared;
        if answers {
            shared.health.hope();
            shared.worked();
        } else {
            shared.degrade("its disk does not answer a read");
        }
    }

    /// How many blocks from `first` on `len` bytes are; the last one may be short at the end of the file.
    fn blocks_in(&self, first: u64, len: usize) -> u64 {
        if len as u64 >= self.of.size.saturating_sub(first * CACHE_BLOCK) {
            self.blocks().saturating_sub(first)
        } else {
            len as u64 / CACHE_BLOCK
        }
    }

    /// Whether a block is here, as far as is known without reading it.
    pub fn contains(&self, block: u64) -> bool {
        let Lineup { own, verified, .. } = self.lineup();
        own.contains(block) || verified.iter().any(|source| source.contains(block))
    }

    /// Keeps fetched blocks that are not here, as [`CachedSource::insert`].
    pub fn insert(&self, first: u64, data: &[u8]) {
        let end = first + (data.len() as u64).div_ceil(CACHE_BLOCK);
        let Lineup { own, verified, .. } = self.lineup();
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

    /// How many of the `max` blocks from `first` on are here, without a gap.
    fn present_run(&self, first: u64, max: u64, reach: Reach) -> u64 {
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

    /// How many of the `max` blocks from `first` on are not here, without a gap; the end of the source ends it.
    pub fn missing_run(&self, first: u64, max: u64, reach: Reach) -> u64 {
        let runs = self.sources(reach).into_iter().map(|(source, _)| source.missing_run(first, max));
        runs.min().unwrap_or(0)
    }

    /// The first block at or after `from` that is not here.
    pub fn next_missing(&self, from: u64, reach: Reach) -> Option<u64> {
        let end = self.blocks();
        let at = from + self.present_run(from, end.saturating_sub(from), reach);
        (at < end).then_some(at)
    }

    /// Bytes of it that are here.
    pub fn cached_bytes(&self, reach: Reach) -> u64 {
        let sources = self.sources(reach);
        if let [(only, _)] = &sources[..] {
            return only.cached_bytes();
        }
        if !self.is_known() {
            let bytes: u64 = sources.iter().map(|(source, _)| source.cached_bytes()).sum();
            return bytes.min(self.of.size);
        }
        let (mut bytes, mut at, end) = (0, 0, self.blocks());
        while at < end {
            let here = self.present_run(at, end - at, reach);
            bytes += ((at + here) * CACHE_BLOCK).min(self.of.size) - (at * CACHE_BLOCK).min(self.of.size);
            at += here;
            at += self.missing_run(at, end - at, reach).max(u64::from(here == 0));
        }
        bytes
    }

    /// Whether all of it is here.
    pub fn is_complete(&self, reach: Reach) -> bool {
        let any = self.sources(reach).iter().any(|(source, _)| source.is_complete());
        any || self.next_missing(0, reach).is_none()
    }

    /// Whether all that an earlier worker left is known. Until then whether it is complete takes long to tell.
    pub fn is_known(&self) -> bool {
        self.sources(Reach::Any).iter().all(|(source, _)| source.is_known())
    }

    /// Whether all of it is here and was compared with the digest.
    pub fn is_verified(&self) -> bool {
        let verified = self.lineup().verified;
        // At once, of a source that was verified alone.
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

    /// Keys of the sources that it is read from.
    pub fn keys(&self) -> Vec<SourceKey> {
        self.sources(Reach::Any).iter().map(|(source, _)| *source.key()).collect()
    }

    /// Why what is kept cannot be read now.
    pub fn trouble(&self) -> Option<String> {
        let sources = self.sources(Reach::Any);
        sources.iter().find_map(|(source, _)| self.cache.trouble(source.key()))
    }

    /// With `true` nothing of it is evicted to make room.
    pub fn pin(&self, pinned: bool) {
        self.pinned.store(pinned, Ordering::Relaxed);
        let verified = self.lineup().verified.iter().any(|source| source.is_verified());
        for (source, _) in self.sources(Reach::Any) {
            // What is verified wholly needs no file of the base's own.
            let needless = verified && source.contents().is_none() && !source.has_files();
            if source.is_pinned() != pinned && !(pinned && needless) {
                source.pin(pinned);
            }
        }
    }

    /// Drops what was fetched for this base, and what is unproven; with [`Shares::Free`] also what was verified. Returns
    /// bytes.
    pub fn evict(&self, reason: EvictReason, shares: Shares) -> u64 {
        self.cache.wait_for_load();
        let sources = self.sources(Reach::Any);
        let goes = sources.iter().filter(|(source, _)| shares == Shares::Free || source.contents().is_none());
        goes.map(|(source, _)| source.evict(reason)).sum()
    }

    /// Drops what has no known fetcher. Returns bytes.
    pub fn drop_unproven(&self) -> u64 {
        self.unproven().map_or(0, |source| {
            let bytes = source.cached_bytes();
            self.cache.remove(source.key());
            bytes
        })
    }

    /// Whether anything is here that was fetched for this base and not compared.
    pub fn has_own(&self) -> bool {
        self.lineup().own.cached_bytes() > 0
    }

    /// Nothing of it is cached for this base any more; see [`evict`](Self::evict).
    pub fn remove(&self, shares: Shares) {
        for n in 0..=MOST {
            let key = nth(self.of.own, n);
            match self.cache.find(&key) {
                Some(source) if source.contents().is_none() || shares == Shares::Free => {
                    self.cache.remove(&key);
                }
                Some(_) => {}
                None => break,
            }
        }
        if let (Shares::Free, Some(digest)) = (shares, &self.of.digest) {
            let verified = self.lineup().verified;
            verified.iter().for_each(|source| self.cache.remove(source.key()));
            *self.lineup.write() = None;
            self.cache.remove(digest);
        }
    }

    /// Nothing comes in as long as the result is kept.
    pub fn freeze(&self) -> FrozenContents {
        let open = |source: &Arc<CachedSource>| source.contents().is_none();
        let sources = self.sources(Reach::Any).into_iter().map(|(source, _)| source).filter(open);
        FrozenContents { frozen: sources.map(|source| source.freeze()).collect(), digest: self.of.digest }
    }

    /// What an earlier version verified is believed.
    pub fn believe(&self) {
        if let Some(source) = self.unproven() {
            source.believe();
        }
    }
}

/// Contents into which nothing comes while they are compared.
pub struct FrozenContents {
    frozen: Vec<Frozen>,
    digest: Option<SourceKey>,
}

impl FrozenContents {
    /// All that is here was compared with the digest, and had it. Returns whether that is noted.
    pub fn seal(&self) -> bool {
        let Some(digest) = self.digest else { return false };
        self.frozen.iter().filter(|frozen| frozen.has_blocks()).all(|frozen| frozen.seal(digest))
    }
}
