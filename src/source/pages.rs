//! Proven pages of proofs in memory, within a bound.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::format::proof::{Hash, PageId, ProofHeader};

/// A proven page. Its hash in the page above was compared, up to the root.
pub type Page = Arc<[u8]>;

/// The hash number `at` of a page; it has that many.
pub fn hash_in(page: &Page, at: usize) -> Hash {
    page.as_chunks::<32>().0[at]
}

/// See the module. Pages of all proofs share the bound. A proof is named by its header and not by its root alone: a page
/// belongs to a root without saying of which size the file is, so a proof of another size can have other pages with the
/// same root.
pub struct ProvenPages {
    /// Pages of one of the two halves.
    most: usize,
    halves: Mutex<Halves>,
}

type Key = (ProofHeader, PageId);

/// The newer half takes pages until it is full, and then is the older one. A page that is used moves to the newer half.
#[derive(Default)]
struct Halves {
    newer: HashMap<Key, Page>,
    older: HashMap<Key, Page>,
}

impl ProvenPages {
    /// For at most `most` pages, of 2 KiB each.
    pub fn new(most: usize) -> Self {
        Self { most: (most / 2).max(1), halves: Mutex::default() }
    }

    /// A page that is here.
    pub fn get(&self, proof: &ProofHeader, page: PageId) -> Option<Page> {
        let key = (*proof, page);
        let mut halves = self.halves.lock();
        if let Some(found) = halves.newer.get(&key) {
            return Some(found.clone());
        }
        let found = halves.older.remove(&key)?;
        halves.put(self.most, key, found.clone());
        Some(found)
    }

    /// Adds a page that was proven.
    pub fn add(&self, proof: &ProofHeader, page: PageId, bytes: Page) {
        self.halves.lock().put(self.most, (*proof, page), bytes);
    }

    /// Pages that are here.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        let halves = self.halves.lock();
        halves.newer.len() + halves.older.len()
    }
}

impl Halves {
    fn put(&mut self, most: usize, key: Key, page: Page) {
        if self.newer.len() >= most {
            self.older = std::mem::take(&mut self.newer);
        }
        self.newer.insert(key, page);
    }
}
