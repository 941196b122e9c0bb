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
        // SAFETY: by the contract of this function.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: by the contract of this function.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
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
        // SAFETY: by the contract of this function.
        unsafe { System.realloc(at, layout, new_size) }
    }
}
