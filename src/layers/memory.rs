//! The memory that indexes take.
//!
//! What must hold: it is counted, by what frees it. Indexes that no file has take little of it, beyond one for each sealing
//! that is under way (D93).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Most bytes of indexes that could not be written, before a sealing is refused.
const MOST_UNWRITTEN: u64 = 64 << 20;

/// Whether an index has a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum File {
    Written,
    Unwritten,
}

/// Bytes of the indexes of a store.
#[derive(Debug)]
pub(super) struct IndexMemory {
    all: AtomicU64,
    unwritten: AtomicU64,
    limit: AtomicU64,
}

impl Default for IndexMemory {
    fn default() -> Self {
        let limit = AtomicU64::new(MOST_UNWRITTEN);
        Self { all: AtomicU64::new(0), unwritten: AtomicU64::new(0), limit }
    }
}

impl IndexMemory {
    /// Counts bytes until the result is dropped.
    pub fn count(self: &Arc<Self>, bytes: u64, file: File) -> Counted {
        self.all.fetch_add(bytes, Ordering::Relaxed);
        if file == File::Unwritten {
            self.unwritten.fetch_add(bytes, Ordering::Relaxed);
        }
        Counted { memory: self.clone(), bytes, file }
    }

    pub fn sums(&self) -> MemorySums {
        MemorySums {
            bytes: self.all.load(Ordering::Relaxed),
            unwritten: self.unwritten.load(Ordering::Relaxed),
            limit: self.limit.load(Ordering::Relaxed),
        }
    }

    #[cfg(test)]
    pub fn set_limit(&self, limit: u64) {
        self.limit.store(limit, Ordering::Relaxed);
    }
}

/// Memory of the indexes of a store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemorySums {
    /// Bytes of all indexes in memory.
    pub bytes: u64,
    /// Bytes of those that could not be written.
    pub unwritten: u64,
    /// Bytes of these above which no disk is sealed.
    pub limit: u64,
}

/// Memory that is counted.
#[derive(Debug)]
pub(super) struct Counted {
    memory: Arc<IndexMemory>,
    bytes: u64,
    file: File,
}

impl Counted {
    pub fn is_unwritten(&self) -> bool {
        self.file == File::Unwritten
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.memory.all.fetch_sub(self.bytes, Ordering::Relaxed);
        if self.is_unwritten() {
            self.memory.unwritten.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}
