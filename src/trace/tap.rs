//! The tap of a disk: a recorder can be inserted and removed while the disk is read.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock};

use super::{Limits, Recorder};

/// The most first boots of one base that are recorded at once. The first recording that proves to be a boot is saved.
const AT_ONCE: usize = 8;

/// Each disk has one. Without a recorder, a read costs one load.
pub struct Tap {
    disk: u64,
    /// A read of the base must look at `slot` or `first`.
    open: AtomicBool,
    slot: RwLock<Slot>,
    /// Runs at the first read.
    first: Mutex<Option<First>>,
}

/// Must not wait.
type First = Box<dyn FnOnce() + Send>;

#[derive(Clone)]
pub(super) enum Slot {
    Closed,
    /// The first read begins a recording.
    Waiting(Arc<FirstBoots>),
    Recording(Arc<Recorder>),
}

/// The recordings of first boots of one base, shared by the taps of its disks.
pub(super) struct FirstBoots {
    size: u64,
    limits: Limits,
    running: Mutex<Vec<(u64, Arc<Recorder>)>>,
}

impl FirstBoots {
    pub(super) fn new(size: u64, limits: Limits) -> Self {
        Self { size, limits, running: Mutex::default() }
    }

    /// The recorder for a disk that begins to read; `None` when enough others are being recorded.
    fn begin(&self, disk: u64) -> Option<Arc<Recorder>> {
        let mut running = self.running.lock();
        if let Some((_, recorder)) = running.iter().find(|(of, _)| *of == disk) {
            return Some(recorder.clone());
        }
        if running.len() >= AT_ONCE {
            return None;
        }
        let recorder = Arc::new(Recorder::new(self.size, self.limits));
        running.push((disk, recorder.clone()));
        Some(recorder)
    }

    /// The disks that are being recorded, in the order of their first reads.
    pub(super) fn running(&self) -> Vec<(u64, Arc<Recorder>)> {
        self.running.lock().clone()
    }

    /// Removes the ended recording of a disk.
    pub(super) fn end(&self, disk: u64) {
        self.running.lock().retain(|(of, _)| *of != disk);
    }
}

impl Tap {
    /// The tap of disk number `disk`.
    pub fn new(disk: u64) -> Self {
        Self { disk, open: AtomicBool::new(false), slot: RwLock::new(Slot::Closed), first: Mutex::default() }
    }

    /// Notes a read of the base, if a recorder is inserted.
    pub fn note(&self, offset: u64, len: u64) {
        if !self.open.load(Ordering::Relaxed) {
            return;
        }
        let first_boots = match &*self.slot.read() {
            Slot::Closed => None,
            Slot::Recording(recorder) => return recorder.note(offset, len),
            Slot::Waiting(first_boots) => Some(first_boots.clone()),
        };
        let Some(first_boots) = first_boots else { return self.first() };
        let mut slot = self.slot.write();
        // Another thread may have changed the slot meanwhile.
        if let Slot::Waiting(now) = &*slot
            && Arc::ptr_eq(now, &first_boots)
            && let Some(recorder) = first_boots.begin(self.disk)
        {
            recorder.note(offset, len);
            *slot = Slot::Recording(recorder);
        }
    }

    /// Runs the action for the first read.
    fn first(&self) {
        let first = self.first.lock().take();
        if let Some(first) = first {
            // Close the tap, unless a recording began meanwhile.
            let slot = self.slot.write();
            self.open.store(!matches!(*slot, Slot::Closed), Ordering::Relaxed);
            drop(slot);
            first();
        }
    }

    /// Runs `first` at the first read of the base, unless a recording begins before that: a recording must contain only
    /// the guest's own reads.
    pub(super) fn at_first_read(&self, first: First) {
        let slot = self.slot.write();
        *self.first.lock() = Some(first);
        self.open.store(true, Ordering::Relaxed);
        drop(slot);
    }

    /// Whether a read of the base has anything to note.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    /// The number of the disk.
    pub(super) fn disk(&self) -> u64 {
        self.disk
    }

    pub(super) fn set(&self, new: Slot) {
        let mut slot = self.slot.write();
        let waits = self.first.lock().is_some();
        self.open.store(waits || !matches!(new, Slot::Closed), Ordering::Relaxed);
        *slot = new;
    }
}
