//! A cache of the tables of an image, bounded in bytes.
//!
//! Eviction is "second chance" (clock): it skips a table once that was used since the hand passed. The lock is held for a
//! lookup in a hash map, never during a read.

use std::sync::Arc;

use hashbrown::HashMap;
use parking_lot::Mutex;

/// The most bytes of tables that an image caches.
pub(super) const TABLES: usize = 16 << 20;

/// The approximate overhead of a cached table.
const OVERHEAD: usize = 96;

/// The cached tables, by their offsets in the file.
pub(super) struct Tables<T> {
    limit: usize,
    state: Mutex<State<T>>,
}

struct State<T> {
    index: HashMap<u64, usize>,
    slots: Vec<Slot<T>>,
    hand: usize,
    bytes: usize,
}

struct Slot<T> {
    at: u64,
    table: Arc<[T]>,
    used: bool,
}

fn cost<T>(table: &[T]) -> usize {
    size_of_val(table) + OVERHEAD
}

impl<T> Tables<T> {
    pub(super) fn new(limit: usize) -> Self {
        let state = State { index: HashMap::new(), slots: Vec::new(), hand: 0, bytes: 0 };
        Self { limit, state: Mutex::new(state) }
    }

    pub(super) fn get(&self, at: u64) -> Option<Arc<[T]>> {
        let mut state = self.state.lock();
        let slot = *state.index.get(&at)?;
        state.slots[slot].used = true;
        Some(state.slots[slot].table.clone())
    }

    pub(super) fn put(&self, at: u64, table: Arc<[T]>) {
        let mut state = self.state.lock();
        if state.index.contains_key(&at) {
            return;
        }
        state.bytes += cost(&table);
        while state.bytes > self.limit && !state.slots.is_empty() {
            state.evict();
        }
        let slot = state.slots.len();
        state.slots.push(Slot { at, table, used: false });
        state.index.insert(at, slot);
    }

    /// Drops all tables.
    pub(super) fn clear(&self) {
        *self.state.lock() = State { index: HashMap::new(), slots: Vec::new(), hand: 0, bytes: 0 };
    }

    /// Bytes of the cached tables.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.state.lock().bytes
    }
}

impl<T> State<T> {
    fn evict(&mut self) {
        loop {
            self.hand %= self.slots.len();
            if !std::mem::take(&mut self.slots[self.hand].used) {
                break;
            }
            self.hand += 1;
        }
        let gone = self.slots.swap_remove(self.hand);
        self.index.remove(&gone.at);
        self.bytes -= cost(&gone.table);
        if let Some(moved) = self.slots.get(self.hand) {
            self.index.insert(moved.at, self.hand);
        }
    }
}
