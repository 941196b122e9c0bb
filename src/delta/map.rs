//! The live map: two bits for each block, in memory that outlives the worker.
//!
//! A map page has 8 words of dirty bits, 8 words of in-flight bits and 496 words of 32 blocks each. A dirty bit means
//! that the next flush must journal the word. An in-flight bit means that a flush has taken the word and has not ended.
//! After the death of a worker both count as dirty.
//!
//! The live file lists the pages that have such bits. A page is listed before its first bit is set, and leaves the list
//! when a flush made it durable, so a flush looks at no other page, after the death of a worker neither (D77).
//!
//! A flush takes words page by page without copying them ([`LiveMap::take_dirty`]), so a writer waits for 16 words at
//! most. Once the data is synced, the flush journals each word that has not changed since ([`LiveMap::unchanged`]). It
//! takes each changed word again, now with its value, and syncs the data again ([`LiveMap::retake`]).

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::RwLock;

use crate::format::journal::{State, WORD_BLOCKS};
use crate::format::{BLOCK, MAX_DISK_SIZE};
use crate::io::{LIVE_PAGE_WORDS, LiveFile, MapUse};
use crate::mutant::Mutant;

const BITS: usize = 8;
/// Words of blocks in a page.
pub const WORDS: u64 = (LIVE_PAGE_WORDS - 2 * BITS) as u64;
const EVEN: u64 = 0x5555_5555_5555_5555;

/// Number of `publish` locks. Page n uses lock n modulo this.
const STRIPES: usize = 16;

/// The live map of one disk.
#[derive(Debug)]
pub struct LiveMap {
    live: LiveFile,
    /// An earlier worker, of a version without the list of unflushed pages, may have left bits in pages that are not listed.
    inherited: AtomicBool,
    /// Held shared while a word of a page and its dirty bit change; held exclusively while a flush takes them.
    publish: [RwLock<()>; STRIPES],
}

/// Which words a flush takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Take {
    /// The words that changed since the last flush.
    Changed,
    /// All words that are not 0.
    All,
}

fn locate(block: u64) -> (u64, usize, u32) {
    let word = block / WORD_BLOCKS;
    (word / WORDS, (word % WORDS) as usize, (block % WORD_BLOCKS) as u32 * 2)
}

/// A mask over the pairs `from..to` of a word (in blocks).
fn mask(from: u64, to: u64) -> u64 {
    let upto = if to == WORD_BLOCKS { u64::MAX } else { (1 << (2 * to)) - 1 };
    upto & (u64::MAX << (2 * from))
}

impl LiveMap {
    /// Pages of the map of the largest disk.
    pub const PAGES_OF_LARGEST_DISK: u64 = (MAX_DISK_SIZE / BLOCK / WORD_BLOCKS).div_ceil(WORDS);

    /// Uses a live file. Words that an earlier worker had not made durable are dirty again.
    pub fn new(live: LiveFile) -> Self {
        let publish = [const { RwLock::new(()) }; STRIPES];
        Self { inherited: AtomicBool::new(!live.is_tracked()), live, publish }
    }

    fn stripe(&self, page: u64) -> &RwLock<()> {
        &self.publish[page as usize % STRIPES]
    }

    /// The live file, for its header.
    pub fn live(&self) -> &LiveFile {
        &self.live
    }

    /// State of one block.
    pub fn state(&self, block: u64) -> State {
        let (page, word, shift) = locate(block);
        let Some(page) = self.live.page(page) else { return State::Unmapped };
        State::from_bits(page[2 * BITS + word].load(Ordering::Acquire) >> shift & 3).unwrap_or(State::Zero)
    }

    /// State of block `first`, and the end of the run of blocks with that state, at most `end`.
    pub fn run(&self, first: u64, end: u64) -> (State, u64) {
        let state = self.state(first);
        let pattern = EVEN * state as u64;
        let mut block = first + 1;
        while block < end {
            let (page, word, shift) = locate(block);
            match self.live.page(page) {
                None if state == State::Unmapped => block = (page + 1) * WORDS * WORD_BLOCKS,
                None => break,
                Some(page) => {
                    let differs = (page[2 * BITS + word].load(Ordering::Acquire) ^ pattern) >> shift;
                    if differs != 0 {
                        block += u64::from(differs.trailing_zeros() / 2);
                        break;
                    }
                    block += WORD_BLOCKS - u64::from(shift / 2);
                }
            }
        }
        (state, block.min(end))
    }

    /// How many of the blocks `first..end` are `Data`.
    pub fn count_data(&self, first: u64, end: u64) -> u64 {
        let mut blocks = 0;
        for page_no in self.live.pages(locate(first).0) {
            let (page_first, page_end) = (page_no * WORDS * WORD_BLOCKS, (page_no + 1) * WORDS * WORD_BLOCKS);
            if page_first >= end {
                break;
            }
            let Some(page) = self.live.page(page_no) else { continue };
            let (mut block, page_end) = (first.max(page_first), page_end.min(end));
            while block < page_end {
                let (_, word, shift) = locate(block);
                let from = u64::from(shift / 2);
                let to = (from + (page_end - block)).min(WORD_BLOCKS);
                let differs = page[2 * BITS + word].load(Ordering::Acquire) ^ (EVEN * State::Data as u64);
                let is_data = !(differs | differs >> 1) & EVEN & mask(from, to);
                blocks += u64::from(is_data.count_ones());
                block += to - from;
            }
        }
        blocks
    }

    /// Reserves the memory that [`LiveMap::set`] of these blocks needs.
    ///
    /// # Errors
    /// ENOSPC when the memory filesystem is full or the bound on the memory for maps is reached.
    pub fn prepare(&self, first: u64, end: u64, wanted: MapUse) -> io::Result<()> {
        for page in locate(first).0..=locate(end.saturating_sub(1).max(first)).0 {
            self.live.prepare_for(page, wanted)?;
        }
        Ok(())
    }

    /// Sets the state of blocks `first..end`. Their pages are prepared; `Unmapped` skips pages that are not.
    pub fn set(&self, first: u64, end: u64, state: State) {
        let pattern = EVEN * state as u64;
        let mut block = first;
        while block < end {
            let page_no = locate(block).0;
            let page_end = ((page_no + 1) * WORDS * WORD_BLOCKS).min(end);
            let Some(page) = self.live.page(page_no) else {
                debug_assert_eq!(state, State::Unmapped);
                block = page_end;
                continue;
            };
            let _publish = self.stripe(page_no).read();
            while block < page_end {
                let (_, word, shift) = locate(block);
                let from = u64::from(shift / 2);
                let to = (from + (page_end - block)).min(WORD_BLOCKS);
                let mask = mask(from, to);
                let cell = &page[2 * BITS + word];
                let change = |old: u64| (old & !mask) | (pattern & mask);
                let seen = cell.load(Ordering::Acquire);
                if change(seen) != seen {
                    // The dirty bit first: after a crash between the two, the word is journaled once too often, never
                    // too rarely (D13). No flush runs in between, because it takes `publish` exclusively.
                    self.set_dirty(page_no, page, word);
                    let _ = cell.fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| Some(change(old)));
                    step::done(&self.live);
                }
                block += to - from;
            }
        }
    }

    /// The caller holds `publish` of the page.
    fn set_dirty(&self, page_no: u64, page: &[AtomicU64; LIVE_PAGE_WORDS], word: usize) {
        self.live.note_unflushed(page_no);
        step::done(&self.live);
        page[word / 64].fetch_or(1 << (word % 64), Ordering::AcqRel);
        step::done(&self.live);
    }

    /// Marks a block dirty that was written since the last flush and whose state did not change.
    pub fn mark_dirty(&self, block: u64) {
        let (page_no, word, _) = locate(block);
        let _publish = self.stripe(page_no).read();
        if let Some(page) = self.live.page(page_no) {
            self.set_dirty(page_no, page, word);
        }
    }

    /// Whether the word of a block is durable as it is.
    pub fn is_durable(&self, block: u64) -> bool {
        let (page_no, word, _) = locate(block);
        let Some(page) = self.live.page(page_no) else { return true };
        let bits = page[word / 64].load(Ordering::Acquire) | page[BITS + word / 64].load(Ordering::Acquire);
        bits & 1 << (word % 64) == 0
    }

    /// Unmaps all blocks from `first` on. This is not journaled: the size in the next record says the same.
    pub fn clear_from(&self, first: u64) {
        let (first_page, first_word, shift) = locate(first);
        for page_no in self.live.pages(first_page) {
            let Some(page) = self.live.page(page_no) else { continue };
            let _publish = self.stripe(page_no).read();
            for word in 0..WORDS as usize {
                let keep = match (page_no == first_page, word.cmp(&first_word)) {
                    (true, std::cmp::Ordering::Less) => continue,
                    (true, std::cmp::Ordering::Equal) => (1u64 << shift) - 1,
                    _ => 0,
                };
                page[2 * BITS + word].fetch_and(keep, Ordering::AcqRel);
            }
        }
    }

    /// Completes the list of unflushed pages, if a worker of a version without the list has used the map. Flushes and
    /// writers may run meanwhile: a page that is listed without a bit is skipped, and its own writer lists a new bit.
    pub fn note_inherited(&self) {
        if !self.inherited.load(Ordering::Acquire) {
            return;
        }
        for page_no in self.live.pages(0) {
            let Some(page) = self.live.page(page_no) else { continue };
            let _publish = self.stripe(page_no).read();
            if page[..2 * BITS].iter().any(|bits| bits.load(Ordering::Acquire) != 0) {
                self.live.note_unflushed(page_no);
            }
        }
        self.inherited.store(false, Ordering::Release);
        self.live.set_tracked();
    }

    /// Numbers of the pages that may have words which are not durable.
    pub fn unflushed_pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.note_inherited();
        self.live.unflushed_pages()
    }

    /// Takes all dirty words for a flush. Lists the pages with taken words, in order. They stay in the list of unflushed
    /// pages until [`LiveMap::mark_durable`].
    pub fn take_dirty(&self, taken: &mut Vec<u32>) {
        for page_no in self.unflushed_pages() {
            let Some(page) = self.live.page(page_no) else { continue };
            let _publish = self.stripe(page_no).write();
            let mut any = 0;
            for i in 0..BITS {
                let dirty = page[i].load(Ordering::Acquire);
                any |= dirty | page[BITS + i].load(Ordering::Acquire);
                if dirty != 0 {
                    // In-flight before it is not dirty any more.
                    page[BITS + i].fetch_or(dirty, Ordering::AcqRel);
                    step::done(&self.live);
                    page[i].store(0, Ordering::Release);
                    step::done(&self.live);
                }
            }
            if any == 0 || Mutant::TakenWordsForgotten.is_active() {
                self.live.forget_unflushed(page_no);
            }
            if any != 0 {
                taken.push(page_no as u32);
            }
        }
    }

    /// The words of a page that have not changed since [`LiveMap::take_dirty`], with their values; and whether others
    /// have changed and must be taken again.
    pub fn unchanged(&self, page_no: u64, what: Take) -> (Vec<(u64, u64)>, bool) {
        let (mut words, mut others) = (Vec::new(), false);
        let Some(page) = self.live.page(page_no) else { return (words, others) };
        for word in 0..WORDS as usize {
            let bit = 1 << (word % 64);
            if what == Take::Changed && page[BITS + word / 64].load(Ordering::Acquire) & bit == 0 {
                continue;
            }
            // The word is read first: a new value comes with its dirty bit.
            let value = page[2 * BITS + word].load(Ordering::Acquire);
            if page[word / 64].load(Ordering::Acquire) & bit != 0 {
                others = true;
            } else if what == Take::Changed || value != 0 {
                words.push((page_no * WORDS + word as u64, value));
            }
        }
        (words, others)
    }

    /// Takes the dirty words of a page again, with their values.
    pub fn retake(&self, page_no: u64, words: &mut Vec<(u64, u64)>) {
        let Some(page) = self.live.page(page_no) else { return };
        let _publish = self.stripe(page_no).write();
        for i in 0..BITS {
            let mut dirty = page[i].load(Ordering::Acquire);
            page[BITS + i].fetch_or(dirty, Ordering::AcqRel);
            step::done(&self.live);
            page[i].store(0, Ordering::Release);
            step::done(&self.live);
            while dirty != 0 {
                let word = i * 64 + dirty.trailing_zeros() as usize;
                dirty &= dirty - 1;
                words.push((page_no * WORDS + word as u64, page[2 * BITS + word].load(Ordering::Acquire)));
            }
        }
    }

    /// Numbers of the pages that the map has.
    pub fn pages(&self) -> impl Iterator<Item = u64> + '_ {
        self.live.pages(0)
    }

    /// Copies the words of a page. Writers may run meanwhile.
    pub fn copy_page(&self, page_no: u64, words: &mut [u64; WORDS as usize]) {
        match self.live.page(page_no) {
            Some(page) => {
                let cells = words.iter_mut().zip(&page[2 * BITS..]);
                cells.for_each(|(word, cell)| *word = cell.load(Ordering::Acquire));
            }
            None => words.fill(0),
        }
    }

    /// Runs of `Data` blocks in those words of a page that are not durable.
    pub fn unflushed_data(&self, page_no: u64) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        let Some(page) = self.live.page(page_no) else { return runs };
        for word in 0..WORDS as usize {
            let bits =
                page[word / 64].load(Ordering::Acquire) | page[BITS + word / 64].load(Ordering::Acquire);
            if bits & 1 << (word % 64) == 0 {
                continue;
            }
            let value = page[2 * BITS + word].load(Ordering::Acquire);
            let first = (page_no * WORDS + word as u64) * WORD_BLOCKS;
            for block in (0..WORD_BLOCKS).filter(|b| value >> (2 * b) & 3 == State::Data as u64) {
                match runs.last_mut() {
                    Some((_, end)) if *end == first + block => *end += 1,
                    _ => runs.push((first + block, first + block + 1)),
                }
            }
        }
        runs
    }

    /// Notes that the words taken from these pages are durable.
    pub fn mark_durable(&self, pages: &[u32]) {
        for (no, page) in pages.iter().filter_map(|p| Some((u64::from(*p), self.live.page(u64::from(*p))?))) {
            let (dirty, in_flight) = page[..2 * BITS].split_at(BITS);
            for bits in in_flight {
                bits.store(0, Ordering::Release);
                step::done(&self.live);
            }
            // No writer is between the list and its dirty bit.
            let _publish = self.stripe(no).write();
            if dirty.iter().all(|bits| bits.load(Ordering::Acquire) == 0) {
                self.live.forget_unflushed(no);
                step::done(&self.live);
            }
        }
    }

    /// Marks the words taken from these pages dirty again, for the next flush.
    pub fn restore(&self, pages: &[u32]) {
        for (no, page) in pages.iter().filter_map(|p| Some((u64::from(*p), self.live.page(u64::from(*p))?))) {
            let _publish = self.stripe(no).read();
            for i in 0..BITS {
                let bits = page[BITS + i].load(Ordering::Acquire);
                page[i].fetch_or(bits, Ordering::AcqRel);
                step::done(&self.live);
                page[BITS + i].fetch_and(!bits, Ordering::AcqRel);
                step::done(&self.live);
            }
        }
    }

    /// Sets a word without marking it dirty. No other thread uses the map yet.
    ///
    /// # Errors
    /// ENOSPC when the memory filesystem is full.
    pub(super) fn load_word(&self, word: u64, value: u64) -> io::Result<()> {
        let page = self.live.prepare(word / WORDS)?;
        page[2 * BITS + (word % WORDS) as usize].store(value, Ordering::Release);
        Ok(())
    }
}

/// Number of blocks that `bytes` need; also the first block that lies wholly at or above `bytes`.
pub fn blocks_for(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK)
}

/// Where a worker may be killed: after each store to the live map that later ones depend on.
#[cfg(test)]
pub(super) mod step {
    use std::cell::RefCell;

    use crate::io::LiveFile;

    type Watch = Box<dyn FnMut(&LiveFile)>;

    thread_local! {
        /// What this thread does after each step.
        pub static WATCH: RefCell<Option<Watch>> = const { RefCell::new(None) };
    }

    pub(super) fn done(live: &LiveFile) {
        let watch = WATCH.take();
        if let Some(mut watch) = watch {
            watch(live);
            WATCH.set(Some(watch));
        }
    }
}

#[cfg(not(test))]
mod step {
    #[inline(always)]
    pub(super) fn done(_live: &crate::io::LiveFile) {}
}
