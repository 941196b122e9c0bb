//! Room for new blocks: the bounds, and eviction when a bound is reached.
//!
//! The order of eviction is that of 2Q in coarse steps. Blocks that were not used again since their insertion are
//! *cold*, the others *hot*; of both, the oldest generation goes first. Cold blocks go while they are more than a
//! quarter of the evictable blocks, or while they are older than all hot blocks. So a scan replaces its own blocks and
//! spares blocks that are used again and again. Otherwise hot blocks go, so that a block that was hot once does not stay
//! for ever.
//!
//! What must hold: an eviction that finds no block gives up, and so does one that frees no space on the filesystem
//! (some filesystems free space late). Batches are large, so that the search costs little per block.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::index::Class;
use super::source::CachedSource;
use super::{CACHE_BLOCK, DiskCache, EvictReason, MIB, Shared};

/// The most that one eviction evicts beyond the need.
const BATCH: u64 = 64 * MIB;
/// A batch is at most this fraction of the cached bytes.
const BATCH_PART: u64 = 64;
/// Cold blocks go while they are more than this fraction.
const COLD_PART: u64 = 4;
/// Chunks that are searched under one hold of an index's lock.
const CHUNKS_PER_LOCK: usize = 1024;
/// How often room is made again after other inserts took it.
const ROUNDS: usize = 4;

/// Why there is no room, with the remedy. The subject is the cache.
const FULL: &str = "it is full, and no block may be evicted; raise --cache-disk, or unpin a base";
const TOO_SMALL: &str = "it is too small for what is fetched; raise --cache-disk";
const BELOW_FLOOR: &str = "its filesystem has no free space beyond the space that must stay free; make room there, or \
                           lower [cache] disk_free";
const MOST_SOURCES: &str = "the bound on the number of sources is reached, and all of them are pinned; raise [cache] \
                            disk_bases, or unpin a base";

/// Bytes that count as used but belong to no block yet: reserved before a block is written (D34).
pub(super) struct Room<'a> {
    shared: &'a Shared,
    pub bytes: u64,
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.shared.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl Shared {
    fn take(&self, bytes: u64) -> Option<Room<'_>> {
        let taken = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(bytes).filter(|now| *now <= self.limit)
        });
        // Not `then_some`: that would build a `Room` in either case, and its drop would give back bytes that were not
        // taken.
        taken.is_ok().then(|| Room { shared: self, bytes })
    }

    /// By how many bytes free space falls below the floor when `more` bytes are written.
    pub(super) fn below_floor(&self, more: u64) -> u64 {
        match self.medium.space() {
            Ok(space) => (self.free_floor.saturating_add(more)).saturating_sub(space.available),
            // Unknown: the write itself fails when there is no space.
            Err(_) => 0,
        }
    }
}

impl DiskCache {
    /// Whether a source without files may get some, within the bound on sources. May evict the least recently used
    /// source.
    pub(super) fn admit(&self, source: &CachedSource) -> bool {
        let Some(most) = self.shared.bases else { return true };
        if source.has_files() {
            return true;
        }
        let _sweep = self.shared.sweep.lock();
        loop {
            let sources = self.sources();
            let with_files = sources.iter().filter(|s| s.has_files());
            if with_files.clone().count() < most {
                return true;
            }
            if !self.shared.indexed.load(Ordering::Acquire) {
                // The least recently used source is not known yet.
                return false;
            }
            let unpinned = with_files.filter(|s| !s.is_pinned());
            match unpinned.min_by_key(|s| s.used_at.load(Ordering::Relaxed)) {
                Some(oldest) if most > 0 => {
                    oldest.reset(EvictReason::Bases);
                    if oldest.has_files() {
                        return false;
                    }
                }
                _ => {
                    self.shared.degrade(MOST_SOURCES);
                    return false;
                }
            }
        }
    }

    /// Room for `bytes` more. `None`: there is none, and the status says why.
    pub(super) fn room_for(&self, bytes: u64) -> Option<Room<'_>> {
        let shared = &*self.shared;
        if bytes > shared.limit {
            // The configured bound is smaller than one insert. That is no failure.
            return None;
        }
        let indexed = shared.indexed.load(Ordering::Acquire);
        for _ in 0..ROUNDS {
            let Some(room) = shared.take(bytes) else {
                if !indexed {
                    return None;
                }
                let used = shared.used.load(Ordering::Relaxed);
                let need = (used + bytes).saturating_sub(shared.limit);
                if self.make_room(need, EvictReason::Space) == 0
                    && shared.used.load(Ordering::Relaxed) >= used
                {
                    shared.degrade(FULL);
                    return None;
                }
                continue;
            };
            let missing = shared.below_floor(bytes);
            if missing == 0 {
                return Some(room);
            }
            drop(room);
            if !indexed {
                return None;
            }
            if self.make_room(missing, EvictReason::Floor) == 0 || shared.below_floor(bytes) >= missing {
                break;
            }
        }
        shared.degrade(BELOW_FLOOR);
        None
    }

    /// The bound that leaves no room for `bytes` more as long as nothing is evicted. Asks the filesystem.
    pub fn shortage(&self, bytes: u64) -> Option<String> {
        let used = self.shared.used.load(Ordering::Relaxed);
        // A higher bound on bytes would not help below the floor.
        let why = match self.shared.below_floor(bytes) {
            0 if used.saturating_add(bytes) <= self.shared.limit => return None,
            0 => TOO_SMALL,
            _ => BELOW_FLOOR,
        };
        Some(why.to_owned())
    }

    /// Enforces the bounds after other programs wrote to the filesystem, and after a bound was lowered.
    pub(super) fn keep_bounds(&self) {
        let shared = &*self.shared;
        if !shared.indexed.load(Ordering::Acquire) {
            return;
        }
        let over = shared.used.load(Ordering::Relaxed).saturating_sub(shared.limit);
        if over > 0 {
            self.make_room(over, EvictReason::Space);
        }
        let missing = shared.below_floor(0);
        if missing > 0 {
            self.make_room(missing, EvictReason::Floor);
        }
    }

    /// Evicts at least `need` bytes if so many are evictable. Returns the bytes evicted.
    fn make_room(&self, need: u64, reason: EvictReason) -> u64 {
        let _sweep = self.shared.sweep.lock();
        let sources: Vec<Arc<CachedSource>> =
            self.sources().into_iter().filter(|s| s.has_files() && !s.is_pinned()).collect();
        let mut classes: BTreeMap<Class, u64> = BTreeMap::new();
        for source in &sources {
            for (class, blocks) in source.index.lock().classes() {
                *classes.entry(class).or_default() += blocks;
            }
        }
        let batch = (self.shared.used.load(Ordering::Relaxed) / BATCH_PART).min(BATCH) / CACHE_BLOCK;
        let mut victims = choose(classes, need.div_ceil(CACHE_BLOCK).max(batch));
        let mut gone = 0;
        for source in &sources {
            if victims.is_empty() {
                break;
            }
            gone += source.evict_some(&mut victims, reason);
        }
        gone
    }
}

/// Chooses `need` blocks to evict: how many of which class.
fn choose(mut classes: BTreeMap<Class, u64>, need: u64) -> BTreeMap<Class, u64> {
    let mut victims = BTreeMap::new();
    let mut left: u64 = classes.values().sum();
    let mut cold: u64 = classes.iter().filter(|(class, _)| !class.hot).map(|(_, blocks)| blocks).sum();
    let mut need = need.min(left);
    while need > 0 {
        let Some(oldest) = classes.keys().next().copied() else { break };
        // A cold block that is older than all hot blocks goes in any case.
        let hot_turn = oldest.hot && cold * COLD_PART <= left;
        let class = classes.keys().find(|class| class.hot == hot_turn).copied().unwrap_or(oldest);
        let blocks = classes.remove(&class).unwrap_or(0);
        // At most until the other kind has its turn.
        let turn = match (class.hot, hot_turn) {
            (false, false) if class != oldest => (cold - left / COLD_PART).max(1),
            _ => blocks,
        };
        let take = blocks.min(need).min(turn);
        *victims.entry(class).or_default() += take;
        if take < blocks {
            classes.insert(class, blocks - take);
        }
        need -= take;
        left -= take;
        if !class.hot {
            cold -= take;
        }
    }
    victims
}

impl CachedSource {
    /// Evicts the given number of blocks of each class, and subtracts them. Returns the bytes evicted.
    fn evict_some(&self, victims: &mut BTreeMap<Class, u64>, reason: EvictReason) -> u64 {
        let (mut from, mut blocks, mut bytes) = (Some(0), 0, 0);
        while let Some(chunk) = from.filter(|_| !victims.is_empty()) {
            let (files, chosen, next) = {
                let index = self.index.lock();
                let Some(files) = index.files.clone() else { break };
                let (chosen, next) =
                    index.select(chunk, CHUNKS_PER_LOCK, |class| match victims.get_mut(&class) {
                        Some(1) => victims.remove(&class).is_some(),
                        Some(left) => {
                            *left -= 1;
                            true
                        }
                        None => false,
                    });
                (files, chosen, next)
            };
            from = next;
            if !chosen.is_empty() {
                let chosen: Vec<_> = chosen.into_iter().map(|(block, class)| (block, Some(class))).collect();
                // Blocks of files that cannot be opened stay.
                let Some(opened) = self.open(&files) else { break };
                let mut writer = self.writer.lock();
                if !self.index.lock().files.as_ref().is_some_and(|now| Arc::ptr_eq(now, &files)) {
                    break;
                }
                let gone = self.drop_blocks(&mut writer, &opened, &chosen);
                (blocks, bytes) = (blocks + gone.0, bytes + gone.1);
            }
        }
        self.shared.report_evicted(&self.reported_as(), blocks, bytes, reason);
        bytes
    }
}
