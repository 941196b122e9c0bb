//! A simulated reader behind a link with latency, which waits for each read before it makes the next one. Measures how
//! long it waits and how much it fetches.

use std::collections::VecDeque;

use super::{BLOCK, NUMBERS, Numbers, Readahead};

/// Seconds from a request to its first byte.
const ROUND_TRIP: f64 = 0.010;
/// Seconds that one block occupies the link: 1 Gbit/s.
const TRANSFER: f64 = BLOCK as f64 / 125e6;
/// Requests under way at once.
const CONNECTIONS: usize = 16;
/// Blocks of the largest request.
const REQUEST: u64 = 64;

struct Transfer {
    first_byte: f64,
    next: u64,
    end: u64,
}

/// The reader, the link and the blocks that came over it.
pub(super) struct Replay {
    pub(super) readahead: Readahead,
    blocks: u64,
    asked: Vec<bool>,
    here: Vec<bool>,
    now: f64,
    link_free: f64,
    transfers: VecDeque<Transfer>,
    demands: VecDeque<(u64, u64)>,
    guesses: VecDeque<(u64, u64)>,
    pub(super) fetched: u64,
    pub(super) requests: u64,
    /// Reads that waited.
    pub(super) waits: u64,
    pub(super) waited: f64,
}

impl Replay {
    pub(super) fn new(blocks: u64) -> Self {
        Self::with(blocks, NUMBERS)
    }

    pub(super) fn with(blocks: u64, numbers: Numbers) -> Self {
        Self {
            readahead: Readahead::with(blocks, numbers),
            blocks,
            asked: vec![false; blocks as usize],
            here: vec![false; blocks as usize],
            now: 0.0,
            link_free: 0.0,
            transfers: VecDeque::new(),
            demands: VecDeque::new(),
            guesses: VecDeque::new(),
            fetched: 0,
            requests: 0,
            waits: 0,
            waited: 0.0,
        }
    }

    /// MiB that came over the link.
    pub(super) fn mib(&self) -> f64 {
        (self.fetched * BLOCK) as f64 / 1048576.0
    }

    pub(super) fn now(&self) -> f64 {
        self.now
    }

    /// Reads bytes, and waits until they have come.
    pub(super) fn read_bytes(&mut self, offset: u64, length: u64) {
        let first = offset / BLOCK;
        self.read(first, (offset + length).div_ceil(BLOCK) - first);
    }

    pub(super) fn read(&mut self, first: u64, count: u64) {
        let range = first as usize..(first + count) as usize;
        let missing = self.asked[range.clone()].contains(&false);
        let waits = self.here[range.clone()].contains(&false);
        let asked = &self.asked;
        let advice = self.readahead.read(first, count, missing, &|block| asked[block as usize]);
        let mut end = first + count;
        let mut others = Vec::new();
        for (from, blocks) in advice.ranges {
            assert!(blocks > 0 && from + blocks <= self.blocks, "advice past the end: {from}+{blocks}");
            if missing && from == end {
                // Appended to the request that the reader waits for.
                end += blocks;
            } else {
                others.push((from, from + blocks));
            }
        }
        if missing {
            self.ask(first, end, true);
        }
        for (from, to) in others {
            self.ask(from, to, false);
        }
        self.send();
        let begin = self.now;
        while self.here[range.clone()].contains(&false) {
            assert!(self.step(f64::INFINITY), "a requested block is not in transit");
        }
        if waits {
            self.waits += 1;
            self.waited += self.now - begin;
        }
    }

    /// Runs until every requested block has come.
    pub(super) fn finish(&mut self) {
        while self.step(f64::INFINITY) {}
    }

    fn ask(&mut self, from: u64, to: u64, demand: bool) {
        let mut at = from;
        while at < to {
            if self.asked[at as usize] {
                at += 1;
                continue;
            }
            let begin = at;
            while at < to && at - begin < REQUEST && !self.asked[at as usize] {
                self.asked[at as usize] = true;
                at += 1;
            }
            if demand { &mut self.demands } else { &mut self.guesses }.push_back((begin, at));
        }
    }

    fn send(&mut self) {
        while self.transfers.len() < CONNECTIONS
            && let Some((next, end)) = self.demands.pop_front().or_else(|| self.guesses.pop_front())
        {
            self.requests += 1;
            self.fetched += end - next;
            self.transfers.push_back(Transfer { first_byte: self.now + ROUND_TRIP, next, end });
        }
    }

    /// Runs until one more block has come, unless that is after `until`. The transfers under way take turns.
    fn step(&mut self, until: f64) -> bool {
        self.send();
        let Some(first) = self.transfers.iter().map(|t| t.first_byte).reduce(f64::min) else { return false };
        let begin = self.link_free.max(first);
        if begin + TRANSFER > until {
            return false;
        }
        while self.transfers[0].first_byte > begin {
            self.transfers.rotate_left(1);
        }
        self.link_free = begin + TRANSFER;
        self.now = self.now.max(self.link_free);
        let mut transfer = self.transfers.pop_front().expect("there is one");
        self.here[transfer.next as usize] = true;
        transfer.next += 1;
        if transfer.next < transfer.end {
            self.transfers.push_back(transfer);
        }
        true
    }
}
