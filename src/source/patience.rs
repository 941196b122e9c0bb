//! Whether this thread may wait for the file of a base.
//!
//! A file of this host lies on a filesystem that may hang as a server does. A thread that serves all disks must not
//! wait for it, so it runs its work under [`without_files`]. A [`FileSource`](super::FileSource) then answers
//! `NotHere` with an completion that has happened, and the caller runs the work again on a thread that may wait. What must
//! hold: a source checks this only before a system call on a file; reads from memory are not affected.

use std::cell::Cell;
use std::path::Path;

use super::{Completion, SourceError};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Files {
    Allowed,
    Barred,
    /// Barred, and the work needed one.
    Wanted,
}

thread_local! {
    static FILES: Cell<Files> = const { Cell::new(Files::Allowed) };
}

/// Whether work under [`without_files`] needed the file of a base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// A file.
    File,
    /// None: the result is the same as with files.
    Nothing,
}

/// Runs `work` on a thread that must not wait for the file of a base, and returns whether it needed one.
pub fn without_files<T>(work: impl FnOnce() -> T) -> (T, Wanted) {
    /// Restores the state of before, also when `work` panics.
    struct Before(Files);
    impl Drop for Before {
        fn drop(&mut self) {
            FILES.set(self.0);
        }
    }
    let before = Before(FILES.replace(Files::Barred));
    let done = work();
    let wanted = if FILES.get() == Files::Wanted { Wanted::File } else { Wanted::Nothing };
    drop(before);
    (done, wanted)
}

/// A source calls it before it waits for a file.
///
/// # Errors
/// `NotHere`, when this thread must not wait.
pub(super) fn may_wait_for(path: &Path) -> Result<(), SourceError> {
    if FILES.get() == Files::Allowed {
        return Ok(());
    }
    FILES.set(Files::Wanted);
    let (completer, completion) = Completion::new();
    drop(completer);
    Err(SourceError::not_here(path.display().to_string(), completion))
}
