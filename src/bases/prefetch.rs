//! Plays traces: has fetched what a boot is known to read, ahead of the guest.
//!
//! One thread for each base that is being played, which keeps a few ranges under way and waits for the oldest. It is
//! never in anybody's way: what readers wait for goes first at the source, and a server that does not answer ends the
//! playing, not the boot.

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

/// Bytes under way: enough for a gigabit at a distance of 50 ms, and little next to what readers ask for.
const UNDER_WAY: u64 = 8 << 20;
/// An image may have to fetch its tables first, level by level.
const TRIES: u32 = 4;
/// Ranges that did not come, after which there is no use in going on.
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

    /// A base that has a trace begins to be read. Does not wait.
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
            tracing::warn!(%error, "no thread to prefetch a boot with");
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
        // A disk that reads has it attached.
        let Some(base) = node.attached().filter(|base| !base.is_plain()) else { return };
        let Some(player) = tracer.player(&node.subject()) else { return };
        let bytes = player.left();
        let name = &node.record().name;
        let ask = |range: &Range<u64>| base.prefetch(range.start, range.end - range.start, Purpose::Prefetch);
        match drive(player, ask) {
            Ok(0) => tracing::info!(base = name, bytes, "what a boot reads was prefetched"),
            Ok(missing) => tracing::info!(base = name, bytes, missing, "a prefetch was not completed"),
            Err(error) => tracing::warn!(base = name, %error, "a prefetch ended early"),
        }
    }
}

/// Has all ranges fetched, in order. `ask` starts what is missing of a range and says when to ask again; nothing is
/// missing when it has nothing to say. Returns how many ranges did not come.
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
            // What came may have said that there is more to fetch.
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
