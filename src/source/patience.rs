//! Whether this thread may wait for the file of a base.
//!
//! A file of this host lies on a filesystem that may hang as a server does. A thread that serves all disks must not
//! wait for it, so it runs its work under [`without_files`]. A [`FileSource`](super::FileSource) then answers
//! `NotHere` with a completion that is complete, and the work is run again on a thread that may wait. What must hold:
//! only a source that would make a system call on a file asks; what is in memory is found as always.

use std::cell::Cell;
use std::path::Path;

use super::{Completion, SourceError};

#[derive(Clone, Copy, PartialEq, Eq)]
enum Files {
    Allowed,
    Barred,
    /// Barred, and one was asked for.
    Wanted,
}

thread_local! {
    static FILES: Cell<Files> = const { Cell::new(Files::Allowed) };
}

/// Whether work under [`without_files`] asked for the file of a base.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// A file.
    File,
    /// None: its result is what it would be with files.
    Nothing,
}

/// Runs `work` on a thread that must not wait for the file of a base, and says whether it asked for one.
pub fn without_files<T>(work: impl FnOnce() -> T) -> (T, Wanted) {
    /// Puts back what was allowed, also when `work` panics.
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

/// For a source that is about to wait for a file.
pub(super) fn may_wait_for(path: &Path) -> Result<(), SourceError> {
    if FILES.get() == Files::Allowed {
        return Ok(());
    }
    FILES.set(Files::Wanted);
    let (completer, completion) = Completion::new();
    drop(completer);
    Err(SourceError::not_here(path.display().to_string(), completion))
}
