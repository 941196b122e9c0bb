//! Reads of the cache's disk whose results are guesses or proven elsewhere: whatever the disk does, no fetch waits for it
//! long.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::bases::lane::Lane;
use crate::fetch::DISK_TIMEOUT;

/// Runs reads on threads of its own.
pub(super) struct TimedLane {
    lane: Arc<Lane>,
    /// A read took too long and has not ended: no other is tried.
    hangs: Arc<AtomicBool>,
    /// Reads that wait or run, and how many there may be.
    asked: Arc<AtomicUsize>,
    most: usize,
}

/// Notes that a read has ended, also by a panic.
struct Ended {
    this: Arc<AtomicBool>,
    hangs: Arc<AtomicBool>,
    asked: Arc<AtomicUsize>,
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.this.store(true, Ordering::SeqCst);
        self.hangs.store(false, Ordering::SeqCst);
        self.asked.fetch_sub(1, Ordering::SeqCst);
    }
}

impl TimedLane {
    /// With at most `threads` threads of this name, which has at most 15 bytes, and `most` reads at a time.
    pub fn new(name: &'static str, threads: usize, most: usize) -> Self {
        Self { lane: Lane::new(name, threads), hangs: Arc::default(), asked: Arc::default(), most }
    }

    /// The result of a read, if the disk answers in time, and not too many reads wait for it.
    pub async fn ask<T: Send + 'static>(&self, read: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        if self.hangs.load(Ordering::SeqCst) {
            return None;
        }
        if self.asked.fetch_add(1, Ordering::SeqCst) >= self.most {
            self.asked.fetch_sub(1, Ordering::SeqCst);
            return None;
        }
        let (say, found) = oneshot::channel();
        let ended = Arc::new(AtomicBool::new(false));
        let end = Ended { this: ended.clone(), hangs: self.hangs.clone(), asked: self.asked.clone() };
        self.lane.run(Box::new(move || {
            let _end = end;
            let _ = say.send(read());
        }));
        if let Ok(found) = timeout(DISK_TIMEOUT, found).await {
            return found.ok();
        }
        self.hangs.store(true, Ordering::SeqCst);
        // It may have ended meanwhile, and then does not say so again.
        if ended.load(Ordering::SeqCst) {
            self.hangs.store(false, Ordering::SeqCst);
        }
        None
    }
}
