//! Bytes that a transfer has delivered and that their taker has not taken: a transfer that is faster waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::sync::Notify;

use super::HttpSource;
use crate::source::RemoteSource;

/// A source whose object comes as a whole: each request transfers all that is before its range too.
pub trait WholeSource: RemoteSource {
    /// Lets later transfers wait for the taker of their bytes.
    fn set_backlog(&self, backlog: &Arc<Backlog>);
}

impl WholeSource for HttpSource {
    fn set_backlog(&self, backlog: &Arc<Backlog>) {
        self.wait_for(backlog);
    }
}

/// See the module.
pub struct Backlog {
    most: u64,
    bytes: AtomicU64,
    /// No taker is left.
    is_left: AtomicBool,
    changed: Notify,
}

impl Backlog {
    /// With the most bytes that may wait, one delivery more.
    pub fn new(most: u64) -> Self {
        Self { most, bytes: AtomicU64::new(0), is_left: AtomicBool::new(false), changed: Notify::new() }
    }

    /// Says that bytes are delivered.
    pub fn came(&self, bytes: u64) {
        self.bytes.fetch_add(bytes, Ordering::AcqRel);
    }

    /// Says that bytes are taken.
    pub fn taken(&self, bytes: u64) {
        self.bytes.fetch_sub(bytes, Ordering::AcqRel);
        self.changed.notify_waiters();
    }

    /// Says that no bytes will be taken any more: a later request waits for no one.
    pub fn leave(&self) {
        self.is_left.store(true, Ordering::Release);
        self.changed.notify_waiters();
    }

    /// Returns when more may be delivered.
    pub(super) async fn has_room(&self) {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            // Before the look: bytes that are taken after it are noticed.
            changed.as_mut().enable();
            if self.bytes.load(Ordering::Acquire) < self.most || self.is_left.load(Ordering::Acquire) {
                return;
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_transfer_waits_until_enough_was_taken() {
        let backlog = Backlog::new(100);
        backlog.came(99);
        backlog.has_room().await;
        backlog.came(50);
        let mut full = std::pin::pin!(backlog.has_room());
        tokio::select! {
            biased;
            () = &mut full => panic!("149 bytes wait"),
            () = std::future::ready(()) => {}
        }
        backlog.taken(49);
        tokio::select! {
            biased;
            () = &mut full => panic!("100 bytes wait"),
            () = std::future::ready(()) => {}
        }
        backlog.taken(1);
        full.await;
    }

    #[tokio::test]
    async fn a_request_waits_for_no_taker_that_has_left() {
        let backlog = Backlog::new(100);
        backlog.came(150);
        let mut full = std::pin::pin!(backlog.has_room());
        tokio::select! {
            biased;
            () = &mut full => panic!("150 bytes wait"),
            () = std::future::ready(()) => {}
        }
        backlog.leave();
        full.await;
        backlog.has_room().await;
    }
}
