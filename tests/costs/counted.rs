//! Takes the place of the C library's allocator and memcpy in this test program, and counts their calls in all threads.
//!
//! The crate's own allocator calls the C library's, so these functions see it and everything below. They pass each call
//! on, and change nothing.

use std::arch::asm;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The shortest copy that counts: a block of data. Shorter ones are headers and moved values.
const BLOCK: usize = 4096;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static ALLOCATED: AtomicU64 = AtomicU64::new(0);
static COPIES: AtomicU64 = AtomicU64::new(0);
static COPIED: AtomicU64 = AtomicU64::new(0);

/// Calls since the start of the program.
#[derive(Clone, Copy, Debug)]
pub struct Counts {
    pub allocations: u64,
    /// Bytes of these allocations.
    pub allocated: u64,
    /// Copies of a block or more in the memory of the program. What the kernel copies is not seen.
    pub copies: u64,
    /// Bytes of these copies.
    pub copied: u64,
}

impl Counts {
    pub fn now() -> Self {
        let read = |count: &AtomicU64| count.load(Relaxed);
        Self {
            allocations: read(&ALLOCATIONS),
            allocated: read(&ALLOCATED),
            copies: read(&COPIES),
            copied: read(&COPIED),
        }
    }

    pub fn since(self, before: Self) -> Self {
        Self {
            allocations: self.allocations - before.allocations,
            allocated: self.allocated - before.allocated,
            copies: self.copies - before.copies,
            copied: self.copied - before.copied,
        }
    }
}

fn allocation(size: usize) {
    ALLOCATIONS.fetch_add(1, Relaxed);
    ALLOCATED.fetch_add(size as u64, Relaxed);
}

fn copy(len: usize) {
    if len >= BLOCK {
        COPIES.fetch_add(1, Relaxed);
        COPIED.fetch_add(len as u64, Relaxed);
    }
}

unsafe extern "C" {
    fn __libc_malloc(size: usize) -> *mut c_void;
    fn __libc_calloc(number: usize, size: usize) -> *mut c_void;
    fn __libc_realloc(at: *mut c_void, size: usize) -> *mut c_void;
    fn __libc_memalign(alignment: usize, size: usize) -> *mut c_void;
}

#[unsafe(no_mangle)]
unsafe extern "C" fn malloc(size: usize) -> *mut c_void {
    allocation(size);
    // SAFETY: the caller keeps the contract of malloc.
    unsafe { __libc_malloc(size) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn calloc(number: usize, size: usize) -> *mut c_void {
    allocation(number.saturating_mul(size));
    // SAFETY: the caller keeps the contract of calloc.
    unsafe { __libc_calloc(number, size) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn realloc(at: *mut c_void, size: usize) -> *mut c_void {
    allocation(size);
    // SAFETY: the caller keeps the contract of realloc; `at` is of the C library.
    unsafe { __libc_realloc(at, size) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn posix_memalign(to: *mut *mut c_void, alignment: usize, size: usize) -> c_int {
    allocation(size);
    // SAFETY: the caller keeps the contract of posix_memalign.
    unsafe {
        let at = __libc_memalign(alignment, size);
        if at.is_null() {
            return libc::ENOMEM;
        }
        *to = at;
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn aligned_alloc(alignment: usize, size: usize) -> *mut c_void {
    allocation(size);
    // SAFETY: the caller keeps the contract of aligned_alloc.
    unsafe { __libc_memalign(alignment, size) }
}

/// Copies upwards.
unsafe fn copy_forward(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: the caller has `len` bytes at both; the direction flag is clear by the calling convention.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags));
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    copy(len);
    // SAFETY: the caller keeps the contract of memcpy.
    unsafe { copy_forward(to, from, len) };
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    copy(len);
    // Downwards where an upward copy would overwrite what it has still to read.
    if (to as usize).wrapping_sub(from as usize) >= len {
        // SAFETY: the caller keeps the contract of memmove.
        unsafe { copy_forward(to, from, len) };
    } else {
        // SAFETY: as above; the last byte of each range is inside of it, since `len` is not 0 here, and the direction
        // flag is clear again at the end.
        unsafe {
            asm!("std", "rep movsb", "cld", inout("rcx") len => _, inout("rdi") to.add(len - 1) => _,
                inout("rsi") from.add(len - 1) => _, options(nostack));
        }
    }
    to
}
