//! The map of a delta, page by page, for the maps that operators look at.
//!
//! What must hold: it takes no lock and changes nothing. The live map is read while writers change it: a page has the
//! words of some moment of the reading.

use super::map::{LiveMap, WORDS};
use super::recovery::open_map_file;
use super::{Delta, DeltaError, DeltaIo, DeltaSpec};
use crate::format::BLOCK;
use crate::format::journal::WORD_BLOCKS;
use crate::format::replay::{Replay, Words};

/// Words of a page.
pub const PAGE_WORDS: usize = WORDS as usize;
/// Bytes of the disk that a word is about.
pub const WORD_BYTES: u64 = WORD_BLOCKS * BLOCK;
/// Bytes of the disk that a page is about.
pub const PAGE_BYTES: u64 = WORDS * WORD_BYTES;

/// The words of a page: two bits for each block, [`State`](crate::format::journal::State).
pub type PageWords = [u64; PAGE_WORDS];

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
    pub fn survey_durable(spec: &DeltaSpec, delta_io: &DeltaIo) -> Result<Survey<'static>, DeltaError> {
        let (journal, _) = open_map_file(spec, delta_io)?;
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
}
