//! Where a recorder is put in and taken out while a disk is read.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock};

use super::{Limits, Recorder};

/// First boots of one base that are recorded at once; the first that ends as one is kept.
const AT_ONCE: usize = 8;

/// One for each disk. Without a recorder a read costs one load.
pub struct Tap {
    disk: u64,
    /// There is something to do when the base is read.
    open: AtomicBool,
    slot: RwLock<Slot>,
    /// To be run at the first read.
    first: Mutex<Option<First>>,
}

/// Must not wait.
type First = Box<dyn FnOnce() + Send>;

#[derive(Clone)]
pub(super) enum Slot {
    Closed,
    /// The first read begins a recording.
    Armed(Arc<Arm>),
    Recording(Arc<Recorder>),
}

/// What the disks of a base that nobody booted yet have in common.
pub(super) struct Arm {
    size: u64,
    limits: Limits,
    running: Mutex<Vec<(u64, Arc<Recorder>)>>,
}

impl Arm {
    pub(super) fn new(size: u64, limits: Limits) -> Self {
        Self { size, limits, running: Mutex::default() }
    }

    /// A recorder for a disk that begins to read, unless enough others do.
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

    /// Disks that are being recorded, in the order in which they began.
    pub(super) fn running(&self) -> Vec<(u64, Arc<Recorder>)> {
        self.running.lock().clone()
    }

    /// A recording has ended.
    pub(super) fn end(&self, disk: u64) {
        self.running.lock().retain(|(of, _)| *of != disk);
    }
}

impl Tap {
    /// Of the disk of that number.
    pub fn new(disk: u64) -> Self {
        Self { disk, open: AtomicBool::new(false), slot: RwLock::new(Slot::Closed), first: Mutex::default() }
    }

    /// Notes a read of the base, when somebody records.
    pub fn note(&self, offset: u64, len: u64) {
        if !self.open.load(Ordering::Relaxed) {
            return;
        }
        let arm = match &*self.slot.read() {
            Slot::Closed => None,
            Slot::Recording(recorder) => return recorder.note(offset, len),
            Slot::Armed(arm) => Some(arm.clone()),
        };
        let Some(arm) = arm else { return self.first() };
        let mut slot = self.slot.write();
        // Others may have come first, with another arm even.
        if let Slot::Armed(now) = &*slot
            && Arc::ptr_eq(now, &arm)
            && let Some(recorder) = arm.begin(self.disk)
        {
            recorder.note(offset, len);
            *slot = Slot::Recording(recorder);
        }
    }

    fn first(&self) {
        let first = self.first.lock().take();
        if let Some(first) = first {
            // Nothing more to do, unless a recording began meanwhile.
            let slot = self.slot.write();
            self.open.store(!matches!(*slot, Slot::Closed), Ordering::Relaxed);
            drop(slot);
            first();
        }
    }

    /// Has `first` run when the base is read, unless a recording begins before that: its reads are to be the guest's own.
    pub(super) fn at_first_read(&self, first: First) {
        let slot = self.slot.write();
        *self.first.lock() = Some(first);
        self.open.store(true, Ordering::Relaxed);
        drop(slot);
    }

    /// Whether somebody records, or will, or wants to know of the first read.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    /// Number of the disk.
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
