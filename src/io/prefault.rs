//! The system's allocator, with one addition: it touches the pages of large zeroed buffers into which the kernel will
//! copy.
//!
//! The FUSE crate receives requests into 16 MiB of lazily faulted memory. A SIGKILL during such a page fault is an I/O
//! error for the client, while a SIGKILL between requests is only a pause. A request never has more than 1 MiB and a
//! header.

use std::alloc::{GlobalAlloc, Layout, System};

const LARGE: usize = 16 << 20;
const TOUCHED: usize = (1 << 20) + (64 << 10);

/// See the module.
#[derive(Debug)]
pub struct PrefaultingAllocator;

// SAFETY: every call goes to the system's allocator; memory it returned is only written to within its size, with
// the zeros that are there already.
unsafe impl GlobalAlloc for PrefaultingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        counted::add(layout.size());
        // SAFETY: by the contract of this function.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        counted::remove(layout.size());
        // SAFETY: by the contract of this function.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        counted::add(layout.size());
        // SAFETY: by the contract of this function; the writes stay within `layout.size()`.
        unsafe {
            let at = System.alloc_zeroed(layout);
            if layout.size() >= LARGE && !at.is_null() {
                for offset in (0..TOUCHED).step_by(4096) {
                    at.add(offset).write_volatile(0);
                }
            }
            at
        }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        counted::remove(layout.size());
        counted::add(new_size);
        // SAFETY: by the contract of this function.
        unsafe { System.realloc(at, layout, new_size) }
    }
}

/// What a thread of a test has allocated.
#[cfg(test)]
pub(crate) mod counted {
    use std::cell::Cell;

    thread_local! {
        static BYTES: Cell<isize> = const { Cell::new(0) };
        static MOST: Cell<isize> = const { Cell::new(0) };
    }

    pub(super) fn add(size: usize) {
        let bytes = BYTES.get() + size as isize;
        BYTES.set(bytes);
        MOST.set(MOST.get().max(bytes));
    }

    pub(super) fn remove(size: usize) {
        BYTES.set(BYTES.get() - size as isize);
    }

    /// Runs `work`, and returns its result with the bytes that it has allocated and not freed.
    pub(crate) fn left_by<T>(work: impl FnOnce() -> T) -> (T, usize) {
        let before = BYTES.get();
        let done = work();
        (done, (BYTES.get() - before).unsigned_abs())
    }

    /// Runs `work`, and returns its result with the most bytes that it had allocated at a time.
    pub(crate) fn most_of<T>(work: impl FnOnce() -> T) -> (T, usize) {
        let before = BYTES.get();
        MOST.set(before);
        let done = work();
        (done, (MOST.get() - before).unsigned_abs())
    }
}

#[cfg(not(test))]
mod counted {
    #[inline(always)]
    pub(super) fn add(_: usize) {}
    #[inline(always)]
    pub(super) fn remove(_: usize) {}
}
