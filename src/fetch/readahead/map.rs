//! Which blocks were read and which were guessed: a bitmap of the regions that were touched last.

use std::collections::{HashMap, VecDeque};

/// Blocks of one region, an entry of the map.
const REGION: u64 = u64::BITS as u64;

/// Why a block was guessed; the table in the parent module explains each kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Near,
    Join,
    Dense,
    Stream,
}

impl Kind {
    pub(super) const ALL: [Self; 4] = [Self::Near, Self::Join, Self::Dense, Self::Stream];
}

#[derive(Default)]
struct Region {
    read: u64,
    /// Guessed and not read since. The two planes below have the kind of each.
    guessed: u64,
    planes: [u64; 2],
}

/// See the module.
pub(super) struct Map {
    regions: HashMap<u64, Region>,
    /// Regions in the order of their insertion; the first is forgotten first.
    order: VecDeque<u64>,
    limit: usize,
}

/// The result of a read of some blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Marked {
    /// Blocks that were not read before.
    pub(super) new: u32,
    /// Those of the new blocks that had been guessed, by kind.
    pub(super) used: [u32; Kind::ALL.len()],
}

/// The bits of `from..to`, which must lie in one region.
fn mask(from: u64, to: u64) -> u64 {
    let (low, bits) = (from % REGION, to - from);
    (u64::MAX >> (REGION - bits)) << low
}

/// Splits `from..to` at the ends of regions: index of the region, and the range.
fn pieces(from: u64, to: u64) -> impl Iterator<Item = (u64, u64, u64)> {
    let mut at = from;
    std::iter::from_fn(move || {
        if at >= to {
            return None;
        }
        let (begin, end) = (at, to.min((at / REGION + 1) * REGION));
        at = end;
        Some((begin / REGION, begin, end))
    })
}

impl Map {
    /// A map of at most `limit` regions of 64 blocks.
    pub(super) fn new(limit: usize) -> Self {
        Self { regions: HashMap::new(), order: VecDeque::new(), limit }
    }

    fn region(&mut self, index: u64) -> &mut Region {
        if !self.regions.contains_key(&index) {
            if self.order.len() >= self.limit
                && let Some(oldest) = self.order.pop_front()
            {
                self.regions.remove(&oldest);
            }
            self.order.push_back(index);
        }
        self.regions.entry(index).or_default()
    }

    fn bits(&self, index: u64) -> u64 {
        self.regions.get(&index).map_or(0, |region| region.read)
    }

    /// Notes that `from..to` was read.
    pub(super) fn mark(&mut self, from: u64, to: u64) -> Marked {
        let mut marked = Marked::default();
        for (index, begin, end) in pieces(from, to) {
            let bits = mask(begin, end);
            if self.bits(index) & bits == bits {
                continue;
            }
            let region = self.region(index);
            let new = bits & !region.read;
            marked.new += new.count_ones();
            let used = new & region.guessed;
            for kind in Kind::ALL {
                marked.used[kind as usize] += (used & region.of(kind)).count_ones();
            }
            region.read |= bits;
            region.guessed &= !bits;
        }
        marked
    }

    /// Notes that `from..to` is guessed. Returns how many of the blocks were neither read nor guessed before.
    pub(super) fn guess(&mut self, from: u64, to: u64, kind: Kind) -> u32 {
        let mut count = 0;
        for (index, begin, end) in pieces(from, to) {
            let region = self.region(index);
            let new = mask(begin, end) & !region.read & !region.guessed;
            count += new.count_ones();
            region.guessed |= new;
            for (bit, plane) in region.planes.iter_mut().enumerate() {
                let set = if kind as usize >> bit & 1 == 1 { new } else { 0 };
                *plane = *plane & !new | set;
            }
        }
        count
    }

    /// How many blocks of `from..to` were read.
    pub(super) fn count(&self, from: u64, to: u64) -> u64 {
        pieces(from, to)
            .map(|(index, begin, end)| u64::from((self.bits(index) & mask(begin, end)).count_ones()))
            .sum()
    }

    /// The first block at or after `from`, and before `to`, that was read.
    pub(super) fn next(&self, from: u64, to: u64) -> Option<u64> {
        pieces(from, to).find_map(|(index, begin, end)| {
            let bits = self.bits(index) & mask(begin, end);
            (bits != 0).then(|| index * REGION + u64::from(bits.trailing_zeros()))
        })
    }

    /// The last block of `from..to` that was read.
    pub(super) fn previous(&self, from: u64, to: u64) -> Option<u64> {
        let found = pieces(from, to).filter_map(|(index, begin, end)| {
            let bits = self.bits(index) & mask(begin, end);
            (bits != 0).then(|| index * REGION + REGION - 1 - u64::from(bits.leading_zeros()))
        });
        found.last()
    }

    /// Regions in the map.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        assert_eq!(self.regions.len(), self.order.len());
        self.regions.len()
    }
}

impl Region {
    fn of(&self, kind: Kind) -> u64 {
        let plane =
            |bit: usize| if kind as usize >> bit & 1 == 1 { self.planes[bit] } else { !self.planes[bit] };
        plane(0) & plane(1)
    }
}
