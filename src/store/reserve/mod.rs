//! Keeps space back for metadata: a store that is filled to the last block still flushes, discards, deletes, renames,
//! stops and starts.
//!
//! [`Reserve`] is the store's medium, with a preallocated file beside the records. What must hold:
//! - A write of metadata (records, map files) that finds no space frees a part of the file, then tries again (D19).
//! - While a part of the reserve is freed, data gets no new space: what was freed for metadata must not go to a guest.
//!   Writes of data that need no new space go on.
//! - The zeros of a discard that ends within a block may use the reserve too, up to half of it.
//! - A sync is never repeated: after a failed sync it is unknown what is durable.
//! - The file is filled up before data gets space again, at the next operation that may find some.
//!
//! Locks, in order: `file` (held while metadata tries again, so that the file is not filled up meanwhile), `gate`.

#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock, RwLockReadGuard};

use crate::format::layout::{DATA_SUFFIX, INDEX_SUFFIX, RESERVE, STAGED_SUFFIX, TRACES};
use crate::io::{Medium, MediumFile, Open, Space, Stamp, is_full, sys};

const MIB: u64 = 1 << 20;
/// Bounds in bytes of the default reserve, which is 1/256 of the filesystem.
const DEFAULT: (u64, u64) = (4 * MIB, 64 * MIB);
/// Default for a store in memory, where the reserve takes memory.
const DEFAULT_IN_MEMORY: u64 = MIB;
/// The reserve is at most the filesystem divided by this, whatever the configuration says.
const LARGEST_PART: u64 = 16;
/// Shortest time between two log lines about a full store.
const LOG_EVERY_NS: i64 = 10_000_000_000;

/// The store's medium, with a reserve.
pub struct Reserve {
    inner: Arc<dyn Medium>,
    shared: Arc<Shared>,
}

/// State of the reserve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReserveState {
    /// Configured bytes of the reserve.
    pub wanted: u64,
    /// Bytes that the reserve has now.
    pub held: u64,
    /// A part is freed: data gets no new space.
    pub in_use: bool,
    /// `in_use`, or a write of data found no space and hardly any was freed since.
    pub full: bool,
}

struct Shared {
    inner: Arc<dyn Medium>,
    wanted: u64,
    /// Bytes that are freed at a time. Some filesystems cannot free a part of an allocation, so the file is allocated
    /// in such steps.
    step: u64,
    held: AtomicU64,
    /// A part is freed.
    short: AtomicBool,
    /// Held shared by writes of data. Taken exclusively once when `short` is set, to wait for the writes that saw it
    /// unset.
    gate: RwLock<()>,
    /// The reserve's file, if it could be created.
    file: Mutex<Option<Arc<dyn MediumFile>>>,
    logged_ns: AtomicI64,
    /// Free bytes + 1 that the filesystem reported when a write of data found no space; 0: none did. Filesystems keep
    /// some of the space that they report as free.
    refused_at: AtomicU64,
}

fn no_space() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOSPC)
}

/// Bytes of the reserve on a filesystem of `total` bytes.
fn size_for(total: u64, in_memory: bool, wanted: Option<u64>) -> u64 {
    let default = if in_memory { DEFAULT_IN_MEMORY } else { (total / 256).clamp(DEFAULT.0, DEFAULT.1) };
    wanted.unwrap_or(default).min(total / LARGEST_PART) / 4096 * 4096
}

/// Runs an operation that creates a file in the store before the store is open. Frees a part of the reserve if there is
/// no space for it. The caller holds the store's lock. Opening the store fills the reserve up.
///
/// # Errors
/// Errors of `operation`.
pub fn with_reserve_of<T>(
    medium: &dyn Medium,
    mut operation: impl FnMut() -> io::Result<T>,
) -> io::Result<T> {
    let give_back = || {
        let file = medium.open(RESERVE, Open::Existing)?;
        let len = file.len()?;
        file.set_len(len.saturating_sub(MIB))?;
        Ok::<_, io::Error>(len > 0)
    };
    match operation() {
        Err(e) if is_full(&e) && give_back().unwrap_or(false) => operation(),
        other => other,
    }
}

impl Reserve {
    /// Keeps `wanted` bytes back (0: none; `None`: the default), as far as there is space.
    ///
    /// # Errors
    /// When the filesystem does not report its size. A reserve that cannot be created or filled is no error: it is
    /// created as soon as there is space.
    pub fn over(inner: Arc<dyn Medium>, wanted: Option<u64>) -> io::Result<Self> {
        let wanted = size_for(inner.space()?.total, inner.never_waits(), wanted);
        let shared = Shared {
            inner: inner.clone(),
            wanted,
            step: (wanted / 16).next_multiple_of(64 << 10).max(256 << 10),
            held: AtomicU64::new(0),
            short: AtomicBool::new(wanted > 0),
            gate: RwLock::new(()),
            file: Mutex::new(None),
            logged_ns: AtomicI64::new(0),
            refused_at: AtomicU64::new(0),
        };
        if wanted == 0 {
            // Removes the reserve of an earlier configuration.
            match inner.remove(RESERVE) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        } else if !shared.refill() {
            tracing::warn!(
                wanted,
                held = shared.held.load(Ordering::Relaxed),
                "there is no space for the store's reserve; writes that need space are refused until some is free"
            );
        }
        Ok(Self { inner, shared: Arc::new(shared) })
    }

    /// The state, after an attempt to fill the reserve up.
    pub fn state(&self) -> ReserveState {
        let shared = &self.shared;
        let whole = shared.refill();
        let held = shared.held.load(Ordering::Relaxed);
        let refused_at = shared.refused_at.load(Ordering::Relaxed);
        let refused = refused_at > 0 && shared.inner.space().is_ok_and(|s| s.free < refused_at + MIB);
        if !refused {
            shared.refused_at.store(0, Ordering::Relaxed);
        }
        ReserveState { wanted: shared.wanted, held, in_use: !whole, full: refused || !whole }
    }
}

impl Shared {
    /// Fills up what is missing, as far as there is space. Returns whether no part is freed.
    fn refill(&self) -> bool {
        if !self.short.load(Ordering::Acquire) {
            return true;
        }
        // The holder of the lock needs what was freed.
        let Some(mut file) = self.file.try_lock() else { return false };
        match self.fill(&mut file) {
            Ok(()) => {
                self.short.store(false, Ordering::Release);
                true
            }
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                self.log("the store's filesystem cannot preallocate; no space is kept back for metadata");
                self.short.store(false, Ordering::Release);
                true
            }
            Err(error) => {
                if !is_full(&error) {
                    tracing::debug!(%error, "filling the store's reserve");
                }
                false
            }
        }
    }

    fn fill(&self, slot: &mut Option<Arc<dyn MediumFile>>) -> io::Result<()> {
        let file = match slot {
            Some(file) => file.clone(),
            None => {
                let file = self.inner.open(RESERVE, Open::Create)?;
                let len = file.len()?.min(self.wanted);
                // In a copy of the store the file may be a hole.
                let len = if file.allocated()? >= len { len } else { 0 };
                file.set_len(len)?;
                self.held.store(len, Ordering::Relaxed);
                slot.insert(file).clone()
            }
        };
        let mut held = self.held.load(Ordering::Relaxed);
        while held < self.wanted {
            let step = self.step.min(self.wanted - held);
            if self.inner.space()?.free < step {
                return Err(no_space());
            }
            // In steps: some filesystems cannot free a part of one allocation.
            let filled = file.allocate(held, step).and_then(|()| file.set_len(held + step));
            if let Err(error) = filled {
                // Frees what was allocated of the step past the end of the file.
                let _ = file.set_len(held);
                return Err(error);
            }
            held += step;
            self.held.store(held, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Frees a part of the reserve. Returns false when no more than `keep` bytes are held.
    fn release(&self, file: Option<&Arc<dyn MediumFile>>, keep: u64) -> bool {
        let held = self.held.load(Ordering::Relaxed);
        let Some(file) = file.filter(|_| held > keep) else { return false };
        if !self.short.swap(true, Ordering::AcqRel) {
            // Waits for the writes of data that may still allocate space (D20).
            drop(self.gate.write());
            self.log("the store is full: its reserve is in use, and writes that need space are refused until some is free");
        }
        let left = held - (held - 1) % self.step - 1;
        if file.set_len(left).is_err() {
            return false;
        }
        self.held.store(left, Ordering::Relaxed);
        true
    }

    /// Runs a write of metadata, with space of the reserve if there is no other.
    fn metadata<T>(&self, mut operation: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        let first = operation();
        if first.as_ref().is_err_and(is_full) { self.with_reserve(0, operation) } else { first }
    }

    /// Repeats the operation, and frees parts of the reserve, while that helps and more than `keep` bytes are held.
    fn with_reserve<T>(&self, keep: u64, mut operation: impl FnMut() -> io::Result<T>) -> io::Result<T> {
        let file = self.file.lock();
        loop {
            let again = operation();
            if !again.as_ref().is_err_and(is_full) || !self.release(file.as_ref(), keep) {
                return again;
            }
        }
    }

    /// Admits a write of data that needs no new space, or may take some.
    fn admit(&self, file: &dyn MediumFile, offset: u64, len: u64) -> io::Result<RwLockReadGuard<'_, ()>> {
        self.refill();
        let gate = self.gate.read();
        if self.short.load(Ordering::Acquire) && !file.has_space(offset, len).unwrap_or(false) {
            return Err(no_space());
        }
        Ok(gate)
    }

    fn log(&self, what: &'static str) {
        let (now, last) = (sys::now_ns(), self.logged_ns.load(Ordering::Relaxed));
        if now - last > LOG_EVERY_NS {
            self.logged_ns.store(now, Ordering::Relaxed);
            tracing::warn!(store = %self.inner.root().display(), "{what}");
        }
    }
}

/// Whether a file may not use the reserve. A trace only makes boots faster, and may be larger than what a flush needs. The
/// index of a layer is made again from the map files, in memory if need be (D76).
fn is_data(name: &str) -> bool {
    let name = name.strip_suffix(STAGED_SUFFIX).unwrap_or(name);
    name.ends_with(DATA_SUFFIX)
        || name.ends_with(INDEX_SUFFIX)
        || name.split_once('/').is_some_and(|(dir, _)| dir == TRACES)
}

impl Medium for Reserve {
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn MediumFile>> {
        let shared = self.shared.clone();
        let inner = shared.metadata(|| self.inner.open(name, how))?;
        Ok(if is_data(name) {
            Arc::new(DataFile { inner, shared })
        } else {
            Arc::new(MetadataFile { inner, shared })
        })
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.shared.metadata(|| self.inner.rename(from, to))
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.shared.metadata(|| self.inner.remove(name))
    }
    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        let done = self.inner.sync_dir(dir);
        // The files that were removed before may have been large.
        self.shared.refill();
        done
    }
    fn list_stamped(&self, dir: &str) -> io::Result<Vec<(String, Option<Stamp>)>> {
        self.inner.list_stamped(dir)
    }
    fn stamp(&self, name: &str) -> io::Result<Option<Stamp>> {
        self.inner.stamp(name)
    }
    fn allocated(&self, name: &str) -> io::Result<Option<u64>> {
        self.inner.allocated(name)
    }
    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        self.inner.list(dir)
    }
    fn make_dir(&self, dir: &str) -> io::Result<()> {
        self.shared.metadata(|| self.inner.make_dir(dir))
    }
    fn never_waits(&self) -> bool {
        self.inner.never_waits()
    }
    fn space(&self) -> io::Result<Space> {
        self.inner.space()
    }
    fn root(&self) -> PathBuf {
        self.inner.root()
    }
}

/// A record or map file.
struct MetadataFile {
    inner: Arc<dyn MediumFile>,
    shared: Arc<Shared>,
}

impl MediumFile for MetadataFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.inner.read_at(buf, offset)
    }
    fn read_now(&self, buf: &mut [u8], offset: u64) -> io::Result<Option<usize>> {
        self.inner.read_now(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.shared.metadata(|| self.inner.write_at(buf, offset))
    }
    fn sync_data(&self) -> io::Result<()> {
        self.inner.sync_data()
    }
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.shared.metadata(|| self.inner.set_len(len))
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.shared.metadata(|| self.inner.punch(offset, len))
    }
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.shared.metadata(|| self.inner.allocate(offset, len))
    }
    fn allocated(&self) -> io::Result<u64> {
        self.inner.allocated()
    }
    fn has_space(&self, offset: u64, len: u64) -> io::Result<bool> {
        self.inner.has_space(offset, len)
    }
    fn identity(&self) -> io::Result<(u64, u64)> {
        self.inner.identity()
    }
}

/// A data file, a trace or an index. Guests decide how much is written to it.
struct DataFile {
    inner: Arc<dyn MediumFile>,
    shared: Arc<Shared>,
}

impl MediumFile for DataFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.inner.read_at(buf, offset)
    }
    fn read_now(&self, buf: &mut [u8], offset: u64) -> io::Result<Option<usize>> {
        self.inner.read_now(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let _gate = self.shared.admit(&*self.inner, offset, buf.len() as u64)?;
        self.inner.write_at(buf, offset).inspect_err(|error| {
            if is_full(error)
                && let Ok(space) = self.shared.inner.space()
            {
                self.shared.refused_at.store(space.free + 1, Ordering::Relaxed);
            }
        })
    }
    fn write_reserved(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        match self.write_at(buf, offset) {
            // A guest decides how often this happens, so half of the reserve stays for metadata.
            Err(e) if is_full(&e) => {
                self.shared.with_reserve(self.shared.wanted / 2, || self.inner.write_at(buf, offset))
            }
            other => other,
        }
    }
    fn sync_data(&self) -> io::Result<()> {
        self.inner.sync_data()
    }
    fn check_written_back(&self) -> io::Result<()> {
        self.inner.check_written_back()
    }
    fn len(&self) -> io::Result<u64> {
        self.inner.len()
    }
    /// Frees space, and may need some for it.
    fn set_len(&self, len: u64) -> io::Result<()> {
        let done = self.shared.metadata(|| self.inner.set_len(len));
        self.shared.refill();
        done
    }
    /// As `set_len`: frees space, and may need some for it.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let done = self.shared.metadata(|| self.inner.punch(offset, len));
        self.shared.refill();
        done
    }
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        let _gate = self.shared.admit(&*self.inner, offset, len)?;
        self.inner.allocate(offset, len)
    }
    fn allocated(&self) -> io::Result<u64> {
        self.inner.allocated()
    }
    fn has_space(&self, offset: u64, len: u64) -> io::Result<bool> {
        self.inner.has_space(offset, len)
    }
    fn identity(&self) -> io::Result<(u64, u64)> {
        self.inner.identity()
    }
}
