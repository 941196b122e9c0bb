//! Descriptors of the cache's files: taken at use, given back when others need them or after a while without use.
//!
//! What must hold: the number of cached sources costs no descriptors, and files that are opened by their names are those
//! that a [`Files`] stands for. So a remover retires them first (D51).

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::SourceKey;
use super::files::{Opened, blocks_name, sums_name};
use crate::io::{Medium, Open};

/// Ticks between two looks at which sources were not used since the last one.
const IDLE_TICKS: u64 = 60;
/// Sources that have descriptors at a time, at most. Each has two.
const MOST: u64 = 128;
/// The cache takes at most this part of the descriptors that the process may have.
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
    /// The names are gone, or another's.
    Retired,
}

impl Files {
    /// Of files that are there.
    pub fn existing(key: SourceKey, open: &Arc<OpenFiles>) -> Arc<Self> {
        Self::with(key, open, State::Closed)
    }

    /// Of files that were made just now.
    pub fn made(key: SourceKey, open: &Arc<OpenFiles>, opened: Opened) -> Arc<Self> {
        open.close_down_to(open.most - 1);
        let files = Self::with(key, open, State::Open(Arc::new(opened)));
        open.note(&files);
        files
    }

    fn with(key: SourceKey, open: &Arc<OpenFiles>, state: State) -> Arc<Self> {
        Arc::new(Self { key, open: open.clone(), state: Mutex::new(state), used: AtomicU64::new(0) })
    }

    /// The files, for as long as the result is kept.
    ///
    /// # Errors
    /// What the system says; `NotFound` when they were retired.
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

    /// The files, when they are open and need not be waited for.
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

    /// Before the names go: they are never opened by this one again.
    pub fn retire(&self) {
        *self.state.lock() = State::Retired;
        self.open.forget(self);
    }

    fn close(&self) {
        // One that is being opened at this moment is in use.
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
    /// The clock at the last look.
    looked_at: AtomicU64,
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
            looked_at: AtomicU64::new(0),
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

    /// Closes those that were used longest ago until at most `keep` are open. Who uses one at the moment goes on.
    fn close_down_to(&self, keep: usize) {
        if self.list.lock().len() <= keep {
            return;
        }
        let mut open = self.listed();
        open.sort_by_key(|files| files.used.load(Ordering::Relaxed));
        let surplus = open.len().saturating_sub(keep);
        open[..surplus].iter().for_each(|files| files.close());
    }

    /// To be called about once a second.
    pub fn tick(&self) {
        if !(self.ticks.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(IDLE_TICKS) {
            return;
        }
        let now = self.clock.load(Ordering::Relaxed);
        let before = self.looked_at.swap(now, Ordering::Relaxed);
        for files in self.listed() {
            if files.used.load(Ordering::Relaxed) <= before {
                files.close();
            }
        }
    }

    /// Sources that have descriptors.
    #[cfg(test)]
    pub fn count(&self) -> usize {
        self.listed().len()
    }

    /// How many sources may have descriptors.
    #[cfg(test)]
    pub fn most(&self) -> usize {
        self.most
    }
}
