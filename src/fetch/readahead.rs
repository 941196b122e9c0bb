//! Readahead: which blocks to fetch in addition to those that a reader needs. Pure logic: no I/O, no clock, no
//! randomness.
//!
//! A round trip costs as much as a megabyte, and a wrong guess costs bytes on the network. So the policy guesses where
//! the layout of a filesystem and the way a kernel reads it make a good guess likely, and suspends each kind of guess
//! while it does not pay. A block here is a cache block: [`BLOCK`] bytes of the source.
//!
//! | guess | when | why it is good |
//! | --- | --- | --- |
//! | near | a read misses | the bytes behind a small read belong to the same file, directory or table; the bytes behind consecutive reads are read next |
//! | join | a read misses close to blocks that were read; the distance may be larger when that was just now | both belong to one file: a reader of a program reads its header and its end first, then the bytes between. Of a gap that is too large, the beginning is fetched |
//! | dense | most of an aligned region of 512 KiB to 4 MiB was read | the rest follows: tables of inodes, directories, files that were installed together |
//! | stream | more than 1 MiB of consecutive reads, upwards or downwards | the classic readahead: half as far ahead as was read in a row, at most [`Readahead::LONGEST`], in requests of 1 MiB |
//!
//! What must hold:
//! - A guess of each kind is scored when its block is read. When too few guesses of a kind are used, the kind is held
//!   back: the policy then makes only every `PROBE`th guess, to notice when the kind pays again. So a random reader
//!   fetches little more than it reads.
//! - Repeating a read changes nothing, because the same read runs again after each completion.
//! - Memory is bounded, whatever the size of the object (`REGIONS`). A forgotten region counts as never read.
//!
//! The numbers in `NUMBERS` come from `scripts/search-readahead`: recorded boots (tests/data/README.md) replayed on a
//! simulated link of 1 Gbit/s, 10 ms away. `readahead/tests.rs` replays them and holds the bounds, and prints the figures
//! with `--nocapture`.

#[cfg(test)]
mod link;
mod map;
#[cfg(test)]
mod search;
mod stream;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use map::{Kind, Map};
use stream::{Following, REQUEST, Streams};

/// Bytes of a cache block.
pub const BLOCK: u64 = 16 * 1024;

/// Regions of 1 MiB in the map: 16 GiB of reads, in less than 1.5 MiB of memory.
const REGIONS: usize = 16 * 1024;
/// Blocks that a kind of guess must have guessed before it is judged. It is held back when less than one in
/// [`MIN_USED`] of them was read. That share is small, because a boot reads much of what was guessed early only late; a
/// random reader stays below it.
const MIN_SAMPLE: u32 = 256;
const MIN_USED: u32 = 16;
/// While a kind is held back, the policy makes one guess in this many, of at most [`PROBE_BLOCKS`].
const PROBE: u32 = 32;
const PROBE_BLOCKS: u64 = 8;
/// The farthest distance at which the policy looks for earlier reads, blocks.
const FAR: u64 = 256;

/// What to fetch in addition: ranges (first block, count) in order of urgency. They may overlap blocks that are
/// present. The caller best makes one request of each range. A range that continues the blocks that a reader waits for
/// can go into the same request at no cost to the reader, because the awaited blocks come first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Advice {
    pub ranges: Vec<(u64, u64)>,
}

/// What to guess around a read that missed, by the length of the read. All in blocks, at most [`FAR`].
#[derive(Clone, Copy, Debug)]
struct Rule {
    /// The longest read that this rule is for.
    longest: u64,
    /// Blocks to guess after the read in any case.
    ahead: u64,
    /// Blocks to guess after the read in a dense area, at most. An area is dense when, of this many blocks on both
    /// sides, at least `density` 64ths were read.
    dense: u64,
    density: u64,
    /// The largest gap to fill between the read and earlier reads: after the read, and in front of it.
    join: [u64; 2],
    /// The same when the other side of the gap was read just now.
    join_now: [u64; 2],
    /// For a larger gap in front of the read whose other side was read just now: blocks to guess from its beginning.
    head: u64,
    /// The largest such gap.
    head_gap: u64,
    /// Blocks to guess beyond a read that follows others: quarters of the length that was read in a row.
    follow: u64,
}

/// The parameters of the policy.
#[derive(Clone, Copy, Debug)]
struct Numbers {
    rules: [Rule; 5],
    /// "Just now" means: one of this many last different reads.
    now: u64,
    /// A guess that ends this close to blocks that were read is extended up to them.
    bridge: u64,
    /// How many 64ths of an aligned region must have been read for the rest to be guessed.
    thick: u64,
    /// A read of the very first block guesses up to this block.
    first: u64,
}

const NUMBERS: Numbers = Numbers {
    rules: [
        Rule {
            longest: 1,
            ahead: 1,
            dense: 64,
            density: 96,
            join: [32, 6],
            join_now: [6, 16],
            head: 4,
            head_gap: 48,
            follow: 0,
        },
        Rule {
            longest: 3,
            ahead: 0,
            dense: 4,
            density: 24,
            join: [4, 4],
            join_now: [192, 4],
            head: 24,
            head_gap: 48,
            follow: 0,
        },
        Rule {
            longest: 6,
            ahead: 1,
            dense: 0,
            density: 48,
            join: [8, 80],
            join_now: [4, 128],
            head: 32,
            head_gap: 128,
            follow: 0,
        },
        Rule {
            longest: 8,
            ahead: 1,
            dense: 0,
            density: 32,
            join: [192, 6],
            join_now: [16, 96],
            head: 4,
            head_gap: 48,
            follow: 6,
        },
        Rule {
            longest: u64::MAX,
            ahead: 1,
            dense: 0,
            density: 16,
            join: [24, 16],
            join_now: [48, 96],
            head: 24,
            head_gap: 128,
            follow: 6,
        },
    ],
    now: 3,
    bridge: 2,
    thick: 51,
    first: 32,
};

/// How well a kind of guess pays, in blocks. `guessed` and `used` are halved now and then, so that old guesses count
/// less.
#[derive(Clone, Copy, Debug, Default)]
struct Score {
    guessed: u32,
    used: u32,
    /// Guesses since the kind was held back.
    held_back: u32,
}

impl Score {
    /// How many blocks of a guess of `blocks` blocks the policy makes.
    fn allowed(&mut self, blocks: u64) -> u64 {
        if self.guessed < MIN_SAMPLE || self.used >= self.guessed / MIN_USED {
            return blocks;
        }
        self.held_back += 1;
        if self.held_back.is_multiple_of(PROBE) { blocks.min(PROBE_BLOCKS) } else { 0 }
    }

    /// Readers read `blocks` guessed blocks. If the kind is held back, its next guess is made at once.
    fn note_used(&mut self, blocks: u32) {
        self.used += blocks;
        if blocks > 0 {
            self.held_back = PROBE - 1;
        }
    }

    fn guess(&mut self, blocks: u32) {
        self.guessed += blocks;
        while self.guessed > 2 * MIN_SAMPLE {
            self.guessed /= 2;
            self.used /= 2;
        }
    }
}

/// The readahead of one source; the caller holds its lock. See the module.
pub struct Readahead {
    /// Blocks of the object.
    blocks: u64,
    map: Map,
    streams: Streams,
    /// The last reads that read new blocks, the latest first.
    recent: VecDeque<(u64, u64)>,
    scores: [Score; Kind::ALL.len()],
    numbers: Numbers,
}

impl Readahead {
    /// The farthest that a stream is fetched ahead, blocks: 8 MiB, six times what a link of 1 Gbit/s holds at 10 ms.
    pub const LONGEST: u64 = 512;

    /// For an object of `blocks` cache blocks, the last of which may be short.
    pub fn new(blocks: u64) -> Self {
        Self::with(blocks, NUMBERS)
    }

    fn with(blocks: u64, numbers: Numbers) -> Self {
        Self {
            blocks,
            map: Map::new(REGIONS),
            streams: Streams::new(Self::LONGEST),
            recent: VecDeque::new(),
            scores: Default::default(),
            numbers,
        }
    }

    /// A reader reads `count` blocks from `first` on. `missing`: not all of them are present or in transit. `present`
    /// tells whether a block is present or in transit; it is called for few blocks.
    pub fn read(&mut self, first: u64, count: u64, missing: bool, present: &dyn Fn(u64) -> bool) -> Advice {
        let end = first.saturating_add(count).min(self.blocks);
        if first >= end {
            return Advice::default();
        }
        let marked = self.map.mark(first, end);
        for (score, used) in self.scores.iter_mut().zip(marked.used) {
            score.note_used(used);
        }
        let mut ranges = Vec::new();
        // A repeated read that misses nothing needs nothing. It also predicts nothing: other VMs boot from this source.
        if marked.new == 0 && !missing {
            return Advice::default();
        }
        match self.streams.read(first, end) {
            Following::No { run, down } if missing => self.around(first, end, run, down, &mut ranges),
            Following::No { .. } => {}
            Following::Yes(ahead) => {
                for (from, to) in ahead {
                    self.guess(from, to, Kind::Stream, first, &mut ranges);
                }
            }
        }
        if marked.new > 0 {
            self.recent.push_front((first, end));
            self.recent.truncate(self.numbers.now as usize);
        }
        Advice { ranges: ranges.into_iter().filter_map(|range| missing_part(range, present)).collect() }
    }

    /// Guesses around a read that missed and belongs to no stream.
    fn around(&mut self, first: u64, end: u64, run: u64, down: bool, ranges: &mut Vec<(u64, u64)>) {
        let Numbers { rules, bridge, thick, .. } = self.numbers;
        let Some(rule) = rules.into_iter().find(|rule| end - first <= rule.longest) else { return };

        let mut near = end + rule.ahead;
        for size in [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64] {
            if size <= rule.dense
                && self.map.count(first.saturating_sub(size), end + size) * 64 >= rule.density * size
            {
                near = near.max(end + size);
            }
        }
        if first == 0 {
            near = near.max(self.numbers.first);
        }
        let follow = if run > end - first { (run * rule.follow / 4).min(REQUEST) } else { 0 };
        let behind = if down { follow } else { 0 };
        if !down {
            near = near.max(end + follow);
        }
        let next = self.map.next(end, end + FAR);
        let previous = self.map.previous(first.saturating_sub(FAR), first);
        let just_now = |block: u64| self.recent.iter().any(|(from, to)| (*from..*to).contains(&block));
        let largest = |now: bool, side: usize| {
            if now { rule.join[side].max(rule.join_now[side]) } else { rule.join[side] }
        };
        let joined_after = next.filter(|next| next - end <= largest(just_now(*next), 0));
        let mut joined_before = None;
        let mut head = None;
        if let Some(previous) = previous {
            let (gap, now) = (first - previous - 1, just_now(previous));
            if gap <= largest(now, 1) {
                joined_before = Some(previous + 1);
            } else if now && gap <= rule.head_gap {
                head = Some((previous + 1, previous + 1 + rule.head.min(gap)));
            }
        }
        let mut dense = None;
        for bits in (5..=8).rev() {
            let (size, mask) = (1 << bits, (1 << bits) - 1);
            let thick = |at: u64| self.map.count(at, at + size) * 64 >= thick * size;
            let (low, high) = (first & !mask, (end - 1) & !mask);
            match (thick(low), thick(high)) {
                (false, false) => continue,
                (true, true) => dense = Some((low, high + size)),
                (true, false) => dense = Some((low, low + size)),
                (false, true) => dense = Some((high, high + size)),
            }
            break;
        }

        let (mut low, mut high) = (first, end);
        let mut add = |kind: Kind, from: u64, to: u64| {
            if let Some((from, to)) = self.allow(kind, from, to, first) {
                (low, high) = (low.min(from), high.max(to));
            }
        };
        add(Kind::Near, end, near);
        add(Kind::Near, first.saturating_sub(behind), first);
        if let Some(next) = joined_after {
            add(Kind::Join, end, next);
        }
        if let Some(from) = joined_before {
            add(Kind::Join, from, first);
        }
        if let Some((from, to)) = dense {
            add(Kind::Dense, from, first);
            add(Kind::Dense, end, to);
        }
        if high > end
            && let Some(next) = self.map.next(high, high + bridge + 1)
            && let Some((_, to)) = self.allow(Kind::Near, high, next, first)
        {
            high = to;
        }
        if low < first
            && let Some(previous) = self.map.previous(low.saturating_sub(bridge + 1), low)
            && let Some((from, _)) = self.allow(Kind::Near, previous + 1, low, first)
        {
            low = from;
        }
        ranges.extend([(end, high.min(self.blocks)), (low, first)]);
        if let Some((from, to)) = head {
            self.guess(from, to, Kind::Join, first, ranges);
        }
    }

    fn guess(&mut self, from: u64, to: u64, kind: Kind, reader: u64, ranges: &mut Vec<(u64, u64)>) {
        ranges.extend(self.allow(kind, from, to, reader));
    }

    /// The part of a guess that the policy makes, next to the reader's block. Notes the guess.
    fn allow(&mut self, kind: Kind, from: u64, to: u64, reader: u64) -> Option<(u64, u64)> {
        let to = to.min(self.blocks);
        if from >= to {
            return None;
        }
        let score = &mut self.scores[kind as usize];
        let blocks = score.allowed(to - from);
        let (from, to) = if from >= reader { (from, from + blocks) } else { (to - blocks, to) };
        score.guess(self.map.guess(from, to, kind));
        (from < to).then_some((from, to))
    }
}

/// The range without the present blocks at both ends, as (first, count).
fn missing_part((mut from, mut to): (u64, u64), present: &dyn Fn(u64) -> bool) -> Option<(u64, u64)> {
    while from < to && present(from) {
        from += 1;
    }
    while from < to && present(to - 1) {
        to -= 1;
    }
    (from < to).then_some((from, to - from))
}
