//! The map of a delta, page by page, for the maps that operators look at.
//!
//! What must hold: it takes no lock and changes nothing. The live map is read while writers change it: a page has the
//! words of some moment of the reading.

use super::map::{LiveMap, WORDS};
use super::recovery::open_map_file;
use super::{Delta, DeltaError, DeltaSpec};
use crate::format::BLOCK;
use crate::format::journal::{State, WORD_BLOCKS};
use crate::format::replay::{Replay, Words};
use crate::io::Medium;

/// Words of a page.
pub const PAGE_WORDS: usize = WORDS as usize;
/// Bytes of the disk that a word is about.
pub const WORD_BYTES: u64 = WORD_BLOCKS * BLOCK;
/// Bytes of the disk that a page is about.
pub const PAGE_BYTES: u64 = WORDS * WORD_BYTES;

/// The words of a page: two bits for each block, [`State`].
pub type PageWords = [u64; PAGE_WORDS];

/// Consecutive blocks of one state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first block.
    pub first: u64,
    /// The block behind the last one.
    pub end: u64,
    /// `Data` or `Zero`.
    pub state: State,
}

/// The map of a delta at one moment.
pub struct Survey<'a> {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes from the start that fall through where the map has nothing.
    pub overlap: u64,
    words: MapWords<'a>,
}

enum MapWords<'a> {
    Live(&'a LiveMap),
    Durable(Replay),
}

impl Delta {
    /// The live map.
    pub fn survey(&self) -> Survey<'_> {
        let (size, overlap) = (self.size(), self.overlap());
        Survey { size, overlap: overlap.min(size), words: MapWords::Live(&self.map) }
    }

    /// The durable map of a disk that is not attached. Takes memory for the map that the file has. Changes nothing; when
    /// the disk is attached meanwhile, it may fail.
    ///
    /// # Errors
    /// As [`Delta::open`].
    pub fn survey_durable(spec: &DeltaSpec, medium: &dyn Medium) -> Result<Survey<'static>, DeltaError> {
        let (journal, _) = open_map_file::<Replay>(spec, medium)?;
        let (size, overlap, words) = match journal {
            Some(journal) => (journal.size, journal.overlap, journal.map),
            None => (spec.size, spec.overlap, Replay::default()),
        };
        Ok(Survey { size, overlap: overlap.min(size), words: MapWords::Durable(words) })
    }
}

impl Survey<'_> {
    /// Numbers of the pages that may have words, in order.
    pub fn pages(&self) -> Vec<u32> {
        let end = self.size.div_ceil(PAGE_BYTES) as u32;
        let mut pages: Vec<u32> = Vec::new();
        match &self.words {
            MapWords::Live(map) => {
                pages.extend(map.pages().map(|page| page as u32).take_while(|page| *page < end))
            }
            MapWords::Durable(map) => {
                for (first, words) in map.words() {
                    let len = match words {
                        Words::Same(len, _) => len,
                        Words::Each(words) => words.len() as u64,
                    };
                    let from = (first / WORDS) as u32;
                    let from = pages.last().map_or(from, |last| from.max(last + 1));
                    let to = (first + len).div_ceil(WORDS).min(u64::from(end)) as u32;
                    pages.extend(from..to);
                }
            }
        }
        pages
    }

    /// Copies the words of a page.
    pub fn read(&self, page: u32, words: &mut PageWords) {
        match &self.words {
            MapWords::Live(map) => map.copy_page(u64::from(page), words),
            MapWords::Durable(map) => map.copy_words(u64::from(page) * WORDS, words),
        }
    }

    /// Calls `each` for every run of blocks that are `Data` or `Zero`, in order. Neighbours of one state are one run.
    pub fn runs(&self, each: &mut dyn FnMut(Run)) {
        const EVEN: u64 = 0x5555_5555_5555_5555;
        let mut last: Option<Run> = None;
        let mut add = |first: u64, blocks: u64, state: State| match &mut last {
            Some(run) if run.state == state && run.end == first => run.end += blocks,
            _ => {
                let next = (state != State::Unmapped).then_some(Run { first, end: first + blocks, state });
                std::mem::replace(&mut last, next).into_iter().for_each(&mut *each);
            }
        };
        let mut words = Box::new([0; PAGE_WORDS]);
        for page in self.pages() {
            self.read(page, &mut words);
            for (word, value) in (u64::from(page) * WORDS..).zip(words.iter()) {
                let mut block = 0;
                while block < WORD_BLOCKS {
                    let rest = value >> (2 * block);
                    // As everywhere, bits that are no state read as zeros.
                    let state = State::from_bits(rest & 3).unwrap_or(State::Zero);
                    let differs = rest ^ (EVEN * (rest & 3)) >> (2 * block);
                    let same = u64::from(differs.trailing_zeros() / 2).min(WORD_BLOCKS - block);
                    add(word * WORD_BLOCKS + block, same, state);
                    block += same;
                }
            }
        }
        last.into_iter().for_each(each);
    }
}
