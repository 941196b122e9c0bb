//! Live maps of the simulation. They outlive a worker, and are gone after a power cut.

use std::collections::HashMap;
use std::io;

use parking_lot::Mutex;

use crate::io::{LiveFile, LiveStore};

/// Live maps in anonymous memory.
#[derive(Debug, Default)]
pub struct SimLive {
    complete: Mutex<HashMap<u64, LiveFile>>,
    fresh: Mutex<HashMap<u64, LiveFile>>,
}

impl SimLive {
    /// A copy of the memory, as a worker that is killed now leaves it.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn fork(&self) -> io::Result<Self> {
        let complete = self.complete.lock();
        let copy = complete.iter().map(|(disk, live)| Ok((*disk, live.duplicate()?)));
        Ok(Self { complete: Mutex::new(copy.collect::<io::Result<_>>()?), fresh: Mutex::default() })
    }
}

impl LiveStore for SimLive {
    fn existing(&self, disk: u64) -> io::Result<Option<LiveFile>> {
        self.complete.lock().get(&disk).map(LiveFile::reopen).transpose()
    }
    fn fresh(&self, disk: u64) -> io::Result<LiveFile> {
        let live = LiveFile::anonymous()?;
        let again = live.reopen()?;
        self.fresh.lock().insert(disk, live);
        Ok(again)
    }
    fn publish(&self, disk: u64) -> io::Result<()> {
        let live =
            self.fresh.lock().remove(&disk).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?;
        self.complete.lock().insert(disk, live);
        Ok(())
    }
    fn abandon(&self, disk: u64) -> io::Result<()> {
        self.fresh.lock().remove(&disk);
        Ok(())
    }
    fn disks(&self) -> io::Result<Vec<u64>> {
        Ok(self.complete.lock().keys().copied().collect())
    }
    fn remove(&self, disk: u64) -> io::Result<()> {
        self.complete.lock().remove(&disk);
        Ok(())
    }
}
