//! Which disks are attached: those that are used.
//!
//! What must hold: a disk that is not used costs no descriptor and no mapping; being detached is noticed by no client. A
//! request holds the attached disk by its `Arc`, so a disk that is in use is never detached under it; the next request
//! attaches it again (D47). Handles stay good: they are error epochs, and a disk with a failed flush is not detached.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{DiskNode, Store};

/// A disk that is known to be closed is detached when it was not used for so long.
pub const IDLE: Duration = Duration::from_secs(30);
/// One that may be open: to attach a large disk again takes time.
pub const OPEN_IDLE: Duration = Duration::from_secs(600);
/// So many are detached at once, before the next look.
const AT_ONCE: usize = 256;

/// Huge pages that are merged before the next look; one takes up to some milliseconds.
const MERGED_AT_ONCE: usize = 128;

/// See the module.
pub(super) struct Attachments {
    begun: Instant,
    /// Attached disks, at most; above it the longest unused goes first.
    most: AtomicUsize,
    nodes: Mutex<HashMap<u64, Weak<DiskNode>>>,
    /// Milliseconds since `begun`, when last looked: requests read no clock.
    now: AtomicU64,
}

impl Default for Attachments {
    fn default() -> Self {
        let (most, nodes) = (AtomicUsize::new(usize::MAX), Mutex::default());
        Self { begun: Instant::now(), most, nodes, now: AtomicU64::new(0) }
    }
}

impl Attachments {
    pub fn now(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    fn tick(&self) -> u64 {
        let now = self.begun.elapsed().as_millis() as u64;
        self.now.store(now, Ordering::Relaxed);
        now
    }

    pub fn add(&self, id: u64, node: Weak<DiskNode>) {
        self.nodes.lock().insert(id, node);
    }

    pub fn remove(&self, id: u64) {
        self.nodes.lock().remove(&id);
    }

    fn all(&self) -> Vec<Arc<DiskNode>> {
        self.nodes.lock().values().filter_map(Weak::upgrade).collect()
    }

    /// Detaches the longest unused disks until there is room for one more. Not under a lock of the caller's.
    ///
    /// There is none when all that may go are in use: then descriptors have to do, as many as there are.
    pub fn make_room(&self) {
        let most = self.most.load(Ordering::Relaxed);
        if self.nodes.lock().len() < most {
            return;
        }
        self.tick();
        let mut nodes = self.all();
        nodes.sort_unstable_by_key(|node| node.used());
        for node in &nodes {
            if node.detach() && self.nodes.lock().len() < most {
                return;
            }
        }
    }
}

impl Store {
    /// At most so many disks are attached at a time, as far as those that are not in use allow.
    pub fn attach_at_most(&self, most: usize) {
        self.attachments.most.store(most.max(1), Ordering::Relaxed);
    }

    /// Detaches disks that were not used for so long: `closed` those that are known to be closed, `open` all others.
    /// To be called every second or so; may wait for the store.
    pub fn detach_idle(&self, closed: Duration, open: Duration) {
        let now = self.attachments.tick();
        let is_idle = |node: &Arc<DiskNode>| {
            let limit = if node.is_known_closed() { closed } else { open };
            u128::from(now.saturating_sub(node.used())) >= limit.as_millis()
        };
        for node in self.attachments.all().iter().filter(|node| is_idle(node)).take(AT_ONCE) {
            if self.is_closing() {
                return;
            }
            node.detach();
        }
    }

    /// Prepares large live maps for the next flush and for the death of this worker: see [`Delta::tend_map`]. To be called
    /// every second or so; waits for nothing.
    ///
    /// [`Delta::tend_map`]: crate::delta::Delta::tend_map
    pub fn tend_maps(&self) {
        let mut left = MERGED_AT_ONCE;
        for disk in self.attachments.all().iter().filter_map(|node| node.peek()) {
            if left == 0 || self.is_closing() {
                return;
            }
            left -= disk.delta().tend_map(left);
        }
    }

    /// Disks that are attached now.
    pub fn attached(&self) -> Vec<Arc<DiskNode>> {
        self.attachments.all()
    }
}
