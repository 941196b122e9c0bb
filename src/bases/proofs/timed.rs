//! Reads of the cache's disk whose results are guesses or proven elsewhere: whatever the disk does, no fetch waits for it
//! long.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::bases::lane::Lane;
use crate::fetch::DISK_TIMEOUT;

/// Runs reads on threads of its own.
pub(super) struct TimedLane {
    lane: Arc<Lane>,
    /// A read took too long and has not ended: no other is tried.
    hangs: Arc<AtomicBool>,
}

impl TimedLane {
    /// With at most `threads` threads of this name, which has at most 15 bytes.
    pub fn new(name: &'static str, threads: usize) -> Self {
        Self { lane: Lane::new(name, threads), hangs: Arc::default() }
    }

    /// The result of a read, if the disk answers in time.
    pub async fn ask<T: Send + 'static>(&self, read: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        if self.hangs.load(Ordering::SeqCst) {
            return None;
        }
        let (say, found) = oneshot::channel();
        let ended = Arc::new(AtomicBool::new(false));
        let (hangs, end) = (self.hangs.clone(), ended.clone());
        self.lane.run(Box::new(move || {
            let _ = say.send(read());
            end.store(true, Ordering::SeqCst);
            hangs.store(false, Ordering::SeqCst);
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
