//! Sources whose files cannot be read now: too few descriptors, too little memory, a disk that fails.
//!
//! What must hold: what cannot be read is not taken for bad. It stays, it is named, and it is tried again, ever more
//! rarely.

use std::collections::HashMap;

use parking_lot::Mutex;

use super::SourceKey;

/// Ticks between two attempts, at most.
const LONGEST: u64 = 64;
/// Attempts after which a file that is read in part is taken as it is.
const PATIENCE: u32 = 8;

#[derive(Default)]
pub(super) struct Troubles(Mutex<HashMap<SourceKey, Trouble>>);

struct Trouble {
    why: String,
    /// What is cached of it is not known yet, so nothing may be written over it.
    unloaded: bool,
    wait: u64,
    due: u64,
    tries: u32,
}

impl Troubles {
    /// Notes one. `true`: it is news.
    pub fn note(&self, key: SourceKey, why: String, unloaded: bool, now: u64) -> bool {
        let mut all = self.0.lock();
        let before = all.get(&key);
        let wait = before.map_or(1, |before| (before.wait * 2).min(LONGEST));
        let tries = before.map_or(1, |before| before.tries + 1);
        let unloaded = unloaded || before.is_some_and(|before| before.unloaded);
        let news = before.is_none();
        all.insert(key, Trouble { why, unloaded, wait, due: now + wait, tries });
        news
    }

    /// It works. Whether it did not.
    pub fn over(&self, key: &SourceKey) -> bool {
        self.0.lock().remove(key).is_some()
    }

    /// Whether what is cached of it is not known for now.
    pub fn is_unloaded(&self, key: &SourceKey) -> bool {
        self.0.lock().get(key).is_some_and(|trouble| trouble.unloaded)
    }

    /// Whether it was tried so often that what can be read of it has to do.
    pub fn is_lasting(&self, key: &SourceKey) -> bool {
        self.0.lock().get(key).is_some_and(|trouble| trouble.tries >= PATIENCE)
    }

    /// Sources that are to be loaded again.
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

    /// All of them, with the reasons.
    pub fn list(&self) -> Vec<(SourceKey, String)> {
        let mut all: Vec<_> =
            self.0.lock().iter().map(|(key, trouble)| (*key, trouble.why.clone())).collect();
        all.sort();
        all
    }
}
