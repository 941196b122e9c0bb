//! Threads for requests of the control socket that may wait.
//!
//! What must hold: requests that hang, as `base add` of a path on a filesystem that is gone, keep no others waiting. So
//! few run at a time, but one that has run for [`HANGS`] makes room for another one, up to [`MOST`]. What is answered
//! from memory, and the end, have room of their own.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;

/// Requests of each kind that run at a time.
const AT_A_TIME: usize = 16;
/// One that runs for so long may hang, and does not count any more.
const HANGS: Duration = Duration::from_millis(500);
/// Requests that there are at most, those that hang included. Those for what is answered at once come on top.
const MOST: usize = 256;

/// What a request waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The store, or a file of a base.
    Work,
    /// Memory.
    Question,
}

/// See the module.
#[derive(Clone)]
pub(super) struct Rooms {
    work: Arc<Semaphore>,
    questions: Arc<Semaphore>,
    all: Arc<Semaphore>,
}

/// Why a request was not done.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// Too many hang.
    Full,
    /// It panicked.
    Ended,
}

impl Rooms {
    pub fn new() -> Self {
        let room = |size| Arc::new(Semaphore::new(size));
        Self { work: room(AT_A_TIME), questions: room(AT_A_TIME), all: room(MOST) }
    }

    /// A runtime with threads for all that may run.
    pub fn runtime() -> io::Result<tokio::runtime::Runtime> {
        let threads = MOST + 2 * AT_A_TIME;
        tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(threads).build()
    }

    /// Runs `job` on a thread of its own when there is room.
    pub async fn run<T: Send + 'static>(
        &self,
        kind: Kind,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Refused> {
        let (room, all) = match kind {
            Kind::Question => (&self.questions, None),
            Kind::Work => {
                (&self.work, Some(self.all.clone().try_acquire_owned().map_err(|_| Refused::Full)?))
            }
        };
        let room = room.clone().acquire_owned().await.map_err(|_| Refused::Ended)?;
        let mut running = tokio::task::spawn_blocking(move || {
            let done = job();
            drop(all);
            done
        });
        match tokio::time::timeout(HANGS, &mut running).await {
            Ok(done) => done,
            Err(_) => {
                drop(room);
                running.await
            }
        }
        .map_err(|_| Refused::Ended)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn requests_that_hang_keep_no_others_waiting_and_are_bounded() {
        let runtime = Rooms::runtime().expect("threads");
        let rooms = Rooms::new();
        runtime.block_on(async {
            let mut hanging = Vec::new();
            let mut go = Vec::new();
            for _ in 0..MOST {
                let (says, said) = channel::<()>();
                go.push(says);
                let rooms = rooms.clone();
                hanging.push(tokio::spawn(async move { rooms.run(Kind::Work, move || said.recv()).await }));
            }
            while rooms.all.available_permits() > 0 {
                tokio::task::yield_now().await;
            }
            assert_eq!(rooms.run(Kind::Work, || ()).await, Err(Refused::Full));
            assert_eq!(rooms.run(Kind::Question, || 5).await, Ok(5));
            drop(go);
            for hung in hanging {
                assert!(hung.await.expect("no panic").is_ok());
            }
            assert_eq!(rooms.run(Kind::Work, || 6).await, Ok(6));
        });
    }

    #[test]
    fn one_that_works_is_done_while_forty_hang() {
        let runtime = Rooms::runtime().expect("threads");
        let rooms = Rooms::new();
        runtime.block_on(async {
            let (says, said) = channel::<()>();
            let said = Arc::new(parking_lot::Mutex::new(said));
            for _ in 0..40 {
                let (rooms, said) = (rooms.clone(), said.clone());
                tokio::spawn(async move { rooms.run(Kind::Work, move || said.lock().recv()).await });
            }
            tokio::task::yield_now().await;
            let done = rooms.run(Kind::Work, || 7);
            assert_eq!(tokio::time::timeout(Duration::from_secs(60), done).await, Ok(Ok(7)));
            drop(says);
        });
    }
}
