//! Tracks the attached disks, and detaches those that are idle.
//!
//! What must hold: an unused disk takes no descriptor and no mapping. No client notices that its disk is detached. A
//! request holds the attached disk by its `Arc`, so a disk in use is never detached; the next request attaches it again
//! (D47). Handles stay valid: a handle is an error epoch, and a disk with a failed flush is not detached.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::pools::DEFAULT;
use super::{DiskNode, Store};

/// How long a disk that is known to be closed is unused before it is detached.
pub const IDLE: Duration = Duration::from_secs(30);
/// The same for a disk that may be open. Attaching a large disk again takes time.
pub const OPEN_IDLE: Duration = Duration::from_secs(600);
/// Disks that one pass detaches.
const AT_ONCE: usize = 256;

/// Huge pages that one pass merges. Merging one takes up to some milliseconds.
const MERGED_AT_ONCE: usize = 128;

/// See the module.
pub(super) struct Attachments {
    started: Instant,
    /// Most attached disks. Above this the longest unused disk is detached first.
    limit: AtomicUsize,
    nodes: Mutex<HashMap<u64, Weak<DiskNode>>>,
    /// Milliseconds from `started` to the last tick: requests read no clock.
    now: AtomicU64,
}

impl Default for Attachments {
    fn default() -> Self {
        let (limit, nodes) = (AtomicUsize::new(usize::MAX), Mutex::default());
        Self { started: Instant::now(), limit, nodes, now: AtomicU64::new(0) }
    }
}

impl Attachments {
    pub fn now(&self) -> u64 {
        self.now.load(Ordering::Relaxed)
    }

    fn tick(&self) -> u64 {
        let now = self.started.elapsed().as_millis() as u64;
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

    /// Detaches the longest unused disks until there is room for one more. The caller holds no lock.
    ///
    /// When all disks are in use there is no room, and the number of descriptors is the only bound.
    pub fn make_room(&self) {
        let limit = self.limit.load(Ordering::Relaxed);
        if self.nodes.lock().len() < limit {
            return;
        }
        self.tick();
        let mut nodes = self.all();
        nodes.sort_unstable_by_key(|node| node.used());
        for node in &nodes {
            if node.detach() && self.nodes.lock().len() < limit {
                return;
            }
        }
    }
}

impl Store {
    /// Sets how many disks are attached at a time, as far as those in use allow.
    pub fn attach_at_most(&self, limit: usize) {
        self.attachments.limit.store(limit.max(1), Ordering::Relaxed);
    }

    /// Sets how many files of layers are open at a time, beside those that are being read.
    pub fn open_layers_at_most(&self, files: usize) {
        self.layers.open_at_most(files);
    }

    /// Completes sealings that an earlier worker began, and removes what earlier changes dropped. To be called about once a
    /// second; may wait for the store. What fails is tried again, after pauses of up to a minute.
    pub fn tend_layers(&self) {
        self.tend_layers_at(Instant::now());
    }

    pub(super) fn tend_layers_at(&self, now: Instant) {
        self.pool_numbers().into_iter().for_each(|pool| self.tend_layers_in(pool, now));
    }

    /// As [`Store::tend_layers`], of the disks in one pool.
    pub fn tend_layers_in(&self, pool: u64, now: Instant) {
        for node in self.attachments.all().iter().filter(|node| self.pool_of(node) == pool) {
            if self.is_closing() {
                return;
            }
            node.tend_layers(now);
        }
        self.remove_dropped_in(pool, now);
        if pool == DEFAULT {
            self.count_changed_quotas();
            self.close_idle_snapshots();
        }
    }

    /// Detaches idle disks: those that are known to be closed after `closed` without use, all others after `open`. To
    /// be called about once a second; may wait for the store.
    pub fn detach_idle(&self, closed: Duration, open: Duration) {
        self.pool_numbers().into_iter().for_each(|pool| self.detach_idle_in(pool, closed, open));
    }

    /// As [`Store::detach_idle`], of the disks in one pool.
    pub fn detach_idle_in(&self, pool: u64, closed: Duration, open: Duration) {
        let now = self.attachments.tick();
        let is_idle = |node: &Arc<DiskNode>| {
            if self.pool_of(node) != pool {
                return false;
            }
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

    /// Syncs the data files of the disks in a pool whose flushes carried blocks a while ago (D97), or whose last sync failed. To
    /// be called every second or so; may wait for that pool's storage. What fails is tried again after pauses of up to a minute.
    pub fn settle_carried_in(&self, pool: u64, now: Instant) {
        for node in self.attachments.all().iter().filter(|node| self.pool_of(node) == pool) {
            if self.is_closing() {
                return;
            }
            let is_due = node.known_rare().is_none_or(|rare| rare.settling_retry.is_due(now));
            let Some(disk) = node.peek().filter(|_| is_due) else { continue };
            // A failure is the disk's own: its handles refuse writes, and say why.
            match disk.delta().settle_old() {
                Ok(()) => {
                    if let Some(rare) = node.known_rare() {
                        rare.settling_retry.succeeded();
                    }
                }
                Err(error) => {
                    let pause = node.rare().settling_retry.failed(now).as_secs();
                    tracing::warn!(disk = node.name(), %error, "the data file of the disk is not synced yet; it is tried again in {pause} s");
                }
            }
        }
    }

    /// The attached disks.
    pub fn attached(&self) -> Vec<Arc<DiskNode>> {
        self.attachments.all()
    }
}
