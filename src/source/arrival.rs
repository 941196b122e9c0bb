//! What a reader waits for that must not keep a thread: bytes that are being fetched.
//!
//! A read of bytes that are not here does not wait. It fails with an [`Arrival`], and whoever asked runs the same read
//! again once that has happened. What must hold:
//! - An arrival always happens: with the bytes, or with an error that the next try of the read reports (D37).
//! - As long as somebody holds the arrival (or a clone), the bytes that it brought can be read, even when no cache
//!   keeps them. So a read that keeps the arrivals of its earlier tries always comes to an end (D38).
//! - It has no owner: that one waiter goes away does not change anything for the others (D39).

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

type Then = Box<dyn FnOnce() + Send>;

/// Something that will have happened; see the module.
#[derive(Clone)]
pub struct Arrival {
    state: Arc<State>,
    /// What keeps the bytes alive.
    _keep: Option<Arc<dyn Any + Send + Sync>>,
}

struct State {
    waiting: Mutex<Option<Vec<Then>>>,
    happened: Condvar,
}

/// The end that makes it happen. Dropped, it has happened as well: nobody waits for a fetch that was given up.
pub struct Arrived(Arc<State>);

impl Arrival {
    /// An arrival, and what makes it happen.
    pub fn new() -> (Arrived, Self) {
        let state = Arc::new(State { waiting: Mutex::new(Some(Vec::new())), happened: Condvar::new() });
        (Arrived(state.clone()), Self { state, _keep: None })
    }

    /// The same, keeping `keep` alive as long as it is held itself.
    #[must_use]
    pub fn keeping(&self, keep: Arc<dyn Any + Send + Sync>) -> Self {
        Self { state: self.state.clone(), _keep: Some(keep) }
    }

    /// One that has happened when all of these have; it keeps what they keep.
    pub fn all(arrivals: Vec<Self>) -> Self {
        let (arrived, all) = Self::new();
        // Dropped by the last of those that let go of it.
        let arrived = Arc::new(arrived);
        for arrival in &arrivals {
            let arrived = arrived.clone();
            arrival.then(move || drop(arrived));
        }
        all.keeping(Arc::new(arrivals))
    }

    /// Runs `then` once it has happened: at once, when it has; else on the thread that makes it happen, which `then`
    /// must not keep.
    pub fn then(&self, then: impl FnOnce() + Send + 'static) {
        let mut waiting = self.state.waiting.lock();
        match waiting.as_mut() {
            Some(list) => list.push(Box::new(then)),
            None => {
                drop(waiting);
                then();
            }
        }
    }

    /// Whether it has happened.
    pub fn has_happened(&self) -> bool {
        self.state.waiting.lock().is_none()
    }

    /// Waits on this thread. Never on one that others need.
    pub fn wait(&self) {
        let mut waiting = self.state.waiting.lock();
        while waiting.is_some() {
            self.state.happened.wait(&mut waiting);
        }
    }
}

impl Arrived {
    /// Whether an [`Arrival`] of it is held. One that is not has no waiter.
    pub fn is_awaited(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

impl Drop for Arrived {
    fn drop(&mut self) {
        let waiting = self.0.waiting.lock().take();
        self.0.happened.notify_all();
        // Without the lock: what runs here may ask again.
        for then in waiting.into_iter().flatten() {
            then();
        }
    }
}

impl fmt::Debug for Arrival {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Arrival").field("has_happened", &self.has_happened()).finish_non_exhaustive()
    }
}
