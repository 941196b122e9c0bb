//! Which blocks to fetch besides those that a reader asked for. Pure logic: no I/O, no clock, no randomness.
//!
//! A round trip costs as much as a megabyte, and a wrong guess costs bytes that somebody pays for. So a guess is made
//! where the layout of a filesystem and the way a kernel reads it make it a good one, and each way of guessing is
//! stopped while it does not pay. Cache blocks here: [`BLOCK`] bytes of the source.
//!
//! | guess | when | why it is good |
//! | --- | --- | --- |
//! | near | a read misses | what follows a small read belongs to the same file, directory or table; what follows reads in a row is read next |
//! | join | a read misses not far from what was read, further when that was just now | both belong to one file: of a program the header and the end are read first, then what is between. A gap that is too large is filled from its beginning |
//! | dense | most of an aligned region of 512 KiB to 4 MiB was read | the rest follows: tables of inodes, directories, what was installed together |
//! | stream | more than 1 MiB in a row, either way | the classic readahead: as far ahead as half of what was read in a row, at most [`Readahead::LONGEST`], in requests of 1 MiB |
//!
//! What must hold:
//! - A guess of each kind is scored when its block is read. A kind of which too little was used is held back: then only
//!   every `PROBE`th guess is made, to notice when it pays again. So whoever reads at random fetches what it reads.
//! - Repeating a read changes nothing: the same read is run again after each arrival.
//! - Memory is bounded whatever the object's size (`REGIONS`); what was forgotten counts as never read.
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

/// Regions of 1 MiB that are remembered: 16 GiB of what was read, in less than 1.5 MiB of memory.
const REGIONS: usize = 16 * 1024;
/// A kind of guess is judged when it has guessed so many blocks, and held back when less than one in [`LEAST`] was
/// read. That is few, because a boot reads late much of what was guessed early; who reads at random reaches less.
const ENOUGH: u32 = 256;
const LEAST: u32 = 16;
/// While it is held back, one guess in so many is made, and none of more than [`PROBE_BLOCKS`].
const PROBE: u32 = 32;
const PROBE_BLOCKS: u64 = 8;
/// Nothing is looked for further away, blocks.
const FAR: u64 = 256;

/// What to fetch besides what was asked for, ranges (first block, count) in order of urgency. They may overlap what
/// is here. Requests are best made of them as they are: one that goes on behind the blocks that a reader waits for
/// costs that reader nothing, since they come first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Advice {
    pub ranges: Vec<(u64, u64)>,
}

/// What to guess around a read that missed, by its length. All in blocks, none more than [`FAR`].
#[derive(Clone, Copy, Debug)]
struct Habit {
    /// The longest read that this is for.
    longest: u64,
    /// Guessed after the read in any case.
    ahead: u64,
    /// Guessed after the read where it is dense: at most so many, and of so many to both sides this many 64ths read.
    dense: u64,
    density: u64,
    /// The largest gap to fill to what was read before: after the read, and in front of it.
    join: [u64; 2],
    /// The same when the other side was read just now.
    join_now: [u64; 2],
    /// Of a gap in front that is larger than that, to what was read just now: so many blocks of its beginning.
    head: u64,
    /// The largest such gap.
    head_gap: u64,
    /// Guessed further on, where the read follows others: quarters of what was read in a row.
    follow: u64,
}

/// The numbers of the policy.
#[derive(Clone, Copy, Debug)]
struct Numbers {
    habits: [Habit; 5],
    /// So many different reads ago is "just now".
    now: u64,
    /// A guess that ends so close to what was read goes on to there.
    bridge: u64,
    /// So many 64ths of an aligned region have to be read for the rest to be guessed.
    thick: u64,
    /// Guessed when the very first block is read: up to this one.
    first: u64,
}

const NUMBERS: Numbers = Numbers {
    habits: [
        Habit {
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
        Habit {
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
        Habit {
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
        Habit {
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
        Habit {
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

/// How a kind of guess pays, in blocks; both are halved now and then, so that what was long ago counts less.
#[derive(Clone, Copy, Debug, Default)]
struct Score {
    guessed: u32,
    used: u32,
    held_back: u32,
}

impl Score {
    /// How many blocks of such a guess are to be guessed.
    fn allowed(&mut self, blocks: u64) -> u64 {
        if self.guessed < ENOUGH || self.used >= self.guessed / LEAST {
            return blocks;
        }
        self.held_back += 1;
        if self.held_back.is_multiple_of(PROBE) { blocks.min(PROBE_BLOCKS) } else { 0 }
    }

    /// So many guessed blocks were read. Whatever is held back is then tried again at once.
    fn use_up(&mut self, blocks: u32) {
        self.used += blocks;
        if blocks > 0 {
            self.held_back = PROBE - 1;
        }
    }

    fn guess(&mut self, blocks: u32) {
        self.guessed += blocks;
        while self.guessed > 2 * ENOUGH {
            self.guessed /= 2;
            self.used /= 2;
        }
    }
}

/// One per source; the caller has the lock. See the module.
pub struct Readahead {
    /// Of the object.
    blocks: u64,
    map: Map,
    streams: Streams,
    /// The reads of the near past that were new, the last one first.
    recent: VecDeque<(u64, u64)>,
    scores: [Score; Kind::ALL.len()],
    numbers: Numbers,
}

impl Readahead {
    /// The most that is fetched ahead of a stream, blocks: 8 MiB, six times what a link of 1 Gbit/s holds at 10 ms.
    pub const LONGEST: u64 = 512;

    /// For an object of `blocks` cache blocks, the last of which may be cut short.
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

    /// A reader asked for `count` blocks from `first` on. `missing`: not all of them were here or on their way.
    /// `present` says of a block whether it is here or on its way; it is asked about few.
    pub fn read(&mut self, first: u64, count: u64, missing: bool, present: &dyn Fn(u64) -> bool) -> Advice {
        let end = first.saturating_add(count).min(self.blocks);
        if first >= end {
            return Advice::default();
        }
        let marked = self.map.mark(first, end);
        for (score, used) in self.scores.iter_mut().zip(marked.used) {
            score.use_up(used);
        }
        let mut ranges = Vec::new();
        // What is read again and is here needs nothing, and says nothing of what comes next: others boot from it too.
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
        let Numbers { habits, bridge, thick, .. } = self.numbers;
        let Some(habit) = habits.into_iter().find(|habit| end - first <= habit.longest) else { return };

        let mut near = end + habit.ahead;
        for size in [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64] {
            if size <= habit.dense
                && self.map.count(first.saturating_sub(size), end + size) * 64 >= habit.density * size
            {
                near = near.max(end + size);
            }
        }
        if first == 0 {
            near = near.max(self.numbers.first);
        }
        let follow = if run > end - first { (run * habit.follow / 4).min(REQUEST) } else { 0 };
        let behind = if down { follow } else { 0 };
        if !down {
            near = near.max(end + follow);
        }
        let next = self.map.next(end, end + FAR);
        let previous = self.map.previous(first.saturating_sub(FAR), first);
        let just_now = |block: u64| self.recent.iter().any(|(from, to)| (*from..*to).contains(&block));
        let largest = |now: bool, side: usize| {
            if now { habit.join[side].max(habit.join_now[side]) } else { habit.join[side] }
        };
        let joined_after = next.filter(|next| next - end <= largest(just_now(*next), 0));
        let mut joined_before = None;
        let mut head = None;
        if let Some(previous) = previous {
            let (gap, now) = (first - previous - 1, just_now(previous));
            if gap <= largest(now, 1) {
                joined_before = Some(previous + 1);
            } else if now && gap <= habit.head_gap {
                head = Some((previous + 1, previous + 1 + habit.head.min(gap)));
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

    /// What of such a guess is made, the part next to the block where the reader is; that is noted.
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

/// Without what is present at both ends, as (first, count).
fn missing_part((mut from, mut to): (u64, u64), present: &dyn Fn(u64) -> bool) -> Option<(u64, u64)> {
    while from < to && present(from) {
        from += 1;
    }
    while from < to && present(to - 1) {
        to -= 1;
    }
    (from < to).then_some((from, to - from))
}
