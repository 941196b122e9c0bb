//! A medium in memory that loses what a real one may lose.
//!
//! Every change that was not synced is in flight. A cut ([`SimMedium::crash`]) keeps any part of the changes. Each 64
//! bytes of a file have one of the contents that they had since the last sync. A file has one of its lengths. Each
//! change of a directory happened or did not; a rename happened wholly or not at all. Data files keep aligned blocks of
//! 4096 bytes whole, as docs/format.md assumes of the medium. After a failed sync the rest of a file's bytes is never
//! written. Any call can fail. A hook sees every call, to cut there or to run other calls in the middle of it.
//!
//! What must hold: the simulated medium keeps no more order than docs/format.md, "What is assumed of the medium",
//! promises.

mod file;
mod live;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use self::file::{Inode, SimFile};
pub use self::live::SimLive;
use super::{Medium, MediumFile, Open, Space, Stamp};

/// Random numbers from a seed. One seed always gives the same numbers.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// Starts at a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }
    /// The next number (splitmix64).
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    /// A number below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        self.number() % n
    }
    /// True `percent` times in a hundred.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
    /// One of a slice that is not empty.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len() as u64) as usize]
    }
    /// A second generator. Its use does not change the later numbers of this one.
    pub fn fork(&mut self) -> Self {
        Self(self.number())
    }
}

/// A call of the medium.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Call {
    /// Opening an existing file.
    Open,
    /// Opening a file that may be created.
    Create,
    /// Reading a file.
    Read,
    /// Writing to a file.
    Write,
    /// fdatasync(2).
    SyncData,
    /// Truncating or extending a file.
    SetLen,
    /// Punching a hole.
    Punch,
    /// Reserving space.
    Allocate,
    /// Renaming.
    Rename,
    /// Removing a file.
    Remove,
    /// fsync(2) of a directory.
    SyncDir,
    /// Creating a directory.
    MakeDir,
}

/// Whether a hook runs before or after the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Before the call. An error of the hook is the error of the call, which then fails as that call may.
    Before,
    /// After the call, which has taken effect. An error of the hook is the error of the call all the same.
    After,
}

/// A call as a hook sees it.
#[derive(Debug, Clone, Copy)]
pub struct Event<'a> {
    /// Which call.
    pub call: Call,
    /// File or directory, relative to the root of the medium. For a rename the new name.
    pub name: &'a str,
    /// Before or after.
    pub stage: Stage,
}

/// A function that sees every call. The medium holds no lock while it runs.
pub type Hook = Arc<dyn Fn(&Event<'_>) -> io::Result<()> + Send + Sync>;

/// A planned failure of a call.
#[derive(Debug, Clone)]
pub struct Fault {
    /// Which call.
    pub call: Call,
    /// Only for names that contain this.
    pub name: String,
    /// Number of such calls that succeed first.
    pub skip: u64,
    /// Number of calls that fail then.
    pub times: u64,
    /// The error number.
    pub errno: i32,
}

/// How much of the changes in flight a cut keeps, in percent.
#[derive(Debug, Clone, Copy)]
pub struct Keep {
    /// Sectors of files.
    pub sectors: u64,
    /// Lengths of files.
    pub lengths: u64,
    /// Changes of directories.
    pub entries: u64,
    /// Whether sectors of a lengthened file that were never written may have any bytes.
    pub stale: bool,
}

impl Keep {
    /// All, none, or a part, chosen for each kind separately.
    pub fn any(rng: &mut Rng) -> Self {
        let mut some = || *rng.fork().pick(&[0, 100, 50, 10, 90]);
        let (sectors, lengths, entries) = (some(), some(), some());
        Self { sectors, lengths, entries, stale: rng.chance(25) }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    Dir,
    File(u64),
}

/// A change of names, which happens wholly or not at all.
#[derive(Debug, Clone)]
struct DirChange {
    dir: String,
    /// The name, and its entry after the change.
    set: (String, Option<Entry>),
    /// For a rename: the file loses its other names.
    moved: bool,
}

#[derive(Debug, Clone, Default)]
struct State {
    inodes: HashMap<u64, Arc<Inode>>,
    next_inode: u64,
    names: BTreeMap<String, Entry>,
    durable: BTreeMap<String, Entry>,
    pending: Vec<DirChange>,
    faults: Vec<Fault>,
    rng: Option<Rng>,
}

impl State {
    fn rng(&mut self) -> &mut Rng {
        self.rng.get_or_insert_with(|| Rng::new(0))
    }
    fn inode(&mut self, id: u64) -> &mut Inode {
        Arc::make_mut(self.inodes.entry(id).or_default())
    }
    fn change(&mut self, change: DirChange) {
        apply(&mut self.names, &change);
        self.pending.push(change);
    }
    fn file(&self, name: &str) -> io::Result<u64> {
        match self.names.get(name) {
            Some(Entry::File(id)) => Ok(*id),
            Some(Entry::Dir) => Err(io::Error::from_raw_os_error(libc::EISDIR)),
            None => Err(io::Error::from_raw_os_error(libc::ENOENT)),
        }
    }
    fn dir(&self, dir: &str) -> io::Result<()> {
        match self.names.get(dir) {
            _ if dir == "." => Ok(()),
            Some(Entry::Dir) => Ok(()),
            Some(Entry::File(_)) => Err(io::Error::from_raw_os_error(libc::ENOTDIR)),
            None => Err(io::Error::from_raw_os_error(libc::ENOENT)),
        }
    }
    /// The error of the next planned fault that matches this call.
    fn planned(&mut self, call: Call, name: &str) -> Option<io::Error> {
        for fault in self.faults.iter_mut().filter(|f| f.call == call && name.contains(&f.name)) {
            if fault.skip > 0 {
                fault.skip -= 1;
            } else if fault.times > 0 {
                fault.times -= 1;
                return Some(io::Error::from_raw_os_error(fault.errno));
            }
        }
        None
    }
}

fn apply(names: &mut BTreeMap<String, Entry>, change: &DirChange) {
    let (name, entry) = &change.set;
    if change.moved {
        names.retain(|_, e| Some(*e) != *entry);
    }
    match entry {
        Some(entry) => names.insert(name.clone(), *entry),
        None => names.remove(name),
    };
}

fn clean(name: &str) -> &str {
    name.strip_prefix("./").unwrap_or(name)
}

fn dir_of(name: &str) -> &str {
    name.rsplit_once('/').map_or(".", |(dir, _)| dir)
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    hook: Mutex<Option<Hook>>,
    /// Whether files have stamps.
    stamps: AtomicBool,
}

impl Shared {
    fn notify(&self, call: Call, name: &str, stage: Stage) -> io::Result<()> {
        let hook = self.hook.lock().clone();
        hook.map_or(Ok(()), |hook| hook(&Event { call, name, stage }))
    }

    /// Runs one call: hook, planned faults, the effect, hook. `fail` applies what a failing call may have done.
    fn call<T>(
        &self,
        (call, name): (Call, &str),
        fail: impl FnOnce(&mut State),
        deed: impl FnOnce(&mut State) -> io::Result<T>,
    ) -> io::Result<T> {
        let refused = self.notify(call, name, Stage::Before).err();
        let mut state = self.state.lock();
        if let Some(error) = refused.or_else(|| state.planned(call, name)) {
            fail(&mut state);
            return Err(error);
        }
        let done = deed(&mut state)?;
        drop(state);
        self.notify(call, name, Stage::After)?;
        Ok(done)
    }
}

/// A directory tree in memory.
#[derive(Clone, Default)]
pub struct SimMedium {
    shared: Arc<Shared>,
}

impl fmt::Debug for SimMedium {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("SimMedium").field(&self.shared.state.lock().names).finish()
    }
}

impl SimMedium {
    /// An empty directory.
    pub fn new(seed: u64) -> Self {
        let new = Self::default();
        new.shared.state.lock().rng = Some(Rng::new(seed));
        new
    }

    /// Sets the hook; `None` removes it.
    pub fn set_hook(&self, hook: Option<Hook>) {
        *self.shared.hook.lock() = hook;
    }

    /// Gives files stamps. An inode is never used again, so it is a stamp of what is written before it has a name.
    pub fn stamp_files(&self) {
        self.shared.stamps.store(true, Ordering::Relaxed);
    }

    /// Plans a fault.
    pub fn plan(&self, fault: Fault) {
        self.shared.state.lock().faults.push(fault);
    }

    fn like(&self, state: State) -> Self {
        let stamps = AtomicBool::new(self.shared.stamps.load(Ordering::Relaxed));
        Self { shared: Arc::new(Shared { state: Mutex::new(state), hook: Mutex::default(), stamps }) }
    }

    /// The medium refuses what is in flight of a file, and the kernel drops it from memory. The next sync fails, or
    /// [`MediumFile::check_written_back`].
    pub fn refuse_write_back(&self, name: &str) {
        self.with_inode(name, Inode::refuse);
    }

    /// The kernel drops from memory what it considers written of a file.
    pub fn evict(&self, name: &str) {
        self.with_inode(name, Inode::evict);
    }

    fn with_inode(&self, name: &str, deed: impl FnOnce(&mut Inode)) {
        let mut state = self.shared.state.lock();
        if let Ok(id) = state.file(name) {
            deed(state.inode(id));
        }
    }

    /// Removes all planned faults.
    pub fn forget_faults(&self) {
        self.shared.state.lock().faults.clear();
    }

    /// An independent copy of the medium, with its changes in flight, without hook and faults.
    pub fn fork(&self) -> Self {
        let mut state = self.shared.state.lock().clone();
        state.faults.clear();
        self.like(state)
    }

    /// The medium after a power cut now. Everything on it is durable.
    pub fn crash(&self, rng: &mut Rng, keep: Keep) -> Self {
        let state = self.shared.state.lock().clone();
        let mut names = state.durable;
        for change in &state.pending {
            if rng.chance(keep.entries) {
                apply(&mut names, change);
            }
        }
        // Files in a directory that is gone are gone too.
        let dirs: Vec<String> =
            names.iter().filter(|(_, e)| **e == Entry::Dir).map(|(n, _)| n.clone()).collect();
        names.retain(|name, _| dir_of(name) == "." || dirs.iter().any(|d| d == dir_of(name)));
        let mut after =
            State { next_inode: state.next_inode, durable: names.clone(), names, ..State::default() };
        // In the order of names, so that a seed always cuts the same way.
        for id in after.names.values().filter_map(|e| if let Entry::File(id) = e { Some(*id) } else { None })
        {
            let inode = state.inodes.get(&id).map(|inode| inode.crash(rng, keep)).unwrap_or_default();
            after.inodes.insert(id, Arc::new(inode));
        }
        after.rng = Some(rng.fork());
        self.like(after)
    }

    /// Names of all files, with their lengths and contents. Data files are listed without contents.
    pub fn files(&self) -> Vec<(String, u64, Option<Vec<u8>>)> {
        let state = self.shared.state.lock();
        let mut out = Vec::new();
        for (name, entry) in &state.names {
            if let Entry::File(id) = entry {
                let inode = &state.inodes[id];
                let bytes = (!name.ends_with(".data")).then(|| {
                    let mut bytes = vec![0; inode.len as usize];
                    inode.read(&mut bytes, 0);
                    bytes
                });
                out.push((name.clone(), inode.len, bytes));
            }
        }
        out
    }

    /// Names of all directories.
    pub fn dirs(&self) -> Vec<String> {
        let state = self.shared.state.lock();
        state.names.iter().filter(|(_, e)| **e == Entry::Dir).map(|(n, _)| n.clone()).collect()
    }

    /// Number of changes in flight. 0: a cut now loses nothing.
    pub fn in_flight(&self) -> usize {
        let state = self.shared.state.lock();
        state.pending.len() + state.inodes.values().map(|inode| inode.in_flight()).sum::<usize>()
    }
}

impl Medium for SimMedium {
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn MediumFile>> {
        let name = clean(name);
        let call = if how == Open::Create { Call::Create } else { Call::Open };
        let inode = self.shared.call(
            (call, name),
            |_| {},
            |state| {
                state.dir(dir_of(name))?;
                match state.file(name) {
                    Err(e) if e.kind() == io::ErrorKind::NotFound && how == Open::Create => {
                        state.next_inode += 1;
                        let id = state.next_inode;
                        *state.inode(id) = Inode::new(name);
                        let set = (name.to_owned(), Some(Entry::File(id)));
                        state.change(DirChange { dir: dir_of(name).into(), set, moved: false });
                        Ok(id)
                    }
                    other => other,
                }
            },
        )?;
        Ok(Arc::new(SimFile { shared: self.shared.clone(), inode, name: name.into() }))
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let (from, to) = (clean(from), clean(to));
        self.shared.call(
            (Call::Rename, to),
            |_| {},
            |state| {
                let id = state.file(from)?;
                state.dir(dir_of(to))?;
                let set = (to.to_owned(), Some(Entry::File(id)));
                state.change(DirChange { dir: dir_of(to).into(), set, moved: true });
                Ok(())
            },
        )
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        let name = clean(name);
        self.shared.call(
            (Call::Remove, name),
            |_| {},
            |state| {
                state.file(name)?;
                let set = (name.to_owned(), None);
                state.change(DirChange { dir: dir_of(name).into(), set, moved: false });
                Ok(())
            },
        )
    }
    fn stamp(&self, name: &str) -> io::Result<Option<Stamp>> {
        if !self.shared.stamps.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let inode = self.shared.state.lock().file(clean(name))?;
        Ok(Some(Stamp { inode, changed_ns: 0, len: 0 }))
    }
    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        // A directory whose sync failed keeps its changes in memory: a later sync writes them all.
        let settle = |state: &mut State, percent: u64| {
            let mut rng = state.rng().fork();
            let (mut keep, mut durable) = (Vec::new(), std::mem::take(&mut state.durable));
            for change in std::mem::take(&mut state.pending) {
                if change.dir == dir && rng.chance(percent) {
                    apply(&mut durable, &change);
                } else {
                    keep.push(change);
                }
            }
            (state.pending, state.durable) = (keep, durable);
        };
        self.shared.call(
            (Call::SyncDir, dir),
            |state| settle(state, 50),
            |state| {
                state.dir(dir)?;
                settle(state, 100);
                Ok(())
            },
        )
    }
    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let state = self.shared.state.lock();
        state.dir(dir)?;
        let here = state.names.keys().filter(|name| dir_of(name) == dir);
        Ok(here.map(|name| name.rsplit_once('/').map_or(name.as_str(), |(_, n)| n).to_owned()).collect())
    }
    fn make_dir(&self, dir: &str) -> io::Result<()> {
        self.shared.call(
            (Call::MakeDir, dir),
            |_| {},
            |state| {
                if state.names.contains_key(dir) {
                    return Ok(());
                }
                let set = (dir.to_owned(), Some(Entry::Dir));
                state.change(DirChange { dir: ".".into(), set, moved: false });
                Ok(())
            },
        )
    }
    fn never_waits(&self) -> bool {
        true
    }
    fn space(&self) -> io::Result<Space> {
        Ok(Space { total: 1 << 40, free: 1 << 39, available: 1 << 39 })
    }
    fn root(&self) -> PathBuf {
        PathBuf::from("/simulated")
    }
}
