//! Runs something when a scope ends, also when that is because of a panic: requests that panic are caught, and the
//! disk goes on without them.

/// Runs its closure when dropped.
pub(super) struct Guard<F: FnMut()>(F);

/// Runs `at_end` when the returned value is dropped.
pub(super) fn scopeguard<F: FnMut()>(at_end: F) -> Guard<F> {
    Guard(at_end)
}

impl<F: FnMut()> Drop for Guard<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
