//! Memory that outlives the worker: a file on tmpfs, mapped shared.
//!
//! The file holds a header page, summary pages with one bit per map page, and the map pages. A map page is touched
//! only after its space was reserved with fallocate(2), so that a full tmpfs is an error and never a SIGBUS, and a
//! page that nobody wrote costs nothing. Contents are valid for this boot only: tmpfs forgets them at reboot.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::sys;

/// Words of a page.
pub const LIVE_PAGE_WORDS: usize = 512;
const PAGE: u64 = 4096;
/// Header page, then summary pages, up to here.
const HEAD_PAGES: u64 = 64;
const SUMMARY_WORDS: usize = (HEAD_PAGES as usize - 1) * LIVE_PAGE_WORDS;
/// Map pages mapped at once (16 MiB).
const SEGMENT_PAGES: u64 = 4096;
const SEGMENTS: usize = SUMMARY_WORDS * 64 / SEGMENT_PAGES as usize;

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
    file: File,
    head: *mut AtomicU64,
    segments: Box<[AtomicPtr<AtomicU64>]>,
    grow: Mutex<()>,
}

// SAFETY: the pointers lead to shared mappings that live as long as the value and are only accessed as atomics.
unsafe impl Send for LiveFile {}
// SAFETY: as above.
unsafe impl Sync for LiveFile {}

impl LiveFile {
    /// Maps a file; a new one may be empty.
    ///
    /// # Errors
    /// When the space of the head cannot be reserved or mapped.
    pub fn new(file: File) -> io::Result<Self> {
        // The header and the first summary page; later summary pages are reserved with the pages they describe.
        sys::fallocate(file.as_fd(), 0, 0, 2 * PAGE)?;
        if file.metadata()?.len() < HEAD_PAGES * PAGE {
            file.set_len(HEAD_PAGES * PAGE)?;
        }
        let head = sys::map_shared(file.as_fd(), 0, (HEAD_PAGES * PAGE) as usize)?.cast::<AtomicU64>();
        let segments = (0..SEGMENTS).map(|_| AtomicPtr::new(ptr::null_mut())).collect();
        let live = Self { file, head, segments, grow: Mutex::new(()) };
        // Touching a page behind the end would be a SIGBUS.
        let pages = live.pages(0).last().map_or(0, |last| last + 1);
        if live.file.metadata()?.len() < (HEAD_PAGES + pages) * PAGE {
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
        Self::new(self.file.try_clone()?)
    }

    /// A copy of the memory as it is now, in anonymous memory.
    ///
    /// # Errors
    /// When there is no memory for it.
    #[cfg(any(test, feature = "simulation"))]
    pub fn duplicate(&self) -> io::Result<Self> {
        let copy = Self::anonymous()?;
        for at in 0..LIVE_PAGE_WORDS - 1 {
            // SAFETY: words of the header page of two mappings that live as long as their values.
            let (from, to) = unsafe { (&*self.head.add(at), &*copy.head.add(at)) };
            to.store(from.load(Ordering::Acquire), Ordering::Release);
        }
        for no in self.pages(0) {
            let Some(page) = self.page(no) else { continue };
            for (from, to) in page.iter().zip(copy.prepare(no)?) {
                to.store(from.load(Ordering::Acquire), Ordering::Release);
            }
        }
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

    fn segment(&self, page: u64) -> io::Result<*mut AtomicU64> {
        let slot = &self.segments[(page / SEGMENT_PAGES) as usize];
        let seen = slot.load(Ordering::Acquire);
        if !seen.is_null() {
            return Ok(seen);
        }
        let _grow = self.grow.lock();
        self.map_segment(page)
    }

    fn map_segment(&self, page: u64) -> io::Result<*mut AtomicU64> {
        let slot = &self.segments[(page / SEGMENT_PAGES) as usize];
        let seen = slot.load(Ordering::Acquire);
        if !seen.is_null() {
            return Ok(seen);
        }
        let offset = (HEAD_PAGES + page / SEGMENT_PAGES * SEGMENT_PAGES) * PAGE;
        let at =
            sys::map_shared(self.file.as_fd(), offset, (SEGMENT_PAGES * PAGE) as usize)?.cast::<AtomicU64>();
        slot.store(at, Ordering::Release);
        Ok(at)
    }

    /// Reserves page `page` and returns it. Zeros when it is new.
    ///
    /// # Errors
    /// ENOSPC when tmpfs is full; EFBIG past the largest disk.
    pub fn prepare(&self, page: u64) -> io::Result<&[AtomicU64; LIVE_PAGE_WORDS]> {
        if let Some(page) = self.page(page) {
            return Ok(page);
        }
        let (word, bit) = self.summary(page).ok_or_else(|| io::Error::from_raw_os_error(libc::EFBIG))?;
        {
            let _grow = self.grow.lock();
            if !self.summary_reserved(page) {
                let upto = (page / 64 / LIVE_PAGE_WORDS as u64 + 1) * LIVE_PAGE_WORDS as u64;
                sys::fallocate(self.file.as_fd(), 0, PAGE, upto * 8)?;
                self.header_extra().store(upto, Ordering::Release);
            }
            sys::fallocate(self.file.as_fd(), 0, (HEAD_PAGES + page) * PAGE, PAGE)?;
            self.map_segment(page)?;
            word.fetch_or(bit, Ordering::Release);
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
        // SAFETY: mapped in `new`, and `self` was the only way to it.
        unsafe { sys::unmap(self.head.cast(), (HEAD_PAGES * PAGE) as usize) };
        for slot in &self.segments {
            let at = slot.load(Ordering::Acquire);
            if !at.is_null() {
                // SAFETY: mapped in `map_segment`, and `self` was the only way to it.
                unsafe { sys::unmap(at.cast(), (SEGMENT_PAGES * PAGE) as usize) };
            }
        }
    }
}
