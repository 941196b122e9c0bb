//! The completion of a fetch. A reader can wait for it without keeping a thread.
//!
//! A read of bytes that are not here does not wait. It fails with a [`Completion`], and the caller runs the same read
//! again when that is complete. What must hold:
//! - A fetch always completes: with the bytes, or with an error that the next attempt of the read reports (D37).
//! - As long as the completion (or a clone) is held, the bytes that the fetch brought can be read, even when no cache
//!   keeps them. So a read that keeps the completions of its earlier attempts always comes to an end (D38).
//! - A completion has no owner: when one waiter goes away, nothing changes for the others (D39).

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

type Then = Box<dyn FnOnce() + Send>;

/// A fetch that will be complete; see the module.
#[derive(Clone)]
pub struct Completion {
    state: Arc<State>,
    /// What keeps the bytes alive.
    _keep: Option<Arc<dyn Any + Send + Sync>>,
}

struct State {
    waiting: Mutex<Option<Vec<Then>>>,
    completed: Condvar,
}

/// Completes the fetch when it is dropped. So no reader waits for a fetch that was abandoned.
pub struct Completer(Arc<State>);

impl Completion {
    /// A completion, and the completer that completes it.
    pub fn new() -> (Completer, Self) {
        let state = Arc::new(State { waiting: Mutex::new(Some(Vec::new())), completed: Condvar::new() });
        (Completer(state.clone()), Self { state, _keep: None })
    }

    /// The same completion; while it is held, it keeps `keep` alive.
    #[must_use]
    pub fn keeping(&self, keep: Arc<dyn Any + Send + Sync>) -> Self {
        Self { state: self.state.clone(), _keep: Some(keep) }
    }

    /// A completion that is complete when all of these are; it keeps alive all that they keep alive.
    pub fn all(completions: Vec<Self>) -> Self {
        let (completer, all) = Self::new();
        // The last of `completions` to complete drops it.
        let completer = Arc::new(completer);
        for completion in &completions {
            let completer = completer.clone();
            completion.then(move || drop(completer));
        }
        all.keeping(Arc::new(completions))
    }

    /// Runs `then` when it is complete: at once when it is already, else on the thread that completes it. `then` must
    /// not block that thread.
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

    /// Whether it is complete.
    pub fn is_complete(&self) -> bool {
        self.state.waiting.lock().is_none()
    }

    /// Blocks this thread until it is complete. Only for a thread that no other work needs.
    pub fn wait(&self) {
        let mut waiting = self.state.waiting.lock();
        while waiting.is_some() {
            self.state.completed.wait(&mut waiting);
        }
    }
}

impl Completer {
    /// Whether a [`Completion`] of it is held. Without one there is no waiter.
    pub fn is_awaited(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

impl Drop for Completer {
    fn drop(&mut self) {
        let waiting = self.0.waiting.lock().take();
        self.0.completed.notify_all();
        // Without the lock: a callback may read again.
        for then in waiting.into_iter().flatten() {
            then();
        }
    }
}

impl fmt::Debug for Completion {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Completion").field("is_complete", &self.is_complete()).finish_non_exhaustive()
    }
}
