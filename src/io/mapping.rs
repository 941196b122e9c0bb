//! Shared mappings of files in memory, and huge pages below them.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use super::sys::{check, off};

/// Bytes of a huge page: what one entry of the second level of page tables maps with pages of 4 KiB.
pub const HUGE_PAGE: usize = 2 << 20;

/// mmap(2) of a part of a file, shared, to read and write. Where the file's offset is a multiple of [`HUGE_PAGE`], so is
/// the address.
pub fn map_shared(fd: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<*mut c_void> {
    let offset = off(offset)?;
    // SAFETY: a new mapping at an address the kernel chooses; nothing can be read or written there.
    let room = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        libc::mmap(ptr::null_mut(), len + HUGE_PAGE, libc::PROT_NONE, flags, -1, 0)
    };
    if room == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let before = room.addr().wrapping_neg() % HUGE_PAGE;
    let (start, after) = (room.wrapping_byte_add(before), HUGE_PAGE - before);
    // SAFETY: inside of `room`, which nothing else knows; what is left of it before and after is given back.
    let at = unsafe {
        if before > 0 {
            libc::munmap(room, before);
        }
        libc::munmap(start.wrapping_byte_add(len), after);
        let flags = libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED;
        libc::mmap(start, len, libc::PROT_READ | libc::PROT_WRITE, flags, fd.as_raw_fd(), offset)
    };
    if at == libc::MAP_FAILED {
        let error = io::Error::last_os_error();
        // SAFETY: as above.
        unsafe { libc::munmap(start, len) };
        return Err(error);
    }
    Ok(at)
}

/// madvise(2) with MADV_COLLAPSE (Linux 6.1) of one huge page of a shared mapping: its pages become one.
///
/// # Safety
/// `at` is a multiple of [`HUGE_PAGE`] in a live mapping that goes on for as much.
///
/// # Errors
/// EINVAL from a kernel that cannot, ENOMEM without contiguous memory, EAGAIN when a page of it is in use.
pub unsafe fn merge_huge_page(at: *mut c_void) -> io::Result<()> {
    // SAFETY: by the contract of this function; contents stay what they are.
    check(unsafe { libc::madvise(at, HUGE_PAGE, libc::MADV_COLLAPSE) }.into()).map(drop)
}

/// munmap(2) of what [`map_shared`] returned.
///
/// # Safety
/// `at` and `len` are of a live mapping, and no reference into it is left.
pub unsafe fn unmap(at: *mut c_void, len: usize) {
    // SAFETY: by the contract of this function.
    unsafe { libc::munmap(at, len) };
}
