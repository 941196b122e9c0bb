//! [`BlockCache`]: shards of S3-FIFO over one arena.
//!
//! Policy (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023): a new block enters a
//! *small* FIFO queue of a tenth of the shard. It leaves that queue for the *main* queue if it was used again
//! meanwhile, else it is evicted and only its key is remembered, in the *ghost* list. A block that comes back
//! while its key is there enters the main queue at once. The main queue gives a block one more round for each
//! use. A scan fills the small queue and the ghost list and leaves the main queue alone.
//!
//! 64 neighbouring blocks share a shard, so a read of 256 KiB takes one or two locks. Copies happen under the
//! shard's lock: that is what makes pins and reference counts unnecessary.
//!
//! A cache in a memory file outlives its worker. The next worker reads the tags of a shard at the first use of the shard,
//! and compares a block with its sum at the first use of the block. So the time of a take-over does not grow with the
//! cache.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use hashbrown::HashMap;
use parking_lot::{Mutex, MutexGuard};
use serde::Serialize;

use super::BLOCK;
use super::arena::{self, Mapping};
use super::shard::{Contents, Key, Origin, Shard, bookkeeping};
use super::tags::{self, BLOCK_BITS, MAX_SHARDS, Owner, Shape, Tag, mix};

/// The number of adjacent blocks that share a shard.
const RUN: u64 = 64;
/// The smallest shard. Runs are distributed over the shards as a whole, so shards of only a few runs would fill
/// unevenly.
const MIN_SHARD_BLOCKS: usize = 1024;
const MAX_BASES: u32 = 1 << (u64::BITS - BLOCK_BITS);
/// The address space of one base in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CacheId {
    id: u32,
    /// Selects the shard, together with the block. Every worker has the same salt for the same owner.
    salt: u64,
    /// `None` when the blocks do not outlive this process.
    owner: Option<Owner>,
}

/// Whether a read counts as a use of the blocks it touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// The reader begins to read this block.
    Use,
    /// The reader continues in a block that it has used: a sequential reader whose reads are smaller than a block, or
    /// another attempt of the same read.
    Repeat,
}

/// Counters since the start, and memory in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CacheStats {
    /// The configured limit.
    pub memory_limit: u64,
    /// Bytes of cached blocks and of all bookkeeping. Never above the limit, except that bookkeeping takes at least a few
    /// KiB.
    pub memory_used: u64,
    /// Blocks that were copied out. A read that was answered in part and tried again counts again.
    pub hits: u64,
    /// Blocks that had to be fetched for a reader.
    pub misses: u64,
    /// Blocks that were inserted.
    pub insertions: u64,
    /// Blocks that were evicted to make room. [`BlockCache::forget`] is no eviction.
    pub evictions: u64,
    /// Blocks of an earlier worker that were taken over.
    pub adopted_blocks: u64,
    /// Blocks of an earlier worker that were not taken over, or were dropped at their first use, because they were not
    /// sound.
    pub adopted_rejected: u64,
}

/// The result of taking over a memory file.
#[derive(Debug)]
pub enum Adoption {
    /// The file was empty.
    Empty,
    /// The blocks are taken over. Each is checked at its first use.
    Kept,
    /// The contents had another layout or size, and were dropped.
    Dropped,
    /// The file cannot be used; the cache holds nothing.
    Unusable(io::Error),
}

/// The memory cache. All methods take `&self`, and any thread may call them.
pub struct BlockCache {
    shards: Box<[Mutex<Shard>]>,
    mapping: Arc<Mapping>,
    shape: Shape,
    /// Ids of the bases that are attached, or whose blocks an earlier worker left.
    owners: Mutex<HashMap<Owner, u32>>,
    shard_bits: u32,
    limit: u64,
    next_id: AtomicU32,
    misses: AtomicU64,
}

impl BlockCache {
    /// A cache of at most `limit_bytes` bytes, bookkeeping included, in the memory of this process. With a limit that is
    /// too small for one block it holds nothing, which is correct but slow.
    ///
    /// # Errors
    /// When the address space for it cannot be mapped.
    pub fn new(limit_bytes: u64) -> io::Result<Self> {
        Self::build(limit_bytes, None)
    }

    /// A file for [`prepare`](Self::prepare). A process that outlives the workers must keep it open. The file is in
    /// memory, has no name, grows as needed, and is closed on exec.
    ///
    /// # Errors
    /// What memfd_create(2) reports.
    pub fn memory_file() -> io::Result<OwnedFd> {
        arena::memory_file()
    }

    /// As [`new`](Self::new), over a [`memory_file`](Self::memory_file). Until [`adopt`](Self::adopt) it is empty, takes no
    /// blocks, and does not access the contents, because another worker may be using them.
    ///
    /// # Errors
    /// When the file cannot be made large enough, or cannot be mapped.
    pub fn prepare(file: OwnedFd, limit_bytes: u64) -> io::Result<Self> {
        Self::build(limit_bytes, Some(file))
    }

    fn build(limit_bytes: u64, file: Option<OwnedFd>) -> io::Result<Self> {
        let limit = usize::try_from(limit_bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let wanted = (limit / BLOCK / MIN_SHARD_BLOCKS).clamp(1, MAX_SHARDS);
        let shard_bits = wanted.ilog2();
        let shards = 1usize << shard_bits;
        let blocks = blocks_in(limit / shards, file.is_some());
        let (mapping, regions) = arena::regions(shards, blocks, file)?;
        let regions = regions.into_iter().enumerate();
        Ok(Self {
            shards: regions.map(|(index, region)| Mutex::new(Shard::new(index, region))).collect(),
            mapping,
            shape: Shape { shards, blocks },
            owners: Mutex::new(HashMap::new()),
            shard_bits,
            limit: limit_bytes,
            next_id: AtomicU32::new(0),
            misses: AtomicU64::new(0),
        })
    }

    /// Takes the memory file over. To be called once, when no other worker uses it any more. The time does not depend on
    /// the size, because each shard reads its tags at its first use.
    pub fn adopt(&self) -> Adoption {
        let Some(header) = self.mapping.header() else { return Adoption::Empty };
        // An access to memory that the kernel cannot allocate raises a signal. An explicit allocation returns an error.
        if let Err(error) = self.mapping.allocate_header() {
            return Adoption::Unusable(error);
        }
        let adoption = if self.shape.is_in(header) {
            Adoption::Kept
        } else {
            let blank = Shape::is_blank(header);
            if let Err(error) = self.start_over() {
                return Adoption::Unusable(error);
            }
            if blank { Adoption::Empty } else { Adoption::Dropped }
        };
        self.inherit();
        adoption
    }

    /// As [`adopt`](Self::adopt), but drops all contents: for a worker whose predecessors died for an unknown reason.
    pub fn adopt_nothing(&self) -> Adoption {
        if self.mapping.header().is_some()
            && let Err(error) = self.start_over()
        {
            return Adoption::Unusable(error);
        }
        self.inherit();
        Adoption::Dropped
    }

    /// Empties the file and writes its header.
    fn start_over(&self) -> io::Result<()> {
        self.mapping.clear()?;
        self.mapping.allocate_header()?;
        if let Some(header) = self.mapping.header() {
            self.shape.write(header);
        }
        Ok(())
    }

    fn inherit(&self) {
        for shard in &self.shards {
            shard.lock().inherit();
        }
    }

    /// A new, empty address space. Its blocks do not outlive this process. Ids are never reused; after about a million,
    /// further ids are valid but hold no blocks.
    pub fn register(&self) -> CacheId {
        let id = self.next_id();
        CacheId { id, salt: u64::from(id) << BLOCK_BITS, owner: None }
    }

    /// The address space of a base. In a memory file, its blocks outlive this process, and it starts with the blocks that
    /// an earlier worker left. The caller must ensure that the source has the identity in `owner`.
    pub fn register_as(&self, owner: Owner) -> CacheId {
        CacheId { id: self.id_of(owner), salt: owner.salt(), owner: Some(owner) }
    }

    fn id_of(&self, owner: Owner) -> u32 {
        *self.owners.lock().entry(owner).or_insert_with(|| self.next_id())
    }

    fn next_id(&self) -> u32 {
        let next = |id| (id < MAX_BASES).then_some(id + 1);
        self.next_id.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).unwrap_or(MAX_BASES)
    }

    /// Drops every block of `id`. A read of that base that is still under way may insert a few more, which are evicted
    /// in time.
    pub fn forget(&self, id: CacheId) {
        if let Some(owner) = id.owner {
            let mut owners = self.owners.lock();
            // The next registration of this owner starts empty.
            if owners.get(&owner) == Some(&id.id) {
                owners.remove(&owner);
            }
        }
        for index in 0..self.shards.len() {
            self.lock(index).forget(id.id);
        }
    }

    /// Copies cached blocks into `buf`, up to the first missing one. The length of `buf` is a multiple of [`BLOCK`].
    /// Returns the number of blocks copied; the rest of `buf` is unchanged.
    pub fn read(&self, id: CacheId, first_block: u64, buf: &mut [u8], touch: Touch) -> usize {
        debug_assert!(buf.len().is_multiple_of(BLOCK));
        let blocks = buf.len() / BLOCK;
        let mut done = 0;
        while done < blocks {
            let block = first_block + done as u64;
            let Some(key) = key(id, block) else { break };
            let run = run_from(block, blocks - done);
            let part = &mut buf[done * BLOCK..(done + run) * BLOCK];
            let copied = self.shard(id, block).read(key, part, touch);
            done += copied;
            if copied < run {
                break;
            }
        }
        done
    }

    /// Copies bytes from one block: `offset_in_block + buf.len()` is at most [`BLOCK`]. When the block is not cached,
    /// returns false and leaves `buf` unchanged.
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
        self.shard(id, block).read_part(key, offset_in_block, buf, touch)
    }

    /// Whether the block is cached now. Does not count as a use.
    pub fn contains(&self, id: CacheId, block: u64) -> bool {
        key(id, block).is_some_and(|key| self.shard(id, block).contains(key))
    }

    /// The number of consecutive missing blocks from `first_block` on, at most `max`. Does not count as a use.
    pub fn missing_run(&self, id: CacheId, first_block: u64, max: usize) -> usize {
        let mut done = 0;
        while done < max {
            let block = first_block + done as u64;
            let Some(key) = key(id, block) else { return max };
            let run = run_from(block, max - done);
            let shard = self.shard(id, block);
            let missing = (0..run as u64).take_while(|step| !shard.contains(key + step)).count();
            done += missing;
            if missing < run {
                break;
            }
        }
        done
    }

    /// Inserts blocks for a reader: `data` has the blocks from `first_block` on, and its length is a multiple of
    /// [`BLOCK`]. Present blocks stay as they are. The insert counts as the first use.
    pub fn insert(&self, id: CacheId, first_block: u64, data: &[u8]) {
        self.insert_used(id, first_block, data, 1);
    }

    /// As [`insert`](Self::insert), for readahead and prefetch. The first read counts as the first use, so that a scan
    /// with readahead does not use its blocks twice.
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
            let part = &data[done * BLOCK..(done + run) * BLOCK];
            let mut sums = [0; RUN as usize];
            // Before the lock, because it takes about as long as the copy.
            let lasting = self.mapping.header().and(id.owner).map(|owner| {
                for ((sum, bytes), block) in sums.iter_mut().zip(part.chunks_exact(BLOCK)).zip(block..) {
                    *sum = tags::sum(owner, block, bytes);
                }
                (owner, &sums[..run])
            });
            self.shard(id, block).insert(key, part, Origin { uses, lasting });
            done += run;
        }
    }

    /// Counts blocks that had to be fetched for a reader. The caller counts them, because one read may look a block up
    /// more than once.
    pub fn record_misses(&self, blocks: u64) {
        self.misses.fetch_add(blocks, Ordering::Relaxed);
    }

    /// Bytes of this base's cached blocks.
    pub fn cached_bytes(&self, id: CacheId) -> u64 {
        let blocks: u64 = (0..self.shards.len()).map(|index| self.lock(index).blocks_of(id.id)).sum();
        blocks * BLOCK as u64
    }

    /// Calls `each` for each cached block of a base, in no order. A block that comes or goes meanwhile may be missing. The
    /// time is that of a look at the name of every block of the cache; one shard is locked at a time.
    pub fn each_block(&self, id: CacheId, mut each: impl FnMut(u64)) {
        let mut blocks = Vec::new();
        for index in 0..self.shards.len() {
            self.lock(index).add_blocks_of(id.id, &mut blocks);
            blocks.drain(..).for_each(&mut each);
        }
    }

    /// The sum over all shards, each read at its own moment.
    pub fn stats(&self) -> CacheStats {
        let mut stats = CacheStats {
            memory_limit: self.limit,
            misses: self.misses.load(Ordering::Relaxed),
            ..CacheStats::default()
        };
        for index in 0..self.shards.len() {
            let shard = self.lock(index);
            let counters = shard.counters();
            stats.memory_used += shard.memory_used() as u64;
            stats.hits += counters.hits;
            stats.insertions += counters.insertions;
            stats.evictions += counters.evictions;
            stats.adopted_blocks += counters.adopted;
            stats.adopted_rejected += counters.rejected;
        }
        stats
    }

    /// Locks the shard of a block. Adjacent runs go to different shards: in a window of as many runs as there are shards,
    /// each shard gets one. The order differs between windows. So neither a large read nor a stride hits only one shard.
    fn shard(&self, id: CacheId, block: u64) -> MutexGuard<'_, Shard> {
        self.lock(self.index(id.salt, block))
    }

    fn index(&self, salt: u64, block: u64) -> usize {
        let run = block / RUN;
        let window = run >> self.shard_bits;
        let index = run ^ mix(salt ^ window);
        (index & ((1 << self.shard_bits) - 1)) as usize
    }

    fn lock(&self, index: usize) -> MutexGuard<'_, Shard> {
        let mut shard = self.shards[index].lock();
        if shard.contents() == Contents::Inherited {
            self.adopt_shard(index, &mut shard);
        }
        shard
    }

    #[cold]
    fn adopt_shard(&self, index: usize, shard: &mut Shard) {
        shard.adopt(|tag: &Tag| {
            let id = CacheId { id: self.id_of(tag.owner), salt: tag.owner.salt(), owner: Some(tag.owner) };
            key(id, tag.block).filter(|_| self.index(id.salt, tag.block) == index)
        });
    }

    #[cfg(test)]
    pub(super) fn capacity_blocks(&self) -> usize {
        self.shards.iter().map(|shard| shard.lock().capacity_blocks()).sum()
    }

    #[cfg(test)]
    pub(super) fn assert_consistent(&self) {
        for index in 0..self.shards.len() {
            self.lock(index).assert_consistent();
        }
    }
}

/// Blocks from `block` to the end of its run, at most `max`.
fn run_from(block: u64, max: usize) -> usize {
    max.min((RUN - block % RUN) as usize)
}

/// Base and block in one word; the keys of a run are consecutive. `None` for a block that a key cannot express.
fn key(id: CacheId, block: u64) -> Option<Key> {
    (id.id < MAX_BASES && block >> BLOCK_BITS == 0).then_some(u64::from(id.id) << BLOCK_BITS | block)
}

/// The most blocks that fit into `bytes` together with their bookkeeping.
fn blocks_in(bytes: usize, in_file: bool) -> usize {
    let (mut fits, mut too_many) = (0, (bytes / BLOCK).min(u32::MAX as usize - 1) + 1);
    while too_many - fits > 1 {
        let middle = fits + (too_many - fits) / 2;
        if middle * BLOCK + bookkeeping(middle, in_file) <= bytes {
            fits = middle;
        } else {
            too_many = middle;
        }
    }
    fits
}
