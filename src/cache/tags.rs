//! What lies beside the blocks in a memory file, so that the next worker can take them over.
//!
//! The worker that wrote it may have died in the middle of anything, or because it wrote where it should not. So
//! nothing here is believed: the header names its layout and has a sum; a tag names the block it belongs to and holds
//! a sum of the block's bytes *and* of that name, which is compared when the block is first used. A tag is emptied
//! before its block is overwritten and gets its sum after the bytes are there, so a block that was being written is
//! not even looked at (D18).
//!
//! | word of the header | holds |
//! | --- | --- |
//! | 0 | "plyfsLRU" |
//! | 1 | version of this layout |
//! | 2, 3 | shards, blocks of each |
//! | 4 | sum of the words above |
//! | 16 + shard | how many of the shard's blocks are real memory; those from there on were never used |
//!
//! | word of a tag | holds |
//! | --- | --- |
//! | 0 | number of the base |
//! | 1 | its generation |
//! | 2 | bits 0-43: block; 44-62: check of the name; 63: block is in the main queue (a hint) |
//! | 3 | sum of the name and of the bytes; 0: nothing is here |

use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};

use twox_hash::XxHash3_64;

use super::arena::{HEADER_WORDS, TagWords};

/// Bits of a block's index that can be expressed.
pub(super) const BLOCK_BITS: u32 = 44;

const MAGIC: u64 = u64::from_le_bytes(*b"plyfsLRU");
/// To be raised with any change of what the words or the blocks mean, the sums included.
const VERSION: u64 = 1;
const HEAD: usize = 4;
const MARKS: usize = 16;
/// As many shards as have a word in the header.
pub(super) const MAX_SHARDS: usize = 64;
const _: () = assert!(MARKS + MAX_SHARDS <= HEADER_WORDS);

const CHECK_BITS: u32 = 63 - BLOCK_BITS;
const MAIN: u64 = 1 << 63;

/// Whose blocks: the base, and the state of its source that they were read in. Both are part of what a block's sum
/// covers, so blocks of a source that was replaced are never taken for those of the new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Owner {
    number: u64,
    generation: u64,
}

impl Owner {
    /// Of base `number`, which is never used for another base, while its source has this identity.
    pub fn new(number: u64, identity: &[u8]) -> Self {
        Self { number, generation: XxHash3_64::oneshot(identity) }
    }

    /// Differs between owners, in all bits.
    pub(super) fn salt(self) -> u64 {
        mix(mix(self.number) ^ self.generation)
    }

    fn name(self, block: u64) -> u64 {
        mix(self.salt() ^ block)
    }
}

/// Folded multiplication: two instructions, and every bit of the key reaches both ends of the hash, which
/// `hashbrown` uses separately. Keys are not chosen by an attacker in a way that pays: a shard only gets
/// slower for its own base.
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

/// What a tag says of its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tag {
    pub(super) owner: Owner,
    pub(super) block: u64,
    pub(super) queue: Queue,
    pub(super) sum: u64,
}

/// What was found where a tag may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Nothing,
    /// Words that no worker leaves.
    Nonsense,
    Tag(Tag),
}

pub(super) fn read(words: &TagWords) -> Found {
    let [number, generation, place, sum] = words.each_ref().map(|word| word.load(Ordering::Relaxed));
    if sum == 0 {
        return Found::Nothing;
    }
    let owner = Owner { number, generation };
    let block = place & ((1 << BLOCK_BITS) - 1);
    if (place & !MAIN) >> BLOCK_BITS != check(owner, block) {
        return Found::Nonsense;
    }
    let queue = if place & MAIN == 0 { Queue::Small } else { Queue::Main };
    Found::Tag(Tag { owner, block, queue, sum })
}

/// To be called before the block is overwritten.
pub(super) fn clear(words: &TagWords) {
    words[3].store(0, Ordering::Relaxed);
    // A killed process leaves its stores in the order of its instructions; only the compiler could change it.
    compiler_fence(Ordering::SeqCst);
}

/// To be called after the block was written and its tag cleared.
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

/// Notes that the block moved to the main queue. Not covered by any sum: wrong, it costs a miss later.
pub(super) fn note_main(words: &TagWords) {
    words[2].fetch_or(MAIN, Ordering::Relaxed);
}

/// Tells most words that were overwritten from a tag, without looking at the block.
fn check(owner: Owner, block: u64) -> u64 {
    owner.name(block) >> (64 - CHECK_BITS)
}

/// What the header has to say for a cache of this shape.
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

    /// Whether the header is of this shape and layout.
    pub(super) fn is_in(self, header: &[AtomicU64; HEADER_WORDS]) -> bool {
        self.words().iter().zip(header).all(|(word, found)| found.load(Ordering::Relaxed) == *word)
    }

    /// Whether nobody ever wrote to the file.
    pub(super) fn is_blank(header: &[AtomicU64; HEADER_WORDS]) -> bool {
        header[..=HEAD].iter().all(|word| word.load(Ordering::Relaxed) == 0)
    }

    /// Describes a file that is all zeros.
    pub(super) fn write(self, header: &[AtomicU64; HEADER_WORDS]) {
        for (word, place) in self.words().iter().zip(header) {
            place.store(*word, Ordering::Relaxed);
        }
    }
}

/// How many blocks of a shard are real memory.
pub(super) fn mark(header: &[AtomicU64; HEADER_WORDS], shard: usize) -> &AtomicU64 {
    &header[MARKS + shard]
}
