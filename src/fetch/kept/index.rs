//! The index of one source: which blocks are present, and when each was used last. In memory only.
//!
//! A *chunk* is 64 blocks (1 MiB of the source) and has a slot in the sums file. Only chunks with present blocks take
//! memory: 120 bytes each, and the tree around them. So 1 TiB of cached blocks takes 120 MiB, and a source without
//! cached blocks takes none, whatever its size.
//!
//! Use is counted in *generations*: a number that grows each time a sixty-fourth of the cache's bytes were inserted or
//! used again. Each block has one byte of age: the generation of its last use, relative to a base generation of the
//! source, and a bit for *hot*. A block is hot when it was used again in a later generation than that of its insertion;
//! a scan makes no block hot.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::SourceKey;
use super::open::Files;
use crate::format::cache::{Ages, SLOT_BLOCKS};
use crate::source::holdings::HeldRow;

/// The longest time until a hidden block is tried again, ticks.
const LONGEST_HIDDEN: u64 = 64;

/// A bit in the age of a block: the block was used again after its insertion.
pub(super) const HOT: u8 = 0x80;
const SPAN: u64 = 127;

const CHUNK: usize = SLOT_BLOCKS as usize;

#[derive(Debug, Clone)]
pub(super) struct Chunk {
    pub slot: u32,
    /// A bit for each block.
    pub present: u64,
    pub ages: [u8; CHUNK],
    /// The ages differ from those in the file.
    aged: bool,
}

/// Blocks of one chunk whose sums are adjacent in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub slot: u32,
    /// The first block's place in its chunk.
    pub at: u64,
    pub blocks: u64,
}

/// The eviction class of a block. Blocks of one class are equally good victims.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Class {
    pub generation: u64,
    pub hot: bool,
}

#[derive(Default)]
pub(super) struct Index {
    /// `None` until a block of this source is cached.
    pub files: Option<Arc<Files>>,
    /// The digest key that all present blocks were compared with.
    pub contents: Option<SourceKey>,
    /// Blocks that could not be read and when they are tried again. Their sums are still on disk.
    hidden: BTreeMap<u64, Hidden>,
    chunks: BTreeMap<u32, Chunk>,
    /// The number of present blocks.
    blocks: u64,
    known: Known,
    /// For a file with slots in any order: its free slots.
    any_order: Option<Slots>,
    /// The file must be read as a whole, and that failed.
    pub unreadable: bool,
    /// The bytes that the source counts for until it is fully indexed.
    estimate: u64,
    /// Blocks that were inserted before that: first block and blocks.
    added_in_scan: Vec<(u64, u64)>,
    /// Slots that a power cut tore, with sums that belong to no block.
    torn: Vec<u32>,
    /// Blocks that were inserted since the last sync took this list: first block and blocks.
    unsynced: Vec<(u64, u64)>,
    base: u64,
    counts: Counts,
}

#[derive(Default)]
struct Slots {
    free: Vec<u32>,
    next: u32,
}

/// How much of the file that an earlier worker left is indexed.
#[derive(Default)]
enum Known {
    /// All of it.
    #[default]
    All,
    /// The chunks below a number, and some others.
    Below(u32, BTreeSet<u32>),
    /// Nothing; the file must be read as a whole.
    Nothing,
}

#[derive(Debug, Clone, Copy)]
struct Hidden {
    class: Class,
    due: u64,
    wait: u64,
    /// It counts as present again, and was not read since.
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

/// The bits of `blocks` blocks from place `at` of a chunk on.
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

    /// The number of consecutive blocks from `first` on that are present (or missing), at most `max`.
    pub fn run(&self, first: u64, max: u64, present: bool) -> u64 {
        let mut done = 0;
        while done < max {
            let (chunk, at) = split(first + done);
            let Some(bits) = self.chunks.get(&chunk).map(|c| c.present) else {
                if present {
                    break;
                }
                // Missing up to the next chunk with present blocks.
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

    /// The first present block at or after `from`.
    pub fn next_present(&self, from: u64) -> Option<u64> {
        let (first, at) = split(from);
        self.chunks.range(first..).find_map(|(no, chunk)| {
            let bits = if *no == first { chunk.present & (u64::MAX << at) } else { chunk.present };
            (bits != 0).then(|| u64::from(*no) * SLOT_BLOCKS + u64::from(bits.trailing_zeros()))
        })
    }

    /// Notes the present blocks of chunks from `first` on, a chunk for each row.
    pub fn hold(&self, first: u32, rows: &mut [HeldRow]) {
        let end = first.saturating_add(rows.len() as u32);
        for (no, chunk) in self.chunks.range(first..end) {
            rows[(no - first) as usize].cached |= chunk.present;
        }
        if !matches!(self.known, Known::All) {
            for (no, row) in (first..end).zip(rows.iter_mut()) {
                row.unknown |= if self.is_unknown(no) { !row.cached } else { 0 };
            }
        }
    }

    /// The first chunk at or after `from` that may have present blocks.
    pub fn next_chunk(&self, from: u32) -> Option<u32> {
        match self.known {
            Known::All => self.chunks.range(from..).next().map(|(no, _)| *no),
            _ => Some(from),
        }
    }

    /// The places of the sums of present blocks.
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

    /// Takes a slot for a chunk that has none: its own place, unless the file has slots in any order. The slot stays
    /// taken until it is published or given back.
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

    /// Adds a slot of the file that any chunk may use.
    pub fn add_free_slot(&mut self, slot: u32) {
        self.skip_slots(slot + 1);
        self.give_slot_back(slot);
    }

    /// Does not use slots below a number, because they could not be read.
    pub fn skip_slots(&mut self, below: u32) {
        if let Some(slots) = &mut self.any_order {
            slots.next = slots.next.max(below);
        }
    }

    /// An empty index for a file with slots in any order.
    pub fn of_any_order() -> Self {
        Self { any_order: Some(Slots::default()), ..Self::default() }
    }

    /// The index of a file that was not read yet. The file counts for `estimate` bytes until then.
    pub fn unread(files: Arc<Files>, in_place: bool, estimate: u64) -> Self {
        let known = if in_place { Known::Below(0, BTreeSet::new()) } else { Known::Nothing };
        let any_order = (!in_place).then(Slots::default);
        Self { files: Some(files), known, any_order, estimate, ..Self::default() }
    }

    /// Takes over the index that reading the file as a whole gave.
    pub fn adopt(&mut self, found: Self) {
        let (files, contents) = (self.files.take(), self.contents);
        let (known, estimate) = (std::mem::take(&mut self.known), self.estimate);
        let unsynced = self.take_unsynced();
        *self = Self { files, contents, known, estimate, unsynced, ..found };
    }

    /// From now on each slot lies at the place of its chunk.
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

    /// Whether the file must be read as a whole first.
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

    /// The first run of chunks of a range that are not indexed, at most `most`: first chunk and chunks.
    pub fn unknown(&self, first: u64, blocks: u64, most: u64) -> Option<(u32, u64)> {
        if matches!(self.known, Known::All) || blocks == 0 {
            return None;
        }
        let last = split(first + blocks - 1).0;
        let from = (split(first).0..=last).find(|chunk| self.is_unknown(*chunk))?;
        let count = (from..=last).take(most as usize).take_while(|chunk| self.is_unknown(*chunk)).count();
        Some((from, count as u64))
    }

    /// The chunk from which the scan must go on. `Some(None)`: the file must be read as a whole. `None`: the scan is
    /// done.
    pub fn scan_from(&self) -> Option<Option<u32>> {
        match &self.known {
            Known::All => None,
            Known::Below(below, _) => Some(Some(*below)),
            Known::Nothing => Some(None),
        }
    }

    /// Notes that all chunks below a number are indexed.
    pub fn scanned_to(&mut self, below: u32) {
        if let Known::Below(now, others) = &mut self.known {
            *now = below;
            *others = others.split_off(&below);
        }
    }

    /// Notes that all is indexed. Returns the estimate that no longer counts.
    pub fn know_all(&mut self) -> u64 {
        self.known = Known::All;
        std::mem::take(&mut self.estimate)
    }

    /// The estimate that the source counts for, until all is indexed.
    pub fn estimate(&self) -> Option<u64> {
        (!matches!(self.known, Known::All)).then_some(self.estimate)
    }

    /// Bytes were inserted.
    pub fn charge(&mut self, bytes: u64) {
        if !matches!(self.known, Known::All) {
            self.estimate += bytes;
        }
    }

    /// Bytes were dropped. Returns by how many bytes the source counts less.
    pub fn discharge(&mut self, bytes: u64) -> u64 {
        if matches!(self.known, Known::All) {
            return bytes;
        }
        let less = bytes.min(self.estimate);
        self.estimate -= less;
        less
    }

    /// Gives blocks that were inserted during the scan the current generation, which is known only after the scan.
    pub fn renew_added_in_scan(&mut self, generation: u64) {
        for (first, blocks) in std::mem::take(&mut self.added_in_scan) {
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

    /// Adds a chunk that an earlier worker left. Returns false when the chunk is in the index already.
    pub fn add_found(&mut self, chunk: u32, slot: u32, present: u64, ages: Option<Ages>) -> bool {
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

    /// The age byte of a generation. Moves the base generation when the distance does not fit.
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

    /// Makes blocks of one chunk present. Their sums are in `slot`.
    pub fn publish(&mut self, first: u64, blocks: u64, slot: u32, generation: u64) {
        if !matches!(self.known, Known::All) {
            self.added_in_scan.push((first, blocks));
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

    /// The ages of blocks that are inserted now, for a slot that is written before the blocks are published.
    pub fn ages_of_new(&mut self, first: u64, blocks: u64, generation: u64) -> Ages {
        let age = self.age(generation);
        let mut ages = [0; CHUNK];
        let (_, at) = split(first);
        ages[at as usize..(at + blocks) as usize].fill(age);
        Ages { base: self.base, ages }
    }

    /// Notes a use of present blocks. Returns how many of them had not been used in this generation.
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

    /// Makes a block missing. Returns the slot of its sum.
    pub fn clear(&mut self, block: u64) -> Option<u32> {
        let (no, _) = split(block);
        let (slot, empty) = self.unset(block)?;
        // The slot stays while it has sums of hidden blocks.
        let first = u64::from(no) * SLOT_BLOCKS;
        if empty && self.hidden.range(first..first + SLOT_BLOCKS).all(|(_, hidden)| hidden.shown) {
            self.chunks.remove(&no);
            self.give_slot_back(slot);
        }
        Some(slot)
    }

    /// Makes a present block missing for a while; its sum stays. Returns whether it was present.
    pub fn hide(&mut self, block: u64, now: u64) -> bool {
        let Some(class) = self.class_of(block) else { return false };
        self.unset(block);
        let wait = self.hidden.get(&block).map_or(1, |before| (before.wait * 2).min(LONGEST_HIDDEN));
        self.hidden.insert(block, Hidden { class, due: now + wait, wait, shown: false });
        true
    }

    /// Whether blocks are hidden.
    pub fn hides(&self) -> bool {
        self.hidden.values().any(|hidden| !hidden.shown)
    }

    /// Hidden blocks whose time to be tried again has come.
    pub fn due(&self, now: u64) -> Vec<u64> {
        let due = self.hidden.iter().filter(|(_, hidden)| !hidden.shown && hidden.due <= now);
        due.map(|(block, _)| *block).collect()
    }

    /// Makes a hidden block present again.
    pub fn show(&mut self, block: u64) {
        let Some(hidden) = self.hidden.get_mut(&block) else { return };
        hidden.shown = true;
        let class = hidden.class;
        let (no, at) = split(block);
        self.add(no, at, class.generation, if class.hot { HOT } else { 0 });
    }

    /// Whether any ages differ from those in the file.
    pub fn is_aged(&self) -> bool {
        self.chunks.values().any(|chunk| chunk.aged)
    }

    /// Makes a block missing and keeps its slot. Returns the slot, and whether the chunk is empty now.
    fn unset(&mut self, block: u64) -> Option<(u32, bool)> {
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

    /// Makes all blocks missing. Returns how many were present.
    pub fn clear_all(&mut self) -> u64 {
        let blocks = self.blocks;
        *self = Self { files: self.files.take(), ..Self::default() };
        blocks
    }

    /// The number of blocks of each class.
    pub fn classes(&self) -> impl Iterator<Item = (Class, u64)> + '_ {
        let counts = self.counts.0.iter().enumerate().filter(|(_, count)| **count > 0);
        counts.map(|(age, count)| (self.class(age as u8), *count))
    }

    fn class(&self, age: u8) -> Class {
        Class { generation: self.base + u64::from(age & !HOT), hot: age & HOT != 0 }
    }

    /// The class of a present block.
    pub fn class_of(&self, block: u64) -> Option<Class> {
        let (no, at) = split(block);
        let chunk = self.chunks.get(&no).filter(|c| c.present & (1 << at) != 0)?;
        Some(self.class(chunk.ages[at as usize]))
    }

    /// The blocks of at most `chunks` chunks, from chunk `from` on, for which `wanted` is true; and the chunk to go on
    /// with.
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

    /// Notes a slot with sums that belong to no block.
    pub fn note_torn(&mut self, slot: u32) {
        self.torn.push(slot);
    }

    /// Slots with sums that belong to no block, each once.
    pub fn torn(&self) -> &[u32] {
        &self.torn
    }

    /// The torn slots were cleared.
    pub fn forget_torn(&mut self) {
        self.torn.clear();
    }

    /// Blocks that were inserted since the last call: first block and blocks.
    pub fn take_unsynced(&mut self) -> Vec<(u64, u64)> {
        std::mem::take(&mut self.unsynced)
    }

    /// The ages of a chunk with present blocks.
    pub fn ages_of(&self, chunk: u32) -> Option<Ages> {
        self.chunks.get(&chunk).map(|chunk| Ages { base: self.base, ages: chunk.ages })
    }

    /// Slots whose ages differ from those in the file, at most `max`. The caller must write them: they count as written.
    pub fn take_aged(&mut self, max: usize) -> Vec<(u32, u32, Ages)> {
        let base = self.base;
        let aged = self.chunks.iter_mut().filter(|(_, chunk)| chunk.aged).take(max);
        aged.map(|(no, chunk)| {
            chunk.aged = false;
            (chunk.slot, *no, Ages { base, ages: chunk.ages })
        })
        .collect()
    }

    /// The next run of missing blocks at or after `from` and below `end`.
    pub fn next_gap(&self, from: u64, end: u64) -> Option<(u64, u64)> {
        let start = from + self.run(from, end.saturating_sub(from), true);
        (start < end).then(|| (start, self.run(start, end - start, false)))
    }
}
