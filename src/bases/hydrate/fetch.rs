//! Fetches what the cache lacks of one file. Readers go first.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::fetch::LazySource;
use crate::fetch::kept::{CACHE_BLOCK, Contents, DiskCache, Reach};
use crate::jobs::{Job, Paced, State, Stopped};
use crate::source::{Completion, Purpose, Source};

/// Bytes of one request, and most requests under way.
const PIECE: u64 = 4 << 20;
const AT_ONCE: usize = 4;
/// Pauses: to give way to readers, from the first to the longest; and when no bytes come, from the first to the
/// longest.
const GIVE_WAY: Duration = Duration::from_millis(5);
const LONGEST_WAY: Duration = Duration::from_millis(200);
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Pauses that fetched blocks may take into the cache, before it is checked again.
const SETTLING: u32 = 100;

/// The source that is fetched.
pub trait Origin {
    /// Starts to fetch blocks. The result happens when those under way are here.
    fn fetch(&self, first: u64, blocks: u64) -> Option<Completion>;
    /// Whether a reader's request is under way.
    fn is_busy(&self) -> bool;
    /// Whether the cache got all bytes that came.
    fn is_settled(&self) -> bool;
    /// Why no bytes come, if that is known.
    fn stall(&self) -> Option<String>;
}

impl Origin for LazySource {
    fn fetch(&self, first: u64, blocks: u64) -> Option<Completion> {
        self.prefetch(&[(first * CACHE_BLOCK, blocks * CACHE_BLOCK)], Purpose::Hydrate)
    }
    fn is_busy(&self) -> bool {
        Self::is_busy(self)
    }
    fn is_settled(&self) -> bool {
        Self::is_settled(self)
    }
    fn stall(&self) -> Option<String> {
        Self::stall(self).map(|stall| stall.why).or_else(|| self.trouble())
    }
}

/// What the cache has of the file.
pub trait CachedBlocks {
    /// The first missing block at or after `from`.
    fn next_missing(&self, from: u64) -> Option<u64>;
    /// Number of missing blocks in a row from `first` on, at most `max`.
    fn missing_run(&self, first: u64, max: u64) -> u64;
    /// Cached bytes.
    fn bytes(&self) -> u64;
    /// Why the cache takes no more, if that is known.
    fn full(&self) -> Option<String>;
}

/// A file's contents, in its cache.
pub struct CachedFile<'a> {
    pub contents: &'a Contents,
    pub cache: &'a DiskCache,
}

impl CachedBlocks for CachedFile<'_> {
    fn next_missing(&self, from: u64) -> Option<u64> {
        self.contents.next_missing(from, Reach::Any)
    }
    fn missing_run(&self, first: u64, max: u64) -> u64 {
        self.contents.missing_run(first, max, Reach::Any)
    }
    fn bytes(&self) -> u64 {
        self.contents.cached_bytes(Reach::Any)
    }
    fn full(&self) -> Option<String> {
        let missing = self.contents.size().saturating_sub(self.bytes());
        // A failure is forgotten when a reader's blocks have found room since. The bounds are then as they were.
        let why = self.cache.stats().degraded.or_else(|| self.cache.shortage(missing.min(PIECE)));
        why.map(|why| format!("the cache keeps nothing new: {why}"))
    }
}

/// Fetches all missing blocks. `before` bytes of the job belong to other files.
///
/// # Errors
/// When the job was cancelled, and those of `go_on`.
pub fn all(
    job: &Arc<Job>,
    origin: &dyn Origin,
    here: &dyn CachedBlocks,
    before: u64,
    go_on: &dyn Fn() -> Result<(), Stopped>,
) -> Result<(), Stopped> {
    let mut pause = PAUSE;
    while here.next_missing(0).is_some() {
        let had = here.bytes();
        once(job, origin, here, before, go_on)?;
        if here.next_missing(0).is_none() {
            break;
        }
        if here.bytes() > had {
            pause = PAUSE;
            continue;
        }
        // The server is down, or the cache takes no more.
        let why = origin.stall().or_else(|| here.full());
        let why =
            why.unwrap_or_else(|| "the cache did not keep what was fetched; it is fetched again".into());
        job.note_waiting(before + had, why);
        job.pause(pause)?;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    Ok(())
}

/// Fetches each missing block once.
fn once(
    job: &Arc<Job>,
    origin: &dyn Origin,
    here: &dyn CachedBlocks,
    before: u64,
    go_on: &dyn Fn() -> Result<(), Stopped>,
) -> Result<(), Stopped> {
    let mut under_way: VecDeque<Completion> = VecDeque::new();
    let waits = || {
        if let Some(why) = origin.stall() {
            job.note_waiting(before + here.bytes(), why);
        }
    };
    let mut at = 0;
    let (mut since, mut asked) = (Instant::now(), 0u64);
    while let Some(first) = here.next_missing(at) {
        job.check()?;
        go_on()?;
        give_way(job, origin, before + here.bytes())?;
        let count = here.missing_run(first, PIECE / CACHE_BLOCK).max(1);
        under_way.extend(origin.fetch(first, count));
        at = first + count;
        asked += count * CACHE_BLOCK;
        while under_way.len() >= AT_ONCE {
            if let Some(completion) = under_way.pop_front() {
                job.wait(&completion, waits)?;
            }
        }
        if job.pace(asked, since)? == Paced::Changed {
            (since, asked) = (Instant::now(), 0);
        }
        job.note(State::Fetching, before + here.bytes());
    }
    for completion in &under_way {
        job.wait(completion, waits)?;
    }
    // The cache takes bytes after the readers have them.
    for _ in 0..SETTLING {
        if origin.is_settled() {
            break;
        }
        job.pause(GIVE_WAY * 2)?;
    }
    Ok(())
}

/// Waits while readers' requests are under way, without a limit.
fn give_way(job: &Job, origin: &dyn Origin, bytes: u64) -> Result<(), Stopped> {
    let mut way = GIVE_WAY;
    while origin.is_busy() {
        if let Some(why) = origin.stall() {
            job.note_waiting(bytes, why);
        }
        job.pause(way)?;
        way = (way * 2).min(LONGEST_WAY);
    }
    Ok(())
}
