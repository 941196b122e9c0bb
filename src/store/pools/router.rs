//! The medium of a store with pools: it leads each path of a delta's file to the pool of that delta, and all other paths
//! to the directory of the store.
//!
//! A call that names only the directory `deltas/` concerns all pools, and fails when one of them does. A caller that
//! knows the delta uses [`Pools::medium`] instead, so that a pool that fails delays and refuses nothing of the others.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::{Pool, Pools};
use crate::format::layout::{DELTAS, DeltaFile};
use crate::io::{Medium, MediumFile, Open, Space, Stamp};

/// See the module.
pub struct Router(pub(in crate::store) Arc<Pools>);

impl Router {
    fn of(&self, path: &str) -> Arc<dyn Medium> {
        match DeltaFile::number_in(path) {
            Some(delta) => self.0.medium(delta),
            None => self.0.default.clone(),
        }
    }

    fn pools(&self) -> Vec<Arc<Pool>> {
        self.0.pools.read().values().cloned().collect()
    }
}

impl Medium for Router {
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn MediumFile>> {
        self.of(name).open(name, how)
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.of(to).rename(from, to)
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.of(name).remove(name)
    }
    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        self.0.default.sync_dir(dir)?;
        if dir != DELTAS {
            return Ok(());
        }
        self.pools().iter().try_for_each(|pool| pool.medium.sync_dir(dir))
    }
    fn allocated(&self, name: &str) -> io::Result<Option<u64>> {
        self.of(name).allocated(name)
    }
    fn stamp(&self, name: &str) -> io::Result<Option<Stamp>> {
        self.of(name).stamp(name)
    }
    fn list_stamped(&self, dir: &str) -> io::Result<Vec<(String, Option<Stamp>)>> {
        let mut files = self.0.default.list_stamped(dir)?;
        if dir == DELTAS {
            for pool in self.pools() {
                files.extend(pool.medium.list_stamped(dir)?);
            }
        }
        Ok(files)
    }
    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let mut names = self.0.default.list(dir)?;
        if dir == DELTAS {
            for pool in self.pools() {
                names.extend(pool.medium.list(dir)?);
            }
        }
        Ok(names)
    }
    fn make_dir(&self, dir: &str) -> io::Result<()> {
        self.0.default.make_dir(dir)
    }
    fn never_waits(&self) -> bool {
        self.0.never_wait()
    }
    fn space(&self) -> io::Result<Space> {
        self.0.default.space()
    }
    fn root(&self) -> PathBuf {
        self.0.default.root()
    }
}
