//! Tables of an image that were read, up to a number of bytes.
//!
//! Second chance: a table that was used since the hand came by is passed over once. The lock is held for a lookup in
//! a hash map, never while something is read.

use std::sync::Arc;

use hashbrown::HashMap;
use parking_lot::Mutex;

/// What an image may keep.
pub(super) const TABLES: usize = 16 << 20;

/// What a kept table takes besides its entries, about.
const OVERHEAD: usize = 96;

/// By the offset in the file.
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

    /// Nothing is kept any more.
    pub(super) fn clear(&self) {
        *self.state.lock() = State { index: HashMap::new(), slots: Vec::new(), hand: 0, bytes: 0 };
    }

    /// Bytes kept.
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
