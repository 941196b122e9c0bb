//! Memory that outlives the worker: a part of a file on tmpfs, mapped shared.
//!
//! It holds a header page, summary pages with one bit per map page, and the map pages. A map page is touched only
//! after its space was reserved with fallocate(2), so that a full tmpfs is an error and never a SIGBUS, and a page
//! without a write costs nothing. Contents are valid for this boot only: tmpfs forgets them at reboot.
//!
//! A live file has a file of its own, or a window of one that many share ([`super::LiveArena`]).

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::live_arena::{Lease, MapPages};
use super::sys;

/// Words of a page.
pub const LIVE_PAGE_WORDS: usize = 512;
const PAGE: u64 = 4096;
/// Header page, then summary pages, up to here.
const HEAD_PAGES: u64 = 64;
const SUMMARY_WORDS: usize = (HEAD_PAGES as usize - 1) * LIVE_PAGE_WORDS;
/// Map pages mapped at once (16 MiB).
const SEGMENT_PAGES: u64 = 4096;
/// Segments behind the first one, which is mapped together with the head.
const SEGMENTS: usize = (SUMMARY_WORDS * 64).div_ceil(SEGMENT_PAGES as usize) - 1;
const FIRST_BYTES: usize = ((HEAD_PAGES + SEGMENT_PAGES) * PAGE) as usize;
/// No live file is longer.
pub(super) const LONGEST: u64 = (HEAD_PAGES + SUMMARY_WORDS as u64 * 64) * PAGE;

/// What a new page of a map is for: it decides which part of the bound the page may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapUse {
    /// A guest's write.
    Write,
    /// Zeros that hide the base: they may take what is kept back for them.
    Discard,
    /// A map that was there before: nothing bounds it.
    TakeOver,
}

/// Words of the header page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum LiveHeader {
    /// Set last when the file is made.
    Magic = 0,
    /// Number of the disk.
    Disk = 1,
    /// Device of the data file.
    Device = 2,
    /// Inode of the data file.
    Inode = 3,
    /// Bytes of the disk.
    Size = 4,
    /// Bytes from the start that fall through to the base.
    Overlap = 5,
    /// Failed flushes so far.
    ErrorEpoch = 6,
    /// Size + 1 of a shrink that has begun and may have to be completed; 0 otherwise.
    PendingShrink = 7,
    /// Last modification, nanoseconds since the epoch.
    Modified = 8,
    /// Boot that it belongs to.
    Boot = 9,
    /// The error epoch when the disk was last opened.
    OpenedEpoch = 10,
    /// Which files are being synced: a worker that dies meanwhile has not heard whether that failed.
    Syncing = 11,
    /// Stands for the request of a mount that set the size last, which may be sent again; 0: none did.
    Resized = 12,
}

/// One disk's live map.
#[derive(Debug)]
pub struct LiveFile {
    file: Arc<File>,
    /// Where in the file it begins.
    base: u64,
    /// Head and first segment.
    head: *mut AtomicU64,
    segments: OnceLock<Box<[AtomicPtr<AtomicU64>]>>,
    grow: Mutex<()>,
    /// Map pages that are reserved.
    reserved: AtomicU64,
    /// Bytes of them for zeros that hide the base.
    discarded: AtomicU64,
    /// Keeps the window of a shared file. Dropped after the mappings.
    lease: Option<Lease>,
}

// SAFETY: the pointers lead to shared mappings that live as long as the value and are only accessed as atomics.
unsafe impl Send for LiveFile {}
// SAFETY: as above.
unsafe impl Sync for LiveFile {}

impl LiveFile {
    /// No page has this number or a higher one.
    pub const PAGES: u64 = SUMMARY_WORDS as u64 * 64;

    /// Maps a file; a new one may be empty.
    ///
    /// # Errors
    /// When the space of the head cannot be reserved or mapped.
    pub fn new(file: File) -> io::Result<Self> {
        Self::at(Arc::new(file), 0, None)
    }

    /// Maps what begins at `base` of a file.
    pub(super) fn at(file: Arc<File>, base: u64, lease: Option<Lease>) -> io::Result<Self> {
        // The header and the first summary page; later summary pages are reserved with the pages they describe.
        sys::fallocate(file.as_fd(), 0, base, 2 * PAGE)?;
        // A window of a shared file is inside of it; setting a length here could cut another one.
        if lease.is_none() && file.metadata()?.len() < base + HEAD_PAGES * PAGE {
            file.set_len(base + HEAD_PAGES * PAGE)?;
        }
        let head = sys::map_shared(file.as_fd(), base, FIRST_BYTES)?.cast::<AtomicU64>();
        let (segments, grow, reserved) = (OnceLock::new(), Mutex::new(()), AtomicU64::new(0));
        let discarded = AtomicU64::new(0);
        let live = Self { file, base, head, segments, grow, reserved, discarded, lease };
        // Touching a page behind the end would be a SIGBUS.
        let (mut pages, mut count) = (0, 0);
        for page in live.pages(0) {
            (pages, count) = (page + 1, count + 1);
        }
        live.reserved.store(count, Ordering::Relaxed);
        if live.file.metadata()?.len() < base + (HEAD_PAGES + pages) * PAGE {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the file was cut, it has fewer pages than it says",
            ));
        }
        Ok(live)
    }

    /// One made for tests, in anonymous memory.
    pub fn anonymous() -> io::Result<Self> {
        Self::new(sys::memory_file()?)
    }

    /// The same memory mapped again, as a next worker would.
    pub fn reopen(&self) -> io::Result<Self> {
        Self::at(self.file.clone(), self.base, self.lease.clone())
    }

    /// Bytes of memory that it has reserved.
    pub fn memory(&self) -> u64 {
        (2 + self.reserved.load(Ordering::Relaxed)) * PAGE
    }

    /// Copies all of it to `to`, which is new.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn copy_to(&self, to: &Self) -> io::Result<()> {
        for no in self.pages(0) {
            let Some(page) = self.page(no) else { continue };
            for (from, to) in page.iter().zip(to.prepare(no)?) {
                to.store(from.load(Ordering::Acquire), Ordering::Release);
            }
        }
        for at in 0..LIVE_PAGE_WORDS - 1 {
            // SAFETY: words of the header page of two mappings that live as long as their values.
            let (from, to) = unsafe { (&*self.head.add(at), &*to.head.add(at)) };
            to.store(from.load(Ordering::Acquire), Ordering::Release);
        }
        Ok(())
    }

    /// A copy of the memory as it is now, in anonymous memory.
    ///
    /// # Errors
    /// When there is no memory for it.
    #[cfg(any(test, feature = "simulation"))]
    pub fn duplicate(&self) -> io::Result<Self> {
        let copy = Self::anonymous()?;
        self.copy_to(&copy)?;
        Ok(copy)
    }

    /// A word of the header.
    pub fn header(&self, word: LiveHeader) -> &AtomicU64 {
        // SAFETY: the head mapping has at least one page and lives as long as self.
        unsafe { &*self.head.add(word as usize) }
    }

    fn summary(&self, page: u64) -> Option<(&AtomicU64, u64)> {
        let word = usize::try_from(page / 64).ok().filter(|w| *w < SUMMARY_WORDS)?;
        // SAFETY: word < SUMMARY_WORDS, which together with the header page is the length of the head mapping.
        Some((unsafe { &*self.head.add(LIVE_PAGE_WORDS + word) }, 1 << (page % 64)))
    }

    /// Whether a summary word's own page has been reserved: the first always, others by their length.
    fn summary_reserved(&self, page: u64) -> bool {
        page / 64 < LIVE_PAGE_WORDS as u64 || self.header_extra().load(Ordering::Acquire) > page / 64
    }

    fn header_extra(&self) -> &AtomicU64 {
        // SAFETY: word 511 of the header page.
        unsafe { &*self.head.add(LIVE_PAGE_WORDS - 1) }
    }

    /// Page `page` of the map, if it was ever prepared.
    pub fn page(&self, page: u64) -> Option<&[AtomicU64; LIVE_PAGE_WORDS]> {
        if !self.summary_reserved(page) {
            return None;
        }
        let (word, bit) = self.summary(page)?;
        if word.load(Ordering::Acquire) & bit == 0 {
            return None;
        }
        let base = self.segment(page).ok()?;
        // SAFETY: the segment mapping covers the page, which was reserved before its summary bit was set.
        Some(unsafe { &*base.add((page % SEGMENT_PAGES) as usize * LIVE_PAGE_WORDS).cast() })
    }

    /// Where the segment of a page is mapped.
    fn segment(&self, page: u64) -> io::Result<*mut AtomicU64> {
        let Some(index) = (page / SEGMENT_PAGES).checked_sub(1) else {
            // SAFETY: the first mapping has the head and a segment behind it.
            return Ok(unsafe { self.head.add(HEAD_PAGES as usize * LIVE_PAGE_WORDS) });
        };
        let none = || (0..SEGMENTS).map(|_| AtomicPtr::new(ptr::null_mut())).collect();
        let slot = &self.segments.get_or_init(none)[index as usize];
        let seen = slot.load(Ordering::Acquire);
        if !seen.is_null() {
            return Ok(seen);
        }
        let offset = self.base + (HEAD_PAGES + page / SEGMENT_PAGES * SEGMENT_PAGES) * PAGE;
        let at =
            sys::map_shared(self.file.as_fd(), offset, (SEGMENT_PAGES * PAGE) as usize)?.cast::<AtomicU64>();
        match slot.compare_exchange(ptr::null_mut(), at, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Ok(at),
            Err(seen) => {
                // SAFETY: mapped above, and nothing else knows it.
                unsafe { sys::unmap(at.cast(), (SEGMENT_PAGES * PAGE) as usize) };
                Ok(seen)
            }
        }
    }

    /// As [`LiveFile::prepare_for`], of a map that was there before.
    ///
    /// # Errors
    /// As [`LiveFile::prepare_for`].
    pub fn prepare(&self, page: u64) -> io::Result<&[AtomicU64; LIVE_PAGE_WORDS]> {
        self.prepare_for(page, MapUse::TakeOver)
    }

    /// Reserves page `page` and returns it. Zeros when it is new.
    ///
    /// # Errors
    /// ENOSPC when tmpfs is full or a bound is reached; EFBIG past the largest disk.
    pub fn prepare_for(&self, page: u64, wanted: MapUse) -> io::Result<&[AtomicU64; LIVE_PAGE_WORDS]> {
        if let Some(page) = self.page(page) {
            return Ok(page);
        }
        let (word, bit) = self.summary(page).ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))?;
        {
            let _grow = self.grow.lock();
            if let Some(lease) = &self.lease {
                let discarded = self.discarded.load(Ordering::Relaxed);
                lease.admit(MapPages { bytes: self.memory(), discarded }, wanted)?;
            }
            if !self.summary_reserved(page) {
                let upto = (page / 64 / LIVE_PAGE_WORDS as u64 + 1) * LIVE_PAGE_WORDS as u64;
                sys::fallocate(self.file.as_fd(), 0, self.base + PAGE, upto * 8)?;
                self.header_extra().store(upto, Ordering::Release);
            }
            sys::fallocate(self.file.as_fd(), 0, self.base + (HEAD_PAGES + page) * PAGE, PAGE)?;
            self.segment(page)?;
            if word.fetch_or(bit, Ordering::Release) & bit == 0 {
                self.reserved.fetch_add(1, Ordering::Relaxed);
                if wanted == MapUse::Discard {
                    self.discarded.fetch_add(PAGE, Ordering::Relaxed);
                }
            }
        }
        self.page(page).ok_or_else(|| io::Error::other("a map page vanished"))
    }

    /// Numbers of the pages that were prepared, from `first` up.
    pub fn pages(&self, first: u64) -> impl Iterator<Item = u64> + '_ {
        let words = self.header_extra().load(Ordering::Acquire);
        let words = words.clamp(LIVE_PAGE_WORDS as u64, SUMMARY_WORDS as u64);
        (first / 64..words).flat_map(move |word| {
            let mut bits = self.summary(word * 64).map_or(0, |(w, _)| w.load(Ordering::Acquire));
            if word == first / 64 {
                bits &= u64::MAX << (first % 64);
            }
            std::iter::from_fn(move || {
                (bits != 0).then(|| {
                    let bit = bits.trailing_zeros();
                    bits &= bits - 1;
                    word * 64 + u64::from(bit)
                })
            })
        })
    }
}

impl Drop for LiveFile {
    fn drop(&mut self) {
        // SAFETY: mapped in `at`, and `self` was the only way to it.
        unsafe { sys::unmap(self.head.cast(), FIRST_BYTES) };
        for slot in self.segments.get().into_iter().flatten() {
            let at = slot.load(Ordering::Acquire);
            if !at.is_null() {
                // SAFETY: mapped in `segment`, and `self` was the only way to it.
                unsafe { sys::unmap(at.cast(), (SEGMENT_PAGES * PAGE) as usize) };
            }
        }
    }
}
