//! The words of a map after all records of its map file.
//!
//! A record of a few bytes may set 2^29 words. What must hold: the bytes that were read bound the memory and the time
//! of a replay, never the numbers in them. So a run of one repeated word is kept as a run of any length, and only words
//! that were stored one by one take memory each.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use super::BLOCK;
use super::journal::{State, WORD_BLOCKS};

/// Words in a page. Small, because a single word at a distant address takes a page.
const PAGE: u64 = 64;
/// Approximate number of words of one record.
const MOST_WORDS: u64 = 256 << 10;
/// The lower bit of each block: the state `Data`.
const EVEN: u64 = 0x5555_5555_5555_5555;

/// Consecutive pages.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stretch {
    /// A number of pages in which all words have one value.
    Same(u64, u64),
    /// One page.
    Page(Box<[u64; PAGE as usize]>),
}

impl Stretch {
    fn pages(&self) -> u64 {
        match self {
            Stretch::Same(pages, _) => *pages,
            Stretch::Page(_) => 1,
        }
    }
}

/// Words with their values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Words<'a> {
    /// A number of words with one value.
    Same(u64, u64),
    /// Words with a value each.
    Each(&'a [u64]),
}

/// A map as a sparse array of words. A word that was never set is 0.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Replay {
    /// By the number of the first page. Stretches do not overlap, and no `Same` is of zeros.
    stretches: BTreeMap<u64, Stretch>,
}

impl Replay {
    /// Sets the words from `first` on.
    pub fn set(&mut self, first: u64, words: Words<'_>) {
        match words {
            Words::Same(len, value) => self.set_same(first, first.saturating_add(len), value),
            Words::Each(mut words) => {
                let mut first = first;
                while !words.is_empty() {
                    let at = (first % PAGE) as usize;
                    let (head, rest) = words.split_at(words.len().min(PAGE as usize - at));
                    // Zeros need no page.
                    if self.at(first / PAGE).is_some() || head.iter().any(|word| *word != 0) {
                        self.page(first / PAGE)[at..at + head.len()].copy_from_slice(head);
                    }
                    (first, words) = (first + head.len() as u64, rest);
                }
            }
        }
    }

    /// Sets words that all lie in one page.
    fn set_within(&mut self, first: u64, end: u64, value: u64) {
        if first < end && (value != 0 || self.at(first / PAGE).is_some()) {
            let at = (first % PAGE) as usize;
            self.page(first / PAGE)[at..at + (end - first) as usize].fill(value);
        }
    }

    fn set_same(&mut self, first: u64, end: u64, value: u64) {
        let (from, to) = (first.div_ceil(PAGE), end / PAGE);
        if from > to {
            return self.set_within(first, end, value);
        }
        self.set_within(first, from * PAGE, value);
        if from < to {
            self.cut(from, to);
            if value != 0 {
                self.stretches.insert(from, Stretch::Same(to - from, value));
            }
        }
        self.set_within(to * PAGE, end, value);
    }

    /// The first page of the stretch that contains `page`.
    fn at(&self, page: u64) -> Option<u64> {
        let (start, stretch) = self.stretches.range(..=page).next_back()?;
        (page - start < stretch.pages()).then_some(*start)
    }

    /// Splits a stretch so that `page` is the first page of one, if a stretch contains it.
    fn split(&mut self, page: u64) {
        if let Some(start) = self.at(page).filter(|start| *start < page)
            && let Some(Stretch::Same(pages, value)) = self.stretches.get_mut(&start)
        {
            let (rest, value) = (*pages - (page - start), *value);
            *pages = page - start;
            self.stretches.insert(page, Stretch::Same(rest, value));
        }
    }

    /// Clears the pages `from..to`.
    fn cut(&mut self, from: u64, to: u64) {
        self.split(from);
        self.split(to);
        while let Some(start) = self.stretches.range(from..to).next().map(|(start, _)| *start) {
            self.stretches.remove(&start);
        }
    }

    /// The page `page`, expanded to a value for each of its words.
    fn page(&mut self, page: u64) -> &mut [u64; PAGE as usize] {
        self.split(page);
        self.split(page + 1);
        let stretch = self.stretches.entry(page).or_insert(Stretch::Same(1, 0));
        if let Stretch::Same(_, value) = stretch {
            *stretch = Stretch::Page(Box::new([*value; PAGE as usize]));
        }
        match stretch {
            Stretch::Page(words) => words,
            Stretch::Same(..) => unreachable!("made a page above"),
        }
    }

    /// Clears the blocks from `block` on.
    pub fn clear_from(&mut self, block: u64) {
        let word = block / WORD_BLOCKS;
        self.cut(word / PAGE + 1, u64::MAX);
        if self.at(word / PAGE).is_some() {
            let page = self.page(word / PAGE);
            let at = (word % PAGE) as usize;
            page[at] &= (1 << (2 * (block % WORD_BLOCKS))) - 1;
            page[at + 1..].fill(0);
        }
    }

    /// Clears `Zero` above `overlap` bytes, where no base shows through: a block there that was never written also
    /// reads as zeros, for good, because an overlap never grows. A map in memory then takes what its data needs.
    pub fn forget_zeros_above(&mut self, overlap: u64) {
        // Whole words only; a word with blocks on both sides of the overlap stays.
        let first = overlap.div_ceil(BLOCK).div_ceil(WORD_BLOCKS);
        self.split(first.div_ceil(PAGE));
        for (start, stretch) in self.stretches.range_mut(first / PAGE..) {
            match stretch {
                Stretch::Same(_, value) if *start >= first.div_ceil(PAGE) => {
                    *value &= zeros_forgotten(*value)
                }
                Stretch::Same(..) => {}
                Stretch::Page(words) => {
                    for (word, value) in (start * PAGE..).zip(words.iter_mut()) {
                        if word >= first {
                            *value &= zeros_forgotten(*value);
                        }
                    }
                }
            }
        }
        self.stretches.retain(|_, stretch| !matches!(stretch, Stretch::Same(_, 0)));
    }

    /// The block after the last block in the data file; 0 when there is none.
    pub fn data_end(&self) -> u64 {
        self.data_end_before(u64::MAX)
    }

    /// As [`Replay::data_end`], of the blocks before `end`.
    pub fn data_end_before(&self, end: u64) -> u64 {
        let (last_word, pairs) = (end / WORD_BLOCKS, end % WORD_BLOCKS);
        // The bits of the states of the last word that are before the end.
        let before = |word: u64, value: u64| match word.cmp(&last_word) {
            Ordering::Less => value & EVEN,
            Ordering::Equal => value & EVEN & ((1 << (2 * pairs)) - 1),
            Ordering::Greater => 0,
        };
        for (page, stretch) in self.stretches.range(..=last_word / PAGE).rev() {
            let last = match stretch {
                Stretch::Same(pages, value) => {
                    let word = ((page + pages) * PAGE - 1).min(last_word);
                    let words = [word, word.saturating_sub(1).max(page * PAGE)];
                    words.into_iter().find(|word| before(*word, *value) != 0).map(|word| (word, *value))
                }
                Stretch::Page(words) => {
                    let words =
                        words.iter().enumerate().rev().map(|(at, value)| (page * PAGE + at as u64, *value));
                    words.into_iter().find(|(word, value)| before(*word, *value) != 0)
                }
            };
            if let Some((word, value)) = last {
                let pair = u64::from((63 - before(word, value).leading_zeros()) / 2);
                return word * WORD_BLOCKS + pair + 1;
            }
        }
        0
    }

    /// The state of a block; `None` for bits that are no state.
    pub fn state(&self, block: u64) -> Option<State> {
        let mut word = [0];
        self.copy_words(block / WORD_BLOCKS, &mut word);
        State::from_bits(word[0] >> (2 * (block % WORD_BLOCKS)) & 3)
    }

    /// The words that were set, in order. Some may be zeros; words that are left out are zeros.
    pub fn words(&self) -> impl Iterator<Item = (u64, Words<'_>)> {
        self.stretches.iter().map(|(page, stretch)| {
            let words = match stretch {
                Stretch::Same(pages, value) => Words::Same(pages * PAGE, *value),
                Stretch::Page(words) => Words::Each(words.as_slice()),
            };
            (page * PAGE, words)
        })
    }

    /// Copies the words from `first` on.
    pub fn copy_words(&self, first: u64, out: &mut [u64]) {
        out.fill(0);
        let end = first + out.len() as u64;
        let from = self.at(first / PAGE).unwrap_or(first / PAGE);
        for (page, stretch) in self.stretches.range(from..end.div_ceil(PAGE)) {
            let (start, stop) = (page * PAGE, (page + stretch.pages()) * PAGE);
            let (from, to) = (start.max(first), stop.min(end));
            if from >= to {
                continue;
            }
            let part = &mut out[(from - first) as usize..(to - first) as usize];
            match stretch {
                Stretch::Same(_, value) => part.fill(*value),
                Stretch::Page(words) => {
                    part.copy_from_slice(&words[(from - start) as usize..(to - start) as usize]);
                }
            }
        }
    }

    /// Approximate bytes of the runs of a rewritten map file, which contains this map without zeros. Counts words as
    /// [`Record::encode`](super::journal::Record::encode) stores them.
    pub fn encoded_len(&self) -> u64 {
        const RUN: u64 = 24;
        let run = |len: u64, is_same: bool| match len {
            0 => 0,
            _ if is_same && len > 2 => RUN + 8,
            _ => RUN + 8 * len,
        };
        let (mut bytes, mut end, mut len, mut value, mut is_same) = (0, 0, 0, 0, true);
        let mut add = |first: u64, count: u64, word: u64| {
            if first != end || len == 0 {
                bytes += run(len, is_same);
                (len, value, is_same) = (0, word, true);
            }
            is_same &= word == value;
            (end, len) = (first + count, len + count);
            // No record holds many more words than this, and each record repeats a run of one value.
            while len >= MOST_WORDS {
                bytes += run(MOST_WORDS, is_same);
                len -= MOST_WORDS;
            }
        };
        for (first, words) in self.words() {
            match words {
                Words::Same(count, word) => add(first, count, word),
                Words::Each(words) => {
                    let set = (first..).zip(words).filter(|(_, word)| **word != 0);
                    set.for_each(|(at, word)| add(at, 1, *word));
                }
            }
        }
        bytes + run(len, is_same)
    }

    /// Approximate bytes of memory.
    pub fn memory(&self) -> u64 {
        let page = |stretch: &Stretch| match stretch {
            Stretch::Same(..) => 0,
            Stretch::Page(_) => PAGE * 8,
        };
        self.stretches.values().map(|stretch| 32 + page(stretch)).sum()
    }
}

/// The word with its `Zero` blocks cleared.
pub fn without_zeros(value: u64) -> u64 {
    value & zeros_forgotten(value)
}

/// Mask of the bits of a word that stay when its `Zero` blocks are cleared: both bits of every `Data` block.
fn zeros_forgotten(value: u64) -> u64 {
    let data = value & EVEN;
    data | data << 1
}
