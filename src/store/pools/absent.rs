//! The medium of a pool that cannot be used: each call fails and says why. No call says that a file does not exist: a
//! delta without files would count as one that was never written (D88).

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::unlisted;
use crate::format::pools::PoolEntry;
use crate::io::{Medium, MediumFile, Open, Space, Stamp};

pub(super) struct AbsentMedium {
    root: PathBuf,
    why: String,
    /// Its drive never comes back: it has no files that could be removed.
    is_lost: bool,
}

impl AbsentMedium {
    pub(super) fn new(pool: &PoolEntry, why: &str) -> Self {
        let why = format!("pool {} is not available: {why}", pool.name);
        Self { root: PathBuf::from(&pool.dir), why, is_lost: false }
    }

    /// For a pool whose files are to be forgotten.
    pub(super) fn lost(pool: &PoolEntry) -> Self {
        Self { is_lost: true, ..Self::new(pool, "it is lost") }
    }

    /// For a pool that is in no list.
    pub(super) fn unlisted(number: u64) -> Self {
        Self { root: PathBuf::new(), why: unlisted(number), is_lost: false }
    }

    fn none<T: Default>(&self) -> io::Result<T> {
        if self.is_lost { Ok(T::default()) } else { self.gone() }
    }

    fn gone<T>(&self) -> io::Result<T> {
        Err(io::Error::other(self.why.clone()))
    }
}

impl Medium for AbsentMedium {
    fn open(&self, _: &str, _: Open) -> io::Result<Arc<dyn MediumFile>> {
        self.gone()
    }
    fn rename(&self, _: &str, _: &str) -> io::Result<()> {
        self.gone()
    }
    fn remove(&self, _: &str) -> io::Result<()> {
        self.none()
    }
    fn sync_dir(&self, _: &str) -> io::Result<()> {
        self.none()
    }
    fn allocated(&self, _: &str) -> io::Result<Option<u64>> {
        self.gone()
    }
    fn stamp(&self, _: &str) -> io::Result<Option<Stamp>> {
        self.gone()
    }
    fn list(&self, _: &str) -> io::Result<Vec<String>> {
        self.none()
    }
    fn make_dir(&self, _: &str) -> io::Result<()> {
        self.gone()
    }
    fn never_waits(&self) -> bool {
        false
    }
    fn space(&self) -> io::Result<Space> {
        self.gone()
    }
    fn root(&self) -> PathBuf {
        self.root.clone()
    }
}
