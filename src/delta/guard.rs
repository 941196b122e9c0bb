//! Runs a closure at the end of a scope, also after a panic: a panic in a request is caught, and the disk stays in use.

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
