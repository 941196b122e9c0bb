//! Records the first read of each block of a base, with its time.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::format::BLOCK;
use crate::format::trace::{MAX_ENTRIES, TraceEntry};

/// Blocks of one page of the bitmap: 256 MiB of the base in 8 KiB.
const PAGE_BLOCKS: u64 = 1 << 16;
const PAGE_WORDS: usize = (PAGE_BLOCKS / 64) as usize;
/// The most pages: 32 MiB for one recording, whatever the size of the base.
const MAX_PAGES: usize = 4096;
/// Adjacent reads within this time, in milliseconds, are one entry.
const TOGETHER: u32 = 10;

/// The limits at which a recording ends by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The time without a first read of any block.
    pub idle: Duration,
    /// The time since the first read.
    pub longest: Duration,
    /// The number of bytes read.
    pub bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { idle: Duration::from_secs(30), longest: Duration::from_secs(300), bytes: 1 << 30 }
    }
}

/// Why a recording ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// See [`Limits::idle`].
    Idle,
    /// See [`Limits::longest`].
    Time,
    /// See [`Limits::bytes`].
    Bytes,
    /// The trace has its maximum number of entries, or the recording its maximum memory.
    Entries,
    /// The operator ended it, or the worker ends.
    Asked,
}

/// See the module. Any number of threads may note reads at once.
pub struct Recorder {
    blocks: u64,
    limits: Limits,
    over: AtomicBool,
    /// The bitmap of noted blocks, allocated page by page.
    pages: Box<[OnceLock<Box<[AtomicU64]>>]>,
    made: AtomicUsize,
    list: Mutex<List>,
}

#[derive(Default)]
struct List {
    begun: Option<Instant>,
    last: Option<Instant>,
    entries: Vec<TraceEntry>,
    blocks: u64,
    end: Option<End>,
}

impl Recorder {
    /// A recorder for a base of `size` bytes. The recording begins with the first read.
    pub fn new(size: u64, limits: Limits) -> Self {
        let blocks = size.div_ceil(BLOCK);
        let pages = blocks.div_ceil(PAGE_BLOCKS) as usize;
        Self {
            blocks,
            limits,
            over: AtomicBool::new(false),
            pages: (0..pages).map(|_| OnceLock::new()).collect(),
            made: AtomicUsize::new(0),
            list: Mutex::default(),
        }
    }

    /// Notes a read of `len` bytes of the base at `offset`. A read without new blocks takes no lock.
    pub fn note(&self, offset: u64, len: u64) {
        self.note_at(offset, len, Instant::now);
    }

    pub(super) fn note_at(&self, offset: u64, len: u64, now: impl Fn() -> Instant) {
        if self.over.load(Ordering::Relaxed) {
            return;
        }
        let end = offset.saturating_add(len).div_ceil(BLOCK).min(self.blocks);
        let mut at = offset / BLOCK;
        // The current run of adjacent new blocks.
        let (mut from, mut to) = (at, at);
        while at < end {
            let Some(page) = self.page((at / PAGE_BLOCKS) as usize) else {
                return self.end(End::Entries);
            };
            let word = &page[(at % PAGE_BLOCKS / 64) as usize];
            let stop = (at / 64 * 64 + 64).min(end);
            let mask = (u64::MAX >> (64 - (stop - at))) << (at % 64);
            if word.load(Ordering::Relaxed) & mask != mask {
                let before = word.fetch_or(mask, Ordering::Relaxed);
                for block in at..stop {
                    if before >> (block % 64) & 1 != 0 {
                        continue;
                    }
                    if block != to {
                        self.push(from, to, &now);
                        from = block;
                    }
                    to = block + 1;
                }
            }
            at = stop;
        }
        self.push(from, to, &now);
    }

    fn page(&self, index: usize) -> Option<&[AtomicU64]> {
        let slot = &self.pages[index];
        if let Some(page) = slot.get() {
            return Some(page);
        }
        if self.made.fetch_add(1, Ordering::Relaxed) >= MAX_PAGES {
            return None;
        }
        Some(slot.get_or_init(|| (0..PAGE_WORDS).map(|_| AtomicU64::new(0)).collect()))
    }

    fn push(&self, from: u64, to: u64, now: &impl Fn() -> Instant) {
        if from == to {
            return;
        }
        let now = now();
        let mut list = self.list.lock();
        if list.end.is_some() {
            return;
        }
        let begun = *list.begun.get_or_insert(now);
        list.last = Some(now);
        let at_ms = now.saturating_duration_since(begun).as_millis();
        let at_ms = u32::try_from(at_ms).unwrap_or(u32::MAX);
        // Threads may get here in another order than they read the clock.
        let at_ms = list.entries.last().map_or(at_ms, |last| last.at_ms.max(at_ms));
        list.blocks += to - from;
        match list.entries.last_mut() {
            Some(last) if last.first + last.blocks == from && at_ms - last.at_ms <= TOGETHER => {
                last.blocks += to - from;
            }
            _ => list.entries.push(TraceEntry { first: from, blocks: to - from, at_ms }),
        }
        if list.entries.len() >= MAX_ENTRIES {
            self.end_with(&mut list, End::Entries);
        } else if list.blocks.saturating_mul(BLOCK) >= self.limits.bytes {
            self.end_with(&mut list, End::Bytes);
        }
    }

    fn end_with(&self, list: &mut List, end: End) {
        list.end.get_or_insert(end);
        self.over.store(true, Ordering::Relaxed);
    }

    /// Ends the recording, if it has not ended.
    pub fn end(&self, why: End) {
        self.end_with(&mut self.list.lock(), why);
    }

    /// Why the recording has ended, if it has. Time limits take effect only in this call.
    pub fn ended(&self, now: Instant) -> Option<End> {
        let mut list = self.list.lock();
        let since = |then: Option<Instant>| then.map(|then| now.saturating_duration_since(then));
        if since(list.begun).is_some_and(|lasted| lasted >= self.limits.longest) {
            self.end_with(&mut list, End::Time);
        } else if since(list.last).is_some_and(|idle| idle >= self.limits.idle) {
            self.end_with(&mut list, End::Idle);
        }
        list.end
    }

    /// Bytes noted so far.
    pub fn bytes(&self) -> u64 {
        self.list.lock().blocks * BLOCK
    }

    /// The entries so far.
    pub fn entries(&self) -> Vec<TraceEntry> {
        self.list.lock().entries.clone()
    }
}
