//! [`BlockCache`]: shards of S3-FIFO over one arena.
//!
//! Policy (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023): a new block enters a
//! *small* FIFO queue of a tenth of the shard. It leaves that queue for the *main* queue if it was used again
//! meanwhile, else it is evicted and only its key is remembered, in the *ghost* list. A block that comes back
//! while its key is there enters the main queue at once. The main queue gives a block one more round for each
//! use. A scan fills the small queue and the ghost list and leaves the main queue alone.
//!
//! What must hold in each shard: every key of the table is in exactly one of the two queues, and owns one
//! slot; slots are either owned, on the free list, or not yet used; an eviction does a bounded number of
//! steps.
//!
//! 64 neighbouring blocks share a shard, so a read of 256 KiB takes one or two locks. Copies happen under the
//! shard's lock: that is what makes pins and reference counts unnecessary.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use hashbrown::{HashMap, HashTable};
use parking_lot::Mutex;
use serde::Serialize;

use super::arena::{self, Region};

/// Bytes of one block of this cache, which is the block of the delta's map too.
pub const BLOCK: usize = 4096;

/// Neighbouring blocks that live in one shard.
const RUN: u64 = 64;
const MAX_SHARDS: usize = 64;
/// Shards are not made smaller than this: runs are spread over shards as a whole, and in shards of a few runs
/// some would be overfull while others are empty.
const MIN_SHARD_BLOCKS: usize = 1024;
const BLOCK_BITS: u32 = 44;
const MAX_BASES: u32 = 1 << (u64::BITS - BLOCK_BITS);
/// Uses counted at most; also the rounds that a block stays in the main queue without being used.
const MAX_USES: u8 = 3;
/// A block used this often (its first use included) is worth the main queue.
const PROMOTE_USES: u8 = 2;
/// The longest search for a victim under the lock; then the next one in line goes, used or not.
const MAX_STEPS: usize = 256;

/// The address space of one base in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheId(u32);

/// Whether a read counts as a use of the blocks it touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// The reader came to this block anew.
    Use,
    /// The reader goes on in a block that it has already used: a sequential reader with reads smaller than a
    /// block, or the second try of the same read.
    Repeat,
}

/// Counters since the start, and memory in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CacheStats {
    /// The bound that was configured.
    pub memory_limit: u64,
    /// Bytes of cached blocks and all bookkeeping; never above the limit, except that bookkeeping has a floor
    /// of a few KiB.
    pub memory_used: u64,
    /// Blocks copied out. A read that was answered in part and tried again counts again.
    pub hits: u64,
    /// Blocks that a reader wanted and that had to be fetched.
    pub misses: u64,
    /// Blocks that came in.
    pub insertions: u64,
    /// Blocks that went out to make room. [`BlockCache::forget`] is not an eviction.
    pub evictions: u64,
}

/// The block LRU in memory. All methods take `&self` and may be called from any thread.
pub struct BlockCache {
    shards: Box<[Mutex<Shard>]>,
    shard_bits: u32,
    limit: u64,
    next_id: AtomicU32,
    misses: AtomicU64,
}

impl BlockCache {
    /// A cache of at most `limit_bytes` bytes, bookkeeping included. A limit too small for a single block
    /// gives a cache that holds nothing, which is slow and right.
    ///
    /// # Errors
    /// When the address space for it cannot be mapped.
    pub fn new(limit_bytes: u64) -> io::Result<Self> {
        let limit = usize::try_from(limit_bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let wanted = (limit / BLOCK / MIN_SHARD_BLOCKS).clamp(1, MAX_SHARDS);
        let shard_bits = wanted.ilog2();
        let count = 1usize << shard_bits;
        let blocks = blocks_in(limit / count);
        let shards =
            arena::regions(count, blocks)?.into_iter().map(|region| Mutex::new(Shard::new(region))).collect();
        Ok(Self {
            shards,
            shard_bits,
            limit: limit_bytes,
            next_id: AtomicU32::new(0),
            misses: AtomicU64::new(0),
        })
    }

    /// A new, empty address space. Ids are never reused; after about a million of them, further ones are
    /// valid and hold nothing.
    pub fn register(&self) -> CacheId {
        let id = self
            .next_id
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |id| (id < MAX_BASES).then_some(id + 1));
        CacheId(id.unwrap_or(MAX_BASES))
    }

    /// Drops every block of `id`. A read of that base that is still under way may insert a few more; they age
    /// out.
    pub fn forget(&self, id: CacheId) {
        for shard in &self.shards {
            shard.lock().forget(id.0);
        }
    }

    /// Copies the leading run of cached blocks into `buf`, whose length is a multiple of [`BLOCK`]. Returns
    /// how many blocks were copied; the rest of `buf` is untouched.
    pub fn read(&self, id: CacheId, first_block: u64, buf: &mut [u8], touch: Touch) -> usize {
        debug_assert!(buf.len().is_multiple_of(BLOCK));
        let blocks = buf.len() / BLOCK;
        let mut done = 0;
        while done < blocks {
            let block = first_block + done as u64;
            let Some(key) = key(id, block) else { break };
            let run = run_from(block, blocks - done);
            let part = &mut buf[done * BLOCK..(done + run) * BLOCK];
            let copied = self.shard(id, block).lock().read(key, part, touch);
            done += copied;
            if copied < run {
                break;
            }
        }
        done
    }

    /// Copies bytes from inside one block: `offset_in_block + buf.len()` is at most [`BLOCK`]. False, and
    /// `buf` untouched, if the block is not cached.
    pub fn read_part(
        &self,
        id: CacheId,
        block: u64,
        offset_in_block: usize,
        buf: &mut [u8],
        touch: Touch,
    ) -> bool {
        debug_assert!(offset_in_block + buf.len() <= BLOCK);
        let Some(key) = key(id, block) else { return false };
        self.shard(id, block).lock().read_part(key, offset_in_block, buf, touch)
    }

    /// Whether the block is cached now. Not a use.
    pub fn contains(&self, id: CacheId, block: u64) -> bool {
        key(id, block).is_some_and(|key| self.shard(id, block).lock().contains(key))
    }

    /// How many blocks from `first_block` on are not cached, up to `max` and to the first one that is. Not a
    /// use.
    pub fn missing_run(&self, id: CacheId, first_block: u64, max: usize) -> usize {
        let mut done = 0;
        while done < max {
            let block = first_block + done as u64;
            let Some(key) = key(id, block) else { return max };
            let run = run_from(block, max - done);
            let shard = self.shard(id, block).lock();
            let missing = (0..run as u64).take_while(|step| !shard.contains(key + step)).count();
            done += missing;
            if missing < run {
                break;
            }
        }
        done
    }

    /// Inserts blocks that a reader asked for: `data`, a multiple of [`BLOCK`] long, holds the blocks from
    /// `first_block` on. Blocks that are present stay as they are. This counts as their first use.
    pub fn insert(&self, id: CacheId, first_block: u64, data: &[u8]) {
        self.insert_used(id, first_block, data, 1);
    }

    /// As [`insert`](Self::insert), for blocks that nobody asked for yet (readahead, prefetch): the first
    /// reader to come is their first use, so that reading ahead of a scan does not make its blocks look used
    /// twice.
    pub fn insert_ahead(&self, id: CacheId, first_block: u64, data: &[u8]) {
        self.insert_used(id, first_block, data, 0);
    }

    fn insert_used(&self, id: CacheId, first_block: u64, data: &[u8], uses: u8) {
        debug_assert!(data.len().is_multiple_of(BLOCK));
        let blocks = data.len() / BLOCK;
        let mut done = 0;
        while done < blocks {
            let block = first_block + done as u64;
            let Some(key) = key(id, block) else { return };
            let run = run_from(block, blocks - done);
            self.shard(id, block).lock().insert(key, &data[done * BLOCK..(done + run) * BLOCK], uses);
            done += run;
        }
    }

    /// Counts blocks that had to be fetched for a reader. The caller counts, because one read may look more
    /// than once.
    pub fn record_misses(&self, blocks: u64) {
        self.misses.fetch_add(blocks, Ordering::Relaxed);
    }

    /// Bytes of this base's blocks that are cached now.
    pub fn cached_bytes(&self, id: CacheId) -> u64 {
        let blocks: u64 = self.shards.iter().map(|shard| shard.lock().blocks_of(id.0)).sum();
        blocks * BLOCK as u64
    }

    /// A view of all shards, each at its own moment.
    pub fn stats(&self) -> CacheStats {
        let mut stats = CacheStats {
            memory_limit: self.limit,
            misses: self.misses.load(Ordering::Relaxed),
            ..CacheStats::default()
        };
        for shard in &self.shards {
            let shard = shard.lock();
            stats.memory_used += (shard.table.len() * BLOCK + bookkeeping(shard.slots.blocks())) as u64;
            stats.hits += shard.hits;
            stats.insertions += shard.insertions;
            stats.evictions += shard.evictions;
        }
        stats
    }

    /// Neighbouring runs go to different shards (within a window of as many runs as there are shards, each
    /// gets one), and windows are shuffled, so that neither a large read nor a stride meets one shard only.
    fn shard(&self, id: CacheId, block: u64) -> &Mutex<Shard> {
        let run = block / RUN;
        let window = run >> self.shard_bits;
        let index = run ^ hash(u64::from(id.0) << BLOCK_BITS | window);
        &self.shards[(index & ((1 << self.shard_bits) - 1)) as usize]
    }

    #[cfg(test)]
    pub(super) fn capacity_blocks(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().slots.blocks()).sum()
    }

    #[cfg(test)]
    pub(super) fn assert_consistent(&self) {
        for shard in &self.shards {
            shard.lock().assert_consistent();
        }
    }
}

/// Blocks from `block` to the end of its run, at most `max`.
fn run_from(block: u64, max: usize) -> usize {
    max.min((RUN - block % RUN) as usize)
}

/// Base and block in one word; the keys of a run are consecutive. None for what is beyond the cache's address
/// space.
fn key(id: CacheId, block: u64) -> Option<u64> {
    (id.0 < MAX_BASES && block >> BLOCK_BITS == 0).then_some(u64::from(id.0) << BLOCK_BITS | block)
}

fn base_of(key: u64) -> u32 {
    (key >> BLOCK_BITS) as u32
}

/// Folded multiplication: two instructions, and every bit of the key reaches both ends of the hash, which
/// `hashbrown` uses separately. Keys are not chosen by an attacker in a way that pays: a shard only gets
/// slower for its own base.
fn hash(key: u64) -> u64 {
    let product = u128::from(key ^ 0x9e37_79b9_7f4a_7c15) * 0xe703_7ed1_a0b4_28db;
    product as u64 ^ (product >> 64) as u64
}

/// The most memory that the bookkeeping of a shard of `blocks` blocks takes. Tables are made for twice their
/// content: then deletions leave no tombstones to speak of, and they never grow.
fn bookkeeping(blocks: usize) -> usize {
    let buckets = (blocks * 2).max(14) * 8 / 7 + 1;
    let buckets = buckets.next_power_of_two();
    let table = buckets * (mem::size_of::<Entry>() + 1) + 64;
    let ghost_table = buckets * (mem::size_of::<u64>() + 1) + 64;
    let queues = 3 * blocks * mem::size_of::<u64>();
    let free = blocks * mem::size_of::<u32>();
    mem::size_of::<Mutex<Shard>>() + table + ghost_table + queues + free
}

/// The most blocks that fit into `bytes` together with their bookkeeping.
fn blocks_in(bytes: usize) -> usize {
    let (mut fits, mut too_many) = (0, (bytes / BLOCK).min(u32::MAX as usize - 1) + 1);
    while too_many - fits > 1 {
        let middle = fits + (too_many - fits) / 2;
        if middle * BLOCK + bookkeeping(middle) <= bytes {
            fits = middle;
        } else {
            too_many = middle;
        }
    }
    fits
}

#[derive(Clone, Copy)]
struct Entry {
    key: u64,
    slot: u32,
    uses: u8,
}

impl Entry {
    fn touch(&mut self, touch: Touch) {
        match touch {
            Touch::Use => self.uses = (self.uses + 1).min(MAX_USES),
            Touch::Repeat => {}
        }
    }
}

struct Shard {
    table: HashTable<Entry>,
    slots: Region,
    small: VecDeque<u64>,
    main: VecDeque<u64>,
    ghost: Ghost,
    /// The small queue gives up blocks when it is longer than this.
    small_target: usize,
    /// Slots from here on were never used.
    fresh: u32,
    free: Vec<u32>,
    /// Blocks held for each base, without zeros.
    held: HashMap<u32, u64>,
    hits: u64,
    insertions: u64,
    evictions: u64,
}

impl Shard {
    fn new(slots: Region) -> Self {
        let blocks = slots.blocks();
        Self {
            table: HashTable::with_capacity(blocks * 2),
            small: VecDeque::with_capacity(blocks),
            main: VecDeque::with_capacity(blocks),
            ghost: Ghost::new(blocks),
            small_target: blocks / 10,
            fresh: 0,
            free: Vec::with_capacity(blocks),
            held: HashMap::new(),
            hits: 0,
            insertions: 0,
            evictions: 0,
            slots,
        }
    }

    fn contains(&self, key: u64) -> bool {
        self.table.find(hash(key), |entry| entry.key == key).is_some()
    }

    fn blocks_of(&self, base: u32) -> u64 {
        self.held.get(&base).copied().unwrap_or(0)
    }

    fn read(&mut self, first: u64, buf: &mut [u8], touch: Touch) -> usize {
        let mut copied = 0;
        for (key, part) in (first..).zip(buf.chunks_exact_mut(BLOCK)) {
            let Some(entry) = self.table.find_mut(hash(key), |entry| entry.key == key) else { break };
            entry.touch(touch);
            part.copy_from_slice(self.slots.block(entry.slot));
            copied += 1;
        }
        self.hits += copied as u64;
        copied
    }

    fn read_part(&mut self, key: u64, offset: usize, buf: &mut [u8], touch: Touch) -> bool {
        let Some(entry) = self.table.find_mut(hash(key), |entry| entry.key == key) else { return false };
        entry.touch(touch);
        buf.copy_from_slice(&self.slots.block(entry.slot)[offset..offset + buf.len()]);
        self.hits += 1;
        true
    }

    fn insert(&mut self, first: u64, data: &[u8], uses: u8) {
        for (key, bytes) in (first..).zip(data.chunks_exact(BLOCK)) {
            if self.contains(key) {
                continue;
            }
            let Some(slot) = self.take_slot() else { return };
            self.slots.block_mut(slot).copy_from_slice(bytes);
            let returns = self.ghost.take(key);
            let uses = if returns { 0 } else { uses };
            self.table.insert_unique(hash(key), Entry { key, slot, uses }, |entry| hash(entry.key));
            if returns { &mut self.main } else { &mut self.small }.push_back(key);
            *self.held.entry(base_of(key)).or_insert(0) += 1;
            self.insertions += 1;
        }
    }

    /// None only in a shard without slots.
    fn take_slot(&mut self) -> Option<u32> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        if (self.fresh as usize) < self.slots.blocks() {
            self.fresh += 1;
            return Some(self.fresh - 1);
        }
        self.evict()
    }

    fn evict(&mut self) -> Option<u32> {
        for step in 1.. {
            let from_small = self.small.len() > self.small_target || self.main.is_empty();
            let queue = if from_small { &mut self.small } else { &mut self.main };
            let key = queue.pop_front()?;
            let Ok(mut found) = self.table.find_entry(hash(key), |entry| entry.key == key) else {
                debug_assert!(false, "a queued key is not in the table");
                continue;
            };
            let entry = found.get_mut();
            if step < MAX_STEPS {
                if from_small && entry.uses >= PROMOTE_USES {
                    entry.uses = 0;
                    self.main.push_back(key);
                    continue;
                }
                if !from_small && entry.uses > 0 {
                    entry.uses -= 1;
                    self.main.push_back(key);
                    continue;
                }
            }
            let slot = entry.slot;
            found.remove();
            if from_small {
                self.ghost.remember(key);
            }
            self.release(base_of(key));
            self.evictions += 1;
            return Some(slot);
        }
        None
    }

    fn release(&mut self, base: u32) {
        if let Some(count) = self.held.get_mut(&base) {
            *count -= 1;
            if *count == 0 {
                self.held.remove(&base);
            }
        }
    }

    fn forget(&mut self, base: u32) {
        if self.held.remove(&base).is_none() {
            return;
        }
        let free = &mut self.free;
        self.table.retain(|entry| {
            let keep = base_of(entry.key) != base;
            if !keep {
                free.push(entry.slot);
            }
            keep
        });
        self.small.retain(|key| base_of(*key) != base);
        self.main.retain(|key| base_of(*key) != base);
    }

    #[cfg(test)]
    fn assert_consistent(&self) {
        let mut queued: Vec<u64> = self.small.iter().chain(&self.main).copied().collect();
        queued.sort_unstable();
        let mut keys: Vec<u64> = self.table.iter().map(|entry| entry.key).collect();
        keys.sort_unstable();
        assert_eq!(queued, keys, "queues and table hold the same keys, once");
        let mut slots: Vec<u32> =
            self.table.iter().map(|entry| entry.slot).chain(self.free.iter().copied()).collect();
        slots.sort_unstable();
        assert_eq!(slots, (0..self.fresh).collect::<Vec<_>>(), "each slot is owned or free, once");
        assert_eq!(self.held.values().sum::<u64>(), keys.len() as u64);
        assert!(
            self.ghost.keys.len() <= self.ghost.order.len() && self.ghost.order.len() <= self.ghost.limit
        );
        let real = self.table.allocation_size()
            + self.ghost.keys.allocation_size()
            + (self.small.capacity() + self.main.capacity() + self.ghost.order.capacity())
                * mem::size_of::<u64>()
            + self.free.capacity() * mem::size_of::<u32>();
        assert!(real <= bookkeeping(self.slots.blocks()), "bookkeeping grew to {real} bytes");
    }
}

/// Keys of blocks that were evicted after one use, the latest `limit` of them.
struct Ghost {
    keys: HashTable<u64>,
    /// Oldest first. A key that came back stays here until its turn; at worst its next stay is cut short.
    order: VecDeque<u64>,
    limit: usize,
}

impl Ghost {
    fn new(limit: usize) -> Self {
        Self { keys: HashTable::with_capacity(limit * 2), order: VecDeque::with_capacity(limit), limit }
    }

    fn take(&mut self, key: u64) -> bool {
        self.keys.find_entry(hash(key), |known| *known == key).is_ok_and(|found| {
            found.remove();
            true
        })
    }

    fn remember(&mut self, key: u64) {
        if self.order.len() >= self.limit
            && let Some(oldest) = self.order.pop_front()
        {
            self.take(oldest);
        }
        self.order.push_back(key);
        let found = self.keys.entry(hash(key), |known| *known == key, |known| hash(*known));
        found.insert(key);
    }
}
