//! Maps for operators: where the bytes of a disk or of a base are, cell by cell.
//!
//! What must hold:
//! - A map takes bounded time and memory, whatever the size: it looks at `MOST_WINDOWS` windows of 62 MiB at most. When
//!   more of them have anything, the map looks at one of several, and says that it is not exact (D70).
//! - It starts no fetch, and holds no lock that a request needs for longer than one window takes (D71).

use std::ops::Range;

use super::{Below, Disk};
use crate::base::{Base, HeldRow, Holdings, ROW, UNIT};
use crate::delta::survey::{PAGE_BYTES, PAGE_WORDS, PageWords, Survey, WORD_BYTES};
use crate::format::BLOCK;

/// The most cells of a map.
pub const MOST_CELLS: usize = 4096;
/// The most windows that a map looks at.
const MOST_WINDOWS: usize = 16 << 10;
/// Rows of a base in a window.
const WINDOW_ROWS: usize = (PAGE_BYTES / ROW) as usize;
const _: () = assert!(PAGE_BYTES.is_multiple_of(ROW) && WORD_BYTES == 8 * UNIT && UNIT == 4 * BLOCK);
/// The lower bit of each block of a word.
const EVEN: u64 = 0x5555_5555_5555_5555;

/// Where a byte is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the delta.
    Delta,
    /// Nowhere: it reads as zero.
    Zero,
    /// In the persistent cache of fetched blocks.
    Cached,
    /// Requested from a server.
    Fetching,
    /// In a file of this host that the base consists of.
    Local,
    /// On a server only.
    Absent,
    /// In the base; where cannot be told without a fetch.
    Unknown,
}

impl Place {
    /// All places, in the order of [`Bytes`].
    pub const ALL: [Self; 7] =
        [Self::Delta, Self::Zero, Self::Cached, Self::Fetching, Self::Local, Self::Absent, Self::Unknown];
}

/// Bytes by place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bytes([u64; Place::ALL.len()]);

impl Bytes {
    /// Bytes that are there.
    pub fn at(&self, place: Place) -> u64 {
        self.0[place as usize]
    }

    /// Bytes in all.
    pub fn sum(&self) -> u64 {
        self.0.iter().sum()
    }

    fn add(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(sum, more)| *sum += more);
    }
}

/// A map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Map {
    /// Bytes of the disk or base.
    pub size: u64,
    /// Bytes of each cell; the last may be shorter.
    pub cell_bytes: u64,
    /// Whether all of it was looked at.
    pub exact: bool,
    /// The cells, in order.
    pub cells: Vec<Bytes>,
}

/// The base of a disk, for a map.
pub enum BaseView<'a> {
    /// There is none.
    Blank,
    /// It cannot be opened.
    Unknown,
    /// It is open.
    Open(Box<dyn Holdings + 'a>),
}

impl<'a> BaseView<'a> {
    /// Of an open base.
    pub fn of(base: &'a Base) -> Self {
        Self::Open(base.holdings())
    }

    /// Where the bytes of a window are of which neither the delta nor the caches have anything.
    fn default_place(&self) -> Place {
        match self {
            Self::Blank => Place::Zero,
            Self::Unknown => Place::Unknown,
            Self::Open(base) if base.is_local() => Place::Local,
            Self::Open(_) => Place::Absent,
        }
    }
}

/// The map of a base.
pub fn of_base(base: &Base, cells: usize) -> Map {
    draw(None, base.size(), base.size(), &BaseView::of(base), &Below::default(), cells)
}

/// The map of a disk whose delta is surveyed.
pub fn of_survey(survey: &Survey<'_>, base: &BaseView<'_>, layers: &Below, cells: usize) -> Map {
    draw(Some(survey), survey.size, survey.overlap, base, layers, cells)
}

impl Disk {
    /// Where its bytes are.
    pub fn map(&self, cells: usize) -> Map {
        let base = self.below.base.as_ref().map_or(BaseView::Blank, |base| BaseView::of(base));
        of_survey(&self.delta.survey(), &base, &self.below, cells)
    }
}

/// How many bytes of the base of a map are in memory, in each cell.
pub fn in_memory(map: &Map, base: &Base) -> Vec<u64> {
    let mut cells = vec![0; map.cells.len()];
    base.each_block_in_memory(|block| {
        let at = block.saturating_mul(BLOCK);
        // A cell is whole blocks.
        if let Some(bytes) = cells.get_mut((at / map.cell_bytes) as usize) {
            *bytes += map.size.saturating_sub(at).min(BLOCK);
        }
    });
    cells
}

/// How many bytes of `ranges` lie in each cell of a map.
pub fn bytes_in_cells(map: &Map, ranges: impl Iterator<Item = Range<u64>>) -> Vec<u64> {
    let mut cells = vec![0; map.cells.len()];
    for range in ranges {
        let end = range.end.min(map.size);
        let mut at = range.start;
        while at < end {
            let cell = at / map.cell_bytes;
            let stop = ((cell + 1) * map.cell_bytes).min(end);
            cells[cell as usize] += stop - at;
            at = stop;
        }
    }
    // Ranges may overlap.
    for (cell, bytes) in (0..).zip(&mut cells) {
        *bytes = (*bytes).min((map.size - cell * map.cell_bytes).min(map.cell_bytes));
    }
    cells
}

fn draw(
    survey: Option<&Survey<'_>>,
    size: u64,
    overlap: u64,
    base: &BaseView<'_>,
    layers: &Below,
    cells: usize,
) -> Map {
    let cell_bytes =
        size.div_ceil(cells.clamp(1, MOST_CELLS) as u64).next_multiple_of(WORD_BYTES).max(WORD_BYTES);
    let count = size.div_ceil(cell_bytes) as usize;
    let map = Map { size, cell_bytes, exact: true, cells: vec![Bytes::default(); count] };
    let mut drawing = Drawing {
        map,
        overlap,
        survey,
        base,
        layers,
        words: [0; PAGE_WORDS],
        sealed: [0; PAGE_WORDS],
        rows: [HeldRow::default(); WINDOW_ROWS],
    };
    let windows = drawing.windows();
    let every = windows.len().div_ceil(MOST_WINDOWS).max(1);
    drawing.map.exact = every == 1;
    let mut at = 0;
    let mut last = (Bytes::default(), 1);
    for (number, window) in windows.iter().enumerate() {
        let from = u64::from(*window) * PAGE_BYTES;
        let to = (from + PAGE_BYTES).min(size);
        drawing.fill(at, from);
        if number.is_multiple_of(every) {
            last = (drawing.look(*window), to - from);
        } else {
            drawing.repeat(from, to, &last.0, last.1);
        }
        at = to;
    }
    drawing.fill(at, size);
    drawing.map
}

struct Drawing<'a> {
    map: Map,
    overlap: u64,
    survey: Option<&'a Survey<'a>>,
    base: &'a BaseView<'a>,
    layers: &'a Below,
    words: PageWords,
    /// The words that layers decide, where the delta has nothing.
    sealed: PageWords,
    rows: [HeldRow; WINDOW_ROWS],
}

impl Drawing<'_> {
    /// Numbers of the windows that must be looked at, in order.
    fn windows(&self) -> Vec<u32> {
        let mut windows = self.survey.map_or_else(Vec::new, Survey::pages);
        if self.layers.has_layers() {
            windows.extend(self.layers.pages(self.overlap));
            windows.sort_unstable();
            windows.dedup();
        }
        if let BaseView::Open(base) = self.base
            && !base.is_local()
        {
            let mut row = 0;
            loop {
                row = base.next(row);
                if row.saturating_mul(ROW) >= self.overlap {
                    break;
                }
                let window = row / WINDOW_ROWS as u64;
                windows.push(window as u32);
                row = (window + 1) * WINDOW_ROWS as u64;
            }
            windows.sort_unstable();
            windows.dedup();
        }
        windows
    }

    /// Adds a range in which neither the delta nor the caches have anything.
    fn fill(&mut self, from: u64, to: u64) {
        let border = self.overlap.clamp(from, to.max(from));
        self.add(from, border, self.base.default_place());
        self.add(border, to, Place::Zero);
    }

    fn add(&mut self, from: u64, to: u64, place: Place) {
        let mut at = from;
        while at < to {
            let cell = at / self.map.cell_bytes;
            let stop = ((cell + 1) * self.map.cell_bytes).min(to);
            self.map.cells[cell as usize].0[place as usize] += stop - at;
            at = stop;
        }
    }

    /// Adds a window that is not looked at, in the proportions of one that was. A window has at most two cells then.
    fn repeat(&mut self, from: u64, to: u64, like: &Bytes, bytes: u64) {
        let mut at = from;
        while at < to {
            let cell = at / self.map.cell_bytes;
            let stop = ((cell + 1) * self.map.cell_bytes).min(to);
            let share = |all: u64| (u128::from(all) * u128::from(stop - at) / u128::from(bytes)) as u64;
            let mut part = Bytes(like.0.map(share));
            // What rounding loses goes to the place with most.
            let lost = stop - at - part.sum();
            if let Some(most) = part.0.iter_mut().max() {
                *most += lost;
            }
            self.map.cells[cell as usize].add(&part);
            at = stop;
        }
    }

    /// Adds a window. Returns its bytes by place.
    fn look(&mut self, window: u32) -> Bytes {
        match self.survey {
            Some(survey) => survey.read(window, &mut self.words),
            None => self.words.fill(0),
        }
        self.layers.page(window, &mut self.sealed);
        let from = u64::from(window) * PAGE_BYTES;
        let mut empty = HeldRow::default();
        match self.base {
            BaseView::Unknown => empty.unknown = u64::MAX,
            BaseView::Open(base) if base.is_local() => empty.local = u64::MAX,
            BaseView::Blank => empty.zero = u64::MAX,
            BaseView::Open(_) => {}
        }
        self.rows.fill(empty);
        if let BaseView::Open(base) = self.base
            && !base.is_local()
            && from < self.overlap
        {
            base.rows(from / ROW, &mut self.rows);
        }
        let mut all = Bytes::default();
        for word in 0..PAGE_WORDS {
            let at = from + word as u64 * WORD_BYTES;
            if at >= self.map.size {
                break;
            }
            let bytes = self.word(word, at);
            self.map.cells[(at / self.map.cell_bytes) as usize].add(&bytes);
            all.add(&bytes);
        }
        all
    }

    /// The bytes of one word by place.
    fn word(&self, word: usize, at: u64) -> Bytes {
        // A mask of the blocks below an offset, one bit for each block.
        let below = |offset: u64| match offset.saturating_sub(at).div_ceil(BLOCK) {
            blocks @ 0..32 => EVEN & ((1 << (2 * blocks)) - 1),
            _ => EVEN,
        };
        let (valid, value) = (below(self.map.size), self.words[word]);
        let mut data = value & valid;
        let mut cleared = (value >> 1) & valid & !data;
        let unmapped = valid & !data & !cleared;
        let mut through = unmapped & below(self.overlap);
        let sealed = self.sealed[word];
        data |= through & sealed;
        cleared |= through & (sealed >> 1) & !sealed;
        through &= !(sealed | sealed >> 1);
        let unmapped = valid & !data & !cleared;
        let row = &self.rows[word / 8];
        let units = |bits: u64| spread(bits >> (word % 8 * 8));
        let mut rest = through;
        let mut take = |bits: u64| {
            let taken = rest & units(bits);
            rest &= !taken;
            taken
        };
        let (zero, local, cached) = (take(row.zero), take(row.local), take(row.cached));
        let (fetching, unknown) = (take(row.fetching), take(row.unknown));
        let zero = zero | cleared | (unmapped & !through);
        let masks = [data, zero, cached, fetching, local, rest, unknown];
        let mut bytes = Bytes(masks.map(|mask| u64::from(mask.count_ones()) * BLOCK));
        let beyond = (at + WORD_BYTES).saturating_sub(self.map.size) % BLOCK;
        if beyond > 0 {
            // The last block of the disk is shorter.
            let last = 1 << (63 - valid.leading_zeros());
            let of_last = masks.iter().position(|mask| mask & last != 0);
            if let Some(place) = of_last {
                bytes.0[place] -= beyond;
            }
        }
        bytes
    }
}

/// The blocks of a word that the eight lowest bits stand for: a unit has four blocks, which are eight bits of the word.
fn spread(bits: u64) -> u64 {
    const ONES: u64 = 0x0101_0101_0101_0101;
    // Byte n keeps bit n; then each byte that is not 0 becomes 0xff.
    let bytes = (bits & 0xff).wrapping_mul(ONES) & 0x8040_2010_0804_0201;
    ((bytes + 0x7f * ONES) >> 7 & ONES) * 0xff
}

#[cfg(test)]
mod tests;
