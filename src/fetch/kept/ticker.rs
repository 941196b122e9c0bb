//! The thread that calls [`DiskCache::tick`].

use std::io;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use super::DiskCache;

const EVERY: Duration = Duration::from_secs(1);
/// Memory may be locked, and a tick is not deep.
const STACK: usize = 256 << 10;

/// Ends the thread when it goes, and waits for it.
#[derive(Debug)]
pub struct Ticker {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl DiskCache {
    /// Starts a thread that ticks once a second, until the ticker or the cache goes.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start(self: &Arc<Self>) -> io::Result<Ticker> {
        let cache: Weak<Self> = Arc::downgrade(self);
        let (stop, stopped) = channel();
        let mut ticked = Instant::now();
        let run = move || {
            loop {
                // What an earlier worker left is read piece by piece, so that this ends when it is told to.
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
        let thread = Builder::new().name("plyfs-cache".into()).stack_size(STACK).spawn(run)?;
        Ok(Ticker { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
