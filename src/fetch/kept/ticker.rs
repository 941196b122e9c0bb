//! The thread that calls [`DiskCache::tick`].

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread::Builder;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::DiskCache;

const EVERY: Duration = Duration::from_secs(1);
/// Small, because memory may be locked and a tick needs little stack.
const STACK: usize = 256 << 10;

/// How long the drop waits for the thread, which may wait for a hanging disk.
const LAST_TICK: Duration = Duration::from_secs(5);

/// Ends the thread when it is dropped, and waits for the thread unless the disk hangs.
#[derive(Debug)]
pub struct Ticker {
    stop: Option<Sender<()>>,
    /// Closed when the thread ends.
    ended: Mutex<Receiver<()>>,
}

impl DiskCache {
    /// Starts a thread that indexes the files, and ticks once a second, until the ticker or the cache is dropped.
    ///
    /// # Errors
    /// When the system starts no thread.
    pub fn start(self: &Arc<Self>) -> io::Result<Ticker> {
        let cache: Weak<Self> = Arc::downgrade(self);
        let (stop, stopped) = channel();
        let (ends, ended) = channel();
        let mut ticked = Instant::now();
        let run = move || {
            let _ends: Sender<()> = ends;
            if let Some(cache) = cache.upgrade() {
                cache.load_first();
            }
            loop {
                // The scan runs in small steps, so that the thread ends soon when it is told to.
                let more = cache.upgrade().is_some_and(|cache| cache.scan_step());
                let wait = if more { Duration::ZERO } else { EVERY };
                if stopped.recv_timeout(wait) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
                if more && ticked.elapsed() < EVERY {
                    continue;
                }
                let Some(cache) = cache.upgrade() else { return };
                ticked = Instant::now();
                cache.tick_once(!more);
            }
        };
        Builder::new().name("cache-tick".into()).stack_size(STACK).spawn(run)?;
        Ok(Ticker { stop: Some(stop), ended: Mutex::new(ended) })
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        drop(self.stop.take());
        if self.ended.get_mut().recv_timeout(LAST_TICK) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!("the cache's disk does not answer; the worker ends without waiting for it");
        }
    }
}
