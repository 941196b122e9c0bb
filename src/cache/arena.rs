//! The memory that holds cached blocks: one anonymous mapping, cut into disjoint regions, one for each shard.
//!
//! It exists so that all `unsafe` of the cache is on this page. What must hold: regions never overlap, each
//! is reached only through its owner (`&`/`&mut` of the [`Region`]), and the mapping lives as long as any
//! region of it.

use std::io;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use super::BLOCK;

/// One anonymous, private mapping. Unmapped when the last region is dropped.
struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: `Mapping` is only an address range; nothing is read or written through it. Access goes through
// `Region`.
unsafe impl Send for Mapping {}
// SAFETY: as above; it has no method that takes `&self` and touches the memory.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `start` and `bytes` are what mmap returned and was given, and every `Region`, which holds
        // an `Arc` of this, is gone. A failure would only leak the range.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// `blocks` blocks of [`BLOCK`] bytes that belong to one owner. Untouched blocks read as zeros and cost no
/// memory.
pub(super) struct Region {
    start: NonNull<u8>,
    blocks: usize,
    _mapping: Arc<Mapping>,
}

// SAFETY: a `Region` is the only way to its bytes (they overlap no other region), as with a `Box<[u8]>`.
unsafe impl Send for Region {}

impl Region {
    pub(super) fn blocks(&self) -> usize {
        self.blocks
    }

    pub(super) fn block(&self, index: u32) -> &[u8; BLOCK] {
        let index = index as usize;
        assert!(index < self.blocks);
        // SAFETY: in bounds by the assertion; the memory is mapped, initialised (zeros) and aligned for
        // bytes; `&self` keeps writers of this region out for the life of the reference.
        unsafe { self.start.add(index * BLOCK).cast::<[u8; BLOCK]>().as_ref() }
    }

    pub(super) fn block_mut(&mut self, index: u32) -> &mut [u8; BLOCK] {
        let index = index as usize;
        assert!(index < self.blocks);
        // SAFETY: as in `block`; `&mut self` makes the reference the only one into this region.
        unsafe { self.start.add(index * BLOCK).cast::<[u8; BLOCK]>().as_mut() }
    }
}

/// Maps memory for `count` regions of `blocks` blocks each. The memory is reserved as address space only and
/// becomes real on first touch (or at once under `mlockall(MCL_FUTURE)` without `MCL_ONFAULT`).
///
/// # Errors
/// What `mmap` reports, or `OutOfMemory` when the size is beyond the address space.
pub(super) fn regions(count: usize, blocks: usize) -> io::Result<Vec<Region>> {
    let region = blocks.checked_mul(BLOCK);
    let bytes = region
        .and_then(|region| region.checked_mul(count))
        .filter(|bytes| isize::try_from(*bytes).is_ok())
        .ok_or(io::ErrorKind::OutOfMemory)?
        .max(BLOCK);
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches no existing memory.
    let start = unsafe {
        libc::mmap(
            ptr::null_mut(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let start = NonNull::new(start.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
    // SAFETY: the range was mapped just now. Only a hint: fewer TLB misses on copies; its failure changes
    // nothing.
    unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
    let mapping = Arc::new(Mapping { start, bytes });
    Ok((0..count)
        .map(|index| Region {
            // SAFETY: `count * blocks * BLOCK <= bytes`, so the start of each region is inside the mapping
            // or, for regions of no blocks, at its start.
            start: unsafe { start.add(index * blocks * BLOCK) },
            blocks,
            _mapping: Arc::clone(&mapping),
        })
        .collect())
}
