//! Sources whose files cannot be read now: too few descriptors, too little memory, a failing disk.
//!
//! What must hold: an unreadable source does not count as damaged. Its files stay, the status names it, and the cache
//! tries again at growing intervals.

use std::collections::HashMap;

use parking_lot::Mutex;

use super::SourceKey;

/// The longest time between two attempts, ticks.
const LONGEST_WAIT: u64 = 64;
/// Attempts after which the cache uses the readable part of a file.
const MAX_TRIES: u32 = 8;

#[derive(Default)]
pub(super) struct UnreadableSources(Mutex<HashMap<SourceKey, Unreadable>>);

struct Unreadable {
    why: String,
    /// The source is not loaded yet, so nothing may be written over its files.
    unloaded: bool,
    wait: u64,
    due: u64,
    tries: u32,
}

impl UnreadableSources {
    /// Notes a failed read. Returns whether it is the first of this source.
    pub fn note(&self, key: SourceKey, why: String, unloaded: bool, now: u64) -> bool {
        let mut all = self.0.lock();
        let before = all.get(&key);
        let wait = before.map_or(1, |before| (before.wait * 2).min(LONGEST_WAIT));
        let tries = before.map_or(1, |before| before.tries + 1);
        let unloaded = unloaded || before.is_some_and(|before| before.unloaded);
        let news = before.is_none();
        all.insert(key, Unreadable { why, unloaded, wait, due: now + wait, tries });
        news
    }

    /// The source can be read. Returns whether it was unreadable.
    pub fn clear(&self, key: &SourceKey) -> bool {
        self.0.lock().remove(key).is_some()
    }

    /// Whether the source is not loaded for now.
    pub fn is_unloaded(&self, key: &SourceKey) -> bool {
        self.0.lock().get(key).is_some_and(|trouble| trouble.unloaded)
    }

    /// Whether it was tried so often that its readable part must do.
    pub fn is_lasting(&self, key: &SourceKey) -> bool {
        self.0.lock().get(key).is_some_and(|trouble| trouble.tries >= MAX_TRIES)
    }

    /// Sources that are due for another attempt to load them.
    pub fn due(&self, now: u64) -> Vec<SourceKey> {
        let all = self.0.lock();
        all.iter()
            .filter(|(_, trouble)| trouble.unloaded && trouble.due <= now)
            .map(|(key, _)| *key)
            .collect()
    }

    /// Why a source cannot be read.
    pub fn why(&self, key: &SourceKey) -> Option<String> {
        self.0.lock().get(key).map(|trouble| trouble.why.clone())
    }

    /// All unreadable sources, with the reasons.
    pub fn list(&self) -> Vec<(SourceKey, String)> {
        let mut all: Vec<_> =
            self.0.lock().iter().map(|(key, trouble)| (*key, trouble.why.clone())).collect();
        all.sort();
        all
    }
}
