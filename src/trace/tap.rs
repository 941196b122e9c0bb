//! Where a recorder is put in and taken out while a disk is read.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLock;

use super::Recorder;

/// One for each disk. Without a recorder a read costs one load.
pub struct Tap {
    disk: u64,
    open: AtomicBool,
    recorder: RwLock<Option<Arc<Recorder>>>,
}

impl Tap {
    /// Of the disk of that number, which is not 0.
    pub fn new(disk: u64) -> Self {
        Self { disk, open: AtomicBool::new(false), recorder: RwLock::new(None) }
    }

    /// Notes a read of the base, when somebody records.
    pub fn note(&self, offset: u64, len: u64) {
        if !self.open.load(Ordering::Relaxed) {
            return;
        }
        if let Some(recorder) = &*self.recorder.read() {
            recorder.note(self.disk, offset, len);
        }
    }

    /// Whether somebody records.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    /// Number of the disk.
    pub(super) fn disk(&self) -> u64 {
        self.disk
    }

    /// Puts a recorder in, or takes it out.
    pub(super) fn set(&self, recorder: Option<Arc<Recorder>>) {
        let mut slot = self.recorder.write();
        self.open.store(recorder.is_some(), Ordering::Relaxed);
        *slot = recorder;
    }
}
