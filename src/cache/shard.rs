//! One shard of the cache: S3-FIFO over the blocks of one region.
//!
//! What must hold: every key of the table is in exactly one of the two queues and owns one slot. A slot is owned, on the
//! free list, or never used. An eviction takes a bounded number of steps. No byte of a block that an earlier worker left
//! is returned before its sum was compared.

use std::collections::VecDeque;
use std::mem;
use std::sync::atomic::Ordering;

use hashbrown::{HashMap, HashTable};
use parking_lot::Mutex;

use super::BLOCK;
use super::arena::{Region, TagWords};
use super::memory::Touch;
use super::tags::{self, Found, Owner, Queue, Tag, mix};

/// Base (above) and block (the low [`tags::BLOCK_BITS`] bits) in one word.
pub(super) type Key = u64;

/// The most uses that are counted; also the rounds that an unused block stays in the main queue.
const MAX_USES: u8 = 3;
/// The uses, the first included, after which a block moves to the main queue.
const PROMOTE_USES: u8 = 2;
/// The most steps of a search for a victim under the lock. After that the next block goes, used or not.
const MAX_STEPS: usize = 256;
/// The blocks of a memory file that are allocated at a time.
const ALLOCATE: usize = 64;

pub(super) fn base_of(key: Key) -> u32 {
    (key >> tags::BLOCK_BITS) as u32
}

pub(super) fn block_of(key: Key) -> u64 {
    key & ((1 << tags::BLOCK_BITS) - 1)
}

/// The most memory that the bookkeeping of a shard of `blocks` blocks takes. Tables have twice the capacity of their
/// content, so that deletions leave few tombstones and the tables never grow.
pub(super) fn bookkeeping(blocks: usize, in_file: bool) -> usize {
    let buckets = (blocks * 2).max(14) * 8 / 7 + 1;
    let buckets = buckets.next_power_of_two();
    let table = buckets * (mem::size_of::<Entry>() + 1) + 64;
    let ghost_table = buckets * (mem::size_of::<u64>() + 1) + 64;
    let queues = 3 * blocks * mem::size_of::<u64>();
    let free = blocks * mem::size_of::<u32>();
    let tags = if in_file { blocks * mem::size_of::<TagWords>() } else { 0 };
    mem::size_of::<Mutex<Shard>>() + table + ghost_table + queues + free + tags
}

/// Whether the bytes of an entry can be trusted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Bytes {
    /// This process wrote them, or compared their sum.
    Sound,
    /// An earlier worker wrote them; the sum was not compared yet.
    Adopted,
    /// The sum was wrong: the block counts as missing until its bytes are inserted again.
    Rejected,
}

#[derive(Clone, Copy)]
struct Entry {
    key: Key,
    slot: u32,
    uses: u8,
    bytes: Bytes,
}

impl Entry {
    fn touch(&mut self, touch: Touch) {
        match touch {
            Touch::Use => self.uses = (self.uses + 1).min(MAX_USES),
            Touch::Repeat => {}
        }
    }
}

/// What an insert knows besides the bytes.
#[derive(Clone, Copy)]
pub(super) struct Origin<'a> {
    /// The uses that the insert counts as.
    pub(super) uses: u8,
    /// The owner of the blocks, and a sum for each; `None` when they do not outlive this process.
    pub(super) lasting: Option<(Owner, &'a [u64])>,
}

/// Whether the contents of the region may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Contents {
    /// No: they belong to another worker, which may be alive.
    Foreign,
    /// They belong to this worker, but it has not read the tags of an earlier worker yet.
    Inherited,
    /// The table has all blocks.
    Known,
}

#[derive(Clone, Copy, Default)]
pub(super) struct Counters {
    pub(super) hits: u64,
    pub(super) insertions: u64,
    pub(super) evictions: u64,
    pub(super) adopted: u64,
    pub(super) rejected: u64,
}

pub(super) struct Shard {
    /// The number of the shard.
    index: usize,
    contents: Contents,
    table: HashTable<Entry>,
    slots: Region,
    small: VecDeque<Key>,
    main: VecDeque<Key>,
    ghost: Ghost,
    /// The length of the small queue above which blocks are evicted from it.
    small_target: usize,
    /// Slots from here on were never used.
    fresh: u32,
    /// Slots below this number have memory; at most `capacity`.
    allocated: usize,
    /// Slots that may be used. Fewer than the region has after the kernel refused more memory.
    capacity: usize,
    free: Vec<u32>,
    /// The number of blocks of each base, without rejected ones. No entry is zero.
    held: HashMap<u32, u64>,
    counters: Counters,
}

impl Shard {
    pub(super) fn new(index: usize, slots: Region) -> Self {
        let blocks = slots.blocks();
        let in_file = slots.mapping().header().is_some();
        Self {
            index,
            contents: if in_file { Contents::Foreign } else { Contents::Known },
            table: HashTable::with_capacity(blocks * 2),
            small: VecDeque::with_capacity(blocks),
            main: VecDeque::with_capacity(blocks),
            ghost: Ghost::new(blocks),
            small_target: blocks / 10,
            fresh: 0,
            allocated: if in_file { 0 } else { blocks },
            capacity: if in_file { 0 } else { blocks },
            free: Vec::with_capacity(blocks),
            held: HashMap::new(),
            counters: Counters::default(),
            slots,
        }
    }

    pub(super) fn contents(&self) -> Contents {
        self.contents
    }

    pub(super) fn counters(&self) -> Counters {
        self.counters
    }

    /// Bytes of cached blocks and of all bookkeeping.
    pub(super) fn memory_used(&self) -> usize {
        let in_file = self.slots.mapping().header().is_some();
        self.table.len() * BLOCK + bookkeeping(self.slots.blocks(), in_file)
    }

    /// From now on the contents belong to this worker.
    pub(super) fn inherit(&mut self) {
        if self.contents == Contents::Foreign {
            self.contents = Contents::Inherited;
            self.capacity = self.slots.blocks();
        }
    }

    /// Takes over the blocks of an earlier worker. `key_of` returns the key of the block that a tag names; `None` if the
    /// block does not belong into this shard.
    pub(super) fn adopt(&mut self, mut key_of: impl FnMut(&Tag) -> Option<Key>) {
        self.contents = Contents::Known;
        let Some(header) = self.slots.mapping().header() else { return };
        let mark = tags::mark(header, self.index).load(Ordering::Relaxed);
        let mark = usize::try_from(mark).unwrap_or(usize::MAX);
        if mark > self.slots.blocks() {
            self.counters.rejected += 1;
            return;
        }
        // They have memory already, unless the mark was overwritten.
        if self.slots.allocate_tags(0, mark).is_err() {
            return;
        }
        (self.fresh, self.allocated) = (mark as u32, mark);
        for slot in 0..self.fresh {
            let Some(words) = self.slots.tag(slot) else { return };
            let found = tags::read(words);
            let key = match found {
                Found::Tag(tag) => key_of(&tag).map(|key| (key, tag.queue)),
                Found::Empty | Found::Invalid => None,
            };
            match key {
                // A second copy is no fault: a base that was attached again had its blocks inserted again.
                Some((key, queue)) if !self.contains_entry(key) => {
                    let entry = Entry { key, slot, uses: 0, bytes: Bytes::Adopted };
                    self.table.insert_unique(mix(key), entry, |entry| mix(entry.key));
                    match queue {
                        Queue::Small => self.small.push_back(key),
                        Queue::Main => self.main.push_back(key),
                    }
                    *self.held.entry(base_of(key)).or_insert(0) += 1;
                    self.counters.adopted += 1;
                }
                other => {
                    tags::clear(words);
                    self.free.push(slot);
                    if other.is_none() && found != Found::Empty {
                        self.counters.rejected += 1;
                    }
                }
            }
        }
    }

    fn contains_entry(&self, key: Key) -> bool {
        self.table.find(mix(key), |entry| entry.key == key).is_some()
    }

    pub(super) fn contains(&self, key: Key) -> bool {
        let found = self.table.find(mix(key), |entry| entry.key == key);
        found.is_some_and(|entry| entry.bytes != Bytes::Rejected)
    }

    pub(super) fn blocks_of(&self, base: u32) -> u64 {
        self.held.get(&base).copied().unwrap_or(0)
    }

    /// Adds the numbers of a base's blocks, without rejected ones, in no order. Looks at the names of all blocks.
    pub(super) fn add_blocks_of(&self, base: u32, to: &mut Vec<u64>) {
        let count = self.blocks_of(base);
        if count == 0 {
            return;
        }
        to.reserve(count as usize);
        let queued = self.small.iter().chain(&self.main).copied().filter(|key| base_of(*key) == base);
        // A rejected block stays in its queue.
        to.extend(queued.filter(|key| self.counters.rejected == 0 || self.contains(*key)).map(block_of));
    }

    /// The slot of a block that is present and sound. Counts the use according to `touch`.
    fn find(&mut self, key: Key, touch: Touch) -> Option<u32> {
        let entry = self.table.find_mut(mix(key), |entry| entry.key == key)?;
        match entry.bytes {
            Bytes::Sound => {}
            Bytes::Adopted => {
                if !is_sound(&self.slots, entry) {
                    entry.bytes = Bytes::Rejected;
                    if let Some(words) = self.slots.tag(entry.slot) {
                        tags::clear(words);
                    }
                    self.counters.rejected += 1;
                    self.release(base_of(key));
                    return None;
                }
                entry.bytes = Bytes::Sound;
            }
            Bytes::Rejected => return None,
        }
        entry.touch(touch);
        Some(entry.slot)
    }

    pub(super) fn read(&mut self, first: Key, buf: &mut [u8], touch: Touch) -> usize {
        let mut copied = 0;
        for (key, part) in (first..).zip(buf.chunks_exact_mut(BLOCK)) {
            let Some(slot) = self.find(key, touch) else { break };
            part.copy_from_slice(self.slots.block(slot));
            copied += 1;
        }
        self.counters.hits += copied as u64;
        copied
    }

    pub(super) fn read_part(&mut self, key: Key, offset: usize, buf: &mut [u8], touch: Touch) -> bool {
        let Some(slot) = self.find(key, touch) else { return false };
        buf.copy_from_slice(&self.slots.block(slot)[offset..offset + buf.len()]);
        self.counters.hits += 1;
        true
    }

    pub(super) fn insert(&mut self, first: Key, data: &[u8], origin: Origin<'_>) {
        for (index, bytes) in data.chunks_exact(BLOCK).enumerate() {
            let key = first + index as u64;
            let lasting = origin.lasting.map(|(owner, sums)| (owner, sums[index]));
            if let Some(entry) = self.table.find_mut(mix(key), |entry| entry.key == key) {
                let before = mem::replace(&mut entry.bytes, Bytes::Sound);
                if before == Bytes::Sound {
                    continue;
                }
                // These bytes come from the source. The bytes in the slot are wrong, or not compared yet.
                let slot = entry.slot;
                if before == Bytes::Rejected {
                    *self.held.entry(base_of(key)).or_insert(0) += 1;
                }
                self.fill(slot, bytes, key, lasting, Queue::Small);
                continue;
            }
            let Some(slot) = self.take_slot() else { return };
            let returns = self.ghost.take(key);
            let (queue, uses) = if returns { (Queue::Main, 0) } else { (Queue::Small, origin.uses) };
            self.fill(slot, bytes, key, lasting, queue);
            let entry = Entry { key, slot, uses, bytes: Bytes::Sound };
            self.table.insert_unique(mix(key), entry, |entry| mix(entry.key));
            match queue {
                Queue::Small => self.small.push_back(key),
                Queue::Main => self.main.push_back(key),
            }
            *self.held.entry(base_of(key)).or_insert(0) += 1;
            self.counters.insertions += 1;
        }
    }

    /// Writes bytes and tag of a slot, in the order that leaves no half-written block after a kill (D18).
    fn fill(&mut self, slot: u32, bytes: &[u8], key: Key, lasting: Option<(Owner, u64)>, queue: Queue) {
        if let Some(words) = self.slots.tag(slot) {
            tags::clear(words);
        }
        self.slots.block_mut(slot).copy_from_slice(bytes);
        if let (Some(words), Some((owner, sum))) = (self.slots.tag(slot), lasting) {
            tags::write(words, Tag { owner, block: block_of(key), queue, sum });
        }
    }

    /// A slot for a new block; `None` only in a shard without slots.
    fn take_slot(&mut self) -> Option<u32> {
        if let Some(slot) = self.free.pop() {
            return Some(slot);
        }
        if (self.fresh as usize) == self.allocated {
            self.allocate();
        }
        if (self.fresh as usize) < self.allocated {
            self.fresh += 1;
            return Some(self.fresh - 1);
        }
        self.evict()
    }

    /// Allocates memory for the next slots of a memory file. When the kernel has none, the shard keeps its size. Without
    /// the allocation, an access would raise a signal where memory is accounted strictly.
    fn allocate(&mut self) {
        let count = ALLOCATE.min(self.capacity.saturating_sub(self.allocated));
        if count == 0 {
            return;
        }
        if self.slots.allocate(self.fresh, count).is_err() {
            self.capacity = self.allocated;
            return;
        }
        self.allocated += count;
        if let Some(header) = self.slots.mapping().header() {
            tags::mark(header, self.index).store(self.allocated as u64, Ordering::Relaxed);
        }
    }

    fn evict(&mut self) -> Option<u32> {
        for step in 1.. {
            let from_small = self.small.len() > self.small_target || self.main.is_empty();
            let queue = if from_small { &mut self.small } else { &mut self.main };
            let key = queue.pop_front()?;
            let Ok(mut found) = self.table.find_entry(mix(key), |entry| entry.key == key) else {
                debug_assert!(false, "a queued key is not in the table");
                continue;
            };
            let entry = found.get_mut();
            if step < MAX_STEPS {
                if from_small && entry.uses >= PROMOTE_USES {
                    entry.uses = 0;
                    self.main.push_back(key);
                    if let Some(words) = self.slots.tag(entry.slot) {
                        tags::note_main(words);
                    }
                    continue;
                }
                if !from_small && entry.uses > 0 {
                    entry.uses -= 1;
                    self.main.push_back(key);
                    continue;
                }
            }
            let (slot, bytes) = (entry.slot, entry.bytes);
            found.remove();
            if from_small {
                self.ghost.remember(key);
            }
            if bytes != Bytes::Rejected {
                self.release(base_of(key));
            }
            self.counters.evictions += 1;
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

    /// Drops the blocks of a base. Their tags stay until the slots are used again: they are still right, so that a worker
    /// that ends normally leaves its cache to the next one.
    pub(super) fn forget(&mut self, base: u32) {
        if self.held.remove(&base).is_none() {
            // Rejected entries may be left; they are evicted in time.
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
}

/// Whether an adopted block matches its tag, and the tag still names the block of the entry.
fn is_sound(slots: &Region, entry: &Entry) -> bool {
    match slots.tag(entry.slot).map(tags::read) {
        Some(Found::Tag(tag)) => {
            tag.block == block_of(entry.key)
                && tag.sum == tags::sum(tag.owner, tag.block, slots.block(entry.slot))
        }
        Some(Found::Empty | Found::Invalid) | None => false,
    }
}

#[cfg(test)]
impl Shard {
    pub(super) fn capacity_blocks(&self) -> usize {
        self.slots.blocks()
    }

    pub(super) fn assert_consistent(&self) {
        let mut queued: Vec<u64> = self.small.iter().chain(&self.main).copied().collect();
        queued.sort_unstable();
        let mut keys: Vec<u64> = self.table.iter().map(|entry| entry.key).collect();
        keys.sort_unstable();
        assert_eq!(queued, keys, "queues and table hold the same keys, once");
        let mut slots: Vec<u32> =
            self.table.iter().map(|entry| entry.slot).chain(self.free.iter().copied()).collect();
        slots.sort_unstable();
        assert_eq!(slots, (0..self.fresh).collect::<Vec<_>>(), "each slot is owned or free, once");
        assert!(self.fresh as usize <= self.allocated && self.allocated <= self.capacity);
        let held = self.table.iter().filter(|entry| entry.bytes != Bytes::Rejected).count();
        assert_eq!(self.held.values().sum::<u64>(), held as u64);
        assert!(
            self.ghost.keys.len() <= self.ghost.order.len() && self.ghost.order.len() <= self.ghost.limit
        );
        let real = self.table.allocation_size()
            + self.ghost.keys.allocation_size()
            + (self.small.capacity() + self.main.capacity() + self.ghost.order.capacity())
                * mem::size_of::<u64>()
            + self.free.capacity() * mem::size_of::<u32>();
        assert!(real <= bookkeeping(self.slots.blocks(), false), "bookkeeping grew to {real} bytes");
    }
}

/// The keys of the last `limit` blocks that were evicted after one use.
struct Ghost {
    keys: HashTable<Key>,
    /// Oldest first. A key that came back stays in the queue until its turn; at worst that shortens its next stay.
    order: VecDeque<Key>,
    limit: usize,
}

impl Ghost {
    fn new(limit: usize) -> Self {
        Self { keys: HashTable::with_capacity(limit * 2), order: VecDeque::with_capacity(limit), limit }
    }

    fn take(&mut self, key: Key) -> bool {
        self.keys.find_entry(mix(key), |known| *known == key).is_ok_and(|found| {
            found.remove();
            true
        })
    }

    fn remember(&mut self, key: Key) {
        if self.order.len() >= self.limit
            && let Some(oldest) = self.order.pop_front()
        {
            self.take(oldest);
        }
        self.order.push_back(key);
        let found = self.keys.entry(mix(key), |known| *known == key, |known| mix(*known));
        found.insert(key);
    }
}
