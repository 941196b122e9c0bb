//! The header and the tags in a memory file, with which the next worker takes the blocks over.
//!
//! The worker that wrote them may have died in the middle of a write, or because of a stray write. So nothing is trusted:
//! the header names its layout and has a checksum (sum). A tag names its block and has a sum of the block's bytes *and*
//! of that name, which is compared when the block is first used. A tag is cleared before its block is overwritten, and
//! gets its sum after the bytes are written. So the next worker ignores a block that was being written (D18).
//!
//! | word of the header | holds |
//! | --- | --- |
//! | 0 | "plyfsLRU" |
//! | 1 | version of this layout |
//! | 2, 3 | shards, blocks of each |
//! | 4 | sum of the words above |
//! | 16 + shard | how many of the shard's blocks have memory; the blocks from there on were never used |
//!
//! | word of a tag | holds |
//! | --- | --- |
//! | 0 | number of the base |
//! | 1 | its generation |
//! | 2 | bits 0-43: block; 44-62: check of the name; 63: block is in the main queue (a hint) |
//! | 3 | sum of the name and of the bytes; 0: the tag is empty |

use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};

use twox_hash::XxHash3_64;

use super::arena::{HEADER_WORDS, TagWords};

/// Bits of a block's index in a tag.
pub(super) const BLOCK_BITS: u32 = 44;

const MAGIC: u64 = u64::from_le_bytes(*b"plyfsLRU");
/// Must be raised with any change of the meaning of words, blocks or sums.
const VERSION: u64 = 1;
const HEAD: usize = 4;
const MARKS: usize = 16;
/// The number of shards that have a word in the header.
pub(super) const MAX_SHARDS: usize = 64;
const _: () = assert!(MARKS + MAX_SHARDS <= HEADER_WORDS);

const CHECK_BITS: u32 = 63 - BLOCK_BITS;
const MAIN: u64 = 1 << 63;

/// The owner of blocks: the base, and the identity of its source when they were read. A block's sum covers both, so blocks
/// of a replaced source are never taken for blocks of the new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    number: u64,
    generation: u64,
}

impl Owner {
    /// The owner for base `number` while its source has this identity. No other base ever has that number.
    pub fn new(number: u64, identity: &[u8]) -> Self {
        Self { number, generation: XxHash3_64::oneshot(identity) }
    }

    /// A hash of the owner.
    pub(super) fn salt(self) -> u64 {
        mix(mix(self.number) ^ self.generation)
    }

    fn name(self, block: u64) -> u64 {
        mix(self.salt() ^ block)
    }
}

/// Folded multiplication: two instructions, and every bit of the key reaches both ends of the hash, which `hashbrown` uses
/// separately. An attacker gains nothing by choosing keys: collisions slow down only the blocks of the attacker's own base.
pub(super) fn mix(key: u64) -> u64 {
    let product = u128::from(key ^ 0x9e37_79b9_7f4a_7c15) * 0xe703_7ed1_a0b4_28db;
    product as u64 ^ (product >> 64) as u64
}

/// The sum of one block of one owner; never 0.
pub(super) fn sum(owner: Owner, block: u64, bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot_with_seed(owner.name(block), bytes).max(1)
}

/// The queue that a block is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Queue {
    Small,
    Main,
}

/// The contents of a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tag {
    pub(super) owner: Owner,
    pub(super) block: u64,
    pub(super) queue: Queue,
    pub(super) sum: u64,
}

/// The result of reading a tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Empty,
    /// Words that no worker writes.
    Invalid,
    Tag(Tag),
}

pub(super) fn read(words: &TagWords) -> Found {
    let [number, generation, place, sum] = words.each_ref().map(|word| word.load(Ordering::Relaxed));
    if sum == 0 {
        return Found::Empty;
    }
    let owner = Owner { number, generation };
    let block = place & ((1 << BLOCK_BITS) - 1);
    if (place & !MAIN) >> BLOCK_BITS != check(owner, block) {
        return Found::Invalid;
    }
    let queue = if place & MAIN == 0 { Queue::Small } else { Queue::Main };
    Found::Tag(Tag { owner, block, queue, sum })
}

/// Clears a tag. To be called before the block is overwritten.
pub(super) fn clear(words: &TagWords) {
    words[3].store(0, Ordering::Relaxed);
    // A killed process leaves its stores in the order of its instructions. Only the compiler could change that order.
    compiler_fence(Ordering::SeqCst);
}

/// Writes a tag. To be called after the block was written; the tag must be cleared before.
pub(super) fn write(words: &TagWords, tag: Tag) {
    compiler_fence(Ordering::SeqCst);
    words[0].store(tag.owner.number, Ordering::Relaxed);
    words[1].store(tag.owner.generation, Ordering::Relaxed);
    let main = if tag.queue == Queue::Main { MAIN } else { 0 };
    let place = tag.block | check(tag.owner, tag.block) << BLOCK_BITS | main;
    words[2].store(place, Ordering::Relaxed);
    compiler_fence(Ordering::SeqCst);
    words[3].store(tag.sum, Ordering::Relaxed);
}

/// Notes that the block moved to the main queue. No sum covers the bit: a wrong bit costs at most a miss.
pub(super) fn note_main(words: &TagWords) {
    words[2].fetch_or(MAIN, Ordering::Relaxed);
}

/// The check bits of a tag, which detect most overwritten words without a look at the block.
fn check(owner: Owner, block: u64) -> u64 {
    owner.name(block) >> (64 - CHECK_BITS)
}

/// The dimensions of a cache, which its header must name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) shards: usize,
    pub(super) blocks: usize,
}

impl Shape {
    fn words(self) -> [u64; HEAD + 1] {
        let head = [MAGIC, VERSION, self.shards as u64, self.blocks as u64];
        let sum = head.iter().fold(0, |sum, word| mix(sum ^ word));
        [head[0], head[1], head[2], head[3], sum]
    }

    /// Whether the header names this shape and layout.
    pub(super) fn is_in(self, header: &[AtomicU64; HEADER_WORDS]) -> bool {
        self.words().iter().zip(header).all(|(word, found)| found.load(Ordering::Relaxed) == *word)
    }

    /// Whether the file was never written to.
    pub(super) fn is_blank(header: &[AtomicU64; HEADER_WORDS]) -> bool {
        header[..=HEAD].iter().all(|word| word.load(Ordering::Relaxed) == 0)
    }

    /// Writes the header of a file that is all zeros.
    pub(super) fn write(self, header: &[AtomicU64; HEADER_WORDS]) {
        for (word, place) in self.words().iter().zip(header) {
            place.store(*word, Ordering::Relaxed);
        }
    }
}

/// The word with the number of a shard's blocks that have memory.
pub(super) fn mark(header: &[AtomicU64; HEADER_WORDS], shard: usize) -> &AtomicU64 {
    &header[MARKS + shard]
}
