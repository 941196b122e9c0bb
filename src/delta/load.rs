//! Fills a live map from a map file.
//!
//! What must hold: the memory beside the live map is bounded, however long the file is. So the records are read from the
//! last one to the first: the first value of a word is the one that counts, and a page of the live map is made only for
//! words that stay. What is noted meanwhile are the words that are decided: a bit for each page, and 62 bytes for each
//! page of which only a part is (D99).

use std::collections::HashMap;
use std::io;

use super::DeltaError;
use super::map::{LiveMap, WORDS};
use crate::format::BLOCK;
use crate::format::journal::{Journal, ReadError, WORD_BLOCKS};
use crate::format::replay::{Words, without_zeros};
use crate::io::MediumFile;
use crate::mutant::Mutant;

/// The lower bit of each block: the state `Data`.
const EVEN: u64 = 0x5555_5555_5555_5555;
/// Words of 64 bits with a bit for each word of a page.
const BITS: usize = WORDS.div_ceil(64) as usize;

/// The words whose value is known.
#[derive(Default)]
struct Decided {
    /// A bit for each page of which all words are.
    pages: Vec<u64>,
    /// The pages of which some are.
    parts: HashMap<u64, [u64; BITS]>,
}

impl Decided {
    /// Whether all words of a page are decided.
    fn has(&self, page: u64) -> bool {
        self.pages.get((page / 64) as usize).is_some_and(|bits| bits & 1 << (page % 64) != 0)
    }

    /// The first page from `page` on of which not all words are decided.
    fn next(&self, mut page: u64) -> u64 {
        while let Some(bits) = self.pages.get((page / 64) as usize) {
            let open = !bits & u64::MAX << (page % 64);
            if open != 0 {
                return page / 64 * 64 + u64::from(open.trailing_zeros());
            }
            page = (page / 64 + 1) * 64;
        }
        page
    }

    /// Decides the words `from..to` of a page. Calls `each` for those that were not decided.
    fn decide(
        &mut self,
        page: u64,
        (from, to): (u64, u64),
        mut each: impl FnMut(u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let part = self.parts.entry(page).or_default();
        for word in from..to {
            let (bits, bit) = (&mut part[(word / 64) as usize], 1 << (word % 64));
            if *bits & bit == 0 {
                *bits |= bit;
                each(word)?;
            }
        }
        if part.iter().map(|bits| u64::from(bits.count_ones())).sum::<u64>() == WORDS {
            self.parts.remove(&page);
            let at = (page / 64) as usize;
            if at >= self.pages.len() {
                self.pages.resize(at + 1, 0);
            }
            self.pages[at] |= 1 << (page % 64);
        }
        Ok(())
    }
}

/// Reads the map of a file from the last record to the first. Calls `set` once for each word that is not 0.
fn each_word(
    journal: &Journal<()>,
    file: &dyn MediumFile,
    mut set: impl FnMut(u64, u64) -> io::Result<()>,
) -> Result<(), ReadError<io::Error>> {
    let mut decided = Decided::default();
    journal.words_backwards(
        |buf, at| file.read_at(buf, at),
        |first, words| {
            let (count, value): (u64, &dyn Fn(u64) -> u64) = match words {
                Words::Same(count, value) => (count, &move |_| value),
                Words::Each(words) => (words.len() as u64, &move |at| words[at as usize]),
            };
            let end = first + count;
            let mut page = first / WORDS;
            while page * WORDS < end {
                if decided.has(page) {
                    page = decided.next(page);
                    continue;
                }
                let start = page * WORDS;
                let within = (first.max(start) - start, end.min(start + WORDS) - start);
                decided.decide(page, within, |word| match value(start + word - first) {
                    0 => Ok(()),
                    value => set(start + word, value),
                })?;
                page += 1;
            }
            Ok(())
        },
    )
}

fn failed(name: &str, error: ReadError<io::Error>) -> DeltaError {
    match error {
        ReadError::Format(source) => DeltaError::Damaged { file: name.into(), source },
        ReadError::Source(error) => DeltaError::io("creating the live map")(error),
    }
}

/// The block after the last block in the data file; 0 when there is none.
#[derive(Clone, Copy, Default)]
pub(super) struct DataEnd(u64);

impl DataEnd {
    /// Notes the data of a word whose bytes must be in the data file: not that of blocks that the map file carries.
    fn note(&mut self, journal: &Journal<()>, word: u64, mut value: u64) {
        for (block, _) in journal.carried.range(word * WORD_BLOCKS..(word + 1) * WORD_BLOCKS) {
            value &= !(3 << (2 * (block % WORD_BLOCKS)));
        }
        if value & EVEN != 0 {
            let pair = u64::from((63 - (value & EVEN).leading_zeros()) / 2);
            self.0 = self.0.max(word * WORD_BLOCKS + pair + 1);
        }
    }

    pub(super) fn block(&self) -> u64 {
        self.0
    }
}

/// Finds the end of the data that the map of a file claims.
///
/// # Errors
/// `Damaged`; errors of the storage.
pub(super) fn data_end(
    journal: &Journal<()>,
    file: &dyn MediumFile,
    name: &str,
) -> Result<DataEnd, DeltaError> {
    let mut end = DataEnd::default();
    let noted = each_word(journal, file, |word, value| {
        end.note(journal, word, value);
        Ok(())
    });
    noted.map_err(|error| failed(name, error))?;
    Ok(end)
}

impl LiveMap {
    /// Loads the map of a file without marking it dirty. No other thread uses the map yet. Returns the end of the data that
    /// it claims.
    ///
    /// # Errors
    /// ENOSPC when the memory filesystem is full; `Damaged` when the file is not what was read before.
    pub(super) fn load(
        &self,
        journal: &Journal<()>,
        file: &dyn MediumFile,
        name: &str,
    ) -> Result<DataEnd, DeltaError> {
        let mut end = DataEnd::default();
        // Above the overlap nothing shows through: a block there that was never written also reads as zeros, for good,
        // because an overlap never grows. The map then takes what its data needs.
        let overlap = if Mutant::ZeroForgotten.is_active() { 0 } else { journal.overlap };
        let hidden = overlap.div_ceil(BLOCK).div_ceil(WORD_BLOCKS);
        let loaded = each_word(journal, file, |word, value| {
            end.note(journal, word, value);
            let value = if word < hidden { value } else { without_zeros(value) };
            if value != 0 { self.load_word(word, value) } else { Ok(()) }
        });
        loaded.map_err(|error| failed(name, error))?;
        Ok(end)
    }
}
