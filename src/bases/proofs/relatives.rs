//! Groups of a base with a proof that another base of this host has at the same place. The next build of an image is
//! mostly the earlier one.
//!
//! What must hold:
//! - A relative is a guess: its bytes are delivered only in groups that the proof of the base itself proves (D108).
//! - Guessing costs no request. Until one of its groups was right, a relative is tried only where the hashes are in memory;
//!   one that is wrong a few times in a row is tried again after some MiB, as a new build changes what is read first.
//! - The cache's disk is waited for as briefly as for pages of proofs. Then the server is asked.
//! - What is read of a relative counts as no use of it.
//!
//! Locks: `scores` is held briefly, around those of the cache's table and of a source's index.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::task::JoinSet;

use super::timed::TimedLane;
use crate::fetch::kept::{DiskCache, SourceKey};
use crate::format::proof::GROUP;
use crate::source::{Deliver, Parts, Purpose, RemoteSource, SourceError};

/// Cached sources that are considered, the ones that were used last.
const MOST: usize = 64;
/// How often the list of cached sources is made.
const LISTED: Duration = Duration::from_secs(30);
/// Groups that a source may have wrong in a row.
const PROBES: u32 = 8;
/// Fetched groups for each further group that it may have wrong.
const PER_PROBE: u64 = 64;
/// Reads of relatives that may wait; above it the server is asked at once.
const MOST_WAITING: usize = 8;
/// Of so many groups of a relative one must be right.
const SHARE: u32 = 8;
/// After so many groups the older ones count half.
const MEMORY: u32 = 256;
/// Relatives, and sources that may be one, that are tried for one fetch.
const AT_ONCE: usize = 2;
/// Blocks from the start of a fetch on by which a source is chosen.
const LOOKED_AT: u64 = 8;
/// Requests for the parts of one fetch that no relative has.
const MOST_REQUESTS: usize = 8;

/// What the cache has of all bases, for those with a proof.
pub struct Relatives {
    cache: Arc<DiskCache>,
    readers: TimedLane,
    bytes: AtomicU64,
}

/// What one base found out about the others.
pub struct Guesses {
    all: Arc<Relatives>,
    scores: Mutex<Scores>,
}

#[derive(Default)]
struct Scores {
    listed: Option<Instant>,
    /// Groups that were to be fetched.
    asked: u64,
    /// In the order in which they are tried.
    sources: Vec<(SourceKey, Score)>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Score {
    tried: u32,
    right: u32,
}

impl Score {
    fn is_relative(self) -> bool {
        self.right > 0 && self.right.saturating_mul(SHARE) >= self.tried
    }

    /// After so many groups that were to be fetched.
    fn may_be_relative(self, asked: u64) -> bool {
        !self.is_relative() && u64::from(self.tried) < u64::from(PROBES) + asked / PER_PROBE
    }

    fn add(&mut self, other: Self) {
        self.tried += other.tried;
        self.right += other.right;
        if self.tried > MEMORY {
            (self.tried, self.right) = (self.tried / 2, self.right / 2);
        }
    }
}

/// The groups of a fetch that relatives have, in order.
type Found = Vec<Option<Vec<u8>>>;

impl Relatives {
    /// Of this cache.
    pub fn new(cache: Arc<DiskCache>) -> Arc<Self> {
        Arc::new(Self {
            cache,
            readers: TimedLane::new("relatives", 2, MOST_WAITING),
            bytes: AtomicU64::new(0),
        })
    }

    /// Bytes that came from relatives since the start of the worker.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Reads the groups of `parts` from one source, where `found` has none. May wait for the disk.
    fn read(&self, key: &SourceKey, parts: &Parts, found: &mut Found) -> Score {
        let mut score = Score::default();
        let Some(source) = self.cache.find(key) else { return score };
        let (range, mut bytes) = (parts.range(), vec![0; GROUP as usize]);
        for (number, found) in (0..).zip(found.iter_mut()).filter(|(_, found)| found.is_none()) {
            let start = range.start + number * GROUP;
            let len = (range.end - start).min(GROUP) as usize;
            if !source.lend_block(start / GROUP, &mut bytes[..len]) {
                continue;
            }
            let is_right = parts.prove(start, &bytes[..len]);
            // All images have zeros.
            if bytes[..len].iter().any(|byte| *byte != 0) {
                score.tried += 1;
                score.right += u32::from(is_right);
            }
            if is_right {
                *found = Some(bytes[..len].to_vec());
            } else if score.tried >= PROBES && score.right == 0 {
                break;
            }
        }
        score
    }
}

impl Guesses {
    /// Without any yet.
    pub fn new(all: Arc<Relatives>) -> Self {
        Self { all, scores: Mutex::default() }
    }

    /// The sources to try for a fetch of `range`: relatives; and where the hashes are here, sources that may be one.
    pub fn choose(&self, range: &Range<u64>, hashes_are_here: bool) -> Vec<SourceKey> {
        let mut scores = self.scores.lock();
        if scores.listed.is_none_or(|listed| listed.elapsed() > LISTED) {
            self.list(&mut scores);
        }
        scores.asked += (range.end - range.start).div_ceil(GROUP);
        let asked = scores.asked;
        let blocks = range.start / GROUP..range.end.div_ceil(GROUP).min(range.start / GROUP + LOOKED_AT);
        let may_have = |key: &SourceKey| {
            let source = self.all.cache.find(key);
            source.is_some_and(|source| blocks.clone().any(|block| source.contains_now(block) != Some(false)))
        };
        let having = |is_so: &dyn Fn(Score) -> bool| -> Vec<SourceKey> {
            let of = scores.sources.iter().filter(|(_, score)| is_so(*score)).map(|(key, _)| *key);
            of.filter(may_have).take(AT_ONCE).collect()
        };
        let mut chosen = having(&Score::is_relative);
        if hashes_are_here {
            chosen.extend(having(&|score| score.may_be_relative(asked)));
        }
        chosen
    }

    fn list(&self, scores: &mut Scores) {
        let known: HashMap<_, _> = scores.sources.drain(..).collect();
        let mut all: Vec<_> =
            self.all.cache.sources().into_iter().map(|source| (source.last_used(), source)).collect();
        all.sort_by_key(|(used, _)| std::cmp::Reverse(*used));
        let scored = |key: SourceKey| (key, known.get(&key).copied().unwrap_or_default());
        let with_blocks = all.iter().filter(|(_, source)| source.cached_bytes() > 0);
        scores.sources = with_blocks.take(MOST).map(|(_, source)| scored(*source.key())).collect();
        scores.listed = Some(Instant::now());
    }

    /// The groups of `parts` that these sources have, as far as the disk answers in time.
    async fn read(self: &Arc<Self>, keys: Vec<SourceKey>, parts: Parts) -> Found {
        let groups = (parts.range().end - parts.range().start).div_ceil(GROUP) as usize;
        let this = self.clone();
        let read = move || {
            let mut found = vec![None; groups];
            for key in keys {
                let score = this.all.read(&key, &parts, &mut found);
                this.score(&key, score);
            }
            found
        };
        self.all.readers.ask(read).await.unwrap_or_else(|| vec![None; groups])
    }

    fn score(&self, key: &SourceKey, seen: Score) {
        let mut scores = self.scores.lock();
        if let Some((_, score)) = scores.sources.iter_mut().find(|(of, _)| of == key) {
            score.add(seen);
        }
    }

    /// Delivers the groups of `parts`: those that these sources have from there, and the others from the server.
    ///
    /// # Errors
    /// As [`RemoteSource::fetch`].
    pub async fn fetch(
        self: Arc<Self>,
        (keys, parts): (Vec<SourceKey>, Parts),
        remote: Arc<dyn RemoteSource>,
        (purpose, since): (Purpose, Instant),
        mut deliver: Deliver,
    ) -> Result<(), SourceError> {
        let found = self.read(keys, parts.clone()).await;
        let range = parts.range();
        let far = missing(&found, MOST_REQUESTS);
        if far.first().is_some_and(|groups| groups.end - groups.start == found.len() as u64) {
            // None is here: what comes is delivered as it comes.
            return remote.fetch_proven(range, purpose, since, deliver, parts.known()).await;
        }
        // All requests at once. They end with this fetch.
        let (mut requests, mut came) = (JoinSet::new(), HashMap::new());
        for groups in &far {
            let wanted =
                range.start + groups.start * GROUP..(range.start + groups.end * GROUP).min(range.end);
            let (remote, parts, first) = (remote.clone(), parts.within(&wanted), groups.start);
            requests.spawn(async move {
                let bytes = Arc::new(Mutex::new(Vec::with_capacity((wanted.end - wanted.start) as usize)));
                let into = bytes.clone();
                let take: Deliver = Box::new(move |part| into.lock().extend_from_slice(part));
                let done = remote.fetch_proven(wanted, purpose, since, take, parts.known()).await;
                (first, done.map(|()| std::mem::take(&mut *bytes.lock())))
            });
        }
        let mut at = 0;
        while at < found.len() as u64 {
            match far.iter().find(|groups| groups.start == at) {
                None => {
                    let bytes = found[at as usize].as_deref().unwrap_or_default();
                    self.all.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    deliver(bytes);
                    at += 1;
                }
                Some(groups) => {
                    while !came.contains_key(&at) {
                        match requests.join_next().await {
                            Some(Ok((first, bytes))) => _ = came.insert(first, bytes?),
                            Some(Err(error)) => std::panic::resume_unwind(error.into_panic()),
                            None => break,
                        }
                    }
                    deliver(&came.remove(&at).unwrap_or_default());
                    at = groups.end;
                }
            }
        }
        Ok(())
    }
}

/// The runs of groups that were not found, at most `most` of them: then some that were found between are among them.
fn missing(found: &Found, most: usize) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for at in (0..).zip(found).filter(|(_, found)| found.is_none()).map(|(at, _)| at) {
        match runs.last_mut() {
            Some(run) if run.end == at => run.end += 1,
            _ => runs.push(at..at + 1),
        }
    }
    while runs.len() > most {
        let gap = |at: &usize| runs[*at + 1].start - runs[*at].end;
        let Some(at) = (0..runs.len() - 1).min_by_key(gap) else { break };
        runs[at].end = runs.remove(at + 1).end;
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_asked_for_in_few_requests() {
        let found = |text: &str| -> Found { text.chars().map(|c| (c == 'x').then(Vec::new)).collect() };
        assert_eq!(missing(&found("xx"), 2), [0..0; 0]);
        assert_eq!(missing(&found("..x.xx."), 3), [0..2, 3..4, 6..7]);
        assert_eq!(missing(&found("..x.xx."), 2), [0..4, 6..7]);
        assert_eq!(missing(&found("..x.xx."), 1), std::slice::from_ref(&(0..7)));
    }

    #[test]
    fn a_source_that_is_mostly_wrong_is_no_relative() {
        let score = |tried, right| Score { tried, right };
        assert!(score(8, 1).is_relative() && !score(9, 1).is_relative() && !score(0, 0).is_relative());
        assert!(score(PROBES - 1, 0).may_be_relative(0) && !score(PROBES, 0).may_be_relative(0));
        assert!(score(PROBES, 0).may_be_relative(PER_PROBE) && !score(8, 8).may_be_relative(u64::MAX));
        let mut of = score(200, 200);
        of.add(score(100, 0));
        assert_eq!(of, score(150, 100));
    }
}
