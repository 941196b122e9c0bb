//! Confines a panic to the request in which it happens.
//!
//! Requests may run twice (docs/design.md, "Replays"), so a request that panics is tried once more. If it panics again,
//! it ends with an I/O error, and no other request notices.
//! - Reads, writes, discards and flushes leave nothing half done in memory when they unwind. They are tried again at
//!   once ([`guarded`]).
//! - Changes of names and records may leave something half done. After a panic in one the worker ends; the next worker
//!   reads the durable state, and gets the request again ([`once`]). If the request panics there too, it is refused
//!   before that worker ends, because otherwise it would end all later workers.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use super::Errno;

/// What a panic in this thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guard {
    /// It ends the worker.
    None,
    /// It is caught, and the worker continues.
    Recovers,
    /// It is caught, and the worker ends once the request is answered.
    Ends,
}

thread_local! {
    static GUARD: Cell<Guard> = const { Cell::new(Guard::None) };
    static MUST_END: Cell<bool> = const { Cell::new(false) };
}

static PANICS: AtomicU64 = AtomicU64::new(0);

/// What a panic in this thread does now.
pub fn current() -> Guard {
    GUARD.get()
}

/// Number of panics that this process has caught.
pub fn panics() -> u64 {
    PANICS.load(Ordering::Relaxed)
}

fn caught<T>(guard: Guard, work: impl FnOnce() -> T) -> Option<T> {
    let outer = GUARD.replace(guard);
    // The state that unwinding leaves is sound or is not used again, see the module.
    let done = catch_unwind(AssertUnwindSafe(work));
    GUARD.set(outer);
    if done.is_err() {
        PANICS.fetch_add(1, Ordering::Relaxed);
    }
    done.ok()
}

/// Runs `work`, once more if it panics. A second panic is EIO.
///
/// # Errors
/// Those of `work`, and EIO.
pub fn guarded<T, E: From<Errno>>(work: impl Fn() -> Result<T, E>) -> Result<T, E> {
    for _ in 0..2 {
        if let Some(done) = caught(Guard::Recovers, &work) {
            return done;
        }
    }
    tracing::error!("a request panicked twice; it ends with EIO");
    Err(Errno::EIO.into())
}

/// Runs `work`. A panic aborts the process, unless the request was `resent`. Then the result is EIO, and this thread
/// must call [`must_end`] after the answer.
///
/// # Errors
/// Those of `work`, and EIO.
pub fn once<T>(resent: bool, work: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    caught(Guard::Ends, work).unwrap_or_else(|| {
        if !resent {
            std::process::abort();
        }
        tracing::error!("a request panicked under two workers; it ends with EIO, and this worker ends");
        MUST_END.set(true);
        Err(Errno::EIO)
    })
}

/// Whether the worker must end now that the request is answered. Returns true once.
pub fn must_end() -> bool {
    MUST_END.replace(false)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn a_single_panic_is_hidden_by_the_retry() {
        let tries = Cell::new(0);
        let done: Result<_, Errno> = guarded(|| {
            tries.set(tries.get() + 1);
            assert_eq!(current(), Guard::Recovers);
            assert!(tries.get() != 1, "the first try");
            Ok(tries.get())
        });
        assert!(matches!(done, Ok(2)));
        assert_eq!(current(), Guard::None);
    }

    #[test]
    fn a_request_that_always_panics_is_an_io_error() {
        let before = panics();
        let done: Result<(), Errno> = guarded(|| panic!("always"));
        assert_eq!(done.map_err(i32::from), Err(libc::EIO));
        assert!(panics() >= before + 2);
    }

    #[test]
    fn a_change_that_panics_again_is_refused_before_the_worker_ends() {
        assert!(matches!(once(true, || Ok(5)), Ok(5)));
        assert!(!must_end());
        let done: Result<(), Errno> = once(true, || panic!("again"));
        assert_eq!(done.map_err(i32::from), Err(libc::EIO));
        assert!(must_end() && !must_end());
    }
}
