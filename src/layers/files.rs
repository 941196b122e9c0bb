//! The open files of layers, in a bounded number.
//!
//! Why: a chain may have thousands of layers, and disks need descriptors too. What must hold: a file stays open while it is
//! read. Above the bound, the one that was not read for the longest time is closed, roughly, and opened again by the next
//! read (D93).

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};

use crate::crypt::Cipher;
use crate::io::{Medium, MediumFile, Open};

/// The files of a store's layers that are open.
pub(super) struct OpenFiles {
    most: AtomicUsize,
    /// In the order in which they were opened, or found to be in use.
    open: Mutex<VecDeque<Weak<Slot>>>,
}

impl Default for OpenFiles {
    fn default() -> Self {
        Self { most: AtomicUsize::new(usize::MAX), open: Mutex::default() }
    }
}

impl OpenFiles {
    /// Sets how many files are open at a time, beside those that are being read.
    pub fn set_most(&self, most: usize) {
        self.most.store(most.max(1), Ordering::Relaxed);
    }

    #[cfg(test)]
    pub fn count(&self) -> usize {
        let open = self.open.lock();
        open.iter().filter_map(Weak::upgrade).filter(|slot| slot.file.read().is_some()).count()
    }

    /// Takes a file that was just opened, and closes others above the bound.
    fn add(&self, slot: &Arc<Slot>) {
        let most = self.most.load(Ordering::Relaxed);
        let mut closed = Vec::new();
        let mut open = self.open.lock();
        if open.len() >= most {
            open.retain(|slot| slot.strong_count() > 0);
        }
        // Each is passed once because it was read, and not again.
        let mut passes = open.len();
        while open.len() >= most
            && let Some(oldest) = open.pop_front()
        {
            let Some(file) = oldest.upgrade() else { continue };
            if file.is_used.swap(false, Ordering::Relaxed) && passes > 0 {
                passes -= 1;
                open.push_back(oldest);
            } else {
                closed.push(file.file.write().take());
            }
        }
        open.push_back(Arc::downgrade(slot));
        drop(open);
        // Closing may wait; no other reader waits for that.
        drop(closed);
    }
}

struct Slot {
    file: RwLock<Option<Arc<dyn MediumFile>>>,
    /// Read since it was looked at last.
    is_used: AtomicBool,
}

/// A file that is opened when it is read.
pub(super) struct PooledFile {
    path: String,
    medium: Arc<dyn Medium>,
    files: Arc<OpenFiles>,
    slot: Arc<Slot>,
    /// How its bytes are stored.
    cipher: Cipher,
}

impl PooledFile {
    pub fn new(path: String, medium: Arc<dyn Medium>, files: Arc<OpenFiles>) -> Self {
        let slot = Slot { file: RwLock::new(None), is_used: AtomicBool::new(false) };
        Self { path, medium, files, slot: Arc::new(slot), cipher: Cipher::Plain }
    }

    /// The same file, whose bytes are stored with `cipher`.
    pub fn stored_with(self, cipher: Cipher) -> Self {
        Self { cipher, ..self }
    }

    /// As [`PooledFile::new`], of a file that is open.
    pub fn opened(
        file: Arc<dyn MediumFile>,
        path: String,
        medium: Arc<dyn Medium>,
        files: Arc<OpenFiles>,
    ) -> Self {
        let pooled = Self::new(path, medium, files);
        *pooled.slot.file.write() = Some(file);
        pooled.files.add(&pooled.slot);
        pooled
    }

    /// The file, if it is open.
    pub fn get_now(&self) -> Option<Arc<dyn MediumFile>> {
        let file = self.slot.file.try_read()?.clone()?;
        // Avoids a write by each read of several threads.
        if !self.slot.is_used.load(Ordering::Relaxed) {
            self.slot.is_used.store(true, Ordering::Relaxed);
        }
        Some(file)
    }

    /// The file.
    ///
    /// # Errors
    /// As [`Medium::open`].
    pub fn get(&self) -> io::Result<Arc<dyn MediumFile>> {
        if let Some(file) = self.get_now() {
            return Ok(file);
        }
        let opened = self.cipher.over(self.medium.open(&self.path, Open::Existing)?);
        let file = {
            let mut slot = self.slot.file.write();
            if let Some(file) = &*slot {
                // Another thread was faster.
                return Ok(file.clone());
            }
            *slot = Some(opened.clone());
            opened
        };
        self.files.add(&self.slot);
        Ok(file)
    }
}
