//! The live maps of all disks in one file on a memory filesystem.
//!
//! The supervisor holds the file by descriptor and hands it to each worker, so a name that is removed loses nothing,
//! and a disk costs no descriptor. Behind a header the file has a directory of slots, and for each slot a window as
//! large as the map of the largest disk; all of it is sparse. docs/format.md, "Arena of live maps", has the layout.
//!
//! What must hold: a slot is found under its disk's number only when its map is complete; a window is given to another
//! disk only after its memory was given back and after its last mapping in this process ended (D25); no page is touched
//! before its space is reserved.
//!
//! One slot has no map: its entry is the *mark*, a random number. It looks like a slot that a dead worker was making, so
//! a version that does not know it gives the slot back when it takes the arena over. Maps whose header has the mark are
//! maps that only versions which know it have changed since ([`LiveFile::is_tracked`]).

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::live::{LONGEST, LiveFile, MapUse};
use super::live_store::LiveStore;
use super::{mapping, sys};

const PAGE: u64 = 4096;
/// "PLARNA", layout 1 in the upper 16 bits.
const MAGIC: u64 = 0x0001_414e_5241_4c50;
const NAME: u64 = (1 << 48) - 1;
/// Capacity of the directory, in slots.
const SLOTS: u64 = 1 << 20;
const DIRECTORY_AT: u64 = PAGE;
const HEAD_BYTES: usize = (DIRECTORY_AT + SLOTS * 8) as usize;
/// Bytes from one window to the next; the first window begins there too.
const WINDOW: u64 = 1 << 33;
const _: () = assert!(LONGEST <= WINDOW && HEAD_BYTES as u64 <= WINDOW);
/// Entries of the directory that are reserved at once.
const STEP: u64 = PAGE / 8;

/// Words of the header.
mod word {
    pub const MAGIC: usize = 0;
    pub const ID: usize = 1;
    pub const BOOT: usize = 2;
    pub const DEVICE: usize = 3;
    pub const INODE: usize = 4;
    /// Entries of the directory that are reserved.
    pub const ENTRIES: usize = 5;
    pub const COUNT: usize = 6;
}

/// State of a slot: the lowest two bits of its entry, the disk's number above.
const MAKING: u64 = 1;
const COMPLETE: u64 = 2;
const LEAVING: u64 = 3;

/// The entry of the mark: `MAKING`, with a number that no disk has.
const MARK: u64 = 1 << 61;

/// The store that an arena belongs to, and where that store lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ArenaIdentity {
    /// Random. The store's record names it, so that a replaced arena is never taken for the current one.
    pub id: u64,
    /// Device number of the store's directory.
    pub device: u64,
    /// Inode number of that directory; a copy of a store has another one.
    pub inode: u64,
}

/// Bounds on the memory of live maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapBounds {
    /// Bytes for the maps of all disks.
    pub total: u64,
    /// Bytes for the map of one disk.
    pub per_disk: u64,
    /// Bytes above both bounds for zeros that hide the base, so that discards work when writes do not.
    pub reserve: u64,
}

impl MapBounds {
    /// No bound.
    pub const NONE: Self = Self { total: u64::MAX / 4, per_disk: u64::MAX / 4, reserve: 0 };

    /// Whether a disk whose map takes `own` may have another page, when all maps take `all` bytes.
    ///
    /// A disk may take as much as it leaves for the others. So a disk that takes all it can leaves half, the next one
    /// half of that, and a small map always finds room. The reserve for zeros is divided in the same way.
    pub fn admit(&self, own: MapPages, all: u64, wanted: MapUse) -> bool {
        let MapPages { bytes, discarded } = own;
        match wanted {
            MapUse::Write => bytes + PAGE <= self.per_disk && bytes + PAGE <= self.total.saturating_sub(all),
            MapUse::Discard => {
                let left = (self.total + self.reserve).saturating_sub(all);
                bytes + PAGE <= self.per_disk + self.reserve && discarded + PAGE <= left
            }
            MapUse::TakeOver => true,
        }
    }
}

/// The reservation of one map, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MapPages {
    /// All of it.
    pub bytes: u64,
    /// The part for zeros that hide the base, since this worker serves.
    pub discarded: u64,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct LiveArena {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    file: Arc<File>,
    head: *mut AtomicU64,
    bounds: MapBounds,
    /// The mark; 0 when there was no room for one.
    mark: u64,
    slots: Mutex<Slots>,
}

// SAFETY: the pointer leads to a shared mapping that lives as long as the value and is only accessed as atomics.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

#[derive(Debug, Default)]
struct Slots {
    complete: HashMap<u64, u64>,
    making: HashMap<u64, u64>,
    free: BTreeSet<u64>,
    /// Slots from here on were never used.
    fresh: u64,
    /// The number of mappings of each mapped slot.
    mapped: HashMap<u64, u32>,
    /// Slots that become free with their last mapping.
    leaving: BTreeSet<u64>,
}

/// A mapping of a slot. While one exists, the window is not given to another disk.
#[derive(Debug)]
pub(super) struct Lease {
    inner: Arc<Inner>,
    slot: u64,
}

impl Lease {
    /// Whether the map, which has reserved `own`, may have another page.
    ///
    /// # Errors
    /// ENOSPC at a bound.
    pub(super) fn admit(&self, own: MapPages, wanted: MapUse) -> io::Result<()> {
        if self.inner.bounds.admit(own, self.inner.memory()?, wanted) {
            return Ok(());
        }
        Err(io::Error::from_raw_os_error(libc::ENOSPC))
    }
}

impl Clone for Lease {
    fn clone(&self) -> Self {
        *self.inner.slots.lock().mapped.entry(self.slot).or_default() += 1;
        Self { inner: self.inner.clone(), slot: self.slot }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut slots = self.inner.slots.lock();
        let Some(count) = slots.mapped.get_mut(&self.slot) else { return };
        *count -= 1;
        if *count > 0 {
            return;
        }
        slots.mapped.remove(&self.slot);
        if slots.leaving.contains(&self.slot) {
            self.inner.give_back(&mut slots, self.slot);
        }
    }
}

fn window(slot: u64) -> u64 {
    (slot + 1) * WINDOW
}

fn damaged(detail: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, detail.into())
}

/// Reads the words of the header, and checks that its layout is known.
fn read_header(file: &File) -> io::Result<[u64; word::COUNT]> {
    let mut bytes = [0; word::COUNT * 8];
    file.read_exact_at(&mut bytes, 0)?;
    let mut words = [0; word::COUNT];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *word = u64::from_ne_bytes(*bytes);
    }
    let magic = words[word::MAGIC];
    if magic & NAME != MAGIC & NAME {
        return Err(damaged("the file is not an arena of live maps"));
    }
    if magic != MAGIC {
        let (has, knows) = (magic >> 48, MAGIC >> 48);
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("the arena of live maps has layout {has}, this plyfs knows {knows}"),
        ));
    }
    if words[word::ENTRIES] > SLOTS {
        return Err(damaged("the directory of the arena of live maps is too long"));
    }
    Ok(words)
}

impl LiveArena {
    /// Formats an empty file as an empty arena.
    ///
    /// # Errors
    /// ENOSPC without memory.
    pub fn format(file: &File, identity: &ArenaIdentity) -> io::Result<()> {
        let mut words = [0; word::COUNT];
        words[word::MAGIC] = MAGIC;
        words[word::ID] = identity.id;
        words[word::BOOT] = sys::boot_number();
        (words[word::DEVICE], words[word::INODE]) = (identity.device, identity.inode);
        words[word::ENTRIES] = STEP;
        sys::fallocate(file.as_fd(), 0, 0, DIRECTORY_AT + STEP * 8)?;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        file.write_all_at(&bytes, 0)
    }

    /// The store of an arena; `None` when the arena is of another boot.
    ///
    /// # Errors
    /// `InvalidData` when the file is not an arena, `Unsupported` when it has another layout.
    pub fn identity(file: &File) -> io::Result<Option<ArenaIdentity>> {
        let words = read_header(file)?;
        let (id, device, inode) = (words[word::ID], words[word::DEVICE], words[word::INODE]);
        Ok((words[word::BOOT] == sys::boot_number()).then_some(ArenaIdentity { id, device, inode }))
    }

    /// Lists the complete maps, and changes nothing: disk and first word of each.
    ///
    /// # Errors
    /// As [`LiveArena::identity`].
    pub fn list(file: &File) -> io::Result<Vec<(u64, u64)>> {
        let entries = read_header(file)?[word::ENTRIES];
        let mut bytes = vec![0; entries as usize * 8];
        file.read_exact_at(&mut bytes, DIRECTORY_AT)?;
        let mut found = Vec::new();
        for (slot, bytes) in (0..).zip(bytes.as_chunks::<8>().0) {
            let entry = u64::from_ne_bytes(*bytes);
            if entry & 3 == COMPLETE {
                let mut magic = [0; 8];
                file.read_exact_at(&mut magic, window(slot))?;
                found.push((entry >> 2, u64::from_ne_bytes(magic)));
            }
        }
        Ok(found)
    }

    /// Takes over an arena that no other process changes. Gives back the slots that an earlier worker did not complete, and
    /// marks the arena when it has no mark.
    ///
    /// # Errors
    /// As [`LiveArena::identity`]; when the file cannot be mapped.
    pub fn open(file: File, bounds: MapBounds) -> io::Result<Self> {
        let entries = read_header(&file)?[word::ENTRIES];
        if file.metadata()?.len() < DIRECTORY_AT + entries * 8 {
            return Err(damaged("the arena of live maps was cut"));
        }
        let head = mapping::map_shared(file.as_fd(), 0, HEAD_BYTES)?.cast::<AtomicU64>();
        let mut inner = Inner { file: Arc::new(file), head, bounds, mark: 0, slots: Mutex::default() };
        let mut slots = Slots { fresh: entries, ..Slots::default() };
        for slot in 0..entries {
            let entry = inner.entry(slot).load(Ordering::Acquire);
            match entry & 3 {
                0 => drop(slots.free.insert(slot)),
                COMPLETE => drop(slots.complete.insert(entry >> 2, slot)),
                MAKING if entry >> 2 & MARK != 0 && inner.mark == 0 => inner.mark = entry >> 2,
                _ => inner.give_back(&mut slots, slot),
            }
        }
        if inner.mark == 0 {
            match inner.make_mark(&mut slots) {
                Ok(mark) => inner.mark = mark,
                // The next flush of each disk looks at all of its map.
                Err(error) => tracing::warn!(%error, "the arena of live maps has no room for its mark"),
            }
        }
        *inner.slots.lock() = slots;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The memory of the arena, bytes.
    ///
    /// # Errors
    /// The error of fstat(2).
    pub fn memory(&self) -> io::Result<u64> {
        self.inner.memory()
    }

    /// The bounds on its memory.
    pub fn bounds(&self) -> MapBounds {
        self.inner.bounds
    }

    /// Copies all maps of another arena to this one, which is new.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn copy_from(&self, other: &Self) -> io::Result<()> {
        let disks: Vec<u64> = other.inner.slots.lock().complete.keys().copied().collect();
        for disk in disks {
            if let Some(live) = other.existing(disk)? {
                self.adopt(disk, &live)?;
            }
        }
        Ok(())
    }

    /// Copies the map of a disk to this arena.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn adopt(&self, disk: u64, live: &LiveFile) -> io::Result<()> {
        let copied = self.fresh(disk).and_then(|slot| live.copy_to(&slot)).and_then(|()| self.publish(disk));
        copied.inspect_err(|_| drop(self.remove(disk)))
    }

    fn map(&self, slots: &mut Slots, slot: u64) -> Lease {
        *slots.mapped.entry(slot).or_default() += 1;
        Lease { inner: self.inner.clone(), slot }
    }
}

impl Inner {
    fn entry(&self, slot: u64) -> &AtomicU64 {
        debug_assert!(slot < SLOTS);
        // SAFETY: the mapping has the header and SLOTS entries, and lives as long as self. Callers ask for entries
        // that are reserved.
        unsafe { &*self.head.add(DIRECTORY_AT as usize / 8 + slot as usize) }
    }

    fn memory(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.blocks() * 512)
    }

    /// Gives the memory of a slot back and frees the slot. When that fails, the slot keeps its memory until the next worker
    /// tries again.
    fn give_back(&self, slots: &mut Slots, slot: u64) {
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        match sys::fallocate(self.file.as_fd(), mode, window(slot), WINDOW) {
            Ok(()) => {
                self.entry(slot).store(0, Ordering::Release);
                slots.leaving.remove(&slot);
                slots.free.insert(slot);
            }
            Err(error) => {
                tracing::error!(slot, %error, "cannot give the memory of a live map back; the next worker tries again")
            }
        }
    }

    /// Takes a slot from its disk, and frees it once it is not mapped.
    fn leave(&self, slots: &mut Slots, slot: u64) {
        let entry = self.entry(slot);
        entry.store(entry.load(Ordering::Acquire) & !3 | LEAVING, Ordering::Release);
        slots.leaving.insert(slot);
        if !slots.mapped.contains_key(&slot) {
            self.give_back(slots, slot);
        }
    }

    /// Marks the arena with a number that it did not have before.
    fn make_mark(&self, slots: &mut Slots) -> io::Result<u64> {
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|e| io::Error::other(e.to_string()))?;
        let mark = u64::from_ne_bytes(random) & (MARK - 1) | MARK;
        let slot = self.free_slot(slots)?;
        self.entry(slot).store(mark << 2 | MAKING, Ordering::Release);
        Ok(mark)
    }

    /// A slot without an owner.
    fn free_slot(&self, slots: &mut Slots) -> io::Result<u64> {
        if slots.free.is_empty() {
            let first = slots.fresh;
            if first + STEP > SLOTS {
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            sys::fallocate(self.file.as_fd(), 0, DIRECTORY_AT + first * 8, STEP * 8)?;
            // SAFETY: a word of the header, as in `entry`.
            let entries = unsafe { &*self.head.add(word::ENTRIES) };
            entries.store(first + STEP, Ordering::Release);
            slots.fresh = first + STEP;
            slots.free.extend(first..first + STEP);
        }
        slots.free.pop_first().ok_or_else(|| io::Error::from_raw_os_error(libc::ENOSPC))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: mapped in `open`, and only `self` leads to the mapping.
        unsafe { mapping::unmap(self.head.cast(), HEAD_BYTES) };
    }
}

impl LiveStore for LiveArena {
    fn existing(&self, disk: u64) -> io::Result<Option<LiveFile>> {
        let lease = {
            let mut slots = self.inner.slots.lock();
            let Some(slot) = slots.complete.get(&disk).copied() else { return Ok(None) };
            self.map(&mut slots, slot)
        };
        let base = window(lease.slot);
        LiveFile::at(self.inner.file.clone(), base, Some(lease), self.inner.mark).map(Some)
    }

    fn fresh(&self, disk: u64) -> io::Result<LiveFile> {
        if disk >= MARK {
            return Err(io::Error::from_raw_os_error(libc::EFBIG));
        }
        let lease = {
            let mut slots = self.inner.slots.lock();
            if let Some(before) = slots.making.remove(&disk) {
                self.inner.leave(&mut slots, before);
            }
            let slot = self.inner.free_slot(&mut slots)?;
            let entry = self.inner.entry(slot);
            // Set before the memory is touched, so that a worker that dies leaves no memory without an entry.
            entry.store(disk << 2 | MAKING, Ordering::Release);
            slots.making.insert(disk, slot);
            let end = window(slot) + WINDOW;
            if self.inner.file.metadata()?.len() < end {
                self.inner.file.set_len(end)?;
            }
            self.map(&mut slots, slot)
        };
        let base = window(lease.slot);
        LiveFile::at(self.inner.file.clone(), base, Some(lease), self.inner.mark)
    }

    fn disks(&self) -> io::Result<Vec<u64>> {
        Ok(self.inner.slots.lock().complete.keys().copied().collect())
    }

    fn publish(&self, disk: u64) -> io::Result<()> {
        let mut slots = self.inner.slots.lock();
        let slot = slots.making.remove(&disk).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?;
        // An earlier map that did not fit the disk's files.
        if let Some(before) = slots.complete.remove(&disk) {
            self.inner.leave(&mut slots, before);
        }
        self.inner.entry(slot).store(disk << 2 | COMPLETE, Ordering::Release);
        slots.complete.insert(disk, slot);
        Ok(())
    }

    fn abandon(&self, disk: u64) -> io::Result<()> {
        let mut slots = self.inner.slots.lock();
        if let Some(slot) = slots.making.remove(&disk) {
            self.inner.leave(&mut slots, slot);
        }
        Ok(())
    }

    fn remove(&self, disk: u64) -> io::Result<()> {
        let mut slots = self.inner.slots.lock();
        for slot in [slots.making.remove(&disk), slots.complete.remove(&disk)].into_iter().flatten() {
            self.inner.leave(&mut slots, slot);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
