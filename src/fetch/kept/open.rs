//! Descriptors of the cache's files. They are opened at use, and closed when other sources need descriptors or after a
//! while without use.
//!
//! What must hold: the number of descriptors does not depend on the number of cached sources. A [`Files`] never opens
//! files of the same names that replaced its own; so a remover retires it first (D51).

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::SourceKey;
use super::files::{Opened, blocks_name, sums_name};
use crate::io::{Medium, Open};

/// Ticks between two searches for sources without a use since the last search.
const IDLE_TICKS: u64 = 60;
/// The most sources with open descriptors. Each has two.
const MOST: u64 = 128;
/// The cache uses at most this fraction of the descriptors that the process may have.
const PART: u64 = 8;

/// The files of one source, open or not.
pub(super) struct Files {
    key: SourceKey,
    open: Arc<OpenFiles>,
    state: Mutex<State>,
    used: AtomicU64,
}

enum State {
    Closed,
    Open(Arc<Opened>),
    /// The names are removed, or belong to other files.
    Retired,
}

impl Files {
    /// For files that exist.
    pub fn existing(key: SourceKey, open: &Arc<OpenFiles>) -> Arc<Self> {
        Self::with(key, open, State::Closed)
    }

    /// For files that were just created.
    pub fn made(key: SourceKey, open: &Arc<OpenFiles>, opened: Opened) -> Arc<Self> {
        open.close_down_to(open.most - 1);
        let files = Self::with(key, open, State::Open(Arc::new(opened)));
        open.note(&files);
        files
    }

    fn with(key: SourceKey, open: &Arc<OpenFiles>, state: State) -> Arc<Self> {
        Arc::new(Self { key, open: open.clone(), state: Mutex::new(state), used: AtomicU64::new(0) })
    }

    /// The open files. They stay open at least while the result is held.
    ///
    /// # Errors
    /// The error of the system; `NotFound` when they were retired.
    pub fn get(self: &Arc<Self>) -> io::Result<Arc<Opened>> {
        self.used.store(self.open.clock.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
        let mut state = self.state.lock();
        match &*state {
            State::Open(opened) => return Ok(opened.clone()),
            State::Retired => return Err(io::ErrorKind::NotFound.into()),
            State::Closed => {}
        }
        self.open.close_down_to(self.open.most - 1);
        let opened = self.open_both().or_else(|error| match error.raw_os_error() {
            Some(libc::EMFILE | libc::ENFILE) => {
                self.open.close_down_to(0);
                self.open_both()
            }
            _ => Err(error),
        })?;
        let opened = Arc::new(opened);
        *state = State::Open(opened.clone());
        self.open.note(self);
        Ok(opened)
    }

    /// The files, if they are open and the lock is free.
    pub fn get_now(&self) -> Option<Arc<Opened>> {
        self.used.store(self.open.clock.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
        match &*self.state.try_lock()? {
            State::Open(opened) => Some(opened.clone()),
            State::Closed | State::Retired => None,
        }
    }

    fn open_both(&self) -> io::Result<Opened> {
        let medium = &self.open.medium;
        let sums = medium.open(&sums_name(&self.key), Open::Existing)?;
        let blocks = medium.open(&blocks_name(&self.key), Open::Existing)?;
        Ok(Opened { blocks, sums })
    }

    /// Never opens files by their names again. Called before the names are removed.
    pub fn retire(&self) {
        *self.state.lock() = State::Retired;
        self.open.forget(self);
    }

    fn close(&self) {
        // Locked: the files are being opened, so they are in use.
        let Some(mut state) = self.state.try_lock() else { return };
        if matches!(*state, State::Open(_)) {
            *state = State::Closed;
            self.open.forget(self);
        }
    }
}

/// Which files are open.
pub(super) struct OpenFiles {
    medium: Arc<dyn Medium>,
    most: usize,
    list: Mutex<Vec<Weak<Files>>>,
    clock: AtomicU64,
    /// The clock at the last search for idle sources.
    searched_at: AtomicU64,
    ticks: AtomicU64,
}

impl OpenFiles {
    pub fn new(medium: Arc<dyn Medium>) -> Arc<Self> {
        let most = (crate::io::sys::descriptor_limit() / PART / 2).clamp(2, MOST) as usize;
        Arc::new(Self {
            medium,
            most,
            list: Mutex::default(),
            clock: AtomicU64::new(0),
            searched_at: AtomicU64::new(0),
            ticks: AtomicU64::new(0),
        })
    }

    fn note(&self, files: &Arc<Files>) {
        self.list.lock().push(Arc::downgrade(files));
    }

    fn forget(&self, files: &Files) {
        self.list.lock().retain(|other| !std::ptr::eq(other.as_ptr(), files));
    }

    fn listed(&self) -> Vec<Arc<Files>> {
        let mut list = self.list.lock();
        list.retain(|files| files.strong_count() > 0);
        list.iter().filter_map(Weak::upgrade).collect()
    }

    /// Closes the least recently used files until at most `keep` sources have open ones. A caller that uses closed files
    /// goes on with its own handle.
    fn close_down_to(&self, keep: usize) {
        if self.list.lock().len() <= keep {
            return;
        }
        let mut open = self.listed();
        open.sort_by_key(|files| files.used.load(Ordering::Relaxed));
        let surplus = open.len().saturating_sub(keep);
        open[..surplus].iter().for_each(|files| files.close());
    }

    /// Closes idle files. To be called about once a second.
    pub fn tick(&self) {
        if !(self.ticks.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(IDLE_TICKS) {
            return;
        }
        let now = self.clock.load(Ordering::Relaxed);
        let before = self.searched_at.swap(now, Ordering::Relaxed);
        for files in self.listed() {
            if files.used.load(Ordering::Relaxed) <= before {
                files.close();
            }
        }
    }

    /// The number of sources with open descriptors.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.listed().len()
    }

    /// The most sources that may have open descriptors.
    #[cfg(test)]
    pub fn most(&self) -> usize {
        self.most
    }
}
