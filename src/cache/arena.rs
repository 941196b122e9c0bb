//! The memory of cached blocks: one mapping, divided into disjoint regions, one for each shard.
//!
//! This module contains all `unsafe` code of the cache. The mapping is anonymous, or it is a *memory file* (memfd) that
//! another process keeps open. A memory file also has a header page and four words (a tag) for each block, so that the
//! next process finds the blocks again. What must hold: regions never overlap, a region is accessed only through its
//! owner (`&`/`&mut` of the [`Region`]), and the mapping lives as long as any region of it.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::BLOCK;

/// The tag of one block; [`tags`](super::tags) documents the words.
pub(super) type TagWords = [AtomicU64; 4];

/// Words of the header page of a memory file.
pub(super) const HEADER_WORDS: usize = BLOCK / 8;

/// One mapping. Unmapped when the last region is dropped.
pub(super) struct Mapping {
    start: NonNull<u8>,
    bytes: usize,
    /// The memory file.
    file: Option<OwnedFd>,
}

// SAFETY: `Mapping` is an address range, of which it reads and writes only the header, and that by atomic words. The
// rest is reached through `Region`.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `bytes` at an address that the kernel chooses. The mapping is excluded from core dumps, because it is large
    /// and no state of the worker.
    fn new(bytes: usize, file: Option<OwnedFd>) -> io::Result<Self> {
        let kind = if file.is_some() { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS };
        let fd = file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        // SAFETY: a fresh mapping at an address of the kernel's choice touches no existing memory.
        let start = unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(ptr::null_mut(), bytes, access, kind | libc::MAP_NORESERVE, fd, 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast::<u8>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mapping = Self { start, bytes, file };
        // SAFETY: the range was mapped just now. Both are only hints (the first: fewer TLB misses on copies); their
        // failure changes nothing.
        unsafe {
            libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE);
            libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_DONTDUMP);
        }
        Ok(mapping)
    }

    /// The header page of a memory file; `None` for an anonymous mapping.
    pub(super) fn header(&self) -> Option<&[AtomicU64; HEADER_WORDS]> {
        self.file.as_ref()?;
        // SAFETY: the mapping of a file begins with this page; it is aligned as a page, every bit pattern is a value
        // of an atomic word, and no other kind of reference to it exists.
        Some(unsafe { self.start.cast::<[AtomicU64; HEADER_WORDS]>().as_ref() })
    }

    /// Allocates the memory of a range of the file, so that an access cannot fail any more. Does nothing for an anonymous
    /// mapping, whose memory the kernel accounts at mmap(2) if it accounts strictly.
    ///
    /// # Errors
    /// `ENOSPC` when there is no memory.
    fn allocate(&self, offset: usize, bytes: usize) -> io::Result<()> {
        match &self.file {
            Some(_) if bytes == 0 => Ok(()),
            Some(file) => fallocate(file, 0, offset, bytes),
            None => Ok(()),
        }
    }

    /// Frees all memory of the file, which then reads zeros.
    ///
    /// # Errors
    /// What fallocate(2) reports.
    pub(super) fn clear(&self) -> io::Result<()> {
        match &self.file {
            Some(file) => {
                fallocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 0, self.bytes)
            }
            None => Ok(()),
        }
    }

    /// Allocates the memory of the header.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate).
    pub(super) fn allocate_header(&self) -> io::Result<()> {
        self.allocate(0, BLOCK)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: `start` and `bytes` are what mmap returned and was given, and every `Region`, which holds
        // an `Arc` of this, is gone. A failure would only leak the range.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// `blocks` blocks of [`BLOCK`] bytes that belong to one owner. Blocks that were never accessed read zeros and take no
/// memory.
pub(super) struct Region {
    start: NonNull<u8>,
    blocks: usize,
    /// In a memory file: the offset of its `blocks` tags in the mapping.
    tags: Option<usize>,
    mapping: Arc<Mapping>,
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
        // SAFETY: in bounds by the assertion; the memory is mapped, initialised (zeros, or what an earlier process
        // left, which has ended) and aligned for bytes; `&self` keeps writers of this region out for the life of the
        // reference.
        unsafe { self.start.add(index * BLOCK).cast::<[u8; BLOCK]>().as_ref() }
    }

    pub(super) fn block_mut(&mut self, index: u32) -> &mut [u8; BLOCK] {
        let index = index as usize;
        assert!(index < self.blocks);
        // SAFETY: as in `block`; `&mut self` makes the reference the only one into this region.
        unsafe { self.start.add(index * BLOCK).cast::<[u8; BLOCK]>().as_mut() }
    }

    /// The tag of a block; `None` in an anonymous mapping.
    pub(super) fn tag(&self, index: u32) -> Option<&TagWords> {
        let index = index as usize;
        assert!(index < self.blocks);
        let at = self.tags? + index * size_of::<TagWords>();
        // SAFETY: `layout` puts `blocks` tags of this region at `tags`, inside the mapping and aligned for words;
        // every bit pattern is a value of an atomic word, and no other kind of reference to them exists.
        Some(unsafe { self.mapping.start.add(at).cast::<TagWords>().as_ref() })
    }

    /// The mapping of the region.
    pub(super) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Allocates the memory of `count` blocks from `first` on, and of their tags.
    ///
    /// # Errors
    /// `ENOSPC` when there is none.
    pub(super) fn allocate(&self, first: u32, count: usize) -> io::Result<()> {
        self.allocate_tags(first, count)?;
        // SAFETY: both are addresses in the one mapping.
        let start = unsafe { self.start.byte_offset_from(self.mapping.start) } as usize;
        self.mapping.allocate(start + first as usize * BLOCK, count * BLOCK)
    }

    /// Allocates the memory of the tags of `count` blocks.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate).
    pub(super) fn allocate_tags(&self, first: u32, count: usize) -> io::Result<()> {
        assert!(first as usize + count <= self.blocks);
        match self.tags {
            Some(tags) => {
                let word = size_of::<TagWords>();
                self.mapping.allocate(tags + first as usize * word, count * word)
            }
            None => Ok(()),
        }
    }
}

/// The offsets of the parts of a mapping.
struct Layout {
    tags: Option<usize>,
    data: usize,
    bytes: usize,
}

/// An anonymous mapping has only blocks. A memory file has the header, then all tags, then all blocks, aligned to a block.
fn layout(count: usize, blocks: usize, in_file: bool) -> io::Result<Layout> {
    let all = count.checked_mul(blocks);
    let head = if in_file {
        all.and_then(|all| all.checked_mul(size_of::<TagWords>()))
            .and_then(|tags| tags.checked_add(BLOCK))
            .and_then(|head| head.checked_next_multiple_of(BLOCK))
    } else {
        Some(0)
    };
    let bytes = all
        .and_then(|all| all.checked_mul(BLOCK))
        .and_then(|data| data.checked_add(head?))
        .filter(|bytes| isize::try_from(*bytes).is_ok());
    match (head, bytes) {
        (Some(data), Some(bytes)) => {
            Ok(Layout { tags: in_file.then_some(BLOCK), data, bytes: bytes.max(BLOCK) })
        }
        _ => Err(io::ErrorKind::OutOfMemory.into()),
    }
}

/// Maps memory for `count` regions of `blocks` blocks each: anonymous, or from `file`, which is extended if it is too
/// short. This reserves only address space; the kernel allocates memory at the first access (or at once under
/// `mlockall(MCL_FUTURE)` without `MCL_ONFAULT`). The contents of the file are not accessed.
///
/// # Errors
/// What the system calls report, or `OutOfMemory` when the size is beyond the address space.
pub(super) fn regions(
    count: usize,
    blocks: usize,
    file: Option<OwnedFd>,
) -> io::Result<(Arc<Mapping>, Vec<Region>)> {
    let layout = layout(count, blocks, file.is_some())?;
    if let Some(file) = &file {
        grow(file, layout.bytes)?;
    }
    let mapping = Arc::new(Mapping::new(layout.bytes, file)?);
    let regions = (0..count)
        .map(|index| Region {
            // SAFETY: `data + count * blocks * BLOCK <= bytes`, so the start of each region is inside the mapping
            // or, for regions of no blocks, at its end at most.
            start: unsafe { mapping.start.add(layout.data + index * blocks * BLOCK) },
            blocks,
            tags: layout.tags.map(|tags| tags + index * blocks * size_of::<TagWords>()),
            mapping: Arc::clone(&mapping),
        })
        .collect();
    Ok((mapping, regions))
}

/// Creates an empty memory file that can grow but never shrink, so that access to a mapping of it never faults. It is
/// closed on exec.
///
/// # Errors
/// What the system calls report.
pub(super) fn memory_file() -> io::Result<OwnedFd> {
    // SAFETY: a constant name; the returned descriptor has no other owner.
    let file = unsafe {
        let fd = libc::memfd_create(c"plyfs-cache".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    // SAFETY: a descriptor and numbers.
    let sealed =
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_SHRINK | libc::F_SEAL_SEAL) };
    if sealed < 0 { Err(io::Error::last_os_error()) } else { Ok(file) }
}

/// Extends the file to `bytes` if it is shorter.
fn grow(file: &OwnedFd, bytes: usize) -> io::Result<()> {
    let length = libc::off_t::try_from(bytes).map_err(|_| io::ErrorKind::OutOfMemory)?;
    // SAFETY: plain numbers are in the struct, zero is a value of each; the descriptor is open.
    let done = unsafe {
        let mut stat: libc::stat = std::mem::zeroed();
        match libc::fstat(file.as_raw_fd(), &mut stat) {
            0 if stat.st_size >= length => 0,
            0 => libc::ftruncate(file.as_raw_fd(), length),
            failed => failed,
        }
    };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// fallocate(2), again when a signal interrupts it.
fn fallocate(file: &OwnedFd, mode: i32, offset: usize, bytes: usize) -> io::Result<()> {
    loop {
        // SAFETY: plain numbers, below the length of a mapping, and a descriptor that is open.
        let done =
            unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as libc::off_t, bytes as libc::off_t) };
        if done == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
