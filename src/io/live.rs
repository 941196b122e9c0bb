//! Memory that outlives the worker: a part of a file on tmpfs, mapped shared.
//!
//! It holds a header page, summary pages with one bit per map page, and the map pages. A map page is touched only
//! after its space is reserved with fallocate(2), so that a full tmpfs is an error and never a SIGBUS, and an untouched
//! page takes no memory. Contents are valid for this boot only, because tmpfs is empty after a reboot.
//!
//! It also lists the pages that may have words which are not durable ([`LiveFile::note_unflushed`]), so that the next
//! worker finds them without a look at every page. The list counts only while every worker since has kept it: a worker of
//! an earlier version does not ([`LiveFile::is_tracked`]).
//!
//! The kernel unmaps the pages of a dead worker before the supervisor learns of its death, and the next worker waits for
//! that. For a map of gigabytes in pages of 4 KiB this takes hundreds of milliseconds, in huge pages one. So runs of map
//! pages that are all reserved are merged into huge pages ([`LiveFile::merge_pages`]); mappings are aligned for them.
//!
//! A live file has a file of its own, or a window of one that many share ([`super::LiveArena`]).

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::live_arena::{Lease, MapPages};
use super::{is_full, mapping, sys};

/// Words of a page.
pub const LIVE_PAGE_WORDS: usize = 512;
const PAGE: u64 = 4096;
/// Header page, then summary pages, up to here.
const HEAD_PAGES: u64 = 64;
const SUMMARY_WORDS: usize = (HEAD_PAGES as usize - 1) * LIVE_PAGE_WORDS;
/// Pages of the file mapped at once (16 MiB). The first segment begins with the head.
const SEGMENT_PAGES: u64 = 4096;
const SEGMENT_BYTES: usize = (SEGMENT_PAGES * PAGE) as usize;
/// Segments behind the first one.
const SEGMENTS: usize = (HEAD_PAGES as usize + SUMMARY_WORDS * 64).div_ceil(SEGMENT_PAGES as usize) - 1;
/// Pages of a huge page (2 MiB); a segment has a whole number of them, and so has a window of the arena.
const HUGE_PAGES: u64 = mapping::HUGE_PAGE as u64 / PAGE;
const _: () =
    assert!(SEGMENT_PAGES.is_multiple_of(HUGE_PAGES) && HUGE_PAGES.is_multiple_of(64) && HEAD_PAGES == 64);
/// Where the list of unflushed pages goes on.
pub(super) const FAR_AT: u64 = (HEAD_PAGES + SUMMARY_WORDS as u64 * 64) * PAGE;
/// Words of the header page that list unflushed pages: those of a disk of up to 1.7 TiB. Versions without the list leave
/// them alone.
const NEAR_AT: usize = 48;
const NEAR_WORDS: usize = 448;
const _: () = assert!(NEAR_AT + NEAR_WORDS < LIVE_PAGE_WORDS);
/// Pages of the rest of the list.
const FAR_PAGES: usize = (SUMMARY_WORDS - NEAR_WORDS).div_ceil(LIVE_PAGE_WORDS);
const FAR_BYTES: usize = FAR_PAGES * PAGE as usize;
/// Each page of it has a bit in a word.
const _: () = assert!(FAR_PAGES <= 64);
/// No live file is longer.
pub(super) const LONGEST: u64 = FAR_AT + FAR_BYTES as u64;

/// The purpose of a new page of a map. It decides which part of the bound the page may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapUse {
    /// A guest's write.
    Write,
    /// Zeros that hide the base. They may take the reserve.
    Discard,
    /// A map that existed before. It has no bound.
    TakeOver,
}

/// Words of the header page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum LiveHeader {
    /// Set last when the file is created.
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
    /// The boot that the file belongs to.
    Boot = 9,
    /// The error epoch when the disk was last opened.
    OpenedEpoch = 10,
    /// The files that are being synced. When a worker dies meanwhile, the result of the sync is unknown.
    Syncing = 11,
    /// A token of the mount's request that set the size last, which may be sent again; 0 when there was none.
    Resized = 12,
    /// The mark of the arena when the list of unflushed pages became complete; 0 when it never was.
    Tracked = 13,
}

/// One disk's live map.
#[derive(Debug)]
pub struct LiveFile {
    file: Arc<File>,
    /// Where in the file it begins.
    base: u64,
    /// The first segment, which begins with the head.
    head: *mut AtomicU64,
    segments: OnceLock<Box<[AtomicPtr<AtomicU64>]>>,
    grow: Mutex<()>,
    /// Map pages that are reserved.
    reserved: AtomicU64,
    /// Bytes of the pages for zeros that hide the base.
    discarded: AtomicU64,
    /// Huge pages, by their number in the file, whose pages were merged or cannot be. Held while pages are merged.
    merged: Mutex<BTreeSet<u64>>,
    /// The list of unflushed pages behind what the header has of it; null while no page needs it.
    far: AtomicPtr<AtomicU64>,
    /// Pages of it that are reserved, one bit each.
    far_reserved: AtomicU64,
    /// In the place of `far`, in this process only, when the memory filesystem had no room for it at a takeover.
    own_list: Option<Box<[AtomicU64]>>,
    /// What [`LiveHeader::Tracked`] has of a map that only workers with a list have changed; 0 when that is unknown.
    mark: u64,
    /// Keeps the window of a shared file. It is dropped after the mappings.
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
        Self::at(Arc::new(file), 0, None, 0)
    }

    /// Maps the live file that begins at byte `base` of a file.
    pub(super) fn at(file: Arc<File>, base: u64, lease: Option<Lease>, mark: u64) -> io::Result<Self> {
        // The header and the first summary page; later summary pages are reserved with the pages they describe.
        sys::fallocate(file.as_fd(), 0, base, 2 * PAGE)?;
        // A window lies inside a shared file. Setting a length here could cut another window off.
        if lease.is_none() && file.metadata()?.len() < base + HEAD_PAGES * PAGE {
            file.set_len(base + HEAD_PAGES * PAGE)?;
        }
        let head = mapping::map_shared(file.as_fd(), base, SEGMENT_BYTES)?.cast::<AtomicU64>();
        let (segments, grow, reserved) = (OnceLock::new(), Mutex::new(()), AtomicU64::new(0));
        let (discarded, merged) = (AtomicU64::new(0), Mutex::default());
        let (far, far_reserved) = (AtomicPtr::new(ptr::null_mut()), AtomicU64::new(0));
        let mut live = Self {
            file,
            base,
            head,
            segments,
            grow,
            reserved,
            discarded,
            merged,
            far,
            far_reserved,
            own_list: None,
            mark,
            lease,
        };
        // A touch behind the end of the file is a SIGBUS.
        let (mut pages, mut count) = (0, 0);
        for page in live.pages(0) {
            (pages, count) = (page + 1, count + 1);
        }
        live.reserved.store(count, Ordering::Relaxed);
        if live.file.metadata()?.len() < base + (HEAD_PAGES + pages) * PAGE {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the file was cut: it has fewer pages than its summary claims",
            ));
        }
        // A version without the list may have made the pages.
        match live.reserve_lists() {
            Err(error) if is_full(&error) => live.keep_own_list(),
            reserved => reserved?,
        }
        Ok(live)
    }

    /// Reserves the memory that lists the pages of the map as unflushed.
    fn reserve_lists(&self) -> io::Result<()> {
        let mut listed = None;
        for page in self.pages(NEAR_WORDS as u64 * 64) {
            if far_page(page) != listed {
                self.reserve_list(page)?;
                listed = far_page(page);
            }
        }
        Ok(())
    }

    /// Keeps the list in this process, because a takeover must not fail for it. It is not there for the next worker, whose
    /// first flush looks at all pages.
    fn keep_own_list(&mut self) {
        self.header(LiveHeader::Tracked).store(0, Ordering::Release);
        self.mark = 0;
        self.own_list = Some((0..FAR_PAGES * LIVE_PAGE_WORDS).map(|_| AtomicU64::new(0)).collect());
    }

    /// A live file in anonymous memory, for tests.
    pub fn anonymous() -> io::Result<Self> {
        Self::at(Arc::new(sys::memory_file()?), 0, None, 1)
    }

    /// Maps the same memory again, as a next worker does.
    pub fn reopen(&self) -> io::Result<Self> {
        Self::at(self.file.clone(), self.base, self.lease.clone(), self.mark)
    }

    /// The reserved memory, bytes.
    pub fn memory(&self) -> u64 {
        let list = u64::from(self.far_reserved.load(Ordering::Relaxed).count_ones());
        (2 + list + self.reserved.load(Ordering::Relaxed)) * PAGE
    }

    /// Copies everything to `to`, which is new.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn copy_to(&self, to: &Self) -> io::Result<()> {
        for no in self.pages(0) {
            let Some(page) = self.page(no) else { continue };
            {
                // Another mapping may have made the page.
                let _grow = self.grow.lock();
                self.reserve_list(no)?;
            }
            // A writer lists the page before it changes it, and a flush that ends takes it from the list after.
            let was_unflushed = self.is_unflushed(no);
            for (from, to) in page.iter().zip(to.prepare(no)?) {
                to.store(from.load(Ordering::Acquire), Ordering::Release);
            }
            if was_unflushed || self.is_unflushed(no) {
                to.note_unflushed(no);
            }
        }
        // Without the list, which has been copied page by page.
        for at in (0..NEAR_AT).chain(NEAR_AT + NEAR_WORDS..LIVE_PAGE_WORDS - 1) {
            // SAFETY: words of the header page of two mappings that live as long as their values.
            let (from, to) = unsafe { (&*self.head.add(at), &*to.head.add(at)) };
            to.store(from.load(Ordering::Acquire), Ordering::Release);
        }
        let mark = if self.is_tracked() { to.mark } else { 0 };
        to.header(LiveHeader::Tracked).store(mark, Ordering::Release);
        Ok(())
    }

    /// A copy of the current contents, in anonymous memory.
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

    /// Whether the page of a summary word is reserved. The first such page always is; the header has the length of
    /// the others.
    fn summary_reserved(&self, page: u64) -> bool {
        page / 64 < LIVE_PAGE_WORDS as u64 || self.header_extra().load(Ordering::Acquire) > page / 64
    }

    fn header_extra(&self) -> &AtomicU64 {
        // SAFETY: word 511 of the header page.
        unsafe { &*self.head.add(LIVE_PAGE_WORDS - 1) }
    }

    /// Whether the list of unflushed pages is complete: no worker that does not keep it has changed the map since.
    pub fn is_tracked(&self) -> bool {
        self.mark != 0 && self.header(LiveHeader::Tracked).load(Ordering::Acquire) == self.mark
    }

    /// Notes that the list of unflushed pages is complete. From here on [`LiveFile::note_unflushed`] comes before each
    /// change of a page.
    pub fn set_tracked(&self) {
        self.header(LiveHeader::Tracked).store(self.mark, Ordering::Release);
    }

    /// The word and the bit that list a page as unflushed; `None` when the word has no memory.
    fn listed(&self, page: u64) -> Option<(&AtomicU64, u64)> {
        let (word, bit) = (page / 64, 1 << (page % 64));
        let at = match word.checked_sub(NEAR_WORDS as u64) {
            // SAFETY: a word of the header page.
            None => unsafe { self.head.add(NEAR_AT + word as usize) },
            Some(word) => {
                if let Some(list) = &self.own_list {
                    return Some((list.get(word as usize)?, bit));
                }
                let list_page = word / LIVE_PAGE_WORDS as u64;
                if list_page >= FAR_PAGES as u64
                    || self.far_reserved.load(Ordering::Acquire) & 1 << list_page == 0
                {
                    return None;
                }
                // SAFETY: mapped before the bit of its page was set; the mapping has FAR_PAGES pages.
                unsafe { self.far.load(Ordering::Acquire).add(word as usize) }
            }
        };
        // SAFETY: as above; the mappings live as long as self.
        Some((unsafe { &*at }, bit))
    }

    /// Reserves the memory that lists `page` as unflushed. The caller holds `grow`, or no other thread has the value yet.
    fn reserve_list(&self, page: u64) -> io::Result<()> {
        let Some(list_page) = far_page(page).filter(|_| self.own_list.is_none()) else { return Ok(()) };
        if self.far_reserved.load(Ordering::Acquire) & 1 << list_page != 0 {
            return Ok(());
        }
        sys::fallocate(self.file.as_fd(), 0, self.base + FAR_AT + list_page * PAGE, PAGE)?;
        if self.far.load(Ordering::Acquire).is_null() {
            let at = mapping::map_shared(self.file.as_fd(), self.base + FAR_AT, FAR_BYTES)?;
            self.far.store(at.cast(), Ordering::Release);
        }
        self.far_reserved.fetch_or(1 << list_page, Ordering::AcqRel);
        Ok(())
    }

    /// Lists a page, which was prepared, as unflushed. A worker does so before it changes a bit or a word of the page: a
    /// kill after any instruction leaves a page too many in the list, never one too few.
    pub fn note_unflushed(&self, page: u64) {
        let Some((word, bit)) = self.listed(page) else { return };
        if word.load(Ordering::Acquire) & bit == 0 {
            word.fetch_or(bit, Ordering::AcqRel);
        }
    }

    /// Takes a page from the list, all of which is durable.
    pub fn forget_unflushed(&self, page: u64) {
        if let Some((word, bit)) = self.listed(page) {
            word.fetch_and(!bit, Ordering::AcqRel);
        }
    }

    fn is_unflushed(&self, page: u64) -> bool {
        self.listed(page).is_some_and(|(word, bit)| word.load(Ordering::Acquire) & bit != 0)
    }

    /// Numbers of the pages that may have words which are not durable, in order. A page that is noted or forgotten
    /// meanwhile may be missed or listed.
    pub fn unflushed_pages(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.summary_words()).flat_map(|word| {
            bits_of(word, self.listed(word * 64).map_or(0, |(w, _)| w.load(Ordering::Acquire)))
        })
    }

    /// Page `page` of the map, if it was prepared.
    pub fn page(&self, page: u64) -> Option<&[AtomicU64; LIVE_PAGE_WORDS]> {
        if !self.summary_reserved(page) {
            return None;
        }
        let (word, bit) = self.summary(page)?;
        if word.load(Ordering::Acquire) & bit == 0 {
            return None;
        }
        let at = self.mapped(page).ok()?;
        // SAFETY: the segment mapping covers the page, which was reserved before its summary bit was set.
        Some(unsafe { &*at.cast() })
    }

    /// Where map page `page` is mapped.
    fn mapped(&self, page: u64) -> io::Result<*mut AtomicU64> {
        let (segment, within) = ((HEAD_PAGES + page) / SEGMENT_PAGES, (HEAD_PAGES + page) % SEGMENT_PAGES);
        // SAFETY: a segment has SEGMENT_PAGES pages.
        Ok(unsafe { self.segment(segment)?.add(within as usize * LIVE_PAGE_WORDS) })
    }

    /// Where a segment is mapped.
    fn segment(&self, segment: u64) -> io::Result<*mut AtomicU64> {
        let Some(index) = segment.checked_sub(1) else { return Ok(self.head) };
        let none = || (0..SEGMENTS).map(|_| AtomicPtr::new(ptr::null_mut())).collect();
        let slot = &self.segments.get_or_init(none)[index as usize];
        let seen = slot.load(Ordering::Acquire);
        if !seen.is_null() {
            return Ok(seen);
        }
        let offset = self.base + segment * SEGMENT_BYTES as u64;
        let at = mapping::map_shared(self.file.as_fd(), offset, SEGMENT_BYTES)?.cast::<AtomicU64>();
        match slot.compare_exchange(ptr::null_mut(), at, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Ok(at),
            Err(seen) => {
                // SAFETY: mapped above, and no other code has the address.
                unsafe { mapping::unmap(at.cast(), SEGMENT_BYTES) };
                Ok(seen)
            }
        }
    }

    /// Merges pages of the map into huge pages, `most` at most; returns how many it tried.
    ///
    /// Merges only where each page of a huge page is reserved, so that merging takes no memory (D66). Each huge page is
    /// tried once: a kernel before 6.1 cannot merge, and one without contiguous memory refuses. Contents stay, and readers and
    /// writers of the map may run meanwhile; the kernel holds them up for the copy of one huge page.
    pub fn merge_pages(&self, most: usize) -> usize {
        // Most maps are too small to fill a huge page.
        if self.reserved.load(Ordering::Relaxed) < HUGE_PAGES {
            return 0;
        }
        let mut merged = self.merged.lock();
        let words = self.summary_words();
        let per_huge = HUGE_PAGES / 64;
        // The head takes the place of one word of the summary; the first huge page has pages of the head that are not
        // reserved.
        let count = (words + HEAD_PAGES / 64) / per_huge;
        let is_full = |huge: u64| {
            (huge * per_huge..(huge + 1) * per_huge).all(|word| {
                let page = word * 64 - HEAD_PAGES;
                self.summary(page).is_some_and(|(bits, _)| bits.load(Ordering::Acquire) == u64::MAX)
            })
        };
        let full: Vec<u64> =
            (1..count).filter(|huge| !merged.contains(huge) && is_full(*huge)).take(most).collect();
        for huge in &full {
            merged.insert(*huge);
            let Ok(at) = self.mapped(huge * HUGE_PAGES - HEAD_PAGES) else { continue };
            // SAFETY: the segment that holds the huge page is mapped as long as self, and every page of it is reserved.
            if let Err(error) = unsafe { mapping::merge_huge_page(at.cast()) } {
                tracing::debug!(huge, %error, "pages of a live map stay small");
            }
        }
        full.len()
    }

    /// As [`LiveFile::prepare_for`], for a map that existed before.
    ///
    /// # Errors
    /// As [`LiveFile::prepare_for`].
    pub fn prepare(&self, page: u64) -> io::Result<&[AtomicU64; LIVE_PAGE_WORDS]> {
        self.prepare_for(page, MapUse::TakeOver)
    }

    /// Reserves page `page` and returns it. A new page has zeros.
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
            self.reserve_list(page)?;
            sys::fallocate(self.file.as_fd(), 0, self.base + (HEAD_PAGES + page) * PAGE, PAGE)?;
            self.mapped(page)?;
            if word.fetch_or(bit, Ordering::Release) & bit == 0 {
                self.reserved.fetch_add(1, Ordering::Relaxed);
                if wanted == MapUse::Discard {
                    self.discarded.fetch_add(PAGE, Ordering::Relaxed);
                }
            }
        }
        self.page(page).ok_or_else(|| io::Error::other("a reserved page of the map is missing"))
    }

    /// Words of the summary that may have bits.
    fn summary_words(&self) -> u64 {
        self.header_extra().load(Ordering::Acquire).clamp(LIVE_PAGE_WORDS as u64, SUMMARY_WORDS as u64)
    }

    /// Numbers of the prepared pages from `first` up.
    pub fn pages(&self, first: u64) -> impl Iterator<Item = u64> + '_ {
        (first / 64..self.summary_words()).flat_map(move |word| {
            let mut bits = self.summary(word * 64).map_or(0, |(w, _)| w.load(Ordering::Acquire));
            if word == first / 64 {
                bits &= u64::MAX << (first % 64);
            }
            bits_of(word, bits)
        })
    }
}

/// The page of the list of unflushed pages, behind the header, that has the bit of `page`.
fn far_page(page: u64) -> Option<u64> {
    Some((page / 64).checked_sub(NEAR_WORDS as u64)? / LIVE_PAGE_WORDS as u64)
}

/// The numbers that the bits of word `word` of a bitmap stand for.
fn bits_of(word: u64, mut bits: u64) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        let bit = (bits != 0).then(|| bits.trailing_zeros())?;
        bits &= bits - 1;
        Some(word * 64 + u64::from(bit))
    })
}

impl Drop for LiveFile {
    fn drop(&mut self) {
        // SAFETY: mapped in `at`, and only `self` leads to the mapping.
        unsafe { mapping::unmap(self.head.cast(), SEGMENT_BYTES) };
        let far = self.far.load(Ordering::Acquire);
        if !far.is_null() {
            // SAFETY: mapped in `reserve_list`, and only `self` leads to the mapping.
            unsafe { mapping::unmap(far.cast(), FAR_BYTES) };
        }
        for slot in self.segments.get().into_iter().flatten() {
            let at = slot.load(Ordering::Acquire);
            if !at.is_null() {
                // SAFETY: mapped in `segment`, and only `self` leads to the mapping.
                unsafe { mapping::unmap(at.cast(), SEGMENT_BYTES) };
            }
        }
    }
}
