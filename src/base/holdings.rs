//! Where the bytes of a virtual disk are that an image encodes: each unit is where the bytes of the file are of which it
//! is made.
//!
//! Finding the place of a unit may read a table of the image from a disk of this host. So the number of units that are
//! looked at is bounded, and the time; a unit that is not looked at is where the last one before it is, or unknown.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use super::stack::{Place, Stack};
use crate::source::Source;
use crate::source::holdings::{HeldRow, Holdings, ROW, UNIT, without_fetches};

/// Units that are looked at.
const MOST_PLACES: u64 = 128 << 10;
/// How long units are looked at.
const LONGEST: Duration = Duration::from_millis(500);

/// Which bit of a row a unit gets.
#[derive(Clone, Copy)]
enum Held {
    Zero,
    Local,
    Cached,
    Fetching,
    Absent,
    Unknown,
}

/// A file of the base, with the row that was asked for last.
struct File<'a> {
    source: &'a dyn Source,
    holdings: Box<dyn Holdings + 'a>,
    last: Option<(u64, HeldRow)>,
}

pub(super) struct StackHoldings<'a> {
    stack: &'a Stack,
    files: RefCell<Vec<File<'a>>>,
    /// One unit of so many is looked at.
    stride: u64,
    begun: Instant,
}

impl<'a> StackHoldings<'a> {
    pub fn of(stack: &'a Stack) -> Self {
        let file = |source: &'a dyn Source| File { source, holdings: source.holdings(), last: None };
        let files = RefCell::new(stack.sources().map(file).collect());
        let stride = stack.size().div_ceil(UNIT).div_ceil(MOST_PLACES).max(1);
        Self { stack, files, stride, begun: Instant::now() }
    }

    /// Where the bytes at `offset` are.
    fn at(&self, offset: u64) -> Held {
        if self.begun.elapsed() > LONGEST {
            return Held::Unknown;
        }
        let (source, at) = match without_fetches(|| self.stack.place(offset, UNIT)) {
            Ok((Place::Zero, _)) => return Held::Zero,
            Ok((Place::Plain(source, at), _)) => (source, at),
            Ok((Place::Compressed(source, _, what), _)) => (source, what.at),
            Err(_) => return Held::Unknown,
        };
        let mut files = self.files.borrow_mut();
        let Some(file) = files.iter_mut().find(|file| std::ptr::addr_eq(file.source, source)) else {
            return Held::Unknown;
        };
        let row = match file.last {
            Some((no, row)) if no == at / ROW => row,
            _ => {
                let mut row = [HeldRow::default()];
                file.holdings.rows(at / ROW, &mut row);
                file.last = Some((at / ROW, row[0]));
                row[0]
            }
        };
        let bit = 1 << (at % ROW / UNIT);
        match row {
            _ if row.local & bit != 0 => Held::Local,
            _ if row.cached & bit != 0 => Held::Cached,
            _ if row.fetching & bit != 0 => Held::Fetching,
            _ if row.unknown & bit != 0 => Held::Unknown,
            _ => Held::Absent,
        }
    }
}

impl Holdings for StackHoldings<'_> {
    fn rows(&self, first: u64, rows: &mut [HeldRow]) {
        let mut held = Held::Absent;
        for (no, row) in (first..).zip(rows) {
            for at in 0..64 {
                let unit = no * 64 + at;
                if unit * UNIT >= self.stack.size() {
                    return;
                }
                if unit.is_multiple_of(self.stride) || unit == first * 64 {
                    held = self.at(unit * UNIT);
                }
                match held {
                    Held::Zero => row.zero |= 1 << at,
                    Held::Local => row.local |= 1 << at,
                    Held::Cached => row.cached |= 1 << at,
                    Held::Fetching => row.fetching |= 1 << at,
                    Held::Unknown => row.unknown |= 1 << at,
                    Held::Absent => {}
                }
            }
        }
    }
}
