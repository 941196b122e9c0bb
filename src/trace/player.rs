//! Decides what to fetch, and in which order, so that the bytes of a trace are here before the guest reads them.
//!
//! A trace has thousands of small pieces, nearly in the order in which the guest will read them. Fetched in that order,
//! each piece would be a request. Sorted by offset they would be few requests, but the first piece might come last. So the
//! player takes **windows** of the trace, sorts within a window, and merges pieces that lie close to each other, with the
//! bytes between. The first windows are small, because the guest already waits for them.

use std::collections::VecDeque;
use std::ops::Range;

use crate::format::BLOCK;
use crate::format::trace::{Trace, TraceEntry};

/// Bytes of the first window and of the largest.
const FIRST_WINDOW: u64 = 512 << 10;
const LARGEST_WINDOW: u64 = 4 << 20;
/// The largest gap between two pieces that are merged.
const GAP: u64 = 64 << 10;
/// The largest piece.
const LARGEST: u64 = 1 << 20;

/// Yields ranges of the base's virtual disk, in bytes, in the order in which to fetch them.
pub struct Player {
    entries: std::vec::IntoIter<TraceEntry>,
    size: u64,
    window: u64,
    /// The rest of the current window.
    ready: VecDeque<Range<u64>>,
}

impl Player {
    /// Plays a trace on a base of `size` bytes. Omits blocks beyond the end.
    pub fn new(trace: &Trace, size: u64) -> Self {
        Self {
            entries: trace.entries.clone().into_iter(),
            size,
            window: FIRST_WINDOW,
            ready: VecDeque::new(),
        }
    }

    /// The bytes that are still to be fetched, without gaps.
    pub fn left(&self) -> u64 {
        let entries: u64 = self.entries.as_slice().iter().map(|entry| entry.blocks * BLOCK).sum();
        entries + self.ready.iter().map(|range| range.end - range.start).sum::<u64>()
    }

    fn fill(&mut self) {
        let mut pieces: Vec<Range<u64>> = Vec::new();
        let mut bytes = 0;
        while bytes < self.window {
            let Some(entry) = self.entries.next() else { break };
            let start = entry.first * BLOCK;
            let end = (start + entry.blocks * BLOCK).min(self.size);
            if start < end {
                bytes += end - start;
                pieces.push(start..end);
            }
        }
        self.window = (self.window * 2).min(LARGEST_WINDOW);
        pieces.sort_unstable_by_key(|piece| piece.start);
        let mut merged: Vec<Range<u64>> = Vec::new();
        for piece in pieces {
            match merged.last_mut() {
                Some(last) if piece.start <= last.end.saturating_add(GAP) => {
                    last.end = last.end.max(piece.end)
                }
                _ => merged.push(piece),
            }
        }
        for range in merged {
            let mut start = range.start;
            while start < range.end {
                let end = range.end.min(start + LARGEST);
                self.ready.push_back(start..end);
                start = end;
            }
        }
    }
}

impl Iterator for Player {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        while self.ready.is_empty() && !self.entries.as_slice().is_empty() {
            self.fill();
        }
        self.ready.pop_front()
    }
}
