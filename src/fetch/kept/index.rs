//! Which blocks of one source are here, and when each was used last; in memory only.
//!
//! A *chunk* is 64 blocks (1 MiB of the source) and has a slot in the sums file. Only chunks of which something is
//! here take memory: 120 bytes, and the tree around them, so 1 TiB that is cached wholly takes 120 MiB and a source that
//! is not cached takes none, whatever its size.
//!
//! Use is counted in *generations*: a number that grows each time a sixty-fourth of the cache's bytes came in or were
//! used again. Of each block one byte is kept: the generation of its last use above a base that is the source's own,
//! and whether it was used again in a later generation than it came (*hot*), which is what a scan does not do.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::SourceKey;
use super::open::Files;
use crate::format::cache::{Ages, SLOT_BLOCKS};

/// Ticks after which a hidden block is tried again, at most.
const LONGEST_HIDDEN: u64 = 64;

/// In the age of a block: used again after it came.
pub(super) const HOT: u8 = 0x80;
const SPAN: u64 = 127;

const CHUNK: usize = SLOT_BLOCKS as usize;

#[derive(Debug, Clone)]
pub(super) struct Chunk {
    pub slot: u32,
    /// A bit for each block.
    pub present: u64,
    pub ages: [u8; CHUNK],
    /// The ages are not those of the file.
    aged: bool,
}

/// Blocks whose sums lie beside each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub slot: u32,
    /// The first block's place in its chunk.
    pub at: u64,
    pub blocks: u64,
}

/// What sort of block, for eviction: those of one class are as good as each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Class {
    pub generation: u64,
    pub hot: bool,
}

#[derive(Default)]
pub(super) struct Index {
    /// None as long as nothing was cached of this source.
    pub files: Option<Arc<Files>>,
    /// What all that is here was compared with.
    pub contents: Option<SourceKey>,
    /// Blocks that could not be read, with their sums on disk still, and when they are tried again.
    hidden: BTreeMap<u64, Hidden>,
    chunks: BTreeMap<u32, Chunk>,
    /// Blocks that are here.
    blocks: u64,
    known: Known,
    /// Of a file with slots in any order: those that may be taken.
    any_order: Option<Slots>,
    /// What has to be read as a whole could not be.
    pub unreadable: bool,
    /// Bytes that it counts with while not all is known.
    estimate: u64,
    /// What came meanwhile: first block and blocks.
    young: Vec<(u64, u64)>,
    /// Slots that a power cut tore, which have sums of no block.
    torn: Vec<u32>,
    /// What came since it was taken last, for a sync: first block and blocks.
    unsynced: Vec<(u64, u64)>,
    base: u64,
    counts: Counts,
}

#[derive(Default)]
struct Slots {
    free: Vec<u32>,
    next: u32,
}

/// What is known of the file that an earlier worker left.
#[derive(Default)]
enum Known {
    /// All of it.
    #[default]
    All,
    /// Its chunks below a number, and some others.
    Below(u32, BTreeSet<u32>),
    /// Nothing, and it has to be read as a whole.
    Nothing,
}

#[derive(Debug, Clone, Copy)]
struct Hidden {
    class: Class,
    due: u64,
    wait: u64,
    /// It is here again, and was not read since.
    shown: bool,
}

struct Counts([u64; 256]);

impl Default for Counts {
    fn default() -> Self {
        Self([0; 256])
    }
}

fn split(block: u64) -> (u32, u64) {
    ((block / SLOT_BLOCKS) as u32, block % SLOT_BLOCKS)
}

/// Bits of `blocks` blocks from place `at` of a chunk.
pub(super) fn mask(at: u64, blocks: u64) -> u64 {
    let ones = if blocks >= SLOT_BLOCKS { u64::MAX } else { (1 << blocks) - 1 };
    ones << at
}

impl Index {
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    pub fn contains(&self, block: u64) -> bool {
        let (chunk, at) = split(block);
        self.chunks.get(&chunk).is_some_and(|c| c.present & (1 << at) != 0)
    }

    /// How many of the `max` blocks from `first` are here, or are not, without a gap.
    pub fn run(&self, first: u64, max: u64, present: bool) -> u64 {
        let mut done = 0;
        while done < max {
            let (chunk, at) = split(first + done);
            let Some(bits) = self.chunks.get(&chunk).map(|c| c.present) else {
                if present {
                    break;
                }
                // As far as the next chunk with anything in it.
                let next = self
                    .chunks
                    .range(chunk..)
                    .next()
                    .map_or(u64::MAX, |(no, _)| u64::from(*no) * SLOT_BLOCKS);
                done = next.saturating_sub(first).min(max);
                continue;
            };
            let bits = if present { bits } else { !bits };
            let here = u64::from((!(bits >> at)).trailing_zeros()).min(SLOT_BLOCKS - at);
            done += here;
            if here < SLOT_BLOCKS - at {
                break;
            }
        }
        done.min(max)
    }

    /// The first block at or after `from` that is here.
    pub fn next_present(&self, from: u64) -> Option<u64> {
        let (first, at) = split(from);
        self.chunks.range(first..).find_map(|(no, chunk)| {
            let bits = if *no == first { chunk.present & (u64::MAX << at) } else { chunk.present };
            (bits != 0).then(|| u64::from(*no) * SLOT_BLOCKS + u64::from(bits.trailing_zeros()))
        })
    }

    /// Where the sums of blocks that are here lie.
    pub fn pieces(&self, first: u64, blocks: u64) -> Vec<Piece> {
        let mut out = Vec::with_capacity((blocks / SLOT_BLOCKS + 2) as usize);
        let mut block = first;
        while block < first + blocks {
            let (chunk, at) = split(block);
            let count = (SLOT_BLOCKS - at).min(first + blocks - block);
            if let Some(chunk) = self.chunks.get(&chunk) {
                out.push(Piece { slot: chunk.slot, at, blocks: count });
            }
            block += count;
        }
        out
    }

    /// The slot of a block's chunk, if it has one.
    pub fn slot(&self, block: u64) -> Option<u32> {
        self.chunks.get(&split(block).0).map(|c| c.slot)
    }

    /// The slot for a chunk that has none: its own place, unless the file has them in any order. It is lost to the others
    /// until it is published or given back.
    pub fn take_slot(&mut self, block: u64) -> u32 {
        let Some(slots) = &mut self.any_order else { return split(block).0 };
        slots.free.pop().unwrap_or_else(|| {
            slots.next += 1;
            slots.next - 1
        })
    }

    pub fn give_slot_back(&mut self, slot: u32) {
        if let Some(slots) = &mut self.any_order {
            slots.free.push(slot);
        }
    }

    /// A slot of the file that may be used for any chunk.
    pub fn found_free(&mut self, slot: u32) {
        self.skip_slots(slot + 1);
        self.give_slot_back(slot);
    }

    /// Slots that could not be read, and are left alone.
    pub fn skip_slots(&mut self, below: u32) {
        if let Some(slots) = &mut self.any_order {
            slots.next = slots.next.max(below);
        }
    }

    /// An empty one for a file with slots in any order.
    pub fn of_any_order() -> Self {
        Self { any_order: Some(Slots::default()), ..Self::default() }
    }

    /// Of a file that was not read yet, and counts with so many bytes.
    pub fn unread(files: Arc<Files>, in_place: bool, estimate: u64) -> Self {
        let known = if in_place { Known::Below(0, BTreeSet::new()) } else { Known::Nothing };
        let any_order = (!in_place).then(Slots::default);
        Self { files: Some(files), known, any_order, estimate, ..Self::default() }
    }

    /// What was read of the file as a whole.
    pub fn adopt(&mut self, found: Self) {
        let (files, contents) = (self.files.take(), self.contents);
        let (known, estimate) = (std::mem::take(&mut self.known), self.estimate);
        let unsynced = self.take_unsynced();
        *self = Self { files, contents, known, estimate, unsynced, ..found };
    }

    /// Each slot lies at its chunk's place from now on.
    pub fn in_place(&mut self) {
        self.any_order = None;
        for (no, chunk) in &mut self.chunks {
            chunk.slot = *no;
        }
    }

    /// The chunks and their slots.
    pub fn slots(&self) -> Vec<(u32, u32)> {
        self.chunks.iter().map(|(no, chunk)| (*no, chunk.slot)).collect()
    }

    /// Whether the file has to be read as a whole first.
    pub fn knows_nothing(&self) -> bool {
        matches!(self.known, Known::Nothing)
    }

    pub fn is_unknown(&self, chunk: u32) -> bool {
        match &self.known {
            Known::All => false,
            Known::Below(below, others) => chunk >= *below && !others.contains(&chunk),
            Known::Nothing => true,
        }
    }

    pub fn note_known(&mut self, chunk: u32) {
        if let Known::Below(_, others) = &mut self.known {
            others.insert(chunk);
        }
    }

    /// The first chunks of a range that are not known, `most` in a row.
    pub fn unknown(&self, first: u64, blocks: u64, most: u64) -> Option<(u32, u64)> {
        if matches!(self.known, Known::All) || blocks == 0 {
            return None;
        }
        let last = split(first + blocks - 1).0;
        let from = (split(first).0..=last).find(|chunk| self.is_unknown(*chunk))?;
        let count = (from..=last).take(most as usize).take_while(|chunk| self.is_unknown(*chunk)).count();
        Some((from, count as u64))
    }

    /// From which chunk on the file is to be read; `Some(None)`: as a whole. `None`: it was.
    pub fn scan_from(&self) -> Option<Option<u32>> {
        match &self.known {
            Known::All => None,
            Known::Below(below, _) => Some(Some(*below)),
            Known::Nothing => Some(None),
        }
    }

    /// All chunks below a number are known.
    pub fn scanned_to(&mut self, below: u32) {
        if let Known::Below(now, others) = &mut self.known {
            *now = below;
            *others = others.split_off(&below);
        }
    }

    /// All is known. Returns the bytes that it counted with.
    pub fn know_all(&mut self) -> u64 {
        self.known = Known::All;
        std::mem::take(&mut self.estimate)
    }

    /// The bytes that it counts with, when not all is known.
    pub fn estimate(&self) -> Option<u64> {
        (!matches!(self.known, Known::All)).then_some(self.estimate)
    }

    /// Bytes came in.
    pub fn charge(&mut self, bytes: u64) {
        if !matches!(self.known, Known::All) {
            self.estimate += bytes;
        }
    }

    /// Bytes went; how many it counts less with.
    pub fn discharge(&mut self, bytes: u64) -> u64 {
        if matches!(self.known, Known::All) {
            return bytes;
        }
        let less = bytes.min(self.estimate);
        self.estimate -= less;
        less
    }

    /// What came before the generations of all others were known is as young as that.
    pub fn renew_young(&mut self, generation: u64) {
        for (first, blocks) in std::mem::take(&mut self.young) {
            let age = self.age(generation);
            for block in first..first + blocks {
                let (no, at) = split(block);
                let Some(chunk) = self.chunks.get_mut(&no).filter(|c| c.present & (1 << at) != 0) else {
                    continue;
                };
                let was = chunk.ages[at as usize];
                chunk.ages[at as usize] = age;
                self.counts.0[usize::from(was)] -= 1;
                self.counts.0[usize::from(age)] += 1;
                chunk.aged = true;
            }
        }
    }

    /// What an earlier worker left of a chunk; false when the chunk is there already.
    pub fn found(&mut self, chunk: u32, slot: u32, present: u64, ages: Option<Ages>) -> bool {
        if self.chunks.contains_key(&chunk) {
            return false;
        }
        self.skip_slots(slot + 1);
        let base = self.base;
        self.chunks.insert(chunk, Chunk { slot, present: 0, ages: [0; CHUNK], aged: false });
        for at in (0..SLOT_BLOCKS).filter(|at| present & (1 << at) != 0) {
            let (generation, hot) = ages.map_or((base, 0), |a| {
                let age = a.ages[at as usize];
                (a.base + u64::from(age & !HOT), age & HOT)
            });
            self.add(chunk, at, generation, hot);
        }
        true
    }

    /// The highest generation of any block.
    pub fn newest(&self) -> u64 {
        (0..=SPAN).rev().find(|age| self.count(*age) > 0).map_or(0, |age| self.base + age)
    }

    fn count(&self, age: u64) -> u64 {
        self.counts.0[age as usize] + self.counts.0[age as usize | usize::from(HOT)]
    }

    /// The age byte of a generation; moves the base when it is too far away.
    fn age(&mut self, generation: u64) -> u8 {
        if self.blocks == 0 {
            self.base = generation.saturating_sub(SPAN / 2);
        } else if generation > self.base + SPAN {
            let base = generation - SPAN / 2;
            let less = (base - self.base).min(SPAN) as u8;
            self.counts = Counts::default();
            for chunk in self.chunks.values_mut() {
                for at in (0..CHUNK).filter(|at| chunk.present & (1 << at) != 0) {
                    let age = chunk.ages[at];
                    chunk.ages[at] = (age & HOT) | (age & !HOT).saturating_sub(less);
                    self.counts.0[usize::from(chunk.ages[at])] += 1;
                }
                chunk.aged = true;
            }
            self.base = base;
        }
        generation.saturating_sub(self.base).min(SPAN) as u8
    }

    fn add(&mut self, chunk: u32, at: u64, generation: u64, hot: u8) {
        let age = self.age(generation) | hot;
        let Some(chunk) = self.chunks.get_mut(&chunk) else { return };
        debug_assert!(chunk.present & (1 << at) == 0);
        chunk.present |= 1 << at;
        chunk.ages[at as usize] = age;
        self.counts.0[usize::from(age)] += 1;
        self.blocks += 1;
    }

    /// Blocks of one chunk are here from now on, with their sums in `slot`.
    pub fn publish(&mut self, first: u64, blocks: u64, slot: u32, generation: u64) {
        if !matches!(self.known, Known::All) {
            self.young.push((first, blocks));
        }
        match self.unsynced.last_mut() {
            Some((before, count)) if *before + *count == first => *count += blocks,
            _ => self.unsynced.push((first, blocks)),
        }
        let (no, at) = split(first);
        self.chunks.entry(no).or_insert(Chunk { slot, present: 0, ages: [0; CHUNK], aged: true }).aged = true;
        for at in at..at + blocks {
            self.hidden.remove(&(u64::from(no) * SLOT_BLOCKS + at));
            self.add(no, at, generation, 0);
        }
    }

    /// The ages that blocks which come now will have, for a slot that is written before they are published.
    pub fn ages_of_new(&mut self, first: u64, blocks: u64, generation: u64) -> Ages {
        let age = self.age(generation);
        let mut ages = [0; CHUNK];
        let (_, at) = split(first);
        ages[at as usize..(at + blocks) as usize].fill(age);
        Ages { base: self.base, ages }
    }

    /// Notes a use of blocks that are here; how many of them were not used in this generation before.
    pub fn touch(&mut self, first: u64, blocks: u64, generation: u64) -> u64 {
        let age = self.age(generation);
        let (mut moved, mut block) = (0, first);
        while block < first + blocks {
            let (no, at) = split(block);
            let count = (SLOT_BLOCKS - at).min(first + blocks - block);
            if let Some(chunk) = self.chunks.get_mut(&no) {
                for at in (at..at + count).filter(|at| chunk.present & (1 << at) != 0) {
                    let was = chunk.ages[at as usize];
                    if was & !HOT < age {
                        chunk.ages[at as usize] = age | HOT;
                        self.counts.0[usize::from(was)] -= 1;
                        self.counts.0[usize::from(age | HOT)] += 1;
                        chunk.aged = true;
                        moved += 1;
                    }
                }
            }
            block += count;
        }
        moved
    }

    /// A block is not here any more; where its sum is.
    pub fn clear(&mut self, block: u64) -> Option<u32> {
        let (no, _) = split(block);
        let (slot, empty) = self.take_out(block)?;
        // The sums of hidden blocks are in it.
        let first = u64::from(no) * SLOT_BLOCKS;
        if empty && self.hidden.range(first..first + SLOT_BLOCKS).all(|(_, hidden)| hidden.shown) {
            self.chunks.remove(&no);
            self.give_slot_back(slot);
        }
        Some(slot)
    }

    /// A block that is here is not, for a while; its sum stays. Whether it was here.
    pub fn hide(&mut self, block: u64, now: u64) -> bool {
        let Some(class) = self.class_of(block) else { return false };
        self.take_out(block);
        let wait = self.hidden.get(&block).map_or(1, |before| (before.wait * 2).min(LONGEST_HIDDEN));
        self.hidden.insert(block, Hidden { class, due: now + wait, wait, shown: false });
        true
    }

    /// Whether blocks are hidden.
    pub fn hides(&self) -> bool {
        self.hidden.values().any(|hidden| !hidden.shown)
    }

    /// Hidden blocks that may be tried again.
    pub fn due(&self, now: u64) -> Vec<u64> {
        let due = self.hidden.iter().filter(|(_, hidden)| !hidden.shown && hidden.due <= now);
        due.map(|(block, _)| *block).collect()
    }

    /// A hidden block is here again.
    pub fn show(&mut self, block: u64) {
        let Some(hidden) = self.hidden.get_mut(&block) else { return };
        hidden.shown = true;
        let class = hidden.class;
        let (no, at) = split(block);
        self.add(no, at, class.generation, if class.hot { HOT } else { 0 });
    }

    /// Whether ages are to be written.
    pub fn is_aged(&self) -> bool {
        self.chunks.values().any(|chunk| chunk.aged)
    }

    /// A block that is here is not any more, with its slot kept; whether its chunk is empty now.
    fn take_out(&mut self, block: u64) -> Option<(u32, bool)> {
        let (no, at) = split(block);
        let chunk = self.chunks.get_mut(&no)?;
        if chunk.present & (1 << at) == 0 {
            return None;
        }
        chunk.present &= !(1 << at);
        self.counts.0[usize::from(chunk.ages[at as usize])] -= 1;
        self.blocks -= 1;
        Some((chunk.slot, chunk.present == 0))
    }

    /// Nothing is here any more; how many blocks there were.
    pub fn clear_all(&mut self) -> u64 {
        let blocks = self.blocks;
        *self = Self { files: self.files.take(), ..Self::default() };
        blocks
    }

    /// How many blocks there are of each class.
    pub fn classes(&self) -> impl Iterator<Item = (Class, u64)> + '_ {
        let counts = self.counts.0.iter().enumerate().filter(|(_, count)| **count > 0);
        counts.map(|(age, count)| (self.class(age as u8), *count))
    }

    fn class(&self, age: u8) -> Class {
        Class { generation: self.base + u64::from(age & !HOT), hot: age & HOT != 0 }
    }

    /// The class of a block that is here.
    pub fn class_of(&self, block: u64) -> Option<Class> {
        let (no, at) = split(block);
        let chunk = self.chunks.get(&no).filter(|c| c.present & (1 << at) != 0)?;
        Some(self.class(chunk.ages[at as usize]))
    }

    /// Blocks that `wanted` says of from chunk `from` on, of at most `chunks` chunks; and where to go on.
    pub fn select(
        &self,
        from: u32,
        chunks: usize,
        mut wanted: impl FnMut(Class) -> bool,
    ) -> (Vec<(u64, Class)>, Option<u32>) {
        let mut out = Vec::new();
        let mut rest = self.chunks.range(from..);
        for (no, chunk) in rest.by_ref().take(chunks) {
            for at in (0..SLOT_BLOCKS).filter(|at| chunk.present & (1 << at) != 0) {
                let class = self.class(chunk.ages[at as usize]);
                if wanted(class) {
                    out.push((u64::from(*no) * SLOT_BLOCKS + at, class));
                }
            }
        }
        (out, rest.next().map(|(no, _)| *no))
    }

    /// A slot has sums of no block.
    pub fn note_torn(&mut self, slot: u32) {
        self.torn.push(slot);
    }

    /// Slots that have sums of no block, each once.
    pub fn torn(&self) -> &[u32] {
        &self.torn
    }

    /// They have none any more.
    pub fn forget_torn(&mut self) {
        self.torn.clear();
    }

    /// What came since the last call: first block and blocks.
    pub fn take_unsynced(&mut self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.unsynced)
    }

    /// The ages of a chunk that has blocks here.
    pub fn ages_of(&self, chunk: u32) -> Option<Ages> {
        self.chunks.get(&chunk).map(|chunk| Ages { base: self.base, ages: chunk.ages })
    }

    /// Slots whose ages are not in the file, at most `max`; they are taken for written.
    pub fn take_aged(&mut self, max: usize) -> Vec<(u32, u32, Ages)> {
        let base = self.base;
        let aged = self.chunks.iter_mut().filter(|(_, chunk)| chunk.aged).take(max);
        aged.map(|(no, chunk)| {
            chunk.aged = false;
            (chunk.slot, *no, Ages { base, ages: chunk.ages })
        })
        .collect()
    }

    /// The next run of blocks at or after `from` and below `end` that are not here.
    pub fn next_gap(&self, from: u64, end: u64) -> Option<(u64, u64)> {
        let start = from + self.run(from, end.saturating_sub(from), true);
        (start < end).then(|| (start, self.run(start, end - start, false)))
    }
}
