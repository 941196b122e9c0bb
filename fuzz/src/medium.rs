//! Storage in memory that forgets what was not synced, and fails when told to.
//!
//! Narrow on purpose: only what a delta and the index of a layer need. It stands behind [`plyfs::io::Medium`], as any other would.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::Mutex;
use plyfs::delta::RootStore;
use plyfs::format::record::MapRoot;
use plyfs::io::{LiveFile, LiveStore, Medium, MediumFile, Open, Space};

const BLOCK: usize = 4096;

/// The next failure: after so many calls that change something, with this error number.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    pub after: u32,
    pub errno: i32,
}

#[derive(Default)]
struct Content {
    now: Vec<u8>,
    durable: Vec<u8>,
    /// Blocks that a sync would write.
    dirty: BTreeSet<usize>,
}

impl Content {
    fn touch(&mut self, from: usize, to: usize) {
        self.dirty.extend(from / BLOCK..to.div_ceil(BLOCK));
    }
    fn settle(&mut self, block: usize) {
        let (from, to) = (block * BLOCK, ((block + 1) * BLOCK).min(self.now.len()));
        if from < to {
            if self.durable.len() < to {
                self.durable.resize(to, 0);
            }
            self.durable[from..to].copy_from_slice(&self.now[from..to]);
        }
    }
}

type Names = HashMap<String, Arc<Mutex<Content>>>;

#[derive(Default)]
struct State {
    names: Names,
    durable: Names,
    fault: Option<Fault>,
    /// Syncs that failed so far.
    failed_syncs: u32,
}

/// A directory tree in memory.
#[derive(Default)]
pub struct Memory {
    state: Arc<Mutex<State>>,
}

fn tick(state: &Mutex<State>) -> io::Result<()> {
    let mut state = state.lock();
    match &mut state.fault {
        Some(Fault { after: 0, errno }) => {
            let errno = *errno;
            state.fault = None;
            Err(io::Error::from_raw_os_error(errno))
        }
        Some(fault) => {
            fault.after -= 1;
            Ok(())
        }
        None => Ok(()),
    }
}

impl Memory {
    pub fn set_fault(&self, fault: Option<Fault>) {
        self.state.lock().fault = fault;
    }

    pub fn failed_syncs(&self) -> u32 {
        self.state.lock().failed_syncs
    }

    /// Power goes: of everything that was not synced, what `keep` says survives.
    pub fn power_cut(&self, mut keep: impl FnMut() -> bool) {
        let mut state = self.state.lock();
        state.fault = None;
        let mut all: Vec<String> = state.names.keys().chain(state.durable.keys()).cloned().collect();
        all.sort();
        all.dedup();
        for name in all {
            let (now, durable) = (state.names.get(&name).cloned(), state.durable.get(&name).cloned());
            let same = match (&now, &durable) {
                (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                _ => false,
            };
            let left = if same || keep() { now } else { durable };
            match left {
                Some(file) => drop(state.durable.insert(name, file)),
                None => drop(state.durable.remove(&name)),
            }
        }
        state.names = state.durable.clone();
        for file in state.names.values() {
            let mut file = file.lock();
            for block in std::mem::take(&mut file.dirty) {
                if keep() {
                    file.settle(block);
                }
            }
            let cut = file.now.len() < file.durable.len() && keep();
            let len = file.now.len();
            if cut {
                file.durable.truncate(len);
            }
            file.now = file.durable.clone();
        }
    }
}

impl Medium for Memory {
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn MediumFile>> {
        let found = self.state.lock().names.get(name).cloned();
        let content = match (found, how) {
            (Some(content), _) => content,
            (None, Open::Existing | Open::ToRead) => return Err(io::ErrorKind::NotFound.into()),
            (None, Open::Create) => {
                tick(&self.state)?;
                let content = Arc::new(Mutex::new(Content::default()));
                self.state.lock().names.insert(name.into(), content.clone());
                content
            }
        };
        Ok(Arc::new(Handle { content, state: self.state.clone() }))
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        tick(&self.state)?;
        let mut state = self.state.lock();
        let content = state.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        state.names.insert(to.into(), content);
        Ok(())
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        tick(&self.state)?;
        self.state.lock().names.remove(name).map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
    fn sync_dir(&self, _dir: &str) -> io::Result<()> {
        tick(&self.state).inspect_err(|_| self.state.lock().failed_syncs += 1)?;
        let mut state = self.state.lock();
        state.durable = state.names.clone();
        Ok(())
    }
    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let prefix = format!("{dir}/");
        Ok(self.state.lock().names.keys().filter_map(|n| n.strip_prefix(&prefix)).map(Into::into).collect())
    }
    fn make_dir(&self, _dir: &str) -> io::Result<()> {
        Ok(())
    }
    fn never_waits(&self) -> bool {
        true
    }
    fn space(&self) -> io::Result<Space> {
        Ok(Space { total: 1 << 40, free: 1 << 40, available: 1 << 40 })
    }
    fn root(&self) -> PathBuf {
        "/memory".into()
    }
}

struct Handle {
    content: Arc<Mutex<Content>>,
    state: Arc<Mutex<State>>,
}

impl MediumFile for Handle {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let content = self.content.lock();
        let rest = &content.now[content.now.len().min(offset as usize)..];
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }
    fn read_now(&self, buf: &mut [u8], offset: u64) -> io::Result<Option<usize>> {
        self.read_at(buf, offset).map(Some)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        tick(&self.state)?;
        let (from, to) = (offset as usize, offset as usize + buf.len());
        let mut content = self.content.lock();
        let old = content.now.len();
        if old < to {
            content.now.resize(to, 0);
            content.touch(old.min(from), from);
        }
        content.now[from..to].copy_from_slice(buf);
        content.touch(from, to);
        Ok(())
    }
    fn sync_data(&self) -> io::Result<()> {
        let mut content = self.content.lock();
        let dirty = std::mem::take(&mut content.dirty);
        if let Err(error) = tick(&self.state) {
            // As Linux: the pages are clean now, and their bytes are nowhere but in memory.
            self.state.lock().failed_syncs += 1;
            return Err(error);
        }
        for block in dirty {
            content.settle(block);
        }
        let len = content.now.len();
        content.durable.resize(len, 0);
        Ok(())
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.content.lock().now.len() as u64)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        tick(&self.state)?;
        let mut content = self.content.lock();
        let old = content.now.len();
        content.now.resize(len as usize, 0);
        content.touch((len as usize).min(old), (len as usize).max(old));
        Ok(())
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        tick(&self.state)?;
        let mut content = self.content.lock();
        let end = content.now.len();
        let (from, to) = ((offset as usize).min(end), ((offset + len) as usize).min(end));
        content.now[from..to].fill(0);
        content.touch(from, to);
        Ok(())
    }
    fn allocate(&self, _offset: u64, _len: u64) -> io::Result<()> {
        tick(&self.state)
    }
    fn allocated(&self) -> io::Result<u64> {
        self.len()
    }
    fn identity(&self) -> io::Result<(u64, u64)> {
        Ok((0, 0))
    }
}

/// The root of the one disk; durable when the call returns.
pub struct Roots {
    medium: Arc<Memory>,
    root: Mutex<MapRoot>,
}

impl Roots {
    pub fn new(medium: Arc<Memory>) -> Self {
        Self { medium, root: Mutex::new(MapRoot::default()) }
    }
    pub fn root(&self) -> MapRoot {
        *self.root.lock()
    }
}

impl RootStore for Roots {
    fn commit(&self, root: MapRoot, _modified_ns: i64) -> io::Result<()> {
        tick(&self.medium.state)?;
        *self.root.lock() = root;
        Ok(())
    }
}

/// Live maps that outlive a delta, and not a power cut.
#[derive(Default)]
pub struct Lives {
    complete: Mutex<HashMap<u64, LiveFile>>,
    fresh: Mutex<HashMap<u64, LiveFile>>,
}

impl Lives {
    pub fn insert(&self, disk: u64, live: LiveFile) {
        self.complete.lock().insert(disk, live);
    }
    pub fn forget(&self) {
        self.complete.lock().clear();
        self.fresh.lock().clear();
    }
}

impl LiveStore for Lives {
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
        let live = self.fresh.lock().remove(&disk).ok_or(io::ErrorKind::NotFound)?;
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
