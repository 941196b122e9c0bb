//! Threads for requests of the control socket that may wait.
//!
//! What must hold: requests that hang, such as `base add` of a path on a filesystem that is gone, do not delay others.
//! So [`CONCURRENT`] requests run at a time, but one that has run for [`STUCK_AFTER`] no longer counts, up to
//! [`MAX_REQUESTS`] in all. Requests that are answered from memory, `stop` among them, have threads of their own.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

/// Requests of each kind that run at a time.
const CONCURRENT: usize = 16;
/// Maps that are made at a time, so that clients that look at maps take no processor from guests.
const MAPS: usize = 2;
/// A request that runs longer than this may hang, and no longer counts towards [`CONCURRENT`].
const STUCK_AFTER: Duration = Duration::from_millis(500);
/// Most requests of the kinds `Work` and `Map`, those that hang included.
const MAX_REQUESTS: usize = 256;

/// What a request waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum JobKind {
    /// The store, or a file of a base.
    Work,
    /// Memory only.
    Query,
    /// As `Work`, and takes a processor for long.
    Map,
}

/// The permits of each kind of request.
#[derive(Clone)]
pub(super) struct Pools {
    work: Arc<Semaphore>,
    maps: Arc<Semaphore>,
    queries: Arc<Semaphore>,
    all_work: Arc<Semaphore>,
}

/// Why a request has no result.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PoolError {
    /// Too many requests hang.
    Full,
    /// The request panicked.
    Panicked,
}

impl Pools {
    pub fn new() -> Self {
        let permits = |count| Arc::new(Semaphore::new(count));
        Self {
            work: permits(CONCURRENT),
            maps: permits(MAPS),
            queries: permits(CONCURRENT),
            all_work: permits(MAX_REQUESTS),
        }
    }

    /// A runtime with enough threads for all requests that may run.
    pub fn runtime() -> io::Result<tokio::runtime::Runtime> {
        let threads = MAX_REQUESTS + 2 * CONCURRENT;
        tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(threads).build()
    }

    /// Runs `job` on a thread of its own once there is a permit. `Full` when [`MAX_REQUESTS`] run or wait.
    pub async fn run<T: Send + 'static>(
        &self,
        kind: JobKind,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, PoolError> {
        let (running_permits, total_permit) = match kind {
            JobKind::Query => (&self.queries, None),
            JobKind::Work | JobKind::Map => {
                let permit = self.all_work.clone().try_acquire_owned().map_err(|_| PoolError::Full)?;
                (if kind == JobKind::Map { &self.maps } else { &self.work }, Some(permit))
            }
        };
        let permit = running_permits.clone().acquire_owned().await.map_err(|_| PoolError::Panicked)?;
        let mut running = tokio::task::spawn_blocking(move || {
            let done = job();
            drop(total_permit);
            done
        });
        match tokio::time::timeout(STUCK_AFTER, &mut running).await {
            Ok(done) => done,
            Err(_) => {
                drop(permit);
                running.await
            }
        }
        .map_err(|_| PoolError::Panicked)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn requests_that_hang_delay_no_others_and_are_bounded() {
        let runtime = Pools::runtime().expect("threads");
        let pools = Pools::new();
        runtime.block_on(async {
            let mut hanging = Vec::new();
            let mut senders = Vec::new();
            for _ in 0..MAX_REQUESTS {
                let (sender, receiver) = channel::<()>();
                senders.push(sender);
                let pools = pools.clone();
                hanging.push(tokio::spawn(
                    async move { pools.run(JobKind::Work, move || receiver.recv()).await },
                ));
            }
            while pools.all_work.available_permits() > 0 {
                tokio::task::yield_now().await;
            }
            assert_eq!(pools.run(JobKind::Work, || ()).await, Err(PoolError::Full));
            assert_eq!(pools.run(JobKind::Query, || 5).await, Ok(5));
            drop(senders);
            for task in hanging {
                assert!(task.await.expect("no panic").is_ok());
            }
            assert_eq!(pools.run(JobKind::Work, || 6).await, Ok(6));
        });
    }

    // Two maps of bases whose files hung kept every other map waiting.
    #[test]
    fn maps_that_hang_delay_no_other_map() {
        let runtime = Pools::runtime().expect("threads");
        let pools = Pools::new();
        runtime.block_on(async {
            let (sender, receiver) = channel::<()>();
            let receiver = Arc::new(parking_lot::Mutex::new(receiver));
            for _ in 0..2 * MAPS {
                let (pools, receiver) = (pools.clone(), receiver.clone());
                tokio::spawn(async move { pools.run(JobKind::Map, move || receiver.lock().recv()).await });
            }
            tokio::task::yield_now().await;
            let done = pools.run(JobKind::Map, || 8);
            assert_eq!(tokio::time::timeout(Duration::from_secs(60), done).await, Ok(Ok(8)));
            drop(sender);
        });
    }

    #[test]
    fn a_request_is_carried_out_while_forty_others_hang() {
        let runtime = Pools::runtime().expect("threads");
        let pools = Pools::new();
        runtime.block_on(async {
            let (sender, receiver) = channel::<()>();
            let receiver = Arc::new(parking_lot::Mutex::new(receiver));
            for _ in 0..40 {
                let (pools, receiver) = (pools.clone(), receiver.clone());
                tokio::spawn(async move { pools.run(JobKind::Work, move || receiver.lock().recv()).await });
            }
            tokio::task::yield_now().await;
            let done = pools.run(JobKind::Work, || 7);
            assert_eq!(tokio::time::timeout(Duration::from_secs(60), done).await, Ok(Ok(7)));
            drop(sender);
        });
    }
}
