//! A panic in one request is that request's alone.
//!
//! Requests may run twice (docs/design.md, "Replays"), so one that panics is tried once more; when it panics again it
//! is an I/O error of its own, and nobody else notices. Only work that leaves nothing half done in memory when it is
//! unwound may be guarded: reads, writes, discards, flushes. Changes of names are not, they panic to the end of the
//! worker, and the next one reads what is durable.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use fuser::Errno;

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

static PANICS: AtomicU64 = AtomicU64::new(0);

/// Whether a panic of this thread is caught.
pub fn is_guarded() -> bool {
    GUARDED.get()
}

/// Panics that were caught since the process began.
pub fn panics() -> u64 {
    PANICS.load(Ordering::Relaxed)
}

/// Runs `work`; once more when it panics; EIO when it panics again.
///
/// # Errors
/// Those of `work`, and EIO.
pub fn guarded<T>(work: impl Fn() -> Result<T, Errno>) -> Result<T, Errno> {
    for _ in 0..2 {
        let outer = GUARDED.replace(true);
        // What unwinding leaves behind is sound: see the module.
        let done = catch_unwind(AssertUnwindSafe(&work));
        GUARDED.set(outer);
        match done {
            Ok(done) => return done,
            Err(_) => PANICS.fetch_add(1, Ordering::Relaxed),
        };
    }
    tracing::error!("a request panicked twice and is refused");
    Err(Errno::EIO)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn one_panic_is_not_seen_by_anybody() {
        let tries = Cell::new(0);
        let done = guarded(|| {
            tries.set(tries.get() + 1);
            assert!(is_guarded());
            assert!(tries.get() != 1, "the first try");
            Ok(tries.get())
        });
        assert!(matches!(done, Ok(2)));
        assert!(!is_guarded());
    }

    #[test]
    fn a_request_that_always_panics_is_an_io_error() {
        let before = panics();
        let done: Result<(), Errno> = guarded(|| panic!("always"));
        assert_eq!(done.map_err(i32::from), Err(libc::EIO));
        assert!(panics() >= before + 2);
    }
}
