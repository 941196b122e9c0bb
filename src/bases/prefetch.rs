//! Plays traces: fetches the bytes that a boot is known to read, ahead of the guest.
//!
//! Each trace that is played has a thread, which keeps a few ranges under way and waits for the oldest. It never delays
//! a reader: requests of readers go first at the source, and a server that does not answer ends the playing, not the
//! boot.

#[cfg(test)]
mod tests;

use std::collections::{HashSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::base::Completion;
use crate::source::Purpose;
use crate::store::Store;
use crate::trace::Player;

/// Most bytes under way: enough for 1 Gbit/s at a latency of 50 ms, and few compared to readers' requests.
const UNDER_WAY: u64 = 8 << 20;
/// Attempts per range: an image may have to fetch its tables first, level by level.
const TRIES: u32 = 4;
/// Failed ranges after which the playing ends.
const GIVE_UP: u32 = 8;

/// See the module.
pub struct Prefetcher {
    store: Weak<Store>,
    playing: Mutex<HashSet<u64>>,
}

impl Prefetcher {
    /// Plays traces of this store's bases.
    pub fn new(store: &Arc<Store>) -> Arc<Self> {
        Arc::new(Self { store: Arc::downgrade(store), playing: Mutex::default() })
    }

    /// Plays the trace of a base, if it has one. Does not wait.
    pub fn play(self: &Arc<Self>, base: u64) {
        if !self.playing.lock().insert(base) {
            return;
        }
        let this = self.clone();
        let play = move || {
            this.run(base);
            this.playing.lock().remove(&base);
        };
        if let Err(error) = std::thread::Builder::new().name("prefetch".into()).spawn(play) {
            tracing::warn!(%error, "no thread to prefetch a boot can be started; the boot reads without prefetch");
            self.playing.lock().remove(&base);
        }
    }

    fn run(&self, number: u64) {
        let Some((node, tracer)) = self.store.upgrade().and_then(|store| {
            let node = store.base_by_id(number)?;
            Some((node, store.tracer()?.clone()))
        }) else {
            return;
        };
        // The disk that reads has attached it.
        let Some(base) = node.attached().filter(|base| !base.is_plain()) else { return };
        let Some(player) = tracer.player(&node.subject()) else { return };
        let bytes = player.left();
        let name = &node.record().name;
        let ask = |range: &Range<u64>| base.prefetch(range.start, range.end - range.start, Purpose::Prefetch);
        match drive(player, ask) {
            Ok(0) => tracing::info!(base = name, bytes, "the bytes of a boot are prefetched"),
            Ok(missing) => tracing::info!(base = name, bytes, missing, "a prefetch is incomplete"),
            Err(error) => tracing::warn!(base = name, %error, "a prefetch ended early"),
        }
    }
}

/// Fetches all ranges, in order. `ask` starts to fetch what is missing of a range and returns what to wait for; none
/// when nothing is missing. Returns the number of ranges that are incomplete.
fn drive<E>(player: Player, ask: impl Fn(&Range<u64>) -> Result<Option<Completion>, E>) -> Result<u32, E> {
    let mut under_way: VecDeque<(Range<u64>, Completion, u32)> = VecDeque::new();
    let (mut bytes, mut missing) = (0, 0);
    let mut ranges = player;
    loop {
        while bytes < UNDER_WAY
            && let Some(range) = ranges.next()
        {
            if let Some(completion) = ask(&range)? {
                bytes += range.end - range.start;
                under_way.push_back((range, completion, 1));
            }
        }
        let Some((range, completion, tries)) = under_way.pop_front() else { return Ok(missing) };
        completion.wait();
        match ask(&range)? {
            // The bytes that came may be tables that lead to more bytes.
            Some(completion) if tries < TRIES => under_way.push_back((range, completion, tries + 1)),
            more => {
                bytes -= range.end - range.start;
                missing += u32::from(more.is_some());
                if missing >= GIVE_UP {
                    return Ok(missing);
                }
            }
        }
    }
}
