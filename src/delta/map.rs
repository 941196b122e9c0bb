//! The live map: two bits for each block, in memory that outlives the worker.
//!
//! A map page has 8 words of dirty bits, 8 words of in-flight bits and 496 words of 32 blocks each. A dirty bit
//! says that its word is to be journaled by the next flush; an in-flight bit that a flush has taken it and not
//! finished. After a crash of the worker both count as dirty.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use crate::format::journal::{Run, State, WORD_BLOCKS};
use crate::format::replay::{Replay, Words};
use crate::format::{BLOCK, MAX_DISK_SIZE};
use crate::io::{LIVE_PAGE_WORDS, LiveFile, MapUse};

const BITS: usize = 8;
const WORDS: u64 = (LIVE_PAGE_WORDS - 2 * BITS) as u64;
const EVEN: u64 = 0x5555_5555_5555_5555;

/// The live map of one disk.
#[derive(Debug)]
pub struct LiveMap {
    live: LiveFile,
    /// Pages that may have dirty bits; a page may be listed more than once.
    dirty_pages: Mutex<Vec<u64>>,
    /// Held shared while a word and its dirty bit change, exclusively while a flush takes them.
    publish: RwLock<()>,
}

/// Words that a flush has taken.
#[derive(Debug, Default)]
pub struct Captured {
    /// Their values when taken.
    pub runs: Vec<Run>,
    pages: Vec<u64>,
}

/// Which words a flush takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Take {
    /// Those that changed since the last flush.
    Changed,
    /// All that are not empty.
    All,
}

fn place(block: u64) -> (u64, usize, u32) {
    let word = block / WORD_BLOCKS;
    (word / WORDS, (word % WORDS) as usize, (block % WORD_BLOCKS) as u32 * 2)
}

/// A mask over the pairs `from..to` of a word (in blocks).
fn mask(from: u64, to: u64) -> u64 {
    let upto = if to == WORD_BLOCKS { u64::MAX } else { (1 << (2 * to)) - 1 };
    upto & (u64::MAX << (2 * from))
}

impl LiveMap {
    /// No map has more pages.
    pub const PAGES_OF_LARGEST_DISK: u64 = (MAX_DISK_SIZE / BLOCK / WORD_BLOCKS).div_ceil(WORDS);

    /// Uses a live file; what an earlier worker had not made durable is dirty again.
    pub fn new(live: LiveFile) -> Self {
        let map = Self { live, dirty_pages: Mutex::new(Vec::new()), publish: RwLock::new(()) };
        let pages: Vec<u64> = map.live.pages(0).collect();
        map.give_back(&pages);
        map
    }

    /// The live file, for its header.
    pub fn live(&self) -> &LiveFile {
        &self.live
    }

    /// State of one block.
    pub fn state(&self, block: u64) -> State {
        let (page, word, shift) = place(block);
        let Some(page) = self.live.page(page) else { return State::Unmapped };
        State::from_bits(page[2 * BITS + word].load(Ordering::Acquire) >> shift & 3).unwrap_or(State::Zero)
    }

    /// State of block `first` and the end of the run of blocks that share it, at most `end`.
    pub fn run(&self, first: u64, end: u64) -> (State, u64) {
        let state = self.state(first);
        let pattern = EVEN * state as u64;
        let mut block = first + 1;
        while block < end {
            let (page, word, shift) = place(block);
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

    /// Reserves the memory that [`LiveMap::set`] of these blocks needs.
    ///
    /// # Errors
    /// ENOSPC when the memory filesystem is full, or a bound on the memory for maps is reached.
    pub fn prepare(&self, first: u64, end: u64, wanted: MapUse) -> io::Result<()> {
        for page in place(first).0..=place(end.saturating_sub(1).max(first)).0 {
            self.live.prepare_for(page, wanted)?;
        }
        Ok(())
    }

    /// Sets the state of blocks `first..end`; their pages are prepared, or skipped for `Unmapped`.
    pub fn set(&self, first: u64, end: u64, state: State) {
        let _publish = self.publish.read();
        let pattern = EVEN * state as u64;
        let mut block = first;
        while block < end {
            let (page_no, word, shift) = place(block);
            let Some(page) = self.live.page(page_no) else {
                debug_assert_eq!(state, State::Unmapped);
                block = (page_no + 1) * WORDS * WORD_BLOCKS;
                continue;
            };
            let from = u64::from(shift / 2);
            let to = (from + (end - block)).min(WORD_BLOCKS);
            let mask = mask(from, to);
            let cell = &page[2 * BITS + word];
            let change = |old: u64| (old & !mask) | (pattern & mask);
            let seen = cell.load(Ordering::Acquire);
            if change(seen) != seen {
                // Dirty first: after a crash between the two, the word is journaled once too often, never too
                // rarely. A flush cannot come between, it takes `publish` exclusively.
                if page[word / 64].fetch_or(1 << (word % 64), Ordering::AcqRel) == 0 {
                    self.dirty_pages.lock().push(page_no);
                }
                let _ = cell.fetch_update(Ordering::AcqRel, Ordering::Acquire, |old| Some(change(old)));
            }
            block += to - from;
        }
    }

    /// Notes a block as written since the last flush, whose state is what it was.
    pub fn note(&self, block: u64) {
        let _publish = self.publish.read();
        let (page_no, word, _) = place(block);
        if let Some(page) = self.live.page(page_no)
            && page[word / 64].fetch_or(1 << (word % 64), Ordering::AcqRel) == 0
        {
            self.dirty_pages.lock().push(page_no);
        }
    }

    /// Forgets what is mapped at and above block `first`; not journaled, a record's size says the same.
    pub fn clear_from(&self, first: u64) {
        let _publish = self.publish.read();
        let (first_page, first_word, shift) = place(first);
        for page_no in self.live.pages(first_page) {
            let Some(page) = self.live.page(page_no) else { continue };
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

    /// Takes words for a flush, together with what `with` reads at the same moment.
    pub fn take<T>(&self, what: Take, with: impl FnOnce() -> T) -> (Captured, T) {
        let _publish = self.publish.write();
        let mut pages = std::mem::take(&mut *self.dirty_pages.lock());
        pages.sort_unstable();
        pages.dedup();
        for page in pages.iter().filter_map(|p| self.live.page(*p)) {
            for i in 0..BITS {
                let dirty = page[i].swap(0, Ordering::AcqRel);
                page[BITS + i].fetch_or(dirty, Ordering::AcqRel);
            }
        }
        let mut runs: Vec<Run> = Vec::new();
        let mut add = |page_no: u64, page: &[AtomicU64; LIVE_PAGE_WORDS], word: usize| {
            let (index, value) =
                (page_no * WORDS + word as u64, page[2 * BITS + word].load(Ordering::Acquire));
            match runs.last_mut() {
                Some(run) if run.first + run.words.len() as u64 == index => run.words.push(value),
                _ => runs.push(Run { first: index, words: vec![value] }),
            }
        };
        match what {
            Take::Changed => {
                for (no, page) in pages.iter().filter_map(|p| Some((*p, self.live.page(*p)?))) {
                    for word in 0..WORDS as usize {
                        if page[BITS + word / 64].load(Ordering::Acquire) & 1 << (word % 64) != 0 {
                            add(no, page, word);
                        }
                    }
                }
            }
            Take::All => {
                for (no, page) in self.live.pages(0).filter_map(|p| Some((p, self.live.page(p)?))) {
                    for word in 0..WORDS as usize {
                        if page[2 * BITS + word].load(Ordering::Acquire) != 0 {
                            add(no, page, word);
                        }
                    }
                }
            }
        }
        (Captured { runs, pages }, with())
    }

    /// Runs of `Data` blocks in words that are not durable.
    pub fn unflushed_data(&self) -> Vec<(u64, u64)> {
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for (no, page) in self.live.pages(0).filter_map(|p| Some((p, self.live.page(p)?))) {
            for word in 0..WORDS as usize {
                let bits =
                    page[word / 64].load(Ordering::Acquire) | page[BITS + word / 64].load(Ordering::Acquire);
                if bits & 1 << (word % 64) == 0 {
                    continue;
                }
                let value = page[2 * BITS + word].load(Ordering::Acquire);
                let first = (no * WORDS + word as u64) * WORD_BLOCKS;
                for block in (0..WORD_BLOCKS).filter(|b| value >> (2 * b) & 3 == State::Data as u64) {
                    match runs.last_mut() {
                        Some((_, end)) if *end == first + block => *end += 1,
                        _ => runs.push((first + block, first + block + 1)),
                    }
                }
            }
        }
        runs
    }

    /// The words are durable.
    pub fn done(&self, captured: &Captured) {
        for page in captured.pages.iter().filter_map(|p| self.live.page(*p)) {
            page[BITS..2 * BITS].iter().for_each(|bits| bits.store(0, Ordering::Release));
        }
    }

    /// The words are not durable; the next flush takes them again.
    pub fn failed(&self, captured: &Captured) {
        self.give_back(&captured.pages);
    }

    fn give_back(&self, pages: &[u64]) {
        let _publish = self.publish.read();
        for (no, page) in pages.iter().filter_map(|p| Some((*p, self.live.page(*p)?))) {
            let mut any = 0;
            for i in 0..BITS {
                let bits = page[BITS + i].load(Ordering::Acquire);
                any |= bits | page[i].fetch_or(bits, Ordering::AcqRel);
                page[BITS + i].fetch_and(!bits, Ordering::AcqRel);
            }
            if any != 0 {
                self.dirty_pages.lock().push(no);
            }
        }
    }

    /// Loads words as a journal has them, without making them dirty. For a map that nobody uses yet.
    ///
    /// # Errors
    /// ENOSPC when the memory filesystem is full.
    pub fn load(&self, replay: &Replay) -> io::Result<()> {
        for (first, words) in replay.words() {
            let (len, value): (u64, &dyn Fn(u64) -> u64) = match words {
                Words::Same(len, value) => (len, &move |_| value),
                Words::Each(words) => (words.len() as u64, &move |at| words[at as usize]),
            };
            for at in 0..len {
                let (word, value) = (first + at, value(at));
                if value != 0 {
                    let page = self.live.prepare(word / WORDS)?;
                    page[2 * BITS + (word % WORDS) as usize].store(value, Ordering::Release);
                }
            }
        }
        Ok(())
    }
}

/// First block that is not wholly below `bytes`.
pub fn blocks_for(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK)
}
